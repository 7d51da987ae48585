"""Calls the native library in every way that `sample_traces` can, and some that it should not.

Run by ``run`` against a library built with sanitizers (``TORCHRL_RECALL_LIBRARY``): what it looks
for is their reports, and results that depend on what they must not.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from torch import nn
from torchrl.data import MultiCategorical

sys.path.insert(0, str(Path(__file__).parents[1]))

from trace_data import ACTIONS, F32, OBSERVATIONS, make_model, make_noise, make_start

from torchrl_recall import BacktrackModel
from torchrl_recall.native import interface
from torchrl_recall.traces import TraceNoise, native

SETS = (0, 256, 512, 513)
ROWS = (1, 7, 63, 64, 65, 130)
STEPS = (1, 2, 9)
LAYERS = [
    (),
    (1,),
    (3,),
    (5,),
    (17,),
    (100,),
    (17, 5),
    (5, 3, 100),
    (8, 7, 6, 5),
    (17, 3, 1, 100, 5),
]
ACTIVATIONS = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": type("GeluTanh", (), {}),  # see `with_activation`
    "softplus": nn.Softplus,
    "mish": nn.Mish,
}
assert set(ACTIVATIONS) == set(interface.ACTIVATIONS)
calls = 0


def plan_of(model, instruction_set):
    plan = native.plan_of(model, bfloat16=instruction_set == 513)
    assert not isinstance(plan, str), plan
    if plan.instruction_set != instruction_set:
        plan.instruction_set, plan.tables = instruction_set, None
    return plan


def sets_here():
    best = int(interface.load()[0].recall_instruction_set())
    return [kind for kind in SETS if kind <= best]


def walk(model, kind, start, num_traces, num_steps, **options):
    global calls
    calls += 1
    return native.walk(plan_of(model, kind), start, num_traces, num_steps, **options)


def flat(model, rows, seed=5):
    return model.observation.flatten(make_start(model, rows, seed=seed), "start")


def assert_equal(one, other, rows=slice(None)):
    for name, a, b in zip(one._fields, one, other, strict=True):
        assert torch.equal(a[rows], b[rows]), name


def all_calls(model, rows=ROWS, steps=STEPS):
    """Walk in all ways; the first rows of a walk must not depend on how many follow."""
    for kind, num_steps in itertools.product(sets_here(), steps):
        start, noise = flat(model, max(rows)), make_noise(model, num_steps, max(rows))
        for last_visit in (False, True):
            longest = walk(model, kind, start, 1, num_steps, noise=noise, last_visit=last_visit)
            drawn = walk(model, kind, start, 1, num_steps, seed=11, last_visit=last_visit)
            assert all(bool(column.isfinite().all()) for column in drawn[:5])
            for n in rows:
                part = TraceNoise(*(None if x is None else x[:, :n].contiguous() for x in noise))
                some = walk(model, kind, start[:n], 1, num_steps, noise=part, last_visit=last_visit)
                assert_equal(some, longest, slice(n))
                some = walk(model, kind, start[:n], 1, num_steps, seed=11, last_visit=last_visit)
                assert_equal(some, drawn, slice(n))
        for num_traces, starts in ((2, 65), (5, 13), (64, 2), (130, 1)):
            noise = make_noise(model, num_steps, starts * num_traces)
            walk(model, kind, start[:starts], num_traces, num_steps, noise=noise)
            walk(model, kind, start[:starts], num_traces, num_steps, seed=-1)
    if 512 in sets_here():
        options = {"noise": make_noise(model, 4, 65)}
        avx2, avx512 = (walk(model, kind, flat(model, 65), 1, 4, **options) for kind in (256, 512))
        assert_equal(avx2, avx512)


def every_head():
    for observation, action, stop in itertools.product(OBSERVATIONS, ACTIONS, (False, True)):
        all_calls(make_model(observation, action, dtype=F32, stop=stop))


def every_option():
    options = {"num_components": 3}, {"reverse_action": "uniform"}
    for action, option in itertools.product(("tanh", "categorical"), options):
        for cells in ((), (33,)):
            model = make_model("normal", action, dtype=F32, num_cells=cells, stop=True, **option)
            all_calls(model, rows=(7, 65), steps=(2,))
    for action in ("tanh", "categorical"):
        all_calls(make_model("support", action, dtype=F32, reverse_action="uniform"))


def every_network():
    for cells, (observation, action) in itertools.product(
        LAYERS, (("normal", "tanh"), ("support", "normal"), ("class", "categorical"))
    ):
        model = make_model(observation, action, dtype=F32, num_cells=cells, stop=True)
        all_calls(model, rows=(7, 65), steps=(2,))


def with_activation(name, observation, action):
    kind = nn.GELU if name == "gelu_tanh" else ACTIVATIONS[name]
    model = make_model(observation, action, dtype=F32, num_cells=(17, 5), activation_class=kind)
    for module in model.modules():
        if name == "gelu_tanh" and isinstance(module, nn.GELU):
            module.approximate = "tanh"
    return model


def every_activation():
    for name in interface.ACTIVATIONS:
        for observation, action in (("normal", "tanh"), ("large", "one_hot")):
            model = with_activation(name, observation, action)
            all_calls(model, rows=(7, 65), steps=(2,))
            with torch.no_grad():  # far out on both sides
                for parameter in model.parameters():
                    parameter *= 1e4
            all_calls_or_refusal(model)


def all_calls_or_refusal(model, start=None, noises=(None,)):
    for kind, last_visit, noise in itertools.product(sets_here(), (False, True), noises):
        rows = flat(model, 65) if start is None else start
        try:
            walk(model, kind, rows, 1, 9, noise=noise, seed=3, last_visit=last_visit)
        except ValueError:
            continue


def statistics(model):
    """Return what training rewrites; a support and its bounds are the spec's, for good."""
    parts = (model.observation, model.action.head, model.delta_head)
    normalizers = [part.normalizer for part in parts if getattr(part, "normalizer", None)]
    return [x for part in normalizers for x in part.buffers() if x.is_floating_point()]


def broken_parameters():
    """NaN and infinite parameters and statistics, one at a time and all of a tensor."""
    for observation, action in itertools.product(OBSERVATIONS, ACTIONS):
        model = make_model(observation, action, dtype=F32, num_cells=(5,), stop=True)
        for tensor in [*model.parameters(), *statistics(model)]:
            kept = tensor.detach().clone()
            for value, rows in itertools.product((torch.nan, torch.inf, -1e38), (0, slice(None))):
                with torch.no_grad():
                    tensor.view(-1)[rows] = value
                    all_calls_or_refusal(model)
                    tensor.copy_(kept)


def support_without_rest(low, high):
    """A model whose first displacement leads out of the spec after a few steps."""
    torch.manual_seed(0)
    support = torch.tensor([[low, 0], [high, 0], [0, low], [0, high]])
    spec = MultiCategorical([5, 6])
    return BacktrackModel(spec, ACTIONS["normal"](F32), delta_support=support, num_cells=(5,))


def unusual_noise():
    """Numbers that are not in [0, 1), where a user gives them."""
    models = [
        make_model(observation, action, dtype=F32, num_cells=(5,), stop=True)
        for observation, action in itertools.product(OBSERVATIONS, ACTIONS)
    ]
    models += [support_without_rest(-1, 1), support_without_rest(-3, 3)]
    for model in models:
        noise = make_noise(model, 9, 65)
        noises = []
        for value in (torch.nan, torch.inf, -torch.inf, -1.0, 1.0, 2.0, 1e30):
            noises.append(
                TraceNoise(*(x if x is None else torch.full_like(x, value) for x in noise))
            )
        all_calls_or_refusal(model, noises=noises)


def broken_support():
    for low, high in ((-1, 1), (1, -1), (4, -4)):
        model = support_without_rest(low, high)
        with torch.no_grad():
            model.delta_network[-1].bias.fill_(torch.nan)
        all_calls_or_refusal(model)


def broken_starts():
    for observation, action in itertools.product(("normal", "lattice"), ACTIONS):
        model = make_model(observation, action, dtype=F32, stop=True)
        for value, rows in itertools.product(
            (torch.nan, torch.inf, 1e38), (0, 63, 64, slice(None))
        ):
            start = flat(model, 65)
            start[rows] = value
            all_calls_or_refusal(model, start)


def several_threads():
    torch.set_num_threads(4)
    kept, native.WORK_OF_A_THREAD = native.WORK_OF_A_THREAD, 1
    for observation, action in itertools.product(OBSERVATIONS, ACTIONS):
        model = make_model(observation, action, dtype=F32, stop=True)
        for kind in sets_here():
            start = flat(model, 1000)
            many = walk(model, kind, start, 1, 5, seed=2, last_visit=True)
            torch.set_num_threads(1)
            assert_equal(many, walk(model, kind, start, 1, 5, seed=2, last_visit=True))
            torch.set_num_threads(4)
            with torch.no_grad():
                start[700:] = 0 if model.observation.is_discrete else torch.nan
            all_calls_or_refusal(model, start)
    torch.set_num_threads(1)
    native.WORK_OF_A_THREAD = kept


def changed_parameters():
    """A parameter written after packing shows in the next walk."""
    model = make_model(dtype=F32)
    before = walk(model, 0, flat(model, 7), 1, 2, seed=1)
    model.action_network[-1].bias.data += 1
    after = walk(model, 0, flat(model, 7), 1, 2, seed=1)
    assert not torch.equal(before.action, after.action)


PARTS = (
    every_head,
    every_option,
    every_network,
    every_activation,
    broken_parameters,
    unusual_noise,
    broken_support,
    broken_starts,
    several_threads,
    changed_parameters,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1:]
    print(f"{interface.LIBRARY}, instruction sets {sets_here()}", flush=True)
    for part in PARTS:
        if not chosen or part.__name__ in chosen:
            part()
            print(f"{part.__name__}: {calls} calls so far", flush=True)
