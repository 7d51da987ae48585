"""The mazes, and what is measured of a policy in them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchrl_recall.envs import FourRoomsEnv
from torchrl_recall.envs.four_rooms import Start

SOLVED = 0.9


@dataclass(frozen=True)
class Task:
    """A maze of four rooms, and the episodes in which data come.

    Args:
        size: side of the maze.
        start: where episodes start, and where success is measured from.
        slip: probability that a random action replaces the chosen one.
        fragment: data come in episodes of this many steps that start in any cell, while success
            is still measured from ``start`` with the maze's own time limit. None: whole episodes.
    """

    size: int = 15
    start: Start = "fixed"
    slip: float = 0.0
    fragment: int | None = None

    @property
    def name(self) -> str:
        """Name of the task in paths."""
        parts = ["fragments" if self.fragment else "four_rooms", str(self.size)]
        parts += [f"of_{self.fragment}"] if self.fragment else []
        parts += ["any_start"] if self.start == "any" else []
        parts += [f"slip_{self.slip:g}"] if self.slip else []
        return "_".join(parts)

    def definition(self) -> dict[str, Any]:
        """Return what says which task it is."""
        return asdict(self)

    def judged(self) -> FourRoomsEnv:
        """Return the maze that success is measured in."""
        return FourRoomsEnv(self.size, start=self.start, slip=self.slip, seed=0)

    def data(self, batch_size: int, seed: int = 0) -> FourRoomsEnv:
        """Return the maze that data come from."""
        if self.fragment is None:
            return FourRoomsEnv(
                self.size, start=self.start, slip=self.slip, batch_size=(batch_size,), seed=seed
            )
        return FourRoomsEnv(
            self.size,
            start="any",
            slip=self.slip,
            max_steps=self.fragment,
            batch_size=(batch_size,),
            seed=seed,
        )


def cells(size: int) -> Tensor:
    """Return all cells as observations: int64 ``[size², 2]``."""
    return torch.cartesian_prod(torch.arange(size), torch.arange(size))
