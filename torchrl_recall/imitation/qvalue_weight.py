"""`QValueWeight`: the weight of a trace's steps from a Q-network, for off-policy learners."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type
from torchrl.objectives.common import LossModule

from torchrl_recall.checks import check_finite, check_flag
from torchrl_recall.imitation.recurrent import check_memoryless
from torchrl_recall.imitation.weights import (
    ImitationKeys,
    PositivePart,
    network_output,
    one_each_step,
    state_value,
)
from torchrl_recall.masking import fill_rows, filled_entries


class QValueWeight(PositivePart):
    """Weight ``max(Q(s_t, a_t) - V(s_t), 0)``: imitate actions that are better than the policy's.

    V is ``Q(s, π(s))`` with the actor's deterministic action (a loss's
    ``deterministic_sampling_mode`` or, called directly, ``set_exploration_type`` can ask for
    another one), for a Q-network of discrete actions ``Σ_a π(a|s) Q(s, a)``, or a critic's value.
    The networks are shared, not owned, as in `AdvantageWeight`.

    Args:
        qvalue_network (TensorDictModuleBase or LossModule): reads state and action and writes
            ``state_action_value``, or reads the state and writes ``action_value``, one for each
            discrete action. SACLoss and others train copies of the network that they are given:
            pass the loss itself, and the smallest value of its copies is taken.

    Keyword Args:
        actor (TensorDictModuleBase, optional): the policy.
        critic (TensorDictModuleBase, optional): writes V(s), instead of the policy.
        gate (bool): weight 1 where ``Q(s_t, a_t) > V(s_t)``, and 0 elsewhere.

    Raises:
        KeyError: a key is missing.
        TypeError: a network of a wrong type; values of all actions, and an actor without
            ``get_dist``.
        ValueError: not one of actor and critic; values of a wrong shape, or non-finite where
            steps are kept.

    Source: after Nair et al., *Overcoming Exploration in Reinforcement Learning with
    Demonstrations*, ICRA 2018, https://arxiv.org/abs/1709.10089.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> q = TensorDictModule(lambda s, a: -(a - s) ** 2, ["observation", "action"],
        ...                      ["state_action_value"])
        >>> actor = TensorDictModule(torch.zeros_like, ["observation"], ["action"])
        >>> state, action = torch.ones(1, 2, 1), torch.tensor([[[0.5], [-1.0]]])
        >>> trace = TensorDict({"observation": state, "action": action}, [1, 2])
        >>> kept = torch.ones(1, 2, dtype=torch.bool)
        >>> QValueWeight(q, actor=actor)(trace, TensorDict({}, [1]), kept)
        tensor([[0.7500, 0.0000]])
    """

    def __init__(
        self,
        qvalue_network: TensorDictModuleBase | LossModule,
        *,
        actor: TensorDictModuleBase | None = None,
        critic: TensorDictModuleBase | None = None,
        gate: bool = False,
    ) -> None:
        if isinstance(qvalue_network, LossModule) and not hasattr(qvalue_network, "qvalue_network"):
            raise TypeError(
                f"qvalue_network is a {type(qvalue_network).__name__}, which has no qvalue_network."
            )
        self.qvalue_network: Any = check_memoryless("qvalue_network", qvalue_network)
        if (actor is None) == (critic is None):
            raise ValueError("expected one of actor and critic, which say V, got both or neither.")
        self.actor: Any = None if actor is None else check_memoryless("actor", actor)
        self.critic: Any = None if critic is None else check_memoryless("critic", critic)
        self.gate = check_flag("gate", gate)

    def _network(self) -> Any:
        network: Any = self.qvalue_network
        return network.qvalue_network if isinstance(network, LossModule) else network

    def _names(self, keys: ImitationKeys) -> list[NestedKey]:
        """List what is read of the trace."""
        policy: Any = self.critic if self.actor is None else self.actor
        return list(dict.fromkeys([*self._network().in_keys, *policy.in_keys, keys.action]))

    def in_keys(self, keys: ImitationKeys) -> list[NestedKey]:
        """List what is read of the batch.

        Args:
            keys (ImitationKeys): where things are.

        Returns:
            list of NestedKey: keys at the root of the batch.
        """
        return [unravel_key((keys.trace, name)) for name in self._names(keys)]

    def advantage(
        self, trace: TensorDictBase, tensordict: TensorDictBase, kept: Tensor, keys: ImitationKeys
    ) -> Tensor:
        """Return ``Q(s_t, a_t) - V(s_t)``, ``[*B, T]``; of any value where steps are masked.

        Args:
            trace (TensorDictBase): ``[*B, T]``, oldest step first.
            tensordict (TensorDictBase): the batch that carries the trace.
            kept (Tensor): ``[*B, T]`` bool; False where the trace may hold anything.
            keys (ImitationKeys): where things are.
        """
        data = filled_entries(trace, self._names(keys), kept)
        states = data.exclude(keys.action)
        of_pairs = keys.action in self._network().in_keys
        key = keys.state_action_value if of_pairs else keys.action_value
        qvalue = self._qvalue(data if of_pairs else states, key)
        if of_pairs:
            taken = one_each_step(qvalue, kept, key)
        else:
            check_finite(f"{key!r} at kept steps", fill_rows(qvalue, kept))
            taken = _chosen(qvalue, data.get(keys.action), keys)
        if self.critic is not None:
            return taken - state_value(self.critic, states, keys.state_value, kept)
        actor: Any = self.actor
        if of_pairs:
            with _deterministic():
                own = actor(states.select(*actor.in_keys)).get(keys.action, default=None)
            if own is None:
                raise KeyError(
                    f"the actor writes no {keys.action!r}, its keys are {actor.out_keys}."
                )
            value = self._qvalue(states.set(keys.action, own), key)
            return taken - one_each_step(value, kept, key)
        if not hasattr(actor, "get_dist"):
            raise TypeError(
                f"actor must be a stochastic policy with get_dist to weigh {key!r}, got "
                f"{type(actor).__name__}; or pass a critic."
            )
        probability = actor.get_dist(states.select(*actor.in_keys)).probs
        return taken - (probability * qvalue).sum(-1)

    def _qvalue(self, data: TensorDictBase, key: NestedKey) -> Tensor:
        """Ask the network, or the smallest value of a loss's copies of it."""
        source: Any = self.qvalue_network
        network = self._network()
        data = data.select(*network.in_keys)
        if not isinstance(source, LossModule):
            return network_output(network, data, key)
        parameters: Any = source.qvalue_network_params
        copies = parameters.unbind(0) if parameters.batch_dims else [parameters]
        values = []
        for copy in copies:
            with copy.to_module(network, preserve_module_state=False):
                values.append(network_output(network, data.copy(), key))
        return torch.stack(values).amin(0)


def _deterministic() -> Any:
    """Let a policy act without chance, unless the loss or the user has said how it acts."""
    if exploration_type() is None:
        return set_exploration_type(ExplorationType.DETERMINISTIC)
    return nullcontext()


def _chosen(qvalue: Tensor, action: Tensor, keys: ImitationKeys) -> Tensor:
    """Return the value of the action taken, an index or one-hot, among those of all."""
    if action.shape == qvalue.shape:
        return (qvalue * action.to(qvalue.dtype)).sum(-1)
    if action.is_floating_point() or action.numel() != qvalue[..., 0].numel():
        raise ValueError(
            f"trace {keys.action!r} has shape {tuple(action.shape)} and dtype {action.dtype}, "
            f"expected indices or one-hot rows for {keys.action_value!r} of shape "
            f"{tuple(qvalue.shape)}."
        )
    return qvalue.gather(-1, action.reshape(qvalue.shape[:-1]).unsqueeze(-1).long()).squeeze(-1)
