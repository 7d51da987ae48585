"""Tests of the Triton walk in Triton's interpreter, on the CPU: run by test_traces_triton.py.

They need TRITON_INTERPRET=1 before Triton is imported, so they have a process of their own.
"""

from __future__ import annotations

import copy

import numpy as np
import philox_stream
import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from trace_data import F32, F64, make_model, make_noise, make_start, randn

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.traces import TraceNoise, triton_kernel, triton_walk
from torchrl_recall.traces.triton_walk import unsupported
from torchrl_recall.traces.walk import reference_walk


@triton.jit
def probe_kernel(end):
    for _ in tl.range(0, end):
        pass


try:
    probe_kernel[(1,)](2)
except Exception as error:  # Triton 3.6 beside NumPy 2.4
    pytest.skip(f"the interpreter has no loops here: {error}", allow_module_level=True)

walk = triton_walk.triton_walk
# Seen: 2e-6 and 1e-4 at most, relative to the largest number of a column; tf32 is not rounded here.
TOLERANCE = {"float32": 4e-6, "tf32": 4e-6, "tf32x3": 4e-6, "float16": 4e-4}


def model_of(features, actions, num_cells, **kwargs):
    torch.manual_seed(1)
    model = BacktrackModel(features, actions, num_cells=num_cells, **kwargs)
    after, change = 2 * randn(64, features, dtype=F32) + 1, randn(64, features, seed=1, dtype=F32)
    action = randn(64, actions, seed=2, dtype=F32).tanh()
    model.update_normalization(after + 0.3 * change + 0.1, action, after)
    return model


def expected(model, start, noise):
    """The reference walk in float64, in the form of columns."""
    double = copy.deepcopy(model).to(F64)
    noise = TraceNoise(*(None if part is None else part.to(F64) for part in noise))
    with torch.no_grad():
        out = reference_walk(double, start.to(F64), noise)
    alive = torch.ones_like(out.action_log_prob, dtype=torch.bool)
    return {
        "state": out.states[:-1].transpose(0, 1),
        "next_state": out.states[1:].transpose(0, 1),
        "action": out.actions.transpose(0, 1),
        "action_log_prob": out.action_log_prob.t(),
        "delta_log_prob": out.delta_log_prob.t(),
        "mask": (alive if out.alive is None else out.alive).t(),
    }


def assert_walks_like_the_reference(model, rows, num_steps, precision="float32"):
    assert unsupported(model) is None
    start = randn(rows, model.observation.size, seed=5, dtype=F32)
    noise = make_noise(model, num_steps, rows)
    columns = walk(model, start, num_steps, noise=noise, precision=precision)
    assert torch.equal(columns.next_state[:, -1], start)
    for name, value in expected(model, start, noise).items():
        found = getattr(columns, name)
        if name == "mask":
            assert torch.equal(found, value)
        else:
            allowed = TOLERANCE[precision] * float(value.abs().max())
            torch.testing.assert_close(found.to(F64), value, rtol=0, atol=allowed, msg=name)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize(
    ("features", "actions", "num_cells"),
    [
        (3, 1, ()),
        (17, 6, (16,)),
        (3, 1, (40,)),
        (3, 1, (100, 100)),
        (17, 6, (64, 64)),
        (17, 6, (24, 24, 24)),
    ],
)
def test_sizes(features, actions, num_cells, stop):
    assert_walks_like_the_reference(model_of(features, actions, num_cells, stop=stop), 20, 3)


@pytest.mark.parametrize(
    ("features", "actions", "num_cells"),
    [(128, 16, (32, 32)), (111, 8, (256, 256)), (4, 12, (320,)), (29, 3, (32,) * 5)],
)
def test_large_sizes(features, actions, num_cells):
    assert_walks_like_the_reference(model_of(features, actions, num_cells, stop=True), 17, 2)


@pytest.mark.parametrize(("rows", "num_steps"), [(1, 1), (1, 5), (16, 1), (33, 4)])
def test_rows_and_steps(rows, num_steps):
    assert_walks_like_the_reference(model_of(5, 2, (32, 32), stop=True), rows, num_steps)


@pytest.mark.parametrize("precision", TOLERANCE)
def test_precisions(precision):
    assert_walks_like_the_reference(model_of(70, 6, (100, 100), stop=True), 16, 3, precision)


@pytest.mark.parametrize(
    "activation",
    [
        nn.Identity,
        nn.ReLU,
        lambda: nn.LeakyReLU(0.2),
        lambda: nn.ELU(0.7),
        nn.Tanh,
        nn.Sigmoid,
        nn.SiLU,
        nn.GELU,
        lambda: nn.GELU("tanh"),
        nn.Softplus,
        nn.Mish,
    ],
)
def test_activations(activation):
    model = model_of(4, 2, (16, 16), stop=True)
    for network in triton_walk.networks(model):
        network[1], network[3] = activation(), activation()
    assert_walks_like_the_reference(model, 20, 3)


@pytest.mark.parametrize("action", ["tanh", "normal"])
def test_action_heads(action):
    model = make_model("normal", action, dtype=F32, num_cells=(32, 32), stop=True)
    assert_walks_like_the_reference(model, 40, 4)


def test_actions_at_their_bounds():
    model = model_of(3, 2, (16,))
    with torch.no_grad():
        model.action_network[-1].bias[:2] = torch.tensor([9.0, -9.0])
    assert_walks_like_the_reference(model, 20, 2)


def test_a_large_constant_feature_does_not_cancel():
    model = model_of(3, 2, (32, 32))
    for normalizer, mean in ((model.observation.normalizer, 1e5), (model.delta_head.normalizer, 0)):
        normalizer.mean[2], normalizer.variance[2] = mean, 0
    start, noise = randn(20, 3, dtype=F32), make_noise(model, 3, 20)
    start[:, 2] = 1e5
    columns = walk(model, start, 3, noise=noise)
    # In float64 the feature would move, by less than float32 can tell.
    want = sample_traces(model, start, num_steps=3, noise=noise, backend="reference")
    torch.testing.assert_close(columns.action, want["action"], rtol=1e-5, atol=1e-5)


def test_several_launches(monkeypatch):
    monkeypatch.setattr(triton_walk, "TILES_A_LAUNCH", 1)
    model = model_of(3, 2, (16,), stop=True)
    assert_walks_like_the_reference(model, 150, 2)
    seed = torch.tensor([7])
    whole = walk(model, torch.zeros(150, 3), 2, seed=seed)
    part = walk(model, torch.zeros(20, 3), 2, seed=seed)
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(one[:20], other, rtol=1e-6, atol=1e-6)


def test_it_walks_with_the_parameters_of_the_moment():
    model = model_of(3, 2, (16, 16))
    start, noise = randn(4, 3, dtype=F32), make_noise(model, 2, 4)
    before = walk(model, start, 2, noise=noise)
    model.delta_network[0].weight.data.mul_(2)
    model.observation.normalizer.mean.data.add_(1)
    assert not torch.equal(before.state, walk(model, start, 2, noise=noise).state)
    assert_walks_like_the_reference(model, 4, 2)


def test_starts_may_be_expanded_and_noise_transposed():
    model = model_of(3, 2, (16,), stop=True)
    noise = make_noise(model, 2, 6)
    start = randn(1, 3, dtype=F32).expand(6, 3)
    turned = TraceNoise(*(part.transpose(0, 1).contiguous().transpose(0, 1) for part in noise[:3]))
    one, other = (walk(model, start, 2, noise=given) for given in (noise, turned))
    assert all(map(torch.equal, one, other))


BROKEN = {
    "delta": (1, torch.inf),
    "delta_nan": (1, torch.nan),
    "action_nan": (0, torch.nan),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("action", ["tanh", "normal"])
def test_what_is_not_finite_is_masked_like_elsewhere(action, kind):
    model = make_model("normal", action, dtype=F32, num_cells=(16, 16), stop=True)
    start, noise = make_start(model, 20), make_noise(model, 5, 20)
    part, value = BROKEN[kind]
    noise[part][2, 3:9, 1] = value
    noise[part][4, 0] = value
    columns = walk(model, start, 5, noise=noise)
    want = sample_traces(model, start, num_steps=5, noise=noise, backend="reference")
    assert torch.equal(columns.mask, want["collector", "mask"])
    assert not columns.mask[3:9, :3].any()
    keys = ("observation", ("next", "observation"), "action", "action_log_prob", "delta_log_prob")
    for found, key in zip(columns, keys, strict=False):
        torch.testing.assert_close(found, want[key], rtol=1e-5, atol=1e-5)
    assert torch.equal(columns.state[3:9, 2], start[3:9])
    assert not columns.action[3:9, 2].any()
    assert not columns.delta_log_prob[3:9, 2].any()


def test_broken_parameters_are_masked():
    model = model_of(3, 2, (16, 16))
    with torch.no_grad():
        model.delta_network[2].weight[0, 0] = torch.nan
    columns = walk(model, torch.zeros(4, 3), 3, seed=torch.tensor([0]))
    assert not columns.mask.any()
    assert all(bool(torch.isfinite(column).all()) for column in columns)


@pytest.mark.parametrize("seed", [0, 2**40 + 12345, -(2**62) + 99])
def test_seeded_walks_follow_the_stream(seed):
    model = model_of(6, 5, (32, 32), stop=True)
    start = randn(20, 6, seed=5, dtype=F32)
    seeded = walk(model, start, 3, seed=torch.tensor([seed]))
    noise = philox_stream.trace_noise(model, seed, 3, 20)
    given = walk(model, start, 3, noise=noise)
    assert torch.equal(seeded.mask, given.mask)
    for one, other in zip(seeded, given, strict=True):
        torch.testing.assert_close(one, other, rtol=4e-6, atol=4e-6)


def test_a_seed_decides():
    model = model_of(3, 2, (16,))
    start = torch.zeros(40, 3)
    one, same, other = (walk(model, start, 3, seed=torch.tensor([s])) for s in (3, 3, 4))
    assert all(map(torch.equal, one, same))
    assert not torch.isclose(one.state, other.state).all(-1).any()


def test_walks_need_a_source_of_randomness_and_a_known_precision():
    model = model_of(3, 2, (16,))
    with pytest.raises(ValueError, match="seed or noise"):
        walk(model, torch.zeros(1, 3), 1)
    noise = make_noise(model, 1, 1)
    with pytest.raises(ValueError, match="seed or noise"):
        walk(model, torch.zeros(1, 3), 1, seed=torch.tensor([0]), noise=noise)
    with pytest.raises(ValueError, match="precision must be one of"):
        walk(model, torch.zeros(1, 3), 1, seed=torch.tensor([0]), precision="bfloat16")


@triton.jit
def words_kernel(out, seed, head, STEP: tl.constexpr):
    rows, block = tl.arange(0, 16)[:, None], tl.arange(0, 8)[None, :]
    seed = tl.load(seed)
    x0, x1, x2, x3 = triton_kernel.philox(seed, rows, STEP, head, block)
    at = out + 4 * (rows * 8 + block)
    tl.store(at, x0)
    tl.store(at + 1, x1)
    tl.store(at + 2, x2)
    tl.store(at + 3, x3)


@pytest.mark.parametrize("head", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 2**40 + 12345, -1])
def test_words_are_those_of_the_stream(seed, head):
    out = torch.empty(16, 8, 4, dtype=torch.int32)
    words_kernel[(1,)](out, torch.tensor([seed]), head, STEP=31)
    want = philox_stream.words(seed, 16, 31, head, 8)
    assert (out.numpy().view(np.uint32) == want).all()


@triton.jit
def normals_kernel(out, radius, angle):
    at = tl.arange(0, 4096)
    bits = tl.load(radius + at).to(tl.uint32, bitcast=True)
    z0, z1 = triton_kernel.box_muller(bits, tl.load(angle + at).to(tl.uint32, bitcast=True))
    tl.store(out + at, z0)
    tl.store(out + 4096 + at, z1)


def test_normals_are_accurate_at_the_ends_too():
    ends = np.array([0, 1, 2, 3, 2**29, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
    ends = np.concatenate([ends, 2**32 - 2 ** np.arange(1, 30), np.arange(8) * 2**29])
    fill = np.random.default_rng(0).integers(0, 2**32, 4096 - len(ends))
    radius = np.concatenate([ends, fill]).astype(np.uint32)
    angle = np.random.default_rng(1).permutation(radius)
    out = torch.empty(2, 4096)
    words = (torch.from_numpy(word.view(np.int32)) for word in (radius, angle))
    normals_kernel[(1,)](out, *words)
    want = np.stack(philox_stream.box_muller(radius.astype(np.uint64), angle.astype(np.uint64)))
    # Seen: 5e-7, of numbers up to 6.7.
    np.testing.assert_allclose(out.numpy(), want, rtol=0, atol=2e-6)
