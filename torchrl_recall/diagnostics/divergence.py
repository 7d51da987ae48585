"""How far a model is from the truth: against the exact kernel where there is one, else on data.

Beside the data's way, after fitting: a model that is wrong here gives wrong traces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.checks import check_at_least_one
from torchrl_recall.diagnostics.kernel import tabular_kernel
from torchrl_recall.envs.exact import backtrack_kernel, kernel_divergence, step_divergence
from torchrl_recall.envs.four_rooms import FourRoomsEnv
from torchrl_recall.model import BacktrackModel
from torchrl_recall.transitions import backward_log_prob, usable_rows


class MazeDivergence(NamedTuple):
    """``KL(q* || q)`` of a model from the exact kernel, in nats (float64).

    Examples:
        >>> import torch
        >>> number = torch.tensor(0.5)
        >>> MazeDivergence(number, 8 * number, number.expand(4), torch.full((4,), 2.0)).scalars()
        {'per_step': 0.5, 'trajectory': 4.0}
    """

    per_step: Tensor
    """Of one backward step, weighted by expected visits; a scalar."""
    trajectory: Tensor
    """Of the distributions over whole trajectories; a scalar."""
    per_state: Tensor
    """Of the step that led to each state, ``[S']``; zero where the policy never goes."""
    visits: Tensor
    """Expected visits of each state in an episode, ``[S']``."""

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger."""
        return {"per_step": float(self.per_step), "trajectory": float(self.trajectory)}


class NegativeLogLikelihood(NamedTuple):
    """Mean negative log-likelihood of real transitions, by factor, in nats (float64 scalars).

    Examples:
        >>> import torch
        >>> half = torch.tensor(0.5)
        >>> found = NegativeLogLikelihood(2 * half, half / 8, half, half, None, 64)
        >>> found.scalars()["total"], found.num_rows
        (1.0, 64)
    """

    total: Tensor
    """Of the whole step; with a stop head its stop examples too, as in `BacktrackLoss`. Of an
    ensemble: that of the mixture, which is what walks, not the mean of its members'."""
    standard_error: Tensor
    """Of ``total``, rows taken as independent."""
    action: Tensor
    """Of ``q(a|s')``."""
    delta: Tensor
    """Of ``q(Δ|a,s')``."""
    stop: Tensor | None
    """Of not having stopped at the next state; None without a stop head."""
    num_rows: int
    """Transitions that counted."""

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger."""
        return {name: float(x) for name, x in self._asdict().items() if x is not None}


@torch.no_grad()
def maze_divergence(
    model: BacktrackModel, env: FourRoomsEnv, action_probability: Tensor
) -> MazeDivergence:
    """Measure a model of a maze against the exact backward kernel of a policy.

    Args:
        model (BacktrackModel): a model of the maze; without a stop head, its ``q(stop)`` is 0 and
            the divergence is infinite.
        env (FourRoomsEnv): the maze; its time limit is ignored.
        action_probability (Tensor): the behaviour policy, ``[S, A]``.

    Returns:
        MazeDivergence: per step, per trajectory and per state.

    Raises:
        TypeError: not a backtracking model.
        ValueError: the model is not one of this maze, or the policy may never reach the goal.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel
        >>> from torchrl_recall.diagnostics import maze_divergence
        >>> from torchrl_recall.envs import FourRoomsEnv
        >>> env = FourRoomsEnv(5)
        >>> model = BacktrackModel.from_env(env, num_cells=(32,), stop=True)
        >>> found = maze_divergence(model, env, torch.full((25, 4), 0.25))
        >>> bool(found.per_step > 0.1), found.per_state.shape  # nothing learned yet
        (True, torch.Size([25]))
    """
    exact = backtrack_kernel(env, action_probability)
    stop, predecessor = tabular_kernel(model, env)
    total = kernel_divergence(exact, stop, predecessor)
    joint = (1 - stop)[:, None, None] * predecessor
    per_state = step_divergence((exact.stop, exact.joint), (stop, joint))
    return MazeDivergence(total.per_step, total.trajectory, per_state, exact.visits)


@torch.no_grad()
def held_out_likelihood(
    model: BacktrackModel,
    data: TensorDictBase,
    *,
    batch_size: int = 4096,
    mask_nonfinite: bool = False,
) -> NegativeLogLikelihood:
    """Score a model on real transitions that it was not fitted to.

    Args:
        model (BacktrackModel): the model; nothing of it changes.
        data (TensorDictBase): transitions of any batch shape with the model's ``in_keys`` (and
            ``is_init`` for a stop head); rows masked at ``("collector", "mask")`` are left out.

    Keyword Args:
        batch_size (int): rows at a time.
        mask_nonfinite (bool): leave out rows with NaN or infinite entries instead of refusing them.

    Returns:
        NegativeLogLikelihood: means over the rows, by factor.

    Raises:
        KeyError: a key is missing.
        TypeError: not a backtracking model.
        ValueError: nothing to score, wrong shapes or dtypes, or non-finite values.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_recall import BacktrackModel
        >>> from torchrl_recall.diagnostics import held_out_likelihood
        >>> data = TensorDict({"observation": torch.randn(5, 3), "action": torch.zeros(5, 1),
        ...                    "next": {"observation": torch.randn(5, 3)}}, [5])
        >>> found = held_out_likelihood(BacktrackModel(3, 1, num_cells=(32,)), data)
        >>> torch.allclose(found.total, found.action + found.delta), found.num_rows
        (True, 5)
    """
    batch_size = check_at_least_one("batch_size", batch_size)
    loss = BacktrackLoss(model)
    training = model.training
    loss.eval()
    try:
        data = data.reshape(-1)
        rows = usable_rows(loss, data, mask_nonfinite=mask_nonfinite).nonzero().squeeze(-1)
        if len(rows) == 0:
            raise ValueError(f"data has no row to score: none of {len(data)} is kept.")
        totals, sums = [], {}
        for part in rows.split(batch_size):
            batch: Any = data[part.to(data.device or part.device)]
            terms = backward_log_prob(loss, batch.to(model.device))
            totals.append(-torch.stack(list(terms.values())).double().sum(0))
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) - term.double().sum()
    finally:
        model.train(training)
    total = torch.cat(totals)
    n = len(total)
    spread = total.std() if n > 1 else total.new_tensor(torch.inf)
    means = {name: value / n for name, value in sums.items()}
    return NegativeLogLikelihood(
        total.mean(),
        spread / n**0.5,
        means["action"],
        means["delta"],
        means.get("stop"),
        n,
    )
