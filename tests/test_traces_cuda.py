"""The walks that need a GPU: Triton's kernel and the eager walk as a CUDA graph."""

from __future__ import annotations

import copy
import gc
import weakref
from importlib.util import find_spec

import philox_stream
import pytest
import torch
from trace_data import ACTIONS, F32, F64, OBSERVATIONS, make_model, make_noise, make_start, randn

from torchrl_recall import BacktrackModel
from torchrl_recall.traces import TraceNoise, cuda_graph, draw_noise
from torchrl_recall.traces.columns import Columns
from torchrl_recall.traces.cuda_graph import GraphedWalk
from torchrl_recall.traces.eager import EagerWalk
from torchrl_recall.traces.triton_walk import triton_walk, unsupported
from torchrl_recall.traces.walk import reference_walk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

# Relative to the largest number of a column, over a few steps of a chain that amplifies rounding.
TOLERANCE = {"float32": 1e-5, "tf32x3": 2e-5, "tf32": 1e-2, "float16": 2e-3}
SIZES = [
    (11, 3, (64, 64), 100, 10),
    (17, 6, (256, 256), 1024, 4),
    (111, 8, (256, 256), 8192, 2),
    (3, 1, (40,), 5000, 3),
    (29, 12, (100, 100, 100), 300, 3),
    (4, 2, (), 50, 3),
]


@pytest.fixture
def no_waiting():
    """Make an error of whatever waits for the device."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def gaussian_model(features, actions, num_cells, **kwargs):
    torch.manual_seed(1)
    model = BacktrackModel(features, actions, num_cells=num_cells, **kwargs)
    after, change = 2 * randn(64, features, dtype=F32) + 1, randn(64, features, seed=1, dtype=F32)
    model.update_normalization(
        after + 0.3 * change + 0.1, randn(64, actions, seed=2, dtype=F32).tanh(), after
    )
    return model.to("cuda")


def on_gpu(noise, dtype=None):
    return TraceNoise(*(None if x is None else x.to("cuda", dtype) for x in noise))


def drawn(model, num_steps, rows, seed):
    return draw_noise(model, num_steps, rows, torch.Generator("cuda").manual_seed(seed))


def seed_of(number):
    return torch.tensor([number], device="cuda")


@torch.no_grad()
def assert_like_the_reference(columns: Columns, model, start, noise, tolerance):
    double = copy.deepcopy(model).to(F64)
    want = reference_walk(double, start.to(F64), on_gpu(noise, F64))
    pairs = {
        "state": want.states[:-1],
        "next_state": want.states[1:],
        "action": want.actions,
        "action_log_prob": want.action_log_prob,
        "delta_log_prob": want.delta_log_prob,
    }
    for name, value in pairs.items():
        allowed = tolerance * float(value.abs().max())
        found = getattr(columns, name).transpose(0, 1).to(F64)
        torch.testing.assert_close(found, value, rtol=0, atol=allowed, msg=name)
    alive = torch.ones_like(columns.mask) if want.alive is None else want.alive.t()
    # A uniform number may lie within rounding of the probability.
    assert float((columns.mask != alive).float().mean()) <= 100 * tolerance
    assert torch.equal(columns.next_state[:, -1], start)


@needs_triton
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_triton_walks_like_the_reference(size, stop, precision):
    features, actions, num_cells, rows, num_steps = size
    model = gaussian_model(features, actions, num_cells, stop=stop)
    assert unsupported(model) is None
    start = randn(rows, features, seed=5, dtype=F32).cuda()
    noise = drawn(model, num_steps, rows, 0)
    columns = triton_walk(model, start, num_steps, noise=noise, precision=precision)
    assert_like_the_reference(columns, model, start, noise, TOLERANCE[precision])


@needs_triton
@pytest.mark.parametrize("action", ["tanh", "normal"])
def test_triton_follows_the_stream(action):
    model = make_model("normal", action, dtype=F32, num_cells=(64, 64), stop=True)
    start, seed = make_start(model, 70).cuda(), 2**40 + 12345
    noise = philox_stream.trace_noise(model, seed, 6, 70)
    model = model.cuda()
    columns = triton_walk(model, start, 6, seed=seed_of(seed))
    assert_like_the_reference(columns, model, start, on_gpu(noise), 2e-5)


@needs_triton
def test_triton_does_not_depend_on_the_number_of_rows():
    model = gaussian_model(17, 6, (128, 128), stop=True)
    start = randn(10000, 17, seed=5, dtype=F32).cuda()
    whole = triton_walk(model, start, 4, seed=seed_of(3))
    for rows in (1, 100, 3000):
        part = triton_walk(model, start[:rows], 4, seed=seed_of(3))
        torch.testing.assert_close(part.state, whole.state[:rows], rtol=1e-4, atol=1e-4)


@needs_triton
def test_triton_does_not_wait_and_obeys_the_generator(no_waiting):
    model = gaussian_model(17, 6, (64, 64), stop=True)
    start = torch.zeros(200, 17, device="cuda")

    def sample(generator):
        seed = torch.empty(1, dtype=torch.int64, device="cuda").random_(generator=generator)
        return triton_walk(model, start, 5, seed=seed)

    sample(None)
    generators = [torch.Generator("cuda").manual_seed(7) for _ in range(2)]
    no_waiting()
    one, other = ([sample(generator) for _ in range(2)] for generator in generators)
    torch.cuda.set_sync_debug_mode("default")
    for first, second in zip(one, other, strict=True):
        assert all(map(torch.equal, first, second))
    assert not torch.isclose(one[0].state, one[1].state).all(-1).any()


@needs_triton
def test_triton_in_a_graph_reads_seed_and_parameters_anew():
    model = gaussian_model(5, 2, (64, 64))
    start, seed = torch.zeros(50, 5, device="cuda"), seed_of(1)
    triton_walk(model, start, 3, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_walk(model, start, 3, seed=seed)
    for number, factor in ((1, 1.0), (2, 1.0), (2, 2.0)):
        seed.fill_(number)
        model.delta_network[0].weight.data.mul_(factor)
        graph.replay()
        fresh = triton_walk(model, start, 3, seed=seed_of(number))
        assert all(map(torch.equal, captured, fresh))


@needs_triton
def test_triton_masks_what_is_not_finite():
    model = gaussian_model(3, 2, (16,))
    noise = make_noise(gaussian_model(3, 2, (16,)).cpu(), 4, 30)
    noise.delta[1, 5:9] = torch.nan
    columns = triton_walk(model, torch.ones(30, 3, device="cuda"), 4, noise=on_gpu(noise))
    assert columns.mask[5:9].tolist() == [[False, False, True, True]] * 4
    assert columns.mask[9:].all()
    assert (columns.state[5:9, :2] == 1).all()
    assert all(bool(torch.isfinite(column).all()) for column in columns)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_a_graph_walks_like_eager(observation, action, stop):
    model = make_model(observation, action, dtype=F32, num_cells=(32, 32), stop=stop).cuda()
    start = model.observation.flatten(make_start(model.cpu(), 40), "start").cuda()
    model = model.cuda()
    walk = GraphedWalk(model)
    for seed in range(4):
        noise = drawn(model, 5, 40, seed)
        with torch.no_grad():
            want = EagerWalk(model)(start, noise)
        for found, value in zip(walk(start, noise), want, strict=True):
            assert (found is None) == (value is None)
            if value is not None:
                torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_a_graph_reads_the_parameters_of_the_moment():
    model = gaussian_model(5, 2, (64, 64))
    start, noise = torch.zeros(50, 5, device="cuda"), drawn(model, 3, 50, 0)
    walk = GraphedWalk(model)
    kept = [walk(start, noise) for _ in range(3)][-1].states
    before = kept.clone()

    def assert_follows():
        with torch.no_grad():
            want = EagerWalk(model)(start, noise)
        torch.testing.assert_close(walk(start, noise).states, want.states, rtol=1e-5, atol=1e-5)

    model.delta_network[0].weight.data.mul_(2)
    assert_follows()
    model.observation.normalizer.mean.add_(1)
    assert_follows()
    model.action_network[0].weight = torch.nn.Parameter(torch.randn(64, 5, device="cuda"))
    for _ in range(3):
        assert_follows()
    model.delta_head.log_scale_range = (-1.0, 1.0)
    for _ in range(3):
        assert_follows()
    assert torch.equal(kept, before)


def test_a_graph_does_not_wait_and_its_walks_differ(no_waiting):
    model = gaussian_model(5, 2, (64, 64))
    start, walk = torch.zeros(50, 5, device="cuda"), GraphedWalk(model)
    for _ in range(3):
        walk(start, drawn(model, 3, 50, 0))
    generators = [torch.Generator("cuda").manual_seed(7) for _ in range(2)]
    no_waiting()
    one, other = (
        [walk(start, draw_noise(model, 3, 50, generator)).states for _ in range(2)]
        for generator in generators
    )
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, one, other))
    assert not torch.isclose(one[0][0], one[1][0]).all(-1).any()


def test_graphs_are_few_and_die_with_their_model():
    model = gaussian_model(5, 2, (16,))
    walk = GraphedWalk(model)
    for rows in range(1, 8):
        for _ in range(2):
            walk(torch.zeros(rows, 5, device="cuda"), drawn(model, 2, rows, 0))
    graphs = cuda_graph._graphs[model]
    assert len(graphs) == cuda_graph.GRAPHS_A_MODEL
    assert all(graph is not None for graph in graphs.values())
    alive = weakref.ref(model)
    del model, walk, graphs
    gc.collect()
    assert alive() is None
