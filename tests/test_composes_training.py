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
from torchrl_recall.starts import NextStates

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
            ("joint", {"num_members": 2}),
        ],
    )
    def test_log_prob(self, kind, options):
        model = BacktrackModel(3, ACTIONS[kind], num_cells=(8,), **options)
        check_compiled(model.log_prob, real_data(ACTIONS[kind], BATCH))

    def test_loss_of_several_actions(self):
        loss = BacktrackLoss(BacktrackModel(3, ACTIONS["factors"], num_cells=(8,))).eval()
        check_compiled(lambda data: total(loss(data)), real_data(ACTIONS["factors"], BATCH))

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


TRANSFORMS = {
    "plain": ({}, {}),
    "stop": ({"action": Categorical(4), "stop": True}, {"num_traces": 3}),
    "ensemble": ({"num_members": 2}, {}),
    "support": ({}, {"support": lambda state: state[..., 0] > -5, "num_candidates": 2}),
    "filtered": ({}, {"min_value": 0.0, "masks": [lambda trace: trace["observation"][..., 0] > 0]}),
}


@pytest.mark.filterwarnings("ignore:sample_traces falls back")
class TestCompiledTransform:
    """`BacktrackTransform.forward` in one graph."""

    def make(self, name, **more):
        model, options = TRANSFORMS[name]
        torch._dynamo.reset()
        return BacktrackTransform(make_model(**model), num_steps=4, **options, **more)

    def compiled(self, function, fullgraph=True):
        return torch.compile(function, fullgraph=fullgraph, backend="aot_eager")

    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_traces(self, name):
        transform, data = self.make(name), transitions(BATCH)
        data["value_target"] = torch.linspace(-1, 1, BATCH).unsqueeze(-1)
        data["collector", "mask"] = torch.arange(BATCH) != BATCH - 1
        run = self.compiled(transform)
        traces = [run(data.clone())["trace"] for _ in range(2)]
        for trace in traces:
            rows = trace if trace.ndim == 2 else trace[:, 0]
            following = rows["next", "observation"]
            assert torch.equal(following[:-1, -1], data["next", "observation"][:-1])
            assert torch.equal(following[:, :-1], rows["observation"][:, 1:])
            kept = trace["collector", "mask"]
            assert kept.any()
            assert not kept[-1].any()
            if name == "filtered":
                assert not kept[: BATCH // 2].any()
                assert torch.equal(
                    kept[BATCH // 2 : -1], trace["observation"][BATCH // 2 : -1, :, 0] > 0
                )
            if name == "plain":  # they are the model's own
                terms = transform.model.step_log_prob(*transform.model.read(trace))
                for key in ("action", "delta"):
                    torch.testing.assert_close(
                        trace[f"{key}_log_prob"], terms[key].detach(), rtol=1e-4, atol=1e-4
                    )
        assert not torch.equal(traces[0]["observation"], traces[1]["observation"])

    def test_draws_from_torchs_own_generator(self):
        transform = self.make("plain")
        before, data = transform.generator.get_state(), transitions(BATCH)
        run = self.compiled(transform)
        torch.manual_seed(5)
        first = run(data.clone())["trace"]
        torch.manual_seed(5)
        assert torch.equal(run(data.clone())["trace", "observation"], first["observation"])
        assert torch.equal(transform.generator.get_state(), before)

    def test_follows_the_model(self):
        transform, data = self.make("stop"), transitions(BATCH)
        run = self.compiled(transform)
        assert not bool((run(data.clone())["trace", "action"] == 2).all())
        with torch.no_grad():
            transform.model.action_network[-1].bias[2] = 100.0
        assert bool((run(data.clone())["trace", "action"] == 2).all())

    def test_with_start_the_graph_breaks_and_the_generator_serves_on(self):
        data, transform = transitions(BATCH), self.make("plain", start=NextStates())
        run, traces = self.compiled(transform, fullgraph=False), []
        for seed in (3, 3, 4):
            transform.generator.manual_seed(seed)
            traces.append(run(data.clone())["trace", "observation"])
        assert torch.equal(traces[0], traces[1])
        assert not torch.equal(traces[0], traces[2])

    def test_from_sample_to_loss_in_one_graph(self):
        transform, loss = self.make("plain"), RecallTraceLoss(make_actor())
        data = transitions(BATCH)
        torch.manual_seed(1)
        found = self.compiled(lambda batch: loss(transform(batch))["loss_imitation"])(data.clone())
        found.backward()
        assert all(bool(g.any()) for g in gradients(loss))
        torch.manual_seed(1)
        trace = self.compiled(transform)(data.clone())
        torch.testing.assert_close(found, loss(trace)["loss_imitation"], rtol=1e-4, atol=1e-5)


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
