"""`RecallTraceHook`: recall traces in a `torchrl.trainers.Trainer`.

It stands beside the trainer's own hooks: it fills the recall buffer, and adds the terms of
`RecallTraceLoss` and `BacktrackLoss` to those of the trainer's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase
from torch import nn
from torchrl.data import TensorDictReplayBuffer
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import TrainerHookBase

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.checks import check_flag
from torchrl_recall.loss import RecallTraceLoss
from torchrl_recall.masking import one_each

__all__ = ["RecallTraceHook"]


class RecallTraceHook(TrainerHookBase):
    """Adds recall traces to each step of a trainer.

    At each optimisation step the trainer's loss gets ``loss_imitation`` on a fresh sample of
    ``recall_buffer`` and, with ``model_loss``, ``loss_backtrack`` on the step's own batch; their
    logs are logged with the loss's. With an optimizer of the trainer's own, the model's parameters
    must be in it.

    - On-policy, ``recall_buffer`` has its own storage: ``extend=True`` adds each collected batch
      once, in the first epoch, after the hooks that were registered before (register
      ``ValueEstimatorHook`` first, so that ``"value_target"`` is there).
    - Off-policy, it is a second view on the trainer's replay buffer: ``extend=False``, and
      ``refresh`` brings the values up to date before each batch's optimisation.

    Args:
        recall_buffer (TensorDictReplayBuffer): samples batches with traces.
        recall_loss (RecallTraceLoss): the imitation.
        model_loss (BacktrackLoss, optional): fits the model.

    Keyword Args:
        extend (bool): whether collected batches go into ``recall_buffer``.
        refresh (callable, optional): called without arguments before the optimisation steps of a
            batch, a `ValueRefresh` for one. Numbers that it returns by name are logged.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: in training, if the trainer's optimisation never called its loss as a module,
            as steppers that call a loss's parts one by one do: nothing could be added.

    Examples:
        >>> from torchrl_recall import BacktrackModel, BacktrackTransform, BacktrackLoss
        >>> from torchrl_recall import RecallTraceLoss, ValuePrioritizedSampler
        >>> from torchrl_recall.trainer import RecallTraceHook
        >>> from tensordict.nn import ProbabilisticTensorDictModule as Distribution
        >>> from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
        >>> from torch import nn
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl.modules import OneHotCategorical
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(nn.Linear(3, 2), ["observation"], ["logits"]),
        ...     Distribution(["logits"], ["action"], distribution_class=OneHotCategorical))
        >>> model = BacktrackModel(3, 1, num_cells=(32,))
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(100), sampler=ValuePrioritizedSampler(100),
        ...     transform=BacktrackTransform(model, num_steps=4), batch_size=8)
        >>> hook = RecallTraceHook(buffer, RecallTraceLoss(actor), BacktrackLoss(model))
        >>> # hook.register(trainer)
    """

    def __init__(
        self,
        recall_buffer: TensorDictReplayBuffer,
        recall_loss: RecallTraceLoss,
        model_loss: BacktrackLoss | None = None,
        *,
        extend: bool = True,
        refresh: Callable[[], Any] | None = None,
    ) -> None:
        if not isinstance(recall_buffer, TensorDictReplayBuffer):
            raise TypeError(
                "recall_buffer must be a TensorDictReplayBuffer, got "
                f"{type(recall_buffer).__name__}."
            )
        if not isinstance(recall_loss, RecallTraceLoss):
            raise TypeError(
                f"recall_loss must be a RecallTraceLoss, got {type(recall_loss).__name__}."
            )
        if not (model_loss is None or isinstance(model_loss, BacktrackLoss)):
            raise TypeError(f"model_loss must be a BacktrackLoss, got {type(model_loss).__name__}.")
        if not (refresh is None or callable(refresh)):
            raise TypeError(f"refresh must be callable, got {type(refresh).__name__}.")
        self.recall_buffer = recall_buffer
        self.recall_loss = recall_loss
        self.model_loss = model_loss
        self.extend: bool = check_flag("extend", extend)
        self.refresh = refresh
        self._trainer: Trainer | None = None
        self._awaits_batch = False
        self._num_added = 0

    def register(self, trainer: Trainer, name: str = "recall_traces") -> None:
        """Register with a trainer, which then also saves what the hook holds.

        Args:
            trainer (Trainer): whose loss gets the terms.
            name (str): name of the hook in the trainer's checkpoints.

        Raises:
            TypeError: the trainer's loss is not a module.
            ValueError: the trainer's optimizer lacks parameters of the model.
        """
        for part in ("loss_module", "optimizer", "register_op", "register_module"):
            if not hasattr(trainer, part):
                raise TypeError(
                    f"trainer must be a torchrl Trainer, got {type(trainer).__name__} without "
                    f"{part}."
                )
        loss_module: Any = trainer.loss_module
        if not isinstance(loss_module, nn.Module):
            raise TypeError(
                f"trainer.loss_module must be a module, got {type(loss_module).__name__}."
            )
        self._check_optimizer(trainer)
        self._trainer = trainer
        loss_module.register_forward_hook(self._add_terms)
        trainer.register_op("pre_optim_steps", self._begin_batch)
        trainer.register_op("pre_epoch", self._extend)
        trainer.register_op("post_steps", self._end_batch)
        trainer.register_module(name, self)

    def _check_optimizer(self, trainer: Trainer) -> None:
        if self.model_loss is None or trainer.optimizer is None:
            return
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        missing = [n for n, p in self.model_loss.model.named_parameters() if id(p) not in held]
        if missing:
            raise ValueError(
                f"trainer.optimizer lacks {len(missing)} parameters of the backtracking model, "
                f"such as {missing[0]!r}; give it model.parameters() beside the loss's."
            )

    def _begin_batch(self) -> None:
        self._awaits_batch, self._num_added = self.extend, 0
        if self.refresh is not None:
            numbers = self.refresh()
            if isinstance(numbers, dict) and self._trainer is not None:
                self._trainer._log(**numbers)

    def _extend(self, batch: TensorDictBase | None) -> TensorDictBase | None:
        # Once for each collected batch, whatever the number of epochs.
        if self._awaits_batch and batch is not None:
            if not isinstance(batch, TensorDictBase):
                raise TypeError(f"batch must be a TensorDict, got {type(batch).__name__}.")
            kept = batch.get(("collector", "mask"), default=None)
            rows: Any = batch if batch.ndim == 1 else batch.reshape(-1)
            if kept is not None:
                rows = rows[one_each(batch, kept, "('collector', 'mask')").bool().reshape(-1)]
            self.recall_buffer.extend(rows)
        self._awaits_batch = False
        return batch

    def _add_terms(
        self, module: nn.Module, arguments: tuple[Any, ...], losses: TensorDictBase
    ) -> TensorDictBase:
        if not module.training or len(self.recall_buffer) == 0:
            return losses
        self._num_added += 1
        sample: Any = self.recall_buffer.sample()
        added = self.recall_loss(sample)
        if self.model_loss is not None:
            added.update(self.model_loss(arguments[0]))
        return losses.update(added)

    def _end_batch(self) -> None:
        trainer = self._trainer
        if trainer is None or self._num_added or len(self.recall_buffer) == 0:
            return
        if trainer.collected_frames >= getattr(trainer.collector, "init_random_frames", 0):
            raise RuntimeError(
                "the trainer optimised without calling its loss module, so recall traces were "
                "not imitated; its optimization stepper calls the loss's parts one by one."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the model, the losses and the recall buffer's own parts."""
        buffer: dict[str, Any]
        if self.extend:
            buffer = self.recall_buffer.state_dict()
        else:
            buffer = {"_sampler": self.recall_buffer.sampler.state_dict()}
            buffer["_transforms"] = self.recall_buffer.transform.state_dict()
        state = {"recall_loss": self.recall_loss.state_dict(), "recall_buffer": buffer}
        if self.model_loss is not None:
            state["model_loss"] = self.model_loss.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state_dict (dict): the state.
        """
        self.recall_loss.load_state_dict(state_dict["recall_loss"])
        if self.model_loss is not None:
            self.model_loss.load_state_dict(state_dict["model_loss"])
        buffer = state_dict["recall_buffer"]
        if self.extend:
            self.recall_buffer.load_state_dict(buffer)
        else:
            self.recall_buffer.sampler.load_state_dict(buffer["_sampler"])
            self.recall_buffer.transform.load_state_dict(buffer["_transforms"])
