"""One picture for each diagnostic, as a matplotlib Figure of its own.

Matplotlib is imported when a picture is drawn (extra ``demo``); pyplot and its global state are
not used. Colours are those of Okabe and Ito, and every curve differs by dashes or markers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchrl_recall.diagnostics.bound import Bound
from torchrl_recall.diagnostics.compounding import CompoundingError
from torchrl_recall.diagnostics.coverage import GoalCoverage
from torchrl_recall.diagnostics.distance import DistanceToData, OutsideData
from torchrl_recall.diagnostics.divergence import MazeDivergence
from torchrl_recall.diagnostics.uniformity import Calibration
from torchrl_recall.fitting import FitHistory

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#555555"
# Several curves: colour, dashes, marker.
STYLES = (
    (BLUE, "-", "o"),
    (ORANGE, "--", "s"),
    (GREEN, "-.", "^"),
    ("#D55E00", ":", "D"),
    ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    (GREY, (0, (1, 1)), "x"),
)


def plot_bound(bound: Bound) -> Any:
    """Draw the log-weights of sampled trajectories, the bound, and the evidence.

    Args:
        bound (Bound): from `variational_bound` or `maze_bound`.

    Returns:
        matplotlib.figure.Figure: the picture.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import plot_bound, variational_bound
        >>> bound = variational_bound(-torch.rand(100), torch.zeros(100), 0.0)
        >>> plot_bound(bound).axes[0].get_xlabel()
        'log p(τ, R > L) - log q(τ), nats'
    """
    figure, axes = _figure()
    finite = bound.log_weight[bound.log_weight.isfinite()].cpu()
    if len(finite):
        axes.hist(finite.numpy(), bins=40, color="#BBBBBB", edgecolor=GREY, linewidth=0.3)
    lines = [("bound (possible traces)", bound.value_possible, BLUE, "--")]
    if bound.log_evidence is not None:
        lines.append(("log-evidence", bound.log_evidence, "black", "-"))
    for label, value, color, dashes in lines:
        if bool(torch.isfinite(value)):
            text = f"{label} {float(value):.3f}"
            axes.axvline(float(value), color=color, linestyle=dashes, label=text)
    axes.set_title(f"{float(bound.possible):.1%} of {len(bound.log_weight)} traces can happen")
    axes.set_xlabel("log p(τ, R > L) - log q(τ), nats")
    axes.set_ylabel("traces")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


def plot_divergence(divergence: MazeDivergence) -> Any:
    """Draw where in a maze a model is wrong: visits times divergence of each cell.

    Args:
        divergence (MazeDivergence): from `maze_divergence`.

    Returns:
        matplotlib.figure.Figure: the picture.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel
        >>> from torchrl_recall.diagnostics import maze_divergence, plot_divergence
        >>> from torchrl_recall.envs import FourRoomsEnv
        >>> env = FourRoomsEnv(5)
        >>> model = BacktrackModel.from_env(env, num_cells=(32,), stop=True)
        >>> found = maze_divergence(model, env, torch.full((25, 4), 0.25))
        >>> len(plot_divergence(found).axes)  # the maze and its colour bar
        2
    """
    figure, axes = _figure(4.5, 3.6)
    size = round(len(divergence.visits) ** 0.5)
    share = (divergence.visits * divergence.per_state).reshape(size, size)
    never = (divergence.visits == 0).reshape(size, size)
    share = torch.where(never, torch.nan, share).cpu().numpy()
    # Of one hue and growing lightness: the same in greyscale.
    image = axes.imshow(share, cmap="cividis")
    axes.set_title(f"KL {float(divergence.trajectory):.3g} nats a trajectory")
    axes.set_xlabel("column")
    axes.set_ylabel("row")
    figure.colorbar(image, ax=axes, label="nats (white: never visited)")
    return figure


def plot_calibration(calibration: Calibration, names: list[str] | None = None) -> Any:
    """Draw the distribution of the PIT of each dimension against the diagonal.

    Args:
        calibration (Calibration): from `calibration`.
        names (list of str, optional): of the dimensions. At most six are drawn, the worst ones.

    Returns:
        matplotlib.figure.Figure: the picture.

    Raises:
        ValueError: another number of names.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_recall import BacktrackModel
        >>> from torchrl_recall.diagnostics import calibration, plot_calibration
        >>> data = TensorDict({"observation": torch.randn(99, 3), "action": torch.zeros(99, 1),
        ...                    "next": {"observation": torch.zeros(99, 3)}}, [99])
        >>> found = calibration(BacktrackModel(3, 1, num_cells=(32,)), data)
        >>> len(plot_calibration(found).axes[0].lines)  # the diagonal and three dimensions
        4
    """
    dimensions = calibration.pit.shape[1]
    names = [f"dimension {i}" for i in range(dimensions)] if names is None else names
    if len(names) != dimensions:
        raise ValueError(f"names has {len(names)} entries, expected {dimensions}.")
    figure, axes = _figure(4.5, 4.0)
    axes.plot([0, 1], [0, 1], color="black", linewidth=1, label="calibrated")
    worst = calibration.distance.argsort(descending=True)[: len(STYLES)].sort().values.tolist()
    level = torch.linspace(0, 1, 101, dtype=torch.float64)
    for i, (color, dashes, marker) in zip(worst, STYLES, strict=False):
        ordered = calibration.pit[:, i].sort().values.cpu()
        share = torch.searchsorted(ordered, level, right=True) / len(ordered)
        text = f"{names[i]}, KS {float(calibration.distance[i]):.3f}"
        style = {"linestyle": dashes, "marker": marker, "markevery": 10, "markersize": 4}
        axes.plot(level.numpy(), share.numpy(), color=color, label=text, **style)
    axes.set_xlabel("probability integral transform")
    axes.set_ylabel("share of transitions below")
    axes.legend(fontsize="small")
    return figure


def plot_compounding_error(errors: CompoundingError | Mapping[str, CompoundingError]) -> Any:
    """Draw the error of replayed traces against their length, for one model or several.

    Args:
        errors (CompoundingError or mapping): from `compounding_error`; several by name.

    Returns:
        matplotlib.figure.Figure: the picture: means, with two standard errors.

    Examples:
        >>> import torch
        >>> from torchrl_recall import BacktrackModel, sample_traces
        >>> from torchrl_recall.diagnostics import compounding_error, plot_compounding_error
        >>> trace = sample_traces(BacktrackModel(2, 2), torch.zeros(16, 2), num_steps=10)
        >>> found = compounding_error(trace, lambda s, a: s + a, steps=(1, 5, 10))
        >>> plot_compounding_error({"ours": found}).axes[0].get_xlabel()
        'steps replayed'
    """
    if isinstance(errors, CompoundingError):
        errors = {"model": errors}
    figure, axes = _figure()
    for i, (name, found) in enumerate(errors.items()):
        color, dashes, marker = STYLES[i % len(STYLES)]
        steps, mean = found.steps.cpu().numpy(), found.mean.cpu().numpy()
        spread = 2 * found.standard_error.nan_to_num(posinf=torch.nan).cpu().numpy()
        style = {"linestyle": dashes, "marker": marker, "capsize": 3}
        axes.errorbar(steps, mean, spread, color=color, label=name, **style)
    axes.set_xlabel("steps replayed")
    axes.set_ylabel("error at the end, std of the state")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_distance(found: DistanceToData | OutsideData) -> Any:
    """Draw the share of steps outside the data, by how far they are from the trace's end.

    Args:
        found (DistanceToData or OutsideData): from `distance_to_data` or `never_visited`.

    Returns:
        matplotlib.figure.Figure: the picture.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import distance_to_data, plot_distance
        >>> found = distance_to_data(torch.randn(8, 5, 2), torch.randn(100, 2))
        >>> plot_distance(found).axes[0].get_xlabel()
        'steps before the end of the trace'
    """
    figure, axes = _figure()
    nearby = isinstance(found, DistanceToData)
    by_step = found.outside_by_step if nearby else found.by_step
    back = range(len(by_step), 0, -1)
    label = "beyond the data's own quantile" if nearby else "outside"
    axes.plot(back, by_step.cpu().numpy(), color=BLUE, marker="o", markersize=3, label=label)
    axes.set_xlabel("steps before the end of the trace")
    axes.set_ylabel("share of states")
    axes.set_ylim(-0.02, 1.02)
    axes.legend()
    return figure


def plot_goal_coverage(coverage: GoalCoverage) -> Any:
    """Draw which goals were reached: filled and empty, as a map if the goals are a grid.

    Args:
        coverage (GoalCoverage): from `goal_coverage`.

    Returns:
        matplotlib.figure.Figure: the picture.

    Examples:
        >>> import torch
        >>> from torchrl_recall.diagnostics import goal_coverage, plot_goal_coverage
        >>> plot_goal_coverage(goal_coverage(torch.eye(3, dtype=torch.bool))).axes[0].get_title()
        '33% of 9 goals reached [12%, 65%]'
    """
    figure, axes = _figure(4.5, 3.6)
    reached = torch.atleast_2d(coverage.reached).flatten(0, -2).cpu()
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in reached.shape), indexing="ij")
    for outcome, face, label in ((True, BLUE, "reached"), (False, "white", "not reached")):
        where = reached == outcome
        x, y = columns[where].numpy(), rows[where].numpy()
        axes.scatter(x, y, s=30, facecolor=face, edgecolor=BLUE, label=label)
    interval = f"[{coverage.low:.0%}, {coverage.high:.0%}]"
    axes.set_title(f"{coverage.share:.0%} of {reached.numel()} goals reached {interval}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_fit(history: FitHistory) -> Any:
    """Draw the losses of a fit, and the parameters that were kept.

    Args:
        history (FitHistory): from `torchrl_recall.fit`.

    Returns:
        matplotlib.figure.Figure: the picture.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_recall import BacktrackModel, fit
        >>> from torchrl_recall.diagnostics import plot_fit
        >>> data = TensorDict({"observation": torch.randn(99, 3), "action": torch.zeros(99, 1),
        ...                    "next": {"observation": torch.zeros(99, 3)}}, [99])
        >>> history = fit(BacktrackModel(3, 1, num_cells=(8,)), data, num_steps=9, progress=False)
        >>> plot_fit(history).axes[0].get_ylabel()
        'negative log-likelihood, nats'
    """
    figure, axes = _figure()
    steps = history.step.numpy()
    curves = (
        ("training", history.training, ORANGE, "--"),
        ("held out", history.held_out, BLUE, "-"),
    )
    for label, values, color, dashes in curves:
        if bool(values.isfinite().any()):
            axes.plot(steps, values.numpy(), color=color, linestyle=dashes, label=label)
    axes.axvline(history.best_step, color=GREY, linestyle=":", label="kept")
    axes.set_xlabel("gradient steps")
    axes.set_ylabel("negative log-likelihood, nats")
    axes.legend()
    return figure


# By type of result; `log_diagnostics` draws by it.
PLOTS: dict[type, Any] = {
    Bound: plot_bound,
    MazeDivergence: plot_divergence,
    Calibration: plot_calibration,
    CompoundingError: plot_compounding_error,
    DistanceToData: plot_distance,
    OutsideData: plot_distance,
    GoalCoverage: plot_goal_coverage,
    FitHistory: plot_fit,
}


def _figure(width: float = 5.5, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
