"""`BacktrackLoss`: fits the backtracking model to real transitions.

It stands beside the learner: any batch of real data goes through it, and its term adds to theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import dispatch
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from torchrl_recall.checks import as_keys, check_coefficient, check_flag
from torchrl_recall.generators import RandomSource
from torchrl_recall.masking import (
    Reduction,
    blank_rows,
    check_reduction,
    fill_rows,
    kept_rows,
    one_each,
    reduce_kept,
    rows_in_range,
)
from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.ensemble import members_of
from torchrl_recall.model.heads import SupportDelta
from torchrl_recall.model.joint_action import samples_entropy
from torchrl_recall.model.observation import sorted_keys


class BacktrackLoss(LossModule):
    """Negative log-likelihood of real transitions, read backwards, under the backtracking model.

    Use it on any batch of transitions; fitting the model on *all* data works best. In training mode
    a call also merges the batch into the model's running statistics.

    With a stop head every row is a non-stop example at its next state, and every row marked
    ``is_init`` also a stop example at its observation. Rows masked at ``("collector", "mask")``
    count for nothing. Unfinished episodes bias the stop head: their starts are in the data, their
    ends are not, so that it stops too often and traces are too short. Long rollouts make it small.

    An ensemble's loss is the mean of its members' own: each learns by itself, as it would alone up
    to the scale of its gradient. The likelihood of their mixture would let them divide the data.

    In several processes (``DistributedDataParallel``) the running statistics are those of the first
    process's batches.

    Args:
        model (BacktrackModel): the model to fit; the very object, not a copy.

    Keyword Args:
        reduction (str): ``"mean"`` over kept rows, ``"sum"``, or ``"none"``.
        mask_nonfinite (bool): leave out rows with NaN, infinite or huge entries (above 1e16 in
            float32, whose squares overflow) instead of refusing them.
        action_entropy_coeff (float): weight of the entropy of ``q(a|s')``, in nats, which is
            maximised beside the likelihood. Above 0 it keeps reverse actions open that the policy
            rarely takes; with a bounded continuous action it is estimated by one sample a row.
        bootstrap (bool): weigh rows anew by Poisson(1) at every call, for each member by itself
            (online bagging), so that the members of an ensemble differ by their data, too.
        generator (torch.Generator, optional): source of the bootstrap's weights and the entropy's
            samples, on the model's device, saved in the state dict; None seeds one from torch's
            own. Inside `torch.compile` torch's own numbers take its place.

    Returns:
        TensorDict: ``loss_backtrack``, and detached for the log ``backtrack_action_log_prob``,
        ``backtrack_delta_log_prob`` (``backtrack_stop_log_prob``, ``backtrack_action_entropy``),
        means over kept rows and members.

    Raises:
        KeyError: a key is missing; with a stop head also ``is_init``.
        ValueError: empty or non-finite data, wrong shapes, dtypes or devices, a displacement
            outside ``delta_support``; a bootstrap of one member, or an entropy to be maximised
            of actions that are uniform.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_recall import BacktrackLoss, BacktrackModel
        >>> loss = BacktrackLoss(BacktrackModel(3, 1, num_cells=(32, 32)))
        >>> data = TensorDict({"observation": torch.randn(5, 3), "action": torch.zeros(5, 1),
        ...                    "next": {"observation": torch.randn(5, 3)}}, [5])
        >>> loss(data)["loss_backtrack"].shape
        torch.Size([])
    """

    @dataclass
    class _AcceptedKeys(LossModule._AcceptedKeys):
        """Names of the entries; the model's own by default.

        Attributes:
            observation (NestedKey or list of NestedKey): the observations, without ``"next"``.
            action (NestedKey or list of NestedKey): the action, or its parts.
            is_init (NestedKey): mark of an episode's first step.
        """

        observation: NestedKey | list[NestedKey] = "observation"
        action: NestedKey | list[NestedKey] = "action"
        is_init: NestedKey = "is_init"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys  # pyright: ignore[reportIncompatibleMethodOverride]
    model: BacktrackModel
    reduction: Reduction
    # The model stays itself, so that its running statistics stay shared.
    functional = False  # pyright: ignore

    def __init__(
        self,
        model: BacktrackModel,
        *,
        reduction: Reduction = "mean",
        mask_nonfinite: bool = False,
        action_entropy_coeff: float = 0.0,
        bootstrap: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(model, BacktrackModel):
            raise TypeError(f"model must be a BacktrackModel, got {type(model).__name__}.")
        super().__init__()
        self.model = model
        self.reduction = check_reduction(reduction)
        self.mask_nonfinite: bool = check_flag("mask_nonfinite", mask_nonfinite)
        self.action_entropy_coeff: float = check_coefficient(
            "action_entropy_coeff", action_entropy_coeff, 0.0
        )
        if self.action_entropy_coeff and model.action.is_uniform:
            raise ValueError(
                f"action_entropy_coeff is {action_entropy_coeff}, expected 0: the model's reverse "
                "actions are uniform, so that their entropy is the greatest there is."
            )
        self.bootstrap: bool = check_flag("bootstrap", bootstrap)
        if self.bootstrap and model.num_members == 1:
            raise ValueError("bootstrap is for ensembles, but the model has one member.")
        # Whether the entropy has no closed form.
        self.samples: bool = bool(self.action_entropy_coeff and samples_entropy(model.action.head))
        if self.bootstrap or self.samples:
            self.random: RandomSource = RandomSource(generator)
        # ``set_keys(name=None)`` goes back to these.
        self.default_keys: Any = partial(
            self._AcceptedKeys,
            observation=model.observation_keys,
            action=model.action_key,
            is_init=model.is_init_key,
        )
        self._tensor_keys = self.default_keys()
        terms = ["action", "delta", *(["stop"] if model.has_stop else [])]
        self.out_keys: list[str] = [
            "loss_backtrack",
            *(f"backtrack_{term}_log_prob" for term in terms),
        ]
        if self.action_entropy_coeff:
            self.out_keys.append("backtrack_action_entropy")
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        """Follow ``set_keys``, which calls this."""
        keys = self._observation_keys
        expected = len(self.model.observation_keys)
        if len(keys) != expected:
            raise ValueError(f"observation must name {expected} keys, got {keys}.")
        following = [unravel_key(("next", key)) for key in keys]
        stop = [self.tensor_keys.is_init] if self.model.has_stop else []
        actions = as_keys(self.tensor_keys.action)
        if len(actions) != len(as_keys(self.model.action_key)):
            raise ValueError(f"action must stand for {self.model.action_key}, got {actions}.")
        self.in_keys: Any = [*keys, *actions, *following, *stop]

    @property
    def _observation_keys(self) -> list[NestedKey]:
        return as_keys(self.tensor_keys.observation)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of a batch of transitions of any batch shape.

        Args:
            tensordict (TensorDictBase): transitions ``[*B]`` with the model's ``in_keys``.

        Returns:
            TensorDict: the loss and its logs, as the class says.
        """
        keys, action_key = self._observation_keys, self.tensor_keys.action
        if tensordict.ndim == 0:
            tensordict = self._batched(tensordict)
        kept = kept_rows(self, tensordict)
        following = [unravel_key(("next", key)) for key in keys]
        state, action, next_state = self.model.read(
            blank_rows(tensordict, kept, self.model, [*keys, *following], action_key),
            observation_keys=keys,
            action_key=action_key,
            require_finite=False,
        )
        is_init = self._is_init(tensordict) if self.model.has_stop else None
        finite = rows_in_range(kept, state, action, next_state)
        if not self.mask_nonfinite:
            _refuse(
                kept & ~finite,
                f"NaN, infinite or huge entries in {self.in_keys}; mask them at "
                "('collector', 'mask') or pass mask_nonfinite=True.",
            )
        kept = kept & finite
        state, action, next_state = (fill_rows(x, kept) for x in (state, action, next_state))
        head: Any = self.model.delta_head
        if isinstance(head, SupportDelta):
            evenly = torch.zeros(*kept.shape, head.output_size, device=kept.device)
            log_prob = head.predecessor_log_prob(evenly, state, next_state)
            _refuse(
                kept & torch.isneginf(log_prob),
                "a displacement s_t - s_(t+1) that is not in the model's delta_support; add it "
                "there.",
            )
        if self.model.action.is_uniform:
            head = self.model.action.head
            evenly = torch.zeros(
                *kept.shape, head.output_size, dtype=self.model.dtype, device=kept.device
            )
            _refuse(
                kept & torch.isneginf(head.log_prob(evenly, action)),
                "an action outside the model's bounds, within which reverse actions are uniform; "
                "scale it.",
            )
        # Behind all refusals, which must leave the statistics as they were.
        if self.training:
            self.model.update_normalization(
                state.reshape(-1, state.shape[-1]),
                action.reshape(-1, *action.shape[kept.ndim :]),
                next_state.reshape(-1, next_state.shape[-1]),
                kept.reshape(-1),
            )
        members = members_of(self.model)
        losses, logged = [], []
        for member in members:
            loss, found = self._member_loss(member, state, action, next_state, is_init)
            losses.append(loss)
            logged.append(found)
        terms = {name: _average([found[name] for found in logged]) for name in logged[0]}
        out = {"loss_backtrack": reduce_kept(_average(losses), kept, self.reduction)}
        for name, term in terms.items():
            out[f"backtrack_{name}"] = reduce_kept(term.detach(), kept, "mean")
        return TensorDict(out)

    def _member_loss(
        self,
        member: BacktrackModel,
        state: Tensor,
        action: Tensor,
        next_state: Tensor,
        is_init: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one member's loss of each row, and what is logged of it."""
        parameters = member.action_parameters(next_state)
        terms = member.step_log_prob(state, action, next_state, action_parameters=parameters)
        loss = -torch.stack(list(terms.values())).sum(0)
        if is_init is not None:
            loss = loss - is_init * nn.functional.logsigmoid(member.stop_logit(state))
        logged = {f"{name}_log_prob": term for name, term in terms.items()}
        if self.action_entropy_coeff:
            noise = None
            if self.samples:
                shape = (*next_state.shape[:-1], member.action.head.size)
                options: Any = {"dtype": parameters.dtype, "device": parameters.device}
                source = self.random.on(parameters.device)
                if source is not None:  # given even as None, it stops compiled shapes that vary
                    options["generator"] = source
                noise = torch.randn(shape, **options)
            entropy = member.action.head.entropy(parameters, noise)  # pyright: ignore
            loss = loss - self.action_entropy_coeff * entropy
            logged["action_entropy"] = entropy
        if self.bootstrap:
            ones = torch.ones_like(loss)
            loss = loss * torch.poisson(ones, generator=self.random.on(ones.device))
        return loss, logged

    def _batched(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Give keyword tensors, which come without a batch size, that of their observation."""
        observation = tensordict.get(self._observation_keys[0], default=None)
        event = len(self.model.observation.shapes[0])
        if observation is None or observation.ndim <= event:
            return tensordict
        batch = observation.shape[: observation.ndim - event]
        try:
            return TensorDict(tensordict.select(*self.in_keys, strict=False).to_dict(), batch)
        except (RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{self.in_keys} must all begin with {self._observation_keys[0]!r}'s batch "
                f"{tuple(batch)}: {error}"
            ) from None

    def _is_init(self, tensordict: TensorDictBase) -> Tensor:
        key = self.tensor_keys.is_init
        is_init = tensordict.get(key, default=None)
        if is_init is None:
            raise KeyError(
                f"key {key!r}, which teaches the stop head, is missing from the data, which has "
                f"{sorted_keys(tensordict)}; add TorchRL's InitTracker to the environment."
            )
        return one_each(tensordict, is_init, repr(key)).bool()

    def reset_parameters_recursive(self) -> None:
        """Draw new parameters for the model; its running statistics stay."""
        self.model.reset_parameters_recursive()


def _average(values: list[Tensor]) -> Tensor:
    """Return the mean over members."""
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)


def _refuse(rows: Tensor, reason: str) -> None:
    """Refuse data that have such rows (not checked inside ``torch.compile``)."""
    if not torch.compiler.is_compiling() and (count := int(rows.sum())):
        raise ValueError(f"{count} of {rows.numel()} transitions have {reason}")
