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

from torchrl_recall.masking import (
    Reduction,
    blank_rows,
    check_reduction,
    fill_rows,
    finite_rows,
    kept_rows,
    one_each,
    reduce_kept,
)
from torchrl_recall.model import BacktrackModel
from torchrl_recall.observation import sorted_keys


class BacktrackLoss(LossModule):
    """Negative log-likelihood of real transitions, read backwards, under the backtracking model.

    Use it on any batch of transitions; fitting the model on *all* data works best. In training mode
    a call also merges the batch into the model's running statistics.

    With a stop head every row is a non-stop example at its next state, and every row marked
    ``is_init`` also a stop example at its observation. Rows masked at ``("collector", "mask")``
    count for nothing.

    Args:
        model (BacktrackModel): the model to fit; the very object, not a copy.

    Keyword Args:
        reduction (str): ``"mean"`` over kept rows, ``"sum"``, or ``"none"``.
        mask_nonfinite (bool): leave out rows with NaN or infinite entries instead of refusing them.

    Returns:
        TensorDict: ``loss_backtrack``, and detached for the log ``backtrack_action_log_prob``,
        ``backtrack_delta_log_prob`` (and ``backtrack_stop_log_prob``), means over kept rows.

    Raises:
        KeyError: a key is missing; with a stop head also ``is_init``.
        ValueError: empty or non-finite data, wrong shapes, dtypes or devices, a displacement
            outside ``delta_support``.

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
            action (NestedKey): the action.
            is_init (NestedKey): mark of an episode's first step.
        """

        observation: NestedKey | list[NestedKey] = "observation"
        action: NestedKey = "action"
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
    ) -> None:
        if not isinstance(model, BacktrackModel):
            raise TypeError(f"model must be a BacktrackModel, got {type(model).__name__}.")
        super().__init__()
        self.model = model
        self.reduction = check_reduction(reduction)
        self.mask_nonfinite = bool(mask_nonfinite)
        # ``set_keys(name=None)`` goes back to these.
        self.default_keys = partial(
            self._AcceptedKeys,
            observation=model.observation_keys,
            action=model.action_key,
            is_init=model.is_init_key,
        )
        self._tensor_keys = self.default_keys()
        terms = ["action", "delta", *(["stop"] if model.has_stop else [])]
        self.out_keys = ["loss_backtrack", *(f"backtrack_{term}_log_prob" for term in terms)]
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        """Follow ``set_keys``, which calls this."""
        keys = self._observation_keys
        expected = len(self.model.observation_keys)
        if len(keys) != expected:
            raise ValueError(f"observation must name {expected} keys, got {keys}.")
        following = [unravel_key(("next", key)) for key in keys]
        stop = [self.tensor_keys.is_init] if self.model.has_stop else []
        self.in_keys: Any = [*keys, self.tensor_keys.action, *following, *stop]

    @property
    def _observation_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys.observation
        return list(keys) if isinstance(keys, list) else [keys]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of a batch of transitions of any batch shape."""
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
        finite = finite_rows(kept, state, action, next_state)
        if not self.mask_nonfinite:
            _refuse(
                kept & ~finite,
                f"NaN or infinite entries in {self.in_keys}, expected finite ones; mask them at "
                "('collector', 'mask') or pass mask_nonfinite=True.",
            )
        kept = kept & finite
        state, action, next_state = (fill_rows(x, kept) for x in (state, action, next_state))
        if self.training:
            self.model.update_normalization(
                state.reshape(-1, state.shape[-1]),
                action.reshape(-1, *action.shape[kept.ndim :]),
                next_state.reshape(-1, next_state.shape[-1]),
                kept.reshape(-1),
            )
        terms = self.model.step_log_prob(state, action, next_state)
        _refuse(
            kept & torch.isneginf(terms["delta"]),
            "a displacement s_t - s_(t+1) that is not in the model's delta_support; add it there.",
        )
        loss = -torch.stack(list(terms.values())).sum(0)
        if is_init is not None:
            loss = loss - is_init * nn.functional.logsigmoid(self.model.stop_logit(state))
        out = {"loss_backtrack": reduce_kept(loss, kept, self.reduction)}
        for name, term in terms.items():
            out[f"backtrack_{name}_log_prob"] = reduce_kept(term.detach(), kept, "mean")
        return TensorDict(out)

    def _batched(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Give keyword tensors, which come without a batch size, that of their observation."""
        observation = tensordict.get(self._observation_keys[0], default=None)
        event = len(self.model.observation.shapes[0])
        if observation is None or observation.ndim <= event:
            return tensordict
        batch = observation.shape[: observation.ndim - event]
        return TensorDict(tensordict.select(*self.in_keys, strict=False).to_dict(), batch)

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


def _refuse(rows: Tensor, reason: str) -> None:
    """Refuse data that have such rows (not checked inside ``torch.compile``)."""
    if not torch.compiler.is_compiling() and (count := int(rows.sum())):
        raise ValueError(f"{count} of {rows.numel()} transitions have {reason}")
