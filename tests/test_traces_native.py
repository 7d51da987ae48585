"""The C kernel: its numbers against float64, across instruction sets, tiles, threads and tables."""

from __future__ import annotations

import copy
import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from philox_stream import normals, philox, uniforms
from torch import nn
from trace_data import ACTIONS, F32, OBSERVATIONS, make_model, make_noise, make_start

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.native import interface
from torchrl_recall.traces import TraceNoise, native
from torchrl_recall.traces.columns import Columns
from torchrl_recall.traces.layout import layout_of, live_tensors
from torchrl_recall.traces.masks import last_visit
from torchrl_recall.traces.request import Request
from torchrl_recall.traces.tiles import tiled_walk
from torchrl_recall.traces.walk import reference_walk

pytestmark = pytest.mark.skipif(
    interface.load()[0] is None, reason=f"no native library: {interface.load()[1]}"
)
ROOT = Path(__file__).parents[1]
TOLERANCE = 2e-6
ACTIVATIONS = [
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.SiLU,
    nn.GELU,
    lambda: nn.GELU(approximate="tanh"),
    nn.Softplus,
    nn.Mish,
    nn.Identity,
]


def plan_of(model, bfloat16=False):
    plan = native.plan_of(model, bfloat16)
    assert not isinstance(plan, str), plan
    return plan


def flat_start(model, *batch):
    return model.observation.flatten(make_start(model, *batch), "start")


def instruction_sets():
    widest = int(interface.load()[0].recall_instruction_set())
    return [one for one in (0, 256, 512) if one <= widest]


def in_double(model, start, noise, **options):
    """The reference in float64, fed the same states and noise."""
    double = copy.deepcopy(model).double()
    noise = TraceNoise(*(None if part is None else part.double() for part in noise))
    start = start.double() if start.is_floating_point() else start

    def walk(rows, tile_noise):
        return reference_walk(double, rows, tile_noise)

    return tiled_walk(walk, Request(double, start, 1, len(noise.action), noise=noise, **options))


def assert_close(columns, expected, tolerance=TOLERANCE):
    for name, column, other in zip(Columns._fields, columns, expected, strict=True):
        if column.is_floating_point():
            error = (column - other).abs().max() / other.abs().max().clamp_min(1)
            assert float(error) <= tolerance, (name, float(error))
        else:
            assert torch.equal(column, other), name


def assert_equal(columns, expected):
    for name, column, other in zip(Columns._fields, columns, expected, strict=True):
        assert torch.equal(column, other), name


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_numbers_against_float64(observation, action, stop):
    model = make_model(observation, action, dtype=F32, num_cells=(64, 48), stop=stop)
    start, noise = flat_start(model, 70), make_noise(model, 6, 70)
    columns = native.walk(plan_of(model), start, 1, 6, noise=noise, last_visit=True)
    assert_close(columns, in_double(model, start, noise, last_visit=True))
    assert bool(columns.mask.any())
    if observation == "normal":
        assert stop == (not bool(columns.mask.all()))


@pytest.mark.parametrize(
    ("size", "action", "num_cells"),
    [
        (11, 3, (64, 64)),
        (17, 6, (256, 256)),
        (5, 1, (1, 3)),
        (1, 2, ()),
        (30, 7, (100, 33, 17, 70)),
    ],
)
def test_sizes_against_float64(size, action, num_cells):
    torch.manual_seed(size)
    model = BacktrackModel(size, action, num_cells=num_cells, stop=True)
    start, noise = torch.randn(65, size), make_noise(model, 8, 65)
    columns = native.walk(plan_of(model), start, 1, 8, noise=noise)
    assert_close(columns, in_double(model, start, noise))


@pytest.mark.parametrize("which", range(len(ACTIVATIONS)))
def test_activations_against_float64(which):
    torch.manual_seed(which)
    model = BacktrackModel(4, 2, num_cells=(64, 64), stop=True)
    for network in (model.action_network, model.delta_network, model.stop_network):
        network[1] = network[3] = ACTIVATIONS[which]()
        # Large enough for the ends of every activation.
        network[0].weight.data.mul_(6)
    start, noise = 3 * torch.randn(64, 4), make_noise(model, 1, 64)
    columns = native.walk(plan_of(model), start, 1, 1, noise=noise)
    assert_close(columns, in_double(model, start, noise))


def test_noise_at_the_ends():
    model = BacktrackModel(3, 2, num_cells=(32,))
    with torch.no_grad():
        list(model.action_network)[-1].bias.copy_(torch.tensor([9.0, -20.0, 30.0, -30.0]))
    noise = make_noise(model, 4, 64)
    noise = TraceNoise(noise.action * 4, noise.delta * 4, None)
    start = torch.randn(64, 3)
    columns = native.walk(plan_of(model), start, 1, 4, noise=noise)
    assert_close(columns, in_double(model, start, noise))
    assert float(columns.action.abs().max()) == pytest.approx(1 - 1e-6, abs=1e-7)


@pytest.mark.skipif(len(instruction_sets()) < 2, reason="this machine has one instruction set")
@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("action", ["tanh", "categorical"])
def test_instruction_sets_agree(observation, action):
    model = make_model(observation, action, dtype=F32, num_cells=(70, 33), stop=True)
    start, plan = flat_start(model, 91), plan_of(model)
    plan.num_evaluations = 0  # tables are tested below
    widest, results = plan.instruction_set, {}
    try:
        for plan.instruction_set in instruction_sets():
            results[plan.instruction_set] = native.walk(plan, start, 2, 5, seed=2**61 + 11)
    finally:
        plan.instruction_set = widest
    assert_close(results[0], [*results[max(results)]], tolerance=4e-6)
    if {256, 512} <= results.keys():
        assert_equal(results[256], results[512])


@pytest.mark.parametrize("observation", ["normal", "lattice", "support"])
def test_neither_tiles_nor_threads_show(observation, monkeypatch):
    model = make_model(observation, "tanh", dtype=F32, num_cells=(40,), stop=True)
    start, plan = flat_start(model, 333), plan_of(model)
    whole = native.walk(plan, start, 1, 5, seed=5)
    for rows in (1, 7, 63, 64, 65, 130):
        assert_equal(native.walk(plan, start[:rows], 1, 5, seed=5), [c[:rows] for c in whole])
    monkeypatch.setattr(native, "WORK_OF_A_THREAD", 1)
    torch.set_num_threads(3)
    try:
        assert_equal(native.walk(plan, start, 1, 5, seed=5), whole)
    finally:
        torch.set_num_threads(1)
    # A longer walk goes on where a shorter one ends.
    longer = native.walk(plan, start, 1, 7, seed=5)
    assert torch.equal(longer.action[:, 2:], whole.action)
    assert torch.equal(longer.next_state[:, 2:], whole.next_state)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("last_visit", [False, True])
@pytest.mark.parametrize("observation", ["support", "class"])
@pytest.mark.parametrize("action", ["categorical", "one_hot"])
def test_tables_change_no_bit(observation, action, last_visit, stop):
    model = make_model(observation, action, dtype=F32, num_cells=(32, 20), stop=stop)
    start, noise = flat_start(model, 100), make_noise(model, 9, 200)
    for options in ({"seed": 3}, {"noise": noise}):
        plan = native.Plan(layout_of(model), live_tensors(model), False)
        assert plan.num_evaluations > 0
        looked_up = native.walk(plan, start, 2, 9, last_visit=last_visit, **options)
        assert plan.tables is not None
        plan.num_evaluations = 0
        walked = native.walk(plan, start, 2, 9, last_visit=last_visit, **options)
        assert_equal(looked_up, walked)
    assert last_visit == (not bool(looked_up.mask.all())) or stop


def test_threads_share_tables(monkeypatch):
    model = make_model("support", "categorical", dtype=F32, stop=True)
    start, plan = make_start(model, 333), plan_of(model)
    alone = native.walk(plan, start, 1, 9, seed=5, last_visit=True)
    monkeypatch.setattr(native, "WORK_OF_A_THREAD", 1)
    torch.set_num_threads(3)
    try:
        assert_equal(native.walk(plan, start, 1, 9, seed=5, last_visit=True), alone)
    finally:
        torch.set_num_threads(1)


def test_tables_follow_the_parameters():
    model = make_model("support", "categorical", dtype=F32)
    start, noise = flat_start(model, 300), make_noise(model, 6, 300)
    plan = plan_of(model)
    native.walk(plan, start, 1, 6, noise=noise)
    with torch.no_grad():
        list(model.delta_network)[-1].bias.add_(torch.linspace(0, 3, 5))
    columns = native.walk(plan, start, 1, 6, noise=noise)
    assert_close(columns, in_double(model, start, noise))


def test_dead_ends_are_masked():
    # Only displacements by +1: nothing can have come before the last cell.
    from torchrl.data import Categorical, MultiCategorical

    for action in (Categorical(2), 2):
        model = BacktrackModel(
            MultiCategorical([4, 3]), action, delta_support=torch.tensor([[1, 0]]), num_cells=(8,)
        )
        start, noise = torch.tensor([[0, 1], [2, 0], [3, 2]]), make_noise(model, 5, 3)
        columns = native.walk(plan_of(model), start, 1, 5, noise=noise)
        assert_close(columns, in_double(model, start, noise))
        assert columns.mask.sum(1).tolist() == [3, 1, 0]


@pytest.mark.parametrize("action", ["tanh", "normal"])
@pytest.mark.parametrize("observation", ["normal", "support"])
def test_seeds_give_the_stated_stream(observation, action):
    """Philox and Box-Muller written in NumPy, in float64, feed the same walk."""
    model = make_model(observation, action, dtype=F32, num_cells=(24,), stop=True)
    start, seed, rows, num_steps = flat_start(model, 9), 2**62 + 12345, 18, 4
    steps = range(num_steps - 1, -1, -1)
    delta = [
        normals(seed, rows, back, 1, 3)
        if observation == "normal"
        else uniforms(seed, rows, back, 1)[:, None]
        for back in steps
    ]
    parts = (
        np.stack([normals(seed, rows, back, 0, 2) for back in steps]),
        np.stack(delta),
        np.stack([uniforms(seed, rows, back, 2) for back in steps]),
    )
    noise = TraceNoise(*(torch.from_numpy(part).float() for part in parts))
    plan = plan_of(model)
    widest = plan.instruction_set
    try:
        for plan.instruction_set in instruction_sets():
            drawn = native.walk(plan, start, 2, num_steps, seed=seed)
            given = native.walk(plan, start, 2, num_steps, noise=noise)
            assert_close(drawn, given)
    finally:
        plan.instruction_set = widest


def test_known_answers_of_philox():
    """Random123's known answers are `philox_stream`'s test; here that the library agrees."""
    library = interface.load()[0]
    for seed in (0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF):
        for row, step, block in ((0, 0, 0), (1, 2, 3 << 16 | 7), (2**32 - 1,) * 3):
            expected = philox(
                np.array([row, step, block, 0], dtype=np.uint64), (seed & (2**32 - 1), seed >> 32)
            )
            for instructions in instruction_sets():
                words = (ctypes.c_uint32 * 4)()
                counter = (ctypes.c_uint32 * 3)(row, step, block)
                library.recall_words(instructions, counter, seed, words)
                assert list(words) == expected.tolist()


def test_bfloat16_is_close_and_the_masks_are_the_same():
    torch.manual_seed(0)
    model = BacktrackModel(17, 6, num_cells=(256, 256))
    start, noise = torch.randn(100, 17), make_noise(model, 8, 100)
    coarse = native.walk(plan_of(model, bfloat16=True), start, 1, 8, noise=noise)
    fine = native.walk(plan_of(model), start, 1, 8, noise=noise)
    assert_close(coarse, fine, tolerance=2e-2)
    if plan_of(model, bfloat16=True).instruction_set == 513:
        assert not torch.equal(coarse.state, fine.state)


def test_traces_that_leave_the_numbers_are_masked_from_there():
    model = make_model(dtype=F32, num_cells=(16,))
    start, noise = flat_start(model, 50), make_noise(model, 6, 50)
    noise.delta[2, 7] = 3e38
    noise.action[4, 9, 1] = torch.inf
    noise.delta[5, 11, 0] = torch.nan
    columns = native.walk(plan_of(model), start, 1, 6, noise=noise)
    expected = sample_traces(model, start, num_steps=6, noise=noise, backend="eager")
    assert torch.equal(columns.mask, expected["collector", "mask"])
    assert (~columns.mask).sum(1).nonzero().squeeze(1).tolist() == [7, 9, 11]
    assert columns.mask[7].tolist() == [False] * 3 + [True] * 3
    assert torch.equal(columns.state[7, :3], start[7].expand(3, -1))
    assert torch.equal(columns.next_state[7, :2], start[7].expand(2, -1))
    for name, column in zip(Columns._fields, columns, strict=True):
        assert bool(torch.isfinite(column).all()), name
    assert bool((columns.action[11] == 0).all())
    for name in ("action", "action_log_prob", "delta_log_prob", "observation"):
        torch.testing.assert_close(
            sample_traces(model, start, num_steps=6, noise=noise)[name], expected[name]
        )


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("where", ["action_network", "delta_network", "stop_network"])
@pytest.mark.parametrize("observation", ["support", "class", "large", "lattice", "normal"])
def test_what_is_not_a_number_is_masked(observation, where, tables):
    """A bias of NaN, for one action's logit or one displacement's: the reference's masks."""
    model = make_model(observation, "categorical", dtype=F32, stop=True, num_cells=(16,))
    with torch.no_grad():
        list(getattr(model, where))[-1].bias[-1] = torch.nan
    start, noise = flat_start(model, 200), make_noise(model, 5, 200)
    plan = plan_of(model)
    if not tables:
        plan.num_evaluations = 0

    def mask(walk):
        try:
            return walk()
        except ValueError:  # not a single first step is finite
            return torch.zeros(200, 5, dtype=torch.bool)

    found = mask(lambda: native.walk(plan, start, 1, 5, noise=noise).mask)
    arguments = {"num_steps": 5, "noise": noise, "backend": "reference"}
    expected = mask(
        lambda: sample_traces(model, make_start(model, 200), **arguments)["collector", "mask"]
    )
    assert torch.equal(found, expected)
    assert not bool(found.all())


@pytest.mark.parametrize("observation", ["lattice", "large", "support"])
def test_last_visits_of_long_walks(observation):
    model = make_model(observation, "tanh", dtype=F32, num_cells=(8,))
    start = flat_start(model, 70)
    columns = native.walk(plan_of(model), start, 1, 400, seed=1, last_visit=True)
    states = torch.cat([columns.state, columns.next_state[:, -1:]], 1)
    assert torch.equal(columns.mask, last_visit(states))


def test_states_far_from_zero_that_come_back_by_rounding_are_kept():
    model = BacktrackModel(2, 1, num_cells=(8,))
    start = torch.full((50, 2), 1e9)
    for backend in ("native", "eager"):
        trace = sample_traces(model, start, num_steps=4, last_visit=True, backend=backend)
        assert bool(trace["collector", "mask"].all())


MEMORY = """
import resource, torch
from torchrl_recall import BacktrackModel
from torchrl_recall.traces import native

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(2)
model, start = BacktrackModel(111, 8, num_cells=(256, 256)), torch.randn(8192, 111)
plan = native.plan_of(model)
native.walk(plan, start[:200], 1, 1)
before = peak()
columns = native.walk(plan, start, 1, 32)
outputs = sum(column.numel() * column.element_size() for column in columns)
print(peak() - before - outputs)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_a_large_walk_needs_little_more_than_its_outputs():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(done.stdout) < 64 * 2**20
