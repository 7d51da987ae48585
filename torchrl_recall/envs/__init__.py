"""Small batched environments and their exact solutions."""

from torchrl_recall.envs.exact import (
    BacktrackKernel,
    KernelDivergence,
    backtrack_kernel,
    expected_visits,
    forward_log_probability,
    kernel_divergence,
    start_success,
    success_probability,
    trajectory_log_probability,
    transition_probability,
)
from torchrl_recall.envs.exact_model import exact_backtrack_model
from torchrl_recall.envs.four_rooms import FourRoomsEnv
from torchrl_recall.envs.point_maze import PointMazeEnv

__all__ = [
    "BacktrackKernel",
    "FourRoomsEnv",
    "KernelDivergence",
    "PointMazeEnv",
    "backtrack_kernel",
    "exact_backtrack_model",
    "expected_visits",
    "forward_log_probability",
    "kernel_divergence",
    "start_success",
    "success_probability",
    "trajectory_log_probability",
    "transition_probability",
]
