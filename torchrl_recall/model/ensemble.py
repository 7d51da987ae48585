"""What makes a backtracking model an ensemble: members as models of their own, and their mixture.

A member learns by itself (`BacktrackLoss`) and walks by itself (``traces/ensemble.py``); what the
model says of data is the uniform mixture of its members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_recall.model.networks import NETWORKS


class Ensemble:
    """The part of `BacktrackModel` that knows its members.

    Attributes:
        num_members (int): 1 for a model that is no ensemble.
        members (nn.ModuleList): of an ensemble, its sets of networks.
    """

    num_members: int = 1
    members: nn.ModuleList

    @property
    def has_stop(self) -> bool:
        """Whether the model knows where episodes begin."""
        networks: Any = self if self.num_members == 1 else self.members[0]
        return networks.stop_network is not None

    def member(self, index: int) -> Any:
        """Return one member of an ensemble, as a model that shares its parameters and statistics.

        Args:
            index (int): 0 to ``num_members - 1``.

        Returns:
            BacktrackModel: with ``num_members = 1``; the same object from call to call, and the
            model itself if it is no ensemble. It follows the ensemble, however that is changed, and
            is not saved with it.

        Raises:
            ValueError: there is no such member.

        Examples:
            >>> from torchrl_recall import BacktrackModel
            >>> model = BacktrackModel(3, 1, num_cells=(32,), num_members=5)
            >>> model.member(4).action_network is model.members[4].action_network
            True
        """
        if not 0 <= index < self.num_members:
            raise ValueError(f"index must lie in 0 to {self.num_members - 1}, got {index}.")
        if self.num_members == 1:
            return self
        views = self.__dict__.get("_views")
        if not torch.compiler.is_compiling() and not _are_current(self, views):
            # Straight into __dict__: registered modules would be saved twice.
            views = self.__dict__["_views"] = _build_views(self)
        return views[index]  # pyright: ignore[reportOptionalSubscript]

    def _refuse_ensemble(self, method: str) -> None:
        if self.num_members > 1:
            raise RuntimeError(
                f"{method} is one member's, but this BacktrackModel has {self.num_members}; use "
                f"model.member(i).{method}, or log_prob for the mixture of all."
            )

    def __getstate__(self) -> dict[str, Any]:
        # Views are built anew where they are wanted.
        return {name: value for name, value in self.__dict__.items() if name != "_views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore[reportAttributeAccessIssue]
        if self.num_members > 1:
            self.member(0)


def members_of(model: Any) -> list[Any]:
    """Return the members of an ensemble as models of their own, or the model itself."""
    return [model.member(i) for i in range(model.num_members)]


def mixed_terms(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the factors of the uniform mixture of members, each a conditional of the mixture.

    With ``p_m`` the members' factors, the mixture's are ``mean p_m(stop)``, then
    ``mean p_m(stop) p_m(a) / mean p_m(stop)``, then that of Δ likewise, so that their logs add up
    to ``log mean_m`` of the joint density.

    Args:
        terms (sequence of dict): each member's of ``BacktrackModel.step_log_prob``.

    Returns:
        dict: the same names, ``[*B]`` each.

    Examples:
        >>> import torch
        >>> one, other = ({"action": torch.tensor([p]).log(), "delta": torch.tensor([q]).log()}
        ...               for p, q in ((0.2, 0.5), (0.6, 0.1)))
        >>> mixed = mixed_terms([one, other])
        >>> mixed["action"].exp(), (mixed["action"] + mixed["delta"]).exp()
        (tensor([0.4000]), tensor([0.0800]))
    """
    mixed: dict[str, Tensor] = {}
    joint = torch.zeros_like(torch.stack([one["action"] for one in terms]))
    before = torch.zeros_like(terms[0]["action"])
    for name in ("stop", "action", "delta"):
        if name in terms[0]:
            joint = joint + torch.stack([one[name] for one in terms])
            mean = joint.logsumexp(0) - math.log(len(terms))
            mixed[name] = mean - before
            before = mean
    return {name: mixed[name] for name in terms[0]}


def _build_views(model: Any) -> list[Any]:
    """Return each member of an ensemble as a model of one member that shares its modules.

    Args:
        model (BacktrackModel): an ensemble.

    Returns:
        list of BacktrackModel: in the order of the members.
    """
    views = []
    for networks in model.members:
        cls = type(model)
        view: Any = object.__new__(cls)
        nn.Module.__init__(view)
        own = view.__dict__
        own.update({k: v for k, v in model.__dict__.items() if k not in own and k != "_views"})
        view.num_members = 1
        shared = {name: part for name, part in model._modules.items() if name != "members"}
        view._modules.update(shared)
        for name in NETWORKS:
            setattr(view, name, getattr(networks, name))
        views.append(view)
    return views


def _are_current(model: Any, views: list[Any] | None) -> bool:
    """Return whether views still share the modules that the ensemble has now."""
    if views is None or len(views) != len(model.members):
        return False
    shared = [(name, part) for name, part in model._modules.items() if name != "members"]
    return all(
        all(view._modules.get(name) is part for name, part in shared)
        and all(getattr(view, name) is getattr(networks, name) for name in NETWORKS)
        for view, networks in zip(views, model.members, strict=True)
    )
