"""What a user looks at to trust a model: is it right, is its spread right, do its traces hold.

Beside the data's way, behind `fit` or `BacktrackLoss`: a model, real data or traces go in, results
with ``scalars()`` for a logger and a picture for each come out.

===============================  =============================================================
question                         answer
===============================  =============================================================
is the model right?              `held_out_likelihood`; on a maze, exactly, `maze_divergence`
do traces follow the posterior?  `variational_bound`; on a maze `maze_bound`, `maze_gap`
is its spread right?             `calibration`
where do traces really lead?     `compounding_error`
are traces where data are?       `distance_to_data`, `outside_support`, `never_visited`
what has been reached?           `goal_coverage`
===============================  =============================================================

`draw_maze`, `draw_traces` and `animate_traces` show traces in the mazes of `torchrl_recall.envs`,
`plot_curves` learning curves of several seeds.

**Many predecessors.** A state can have many: against a wall all of ``s' = max(s + a, 0)`` with
``s + a <= 0`` end in 0; contacts, sticky ends and absorbing states are alike. A single Gaussian
then becomes the *moment match*: mean and variance are right, the shape is not, and samples lie
between and beyond the real ones. It shows in `calibration` on the rows concerned while the
likelihood looks good on average, in `distance_to_data`, and in the replayed error. What to do: a
mixture (``num_components``) or an ensemble, which can hold several modes; ``delta_support`` where
steps lie on a lattice; an observation that tells contact from near contact, since networks are
continuous; and short traces. Resets are none of this: a reset is no step, see
`torchrl_recall.fit`.
"""

from torchrl_recall.diagnostics.bound import Bound, maze_bound, maze_gap, variational_bound
from torchrl_recall.diagnostics.compounding import (
    CompoundingError,
    compounding_error,
    replay_error,
)
from torchrl_recall.diagnostics.coverage import GoalCoverage, goal_coverage, reached_goals
from torchrl_recall.diagnostics.distance import (
    DistanceToData,
    OutsideData,
    distance_to_data,
    never_visited,
    outside_support,
)
from torchrl_recall.diagnostics.divergence import (
    MazeDivergence,
    NegativeLogLikelihood,
    held_out_likelihood,
    maze_divergence,
)
from torchrl_recall.diagnostics.figures import (
    plot_bound,
    plot_calibration,
    plot_compounding_error,
    plot_distance,
    plot_divergence,
    plot_fit,
    plot_goal_coverage,
)
from torchrl_recall.diagnostics.kernel import tabular_kernel
from torchrl_recall.diagnostics.loggers import log_diagnostics
from torchrl_recall.diagnostics.maze_figures import (
    animate_traces,
    draw_maze,
    draw_traces,
    plot_curves,
)
from torchrl_recall.diagnostics.replay import four_rooms_step, mujoco_step, tensordict_step
from torchrl_recall.diagnostics.uniformity import (
    Calibration,
    calibration,
    kolmogorov_p_value,
    uniform_distance,
)

__all__ = [
    "Bound",
    "Calibration",
    "CompoundingError",
    "DistanceToData",
    "GoalCoverage",
    "MazeDivergence",
    "NegativeLogLikelihood",
    "OutsideData",
    "animate_traces",
    "calibration",
    "compounding_error",
    "distance_to_data",
    "draw_maze",
    "draw_traces",
    "four_rooms_step",
    "goal_coverage",
    "held_out_likelihood",
    "kolmogorov_p_value",
    "log_diagnostics",
    "maze_bound",
    "maze_divergence",
    "maze_gap",
    "mujoco_step",
    "never_visited",
    "outside_support",
    "plot_bound",
    "plot_calibration",
    "plot_compounding_error",
    "plot_curves",
    "plot_distance",
    "plot_divergence",
    "plot_fit",
    "plot_goal_coverage",
    "reached_goals",
    "replay_error",
    "tabular_kernel",
    "tensordict_step",
    "uniform_distance",
    "variational_bound",
]
