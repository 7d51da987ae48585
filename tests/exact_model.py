"""A backtracking model of a maze whose networks hold the exact kernel, to rounding."""

from __future__ import annotations

import torch
from torchrl.envs import InitTracker, TransformedEnv

from torchrl_recall import BacktrackModel
from torchrl_recall.envs import backtrack_kernel

# exp(IMPOSSIBLE) is 0 in float64, and 0 * IMPOSSIBLE is still 0.
IMPOSSIBLE = -1e4


def exact_model(env, action_probability, dtype=torch.float32):
    """Write the exact kernel into a model with one hidden ReLU unit for each (cell, action).

    The unit of (s', a) is ``relu(1[s'] + 1[a] - 1)``, an exact AND, so that its outgoing weights
    are the logits of that pair; the networks that do not see the action use one unit a cell.
    """
    kernel = backtrack_kernel(env, action_probability)
    num_states, num_actions = action_probability.shape
    model = BacktrackModel.from_env(
        TransformedEnv(env, InitTracker()), num_cells=(num_states * num_actions,), dtype=dtype
    )
    joint = slice(2 * env.size, 2 * env.size + num_states)
    cells = torch.arange(num_states)

    def log(probability):
        return probability.log().clamp_min(IMPOSSIBLE)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for network, logits in (
            (model.action_network, log(kernel.action)),
            (model.stop_network, (log(kernel.stop) - log(1 - kernel.stop)).unsqueeze(-1)),
        ):
            network[0].weight[:num_states, joint] = torch.eye(num_states, dtype=dtype)
            network[2].weight[:, :num_states] = logits.T.to(dtype)

        first, last = model.delta_network[0], model.delta_network[2]
        width = model.observation.feature_size
        for action in range(num_actions):
            units = cells * num_actions + action
            first.weight[units, joint.start + cells] = 1
            first.weight[units, width + action] = 1
            first.bias[units] = -1
            for j, (row, column) in enumerate(env.delta_support.tolist()):
                # Displacements that leave the maze are masked by the model: any number will do.
                before = (cells + row * env.size + column).clamp(0, num_states - 1)
                probability = kernel.predecessor[cells, action, before]
                last.weight[j, units] = log(probability).to(dtype)
    return model, kernel
