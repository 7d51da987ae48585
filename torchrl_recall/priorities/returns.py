"""Returns-to-go of stored steps, chunk by chunk from the newest step to the oldest.

`refresh.py` calls `ReturnsToGo` for each chunk it reads. TorchRL's `reward2go` and
`vec_td1_return_estimate` pad each trajectory to the longest one and convolve with powers of the
discount that are cut at 1e-7; here chunks of any mixture of lengths are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def discounted_sum(first: Tensor, discount: Tensor) -> Tensor:
    r"""Solve :math:`y_t = \text{first}_t + \text{discount}_t\, y_{t+1}` backwards in time.

    By doubling: after pass k, ``y`` holds the sum over the next :math:`2^k` steps; as many passes
    as the longest run of positive discounts needs. After the last step comes 0.

    Args:
        first: ``[*B, T]``, floating.
        discount: ``[*B, T]``, in [0, 1]. Where it is 0, what comes after does not count, NaN
            included.

    Returns:
        ``[*B, T]``.

    Examples:
        >>> discounted_sum(torch.ones(4), torch.tensor([0.5, 0.0, 0.5, 0.5]))
        tensor([1.5000, 1.0000, 1.5000, 1.0000])
    """
    total, factor = first.clone(), discount.clone()
    factor[..., -1:] = 0.0
    step = 1
    while step < total.shape[-1] and bool(factor.any()):
        reach = factor[..., :-step]
        later = (reach * total[..., step:]).masked_fill_(reach == 0, 0.0)
        total[..., :-step] += later
        factor[..., :-step] = reach * factor[..., step:]
        factor[..., -step:] = 0.0
        step *= 2
    return total


class ReturnsToGo:
    r"""Discounted sums of rewards to the end of each trajectory, fed backwards in time.

    A step that terminated has its reward; one that was truncated, or is the last one that is
    stored of its trajectory, :math:`r + \gamma V(s')`; any other :math:`r + \gamma` times the
    return of the next step of its trajectory, which may lie in a chunk that came before.

    Args:
        gamma: discount, in [0, 1].
        by_id: whether the trajectory of a step is told by its id alone, so that steps of several
            trajectories may be interleaved. Otherwise row t + 1 of a column continues row t, unless
            the ids differ.

    Examples:
        >>> returns = ReturnsToGo(0.5, by_id=False)
        >>> no, end = torch.tensor([[False], [False]]), torch.tensor([[False], [True]])
        >>> value = lambda rows: torch.full(rows.shape, 8.0)
        >>> returns(torch.ones(2, 1), no, no, None, value).T  # the newest two: 1 + 8 / 2 comes last
        tensor([[3.5000, 5.0000]])
        >>> returns(torch.ones(2, 1), end, end, None, value).T  # the two before them
        tensor([[1.5000, 1.0000]])
    """

    def __init__(self, gamma: float, by_id: bool) -> None:
        self.gamma, self.by_id = gamma, by_id
        # The return of the earliest step so far: of each column, or of each id, sorted by id.
        self.returns: Tensor | None = None
        self.ids: Tensor | None = None

    def __call__(
        self,
        reward: Tensor,
        terminated: Tensor,
        done: Tensor,
        ids: Tensor | None,
        next_value: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Compute the returns of the steps just before those of the last call.

        Args:
            reward: ``[T, B]``, floating, oldest row first.
            terminated: ``[T, B]``, bool.
            done: ``[T, B]``, bool: terminated or truncated.
            ids: trajectory ids ``[T, B]`` or None; with ``by_id``, ``[T, 1]``.
            next_value: gives V(s') of steps ``[n]`` int64, counted in the flattened ``[T, B]``.

        Returns:
            ``[T, B]``.
        """
        self._move_to(reward.device)
        position = torch.arange(reward.numel(), device=reward.device).reshape(reward.shape)
        if self.by_id:
            assert ids is not None
            order = ids[:, 0].argsort(stable=True)
            reward, terminated, done, ids, position = (
                x[order] for x in (reward, terminated, done, ids, position)
            )
        reward, terminated, done, position = (x.T for x in (reward, terminated, done, position))
        continued = torch.zeros_like(done)
        continued[:, :-1] = True
        if ids is not None:
            ids = ids.T
            continued[:, :-1] = ids[:, 1:] == ids[:, :-1]
        ended = done | terminated
        unfinished = ~continued & ~ended
        known, carried = self._look_up(unfinished, ids, reward)
        bootstrapped = (unfinished & ~known) | (ended & ~terminated)
        value = next_value(position[bootstrapped]).to(reward.device)
        first = reward.to(torch.promote_types(reward.dtype, value.dtype), copy=True)
        first[known] += self.gamma * carried.to(first)
        first[bootstrapped] += self.gamma * value.to(first)
        result = discounted_sum(first, self.gamma * (continued & ~ended).to(first))
        self._keep(result, ids, continued)
        returns = torch.empty_like(result).reshape(-1)
        returns[position.reshape(-1)] = result.reshape(-1)
        return returns.reshape(position.T.shape)

    def _look_up(
        self, unfinished: Tensor, ids: Tensor | None, reward: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Find which unfinished steps are continued in an earlier chunk, and their returns."""
        known = torch.zeros_like(unfinished)
        if self.returns is None:
            return known, reward.new_zeros(0)
        if self.by_id:
            assert ids is not None
            assert self.ids is not None
            at = torch.searchsorted(self.ids, ids[unfinished]).clamp_(max=len(self.ids) - 1)
            hit = self.ids[at] == ids[unfinished]
            known[unfinished] = hit
            return known, self.returns[at[hit]]
        known[:, -1] = unfinished[:, -1]
        if ids is not None and self.ids is not None:
            known[:, -1] &= self.ids == ids[:, -1]
        return known, self.returns[known[:, -1]]

    def _keep(self, result: Tensor, ids: Tensor | None, continued: Tensor) -> None:
        if not self.by_id:
            self.returns = result[:, 0].clone()
            self.ids = None if ids is None else ids[:, 0].clone()
            return
        assert ids is not None
        begins = torch.ones_like(continued)
        begins[:, 1:] = ~continued[:, :-1]
        new_ids, new_returns = ids[begins], result[begins]
        if self.ids is not None and self.returns is not None:
            old = ~torch.isin(self.ids, new_ids)
            new_returns = torch.cat([new_returns, self.returns[old].to(new_returns)])
            new_ids, order = torch.cat([new_ids, self.ids[old]]).sort()
            new_returns = new_returns[order]
        self.ids, self.returns = new_ids, new_returns

    def state_dict(self) -> dict[str, Any]:
        """Return the returns that the next chunk may need."""
        return {"returns": self.returns, "ids": self.ids}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.returns, self.ids = state_dict["returns"], state_dict["ids"]

    def _move_to(self, device: torch.device) -> None:
        """Follow the data, after a state was loaded on another device."""
        if self.returns is not None:
            self.returns = self.returns.to(device)
            self.ids = None if self.ids is None else self.ids.to(device)
