"""An environment that knows its inverse, as a backtracking model: nothing learned, nothing wrong.

What the paper calls the true backtracking model: an upper bound for learned ones, and an oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_recall.envs.exact import backtrack_kernel
from torchrl_recall.envs.four_rooms import FourRoomsEnv
from torchrl_recall.model import BacktrackModel

# exp(IMPOSSIBLE) is 0 in float64, and 0 * IMPOSSIBLE is still 0.
IMPOSSIBLE = -1e4


@torch.no_grad()
def exact_backtrack_model(
    env: FourRoomsEnv,
    action_probability: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> BacktrackModel:
    """Build the exact backtracking model of a policy: the posterior over what came before.

    Solves for the kernel (`backtrack_kernel`) and writes it into the networks of an ordinary model,
    one hidden unit for each pair of a cell and an action, so that every backend walks it and all
    that takes a model takes it. Its traces of a policy that reaches the goal are distributed as the
    policy's own episodes, given where they end.

    Take it to see what recall traces can do at best, apart from what a model fails to learn. It
    uses privileged information, the dynamics: results with it are to be labelled so.

    Args:
        env (FourRoomsEnv): the maze, of any batch size; its time limit is ignored.
        action_probability (Tensor): the behaviour policy π, ``[S, A]`` for ``S = size²`` cells and
            4 actions.

    Keyword Args:
        dtype (torch.dtype): dtype of the model.
        device (torch.device, optional): device of the model; defaults to the environment's.

    Returns:
        BacktrackModel: with a stop head, for the environment's own observations and actions.
        Fitting it would unlearn what it knows.

    Raises:
        TypeError: not a `FourRoomsEnv`.
        ValueError: the policy is no table of probabilities, or may never reach the goal.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from torchrl_recall import sample_traces
        >>> from torchrl_recall.envs import FourRoomsEnv, exact_backtrack_model
        >>> env = FourRoomsEnv(5)
        >>> model = exact_backtrack_model(env, torch.full((25, 4), 0.25))
        >>> trace = sample_traces(model, torch.tensor([[3, 3]]), num_steps=6)
        >>> bool((trace["observation"] != torch.tensor([3, 3])).any(-1).all())  # never in the goal
        True
    """
    if not isinstance(env, FourRoomsEnv):
        raise TypeError(f"env must be a FourRoomsEnv, got {type(env).__name__}.")
    kernel = backtrack_kernel(env, action_probability)
    num_states, num_actions = kernel.action.shape
    # A unit for each pair is narrow enough for any maze that the kernel can be solved for.
    model = BacktrackModel.from_env(
        env, num_cells=(num_states * num_actions,), stop=True, dtype=dtype, device=device
    )
    for parameter in model.parameters():
        parameter.zero_()
    cells = torch.arange(num_states, device=kernel.stop.device)
    row_unit, column_unit = cells // env.size, env.size + cells % env.size
    stop_logit = _log(kernel.stop) - _log(1 - kernel.stop)
    for network, logits in (
        (model.action_network, _log(kernel.action)),
        (model.stop_network, stop_logit.unsqueeze(-1)),
    ):
        # relu(1[row] + 1[column] - 1) is an exact AND: what leaves the unit are the cell's logits.
        network[0].weight[cells, row_unit] = 1
        network[0].weight[cells, column_unit] = 1
        network[0].bias[cells] = -1
        network[2].weight[:, :num_states] = logits.T.to(network[2].weight)

    first, last = model.delta_network[0], model.delta_network[2]
    for action in range(num_actions):
        units = cells * num_actions + action
        first.weight[units, row_unit] = 1
        first.weight[units, column_unit] = 1
        first.weight[units, model.observation.feature_size + action] = 1
        first.bias[units] = -2
        for j, (row, column) in enumerate(env.delta_support.tolist()):
            # Displacements that leave the maze are masked by the model: any number will do.
            before = (cells + row * env.size + column).clamp(0, num_states - 1)
            probability = kernel.predecessor[cells, action, before]
            last.weight[j, units] = _log(probability).to(last.weight)
    return model


def _log(probability: Tensor) -> Tensor:
    return probability.log().clamp_min(IMPOSSIBLE)
