"""Keep the steps that make progress: the counterparts of last visit for continuous states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_recall.checks import check_flag, check_keys, check_network
from torchrl_recall.masking import one_each
from torchrl_recall.state_reading import trace_entry, trace_states


class RisingValue:
    r"""Keep step t only if :math:`V(s_t) < V(s_u)` for every later state u > t of the trace.

    The last exit from each level of the value: what comes before is a detour, and imitating it
    teaches the detour. In a maze it does what last visit does, for any states. Ties are left out.
    Where the network gives NaN or infinite numbers, that step and all older ones are left out.

    Args:
        value_network (TensorDictModuleBase): shared, not owned; runs as it is, without gradient,
            once for all states.

    Keyword Args:
        value_key (NestedKey): where it writes its value, ``[*B]`` or ``[*B, 1]``.
        in_keys (NestedKey or list of NestedKey, optional): where in the trace its inputs are, one
            for each of its ``in_keys``. Defaults to those.
        compare_end (bool): compare with the state that the trace ends in, too. Switch it off where
            traces end in terminal states, whose value no critic learns.

    Raises:
        TypeError: not a TensorDictModule.
        ValueError: a value that the network does not write, or keys that do not match.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> value = TensorDictModule(lambda s: s, ["observation"], ["state_value"])
        >>> walk = torch.tensor([[0.0], [2.0], [1.0], [3.0]])  # 0 -> 2 -> 1 -> 3
        >>> trace = TensorDict({"observation": walk[:-1], "next": {"observation": walk[1:]}}, [3])
        >>> RisingValue(value)(trace)
        tensor([ True, False,  True])
    """

    def __init__(
        self,
        value_network: TensorDictModuleBase,
        *,
        value_key: NestedKey = "state_value",
        in_keys: NestedKey | Sequence[NestedKey] | None = None,
        compare_end: bool = True,
    ) -> None:
        self.value_network: TensorDictModuleBase = check_network("value_network", value_network)
        self.value_key = unravel_key(value_key)
        if self.value_key not in map(unravel_key, value_network.out_keys):
            raise ValueError(
                f"value_key {value_key!r} is not among the out_keys {value_network.out_keys} of "
                "value_network."
            )
        inputs: Any = value_network.in_keys
        self.in_keys: list[NestedKey] = check_keys(
            "in_keys", list(inputs) if in_keys is None else in_keys
        )
        if len(self.in_keys) != len(inputs):
            raise ValueError(f"in_keys {self.in_keys} must match the network's {inputs}.")
        self.compare_end: bool = check_flag("compare_end", compare_end)

    @torch.no_grad()
    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return which steps to keep, ``[*B, T]``, of traces ``[*B, T]``.

        Raises:
            KeyError: an input of the network is not in the trace.
            ValueError: not one value for each state.
        """
        network = self.value_network
        shape = torch.Size([*trace.shape[:-1], trace.shape[-1] + 1])
        states = TensorDict({}, shape, device=trace.device)
        for key, name in zip(self.in_keys, network.in_keys, strict=True):
            states.set(name, trace_entry(trace, key))
        value = one_each(states, network(states).get(self.value_key), repr(self.value_key))
        return _rising(value, self.compare_end)


class RisingDistance:
    """Keep step t only if it is farther from the trace's end than every later state.

    As `RisingValue`, by a distance ``d(s_t, s_T)`` in steps, such as `TemporalDistance` learns from
    any data, without reward. The distance of the end from itself is 0. Ties are left out. Where the
    distance is NaN or infinite, that step and all older ones are left out.

    Args:
        distance (callable): from flat states ``[*B, T, D]`` and ends ``[*B, T, D]`` to ``[*B, T]``
            steps; shared, not owned; runs as it is, without gradient, once for all steps.

    Keyword Args:
        in_keys (NestedKey or list of NestedKey): the observations, in the order of concatenation (a
            tuple is one nested key).

    Raises:
        TypeError: not callable.
        ValueError: no keys.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> walk = torch.tensor([[0.0], [2.0], [1.0], [3.0]])  # 0 -> 2 -> 1 -> 3
        >>> trace = TensorDict({"observation": walk[:-1], "next": {"observation": walk[1:]}}, [3])
        >>> RisingDistance(lambda state, end: (end - state).squeeze(-1))(trace)
        tensor([ True, False,  True])
    """

    def __init__(
        self,
        distance: Callable[[Tensor, Tensor], Tensor],
        *,
        in_keys: NestedKey | Sequence[NestedKey] = "observation",
    ) -> None:
        if not callable(distance):
            raise TypeError(f"distance must be callable, got {type(distance).__name__}.")
        self.distance = distance
        self.in_keys: list[NestedKey] = check_keys("in_keys", in_keys)

    @torch.no_grad()
    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return which steps to keep, ``[*B, T]``, of traces ``[*B, T]``.

        Raises:
            KeyError: a key is not in the trace.
            ValueError: not one distance for each step.
        """
        states = trace_states(trace, self.in_keys)
        before, end = states[..., :-1, :], states[..., -1:, :]
        distance = self.distance(before, end.expand_as(before))
        if not isinstance(distance, Tensor) or distance.shape != trace.shape:
            shaped = isinstance(distance, Tensor)
            came = tuple(distance.shape) if shaped else type(distance).__name__
            raise ValueError(f"distance gave {came}, expected a tensor of {tuple(trace.shape)}.")
        distance = torch.cat([distance, torch.zeros_like(distance[..., :1])], -1)
        return _rising(-distance, True)


def _rising(value: Tensor, compare_end: bool) -> Tensor:
    """Return ``[*B, T]``: whether values ``[*B, T + 1]`` are below all later ones."""
    # Nothing is below minus infinity: what is not finite leaves out all older steps.
    finite = torch.isfinite(value)
    level = torch.where(finite, value, -torch.inf)
    if not compare_end:
        level = torch.cat([level[..., :-1], torch.full_like(level[..., -1:], torch.inf)], -1)
    # The least of all later values, by a running minimum from the end on: junk is older.
    least = level.flip(-1).cummin(-1).values.flip(-1)[..., 1:]
    return (level[..., :-1] < least) & finite[..., :-1]
