"""Exact solutions of :class:`FourRoomsEnv`: success, expected visits and the backward posterior.

An oracle for tests, diagnostics and learning curves, in float64. A state is the cell
``row * size + column``, S = size² of them (walls included, never visited), A = 4 actions. A policy
is a table of probabilities ``[S, A]`` whose rows sum to one, on walls and on the goal too.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchrl_recall.envs.four_rooms import FourRoomsEnv


class BacktrackKernel(NamedTuple):
    """The exact backward model of a policy: was s' a start, and if not, which step led to it.

    After Goyal et al., 2019 (arXiv 1804.00379); with its stop outcome it is the posterior over
    whole trajectories that end in the goal. Rows of states that are never visited are zero.

    Examples:
        >>> import torch
        >>> kernel = backtrack_kernel(FourRoomsEnv(5), torch.full((25, 4), 0.25))
        >>> total = kernel.stop + kernel.joint.sum((1, 2))
        >>> torch.allclose(total[kernel.visits > 0], torch.ones(1, dtype=torch.float64))
        True
    """

    stop: Tensor
    """``q(stop | s')``, float64 ``[S']``: the episode began in s'."""
    predecessor: Tensor
    """``q(s, a | s', no stop)``, float64 ``[S', A, S]``; zero where s' is only ever a start."""
    visits: Tensor
    """Expected visits D of each state in an episode that runs to the goal, float64 ``[S']``."""

    @property
    def action(self) -> Tensor:
        """``q(a | s', no stop)``, float64 ``[S', A]``."""
        return self.predecessor.sum(-1)

    @property
    def joint(self) -> Tensor:
        """``q(s, a, no stop | s')``, float64 ``[S', A, S]``; with ``stop`` it sums to one."""
        return (1 - self.stop)[:, None, None] * self.predecessor


class KernelDivergence(NamedTuple):
    """How far a backward model is from the exact one, in nats (float64 scalars).

    Examples:
        >>> import torch
        >>> kernel = backtrack_kernel(FourRoomsEnv(5), torch.full((25, 4), 0.25))
        >>> found = kernel_divergence(kernel, kernel.stop, kernel.predecessor)
        >>> found.per_step.item(), found.trajectory.item()
        (0.0, 0.0)
    """

    per_step: Tensor
    """Mean divergence of one backward step, weighted by expected visits."""
    trajectory: Tensor
    """Divergence between the distributions over whole trajectories."""


def transition_probability(env: FourRoomsEnv) -> Tensor:
    """Tabulate the dynamics, ``p(s' | s, a)``.

    Args:
        env: the maze.

    Returns:
        float64 ``[S, A, S']``; the goal and the walls hold whoever is there.

    Examples:
        >>> p = transition_probability(FourRoomsEnv(5, slip=0.2))
        >>> round(p[6, 3, 7].item(), 6)  # right from (1, 1): as asked, or by a slip
        0.85
    """
    size = env.size**2
    moves = torch.zeros(size, 4, size, dtype=torch.float64, device=env.next_cell.device)
    moves.scatter_(2, env.next_cell.unsqueeze(-1), 1.0)
    return (1 - env.slip) * moves + env.slip * moves.mean(1, keepdim=True)


def success_probability(
    env: FourRoomsEnv, action_probability: Tensor, *, horizon: int | Literal["env"] | None = "env"
) -> Tensor:
    """Solve for the probability of reaching the goal from each cell.

    Args:
        env: the maze.
        action_probability: the policy, ``[S, A]``.
        horizon: steps allowed; ``"env"`` is the environment's own limit, ``None`` no limit.

    Returns:
        float64 ``[S]``; 1 at the goal, 0 on walls.

    Raises:
        ValueError: the policy is no table of probabilities, or the horizon is negative.

    Examples:
        >>> env = FourRoomsEnv(5)
        >>> uniform = torch.full((25, 4), 0.25)
        >>> success_probability(env, uniform, horizon=4)[6].item()  # 2 shortest paths in 4**4
        0.0078125
    """
    move = _move_probability(env, action_probability)
    steps = env.max_steps if horizon == "env" else horizon
    if steps is None:
        return _eventual_success(env, move)
    if steps < 0:
        raise ValueError(f"horizon must be at least 0, 'env' or None, got {horizon!r}")
    value, next_cell = _at_goal(env), env.next_cell.view(-1)
    for _ in range(steps):
        # Four reads per cell cost less than a dense product, the more so the larger the maze.
        value = (value.index_select(0, next_cell).view_as(move) * move).sum(-1)
    return value


def start_success(
    env: FourRoomsEnv, action_probability: Tensor, *, horizon: int | Literal["env"] | None = "env"
) -> float:
    """Solve for the probability that an episode of the environment reaches the goal.

    Args:
        env: the maze.
        action_probability: the policy, ``[S, A]``.
        horizon: steps allowed; ``"env"`` is the environment's own limit, ``None`` no limit.

    Returns:
        Success from each cell, averaged over the start distribution.

    Raises:
        ValueError: the policy is no table of probabilities, or the horizon is negative.

    Examples:
        >>> start_success(FourRoomsEnv(5), torch.full((25, 4), 0.25), horizon=4)
        0.0078125
    """
    success = success_probability(env, action_probability, horizon=horizon)
    return (env.start_probability @ success).item()


def expected_visits(env: FourRoomsEnv, action_probability: Tensor) -> Tensor:
    """Solve for the expected visits of each cell in an episode that runs to the goal.

    The time limit is ignored: with one, what comes before depends on the time as well.

    Args:
        env: the maze.
        action_probability: the policy, ``[S, A]``.

    Returns:
        D, float64 ``[S]``; 1 at the goal, 0 in cells that are never visited.

    Raises:
        ValueError: the policy is no table of probabilities, or may never reach the goal.

    Examples:
        >>> visits = expected_visits(FourRoomsEnv(5), torch.full((25, 4), 0.25))
        >>> visits.view(5, 5)[1:4, 1:4].round().int()  # the expected length, 32, is their sum - 1
        tensor([[8, 6, 4],
                [6, 0, 2],
                [4, 2, 1]], dtype=torch.int32)
    """
    move = _move_probability(env, action_probability)
    goal = _at_goal(env)
    visited = _spread(env, move, env.start_probability > 0, backward=False)
    lost = visited & ~_spread(env, move, goal > 0, backward=True)
    if lost.any():
        cells = [divmod(cell, env.size) for cell in lost.nonzero().view(-1).tolist()[:4]]
        raise ValueError(
            "action_probability must lead to the goal from every cell that it visits, "
            f"got no way out of the (row, column) cells {cells}"
        )
    inner = (visited & (goal == 0)).nonzero().view(-1)
    flow = _cell_transition(env, move)
    within = torch.eye(len(inner), dtype=flow.dtype, device=flow.device) - flow[inner][:, inner].T
    return goal.index_put((inner,), torch.linalg.solve(within, env.start_probability[inner]))


def backtrack_kernel(env: FourRoomsEnv, action_probability: Tensor) -> BacktrackKernel:
    """Solve for the exact backward model of a policy, its episodes running to the goal.

    With D the expected visits and μ0 the start distribution::

        q*(stop | s') = μ0(s') / D(s')
        q*(s, a | s', no stop) = D(s) π(a | s) p(s' | s, a) / (D(s') - μ0(s'))

    Args:
        env: the maze.
        action_probability: the behaviour policy π, ``[S, A]``.

    Returns:
        The kernel: stop ``[S']``, predecessor ``[S', A, S]`` and visits ``[S']``.

    Raises:
        ValueError: the policy is no table of probabilities, or may never reach the goal.

    Examples:
        >>> kernel = backtrack_kernel(FourRoomsEnv(5), torch.full((25, 4), 0.25))
        >>> round(kernel.stop[6].item(), 6)  # of 8 visits to the start one is the first
        0.125
        >>> kernel.action[18].round(decimals=6).tolist()  # into the goal by down or by right
        [0.0, 0.5, 0.0, 0.5]
    """
    visits = expected_visits(env, action_probability)
    # An episode ends at the goal: no step leaves it.
    leaving = visits * (1 - _at_goal(env))
    flow = leaving[:, None] * _as_policy(env, action_probability)
    flow = (flow.unsqueeze(-1) * transition_probability(env)).permute(2, 1, 0).contiguous()
    # What flows in is D(s') - μ0(s'), without the cancellation.
    inflow = flow.sum((1, 2))
    predecessor = torch.where(inflow > 0, 1 / inflow, 0.0)[:, None, None] * flow
    stop = torch.where(visits > 0, env.start_probability / visits, 0.0)
    return BacktrackKernel(stop, predecessor, visits)


def trajectory_log_probability(kernel: BacktrackKernel, states: Tensor, actions: Tensor) -> Tensor:
    """Read a trajectory backwards: ``log q*(s_0, a_0, …, s_T | s_T)``, its stop included.

    Args:
        kernel: the backward model.
        states: int64 ``[..., T + 1]``, oldest first.
        actions: int64 ``[..., T]``.

    Returns:
        float64 ``[...]``; ``-inf`` if it cannot happen. For a trajectory that ends in the goal it
        is the forward log-probability.

    Raises:
        ValueError: the shapes do not fit each other.

    Examples:
        >>> kernel = backtrack_kernel(FourRoomsEnv(5), torch.full((25, 4), 0.25))
        >>> states, actions = torch.tensor([6, 7, 8, 13, 18]), torch.tensor([3, 3, 1, 1])
        >>> round(trajectory_log_probability(kernel, states, actions).exp().item(), 8)  # 4**-4
        0.00390625
    """
    _check_trajectory(states, actions)
    start, before, after = states[..., 0], states[..., :-1], states[..., 1:]
    step = torch.log1p(-kernel.stop[after]) + kernel.predecessor[after, actions, before].log()
    return kernel.stop[start].log() + step.sum(-1)


def forward_log_probability(
    env: FourRoomsEnv, action_probability: Tensor, states: Tensor, actions: Tensor
) -> Tensor:
    """Read a trajectory forwards: ``log μ0(s_0) + Σ log π(a_t | s_t) + log p(s_{t+1} | s_t, a_t)``.

    Args:
        env: the maze.
        action_probability: the policy π, ``[S, A]``.
        states: int64 ``[..., T + 1]``, oldest first.
        actions: int64 ``[..., T]``.

    Returns:
        float64 ``[...]``; ``-inf`` if it cannot happen.

    Raises:
        ValueError: the policy is no table of probabilities, or the shapes do not fit each other.

    Examples:
        >>> states, actions = torch.tensor([6, 7, 8, 13, 18]), torch.tensor([3, 3, 1, 1])
        >>> policy = torch.full((25, 4), 0.25)
        >>> log_probability = forward_log_probability(FourRoomsEnv(5), policy, states, actions)
        >>> round(log_probability.exp().item(), 8)  # 4**-4
        0.00390625
    """
    _check_trajectory(states, actions)
    before, after = states[..., :-1], states[..., 1:]
    log_policy = _as_policy(env, action_probability)[before, actions].log()
    log_transition = transition_probability(env)[before, actions, after].log()
    return env.start_probability[states[..., 0]].log() + (log_policy + log_transition).sum(-1)


def kernel_divergence(
    exact: BacktrackKernel, stop: Tensor, predecessor: Tensor
) -> KernelDivergence:
    """Measure a backward model against the exact one: ``KL(q* || q)``.

    Over whole trajectories it is ``Σ_s' D(s') KL(q*(. | s') || q(. | s'))``, where the outcomes of
    a state are the stop and each (a, s); a step's is that over ``Σ_s' D(s')``.

    Args:
        exact: the exact backward model.
        stop: the model's ``q(stop | s')``, ``[S']``.
        predecessor: the model's ``q(s, a | s', no stop)``, ``[S', A, S]``.

    Returns:
        Both divergences in nats; infinite where the model rules out what can happen.

    Raises:
        ValueError: a shape is not the exact one's.

    Examples:
        >>> kernel = backtrack_kernel(FourRoomsEnv(5), torch.full((25, 4), 0.25))
        >>> kernel_divergence(kernel, kernel.stop, kernel.predecessor).trajectory.item()
        0.0
        >>> kernel_divergence(kernel, 0 * kernel.stop, kernel.predecessor).trajectory.item()
        inf
    """
    for name, given, wanted in (
        ("stop", stop, exact.stop),
        ("predecessor", predecessor, exact.predecessor),
    ):
        if given.shape != wanted.shape:
            raise ValueError(
                f"{name} must have shape {list(wanted.shape)}, got {list(given.shape)}"
            )
    model = BacktrackKernel(stop.double(), predecessor.double(), exact.visits)
    trajectory = exact.visits @ step_divergence(
        (exact.stop, exact.joint), (model.stop, model.joint)
    )
    return KernelDivergence(trajectory / exact.visits.sum(), trajectory)


def step_divergence(given: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``KL(given || other)`` of one step backwards from each state, in nats.

    Args:
        given (pair of Tensor): ``q(stop | s')``, ``[S']``, and ``q(s, a, no stop | s')``,
            ``[S', A, S]``.
        other (pair of Tensor): of the same shapes.

    Returns:
        Tensor: ``[S']``; infinite where the other cannot do what is given.
    """
    stop, steps = (
        torch.where(p > 0, p * (p.log() - q.log()), 0.0) for p, q in zip(given, other, strict=True)
    )
    return stop + steps.sum((1, 2))


def _as_policy(env: FourRoomsEnv, action_probability: Tensor) -> Tensor:
    """Check a policy's table; its rows are made to sum to one in float64."""
    shape = (env.size**2, 4)
    if action_probability.shape != shape:
        raise ValueError(
            f"action_probability must have shape {list(shape)}, "
            f"got {list(action_probability.shape)}"
        )
    policy = action_probability.detach().to(torch.float64)
    total = policy.sum(-1, keepdim=True)
    # Written so that NaN fails as well.
    if not ((policy >= 0).all() and ((total - 1).abs() < 1e-3).all()):
        raise ValueError(
            "action_probability must be non-negative with rows that sum to 1, "
            f"got entries from {policy.min():.4g}, rows from {total.min():.4g} to {total.max():.4g}"
        )
    return policy / total


def _move_probability(env: FourRoomsEnv, action_probability: Tensor) -> Tensor:
    """Probability of each of the four moves in each cell ``[S, A]``, slips included."""
    return (1 - env.slip) * _as_policy(env, action_probability) + env.slip / 4


def _at_goal(env: FourRoomsEnv) -> Tensor:
    """One at the goal, zero elsewhere: float64 ``[S]``."""
    goal = torch.zeros_like(env.start_probability)
    goal[env.goal[0] * env.size + env.goal[1]] = 1.0
    return goal


def _cell_transition(env: FourRoomsEnv, move: Tensor) -> Tensor:
    """The policy's transition matrix between cells, ``[S, S']``."""
    size = env.size**2
    return move.new_zeros(size, size).scatter_add_(1, env.next_cell, move)


def _spread(env: FourRoomsEnv, move: Tensor, cells: Tensor, *, backward: bool) -> Tensor:
    """All cells that possible moves connect with the given ones: bool ``[S]``."""
    linked = (_cell_transition(env, move) > 0).double()
    linked = linked.T if not backward else linked
    while True:
        grown = cells | (linked @ cells.double() > 0)
        if torch.equal(grown, cells):
            return cells
        cells = grown


def _eventual_success(env: FourRoomsEnv, move: Tensor) -> Tensor:
    """Success without a time limit; cells that cannot reach the goal would make it singular."""
    goal = _at_goal(env)
    inner = (_spread(env, move, goal > 0, backward=True) & (goal == 0)).nonzero().view(-1)
    flow = _cell_transition(env, move)
    within = torch.eye(len(inner), dtype=flow.dtype, device=flow.device) - flow[inner][:, inner]
    return goal.index_put((inner,), torch.linalg.solve(within, (flow @ goal)[inner]))


def _check_trajectory(states: Tensor, actions: Tensor) -> None:
    if states.shape[:-1] != actions.shape[:-1] or states.shape[-1] != actions.shape[-1] + 1:
        raise ValueError(
            "states must have one more entry than actions along the last dimension, "
            f"got states {list(states.shape)} and actions {list(actions.shape)}"
        )
