"""What `BacktrackModel.from_env` reads from an environment: its observations, action and marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs import AsyncEnvPool, EnvBase, ParallelEnv, SerialEnv, TransformedEnv

from torchrl_recall.checks import check_key, check_keys


def model_arguments(
    env: EnvBase,
    observation_keys: NestedKey | Sequence[NestedKey] | None,
    delta_support: Tensor | None,
    stop: bool | None,
    is_init_key: NestedKey,
    device: torch.device | str | None,
) -> dict[str, Any]:
    """Return the constructor's arguments for an environment; see `BacktrackModel.from_env`.

    Args:
        env (EnvBase): the environment, with its transforms.
        observation_keys (NestedKey or list of NestedKey, optional): which observations make up the
            state.
        delta_support (Tensor, optional): ``[M, D]`` displacements.
        stop (bool, optional): learn where episodes begin.
        is_init_key (NestedKey): name of the mark of an episode's first step.
        device (torch.device, optional): instead of the environment's.

    Returns:
        dict: arguments by name.

    Raises:
        TypeError: not an environment.
        ValueError: the observation cannot be chosen without being named.
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
    actions: Any = {key: env.full_action_spec_unbatched[key] for key in env.action_keys}
    if delta_support is None:
        delta_support = _delta_support(env)
    return {
        "observation": {key: specs[key] for key in observation_keys},
        "action": actions,
        "delta_support": delta_support,
        "stop": is_init_key in leaves if stop is None else stop,
        "is_init_key": is_init_key,
        "device": env.device if device is None else device,
    }


def _delta_support(env: EnvBase) -> Any:
    """Return the environment's own ``delta_support``, a batched one's first worker's, or None."""
    base: Any = env
    while isinstance(base, TransformedEnv):
        base = base.base_env
    if isinstance(base, SerialEnv | ParallelEnv):
        # Workers are not asked: one without the attribute would end.
        maker, options = base.create_env_fn[0], base.create_env_kwargs[0]
    elif isinstance(base, AsyncEnvPool):
        maker, options = base.env_makers[0], base.create_env_kwargs[0]
    else:
        return getattr(env, "delta_support", None)
    if isinstance(maker, EnvBase):
        return _delta_support(maker)
    one = maker(**options)
    support = _delta_support(one)
    one.close(raise_if_closed=False)
    return support
