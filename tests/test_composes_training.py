"""Compiled, in mixed precision, and in several processes: the losses, the model, the traces."""

from __future__ import annotations

import copy
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch._inductor.config
from loss_data import make_actor, make_model, recall, transitions
from torchrl.data import Binary, Categorical, MultiCategorical

from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    sample_traces,
)
from torchrl_recall.native import interface

pytestmark = [
    # tensordict reads a setting that torch 2.15 has retired; torch 2.13 warns of its own tracing.
    pytest.mark.filterwarnings("ignore:.*inline_inbuilt_nn_modules:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]
BATCH = 8
ACTIONS = {
    "tanh": 2,
    "categorical": Categorical(4),
    "factors": MultiCategorical([2, 3]),
    "binary": Binary(3),
    "joint": {("agent", "force"): 2, "move": Categorical(3)},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def real_data(action, *batch):
    """Transitions with random actions of a spec."""
    data = transitions(*batch).exclude("action")
    for key, spec in (action if isinstance(action, dict) else {"action": action}).items():
        if isinstance(spec, int):
            data[key] = torch.rand(*batch, spec) * 1.8 - 0.9
        else:
            data[key] = spec.expand(*batch, *spec.shape).rand()
    return data


def make_losses():
    """Both losses with their data; several modes of one test."""
    trace = recall(BATCH, 4)
    both = transitions(BATCH).update(trace)
    return {
        "backtrack": (BacktrackLoss(make_model()), transitions(BATCH)),
        "recall": (RecallTraceLoss(make_actor()), trace),
        "both": (RecallTraceLoss(make_actor(), make_model()), both),
    }


LOSSES = ["backtrack", "recall", "both"]


def total(out):
    return sum(out[key] for key in out.keys() if key.startswith("loss_"))  # noqa: SIM118


def gradients(loss):
    return [parameter.grad for parameter in loss.parameters()]


def check_compiled(function, data, backend="aot_eager"):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    found, expected = compiled(data), function(data)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.requires_grad


class TestCompiled:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("tanh", {}),
            ("categorical", {"stop": True}),
            ("binary", {}),
            ("joint", {}),
        ],
    )
    def test_log_prob(self, kind, options):
        model = BacktrackModel(3, ACTIONS[kind], num_cells=(8,), **options)
        check_compiled(model.log_prob, real_data(ACTIONS[kind], BATCH))

    @pytest.mark.filterwarnings("ignore:The distutils package:DeprecationWarning")
    @pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
    def test_by_inductor(self, monkeypatch):
        """The paper's plain form, imitation and model in one, as it would be trained."""
        monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no pool of processes
        loss, data = make_losses()["both"]
        twin = copy.deepcopy(loss)
        torch._dynamo.reset()
        total(torch.compile(loss, fullgraph=True)(data)).backward()
        total(twin(data)).backward()
        for a, b in zip(gradients(loss), gradients(twin), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @pytest.mark.skipif(interface.load()[0] is None, reason="there is no native library")
    def test_the_transforms_tensor_part(self):
        """What the transform does with a batch, in one graph; the generator is the graph's own."""
        model = make_model()

        def forward(state):
            trace = sample_traces(model, state, num_steps=4)
            return trace["observation"], trace["collector", "mask"]

        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        state = torch.randn(BATCH, 3)
        states, mask = compiled(state)
        assert states.shape == (BATCH, 4, 3)
        assert mask.all()
        assert not torch.equal(states, compiled(state)[0])


class TestMixedPrecision:
    @pytest.mark.parametrize("name", LOSSES)
    def test_losses(self, name):
        loss, data = make_losses()[name]
        twin = copy.deepcopy(loss)
        with torch.autocast("cpu", torch.bfloat16):
            out = loss(data)
        expected = twin(data)
        total(out).backward()
        total(expected).backward()
        for key in loss.out_keys:
            assert out[key].isfinite()
            # Eight bits of mantissa through networks of two layers.
            torch.testing.assert_close(out[key].float(), expected[key], rtol=0.05, atol=0.05)
        for a, b in zip(gradients(loss), gradients(twin), strict=True):
            assert a.dtype == torch.float32
            assert bool(a.isfinite().all())
            torch.testing.assert_close(a, b, rtol=0.2, atol=0.05)
        statistics = [buffer for buffer in loss.buffers() if buffer.is_floating_point()]
        assert all(buffer.dtype == torch.float32 for buffer in statistics)

    @pytest.mark.parametrize("kind", ACTIONS)
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.filterwarnings("ignore:sample_traces falls back")
    def test_traces(self, kind, backend):
        """Traces keep the model's precision, whoever samples them."""
        model = BacktrackModel(3, ACTIONS[kind], num_cells=(8,))
        start = torch.randn(BATCH, 3)
        options = {"num_steps": 4, "backend": backend}
        traces = []
        for enabled in (True, False):
            generator = torch.Generator().manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                traces.append(sample_traces(model, start, generator=generator, **options))
        for key, value in traces[0].items(True, True):
            assert value.dtype == traces[1][key].dtype
            assert bool(value.isfinite().all())
        if backend == "auto" and kind in ("tanh", "categorical") and interface.load()[0]:
            assert bool((traces[0] == traces[1]).all())  # C does not know of autocast

    def test_in_a_pipeline(self):
        transform = BacktrackTransform(make_model(), num_steps=4)
        loss = RecallTraceLoss(make_actor())
        with torch.autocast("cpu", torch.bfloat16):
            out = loss(transform(transitions(BATCH)))
        out["loss_imitation"].backward()
        assert out["loss_imitation"].isfinite()


def test_gradients_of_two_processes_are_those_of_the_whole_batch():
    """The script compares; here it must have compared something."""
    script = pathlib.Path(__file__).with_name("ddp_run.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    found = re.findall(r"(\w+) of process (\d): (\d+) gradients, the largest (\S+)", run.stdout)
    assert {(name, rank) for name, rank, *_ in found} == {
        (name, rank) for name in LOSSES for rank in "01"
    }
    assert all(int(count) > 0 and float(largest) > 0 for *_, count, largest in found)
