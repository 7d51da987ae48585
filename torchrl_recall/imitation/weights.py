"""How much each step of a trace is worth imitating: what `RecallTraceLoss(weight=...)` accepts.

Between the traces and the imitation: a weight asks a critic which steps are better than what the
policy does already, as self-imitation learning does of real steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_recall.checks import check_choice, check_finite, check_flag, check_real
from torchrl_recall.imitation.recurrent import check_memoryless
from torchrl_recall.masking import fill_rows, filled_entries, one_each
from torchrl_recall.model.observation import sorted_keys


@dataclass
class ImitationKeys:
    """Names of the entries that imitation reads; `RecallTraceLoss.set_keys` changes them.

    Attributes:
        trace (NestedKey): the traces, a nested TensorDict.
        action (NestedKey or list of NestedKey): the action, inside the trace; of several parts,
            their nested TensorDict or their keys.
        value (NestedKey, optional): in the batch, the value that the traces lead to; not beside
            ``BacktrackTransform(start=...)``, whose traces lead elsewhere. None: the critic says.
        trace_reward (NestedKey): inside the trace, rewards if there are any.
        trace_terminated (NestedKey): inside the trace, ends of episodes if there are any.
        state_value (NestedKey): where a critic writes V(s).
        state_action_value (NestedKey): where a Q-network writes Q(s, a).
        action_value (NestedKey): where a Q-network of discrete actions writes all of Q(s, ·).

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from torch import nn
        >>> from torchrl.modules import ProbabilisticActor, TanhNormal
        >>> from torchrl_recall import RecallTraceLoss
        >>> actor = ProbabilisticActor(
        ...     TensorDictModule(nn.Linear(3, 1), ["observation"], ["loc"]), ["loc"],
        ...     distribution_class=TanhNormal, distribution_kwargs={"scale": 0.1})
        >>> loss = RecallTraceLoss(actor)
        >>> loss.set_keys(trace="recall")
        >>> loss.tensor_keys.trace
        'recall'
    """

    trace: NestedKey = "trace"
    action: NestedKey = "action"
    value: NestedKey | None = None
    trace_reward: NestedKey = ("next", "reward")
    trace_terminated: NestedKey = ("next", "terminated")
    state_value: NestedKey = "state_value"
    state_action_value: NestedKey = "state_action_value"
    action_value: NestedKey = "action_value"


@runtime_checkable
class ImitationWeight(Protocol):
    """Says how much each step of traces counts.

    An ``in_keys(keys)`` beside it may list what it reads of the batch, for ``loss.in_keys``.

    Examples:
        >>> import torch
        >>> def late_steps(trace, tensordict, kept, keys):
        ...     return torch.linspace(0.1, 1, kept.shape[-1]).expand(kept.shape)
        >>> isinstance(late_steps, ImitationWeight)  # RecallTraceLoss(actor, weight=late_steps)
        True
    """

    def __call__(
        self, trace: TensorDictBase, tensordict: TensorDictBase, kept: Tensor, keys: ImitationKeys
    ) -> Tensor:
        """Return the weights.

        Args:
            trace (TensorDictBase): ``[*B, T]``, oldest step first; not to be changed.
            tensordict (TensorDictBase): the batch that carries the trace.
            kept (Tensor): ``[*B, T]`` bool; False where the trace may hold anything.
            keys (ImitationKeys): where things are.

        Returns:
            Tensor: ``[*B, T]``, at least 0 and finite where kept.
        """
        ...


def returns_along(
    reached: Tensor,
    num_steps: int,
    gamma: float,
    reward: Tensor | None = None,
    terminated: Tensor | None = None,
) -> Tensor:
    """Compute ``R_t = r_t + gamma (1 - terminated_t) R_{t+1}`` along traces.

    Args:
        reached (Tensor): ``[*B]``, ``R_T``.
        num_steps (int): ``T``.
        gamma (float): discount of a step.
        reward (Tensor, optional): ``[*B, >= T]``; None: no rewards.
        terminated (Tensor, optional): ``[*B, >= T]`` bool; None: nowhere.

    Returns:
        Tensor: ``[*B, T]``.

    Examples:
        >>> returns_along(torch.ones(1), 3, 0.5)
        tensor([[0.1250, 0.2500, 0.5000]])
        >>> returns_along(torch.ones(1), 3, 0.5, reward=torch.ones(1, 3))
        tensor([[1.8750, 1.7500, 1.5000]])
    """
    if reward is None and terminated is None:
        to_end = torch.arange(num_steps, 0, -1, device=reached.device, dtype=reached.dtype)
        return reached.unsqueeze(-1) * gamma**to_end
    columns = [reached]
    for t in reversed(range(num_steps)):
        following = columns[-1]
        if terminated is not None:
            # Not a product: the value of a terminal state may be NaN.
            following = following.masked_fill(terminated[..., t], 0.0)
        following = gamma * following
        columns.append(following if reward is None else reward[..., t] + following)
    return torch.stack(columns[:0:-1], -1) if num_steps else reached.new_zeros(*reached.shape, 0)


class PositivePart:
    """A weight that is an advantage's positive part, or with a gate whether there is one."""

    gate: bool

    def __call__(
        self,
        trace: TensorDictBase,
        tensordict: TensorDictBase,
        kept: Tensor,
        keys: ImitationKeys | None = None,
    ) -> Tensor:
        """Return ``max(advantage, 0)``, or with a gate 1 or 0, see `ImitationWeight`."""
        with torch.no_grad():
            advantage = self.advantage(trace, tensordict, kept, keys or ImitationKeys())
            if self.gate:
                return (advantage > 0).to(advantage.dtype)
            return advantage.clamp_min(0)

    def advantage(
        self, trace: TensorDictBase, tensordict: TensorDictBase, kept: Tensor, keys: ImitationKeys
    ) -> Tensor:
        """Return the advantage, ``[*B, T]``; of any value where steps are masked.

        Args:
            trace (TensorDictBase): ``[*B, T]``, oldest step first.
            tensordict (TensorDictBase): the batch that carries the trace.
            kept (Tensor): ``[*B, T]`` bool; False where the trace may hold anything.
            keys (ImitationKeys): where things are.
        """
        raise NotImplementedError


class AdvantageWeight(PositivePart):
    """Weight ``max(R_t - V(s_t), 0)``: imitate what leads to more than the critic expects.

    ``R_T`` is the value of the state ``s_T`` that the trace leads to, and going back
    ``R_t = r_t + gamma (1 - terminated_t) R_{t+1}``, with the trace's ``("next", "reward")`` and
    ``("next", "terminated")`` where it has them, else without: ``R_t = gamma^(T - t) R_T``. Masked
    steps between are steps all the same, and so is the last one.

    The critic is shared, not owned: it is asked as it is at each call, gets no gradient, and stays
    out of the loss's ``parameters()``, ``state_dict()`` and ``to()``. A terminal state has no value
    of its own: if traces lead to such, give the key ``value``, or rewards and ``terminated``.

    Args:
        critic (TensorDictModuleBase): writes V(s) at the key ``state_value``.

    Keyword Args:
        gamma (float): discount of a step, in [0, 1].
        gate (bool): weight 1 where ``R_t > V(s_t)``, and 0 elsewhere.
        value_of (str): whose value the batch's key ``value`` holds. ``"state"``: that of ``s_T``.
            ``"transition"``: that of a step into it, reward included, as ``"value_target"`` and
            `transition_value` do; then it is ``R_{T-1}``.

    Raises:
        KeyError: a key is missing.
        TypeError: the critic is no TensorDictModule.
        ValueError: ``gamma`` out of range; values, rewards or returns of a wrong shape, or
            non-finite where steps are kept.

    Source: after Oh et al., *Self-Imitation Learning*, ICML 2018, https://arxiv.org/abs/1806.05635.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> critic = TensorDictModule(lambda s: s, ["observation"], ["state_value"])
        >>> state = torch.tensor([[[0.1], [0.9], [0.4]]])
        >>> trace = TensorDict({"observation": state}, [1, 3])
        >>> batch = TensorDict({"goal_value": torch.ones(1)}, [1])
        >>> weight = AdvantageWeight(critic, gamma=0.9)
        >>> kept = torch.ones(1, 3, dtype=torch.bool)
        >>> weight(trace, batch, kept, ImitationKeys(value="goal_value"))
        tensor([[0.6290, 0.0000, 0.5000]])
    """

    def __init__(
        self,
        critic: TensorDictModuleBase,
        *,
        gamma: float,
        gate: bool = False,
        value_of: Literal["state", "transition"] = "state",
    ) -> None:
        self.critic = check_memoryless("critic", critic)
        self.gamma: float = check_real("gamma", gamma, 0.0, 1.0)
        self.gate = check_flag("gate", gate)
        self.value_of = check_choice("value_of", value_of, ("state", "transition"))

    def in_keys(self, keys: ImitationKeys) -> list[NestedKey]:
        """List what is read of the batch.

        Args:
            keys (ImitationKeys): where things are.

        Returns:
            list of NestedKey: keys at the root of the batch.
        """
        names = [unravel_key((keys.trace, name)) for name in self.critic.in_keys]
        if keys.value is not None:
            return [*names, keys.value]
        return names + [unravel_key((keys.trace, "next", name)) for name in self.critic.in_keys]

    def advantage(
        self, trace: TensorDictBase, tensordict: TensorDictBase, kept: Tensor, keys: ImitationKeys
    ) -> Tensor:
        """Return ``R_t - V(s_t)``, ``[*B, T]``; of any value where steps are masked.

        Args:
            trace (TensorDictBase): ``[*B, T]``, oldest step first.
            tensordict (TensorDictBase): the batch that carries the trace.
            kept (Tensor): ``[*B, T]`` bool; False where the trace may hold anything.
            keys (ImitationKeys): where things are.
        """
        states = filled_entries(trace, self.critic.in_keys, kept)
        value = state_value(self.critic, states, keys.state_value, kept)
        return self.returns(trace, tensordict, kept, keys) - value

    def returns(
        self, trace: TensorDictBase, tensordict: TensorDictBase, kept: Tensor, keys: ImitationKeys
    ) -> Tensor:
        """Return ``R_t``, ``[*B, T]``; of any value where steps are masked.

        Args:
            trace (TensorDictBase): ``[*B, T]``, oldest step first.
            tensordict (TensorDictBase): the batch that carries the trace.
            kept (Tensor): ``[*B, T]`` bool; False where the trace may hold anything.
            keys (ImitationKeys): where things are.
        """
        reward = trace.get(keys.trace_reward, default=None)
        if reward is not None:
            reward = one_each(trace, reward.detach(), f"trace {keys.trace_reward!r}")
        terminated = trace.get(keys.trace_terminated, default=None)
        if terminated is not None:
            terminated = one_each(trace, terminated, f"trace {keys.trace_terminated!r}").bool()
        reached = self._reached(trace, tensordict, kept, keys)
        into_last = self.value_of == "transition" and keys.value is not None
        steps = kept.shape[-1] - int(into_last)
        returns = returns_along(reached, steps, self.gamma, reward, terminated)
        if into_last:
            returns = torch.cat([returns, reached.unsqueeze(-1)], -1)
        check_finite("returns along the trace at kept steps", returns.masked_fill(~kept, 0.0))
        return returns

    def _reached(
        self, trace: TensorDictBase, tensordict: TensorDictBase, kept: Tensor, keys: ImitationKeys
    ) -> Tensor:
        """Return the value that each trace leads to, ``[*B]``."""
        if keys.value is not None:
            value = tensordict.get(keys.value, default=None)
            if value is None:
                raise KeyError(
                    f"value key {keys.value!r} is missing from the data, which has "
                    f"{sorted_keys(tensordict)}."
                )
            return _one_each_trace(keys.value, value.detach(), kept.shape[:-1])
        some = kept.any(-1)
        last = TensorDict({}, some.shape, device=trace.device)
        for key in self.critic.in_keys:
            following = unravel_key(("next", key))
            state = trace.get(following, default=None)
            if state is None:
                raise KeyError(
                    f"key {following!r} is missing from the trace, which has {sorted_keys(trace)}."
                )
            last.set(key, fill_rows(state.detach().select(some.ndim, -1), some))
        return state_value(self.critic, last, keys.state_value, some, check=False)


def network_output(network: TensorDictModuleBase, data: TensorDictBase, key: NestedKey) -> Tensor:
    """Run a network and read what it wrote."""
    value = network(data).get(key, default=None)
    if value is None:
        raise KeyError(f"the network writes no {key!r}, its keys are {list(network.out_keys)}.")
    return value


def state_value(
    network: TensorDictModuleBase,
    data: TensorDictBase,
    key: NestedKey,
    kept: Tensor,
    check: bool = True,
) -> Tensor:
    """Run a network with one value for each row of ``data``, ``[*B]``."""
    value = network_output(network, data.select(*network.in_keys), key)
    return one_each_step(value, kept, key) if check else one_each(data, value, repr(key))


def one_each_step(value: Tensor, kept: Tensor, key: NestedKey) -> Tensor:
    """Return one finite number for each kept step, ``[*B]``."""
    if value.shape not in (kept.shape, (*kept.shape, 1)):
        raise ValueError(
            f"{key!r} has shape {tuple(value.shape)}, expected one entry for each step, "
            f"{tuple(kept.shape)}."
        )
    value = value.reshape(kept.shape)
    check_finite(f"{key!r} at kept steps", value.masked_fill(~kept, 0.0))
    return value


def _one_each_trace(key: NestedKey, value: Tensor, traces: Iterable[int]) -> Tensor:
    """Return ``[*B, N]`` of an entry that has one number for each row ``[*B]`` or trace."""
    traces = torch.Size(traces)
    for shape in (value.shape, value.shape[:-1] if value.shape[-1:] == (1,) else None):
        if (
            shape is not None
            and len(traces) - len(shape) in (0, 1)
            and traces[: len(shape)] == shape
        ):
            value = value.reshape(shape + (1,) * (len(traces) - len(shape)))
            return value.expand(traces)
    raise ValueError(
        f"value key {key!r} has shape {tuple(value.shape)}, expected one number for each row or "
        f"for each of {tuple(traces)} traces."
    )
