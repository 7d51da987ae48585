"""Rewards that come late or only from afar, as transforms of any environment."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Composite, Unbounded
from torchrl.envs.transforms import Transform

from torchrl_recall.checks import check_at_least_one, check_real


def pay_later(
    reward: Tensor, owed: Tensor, held: Tensor, done: Tensor, every: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hold rewards back, and pay their sum at once.

    Args:
        reward: ``[..., 1]``, what the step has earned.
        owed: ``[..., 1]``, what was earned since the last payment.
        held: int64 ``[..., 1]``, steps since then.
        done: bool ``[..., 1]``; an end pays all.
        every: steps from one payment to the next; None: the end alone pays.

    Returns:
        What is paid, what is owed from now on, and the steps held from now on.
    """
    owed, held = owed + reward, held + 1
    pays = done if every is None else done | (held >= every)
    return torch.where(pays, owed, 0.0), owed.masked_fill(pays, 0.0), held.masked_fill(pays, 0)


class DelayedReward(Transform):
    """Pays the reward of many steps at once: the sum is the same, and comes later.

    What is owed is carried by the tensordict (``"owed"``, ``"held"``), which a policy should not
    read: part of the task is that its state is not told. A step that is given none of it owes
    nothing yet.

    It goes after transforms that end episodes (``StepCounter``): an end pays all that is owed, and
    it must see that end.

    Args:
        every: steps from one payment to the next; None: an episode's end alone pays.

    Raises:
        ValueError: ``every`` below 1.
        TypeError: ``every`` neither an int nor None.

    Source: as in Oh et al., *Self-Imitation Learning*, ICML 2018, which pays every 20 steps.
    """

    invertible = False

    def __init__(self, every: int | None = None) -> None:
        super().__init__(in_keys=["reward"], out_keys=["owed", "held"])
        self.every = None if every is None else check_at_least_one("every", every)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        reward, done = next_tensordict["reward"], next_tensordict["done"]
        owed, held = tensordict.get("owed", None), tensordict.get("held", None)
        owed = torch.zeros_like(reward) if owed is None else owed
        held = torch.zeros_like(done, dtype=torch.int64) if held is None else held
        paid, owed, held = pay_later(reward, owed, held, done, self.every)
        next_tensordict["reward"] = paid
        next_tensordict["owed"], next_tensordict["held"] = owed, held
        return next_tensordict

    def _reset(
        self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        parent: Any = self.parent
        shape = parent.reward_spec.shape
        options = {"owed": parent.reward_spec.dtype, "held": torch.int64}
        anew = None if tensordict is None else tensordict.get("_reset", None)
        for name, dtype in options.items():
            fresh = torch.zeros(shape, dtype=dtype, device=parent.device)
            before = None if anew is None or tensordict is None else tensordict.get(name, None)
            if before is not None and anew is not None:
                fresh = torch.where(anew, fresh, before)
            tensordict_reset[name] = fresh
        return tensordict_reset

    def transform_observation_spec(self, observation_spec: Any) -> Composite:
        """Add what is carried."""
        observation_spec.update(self._carried())
        return observation_spec

    def transform_input_spec(self, input_spec: Any) -> Composite:
        """Add what is carried."""
        state_spec = input_spec["full_state_spec"]
        if state_spec is None:
            state_spec = Composite(shape=input_spec.shape, device=input_spec.device)
        state_spec.update(self._carried())
        input_spec["full_state_spec"] = state_spec
        return input_spec

    def _carried(self) -> Composite:
        parent: Any = self.parent
        reward, device = parent.reward_spec, parent.device
        return Composite(
            {
                "owed": Unbounded(shape=reward.shape, dtype=reward.dtype, device=device),
                "held": Unbounded(shape=reward.shape, dtype=torch.int64, device=device),
            },
            shape=parent.batch_size,
            device=device,
        )


class DistanceReward(Transform):
    """Pays 1 on each step that ends at or beyond a distance, and nothing elsewhere.

    Args:
        distance: from where on, in the unit of the position.
        in_key: of the position, ``[..., 1]``.

    Raises:
        ValueError: ``distance`` infinite or not a number.
        TypeError: ``distance`` of another type.
    """

    invertible = False

    def __init__(self, distance: float, in_key: str = "position") -> None:
        super().__init__(in_keys=[in_key], out_keys=["reward"])
        self.distance: float = check_real("distance", distance, open_low=True, open_high=True)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        beyond = next_tensordict[self.in_keys[0]] >= self.distance
        next_tensordict["reward"] = beyond.to(next_tensordict["reward"].dtype)
        return next_tensordict
