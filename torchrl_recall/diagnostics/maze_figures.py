"""Mazes with what happens in them: values, traces, a walk as a film; and curves with bands.

For the axes of a figure that the caller makes. As in `figures.py`, matplotlib is imported when
something is drawn, and pyplot is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_recall.checks import check_finite
from torchrl_recall.diagnostics.figures import STYLES
from torchrl_recall.envs.four_rooms import FourRoomsEnv
from torchrl_recall.envs.point_maze import PointMazeEnv
from torchrl_recall.state_reading import entry, trace_entry

Maze = FourRoomsEnv | PointMazeEnv
# Of the colour map: its palest colours do not show on white.
DARKEST = 0.85
# How far off the middle of a cell traces are drawn, so that they do not hide each other.
JITTER = 0.28
# Seeds that can be told apart as lines.
FEW = 5


def draw_maze(axes: Any, env: Maze, values: Tensor | None = None, **options: Any) -> Any:
    """Draw walls, start and goal, and a number for each free cell as its colour.

    Args:
        axes (matplotlib Axes): where to draw.
        env (FourRoomsEnv or PointMazeEnv): the maze.
        values (Tensor, optional): ``[size * size]`` or ``[size, size]``, a number for each cell of
            a FourRoomsEnv, such as visits or values; NaN leaves a cell white.
        **options: for ``imshow``, such as ``vmin`` and ``vmax``.

    Returns:
        matplotlib AxesImage: what a colour bar needs; None without ``values``.

    Raises:
        TypeError: no maze.
        ValueError: another number of values than of cells, or values for a continuous maze.

    Examples:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from torchrl_recall.diagnostics import draw_maze
        >>> from torchrl_recall.envs import FourRoomsEnv
        >>> axes = Figure().subplots()
        >>> image = draw_maze(axes, FourRoomsEnv(5), torch.rand(25), vmin=0, vmax=1)
        >>> int(image.get_array().count())  # the free cells
        8
    """
    if isinstance(env, PointMazeEnv):
        if values is not None:
            raise ValueError("values are for the cells of a FourRoomsEnv, got a PointMazeEnv.")
        env.draw(axes)
        return None
    if not isinstance(env, FourRoomsEnv):
        raise TypeError(f"env must be a FourRoomsEnv or PointMazeEnv, got {type(env).__name__}.")
    walls = env.walls.cpu()
    axes.imshow((~walls).numpy(), "gray", vmin=-0.8, vmax=1)
    image = None
    if values is not None:
        if values.numel() != walls.numel():
            raise ValueError(
                f"values has shape {tuple(values.shape)}, expected one for each of "
                f"{walls.numel()} cells."
            )
        values = values.detach().cpu().reshape(walls.shape).double()
        shown = torch.where(walls, torch.nan, values).numpy()
        options.setdefault("cmap", "viridis")
        image = axes.imshow(shown, **options)
    if env.start == "fixed":
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(1, 1, "S", ha="center", va="center", bbox=box, zorder=5, clip_on=True)
    row, column = env.goal.tolist()
    axes.plot(column, row, "*", markersize=14, color="#D55E00", markeredgecolor="white", zorder=5)
    axes.set(xticks=[], yticks=[])
    return image


def draw_traces(axes: Any, trace: TensorDictBase, *, jitter: float | None = None) -> Any:
    """Draw the kept steps of traces over a maze, dark near their end and bright long before it.

    Args:
        axes (matplotlib Axes): where to draw; draw the maze first.
        trace (TensorDictBase): ``[*B, T]``, oldest step first, as `sample_traces` returns it, with
            ``"observation"``: integers are rows and columns, floats x, y and what else there is.

    Keyword Args:
        jitter (float, optional): largest shift of each state, in cells, so that traces do not hide
            each other; by default some for discrete states and none for continuous ones.

    Returns:
        matplotlib LineCollection: what a colour bar needs, in steps to the end.

    Raises:
        KeyError: no observation.
        ValueError: a trace without a time dimension, or of states with fewer than two numbers.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> from torchrl_recall import BacktrackModel, sample_traces
        >>> from torchrl_recall.diagnostics import draw_maze, draw_traces
        >>> from torchrl_recall.envs import FourRoomsEnv
        >>> env, axes = FourRoomsEnv(5), Figure().subplots()
        >>> model = BacktrackModel.from_env(env, num_cells=(32,))
        >>> trace = sample_traces(model, env.goal, num_steps=10, num_traces=4, last_visit=True)
        >>> _ = draw_maze(axes, env)
        >>> lines = draw_traces(axes, trace)
        >>> len(lines.get_segments()) == int(trace["collector", "mask"].sum())
        True
    """
    from matplotlib.collections import LineCollection

    places, kept = _places(trace, jitter)
    pieces = torch.stack([places[:, :-1], places[:, 1:]], 2)
    length = kept.shape[1]
    back = torch.arange(length, 0, -1).expand_as(kept)
    # The oldest first, so that what is near the end lies on top.
    order = back[kept].argsort(descending=True, stable=True)
    segments: Any = pieces[kept][order].numpy()
    options: dict[str, Any] = {"array": back[kept][order].numpy(), "cmap": "viridis"}
    lines = LineCollection(segments, linewidths=1.1, zorder=3, **options)
    lines.set_clim(0, length / DARKEST)
    axes.add_collection(lines)
    return lines


def animate_traces(
    figure: Any, axes: Any, trace: TensorDictBase, *, interval: int = 120, trail: int = 15
) -> Any:
    """Show traces as they are sampled: from their end backwards.

    Args:
        figure (matplotlib Figure): the one that ``axes`` belong to.
        axes (matplotlib Axes): where to draw; draw the maze first.
        trace (TensorDictBase): ``[N, T]`` traces, as for `draw_traces`.

    Keyword Args:
        interval (int): milliseconds for each step.
        trail (int): steps that stay visible.

    Returns:
        matplotlib FuncAnimation: ``to_jshtml()`` and ``save("film.gif")`` play or store it.

    Raises:
        KeyError: no observation.
        ValueError: a trace without a time dimension, or of states with fewer than two numbers.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> from torchrl_recall import BacktrackModel, sample_traces
        >>> from torchrl_recall.diagnostics import animate_traces, draw_maze
        >>> from torchrl_recall.envs import FourRoomsEnv
        >>> env, figure = FourRoomsEnv(5), Figure()
        >>> axes = figure.subplots()
        >>> _ = draw_maze(axes, env)
        >>> model = BacktrackModel.from_env(env, num_cells=(32,))
        >>> trace = sample_traces(model, env.goal, num_steps=2, num_traces=3)
        >>> "<script" in animate_traces(figure, axes, trace).to_jshtml()
        True
    """
    from matplotlib.animation import FuncAnimation

    places, alive = _places(trace, None)
    # A walk has ended where all that is older is masked; holes between are still shown.
    alive = alive.long().cumsum(1) > 0
    length = alive.shape[1]
    trails, heads = [], []
    for i in range(len(places)):
        color, dashes, marker = STYLES[i % len(STYLES)]
        trails += axes.plot([], [], color=color, linestyle=dashes, linewidth=1.4, zorder=6)
        heads += axes.plot([], [], marker, color=color, markersize=7, zorder=7)
    title = axes.set_title("")

    def draw(back: int) -> list[Any]:
        for path, living, tail, head in zip(places, alive, trails, heads, strict=True):
            oldest = max(length - back, int((~living).sum()))
            part = path[oldest : oldest + trail + 1].T.numpy()
            tail.set_data(*part)
            head.set_data(*part[:, :1])
        title.set_text(f"{back} steps before")
        return [*trails, *heads, title]

    return FuncAnimation(figure, draw, frames=length + 1, interval=interval)


def plot_curves(axes: Any, x: Tensor, curves: dict[str, Tensor]) -> None:
    """Draw curves of several seeds each: their mean, and the band of all.

    The band goes from the least to the largest seed. That claims nothing about seeds that were not
    run, which an interval of three seeds would. Up to five seeds are drawn as thin lines, too.

    Args:
        axes (matplotlib Axes): where to draw.
        x (Tensor): ``[P]``, such as environment steps.
        curves (dict of str to Tensor): by name, ``[seeds, P]``; at most six names.

    Raises:
        ValueError: curves that are not one number a seed and point, or not finite; or too many.

    Examples:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from torchrl_recall.diagnostics import plot_curves
        >>> axes = Figure().subplots()
        >>> plot_curves(axes, torch.arange(5), {"PPO": torch.rand(3, 5)})
        >>> len(axes.lines)  # three seeds and their mean
        4
    """
    if len(curves) > len(STYLES):
        raise ValueError(f"curves has {len(curves)} names, expected at most {len(STYLES)}.")
    points = x.detach().cpu().numpy()
    for (name, values), (color, dashes, marker) in zip(curves.items(), STYLES, strict=False):
        if values.ndim != 2 or not len(values) or values.shape[1:] != x.shape:
            raise ValueError(
                f"curves[{name!r}] has shape {tuple(values.shape)}, expected one number for each "
                f"seed and point, [seeds, {len(x)}]."
            )
        check_finite(f"curves[{name!r}]", values)
        values = values.detach().double().cpu()
        low, high = values.amin(0).numpy(), values.amax(0).numpy()
        axes.fill_between(points, low, high, color=color, alpha=0.15, linewidth=0)
        for seed in values if len(values) <= FEW else ():
            axes.plot(points, seed.numpy(), color=color, linewidth=0.5, alpha=0.6)
        style = {"linestyle": dashes, "marker": marker, "markevery": max(1, len(points) // 8)}
        axes.plot(points, values.mean(0).numpy(), color=color, linewidth=2, label=name, **style)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()


def _places(trace: TensorDictBase, jitter: float | None) -> tuple[Tensor, Tensor]:
    """Return x and y of the states ``[N, T + 1, 2]``, and the mask ``[N, T]``."""
    if trace.ndim == 0 or trace.shape.numel() == 0:
        raise ValueError(f"trace has batch size {tuple(trace.shape)}, expected [*B, T].")
    trace = trace.reshape(-1, trace.shape[-1])
    before = entry(trace, "observation", "the trace")
    if before.shape[2:] < (2,):
        raise ValueError(f"observation has shape {tuple(before.shape)}, expected [*B, T, 2].")
    states = trace_entry(trace, "observation")
    places = states[..., :2].detach().double().cpu()
    if not states.is_floating_point():
        places = places.flip(-1)  # rows and columns to x and y
        jitter = JITTER if jitter is None else jitter
    if jitter:
        generator = torch.Generator().manual_seed(0)
        shift = torch.rand(len(places), 1, 2, generator=generator, dtype=torch.float64)
        places = places + jitter * (2 * shift - 1)
    mask = trace.get(("collector", "mask"), default=None)
    if mask is None:
        mask = torch.ones(trace.shape, dtype=torch.bool)
    return places, mask.reshape(trace.shape).cpu()
