"""How much the members of an ensemble disagree about a predecessor: where not to trust a trace."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.ensemble import members_of
from torchrl_recall.model.heads import CategoricalHead, NormalDelta, SupportDelta
from torchrl_recall.model.mixture import MixtureDelta


def disagreement(model: BacktrackModel, action: Tensor, next_state: Tensor) -> Tensor:
    """Disagreement of an ensemble about what came before ``next_state``, given the action.

    It is near 0 where the members were fitted and grows where they were not: what remains is not
    the spread of the predecessors, which every member may know, but ignorance. Continuous changes:
    the standard deviation over members of the mean predecessor, in units of the change's own
    standard deviation over the data, root mean square over dimensions. Categorical changes: the
    mutual information of member and predecessor in nats, at most ``log M``.

    Args:
        model (BacktrackModel): an ensemble of ``M > 1`` members.
        action (Tensor): flat actions as `BacktrackModel.read` gives them, ``[*B, A]`` in the
            model's dtype or ``[*B]`` int64 indices.
        next_state (Tensor): ``[*B, size]`` flat states, in the model's dtype or int64.

    Returns:
        Tensor: ``[*B]`` in the model's dtype, at least 0.

    Raises:
        TypeError: not a model.
        ValueError: a model of one member, which cannot disagree.

    Source: for categorical heads, Houlsby et al., *Bayesian Active Learning for Classification and
    Preference Learning*, 2011, https://arxiv.org/abs/1112.5745.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel
        >>> from torchrl_recall.model.disagreement import disagreement
        >>> model = BacktrackModel(3, 1, num_cells=(32,), num_members=5)
        >>> disagreement(model, torch.zeros(7, 1), torch.randn(7, 3)).shape
        torch.Size([7])
    """
    if not isinstance(model, BacktrackModel):
        raise TypeError(f"model must be a BacktrackModel, got {type(model).__name__}.")
    if model.num_members == 1:
        raise ValueError("model has one member, expected num_members of at least 2 to disagree.")
    members = members_of(model)
    parameters = torch.stack([one.delta_parameters(action, next_state) for one in members])
    head = model.delta_head
    if isinstance(head, CategoricalHead):
        if isinstance(head, SupportDelta):
            parameters = head.logits(parameters, next_state)
        share = torch.softmax(parameters, -1)
        return (_entropy(share.mean(0)) - _entropy(share).mean(0)).clamp_min(0)
    assert isinstance(head, NormalDelta | MixtureDelta)
    mean = head.mean(parameters)
    return (mean - mean.mean(0)).square().mean((0, -1)).sqrt()


def _entropy(share: Tensor) -> Tensor:
    """Entropy of probabilities along the last dimension, in nats."""
    return torch.special.entr(share).sum(-1)
