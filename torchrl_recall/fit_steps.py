"""The steps of `fit`: statistics, gradients, evaluations, and the best parameters kept.

Behind its door: what comes here has been checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.transitions import ROWS_AT_ONCE, backward_log_prob

Schedule = Literal["constant", "cosine"]


class FitHistory(NamedTuple):
    """How a fit went, in nats a transition, by evaluation; the first is before any step."""

    step: Tensor
    """Gradient steps done, int64 ``[E]``."""
    training: Tensor
    """Mean training loss since the evaluation before, float64 ``[E]``; the first is NaN."""
    held_out: Tensor
    """Held-out negative log-likelihood, float64 ``[E]``; NaN without held-out rows."""
    best_step: int
    """Steps after which the parameters were kept: the best held-out ones, else the last."""
    num_training: int
    """Rows that were fitted."""
    num_held_out: int
    """Rows that were not."""

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger."""
        at_best = int((self.step == self.best_step).nonzero()[0])
        return {
            "training": float(self.training[-1]),
            "held_out": float(self.held_out[at_best]),
            "best_step": float(self.best_step),
            "num_training": float(self.num_training),
            "num_held_out": float(self.num_held_out),
        }


class FitRun:
    """One fit: rows, loss and the best parameters so far.

    Args:
        loss (BacktrackLoss): of the model.
        data (TensorDictBase): transitions ``[N]``, where they are stored.
        training (Tensor): int64, rows to fit.
        kept_out (Tensor): int64, rows to evaluate on; may be empty.
        batch_size (int): rows of a step.
    """

    def __init__(
        self,
        loss: BacktrackLoss,
        data: TensorDictBase,
        training: Tensor,
        kept_out: Tensor,
        batch_size: int,
    ) -> None:
        self.loss, self.model, self.data = loss, loss.model, data
        self.training, self.kept_out, self.batch_size = training, kept_out, batch_size
        self.device = self.model.device

    def batch(self, rows: Tensor) -> TensorDictBase:
        """Copy rows to the model's device."""
        # Where the storage is on a GPU, so must be the index.
        batch: Any = self.data[rows.to(self.data.device or rows.device)]
        return batch.to(self.device)

    @torch.no_grad()
    def update_statistics(self) -> None:
        """Merge the training rows into the running statistics, once."""
        keys, action_key = self.loss._observation_keys, self.loss.tensor_keys.action
        for rows in self.training.split(ROWS_AT_ONCE):
            read = self.model.read(self.batch(rows), observation_keys=keys, action_key=action_key)
            self.model.update_normalization(*read)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean negative log-likelihood of the held-out rows, as they are walked."""
        self.loss.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if len(self.kept_out):
            for rows in self.kept_out.split(max(self.batch_size, 4096)):
                for term in backward_log_prob(self.loss, self.batch(rows)).values():
                    total -= term.double().sum()
        # For the steps that follow. Not the loss: it would merge batches into the statistics,
        # which are complete.
        self.model.train()
        return float(total) / len(self.kept_out) if len(self.kept_out) else math.nan

    def fit(
        self,
        num_steps: int,
        evaluate_every: int,
        patience: int | None,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        max_grad_norm: float | None,
        generator: torch.Generator | None,
        report: Callable[[int, float, float], None] | None,
    ) -> FitHistory:
        """Take the steps, and leave the best parameters in the model."""
        rate = optimizer.param_groups[0]["lr"]
        first = self.evaluate()
        steps, losses, scores = [0], [math.nan], [first]
        best, kept, best_step, waited = first, self.parameters(), 0, 0
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        order, at = self.training[:0], 0
        for step in range(1, num_steps + 1):
            if at >= len(order):
                shuffled = torch.randperm(len(self.training), generator=generator)
                order, at = self.training[shuffled], 0
            rows = order[at : at + self.batch_size]
            at += self.batch_size
            if schedule == "cosine":
                cosine = math.cos(math.pi * (step - 1) / num_steps)
                optimizer.param_groups[0]["lr"] = rate * (1 + cosine) / 2
            total += self.step(rows, optimizer, max_grad_norm)
            if step % evaluate_every and step != num_steps:
                continue
            losses.append(float(total) / (step - steps[-1]))
            steps.append(step)
            total.zero_()
            if not math.isfinite(losses[-1]):
                self.model.load_state_dict(kept)
                raise RuntimeError(
                    f"the loss is {losses[-1]} after {step} steps; lower learning_rate or set "
                    "max_grad_norm. The model holds the last good parameters."
                )
            scores.append(self.evaluate())
            if report is not None:
                report(step, losses[-1], scores[-1])
            waited += 1
            if scores[-1] < best or not len(self.kept_out):
                best, kept, best_step, waited = scores[-1], self.parameters(), step, 0
            if patience is not None and waited >= patience:
                break
        self.model.load_state_dict(kept)
        return FitHistory(
            torch.tensor(steps),
            torch.tensor(losses, dtype=torch.float64),
            torch.tensor(scores, dtype=torch.float64),
            best_step,
            len(self.training),
            len(self.kept_out),
        )

    def step(
        self, rows: Tensor, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> Tensor:
        """Take a gradient step on rows, and return their loss."""
        with torch.enable_grad():
            value = self.loss(self.batch(rows))["loss_backtrack"]
            optimizer.zero_grad()
            value.backward()
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
            optimizer.step()
        return value.detach().double()

    def parameters(self) -> dict[str, Tensor]:
        """Copy the state of the model."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def reporter(num_steps: int) -> Callable[[int, float, float], None]:
    """Return what shows progress: a bar, or lines without tqdm."""
    try:
        from tqdm.auto import tqdm
    except ImportError:

        def line(step: int, training: float, score: float) -> None:
            print(f"{step} of {num_steps} steps, training {training:.4f}, held out {score:.4f}")

        return line
    bar: Any = tqdm(total=num_steps, desc="fit", unit="step")

    def move(step: int, training: float, score: float) -> None:
        bar.set_postfix(training=f"{training:.4f}", held_out=f"{score:.4f}")
        bar.update(step - bar.n)
        if step == num_steps:
            bar.close()

    return move
