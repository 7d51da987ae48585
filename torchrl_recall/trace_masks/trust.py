"""Keep the steps that other knowledge confirms: an ensemble, a forward model, the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_recall.checks import (
    check_at_least_one,
    check_flag,
    check_keys,
    check_network,
    check_real,
)
from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.disagreement import disagreement
from torchrl_recall.state_reading import entry, read_states, stored_data
from torchrl_recall.trace_masks.mask import Scale, StateScale, require_floating, until_bad


class Disagreement:
    """Cut a trace where the members of an ensemble disagree about what came before.

    Keeps a trace, walking backwards, until the first step whose disagreement (see
    `torchrl_recall.model.disagreement`) exceeds the threshold: what follows builds on it, so that
    step and all older ones are left out.

    Args:
        model (BacktrackModel): an ensemble, shared, not owned; it runs without gradient.

    Keyword Args:
        max_disagreement (float, optional): the threshold, at least 0. None: `calibrate` sets it.

    Raises:
        TypeError: not a model, or no number.
        ValueError: a model of one member, or a negative threshold.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_recall import BacktrackModel
        >>> model = BacktrackModel(3, 1, num_cells=(32,), num_members=3)
        >>> data = TensorDict({"observation": torch.randn(40, 3), "action": torch.zeros(40, 1),
        ...                    "next": {"observation": torch.randn(40, 3)}}, [40])
        >>> mask = Disagreement(model)
        >>> _ = mask.calibrate(data, quantile=1.0)
        >>> mask(data.reshape(4, 10)).shape
        torch.Size([4, 10])
    """

    def __init__(self, model: BacktrackModel, *, max_disagreement: float | None = None) -> None:
        if not isinstance(model, BacktrackModel):
            raise TypeError(f"model must be a BacktrackModel, got {type(model).__name__}.")
        if model.num_members < 2:
            raise ValueError("model has num_members=1, expected an ensemble of at least 2.")
        self.model = model
        if max_disagreement is not None:
            max_disagreement = check_real("max_disagreement", max_disagreement, 0.0)
        self.max_disagreement = max_disagreement

    @torch.no_grad()
    def calibrate(self, data: Any, quantile: float = 0.95, *, num_rows: int = 65_536) -> float:
        """Set the threshold to a quantile of the disagreement about real transitions.

        Args:
            data (TensorDictBase, Storage or ReplayBuffer): real transitions; of a buffer what is
                stored, past its transforms. Rows masked at ``("collector", "mask")`` do not count.
            quantile (float): in [0, 1]; 0.95 takes every 20th real step for one to cut.

        Keyword Args:
            num_rows (int): of more rows than this, evenly spaced ones are looked at, over all
                dimensions of the data.

        Returns:
            float: the threshold.

        Raises:
            KeyError: a key of the model is missing.
            TypeError: none of these kinds of data.
            ValueError: an argument out of its range, no row that counts, or rows not finite.
        """
        quantile = check_real("quantile", quantile, 0.0, 1.0)
        num_rows = check_at_least_one("num_rows", num_rows)
        source: Any = stored_data(data)
        keys = [*self.model.in_keys, ("collector", "mask")]
        source = _spread_rows(source.select(*keys, strict=False), num_rows)
        mask = source.get(("collector", "mask"), default=None)
        if mask is not None:
            source = source[mask.reshape(source.shape).bool()]
        if source.shape.numel() == 0:
            raise ValueError(
                f"data has no row to look at: all {mask.numel()} are masked at "  # pyright: ignore
                "('collector', 'mask'), expected real transitions."
            )
        _, action, next_state = self.model.read(source)
        found = disagreement(self.model, action, next_state).flatten()
        self.max_disagreement = float(torch.quantile(found, quantile))
        return self.max_disagreement

    @torch.no_grad()
    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return which steps to keep, ``[*B, T]``, of traces ``[*B, T]``.

        Raises:
            RuntimeError: no threshold yet.
        """
        if self.max_disagreement is None:
            raise RuntimeError(
                "max_disagreement is not set: got None, expected a number; pass one or call "
                "calibrate(data)."
            )
        model = self.model
        action = model.action.read(trace, model.action_key, model.device)
        next_state = model.observation.read(trace, model.next_observation_keys)
        return until_bad(disagreement(model, action, next_state) <= self.max_disagreement)

    def state_dict(self) -> dict[str, float | None]:
        """Return the threshold; the model is saved by whoever owns it."""
        return {"max_disagreement": self.max_disagreement}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state_dict (dict): what `state_dict` returned.
        """
        self.max_disagreement = state_dict["max_disagreement"]


class ForwardAgreement:
    """Keep the steps that a forward model agrees with: from ``(s_t, a_t)`` it predicts ``s_{t+1}``.

    A step is kept if the root mean square over coordinates of ``(predicted - s_{t+1}) / scale`` is
    at most ``tolerance``; with ``relative=True``, at most ``tolerance`` times that of the step
    itself, ``(s_{t+1} - s_t) / scale``. A prediction that is not finite does not agree.

    Args:
        forward_model (TensorDictModuleBase): shared, not owned; reads observations and action,
            writes the predicted next observations; runs as it is, without gradient, once.
        tolerance (float): at least 0.

    Keyword Args:
        scale (float, Tensor or BacktrackModel): what coordinates are divided by; a model's running
            standard deviation is read anew at each call.
        relative (bool): measure in lengths of the step.
        cut (bool): leave out what is older than a step that does not agree, too.
        in_keys (NestedKey or list of NestedKey): the observations to compare, without ``"next"``
            (a tuple is one nested key).
        prediction_keys (NestedKey or list of NestedKey, optional): where the forward model writes
            them, one for each of ``in_keys``. Defaults to all its ``out_keys``.

    Raises:
        TypeError: arguments of the wrong type, or at the first call, discrete states.
        ValueError: a negative tolerance, or keys that do not match.

    Source: after Lyu et al., *Double Check Your State Before Trusting It* (CABI), NeurIPS 2022,
    https://arxiv.org/abs/2206.07989.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> forward = TensorDictModule(
        ...     lambda s, a: s + a, ["observation", "action"], [("next", "observation")])
        >>> walk = torch.tensor([[0.0], [1.0], [3.0]])
        >>> trace = TensorDict({"observation": walk[:-1], "action": torch.ones(2, 1),
        ...                     "next": {"observation": walk[1:]}}, [2])
        >>> ForwardAgreement(forward, 0.1)(trace), ForwardAgreement(forward, 0.1, cut=True)(trace)
        (tensor([ True, False]), tensor([False, False]))
    """

    relative: bool
    cut: bool

    def __init__(
        self,
        forward_model: TensorDictModuleBase,
        tolerance: float,
        *,
        scale: Scale = 1.0,
        relative: bool = False,
        cut: bool = False,
        in_keys: NestedKey | Sequence[NestedKey] = "observation",
        prediction_keys: NestedKey | Sequence[NestedKey] | None = None,
    ) -> None:
        self.forward_model: TensorDictModuleBase = check_network("forward_model", forward_model)
        self.tolerance: float = check_real("tolerance", tolerance, 0.0)
        self.scale: StateScale = StateScale(scale)
        self.relative, self.cut = check_flag("relative", relative), check_flag("cut", cut)
        self.in_keys: list[NestedKey] = check_keys("in_keys", in_keys)
        outputs: Any = list(forward_model.out_keys) if prediction_keys is None else prediction_keys
        self.prediction_keys: list[NestedKey] = check_keys("prediction_keys", outputs)
        if len(self.prediction_keys) != len(self.in_keys):
            raise ValueError(
                f"prediction_keys {self.prediction_keys} must match in_keys {self.in_keys} one for "
                "one."
            )

    @torch.no_grad()
    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return which steps to keep, ``[*B, T]``, of traces ``[*B, T]``.

        Raises:
            KeyError: a key is not in the trace.
            TypeError: discrete states.
            ValueError: predictions of another shape than the states.
        """
        inputs = TensorDict({}, trace.shape, device=trace.device)
        for key in self.forward_model.in_keys:
            inputs.set(key, entry(trace, key, "the trace"))
        predicted = read_states(self.forward_model(inputs), self.prediction_keys)
        after = read_states(trace, [unravel_key(("next", key)) for key in self.in_keys])
        require_floating("ForwardAgreement", after)
        if predicted.shape != after.shape:
            raise ValueError(
                f"prediction_keys hold states of {tuple(predicted.shape)}, expected "
                f"{tuple(after.shape)}."
            )
        scale = self.scale(after)
        error = _length((predicted - after) / scale)
        bound = self.tolerance
        if self.relative:
            bound = bound * _length((after - read_states(trace, self.in_keys)) / scale)
        good = error <= bound
        return until_bad(good) if self.cut else good


class InSupport:
    """Cut a trace where it leaves the data.

    Keeps a trace, walking backwards, until the first step whose state ``s_t`` is outside; that step
    and all older ones are left out. The end of the trace is not asked: it may be a goal that no one
    has reached yet. To draw traces that leave less often, see ``support`` of `BacktrackTransform`.

    Args:
        support (callable): from a trace ``[*B, T]`` (a TensorDict) to ``[*B, T]`` bool, such as
            `DataSupport` and `CellSupport`; shared, not owned.

    Raises:
        TypeError: not callable.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> walk = torch.tensor([[0.1], [2.0], [0.2], [0.3]])
        >>> trace = TensorDict({"observation": walk[:-1], "next": {"observation": walk[1:]}}, [3])
        >>> InSupport(lambda data: data["observation"].squeeze(-1) < 1)(trace)
        tensor([False, False,  True])
    """

    def __init__(self, support: Callable[[TensorDictBase], Tensor]) -> None:
        if not callable(support):
            raise TypeError(f"support must be callable, got {type(support).__name__}.")
        self.support = support

    @torch.no_grad()
    def __call__(self, trace: TensorDictBase) -> Tensor:
        """Return which steps to keep, ``[*B, T]``, of traces ``[*B, T]``.

        Raises:
            ValueError: not one bool for each step.
        """
        inside = self.support(trace)
        if inside.dtype != torch.bool or inside.shape != trace.shape:
            raise ValueError(
                f"support gave {inside.dtype} of shape {tuple(inside.shape)}, expected bool of "
                f"{tuple(trace.shape)}."
            )
        return until_bad(inside)


def _spread_rows(data: TensorDictBase, number: int) -> TensorDictBase:
    """Return at most ``number`` rows ``[n]`` of data ``[*B]``, evenly spaced over all of it."""
    count, inner = data.shape.numel(), data.shape[1:].numel()
    step = -(-count // number)
    while math.gcd(step, inner) > 1:  # or the same times, or environments, would come each time
        step += 1
    if step == 1:
        return data.reshape(-1)
    index = torch.arange(0, count, step, device=data.device)
    found: Any = data[torch.unravel_index(index, data.shape)]
    return found


def _length(change: Tensor) -> Tensor:
    """Root mean square over coordinates."""
    return change.square().mean(-1).sqrt()
