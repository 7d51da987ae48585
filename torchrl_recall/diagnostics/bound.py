"""How tight the variational bound is: do sampled traces follow the posterior over trajectories?

With q the backtracking model, p the forward process and ``R > L`` the event that traces end in::

    log p(R > L) >= E_q[log p(τ, R > L) - log q(τ)] = log p(R > L) - KL(q(τ) || p(τ | R > L))

The core takes log-probabilities, whatever they are of; `maze_bound` supplies the exact ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_recall.checks import check_at_least_one
from torchrl_recall.diagnostics.kernel import tabular_kernel
from torchrl_recall.envs.exact import (
    backtrack_kernel,
    start_success,
    step_divergence,
    transition_probability,
)
from torchrl_recall.envs.four_rooms import FourRoomsEnv
from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.ensemble import members_of
from torchrl_recall.traces import sample_traces


class Bound(NamedTuple):
    """A Monte-Carlo estimate of the bound, in nats (float64 scalars unless stated).

    With deterministic or nearly deterministic dynamics a learned model soon samples a trajectory
    that cannot happen, and the bound is minus infinity; ``value_possible`` is the bound of the
    model with such traces filtered out, which is finite.

    Examples:
        >>> import torch
        >>> value, evidence = torch.tensor(-1.0), torch.tensor(-0.5)
        >>> bound = Bound(*[value] * 6, log_evidence=evidence, log_weight=value.expand(8))
        >>> bound.gap
        tensor(0.5000)
    """

    value: Tensor
    """Mean log-weight; minus infinity if a sampled trajectory cannot happen."""
    standard_error: Tensor
    """Of ``value``; infinite with it."""
    value_possible: Tensor
    """Bound of q given that the trajectory can happen, mean log-weight + ``log(possible)``."""
    standard_error_possible: Tensor
    """Of ``value_possible``."""
    possible: Tensor
    """Share of sampled trajectories that can happen."""
    importance_weighted: Tensor
    """``log mean exp`` of the log-weights, a tighter bound (in expectation)."""
    log_evidence: Tensor | None
    """``log p(R > L)``, which no bound exceeds but by chance; None where it is not known."""
    log_weight: Tensor
    """``log p(τ, R > L) - log q(τ)`` of each trajectory, ``[N]``."""

    @property
    def gap(self) -> Tensor:
        """``log_evidence - value``, an estimate of ``KL(q || p)``.

        Raises:
            ValueError: the evidence is not known.
        """
        if self.log_evidence is None:
            raise ValueError("gap needs log_evidence, which was not given.")
        return self.log_evidence - self.value

    def scalars(self) -> dict[str, float]:
        """Numbers for a logger."""
        named = {name: value for name, value in self._asdict().items() if name != "log_weight"}
        return {name: float(value) for name, value in named.items() if value is not None}


def variational_bound(
    log_p_trajectory: Tensor,
    log_q_trajectory: Tensor,
    log_evidence: Tensor | float | None = None,
) -> Bound:
    """Estimate the bound from trajectories that were sampled from q.

    Args:
        log_p_trajectory (Tensor): ``[*N]`` ``log p(τ, R > L)`` of the forward process, in nats;
            minus infinity where the trajectory cannot happen.
        log_q_trajectory (Tensor): ``[*N]`` ``log q(τ)`` of the walk that sampled it.
        log_evidence (Tensor or float, optional): ``log p(R > L)``, if known.

    Returns:
        Bound: value, standard error, and what helps to read them.

    Raises:
        ValueError: fewer than two trajectories, shapes that differ, NaN, or a ``log q`` that is
            infinite: what q cannot do it has not sampled.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379; importance
    weights after Burda et al., 2016, https://arxiv.org/abs/1509.00519.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import variational_bound
        >>> log_p = torch.tensor([0.1, 0.2]).log()  # half of the trajectories have the event,
        >>> bound = variational_bound(log_p, torch.tensor([0.5, 0.5]).log(), math.log(0.3))
        >>> round(bound.value.item(), 4), round(bound.gap.item(), 4)
        (-1.2629, 0.0589)
    """
    log_p = log_p_trajectory.detach().double().flatten()
    log_q = log_q_trajectory.detach().double().flatten()
    if log_p_trajectory.shape != log_q_trajectory.shape or len(log_p) < 2:
        raise ValueError(
            "log_p_trajectory and log_q_trajectory must have one shape with at least 2 entries, "
            f"got {tuple(log_p_trajectory.shape)} and {tuple(log_q_trajectory.shape)}."
        )
    if not bool(torch.isfinite(log_q).all()):
        raise ValueError("log_q_trajectory must be finite: what is sampled from q is possible.")
    if bool((log_p.isnan() | log_p.isposinf()).any()):
        raise ValueError("log_p_trajectory must be below infinity and not NaN.")
    if log_evidence is not None:
        log_evidence = torch.as_tensor(log_evidence, dtype=torch.float64, device=log_p.device)
        if not bool(torch.isfinite(log_evidence).all()) or log_evidence.ndim:
            raise ValueError(f"log_evidence must be one finite number, got {log_evidence}.")
    log_weight = log_p - log_q
    n, kept = len(log_weight), log_weight[log_weight > -torch.inf]
    share = log_weight.new_tensor(len(kept) / n)
    infinite = log_weight.new_tensor(torch.inf)
    value, error = log_weight.mean(), infinite
    value_possible, error_possible = -infinite, infinite
    if len(kept) > 1:
        spread = kept.var() / len(kept)
        # The second term is the delta method's, for the logarithm of an estimated share.
        error_possible = (spread + (1 - share) / (share * n)).sqrt()
        value_possible = kept.mean() + share.log()
        error = spread.sqrt() if len(kept) == n else infinite
    weighted = torch.logsumexp(log_weight, 0) - math.log(n)
    return Bound(
        value, error, value_possible, error_possible, share, weighted, log_evidence, log_weight
    )


@torch.no_grad()
def maze_bound(
    model: BacktrackModel,
    env: FourRoomsEnv,
    action_probability: Tensor,
    *,
    num_traces: int = 1000,
    num_steps: int | None = None,
    horizon: int | None = None,
    generator: torch.Generator | None = None,
) -> Bound:
    """Estimate the bound of a model of a maze, from traces that end in the goal.

    Without ``horizon`` the event is that the goal is reached at all, whose log-probability is 0. A
    walk that has not ended after ``num_steps`` is scored as the end of a longer episode: its first
    state's expected visits take the place of the start distribution, so nothing is cut off. With
    ``horizon`` the event is that it is reached within so many steps; longer traces are left out,
    and q is divided by its exact probability of the others.

    Args:
        model (BacktrackModel): a model of the maze with a stop head.
        env (FourRoomsEnv): the maze; its time limit is ignored.
        action_probability (Tensor): the behaviour policy, ``[S, A]``.

    Keyword Args:
        num_traces (int): trajectories to sample.
        num_steps (int, optional): longest walk without ``horizon``; ``10 * env.size`` by default.
        horizon (int, optional): steps within which the goal is to be reached.
        generator (torch.Generator, optional): source of randomness; None is torch's own.

    Returns:
        Bound: with ``log_evidence``, exactly.

    Raises:
        TypeError: not a backtracking model.
        ValueError: the model is not one of this maze or has no stop head, the policy may never
            reach the goal, or no trace is within the horizon.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel
        >>> from torchrl_recall.diagnostics import maze_bound
        >>> from torchrl_recall.envs import FourRoomsEnv
        >>> env = FourRoomsEnv(5, slip=0.1)
        >>> model = BacktrackModel.from_env(env, num_cells=(32,), stop=True)
        >>> bound = maze_bound(model, env, torch.full((25, 4), 0.25), num_traces=100)
        >>> bool(bound.value_possible < bound.log_evidence)  # nothing learned yet
        True
    """
    kernels = _kernels(model, env)
    num_traces = check_at_least_one("num_traces", num_traces)
    if horizon is not None:
        # One step more shows whether a trace of that length ends there.
        num_steps = check_at_least_one("horizon", horizon) + 1
    num_steps = 10 * env.size if num_steps is None else check_at_least_one("num_steps", num_steps)
    exact = backtrack_kernel(env, action_probability)
    goal = env.goal.to(model.device)
    trace = sample_traces(
        model,
        model.observation.restore(goal),
        num_steps=num_steps,
        num_traces=num_traces,
        generator=generator,
    )
    codec, mask = model.observation, trace["collector", "mask"]
    before = codec.joint_index(codec.read(trace))
    goal_cell = codec.joint_index(goal)
    after = torch.cat([before[:, 1:], goal_cell.expand(num_traces, 1)], -1)
    action = model.action.read(trace, model.action_key, model.device)
    length = mask.sum(-1)
    ended = length < num_steps
    states = torch.cat([before, after[:, -1:]], -1)
    first = states.gather(-1, (num_steps - length).unsqueeze(-1)).squeeze(-1)

    policy = action_probability.double() / action_probability.double().sum(-1, keepdim=True)
    step_p = policy[before, action].log() + transition_probability(env)[before, action, after].log()
    # An episode is over at the goal, where the table of transitions says that all moves stay.
    step_p = torch.where(before == goal_cell, -torch.inf, step_p)
    log_q = torch.stack(
        [_walk_log_prob(*kernel, before, action, after, first, mask, ended) for kernel in kernels]
    )
    log_q = log_q.logsumexp(0) - math.log(len(kernels))
    begin = torch.where(ended, env.start_probability[first], exact.visits[first])
    log_p = torch.where(mask, step_p, 0.0).sum(-1) + begin.log()
    if horizon is None:
        return variational_bound(log_p, log_q, 0.0)
    evidence = start_success(env, action_probability, horizon=horizon)
    if int(ended.sum()) < 2 or evidence == 0:
        raise ValueError(
            f"horizon {horizon} is too short: {int(ended.sum())} of {num_traces} traces are within "
            f"it, and the policy reaches the goal within it with probability {evidence:.3g}."
        )
    within = [_ends_within(*kernel, int(goal_cell), horizon) for kernel in kernels]
    log_q = log_q - torch.stack(within).mean().log()
    return variational_bound(log_p[ended], log_q[ended], math.log(evidence))


@torch.no_grad()
def maze_gap(model: BacktrackModel, env: FourRoomsEnv, action_probability: Tensor) -> Tensor:
    """Solve for the gap of the bound, ``KL(q(τ) || p(τ | goal))``, without sampling.

    With D_q the expected visits of the walk backwards from the goal it is
    ``Σ_s' D_q(s') KL(q(. | s') || q*(. | s'))``.

    Args:
        model (BacktrackModel): a model of the maze with a stop head.
        env (FourRoomsEnv): the maze; its time limit is ignored.
        action_probability (Tensor): the behaviour policy, ``[S, A]``.

    Returns:
        Tensor: the gap in nats, float64; infinite if the model can walk where no episode goes.

    Raises:
        TypeError: not a backtracking model.
        ValueError: the model is not one of this maze, has no stop head, never ends its walks, or
            is an ensemble with ``member_per="trace"``.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel
        >>> from torchrl_recall.diagnostics import maze_gap
        >>> from torchrl_recall.envs import FourRoomsEnv
        >>> env = FourRoomsEnv(5, slip=0.1)
        >>> model = BacktrackModel.from_env(env, num_cells=(32,), stop=True)
        >>> maze_gap(model, env, torch.full((25, 4), 0.25)).item()  # it walks through walls
        inf
    """
    kernels = _kernels(model, env)
    if len(kernels) > 1:
        raise ValueError(
            "model is an ensemble that draws a member for each trace, so that its walks have no "
            "Markov kernel; estimate the gap by maze_bound."
        )
    stop, predecessor = kernels[0]
    exact = backtrack_kernel(env, action_probability)
    goal_cell = int(model.observation.joint_index(env.goal))
    walk = (1 - stop).unsqueeze(-1) * predecessor.sum(1)
    start = torch.zeros_like(stop)
    start[goal_cell] = 1
    reached = _reachable(walk, start > 0)
    inner = walk[reached][:, reached]
    identity = torch.eye(len(inner), dtype=walk.dtype, device=walk.device)
    visits, failed = torch.linalg.solve_ex(identity - inner.T, start[reached])
    if int(failed) or not bool((torch.isfinite(visits) & (visits >= -1e-9)).all()):
        raise ValueError("model has a stop head that never ends a walk from the goal.")
    joint = (1 - stop)[:, None, None] * predecessor
    step = step_divergence((stop, joint), (exact.stop, exact.joint))
    return (visits * step[reached]).sum()


def _kernels(model: BacktrackModel, env: FourRoomsEnv) -> list[tuple[Tensor, Tensor]]:
    """Kernels of which one, drawn for each trace, does all its steps."""
    kernel = tabular_kernel(model, env)
    if not model.has_stop:
        raise ValueError("model has no stop head, so its traces are no whole trajectories.")
    if model.num_members == 1 or model.member_per == "step":
        return [kernel]
    return [tabular_kernel(one, env) for one in members_of(model)]


def _walk_log_prob(
    stop: Tensor,
    predecessor: Tensor,
    before: Tensor,
    action: Tensor,
    after: Tensor,
    first: Tensor,
    mask: Tensor,
    ended: Tensor,
) -> Tensor:
    """Log-probability ``[N]`` of walks that end at ``first``, or are cut off there."""
    steps = torch.log1p(-stop[after]) + predecessor[after, action, before].log()
    return torch.where(mask, steps, 0.0).sum(-1) + torch.where(ended, stop[first].log(), 0.0)


def _ends_within(stop: Tensor, predecessor: Tensor, cell: int, horizon: int) -> Tensor:
    """Probability that a walk from ``cell`` ends after ``horizon`` steps at most."""
    walk = (1 - stop).unsqueeze(-1) * predecessor.sum(1)
    place = torch.zeros_like(stop)
    place[cell] = 1
    ended = place @ stop
    for _ in range(horizon):
        place = place @ walk
        ended = ended + place @ stop
    return ended


def _reachable(walk: Tensor, cells: Tensor) -> Tensor:
    linked = (walk > 0).double()
    while True:
        grown = cells | (cells.double() @ linked > 0)
        if torch.equal(grown, cells):
            return cells
        cells = grown
