"""The table backend: where states and actions can be counted, ask the networks once for each.

The heads are evaluated on all states (and state-action pairs); the walk then only looks up
cumulative probabilities and draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.heads import CategoricalHead, SupportDelta
from torchrl_recall.traces.masks import since_start
from torchrl_recall.traces.noise import TraceNoise
from torchrl_recall.traces.walk import Walk

# Numbers in the tables, beyond which they are no longer worth their memory.
MAX_TABLE = 4 * 2**20


def unsupported(model: BacktrackModel) -> str | None:
    """Say why this backend cannot run a model, or None if it can."""
    if not model.observation.is_discrete:
        return "the states of the model are continuous"
    if not isinstance(model.action.head, CategoricalHead):
        return "the actions of the model are not one choice of classes"
    states, actions = model.observation.num_states, model.action.head.output_size
    size = states * (actions * (1 + model.delta_head.output_size) + 1)
    if size > MAX_TABLE:
        return f"its tables would hold {size} numbers, at most {MAX_TABLE} are allowed"
    return None


def num_evaluations(model: BacktrackModel) -> int:
    """Return how many rows the networks must be asked for the tables of a supported model."""
    return model.observation.num_states * (1 + model.action.head.output_size)


class TableWalk:
    """The tables of a model as it is now; call it with starts and noise, tile by tile.

    Make and call it under `torch.no_grad`.

    Args:
        model (BacktrackModel): a model for which `unsupported` finds no reason.
    """

    def __init__(self, model: BacktrackModel) -> None:
        codec, head = model.observation, model.delta_head
        assert isinstance(head, CategoricalHead)
        self.codec, self.num_actions = codec, model.action.head.output_size
        device = model.device
        states = codec.from_joint_index(torch.arange(codec.num_states, device=device))
        self.stop = torch.sigmoid(model.stop_logit(states)) if model.has_stop else None
        self.action = _Classes(model.action_parameters(states))

        actions = torch.arange(self.num_actions, device=device).repeat(len(states))
        pairs = states.repeat_interleave(self.num_actions, 0)
        logits = model.delta_parameters(actions, pairs)
        classes = torch.arange(head.output_size, device=device)
        if isinstance(head, SupportDelta):
            logits = head.logits(logits, pairs)
            reached = head.displace(states.unsqueeze(1), classes)
            # What leaves the spec is never drawn, but its index must exist.
            reached = torch.minimum(torch.maximum(reached, codec.low), codec.high)
            self.predecessor = codec.joint_index(reached).flatten()
        else:
            self.predecessor = classes.repeat(len(states))
        self.delta = _Classes(logits)
        self.num_deltas = head.output_size

    def __call__(self, start: Tensor, noise: TraceNoise) -> Walk:
        """Walk one tile backwards.

        Args:
            start (Tensor): ``[n, size]`` flat states.
            noise (TraceNoise): the random numbers of the tile.

        Returns:
            Walk: the traces.
        """
        index = self.codec.joint_index(start)
        indices, actions, pairs, deltas = [index], [], [], []
        # One call for all steps' views.
        action_noise = noise.action.squeeze(-1).unbind(0)
        delta_noise = noise.delta.squeeze(-1).unbind(0)
        for t in range(len(noise.action) - 1, -1, -1):
            action = self.action.sample(index, action_noise[t])
            pair = torch.add(action, index, alpha=self.num_actions)
            delta = self.delta.sample(pair, delta_noise[t])
            index = self.predecessor[torch.add(delta, index, alpha=self.num_deltas)]
            indices.append(index)
            actions.append(action)
            pairs.append(pair)
            deltas.append(delta)
        where = torch.stack(indices[::-1])
        action, pair, delta = (torch.stack(x[::-1]) for x in (actions, pairs, deltas))
        alive = None
        if self.stop is not None and noise.stop is not None:
            alive = since_start(noise.stop >= self.stop[where[1:]])
        return Walk(
            self.codec.from_joint_index(where),
            action,
            self.action.log_prob(where[1:], action),
            self.delta.log_prob(pair, delta),
            alive,
        )


class _Classes:
    """Cumulative and log-probabilities of categorical distributions, a row each."""

    def __init__(self, logits: Tensor) -> None:
        self.log_probs = torch.log_softmax(logits, -1)
        shares = (logits - logits.amax(-1, keepdim=True)).exp_()
        self.cumulative = shares.cumsum(-1)
        # As `heads.sample_index` has it: just below the total.
        self.top = self.cumulative[:, -1].contiguous()
        self.below = 1 - torch.finfo(logits.dtype).eps

    def sample(self, row: Tensor, uniform: Tensor) -> Tensor:
        """Invert the cumulative distributions of some rows."""
        threshold = uniform * self.top[row] * self.below
        return (self.cumulative[row] <= threshold.unsqueeze(-1)).sum(-1)

    def log_prob(self, row: Tensor, index: Tensor) -> Tensor:
        """Return log-probabilities by row and class."""
        return self.log_probs.flatten()[row * self.log_probs.shape[-1] + index]
