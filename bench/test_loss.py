"""Losses, forward and backward: `RecallTraceLoss` against TorchRL's `BCLoss` on the same steps.

256 traces of 8 steps, 17 observations, 6 actions, networks of width 256. `BCLoss` gets the trace
flattened, as it takes no mask. `BacktrackLoss`, fitted to 2048 transitions, has no peer in TorchRL:
it is set beside the same two networks under a mean square.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor
from torchrl.objectives import BCLoss, LossModule

from torchrl_recall import BacktrackLoss, BacktrackModel, RecallTraceLoss, sample_traces

OBSERVATION, ACTION, WIDTH = 17, 6, 256
TRACES, STEPS = 256, 8
ROUNDS = 40

pytestmark = pytest.mark.usefixtures("cpu_only")


def build_model() -> BacktrackModel:
    """Return the backtracking model of the case."""
    return BacktrackModel(OBSERVATION, ACTION, num_cells=(WIDTH, WIDTH))


def optimised(loss: LossModule, name: str, data: TensorDictBase) -> Callable[[], Tensor]:
    """Return one forward and backward pass of a loss."""

    def run() -> Tensor:
        loss.zero_grad()
        value = loss(data)[name]
        value.backward()
        return value.detach()

    return run


# BCLoss lacks an annotation, of which its own base class warns.
@pytest.mark.filterwarnings("ignore:The name target_actor_network_params")
def test_recall_trace_loss(take_turns: Callable) -> None:
    network = MLP(
        in_features=OBSERVATION,
        out_features=2 * ACTION,
        num_cells=[WIDTH, WIDTH],
        activation_class=nn.ReLU,
    )
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(network, NormalParamExtractor()),
            in_keys=["observation"],
            out_keys=["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    trace = sample_traces(build_model(), torch.randn(TRACES, OBSERVATION), num_steps=STEPS)
    steps = trace.select("observation", "action").reshape(-1)
    ours = optimised(
        RecallTraceLoss(actor), "loss_imitation", TensorDict({"trace": trace}, [TRACES])
    )
    peer = optimised(BCLoss(actor), "loss_bc", steps)
    torch.testing.assert_close(ours(), peer())
    take_turns("loss, imitation", {"RecallTraceLoss": ours, "BCLoss": peer}, rounds=ROUNDS)


def test_backtrack_loss(take_turns: Callable) -> None:
    model, rows = build_model(), TRACES * STEPS
    data = TensorDict(
        {
            "observation": torch.randn(rows, OBSERVATION),
            "action": torch.rand(rows, ACTION) * 2 - 1,
            "next": {"observation": torch.randn(rows, OBSERVATION)},
        },
        [rows],
    )
    ours = optimised(BacktrackLoss(model), "loss_backtrack", data)

    def networks_only() -> Tensor:
        model.zero_grad()
        state, action = data["next", "observation"], data["action"]
        delta = model.delta_network(state, action)
        value = model.action_network(state).square().mean() + delta.square().mean()
        value.backward()
        return value.detach()

    assert bool(torch.isfinite(ours()))
    contenders = {"BacktrackLoss": ours, "networks only": networks_only}
    take_turns("loss, backtracking model", contenders, rounds=ROUNDS)
