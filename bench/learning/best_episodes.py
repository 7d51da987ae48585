"""A buffer of the best finished episodes: what the model sees in the paper's form."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

KEYS = ("observation", "action", ("next", "observation"))


class BestEpisodes:
    """Keeps the finished episodes of highest discounted return, of equal ones the newest.

    Args:
        num_envs: environments that collect side by side.
        num_episodes: how many to keep.
        gamma: discount of a step.
        batch_size: steps that `sample` draws, evenly over all steps kept.
    """

    def __init__(self, num_envs: int, num_episodes: int, gamma: float, batch_size: int) -> None:
        self.num_episodes, self.gamma, self.batch_size = num_episodes, gamma, batch_size
        self.open: list[list[Any]] = [[] for _ in range(num_envs)]
        self.episodes: list[tuple[float, int, Any]] = []
        self.steps: Any = None
        self._num_finished = 0

    def __len__(self) -> int:
        return 0 if self.steps is None else len(self.steps)

    def extend(self, data: TensorDictBase) -> None:
        """Add a rollout ``[num_envs, T]`` with reward and done, following the last one."""
        done = data["next", "done"].squeeze(-1)
        finished = False
        for row, ends in enumerate(done.tolist()):
            begin = 0
            for t, end in enumerate(ends):
                if end:
                    self._finish(row, data[row, begin : t + 1])
                    begin, finished = t + 1, True
            self.open[row].append(data[row, begin:])
        if finished:
            kept = sorted(self.episodes, key=lambda episode: episode[:2], reverse=True)
            self.episodes = kept[: self.num_episodes]
            self.steps = torch.cat([episode.select(*KEYS) for _, _, episode in self.episodes])

    def sample(self) -> TensorDictBase:
        """Draw a batch of steps."""
        if self.steps is None:
            raise RuntimeError("no episode has finished yet.")
        return self.steps[torch.randint(len(self.steps), (self.batch_size,))]

    def _finish(self, row: int, last: Any) -> None:
        episode: Any = torch.cat([part for part in [*self.open[row], last] if len(part)])
        self.open[row] = []
        reward = episode["next", "reward"].squeeze(-1)
        discount = self.gamma ** torch.arange(len(reward))
        self._num_finished += 1
        self.episodes.append((float((discount * reward).sum()), self._num_finished, episode))
