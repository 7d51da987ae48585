"""Traces from the best of a batch: `BestStarts` chooses by value, return, reward or TD error.

Between the batch that a buffer samples and the walk. A `ValuePrioritizedSampler` makes the same
choice over a whole buffer; this one needs no priorities, and works on any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_recall.checks import check_flag, check_keys, check_network, check_real
from torchrl_recall.masking import fill_rows, finite_rows, one_each
from torchrl_recall.starts.batch import draw_rows, pick, unmasked_rows
from torchrl_recall.state_reading import entry
from torchrl_recall.values import bootstrapped_value

Score = Callable[[TensorDictBase], Tensor]


class KeyScore:
    """Reads the score of each row from the batch.

    Args:
        key (NestedKey): where it is, ``[*B]`` or ``[*B, 1]``.
        absolute (bool): rank by its absolute value.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> KeyScore("td_error", absolute=True)(TensorDict({"td_error": torch.tensor([-2.0])}, [1]))
        tensor([2.])
    """

    def __init__(self, key: NestedKey, *, absolute: bool = False) -> None:
        self.key = unravel_key(key)
        self.absolute: bool = check_flag("absolute", absolute)

    def __call__(self, tensordict: TensorDictBase) -> Tensor:
        """Return the scores ``[*B]``."""
        score = one_each(tensordict, entry(tensordict, self.key), f"score {self.key!r}")
        return score.abs() if self.absolute else score


class NextValueScore:
    r"""Scores rows by what the critic expects: :math:`r + \gamma (1 - \text{terminated}) V(s')`.

    See `transition_value`. Padding does not reach the network.

    Args:
        value_network (TensorDictModuleBase): reads its ``in_keys`` from ``tensordict["next"]``.

    Keyword Args:
        gamma (float): discount, in [0, 1].
        reward_key, terminated_key, value_key (NestedKey): as for `transition_value`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> critic = TensorDictModule(lambda s: s.sum(-1, keepdim=True), ["s"], ["state_value"])
        >>> after = {"s": torch.ones(1, 3), "reward": torch.ones(1), "terminated": torch.zeros(1)}
        >>> NextValueScore(critic, gamma=0.5)(TensorDict({"next": after}, [1]))
        tensor([2.5000])
    """

    def __init__(
        self,
        value_network: TensorDictModuleBase,
        *,
        gamma: float,
        reward_key: NestedKey = ("next", "reward"),
        terminated_key: NestedKey = ("next", "terminated"),
        value_key: NestedKey = "state_value",
    ) -> None:
        self.value_network: TensorDictModuleBase = check_network("value_network", value_network)
        self.gamma: float = check_real("gamma", gamma, 0.0, 1.0)
        self.reward_key = unravel_key(reward_key)
        self.terminated_key = unravel_key(terminated_key)
        self.value_key = unravel_key(value_key)

    @torch.no_grad()
    def __call__(self, tensordict: TensorDictBase) -> Tensor:
        """Return the scores ``[*B]``."""
        kept = unmasked_rows(tensordict)
        data = tensordict.copy()
        for key in self.value_network.in_keys:
            key = unravel_key(("next", key))
            data.set(key, fill_rows(entry(data, key), kept))
        return bootstrapped_value(
            data,
            self.value_network,
            self.gamma,
            self.reward_key,
            self.terminated_key,
            self.value_key,
        )


class BestStarts:
    """Starts every trace from one of the batch's best next states.

    Each row's start is a row of the same batch, drawn with replacement: uniformly from the best
    fraction (``top``), or proportionally to ``exp(score / temperature)``. Rows with a non-finite
    score or next state, and rows masked at ``("collector", "mask")``, are never drawn; if no
    other row is left, all starts are masked.

    `by_value`, `by_return`, `by_reward` and `by_td_error` name the usual scores.

    Args:
        score (NestedKey or callable): an entry of the batch, ``[*B]`` or ``[*B, 1]``, or a
            function ``tensordict -> [*B]``.

    Keyword Args:
        top (float, optional): fraction of the drawable rows that starts are drawn from, in (0, 1];
            rows tied at its edge share what is left of it. 0.1 if no ``temperature`` is given.
        temperature (float, optional): draw proportionally to ``exp(score / temperature)`` instead.
        observation_keys (NestedKey or list of NestedKey): the model's observation keys.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of its range, or both ``top`` and ``temperature``; on call, a
            score that has not one number for each row.
        KeyError: on call, if the batch lacks a key.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379: traces start
    from states of high value, or estimated to have one.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> after = {"observation": torch.arange(4.0).reshape(4, 1)}
        >>> batch = TensorDict({"value_target": torch.arange(4.0), "next": after}, [4])
        >>> start = BestStarts("value_target", top=0.25)(batch, torch.Generator().manual_seed(0))
        >>> start["observation"].flatten()
        tensor([3., 3., 3., 3.])
    """

    top: float | None
    temperature: float | None

    def __init__(
        self,
        score: NestedKey | Score,
        *,
        top: float | None = None,
        temperature: float | None = None,
        observation_keys: NestedKey | Sequence[NestedKey] = "observation",
    ) -> None:
        if isinstance(score, TensorDictModuleBase):
            raise TypeError(
                "score must be a key or a function of the batch; give a value network to "
                "BestStarts.by_value."
            )
        is_key = isinstance(score, str | tuple)
        if not is_key and not callable(score):
            raise TypeError(f"score must be a key or a callable, got {type(score).__name__}.")
        chosen: Any = score
        self.score: Score = KeyScore(chosen) if is_key else chosen
        if top is not None and temperature is not None:
            raise ValueError("give top or temperature, not both.")
        if temperature is not None:
            temperature = check_real("temperature", temperature)
            if not 0 < temperature < math.inf:
                raise ValueError(f"temperature must be positive and finite, got {temperature}.")
        else:
            top = check_real("top", 0.1 if top is None else top, 0.0, 1.0, open_low=True)
        self.top, self.temperature = top, temperature
        self.observation_keys: list[NestedKey] = check_keys("observation_keys", observation_keys)

    @classmethod
    def by_value(
        cls,
        value_network: TensorDictModuleBase,
        *,
        gamma: float = 0.99,
        reward_key: NestedKey = ("next", "reward"),
        terminated_key: NestedKey = ("next", "terminated"),
        value_key: NestedKey = "state_value",
        **kwargs: Any,
    ) -> BestStarts:
        """Choose by a critic as it is at each call; see `NextValueScore`.

        Args:
            value_network (TensorDictModuleBase): the critic.

        Keyword Args:
            gamma (float): discount, in [0, 1].
            reward_key (NestedKey): as for `transition_value`.
            terminated_key (NestedKey): likewise.
            value_key (NestedKey): likewise.
            **kwargs: as for the constructor.

        Returns:
            BestStarts: the start source.

        Examples:
            >>> import torch
            >>> from tensordict.nn import TensorDictModule
            >>> critic = TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["state_value"])
            >>> BestStarts.by_value(critic, gamma=0.95, temperature=0.5).temperature
            0.5
        """
        keys = {
            "reward_key": reward_key,
            "terminated_key": terminated_key,
            "value_key": value_key,
        }
        return cls(NextValueScore(value_network, gamma=gamma, **keys), **kwargs)

    @classmethod
    def by_return(cls, key: NestedKey = "value_target", **kwargs: Any) -> BestStarts:
        """Choose by a return in the batch.

        Args:
            key (NestedKey): where it is: what GAE writes, or an episode's return.
            **kwargs: as for the constructor.

        Returns:
            BestStarts: the start source.

        Examples:
            >>> BestStarts.by_return(("next", "episode_reward"), top=0.2).score.key
            ('next', 'episode_reward')
        """
        return cls(KeyScore(key), **kwargs)

    @classmethod
    def by_reward(cls, key: NestedKey = ("next", "reward"), **kwargs: Any) -> BestStarts:
        """Choose by the reward of the step that led to the state.

        Args:
            key (NestedKey): where it is.
            **kwargs: as for the constructor.

        Returns:
            BestStarts: the start source.

        Examples:
            >>> BestStarts.by_reward().score.key
            ('next', 'reward')
        """
        return cls(KeyScore(key), **kwargs)

    @classmethod
    def by_td_error(cls, key: NestedKey = "td_error", **kwargs: Any) -> BestStarts:
        """Choose by the absolute TD error, as prioritised replay does.

        Args:
            key (NestedKey): where the loss writes it.
            **kwargs: as for the constructor.

        Returns:
            BestStarts: the start source.

        Examples:
            >>> BestStarts.by_td_error().score.absolute
            True
        """
        return cls(KeyScore(key, absolute=True), **kwargs)

    def __call__(self, tensordict: TensorDictBase, generator: torch.Generator) -> TensorDictBase:
        """Return a start for each row; see `StartStates`."""
        score = one_each(tensordict, self.score(tensordict).detach(), "score")
        states = {
            key: entry(tensordict, unravel_key(("next", key))) for key in self.observation_keys
        }
        eligible = unmasked_rows(tensordict) & finite_rows(score, score, *states.values())
        weights = self.weights(score.flatten(), eligible.flatten())
        rows = draw_rows(weights, tensordict.shape, generator)
        found = TensorDict({}, tensordict.shape, device=tensordict.device)
        for key, state in states.items():
            found.set(key, pick(state, tensordict.ndim, rows))
        return found.set(("collector", "mask"), eligible.any().expand(tensordict.shape).clone())

    def weights(self, score: Tensor, eligible: Tensor) -> Tensor:
        """Return how likely each row is drawn, up to a factor.

        Args:
            score (Tensor): ``[n]``.
            eligible (Tensor): ``[n]`` bool: which rows may be drawn.

        Returns:
            Tensor: ``[n]``, float64; all zero if no row may be drawn.
        """
        lowest = -math.inf
        score = torch.where(eligible, score.double(), lowest)
        if self.temperature is not None:
            best = torch.where(eligible.any(), score.max(), 0.0)
            return ((score - best) / self.temperature).exp()
        count = eligible.sum()
        assert self.top is not None
        # The decimal number that was written: in floats 0.1 * 30 is above 3. No host sync.
        fraction = Fraction(repr(self.top)).limit_denominator(10**9)
        kept = -(-fraction.numerator * count // fraction.denominator)
        kept = torch.maximum(kept, count.clamp_max(1))
        threshold = score.sort(descending=True).values.gather(0, (kept - 1).clamp_min(0)[None])
        above, tied = eligible & (score > threshold), eligible & (score == threshold)
        share = (kept - above.sum()).double() / tied.sum().clamp_min(1)
        return torch.where(tied, share, above.double())
