"""mbrl-lib: its `ModelEnv` around a `OneDTransitionRewardModel` that holds our networks.

Needs ``pip install --no-deps mbrl==0.2.0`` and ``omegaconf termcolor tqdm gymnasium``: the versions
of hydra and gymnasium that mbrl asks for are old, and none of its code that uses them runs here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.peers.plain import Walked
from bench.peers.unavailable import Unavailable
from torchrl_recall import BacktrackModel
from torchrl_recall.model.heads import NormalDelta, TanhNormalHead, bounded_log_scale


def walker(model: BacktrackModel, start: Tensor, num_steps: int) -> Callable[[], Walked]:
    """Return a function that walks back by stepping a `ModelEnv`.

    Args:
        model (BacktrackModel): a Gaussian model, whose networks to use.
        start (Tensor): ``[B, D]`` states on the CPU.
        num_steps (int): length of the walk.

    Returns:
        Callable: gives a `Walked`. In its favour: no log-probability of the change (mbrl-lib
        computes none; zeros here), that of the action without distribution objects, tensors
        instead of its NumPy arrays, no learned reward.

    Raises:
        Unavailable: mbrl-lib is not installed, or not made for the case.
    """
    if not isinstance(model.delta_head, NormalDelta):
        raise Unavailable("mbrl-lib's one-dimensional models are for continuous states")
    if start.device.type != "cpu":
        raise Unavailable("timed on the CPU only")
    models = _import()
    env = models.ModelEnv(
        # Only its spaces are read, to be handed on.
        SimpleNamespace(observation_space=None, action_space=None),
        models.OneDTransitionRewardModel(_one_dimensional(models, model), learned_rewards=False),
        termination_fn=_never,
        reward_fn=_no_reward,
        generator=torch.Generator().manual_seed(0),
    )
    policy, array = _policy(model), start.numpy()

    @torch.no_grad()
    def walk() -> Walked:
        model_state = env.reset(array, return_as_np=False)
        state, steps, zero = start, [], torch.zeros(len(start), num_steps)
        for _ in range(num_steps):
            action, log_prob = policy(state)
            state, _, _, model_state = env.step(action, model_state, sample=True)
            steps.append((state, action, log_prob))
        states, actions, log_probs = (torch.stack(c, 1) for c in zip(*steps, strict=True))
        return Walked(states, actions, log_probs, zero)

    return walk


def _import() -> Any:
    # Only mbrl's factories use hydra. The version it asks for does not load on Python 3.11, and
    # later ones bring a pytest plugin.
    absent = ModuleType("hydra")
    stands_in = sys.modules.setdefault("hydra", absent) is absent
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module("mbrl.models")
    except ImportError as error:
        raise Unavailable(f"mbrl-lib is not installed ({error})") from None
    finally:
        if stands_in:
            del sys.modules["hydra"]


def _policy(model: BacktrackModel) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    head = model.action.head
    assert isinstance(head, TanhNormalHead)

    def policy(state: Tensor) -> tuple[Tensor, Tensor]:
        parameters = model.action_network(state)
        return head.sample(parameters, torch.randn(len(state), head.size))

    return policy


def _one_dimensional(models: Any, model: BacktrackModel) -> Any:
    """Return mbrl's view of the delta network: state and action in, a drawn change out."""
    delta_head = model.delta_head
    assert isinstance(delta_head, NormalDelta)
    network, log_scale_range = model.delta_network, delta_head.log_scale_range

    class Change(models.Model):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            loc, raw = network(x).chunk(2, -1)
            return loc, bounded_log_scale(raw, log_scale_range)

        def reset_1d(self, obs: Tensor, rng: torch.Generator | None = None) -> dict:
            return {}

        def sample_1d(
            self, model_input: Tensor, model_state: dict, deterministic=False, rng=None
        ) -> tuple[Tensor, dict]:
            loc, log_scale = self.forward(model_input)
            # As mbrl's own GaussianMLP draws.
            return torch.normal(loc, log_scale.exp(), generator=rng), model_state

        def loss(self, model_in: Any, target: Any = None) -> Any:
            raise NotImplementedError

        def eval_score(self, model_in: Any, target: Any = None) -> Any:
            raise NotImplementedError

    return Change(torch.device("cpu"))


def _never(action: Tensor, state: Tensor) -> Tensor:
    return torch.zeros(len(state), 1, dtype=torch.bool)


def _no_reward(action: Tensor, state: Tensor) -> Tensor:
    return torch.zeros(len(state), 1)
