"""What `BacktrackModel.from_env` reads from an environment: its observations, action and marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs import EnvBase

from torchrl_recall.checks import check_key, check_keys


def model_arguments(
    env: EnvBase,
    observation_keys: Sequence[NestedKey] | None,
    delta_support: Tensor | None,
    stop: bool | None,
    is_init_key: NestedKey,
    device: torch.device | str | None,
) -> dict[str, Any]:
    """Return the constructor's arguments for an environment; see `BacktrackModel.from_env`.

    Args:
        env (EnvBase): the environment, with its transforms.
        observation_keys (sequence of NestedKey, optional): which observations make up the state.
        delta_support (Tensor, optional): ``[M, D]`` displacements.
        stop (bool, optional): learn where episodes begin.
        is_init_key (NestedKey): name of the mark of an episode's first step.
        device (torch.device, optional): instead of the environment's.

    Returns:
        dict: arguments by name.

    Raises:
        TypeError: not an environment.
        ValueError: the observation or the action cannot be chosen without being named.
        KeyError: an observation key that the environment does not have.
    """
    if not isinstance(env, EnvBase):
        raise TypeError(f"env must be a torchrl EnvBase, got {type(env).__name__}.")
    specs = env.observation_spec_unbatched
    is_init_key = check_key("is_init_key", is_init_key)
    leaves = [unravel_key(key) for key in specs.keys(True, True)]
    if observation_keys is None:
        found = [key for key in leaves if key not in (is_init_key, "step_count")]
        observation_keys = ["observation"] if "observation" in found else found
        if len(observation_keys) != 1:
            raise ValueError(
                f"observation_keys must be named: the environment has {found} and none is "
                "called 'observation'."
            )
    observation_keys = check_keys("observation_keys", observation_keys)
    missing = [key for key in observation_keys if key not in leaves]
    if missing:
        raise KeyError(f"observation_keys {missing} are not in the environment's {leaves}.")
    if len(env.action_keys) != 1:
        raise ValueError(f"env must have one action, got the action keys {env.action_keys}.")
    action_key = env.action_keys[0]
    if delta_support is None:
        delta_support = getattr(env, "delta_support", None)
    return {
        "observation": {key: specs[key] for key in observation_keys},
        "action": env.full_action_spec_unbatched[action_key],
        "delta_support": delta_support,
        "stop": is_init_key in leaves if stop is None else stop,
        "action_key": action_key,
        "is_init_key": is_init_key,
        "device": env.device if device is None else device,
    }
