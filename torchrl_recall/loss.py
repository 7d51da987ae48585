"""Last stop of a batch: `RecallTraceLoss` fits the policy to recall traces.

Its term adds to those of any TorchRL loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torchrl.objectives.common import LossModule

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.checks import check_finite, check_real
from torchrl_recall.masking import (
    Reduction,
    check_reduction,
    fill_rows,
    kept_rows,
    reduce_kept,
)
from torchrl_recall.model import BacktrackModel
from torchrl_recall.observation import sorted_keys


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
    class _AcceptedKeys(LossModule._AcceptedKeys):
        """Names of the entries.

        Attributes:
            trace (NestedKey): the traces, a nested TensorDict.
            action (NestedKey): the action, inside the trace.
        """

        trace: NestedKey = "trace"
        action: NestedKey = "action"

    default_keys = _AcceptedKeys
    _schedulable_buffers = frozenset({"imitation_coeff", "backtrack_coeff"})

    tensor_keys: _AcceptedKeys  # pyright: ignore[reportIncompatibleMethodOverride]
    reduction: Reduction
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
        self.reduction = check_reduction(reduction)
        self.backtrack = None if model is None else BacktrackLoss(model, reduction=reduction)
        self.register_coeff_buffer(
            "imitation_coeff", check_real("imitation_coeff", imitation_coeff)
        )
        self.register_coeff_buffer(
            "backtrack_coeff", check_real("backtrack_coeff", backtrack_coeff)
        )
        fitted = [] if self.backtrack is None else self.backtrack.out_keys
        self.out_keys: list[NestedKey] = ["loss_imitation", "trace_kept", "trace_log_prob", *fitted]
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        """Follow ``set_keys``, which calls this."""
        names = dict.fromkeys([*self.actor_network.in_keys, self.tensor_keys.action])
        fitted = [] if self.backtrack is None else self.backtrack.in_keys
        self.in_keys: Any = [
            *(unravel_key((self.tensor_keys.trace, name)) for name in names),
            *fitted,
        ]

    def reset_parameters_recursive(self) -> None:
        """Draw new parameters for the actor, and for the model if there is one."""
        super().reset_parameters_recursive()
        if self.backtrack is not None:
            self.backtrack.reset_parameters_recursive()

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of a batch that carries traces."""
        trace = tensordict.get(self.tensor_keys.trace, default=None)
        if trace is None:
            raise KeyError(
                f"key {self.tensor_keys.trace!r} is missing from the data, which has "
                f"{sorted_keys(tensordict)}; append a BacktrackTransform to the replay buffer."
            )
        if not isinstance(trace, TensorDictBase):
            raise TypeError(
                f"{self.tensor_keys.trace!r} must be a TensorDict, got {type(trace).__name__}."
            )
        if trace.shape.numel() == 0:
            raise ValueError(f"the trace is empty: batch size {tuple(trace.shape)}.")
        kept = kept_rows(self, trace)
        log_prob = self._log_prob(trace, kept)
        if trace.ndim == 0:
            # Keyword tensors come without a batch size.
            kept = kept.expand_as(log_prob)
        loss = reduce_kept(-log_prob, kept, self.reduction)
        out = {
            "loss_imitation": self.imitation_coeff * loss,
            "trace_kept": kept.to(log_prob.dtype).mean(),
            "trace_log_prob": reduce_kept(log_prob.detach(), kept, "mean"),
        }
        if self.backtrack is not None:
            fitted = self.backtrack(tensordict)
            fitted.set("loss_backtrack", self.backtrack_coeff * fitted.get("loss_backtrack"))
            out.update(fitted.items())
        td_out = TensorDict(out)
        self._clear_weakrefs(tensordict, td_out, "actor_network_params")
        return td_out

    def _log_prob(self, trace: TensorDictBase, kept: Tensor) -> Tensor:
        """Return ``log π(a_t|s_t)``, of any finite value where steps are masked."""
        if not torch.compiler.is_compiling() and not bool(kept.any()):
            # There is no step whose entries are known to suit the actor.
            zeros = [0 * parameter.sum() for parameter in self.actor_network_params.parameters()]
            return sum(zeros, kept.new_zeros((), dtype=torch.get_default_dtype())).expand(
                kept.shape
            )
        cleaned = TensorDict({}, kept.shape, device=trace.device)
        for key in dict.fromkeys([*self.actor_network.in_keys, self.tensor_keys.action]):
            value = trace.get(key, default=None)
            if value is None:
                raise KeyError(
                    f"key {key!r} is missing from the trace, which has {sorted_keys(trace)}."
                )
            value = fill_rows(value.detach(), kept)
            check_finite(f"trace {key!r} at kept steps", value)
            cleaned.set(key, value)
        action = cleaned.get(self.tensor_keys.action)
        inputs = cleaned.select(*self.actor_network.in_keys)
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            distribution = self.actor_network.get_dist(inputs)
            # A narrower action would broadcast. (TorchRL's one-hot distributions state no event.)
            event = getattr(distribution, "event_shape", torch.Size())
            if event and action.shape[-len(event) :] != event:
                raise ValueError(
                    f"trace {self.tensor_keys.action!r} has shape {tuple(action.shape)}, but the "
                    f"actor's distribution is over actions of shape {tuple(event)}."
                )
            log_prob = distribution.log_prob(action)
        if log_prob.shape != kept.shape and trace.ndim > 0:
            raise ValueError(
                f"the actor's log_prob has shape {tuple(log_prob.shape)}, expected one for each "
                f"step, {tuple(kept.shape)}; its distribution should reduce the action."
            )
        return log_prob
