"""`GoalGAN`: goals that the policy reaches sometimes, and traces that start there.

Beside the data's way: it proposes goals to the environment, learns from how often they are reached,
and hands `BacktrackTransform` start states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor, nn
from torchrl.data.tensor_specs import Bounded
from torchrl.modules import MLP

from torchrl_recall.checks import check_at_least_one, check_choice, check_keys, check_real
from torchrl_recall.generators import (
    carry_generator,
    follow_device,
    own_generator,
    unpack_generator,
)
from torchrl_recall.goals.lsgan import discriminator_loss, generator_loss
from torchrl_recall.goals.space import GoalMemory, GoalSpace

GoalToState = Callable[[Tensor], Any]


class GoalGAN(nn.Module):
    """Generates goals of intermediate difficulty: neither mastered nor out of reach.

    A goal is *good* if the policy's success rate ``R`` at it lies in ``[min_success,
    max_success]``. A generative adversarial network with least-squares losses learns to make good
    goals from those that were tried; goals that were good before are tried again, so that they are
    not forgotten. In a training loop, `sample` goals, act, and `update` with their success rates
    (see `success_rates`).

    As ``BacktrackTransform(start=...)`` it starts traces from goals, through ``goal_to_state``.

    Until a first good goal has been seen, the network knows nothing, and its goals are uniform.

    Args:
        goal (int or Bounded): size of a goal whose coordinates lie in [-1, 1], or its spec:
            bounded, floating-point, of shape ``[D]``.

    Keyword Args:
        noise_dim (int): size of the generator's input.
        num_cells (sequence of int): width of each hidden layer of both networks.
        min_success (float): least success rate of a good goal, in [0, 1].
        max_success (float): greatest success rate of a good goal, in [0, 1].
        replay_size (int): how many old good goals are kept; the oldest go first.
        replay_share (float): share of `sample` that are old good goals.
        uniform_share (float): share of `sample` that are uniform over the goal space.
        min_distance (float): an old goal is kept only if it is farther than this from all others
            that are kept, in coordinates scaled to [-1, 1]. 0: unless it is equal to one.
        targets (triple of float): the discriminator's targets ``a`` (other and generated goals) and
            ``b`` (good goals), and the generator's target ``c``.
        learning_rate (float): of both Adam optimizers.
        betas (pair of float): of both Adam optimizers.
        batch_size (int): goals in each step of `update`.
        starts (str): which goals traces start from: ``"good"``, uniformly those labelled good at
            the last update (none: all starts are masked), or ``"sample"``, those of `sample`.
        goal_to_state (callable, optional): turns goals ``[n, D]`` into observations, as a tensor
            ``[n, *observation]`` (one observation key), a mapping or a TensorDict. By default a
            goal is an observation.
        observation_keys (NestedKey or list of NestedKey): the model's observation keys.
        generator (torch.Generator, optional): source of randomness of `sample` and `update`, on
            the module's device. By default an own one, seeded from torch's. Saved in
            ``state_dict()``, as are the optimizers' states. Initial parameters are torch's.
        device (torch.device, optional): device of the parameters.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of its range, or a goal space that is not bounded.

    Source: Held, Geng, Florensa, Abbeel, *Automatic Goal Generation for Reinforcement Learning
    Agents*, ICML 2018, https://arxiv.org/abs/1705.06366. Goyal et al., *Recall Traces*, ICLR 2019,
    https://arxiv.org/abs/1804.00379, start traces from its goals.

    Examples:
        >>> import torch
        >>> from torchrl_recall import GoalGAN
        >>> gan = GoalGAN(2, generator=torch.Generator().manual_seed(0))
        >>> goals = gan.sample(6)
        >>> log = gan.update(goals, success_rate=goals.norm(dim=-1) / 2, num_steps=2)
        >>> gan.sample(6).shape
        torch.Size([6, 2])
    """

    goal_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam

    is_fitted: Tensor

    def __init__(
        self,
        goal: int | Bounded,
        *,
        noise_dim: int = 4,
        num_cells: Sequence[int] = (128, 128),
        min_success: float = 0.1,
        max_success: float = 0.9,
        replay_size: int = 10_000,
        replay_share: float = 1 / 3,
        uniform_share: float = 0.0,
        min_distance: float = 0.05,
        targets: tuple[float, float, float] = (-1.0, 1.0, 0.0),
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        batch_size: int = 128,
        starts: Literal["good", "sample"] = "good",
        goal_to_state: GoalToState | None = None,
        observation_keys: NestedKey | Sequence[NestedKey] = "observation",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.space: GoalSpace = GoalSpace(goal, device=device)
        self.noise_dim: int = check_at_least_one("noise_dim", noise_dim)
        if isinstance(num_cells, str) or not isinstance(num_cells, Sequence):
            raise TypeError(f"num_cells must be a sequence of widths, got {num_cells!r}.")
        num_cells = [check_at_least_one("num_cells", width) for width in num_cells]
        self.min_success: float = check_real("min_success", min_success, 0.0, 1.0)
        self.max_success: float = check_real("max_success", max_success, self.min_success, 1.0)
        self.replay_share: float = check_real("replay_share", replay_share, 0.0, 1.0)
        # Rounding of 1/3 + 2/3 aside.
        self.uniform_share: float = check_real(
            "uniform_share", uniform_share, 0.0, 1.0 - self.replay_share + 1e-12
        )
        self.targets: tuple[float, ...] = tuple(check_real("targets", target) for target in targets)
        if len(self.targets) != 3 or not all(map(math.isfinite, self.targets)):
            raise ValueError(f"targets must be three finite numbers (a, b, c), got {targets}.")
        self.batch_size: int = check_at_least_one("batch_size", batch_size)
        self.starts: Any = check_choice("starts", starts, ("good", "sample"))
        if goal_to_state is not None and not callable(goal_to_state):
            raise TypeError(f"goal_to_state must be callable, got {type(goal_to_state).__name__}.")
        self.goal_to_state = goal_to_state
        self.observation_keys: list[NestedKey] = check_keys("observation_keys", observation_keys)

        size, factory = self.space.size, self.space.factory
        shape: dict[str, Any] = {"num_cells": num_cells, "activation_class": nn.ReLU}
        self.goal_network = MLP(in_features=noise_dim, out_features=size, **shape).to(**factory)
        self.discriminator_network = MLP(in_features=size, out_features=1, **shape).to(**factory)
        learning_rate = check_real("learning_rate", learning_rate, 0.0)
        self.goal_optimizer, self.discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), lr=learning_rate, betas=betas)
            for network in (self.goal_network, self.discriminator_network)
        )
        # In coordinates scaled to [-1, 1].
        self.memory: GoalMemory = GoalMemory(
            check_at_least_one("replay_size", replay_size),
            size,
            check_real("min_distance", min_distance, 0.0),
            factory,
        )
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool, device=device))
        self._good = torch.zeros(0, size, **factory)  # scaled, too
        self.generator = own_generator(generator, self.device)

    @property
    def device(self) -> torch.device:
        """Where the goals are."""
        return self.space.low.device

    @property
    def old_goals(self) -> Tensor:
        """The good goals that are remembered, ``[n, D]``."""
        return self.space.unscaled(self.memory.goals)

    @property
    def good_goals(self) -> Tensor:
        """The goals labelled good at the last update, ``[n, D]``."""
        return self.space.unscaled(self._good)

    @torch.no_grad()
    def sample(self, num_goals: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw goals to try: generated, old and uniform ones, in random order.

        Their numbers are the shares of ``num_goals``, rounded to the nearest; as long as there are
        no old goals, generated ones take their place.

        Args:
            num_goals (int): how many.

        Keyword Args:
            generator (torch.Generator, optional): source of randomness instead of the module's.

        Returns:
            Tensor: ``[num_goals, D]``, within the bounds.
        """
        num_goals = check_at_least_one("num_goals", num_goals)
        source = self._generator() if generator is None else generator
        num_old = round_half_up(num_goals * self.replay_share) if len(self.memory) else 0
        num_uniform = min(round_half_up(num_goals * self.uniform_share), num_goals - num_old)
        num_generated = num_goals - num_old - num_uniform
        if not bool(self.is_fitted):
            num_uniform, num_generated = num_uniform + num_generated, 0
        scaled = torch.cat(
            [self._generate(num_generated, source), self.memory.draw(num_old, source)]
        )
        goals = torch.cat([self.space.unscaled(scaled), self.space.uniform(num_uniform, source)])
        return goals[torch.randperm(num_goals, generator=source, device=self.device)]

    def label(self, success_rate: Tensor) -> Tensor:
        """Tell which goals are good: ``min_success <= R <= max_success``.

        Args:
            success_rate (Tensor): ``[n]``, in [0, 1].

        Returns:
            Tensor: ``[n]`` bool.

        Raises:
            ValueError: success rates that are no rates.

        Examples:
            >>> import torch
            >>> GoalGAN(2).label(torch.tensor([0.0, 0.1, 0.5, 0.95]))
            tensor([False,  True,  True, False])
        """
        if not bool(((success_rate >= 0) & (success_rate <= 1)).all()):
            raise ValueError("success_rate must lie in [0, 1], got other or non-finite entries.")
        if not success_rate.is_floating_point():
            success_rate = success_rate.to(self.space.low.dtype)
        # As numbers of the rates' dtype: 0.1 in float32 is not below 0.1.
        low, high = (success_rate.new_tensor(x) for x in (self.min_success, self.max_success))
        return (success_rate >= low) & (success_rate <= high)

    def update(
        self,
        goals: Tensor,
        success_rate: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        num_steps: int = 200,
    ) -> TensorDict:
        """Train both networks on goals that were tried, and remember the good ones.

        Args:
            goals (Tensor): ``[n, D]``, within the bounds.
            success_rate (Tensor, optional): ``[n]``, in [0, 1]; or give ``labels``.

        Keyword Args:
            labels (Tensor, optional): ``[n]`` bool, True = good; such as all True to start from
                the states that the first policy reaches.
            num_steps (int): gradient steps of each network.

        Returns:
            TensorDict: means over the steps of ``loss_discriminator`` and ``loss_generator``; of
            the given goals ``share_good``; ``num_old_goals``. All detached.

        Raises:
            TypeError: neither or both of ``success_rate`` and ``labels``.
            ValueError: no goals, or goals, rates or labels of a wrong shape, dtype or range.
        """
        if (success_rate is None) == (labels is None):
            raise TypeError("update needs either success_rate or labels.")
        num_steps = check_at_least_one("num_steps", num_steps)
        x = self.space.scaled(goals)
        for name, value in (("success_rate", success_rate), ("labels", labels)):
            if value is not None and value.shape != goals.shape[:1]:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, expected ({len(goals)},), one for "
                    "each goal."
                )
        if success_rate is not None:
            labels = self.label(success_rate)
        assert labels is not None
        if labels.dtype != torch.bool:
            raise ValueError(f"labels must be bool, got {labels.dtype}.")
        labels = labels.to(x.device)
        totals = x.new_zeros(2)
        with torch.enable_grad():
            for _ in range(num_steps):
                totals += self._step(x, labels)
        self._good = x[labels]
        self.is_fitted |= labels.any()
        self.memory.extend(self._good)
        losses = totals / num_steps
        return TensorDict(
            {
                "loss_discriminator": losses[0],
                "loss_generator": losses[1],
                "share_good": labels.to(x.dtype).mean(),
                "num_old_goals": self.memory.count.clone(),
            }
        )

    def _step(self, x: Tensor, labels: Tensor) -> Tensor:
        """Take one gradient step with each network; return both losses."""
        a, b, c = self.targets
        source = self._generator()
        rows = torch.randint(len(x), (self.batch_size,), generator=source, device=x.device)
        generated = self._generate(self.batch_size, source)
        score = self.discriminator_network(torch.cat([x[rows], generated.detach()])).squeeze(-1)
        real, fake = score.split(self.batch_size)
        first = discriminator_loss(real, labels[rows], fake, a=a, b=b)
        gradients = torch.autograd.grad(first, list(self.discriminator_network.parameters()))
        _descend(self.discriminator_optimizer, gradients)
        second = generator_loss(self.discriminator_network(generated).squeeze(-1), c=c)
        gradients = torch.autograd.grad(second, list(self.goal_network.parameters()))
        _descend(self.goal_optimizer, gradients)
        return torch.stack([first.detach(), second.detach()])

    def _generate(self, count: int, source: torch.Generator) -> Tensor:
        """Return what the network makes of noise, ``[count, D]`` in [-1, 1]."""
        noise = torch.randn((count, self.noise_dim), generator=source, **self.space.factory)
        return self.goal_network(noise).tanh()

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase, generator: torch.Generator) -> TensorDictBase:
        """Return start states for each row of a batch; see `StartStates`."""
        shape = tensordict.shape
        count = shape.numel()
        if self.starts == "sample":
            goals, found = self.sample(count, generator=generator), True
        elif len(self._good):
            rows = torch.randint(len(self._good), (count,), generator=generator, device=self.device)
            goals, found = self.good_goals[rows], True
        else:
            goals, found = self.space.uniform(count, generator), False  # of the right shape
        states: Any = goals if self.goal_to_state is None else self.goal_to_state(goals)
        if isinstance(states, Tensor):
            if len(self.observation_keys) != 1:
                raise ValueError(
                    f"goal_to_state must return the keys {self.observation_keys}, got one tensor."
                )
            states = {self.observation_keys[0]: states}
        if not isinstance(states, Mapping) and not is_tensor_collection(states):
            raise TypeError(
                "goal_to_state must return a tensor, a mapping or a TensorDict, got "
                f"{type(states).__name__}."
            )
        start = TensorDict({}, shape)
        for key in self.observation_keys:
            state = states[key]
            if state.shape[:1] != (count,):
                raise ValueError(
                    f"goal_to_state gave {key!r} of shape {tuple(state.shape)}, expected "
                    f"[{count}, *observation]."
                )
            start.set(key, state.reshape(*shape, *state.shape[1:]))
        kept = torch.full(shape, found, device=self.device)
        return start.set(("collector", "mask"), kept)

    def _generator(self) -> torch.Generator:
        self.generator: torch.Generator = follow_device(self.generator, self.device)
        return self.generator

    def __getstate__(self) -> dict[str, Any]:
        return carry_generator(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(unpack_generator(state))

    def _optimizers(self) -> tuple[torch.optim.Adam, torch.optim.Adam]:
        return self.goal_optimizer, self.discriminator_optimizer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GoalGAN:
        super()._apply(fn, recurse)
        self._good = fn(self._good)
        for optimizer in self._optimizers():
            for state in optimizer.state.values():
                # Not the count of steps, which stays on the CPU.
                state.update({k: fn(v) for k, v in state.items() if k.startswith("exp_avg")})
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Return copies of the optimizers' states, the generator's, and the good goals."""
        optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in self._optimizers()]
        good, state = self._good.clone(), self.generator.get_state()
        return {"optimizers": optimizers, "generator": state, "good": good}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        for optimizer, saved in zip(self._optimizers(), state["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(saved))
        self._generator().set_state(state["generator"].cpu())
        self._good = state["good"].to(self._good, copy=True)


def round_half_up(number: float) -> int:
    """Round to the nearest integer, and halves up."""
    return math.floor(number + 0.5)


def _descend(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor]) -> None:
    """Take a step along gradients that no backward pass has added to anything else's."""
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()
