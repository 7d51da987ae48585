"""The two losses: `BacktrackLoss` fits the model to what happened, `RecallTraceLoss` the policy to
the traces. Last stop of a batch; the terms add to those of any TorchRL loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torchrl.objectives.common import LossModule

from torchrl_recall.checks import check_finite
from torchrl_recall.model import BacktrackModel
from torchrl_recall.observation import sorted_keys

Reduction = Literal["mean", "sum", "none"]


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
    class _AcceptedKeys:
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
    model: BacktrackModel

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
        self.reduction = _check_reduction(reduction)
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
        self._in_keys: list[NestedKey] | None = None

    @property
    def functional(self) -> bool:
        """False: the model stays itself, so that its running statistics stay shared."""
        return False

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        pass

    def set_keys(self, **kwargs) -> None:
        """Set the names of entries; see ``_AcceptedKeys``."""
        super().set_keys(**kwargs)
        keys = self._observation_keys
        if len(keys) != len(self.model.observation_keys):
            raise ValueError(
                f"observation must name {len(self.model.observation_keys)} keys, got {keys}."
            )
        self._in_keys = None

    @property
    def _observation_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys.observation
        return list(keys) if isinstance(keys, list) else [keys]

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that the loss reads."""
        if self._in_keys is None:
            keys = self._observation_keys
            following = [unravel_key(("next", key)) for key in keys]
            self._in_keys = [*keys, self.tensor_keys.action, *following]
            if self.model.has_stop:
                self._in_keys.append(self.tensor_keys.is_init)
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of a batch of transitions of any batch shape."""
        state, action, next_state = self.model.read(
            tensordict,
            observation_keys=self._observation_keys,
            action_key=self.tensor_keys.action,
            require_finite=False,
        )
        is_init = self._is_init(tensordict) if self.model.has_stop else None
        kept = _kept(self, tensordict)
        state, action, next_state, kept = self._finite(state, action, next_state, kept)
        if self.training:
            self.model.update_normalization(
                state.reshape(-1, state.shape[-1]),
                action.reshape(-1, *action.shape[kept.ndim :]),
                next_state.reshape(-1, next_state.shape[-1]),
                kept.reshape(-1),
            )
        terms = self.model.step_log_prob(state, action, next_state)
        self._check_support(terms["delta"], kept)
        loss = -torch.stack(list(terms.values())).sum(0)
        if is_init is not None:
            first = torch.nn.functional.logsigmoid(self.model.stop_logit(state))
            loss = loss - torch.where(is_init, first, torch.zeros_like(first))
        out = {"loss_backtrack": _reduce_kept(loss, kept, self.reduction)}
        for name, term in terms.items():
            out[f"backtrack_{name}_log_prob"] = _reduce_kept(term.detach(), kept, "mean")
        return TensorDict(out)

    def _is_init(self, tensordict: TensorDictBase) -> Tensor:
        key = self.tensor_keys.is_init
        is_init = tensordict.get(key, default=None)
        if is_init is None:
            raise KeyError(
                f"key {key!r}, which teaches the stop head, is missing from the data, which has "
                f"{sorted_keys(tensordict)}; add TorchRL's InitTracker to the environment."
            )
        if is_init.numel() != tensordict.numel():
            raise ValueError(
                f"{key!r} has shape {tuple(is_init.shape)}, expected one mark for each of "
                f"{tuple(tensordict.shape)} rows."
            )
        return is_init.reshape(tensordict.shape).bool()

    def _finite(self, state: Tensor, action: Tensor, next_state: Tensor, kept: Tensor):
        """Refuse or leave out non-finite rows, and put zeros where rows do not count."""
        values = [state, action if action.ndim == state.ndim else action.unsqueeze(-1), next_state]
        finite = torch.stack([torch.isfinite(value).all(-1) for value in values]).all(0)
        if not self.mask_nonfinite and not torch.compiler.is_compiling():
            bad = int((kept & ~finite).sum())
            if bad:
                raise ValueError(
                    f"{bad} of {kept.numel()} transitions have NaN or infinite entries in "
                    f"{self.in_keys}, expected finite ones; mask them at ('collector', 'mask') or "
                    "pass mask_nonfinite=True."
                )
        kept = kept & finite
        state, next_state = (
            torch.where(kept.unsqueeze(-1), value, torch.zeros_like(value))
            for value in (state, next_state)
        )
        shape = kept.unsqueeze(-1) if action.ndim > kept.ndim else kept
        return state, torch.where(shape, action, torch.zeros_like(action)), next_state, kept

    def _check_support(self, delta_log_prob: Tensor, kept: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        outside = int((kept & torch.isneginf(delta_log_prob)).sum())
        if outside:
            raise ValueError(
                f"{outside} of {kept.numel()} transitions have a displacement s_t - s_(t+1) that "
                "is not in the model's delta_support; add it there."
            )


class RecallTraceLoss(LossModule):
    """Imitation of recall traces: ``-log π(a_t|s_t)`` over the kept steps of ``"trace"``.

    Add its term to those of any TorchRL loss of the same actor. No gradient flows through a trace.
    If nothing is kept, the loss is exactly zero.

    Args:
        actor (TensorDictModule): a stochastic policy with ``get_dist``.
        model (BacktrackModel, optional): also fit the model on the same batch's real transitions,
            the paper's plain form. Fitting it on all data with `BacktrackLoss` works better.

    Keyword Args:
        imitation_coeff (float): factor of ``loss_imitation``; set it at any time.
        backtrack_coeff (float): factor of ``loss_backtrack``; set it at any time.
        reduction (str): ``"mean"`` over kept steps, ``"sum"``, or ``"none"``.

    Returns:
        TensorDict: ``loss_imitation`` (and ``loss_backtrack`` with its logs), and detached for the
        log ``trace_kept``, the share of steps kept, and ``trace_log_prob``, their mean log π.

    Raises:
        KeyError: the trace, or a key in it, is missing.
        TypeError: the actor has no ``get_dist``.
        ValueError: non-finite kept steps or an empty trace.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import NormalParamExtractor, TensorDictModule
        >>> from torch import nn
        >>> from torchrl.modules import ProbabilisticActor, TanhNormal
        >>> from torchrl_recall import BacktrackModel, BacktrackTransform, RecallTraceLoss
        >>> net = nn.Sequential(nn.Linear(3, 2), NormalParamExtractor())
        >>> actor = ProbabilisticActor(
        ...     TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        ...     in_keys=["loc", "scale"], distribution_class=TanhNormal)
        >>> transform = BacktrackTransform(BacktrackModel(3, 1, num_cells=(32,)), num_steps=8)
        >>> data = transform(TensorDict({"next": {"observation": torch.randn(4, 3)}}, [4]))
        >>> RecallTraceLoss(actor)(data)["loss_imitation"].shape
        torch.Size([])
    """

    @dataclass
    class _AcceptedKeys:
        """Names of the entries.

        Attributes:
            trace (NestedKey): the traces, a nested TensorDict.
            action (NestedKey): the action, inside the trace.
        """

        trace: NestedKey = "trace"
        action: NestedKey = "action"

    default_keys = _AcceptedKeys
    _schedulable_buffers = frozenset({"imitation_coeff", "backtrack_coeff"})

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    imitation_coeff: Tensor
    backtrack_coeff: Tensor

    def __init__(
        self,
        actor: TensorDictModule,
        model: BacktrackModel | None = None,
        *,
        imitation_coeff: float = 1.0,
        backtrack_coeff: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        if not hasattr(actor, "get_dist"):
            raise TypeError(
                f"actor must be a stochastic policy with get_dist, got {type(actor).__name__}."
            )
        super().__init__()
        self.convert_to_functional(actor, "actor_network")
        self.reduction = _check_reduction(reduction)
        self.backtrack = None if model is None else BacktrackLoss(model, reduction=reduction)
        self.register_coeff_buffer("imitation_coeff", float(imitation_coeff))
        self.register_coeff_buffer("backtrack_coeff", float(backtrack_coeff))
        self.out_keys = ["loss_imitation", "trace_kept", "trace_log_prob"]
        if self.backtrack is not None:
            self.out_keys += self.backtrack.out_keys

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        pass

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that the loss reads."""
        trace = self.tensor_keys.trace
        names = [*self.actor_network.in_keys, self.tensor_keys.action]
        keys = [unravel_key((trace, name)) for name in dict.fromkeys(names)]
        return keys + (list(self.backtrack.in_keys) if self.backtrack is not None else [])

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        raise AttributeError("in_keys of RecallTraceLoss follow from the actor; use set_keys.")

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of a batch that carries traces."""
        trace = tensordict.get(self.tensor_keys.trace, default=None)
        if trace is None:
            raise KeyError(
                f"key {self.tensor_keys.trace!r} is missing from the data, which has "
                f"{sorted_keys(tensordict)}; append a BacktrackTransform to the replay buffer."
            )
        if trace.numel() == 0:
            raise ValueError(f"the trace is empty: batch size {tuple(trace.shape)}.")
        kept = _kept(self, trace)
        inputs, action = self._inputs(trace, kept)
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            log_prob = self.actor_network.get_dist(inputs).log_prob(action)
        if log_prob.shape != kept.shape:
            raise ValueError(
                f"the actor's log_prob has shape {tuple(log_prob.shape)}, expected "
                f"{tuple(kept.shape)}, one for each step; its distribution should reduce the action."
            )
        loss = _reduce_kept(-log_prob, kept, self.reduction)
        out = {
            "loss_imitation": self.imitation_coeff * loss,
            "trace_kept": kept.to(log_prob.dtype).mean(),
            "trace_log_prob": _reduce_kept(log_prob.detach(), kept, "mean"),
        }
        if self.backtrack is not None:
            fitted = self.backtrack(tensordict)
            fitted.set("loss_backtrack", self.backtrack_coeff * fitted.get("loss_backtrack"))
            out.update(fitted.items())
        td_out = TensorDict(out)
        self._clear_weakrefs(tensordict, td_out, "actor_network_params")
        return td_out

    def _inputs(self, trace: TensorDictBase, kept: Tensor) -> tuple[TensorDict, Tensor]:
        """Return the actor's inputs and the actions, harmless where they are masked."""
        action_key = unravel_key(self.tensor_keys.action)
        cleaned = {}
        # Masked entries get a kept step's: whatever the networks and distributions expect, it fits.
        index = kept.flatten().int().argmax()
        for key in dict.fromkeys([*self.actor_network.in_keys, action_key]):
            value = trace.get(key, default=None)
            if value is None:
                raise KeyError(
                    f"key {key!r} is missing from the trace, which has {sorted_keys(trace)}."
                )
            value = value.detach()
            event = value.shape[kept.ndim :]
            fill = value.reshape(-1, *event)[index]
            mask = kept.reshape(*kept.shape, *[1] * len(event))
            fill = torch.where(kept.any(), fill, torch.zeros_like(fill))
            value = torch.where(mask, value, fill)
            check_finite(f"trace {key!r} at kept steps", value)
            cleaned[key] = value
        action = cleaned[action_key]
        inputs = TensorDict({}, kept.shape, device=trace.device)
        for key in self.actor_network.in_keys:
            inputs.set(key, cleaned[key])
        return inputs, action


def _check_reduction(reduction: str) -> Reduction:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    return reduction


def _kept(loss: LossModule, data: TensorDictBase) -> Tensor:
    """Return which entries of ``data`` count: those that no mask TorchRL knows of leaves out."""
    kept = torch.ones(data.shape, dtype=torch.bool, device=data.device)
    for key in loss._loss_mask_keys():
        mask = data.get(key, default=None)
        if mask is not None:
            kept = kept.to(mask.device) & loss._expand_loss_mask(mask, kept)
    return kept


def _reduce_kept(value: Tensor, kept: Tensor, reduction: Reduction) -> Tensor:
    """Reduce over kept entries; nothing kept gives exactly zero."""
    value = torch.where(kept, value, torch.zeros_like(value))
    if reduction == "none":
        return value
    total = value.sum()
    return total / kept.sum().clamp_min(1) if reduction == "mean" else total
