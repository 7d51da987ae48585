"""What a model of a maze has learned, as a table that can be compared with the exact one.

Beside the data's way: `BacktrackModel` -> `tabular_kernel` -> ``envs.exact.kernel_divergence``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_recall.envs.four_rooms import FourRoomsEnv
from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.ensemble import members_of
from torchrl_recall.model.heads import CategoricalHead


@torch.no_grad()
def tabular_kernel(model: BacktrackModel, env: FourRoomsEnv) -> tuple[Tensor, Tensor]:
    """Tabulate what a model has learned of a maze.

    A state is the cell ``row * size + column``, walls included, S = size² of them, A = 4 actions.
    Of an ensemble it is the mixture of its members, which is how it walks if a member is drawn for
    each step.

    Args:
        model (BacktrackModel): a model of the maze's observations and actions.
        env (FourRoomsEnv): the maze.

    Returns:
        tuple: ``q(stop | s')``, float64 ``[S']``, zeros without a stop head, and
        ``q(s, a | s', no stop)``, float64 ``[S', A, S]``, as ``kernel_divergence`` takes them.

    Raises:
        TypeError: not a backtracking model.
        ValueError: the model's observations or actions are not the maze's.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel
        >>> from torchrl_recall.diagnostics import tabular_kernel
        >>> from torchrl_recall.envs import FourRoomsEnv, backtrack_kernel, kernel_divergence
        >>> env = FourRoomsEnv(5)
        >>> model = BacktrackModel.from_env(env, num_cells=(32,), stop=True)
        >>> stop, predecessor = tabular_kernel(model, env)
        >>> stop.shape, predecessor.shape
        (torch.Size([25]), torch.Size([25, 4, 25]))
        >>> exact = backtrack_kernel(env, torch.full((25, 4), 0.25))
        >>> bool(kernel_divergence(exact, stop, predecessor).per_step > 0.1)  # nothing learned yet
        True
    """
    _check_maze_model(model, env)
    states = model.observation.from_joint_index(torch.arange(env.size**2, device=model.device))
    kernels = [_member_kernel(one, states) for one in members_of(model)]
    return kernels[0] if len(kernels) == 1 else _mixture(kernels)


def _member_kernel(model: BacktrackModel, states: Tensor) -> tuple[Tensor, Tensor]:
    num_states = len(states)
    stop = torch.zeros(num_states, dtype=torch.float64, device=model.device)
    if model.has_stop:
        stop = torch.sigmoid(model.stop_logit(states).double())
    action = torch.softmax(model.action_parameters(states).double(), -1)
    before, after = states.unsqueeze(0), states.unsqueeze(1)
    predecessor = []
    for a in range(action.shape[-1]):
        taken = torch.full((num_states,), a, device=model.device)
        parameters = model.delta_parameters(taken, states).double().unsqueeze(1)
        parameters = parameters.expand(-1, num_states, -1)
        predecessor.append(model.delta_head.predecessor_log_prob(parameters, before, after).exp())
    return stop, action.unsqueeze(-1) * torch.stack(predecessor, 1)


def _mixture(kernels: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the kernel of the uniform mixture of members."""
    stop = torch.stack([stop for stop, _ in kernels]).mean(0)
    joint = torch.stack([(1 - stop)[:, None, None] * before for stop, before in kernels]).mean(0)
    return stop, joint / (1 - stop).clamp_min(torch.finfo(stop.dtype).tiny)[:, None, None]


def _check_maze_model(model: BacktrackModel, env: FourRoomsEnv) -> None:
    if not isinstance(model, BacktrackModel):
        raise TypeError(f"model must be a BacktrackModel, got {type(model).__name__}.")
    cells = model.observation.cardinality
    if cells != [env.size, env.size]:
        raise ValueError(
            f"model has observations of {cells or 'no'} classes, expected {[env.size] * 2}, "
            "the rows and columns of the maze."
        )
    head = model.action.head
    if not isinstance(head, CategoricalHead) or head.output_size != 4:
        raise ValueError(f"model has a {type(head).__name__}, expected one over the 4 moves.")
