"""Last stop of a batch: `RecallTraceLoss` fits the policy to recall traces.

Its term adds to those of any TorchRL loss.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torchrl.data.tensor_specs import TensorSpec
from torchrl.objectives.common import LossModule

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.checks import as_keys, check_coefficient, check_finite, check_flag, check_real
from torchrl_recall.imitation.distance import (
    OF_VALUES,
    Distance,
    action_distance,
    check_distance,
    chosen_action,
    half_range,
    value_distance,
)
from torchrl_recall.imitation.policy_log_prob import action_leaves, policy_in_keys, policy_log_prob
from torchrl_recall.imitation.recurrent import kept_first, memory_keys
from torchrl_recall.imitation.weights import ImitationKeys, ImitationWeight
from torchrl_recall.masking import (
    Reduction,
    check_reduction,
    filled_entries,
    kept_rows,
    reduce_kept,
)
from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.observation import sorted_keys


class RecallTraceLoss(LossModule):
    """Imitation of recall traces: ``-log π(a_t|s_t)`` over the kept steps of ``"trace"``.

    Add its term to those of any TorchRL loss of the same actor. No gradient flows through a trace.
    If nothing is kept, the loss is exactly zero. With weights ``w_t`` it is the mean (or sum) over
    kept steps of ``-w_t log π(a_t|s_t)``; a step of weight zero is still a kept one.

    *Recurrent policies* of TorchRL's ``LSTMModule`` and ``GRUModule`` imitate a trace from an empty
    memory: what is imagined has no hidden state of a collector's. The memory is reset at a trace's
    first kept step and sees the kept steps only, in their order; detours before a last visit, which
    the mask leaves out, are no part of the way. This is exact where a trace begins with an episode,
    as with a stop head; elsewhere it is what TorchRL's losses do with slices of episodes whose
    hidden states are not stored. ``is_init`` and hidden states are not read of the trace. A policy
    with a memory of another kind is refused, for want of its hidden state. In one graph of
    ``torch.compile``: an LSTM with ``python_based=True`` and ``recurrent_backend="scan"``.

    Args:
        actor (TensorDictModule): a stochastic policy with ``get_dist``; with ``loss_function`` also
            a deterministic one.
        model (BacktrackModel, optional): also fit the model on the same batch's real transitions,
            the paper's plain form. Fitting it on all data with `BacktrackLoss` works better.

    Keyword Args:
        imitation_coeff (float): factor of ``loss_imitation``. Set it at any time, as TorchRL's
            coefficients: ``loss.imitation_coeff = 0.1`` in a loop or a trainer's hook.
        backtrack_coeff (float): factor of ``loss_backtrack``; set it at any time.
        reduction (str): ``"mean"`` over kept steps, ``"sum"``, or ``"none"``.
        weight (ImitationWeight, optional): what each step counts, such as `AdvantageWeight` or
            `QValueWeight`. None: all the same.
        discount (float): factor ``discount^(T - 1 - t)`` of a step's weight, in [0, 1]: below 1
            what is nearer to the trace's end counts more.
        normalize_weights (bool): divide the weights by their mean over the kept steps.
        loss_function (str, optional): what to take instead of ``-log π``. ``"mse"``, ``"l1"`` or
            ``"smooth_l1"``: the distance of the actor's deterministic action from the trace's, mean
            over its entries. ``"margin"`` or ``"cross_entropy"``, for an actor that writes the
            values of all actions (DQN): see `imitation.distance.value_distance`.
        margin (float): by which the trace's action is to lead for ``"margin"``, at least 0, in the
            unit of values.
        action_spec (TensorSpec, optional): with ``loss_function``: if bounded, distances are in
            units of half the action's range.

    Returns:
        TensorDict: ``loss_imitation`` (and ``loss_backtrack`` with its logs), and detached for the
        log ``trace_kept``, the share of steps kept, and ``trace_log_prob``, their mean log π (with
        ``loss_function`` ``trace_distance``, their mean distance). With weights or a discount also
        ``trace_weight``, their mean over kept steps, not normalised, and ``trace_open``, the share
        of kept steps whose weight is above zero.

    Raises:
        KeyError: the trace, or a key in it, is missing.
        TypeError: the actor has no ``get_dist``, and there is no ``loss_function``.
        ValueError: non-finite kept steps or weights, an empty trace, a ``discount`` out of range, a
            bidirectional policy, a recurrent one and a trace without time.

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
    class _AcceptedKeys(ImitationKeys, LossModule._AcceptedKeys):
        """Names of the entries."""

    default_keys = _AcceptedKeys
    _schedulable_buffers = frozenset({"imitation_coeff", "backtrack_coeff"})

    tensor_keys: _AcceptedKeys  # pyright: ignore[reportIncompatibleMethodOverride]
    reduction: Reduction
    weight: ImitationWeight | None
    half_range: Tensor | None
    loss_function: Distance | None
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
        weight: ImitationWeight | None = None,
        discount: float = 1.0,
        normalize_weights: bool = False,
        loss_function: Distance | None = None,
        margin: float = 0.8,
        action_spec: TensorSpec | None = None,
    ) -> None:
        loss_function = check_distance(loss_function)
        if loss_function is None and not hasattr(actor, "get_dist"):
            raise TypeError(
                f"actor must be a stochastic policy with get_dist, got {type(actor).__name__}; "
                "imitate with a deterministic one by loss_function='mse', with one of values (DQN) "
                "by 'margin'."
            )
        if loss_function is None and action_spec is not None:
            raise ValueError("action_spec is the unit of a loss_function, but there is none.")
        if weight is not None and not callable(weight):
            raise TypeError(f"weight must be an ImitationWeight, got {type(weight).__name__}.")
        memory = memory_keys(actor)
        super().__init__()
        self._memory = memory  # what a recurrent policy reads of its past
        self.convert_to_functional(actor, "actor_network")
        self.reduction = check_reduction(reduction)
        self.backtrack: BacktrackLoss | None = (
            None if model is None else BacktrackLoss(model, reduction=reduction)
        )
        self.register_coeff_buffer(
            "imitation_coeff", check_coefficient("imitation_coeff", imitation_coeff)
        )
        self.register_coeff_buffer(
            "backtrack_coeff", check_coefficient("backtrack_coeff", backtrack_coeff)
        )
        self.loss_function = loss_function
        self.margin: float = check_real("margin", margin, 0.0)
        self.register_buffer("half_range", half_range(action_spec), persistent=False)
        # In __dict__: the weight's networks are not this loss's, even if it is a module.
        object.__setattr__(self, "weight", weight)
        self.discount: float = check_real("discount", discount, 0.0, 1.0)
        self.normalize_weights: bool = check_flag("normalize_weights", normalize_weights)
        fitted = [] if self.backtrack is None else self.backtrack.out_keys
        self.out_keys: list[NestedKey] = [
            "loss_imitation",
            "trace_kept",
            "trace_log_prob" if loss_function is None else "trace_distance",
            *(["trace_weight", "trace_open"] if self._is_weighted else []),
            *fitted,
        ]
        self._set_in_keys()

    @property
    def _is_weighted(self) -> bool:
        return self.weight is not None or self.discount != 1

    def _set_in_keys(self) -> None:
        """Follow ``set_keys``, which calls this."""
        keys = self.tensor_keys
        names = [*self._policy_in_keys(), *as_keys(keys.action)]
        weighing = getattr(self.weight, "in_keys", None)
        fitted = [] if self.backtrack is None else self.backtrack.in_keys
        self.in_keys: Any = list(
            dict.fromkeys(
                [
                    *(unravel_key((keys.trace, name)) for name in names),
                    *([] if weighing is None else weighing(keys)),
                    *fitted,
                ]
            )
        )

    def _policy_in_keys(self) -> list[NestedKey]:
        """List what the policy reads of a trace; its memory it makes itself."""
        return [key for key in policy_in_keys(self.actor_network) if key not in self._memory]

    def reset_parameters_recursive(self) -> None:
        """Draw new parameters for the actor, and for the model if there is one."""
        super().reset_parameters_recursive()
        if self.backtrack is not None:
            self.backtrack.reset_parameters_recursive()

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of a batch that carries traces.

        Args:
            tensordict (TensorDictBase): ``[*B]``, with the traces, ``[*B, T]`` or ``[*B, N, T]``.

        Returns:
            TensorDict: the loss and its logs, as the class says.
        """
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
        loss = self._step_loss(trace, kept)
        if loss.numel() == 0:
            raise ValueError("the trace is empty: its entries have no steps.")
        if trace.ndim == 0:
            # Keyword tensors come without a batch size.
            kept = kept.expand_as(loss)
        average = reduce_kept(loss.detach(), kept, "mean")
        out = {"trace_kept": kept.to(loss.dtype).mean()}
        if self.loss_function is None:
            out["trace_log_prob"] = -average
        else:
            out["trace_distance"] = average
        if self._is_weighted:
            weight = self._step_weight(trace, tensordict, kept, loss.dtype)
            out["trace_weight"] = reduce_kept(weight, kept, "mean")
            out["trace_open"] = reduce_kept((weight > 0).to(weight.dtype), kept, "mean")
            if self.normalize_weights:
                mean = out["trace_weight"]
                weight = torch.where(mean > 0, weight / mean, weight)
            loss = weight * loss
        loss = reduce_kept(loss, kept, self.reduction)
        out = {"loss_imitation": self.imitation_coeff * loss, **out}
        if self.backtrack is not None:
            fitted = self.backtrack(tensordict)
            fitted.set("loss_backtrack", self.backtrack_coeff * fitted.get("loss_backtrack"))
            out.update(fitted.items())
        td_out = TensorDict(out)
        self._clear_weakrefs(tensordict, td_out, "actor_network_params")
        return td_out

    def _step_loss(self, trace: TensorDictBase, kept: Tensor) -> Tensor:
        """Return each step's ``-log π(a_t|s_t)`` or distance, any finite value where masked."""
        if self._nothing_kept(kept):
            # There is no step whose entries are known to suit the actor.
            zeros = [0 * parameter.sum() for parameter in self.actor_network_params.parameters()]
            return sum(zeros, kept.new_zeros((), dtype=torch.get_default_dtype())).expand(
                kept.shape
            )
        action_keys = action_leaves(trace, self.tensor_keys.action)
        cleaned = filled_entries(trace, [*self._policy_in_keys(), *action_keys], kept)
        batch = kept.shape if trace.ndim else None
        if not self._memory:
            return self._loss_of(cleaned, action_keys, kept, batch)
        if kept.ndim == 0:
            raise ValueError("the trace has no time dimension, along which a recurrent actor runs.")
        moved, place = kept_first(cleaned, kept)
        kept = kept.sum(-1, keepdim=True) > torch.arange(kept.shape[-1], device=kept.device)
        return self._loss_of(moved, action_keys, kept, batch).gather(-1, place)

    def _loss_of(
        self,
        cleaned: TensorDictBase,
        action_keys: list[NestedKey],
        kept: Tensor,
        batch: torch.Size | None,
    ) -> Tensor:
        """Ask the policy about steps without gaps."""
        inputs = cleaned.select(*self._policy_in_keys(), *self._memory, strict=False)
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            if self.loss_function is not None:
                if len(action_keys) > 1:
                    raise ValueError(f"loss_function is of one action, got {action_keys}.")
                (action_key,), actor = action_keys, self.actor_network
                action = cleaned.get(action_key)
                if self.loss_function in OF_VALUES:
                    value_key = self.tensor_keys.action_value
                    values = chosen_action(actor(inputs), value_key, actor.out_keys)
                    return value_distance(self.loss_function, values, action, self.margin)
                chosen = chosen_action(actor(inputs), action_key, actor.out_keys)
                return action_distance(self.loss_function, chosen, action, self.half_range, batch)
            distribution = self.actor_network.get_dist(inputs)
            log_prob = policy_log_prob(distribution, cleaned, action_keys, batch)
        check_finite("the actor's log_prob at kept steps", log_prob.masked_fill(~kept, 0.0))
        return -log_prob

    def _step_weight(
        self,
        trace: TensorDictBase,
        tensordict: TensorDictBase,
        kept: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the weight of each step, zero where masked."""
        if kept.ndim == 0:
            raise ValueError("the trace has no time dimension, so its steps cannot be weighed.")
        weight = torch.ones_like(kept, dtype=dtype)
        if self.weight is not None and not self._nothing_kept(kept):
            if trace.ndim == 0:
                trace = TensorDict(trace.to_dict(), kept.shape)
            with torch.no_grad():
                weight = self.weight(trace, tensordict, kept, self.tensor_keys)
            if weight.shape != kept.shape:
                raise ValueError(
                    f"{type(self.weight).__name__} gave weights of shape {tuple(weight.shape)}, "
                    f"expected one for each step, {tuple(kept.shape)}."
                )
            weight = weight.detach().to(dtype)
        if self.discount != 1:
            length = kept.shape[-1]
            to_end = torch.arange(length - 1, -1, -1, device=kept.device, dtype=dtype)
            weight = weight * self.discount**to_end
        weight = weight.masked_fill(~kept, 0.0)
        check_finite("weight at kept steps", weight)
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> RecallTraceLoss:
        # A TensorDict copies its parameters anew, and the weight's actor would be another one.
        parameters = self.actor_network_params
        copied = memo[id(parameters)] = copy.deepcopy(parameters)
        pairs = zip(parameters.parameters(), copied.parameters(), strict=True)
        memo.update({id(old): new for old, new in pairs})
        other = memo[id(self)] = self.__class__.__new__(self.__class__)
        other.__setstate__(copy.deepcopy(self.__dict__, memo))
        return other

    @staticmethod
    def _nothing_kept(kept: Tensor) -> bool:
        return not torch.compiler.is_compiling() and not bool(kept.any())
