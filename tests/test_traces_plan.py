"""Packed parameters are never stale; threads, processes and compiled graphs; falling back."""

from __future__ import annotations

import copy
import ctypes.util
import multiprocessing
import pickle
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from trace_data import F32, F64, assert_same, make_model, make_noise, make_start

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.native import interface
from torchrl_recall.traces import backends, native, operator
from torchrl_recall.traces import backends as backends_of_this_machine
from torchrl_recall.traces.layout import layout_of, live_tensors

ROOT = Path(__file__).parents[1]
needs_library = pytest.mark.skipif(
    interface.load()[0] is None, reason=f"no native library: {interface.load()[1]}"
)


def walk(model, backend="auto", **options):
    start, noise = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)), None
    if "generator" not in options:
        noise = make_noise(model, 3, 9)
    return sample_traces(
        model, start.to(model.dtype), num_steps=3, noise=noise, backend=backend, **options
    )


def optimizer_step(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.action_parameters(torch.randn(4, 3)).sum().backward()
    optimizer.step()


def fused_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()


def numpy_write(model):
    next(iter(model.delta_network)).weight.detach().numpy()[0, 0] += 1


def shifted(module, name):
    module = copy.deepcopy(module)
    getattr(module, name).add_(1)
    return module


def wider(model):
    first, _, second, *_ = model.delta_network
    first.weight, first.bias = (nn.Parameter(torch.randn(24, *x)) for x in ((5,), ()))
    second.weight = nn.Parameter(torch.randn(16, 24))


CHANGES = {
    "optimizer": optimizer_step,
    "foreach optimizer": fused_step,
    "data": lambda model: next(iter(model.action_network)).bias.data.add_(0.5),
    "numpy": numpy_write,
    "set": lambda model: setattr(
        next(iter(model.action_network)), "weight", nn.Parameter(torch.randn(16, 3))
    ),
    "data set": lambda model: setattr(
        next(iter(model.action_network)).weight, "data", torch.randn(16, 3)
    ),
    "layer": lambda model: model.delta_network.__setitem__(4, nn.Linear(16, 6)),
    "activation": lambda model: [model.delta_network.__setitem__(i, nn.Tanh()) for i in (1, 3)],
    "network": lambda model: setattr(
        model, "action_network", nn.Sequential(nn.Linear(3, 20), nn.SiLU(), nn.Linear(20, 4))
    ),
    "load": lambda model: model.load_state_dict(
        {k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    ),
    "load assign": lambda model: model.load_state_dict(
        {k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()},
        assign=True,
    ),
    "statistics": lambda model: model.update_normalization(
        torch.randn(8, 3), torch.rand(8, 2), torch.randn(8, 3) + 2
    ),
    "reset": lambda model: model.reset_parameters_recursive(),
    "scale range": lambda model: setattr(model.delta_head, "log_scale_range", (-3.0, 1.0)),
    "floor": lambda model: setattr(model.observation.normalizer, "floor", 3.0),
    "transposed": lambda model: setattr(
        list(model.delta_network)[2].weight, "data", list(model.delta_network)[2].weight.data.t()
    ),
    "statistics set": lambda model: setattr(
        model.delta_head, "normalizer", shifted(model.delta_head.normalizer, "mean")
    ),
    "observation statistics set": lambda model: setattr(
        model.observation, "normalizer", shifted(model.observation.normalizer, "mean")
    ),
    "head set": lambda model: setattr(model.action, "head", shifted(model.action.head, "middle")),
    "widths": wider,
    "forward": lambda model: setattr(
        model.delta_network, "forward", lambda x: nn.Sequential.forward(model.delta_network, 2 * x)
    ),
    "observation hook": lambda model: model.observation.register_forward_hook(
        lambda module, inputs, output: output + 1
    ),
    "double": lambda model: model.double(),
    "double and back": lambda model: model.double().float(),
}


@needs_library
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_parameter_is_seen(change):
    torch.manual_seed(0)
    model = BacktrackModel(3, 2, num_cells=(16, 16))
    before = walk(model)
    CHANGES[change](model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a transposed weight walks in torch
        after = walk(model)
    # The eager form has no way around what was put upon a module.
    other = "reference" if change in ("forward", "observation hook") else "eager"
    assert_same(after, walk(model, other), 1e-5)
    if change != "double and back" and after["observation"].dtype == F32:
        same = all(torch.equal(v, after[k]) for k, v in before.items(True, True))
        assert not same


@needs_library
def test_a_hook_or_a_parametrization_is_seen():
    model = BacktrackModel(3, 2, num_cells=(16,))
    walk(model)
    layer = next(iter(model.action_network))
    handle = layer.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.warns(UserWarning, match="falls back to the reference backend.*hooks"):
        hooked = walk(model)
    assert_same(hooked, walk(model, "reference"), 0)
    handle.remove()
    assert_same(walk(model), walk(model, "native"), 0)
    handle = model.delta_network.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.warns(UserWarning, match=r"delta_network has hooks"):
        assert_same(walk(model), walk(model, "reference"), 0)
    handle.remove()
    nn.utils.parametrizations.spectral_norm(layer)
    with pytest.warns(UserWarning, match="falls back to the reference backend"):
        normed = walk(model.eval())
    assert_same(normed, walk(model, "reference"), 0)


@needs_library
def test_settings_of_an_activation_and_a_lost_bias_are_seen():
    model = BacktrackModel(3, 2, num_cells=(16,), activation_class=nn.LeakyReLU)
    before = walk(model)
    for network in (model.action_network, model.delta_network):
        network[1].negative_slope = 0.7
    assert_same(walk(model), walk(model, "eager"), 1e-5)
    assert not torch.equal(walk(model)["action"], before["action"])
    model.action_network[0].bias = None
    with pytest.warns(UserWarning, match="falls back to the reference backend.*without bias"):
        traces = walk(model)
    assert_same(traces, walk(model, "reference"), 0)


@needs_library
def test_one_activation_module_for_all_layers():
    activation = nn.ReLU()
    model = BacktrackModel(3, 2, num_cells=(16, 16))
    model.action_network[1] = model.action_network[3] = activation
    assert_same(walk(model, "native"), walk(model, "eager"), 1e-5)


@needs_library
def test_copies_pickles_and_garbage():
    model = BacktrackModel(3, 2, num_cells=(16,))
    traces = walk(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(walk(twin), traces, 0)
        next(iter(twin.parameters())).data.add_(1)
        assert_same(walk(model), traces, 0)
    reference = weakref.ref(model)
    del model
    assert reference() is None


@needs_library
def test_threads_do_not_disturb_each_other():
    models = [make_model(dtype=F32, seed=i, stop=True, num_cells=(64, 64)) for i in range(2)]
    start = make_start(models[0], 200)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_traces(models[seed % 2], start, num_steps=8, generator=generator)

    alone = [draw(seed) for seed in range(24)]
    with ThreadPoolExecutor(6) as pool:
        for traces, expected in zip(pool.map(draw, range(24)), alone, strict=True):
            assert_same(traces, expected, 0)


@needs_library
def test_a_learner_may_write_while_another_thread_walks():
    model = BacktrackModel(3, 2, num_cells=(64, 64))
    start = torch.zeros(300, 3)

    def draw(seed):
        return sample_traces(model, start, num_steps=6)

    with ThreadPoolExecutor(2) as pool:
        walks = [pool.submit(draw, seed) for seed in range(40)]
        for _ in range(200):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.999)
        for future in walks:
            assert bool(torch.isfinite(future.result()["observation"]).all())
    assert_same(walk(model), walk(model, "eager"), 1e-5)


@needs_library
def test_parameters_may_be_set_while_another_thread_walks():
    model = BacktrackModel(3, 2, num_cells=(300, 300))
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    start = torch.zeros(4, 3)
    with ThreadPoolExecutor(1) as pool:
        walks = [pool.submit(sample_traces, model, start, num_steps=1) for _ in range(300)]
        while not walks[-1].done():
            nn.utils.vector_to_parameters(flat.clone(), model.parameters())
        for future in walks:
            assert bool(torch.isfinite(future.result()["observation"]).all())


INTERRUPTED = """
import os, signal, threading, torch
from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.traces import native

torch.set_num_threads(2)
model, start = BacktrackModel(64, 4, num_cells=(256, 256)), torch.randn(192, 64)
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    sample_traces(model, start, num_steps=600)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
for _ in range(50):
    torch.zeros(600 * 192, 64)
sample_traces(model, start, num_steps=3)
print("alive")
"""


@needs_library
def test_an_interrupted_walk_leaves_no_thread_writing_to_freed_memory():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["interrupted", "alive"]


@needs_library
def test_the_default_device_and_dtype_of_the_caller_do_not_matter():
    model = BacktrackModel(3, 2, num_cells=(16,))
    start = torch.zeros(5, 3)
    expected = sample_traces(model, start, num_steps=2, generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(model)
    torch.set_default_dtype(F64)
    try:
        with torch.device("meta"):
            trace = sample_traces(
                twin, start, num_steps=2, generator=torch.Generator("cpu").manual_seed(1)
            )
    finally:
        torch.set_default_dtype(F32)
    assert_same(trace, expected, 0)


@needs_library
def test_a_model_partly_in_double_walks_in_torch():
    model = make_model("normal", "normal", dtype=F32)
    model.action.head.normalizer.double()
    with pytest.warns(UserWarning, match=r"falls back .*dtype torch.float64"):
        sample_traces(model, torch.zeros(2, 3), num_steps=2)


def test_another_library_of_that_name_is_refused(tmp_path, monkeypatch):
    found = ctypes.util.find_library("c")
    if found is None:
        pytest.skip("there is no C library to take for ours")
    monkeypatch.setattr(interface, "LIBRARY", Path(found))
    monkeypatch.setattr(Path, "exists", lambda self: True)
    library, reason = interface.load.__wrapped__()
    assert library is None
    assert "does not load" in reason


def draw_in_child(model, connection):
    torch.set_num_threads(2)
    native.WORK_OF_A_THREAD = 1
    generator = torch.Generator().manual_seed(4)
    connection.send(walk(model, generator=generator)["observation"].tolist())


@needs_library
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method, monkeypatch):
    model = BacktrackModel(3, 2, num_cells=(16,))
    monkeypatch.setattr(native, "WORK_OF_A_THREAD", 1)
    torch.set_num_threads(2)
    here = walk(model, generator=torch.Generator().manual_seed(4))
    torch.set_num_threads(1)
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        # Python's and JAX's warnings of forks beside threads are about others' threads.
        warnings.simplefilter("ignore")
        child = context.Process(target=draw_in_child, args=(model, sender))
        child.start()
    assert receiver.poll(60)
    assert receiver.recv() == here["observation"].tolist()
    child.join(10)
    assert child.exitcode == 0


@needs_library
@pytest.mark.parametrize("kind", ["normal", "support"])
def test_compiles_without_a_graph_break(kind):
    model = make_model(kind, "categorical", dtype=F32, stop=True)
    start, noise = make_start(model, 6), make_noise(model, 4, 6)

    def draw(start, noise):
        trace = sample_traces(model, start, num_steps=4, noise=noise, last_visit=True)
        return trace, trace["action_log_prob"].sum()

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(compiled(start, noise)[0], draw(start, noise)[0], 0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    fresh = torch.compile(draw, fullgraph=True, backend="aot_eager")
    one, other = fresh(start, None)[0], fresh(start, None)[0]
    assert not torch.equal(one["action_log_prob"], other["action_log_prob"])


class Walker(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, start):
        trace = sample_traces(self.model, start, num_steps=4)
        return trace["observation"], trace["action"]


@needs_library
def test_exports(tmp_path):
    model = BacktrackModel(3, 2, num_cells=(16,))
    start = torch.randn(5, 3)
    program = torch.export.export(Walker(model), (start,))
    torch.export.save(program, tmp_path / "walker.pt2")
    loaded = torch.export.load(tmp_path / "walker.pt2").module()
    torch.manual_seed(0)
    observation, action = loaded(start)
    assert observation.shape == (5, 4, 3)
    assert action.shape == (5, 4, 2)
    assert not torch.equal(loaded(start)[0], observation)
    torch.manual_seed(0)
    assert torch.equal(loaded(start)[0], observation)


@needs_library
def test_the_operator_is_what_torch_expects():
    model = make_model(dtype=F32, stop=True)
    tensors = [tensor.detach() for tensor in live_tensors(model)]
    noise = make_noise(model, 2, 10)
    for given in ([], list(noise)):
        arguments = (make_start(model, 5), torch.tensor(3), given, tensors, layout_of(model))
        torch.library.opcheck(
            torch.ops.torchrl_recall.walk.default, (*arguments, 2, 2, False, False)
        )
    assert operator.why_not(model) is None


def test_backends_are_told():
    status = backends()
    assert set(status) == {"native", "triton", "table", "graph", "eager", "reference"}
    assert all(one.detail for one in status.values())
    assert status["native"].available == (interface.load()[0] is not None)


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(interface, "load", lambda: (None, "librecall.so was not built"))
    monkeypatch.setattr(backends_module(), "_warned_of_library", False)


def backends_module():
    import sys

    return sys.modules["torchrl_recall.traces.backends"]


@pytest.mark.usefixtures("no_library")
def test_without_the_library_one_warning_and_the_torch_path():
    model = BacktrackModel(3, 2, num_cells=(16,))
    with pytest.warns(UserWarning, match=r"falls back to the eager backend.*was not built") as seen:
        traces = walk(model)
    assert seen[0].filename == __file__  # the line that called sample_traces
    # Warnings are errors here: there is no second one.
    walk(BacktrackModel(3, 2, num_cells=(16,)))
    assert_same(traces, walk(model, "eager"), 0)
    with pytest.raises(ValueError, match=r"backend='native' cannot run this model.*not built"):
        walk(model, "native")
    status = backends_of_this_machine()["native"]
    assert not status.available
    assert "not built" in status.detail


@needs_library
def test_a_model_that_the_kernel_cannot_run():
    model = BacktrackModel(3, 2, num_cells=(16,), activation_class=nn.Hardtanh)
    with pytest.warns(UserWarning, match=r"falls back to the eager backend.*Hardtanh"):
        traces = walk(model)
    walk(model)
    assert_same(traces, walk(model, "eager"), 0)
    with pytest.raises(ValueError, match=r"backend='native' cannot run this model.*Hardtanh"):
        walk(model, "native")


def test_float64_walks_in_torch_without_a_word():
    model = make_model(dtype=F64)
    assert_same(walk(model), walk(model, "eager"), 0)
    with pytest.raises(ValueError, match="float64"):
        walk(model, "native")


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_noise_of_another_kind_is_refused(backend):
    model = make_model(dtype=F32, stop=True)
    if backend == "native" and interface.load()[0] is None:
        pytest.skip("no native library")
    for part in ("action", "delta", "stop"):
        for wrong, message in (
            (lambda x: x.double(), "has dtype torch.float64, expected torch.float32"),
            (lambda x: x.to("meta"), "is on device meta"),
        ):
            noise = make_noise(model, 3, 9)
            noise = noise._replace(**{part: wrong(getattr(noise, part))})
            with pytest.raises(ValueError, match=f"noise.{part} {message}"):
                sample_traces(
                    model, make_start(model, 9), num_steps=3, noise=noise, backend=backend
                )


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'float8'"):
        walk(make_model(dtype=F32), precision="float8")
