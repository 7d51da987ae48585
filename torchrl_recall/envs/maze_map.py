"""Mazes of unit cells: written as characters, checked, moved in, drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

WALL, FREE, START, GOAL = "#", " ", "S", "G"

# A stopped point keeps this distance from the wall, so that no rounding puts it inside.
MARGIN = 1e-3

LAYOUTS = {
    "u": (
        "#####",
        "#G  #",
        "### #",
        "#S  #",
        "#####",
    ),
    "large": (
        "############",
        "#G   #     #",
        "#### # ### #",
        "#    # #   #",
        "# ## # # # #",
        "# #      # #",
        "# ### ## ###",
        "#     #   S#",
        "############",
    ),
}
"""Layouts that have a name; the first row is the uppermost."""


class MazeMap(NamedTuple):
    """A maze of unit cells; cell (row, column) covers x from column and y from row, upwards."""

    walls: Tensor
    """bool ``[height, width]``, the lowest row first."""
    corridor: Tensor
    """float64 ``[height, width, 4]``: x low, x high, y low, y high of where a point can go from
    each cell along its row and its column; of no meaning in walls."""
    start: Tensor | None
    """float64 ``[2]``: centre of the start cell."""
    goal: Tensor | None
    """float64 ``[2]``: centre of the goal cell."""


def read_map(maze: str | Sequence[str]) -> MazeMap:
    """Read a maze from the name of a layout or from its rows.

    Args:
        maze: a key of ``LAYOUTS``, or rows of ``#`` wall, space, ``S`` start and ``G`` goal, as
            strings or as one string with line breaks.

    Returns:
        The maze.

    Raises:
        TypeError: the maze is no text.
        ValueError: no such layout, or the rows are no closed maze in one piece.

    Examples:
        >>> read_map("u").goal
        tensor([1.5000, 3.5000], dtype=torch.float64)
        >>> read_map(["####", "#S #", "####"]).corridor[1, 2].tolist()
        [1.001, 2.999, 1.001, 1.999]
    """
    rows = _rows(maze)[::-1]
    walls = torch.tensor([[cell == WALL for cell in row] for row in rows])
    edge = torch.ones_like(walls)
    edge[1:-1, 1:-1] = False
    if not walls[edge].all():
        raise ValueError(f"maze must have walls ('{WALL}') all around, got {rows[::-1]}.")
    if walls.all():
        raise ValueError("maze must have a free cell, got walls only.")
    pieces = _pieces(walls)
    if pieces > 1:
        raise ValueError(f"maze must be in one piece, got {pieces} separate parts.")
    centres = {mark: _centre(rows, mark) for mark in (START, GOAL)}
    return MazeMap(walls, _corridors(walls), centres[START], centres[GOAL])


def locate(walls: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Find the cells that positions are in.

    Args:
        walls: bool ``[height, width]``.
        position: ``[..., 2]``, (x, y).

    Returns:
        Whether the cell is free, bool ``[...]``, False outside the map and for NaN; and the cell
        ``row * width + column``, int64 ``[...]``, some cell where there is none.
    """
    height, width = walls.shape
    x, y = position.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    # NaN and what is outside must not become an index.
    column, row = (torch.where(inside, part, 0.0).long() for part in (x, y))
    cell = row * width + column
    return inside & ~walls.view(-1)[cell], cell


def slide(walls: Tensor, corridor: Tensor, position: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Move points along x and then along y, each as far as the walls allow.

    Args:
        walls: bool ``[height, width]``.
        corridor: ``[height, width, 4]``, see `MazeMap`.
        position: ``[..., 2]``, (x, y).
        step: ``[..., 2]``, of any length.

    Returns:
        The new positions, and bool ``[..., 2]``: which coordinates a wall has stopped. What is not
        in a free cell stays, stopped.
    """
    free, cell = locate(walls, position)
    bounds = corridor.to(position.dtype).view(-1, 4)
    x, y = position.unbind(-1)
    after, stopped = [], []
    for axis, (start, change) in enumerate(((x, step[..., 0]), (y, step[..., 1]))):
        # Who is nearer to a wall than the margin, coming from the side, is not pushed away.
        low = torch.minimum(bounds[cell, 2 * axis], start)
        high = torch.maximum(bounds[cell, 2 * axis + 1], start)
        target = start + change
        end = torch.where(free, torch.minimum(torch.maximum(target, low), high), start)
        after.append(end)
        stopped.append((end != target) | ~free)
        cell = locate(walls, torch.stack([after[0], y], -1))[1]
    return torch.stack(after, -1), torch.stack(stopped, -1)


def render(walls: Tensor, start: Tensor | None, goal: Tensor | None) -> str:
    """Write a maze as rows of characters, the uppermost first."""
    rows = [[WALL if wall else FREE for wall in row] for row in walls.tolist()]
    for mark, place in ((START, start), (GOAL, goal)):
        if place is not None:
            x, y = place.long().tolist()
            rows[y][x] = mark
    return "\n".join("".join(row) for row in rows[::-1])


def draw(
    axis: Any, walls: Tensor, start: Tensor | None, goal: Tensor | None, radius: float
) -> None:
    """Draw a maze on a matplotlib axis, the goal as a disc."""
    height, width = walls.shape
    shade = torch.where(walls.cpu(), 0.25, 1.0).numpy()
    axis.imshow(shade, "gray", vmin=0, vmax=1, origin="lower", extent=(0, width, 0, height))
    if start is not None:
        axis.plot(*start.tolist(), "o", color="#0072B2")
    if goal is not None:
        angle = torch.linspace(0, 2 * math.pi, 65)
        x, y = goal.tolist()
        ring = radius * torch.stack([angle.cos(), angle.sin()])
        axis.fill(x + ring[0].numpy(), y + ring[1].numpy(), color="#D55E00", alpha=0.6)
    axis.set(xticks=[], yticks=[], aspect="equal")


def _rows(maze: str | Sequence[str]) -> list[str]:
    if isinstance(maze, str):
        if "\n" not in maze and maze not in LAYOUTS:
            raise ValueError(f"maze must be one of {sorted(LAYOUTS)} or rows of text, got {maze!r}")
        rows = list(LAYOUTS.get(maze, [row for row in maze.split("\n") if row]))
    else:
        rows = list(maze)
    if not all(isinstance(row, str) for row in rows):
        raise TypeError(f"maze must be text, got {[type(row).__name__ for row in rows]}.")
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"maze must have rows of one length, got {[len(row) for row in rows]}.")
    known = {WALL, FREE, START, GOAL}
    if unknown := set("".join(rows)) - known:
        raise ValueError(f"maze must consist of {sorted(known)}, got {sorted(unknown)}.")
    return rows


def _centre(rows: list[str], mark: str) -> Tensor | None:
    places = [(x, y) for y, row in enumerate(rows) for x, cell in enumerate(row) if cell == mark]
    if len(places) > 1:
        raise ValueError(f"maze must have one '{mark}' at most, got {len(places)}.")
    return torch.tensor(places[0], dtype=torch.float64) + 0.5 if places else None


def _pieces(walls: Tensor) -> int:
    """Number of parts that the free cells fall into, neighbours sharing a side."""
    free = {(int(y), int(x)) for y, x in (~walls).nonzero()}
    pieces = 0
    while free:
        pieces, edge = pieces + 1, [free.pop()]
        while edge:
            y, x = edge.pop()
            beside = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & free
            free -= beside
            edge.extend(beside)
    return pieces


def _corridors(walls: Tensor) -> Tensor:
    def ends(lines: Tensor) -> tuple[Tensor, Tensor]:
        """Of each cell: where the free cells around it in its line begin and end."""
        place = torch.arange(lines.shape[1], dtype=torch.float64).expand(lines.shape)
        low = torch.where(lines, place + 1, 0.0).cummax(1).values
        high = torch.where(lines, -place, -float(lines.shape[1])).flip(1).cummax(1).values.flip(1)
        return low, -high

    x_low, x_high = ends(walls)
    y_low, y_high = (bound.T for bound in ends(walls.T))
    off = torch.tensor([MARGIN, -MARGIN, MARGIN, -MARGIN], dtype=torch.float64)
    return torch.stack([x_low, x_high, y_low, y_high], -1) + off
