"""`fit`: a backtracking model from a filled buffer, in one call.

The offline way in: where a learner runs, `BacktrackLoss` on its batches does the same step by step.
"""

from __future__ import annotations

import math

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import ReplayBuffer, Storage

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.checks import check_at_least_one, check_choice, check_real
from torchrl_recall.fit_steps import FitHistory, FitRun, Schedule, reporter
from torchrl_recall.held_out import split_rows
from torchrl_recall.model import BacktrackModel
from torchrl_recall.state_reading import stored_data
from torchrl_recall.transitions import select_rows, usable_rows


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
        run = FitRun(loss, data, training, kept_out, batch_size)
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
            reporter(num_steps) if progress else None,
        )
    finally:
        loss.train(loss_was_training)
        model.train(was_training)
