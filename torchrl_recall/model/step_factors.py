"""The factors of a backtracking model on flat tensors: stop, action and change of state.

The part of `BacktrackModel` that the walk and the losses call; the model itself reads TensorDicts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchrl_recall.model.ensemble import Ensemble, members_of, mixed_terms
from torchrl_recall.model.observation import ObservationCodec


class StepFactors(Ensemble):
    """The part of `BacktrackModel` that turns flat states and actions into distributions.

    Attributes:
        observation (ObservationCodec): features of states.
        action (ActionCodec): the action's head and features.
        delta_head (nn.Module): the head of the change of state.
    """

    observation: ObservationCodec
    action: Any
    delta_head: Any
    # None without a stop head, or where actions are uniform; an ensemble's are its members'.
    action_network: Any
    delta_network: Any
    stop_network: Any

    def stop_logit(self, state: Tensor) -> Tensor:
        """Logit of ``q(stop|s')``.

        Args:
            state (Tensor): ``[*B, size]`` flat states, as ``observation.flatten`` gives them.

        Returns:
            Tensor: ``[*B]``.

        Raises:
            RuntimeError: the model was built without a stop head, or is an ensemble.
        """
        self._refuse_ensemble("stop_logit")
        if self.stop_network is None:
            raise RuntimeError("this BacktrackModel has no stop head; build it with stop=True.")
        return self.stop_network(self.observation(state)).squeeze(-1)

    def action_parameters(self, next_state: Tensor) -> Tensor:
        """Parameters of ``q(a|s')``.

        Args:
            next_state (Tensor): ``[*B, size]`` flat states.

        Returns:
            Tensor: ``[*B, output_size]`` for ``self.action.head``.

        Raises:
            RuntimeError: the model is an ensemble.
        """
        self._refuse_ensemble("action_parameters")
        if self.action_network is None:  # uniform: equal logits, or no parameters at all
            shape = (*next_state.shape[:-1], self.action.head.output_size)
            return self.observation.unit.new_zeros(1).expand(shape)
        return self.action_network(self.observation(next_state))

    def delta_parameters(self, action: Tensor, next_state: Tensor) -> Tensor:
        """Parameters of ``q(Δ|a,s')``.

        Args:
            action (Tensor): flat actions, ``[*B, A]`` or ``[*B]`` indices.
            next_state (Tensor): ``[*B, size]`` flat states.

        Returns:
            Tensor: ``[*B, output_size]`` for ``self.delta_head``.

        Raises:
            RuntimeError: the model is an ensemble.
        """
        self._refuse_ensemble("delta_parameters")
        features = self.observation(next_state)
        action_features = self.action.head.features(action).to(features.dtype)
        return self.delta_network(torch.cat([features, action_features], -1))

    def step_log_prob(
        self,
        state: Tensor,
        action: Tensor,
        next_state: Tensor,
        *,
        action_parameters: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Log-probabilities of real steps, factor by factor, on flat tensors.

        Of an ensemble: those of the uniform mixture of its members, each factor given those that
        come before it (stop, action, Δ), so that they add up to the joint log-probability.

        Args:
            state (Tensor): ``[*B, size]``.
            action (Tensor): flat actions, ``[*B, A]`` or ``[*B]`` indices.
            next_state (Tensor): ``[*B, size]``.
            action_parameters (Tensor, optional): ``[*B, P]`` of that method, where already known.

        Returns:
            dict: ``"action"`` and ``"delta"``, each ``[*B]``; with a stop head also ``"stop"``, the
            log-probability that ``next_state`` was *not* an episode's first state.
        """
        if self.num_members > 1:
            members = members_of(self)
            return mixed_terms([one.step_log_prob(state, action, next_state) for one in members])
        if action_parameters is None:
            action_parameters = self.action_parameters(next_state)
        terms = {
            "action": self.action.head.log_prob(action_parameters, action),
            "delta": self.delta_head.predecessor_log_prob(
                self.delta_parameters(action, next_state), state, next_state
            ),
        }
        if self.has_stop:
            terms["stop"] = nn.functional.logsigmoid(-self.stop_logit(next_state))
        return terms
