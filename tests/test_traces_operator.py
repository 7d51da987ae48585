"""The native walk under `torch.compile` and `torch.export`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from trace_data import F32, assert_same, make_model, make_noise, make_start

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.native import interface
from torchrl_recall.traces import operator
from torchrl_recall.traces.layout import layout_of, live_tensors

pytestmark = pytest.mark.skipif(
    interface.load()[0] is None, reason=f"no native library: {interface.load()[1]}"
)


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


def test_the_operator_is_what_torch_expects():
    model = make_model(dtype=F32, stop=True)
    tensors = [tensor.detach() for tensor in live_tensors(model)]
    noise = make_noise(model, 2, 10)
    for given in ([], list(noise[:3])):
        arguments = (make_start(model, 5), torch.tensor(3), given, tensors, layout_of(model))
        torch.library.opcheck(
            torch.ops.torchrl_recall.walk.default, (*arguments, 2, 2, False, False)
        )
    assert operator.why_not(model) is None
