"""`fit`: a backtracking model from a filled buffer, in one call.

The offline way in: where a learner runs, `BacktrackLoss` on its batches does the same step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer, Storage

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.checks import check_at_least_one, check_choice, check_real
from torchrl_recall.model import BacktrackModel
from torchrl_recall.support.state_reading import stored_data
from torchrl_recall.transitions import (
    ROWS_AT_ONCE,
    backward_log_prob,
    select_rows,
    usable_rows,
)

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


def fit(
    model: BacktrackModel,
    buffer: ReplayBuffer | Storage | TensorDictBase,
    *,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    schedule: Schedule = "constant",
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    held_out: float = 0.1,
    evaluate_every: int | None = None,
    patience: int | None = None,
    trajectory_key: NestedKey | None = ("collector", "traj_ids"),
    mask_nonfinite: bool = False,
    loss: BacktrackLoss | None = None,
    update_statistics: bool = True,
    progress: bool = True,
    generator: torch.Generator | None = None,
) -> FitHistory:
    """Fit a backtracking model to the transitions that a buffer holds.

    Maximum likelihood by Adam, rows in a fresh random order each epoch. The running statistics come
    from one pass over the training rows before the first step, and stay. The parameters that end up
    in the model are those of the best held-out likelihood (an evaluation before the first step
    included), or the last ones without held-out rows.

    Rows are read as they are stored: neither the buffer's sampler, its transforms nor its generator
    take part, nothing in it changes, and each row's own ``("next", observation)`` is where its step
    led. The next row's observation is never used, so resets are no steps: the last step of an
    episode leads to its own final state, and nothing leads to the first one. Where an environment
    resets by itself and ``"next"`` holds another episode's first state instead, that row is no
    step: mask it at ``("collector", "mask")``, or let TorchRL's ``NextStateReconstructor`` write
    NaN there and pass ``fit(model, buffer[:], mask_nonfinite=True)``.

    Where many states and actions lead to one (walls, contact, absorbing states), a single Gaussian
    becomes their moment match: see `torchrl_recall.diagnostics` for how it shows and what to do.

    Args:
        model (BacktrackModel): the model, fitted in place from where it is.
        buffer (ReplayBuffer, Storage or TensorDictBase): transitions with the model's ``in_keys``
            (and ``is_init`` for a stop head), of any batch shape; rows masked at
            ``("collector", "mask")`` are left out.

    Keyword Args:
        num_steps (int, optional): gradient steps; give this or ``num_epochs``.
        num_epochs (int, optional): passes over the training rows.
        batch_size (int): rows of a step.
        learning_rate (float): of Adam, at least 0 and finite.
        schedule (str): ``"constant"``, or ``"cosine"``: the learning rate falls to zero.
        weight_decay (float): of AdamW; 0 is Adam.
        max_grad_norm (float, optional): clip the norm of the gradient; above 0.
        held_out (float): share of rows to hold out, 0 to below 1; whole trajectories if
            ``trajectory_key`` is there and names at least two.
        evaluate_every (int, optional): steps between evaluations; by default an epoch, or a
            twentieth of all steps if that is sooner.
        patience (int, optional): stop after so many evaluations without a better one.
        trajectory_key (NestedKey, optional): trajectory of each row, as TorchRL's collectors write
            it; it need not be there.
        mask_nonfinite (bool): leave out rows with NaN or infinite entries instead of refusing them.
        loss (BacktrackLoss, optional): of this model, for its options: renamed keys, entropy of
            reverse actions, bootstrap of members. Its ``reduction`` must be ``"mean"``.
        update_statistics (bool): merge the training rows into the model's running statistics.
        progress (bool): show a bar (tqdm), or a line for each evaluation where tqdm is missing.
        generator (torch.Generator, optional): on the CPU, draws the split and the order of rows;
            None is torch's own.

    Returns:
        FitHistory: losses by step, and which parameters were kept.

    Raises:
        KeyError: a key is missing.
        TypeError: not a backtracking model or a buffer.
        ValueError: an empty buffer, too few rows, numbers out of range, non-finite rows, a
            displacement outside ``delta_support``, or both or neither of ``num_steps`` and
            ``num_epochs``.
        RuntimeError: the loss is no longer finite.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> from torchrl_recall import BacktrackModel, fit
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(500))
        >>> state, action = torch.randn(500, 2), torch.rand(500, 2)
        >>> _ = buffer.extend(TensorDict({"observation": state, "action": action,
        ...                               "next": {"observation": state + action}}, [500]))
        >>> history = fit(BacktrackModel(2, 2, num_cells=(32,)), buffer, num_epochs=5,
        ...               progress=False)
        >>> bool(history.held_out[-1] < history.held_out[0]), history.num_held_out
        (True, 50)
    """
    if loss is None:
        loss = BacktrackLoss(model)
    elif not isinstance(loss, BacktrackLoss) or loss.model is not model or loss.reduction != "mean":
        raise ValueError("loss must be a BacktrackLoss of this very model with reduction='mean'.")
    mask_nonfinite = bool(mask_nonfinite) or loss.mask_nonfinite
    batch_size = check_at_least_one("batch_size", batch_size)
    learning_rate = check_real("learning_rate", learning_rate, 0.0, open_high=True)
    share = check_real("held_out", held_out, 0.0, 1.0, open_high=True)
    check_choice("schedule", schedule, Schedule)
    if (num_steps is None) == (num_epochs is None):
        raise ValueError("give one of num_steps and num_epochs.")
    for name, value in (("evaluate_every", evaluate_every), ("patience", patience)):
        if value is not None:
            check_at_least_one(name, value)
    if max_grad_norm is not None:
        max_grad_norm = check_real("max_grad_norm", max_grad_norm, 0.0, open_low=True)
    if patience is not None and share == 0:
        raise ValueError("patience needs held_out rows, got held_out=0.")
    data = select_rows(loss, stored_data(buffer, "buffer"), trajectory_key)
    rows = usable_rows(loss, data, mask_nonfinite=mask_nonfinite).nonzero().squeeze(-1)
    trajectory = None
    if trajectory_key is not None and data.get(trajectory_key, default=None) is not None:
        trajectory = data[trajectory_key].reshape(len(data), -1)[:, 0].cpu()[rows]
    training, kept_out = split_rows(rows, share, trajectory, generator)

    per_epoch = math.ceil(len(training) / batch_size)
    if num_steps is None:
        num_steps = per_epoch * check_at_least_one("num_epochs", num_epochs)
    num_steps = check_at_least_one("num_steps", num_steps)
    if evaluate_every is None:
        evaluate_every = max(1, min(per_epoch, num_steps // 20))
    was_training, loss_was_training = model.training, loss.training
    try:
        run = _Run(loss, data, training, kept_out, batch_size)
        if update_statistics:
            run.update_statistics()
        return run.fit(
            num_steps,
            evaluate_every,
            patience,
            torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay),
            schedule,
            max_grad_norm,
            generator,
            _reporter(num_steps) if progress else None,
        )
    finally:
        loss.train(loss_was_training)
        model.train(was_training)


def split_rows(
    rows: Tensor,
    held_out: float,
    trajectory: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Split rows at random into training and held-out ones, whole trajectories if they are known.

    Args:
        rows (Tensor): int64 ``[N]``.
        held_out (float): share of rows to hold out; of trajectories, as many as make up that share,
            without any that would make it more than twice as much, if there are others.
        trajectory (Tensor, optional): ``[N]`` which trajectory a row belongs to; one alone is
            split by rows.
        generator (torch.Generator, optional): on the CPU; None is torch's own.

    Returns:
        tuple: training rows and held-out rows, both ascending as ``rows`` is.

    Raises:
        ValueError: a side would be empty.
    """
    if held_out == 0:
        if len(rows) == 0:
            raise ValueError("no row is left to fit: all are masked or not finite.")
        return rows, rows[:0]
    wanted = max(1, round(held_out * len(rows)))
    left = torch.zeros(len(rows), dtype=torch.bool)
    numbers = None
    if trajectory is not None:
        names, numbers = trajectory.unique(return_inverse=True)
        numbers = None if len(names) < 2 else numbers
    if numbers is None:
        left[torch.randperm(len(rows), generator=generator)[:wanted]] = True
    else:
        lengths = numbers.bincount()
        order = torch.randperm(len(lengths), generator=generator)
        left = torch.isin(numbers, _held_out_trajectories(order, lengths, wanted))
    training, kept_out = rows[~left], rows[left]
    if len(training) == 0 or len(kept_out) == 0:
        raise ValueError(
            f"held_out={held_out} leaves {len(training)} rows to fit and {len(kept_out)} to hold "
            "out, expected at least one of each."
        )
    return training, kept_out


def _held_out_trajectories(order: Tensor, lengths: Tensor, wanted: int) -> Tensor:
    """Choose trajectories in a given order until they have ``wanted`` rows; never all of them."""
    chosen, total = [], 0
    for one, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if total >= wanted:
            break
        if total + length <= 2 * wanted:
            chosen.append(one)
            total += length
    # All are long: the shortest is nearest to what is wanted.
    chosen = chosen[: len(order) - 1] or [int(lengths.argmin())]
    return torch.tensor(chosen)


class _Run:
    """One fit: rows, loss and the best parameters so far."""

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


def _reporter(num_steps: int) -> Callable[[int, float, float], None]:
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
