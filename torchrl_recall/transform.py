"""`BacktrackTransform`: adds recall traces to what a replay buffer samples.

It stands between the sampler, which picks high-value transitions, and `RecallTraceLoss`, which
imitates the traces that lead there.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.transforms import Transform

from torchrl_recall.checks import (
    check_at_least_one,
    check_choice,
    check_flag,
    check_key,
    check_keys,
    check_real,
)
from torchrl_recall.generators import (
    carry_generator,
    follow_device,
    own_generator,
    unpack_generator,
)
from torchrl_recall.masking import blank_rows, one_each
from torchrl_recall.model import BacktrackModel
from torchrl_recall.model.observation import sorted_keys
from torchrl_recall.starts import StartStates
from torchrl_recall.trace_masks import TraceMask
from torchrl_recall.traces import sample_traces
from torchrl_recall.traces.backends import BACKENDS, Backend
from torchrl_recall.traces.candidates import Support
from torchrl_recall.traces.request import PRECISIONS, Precision


class BacktrackTransform(Transform):
    """Samples recall traces that lead to the next state of every sampled transition.

    Append it to a replay buffer: each ``sample()`` then carries a nested TensorDict at ``"trace"``,
    an ordinary rollout of batch ``[*B, T]`` (``[*B, N, T]`` with ``num_traces=N``), oldest step
    first, whose last step leads into the sampled transition's next state. Steps that are not worth
    imitating are masked at ``("trace", "collector", "mask")``, which TorchRL's losses obey.

    As a collector's ``postproc`` it works with ``Collector`` and ``MultiSyncCollector``. On an
    environment it does nothing. The model is shared, not owned: it stays out of ``parameters()``,
    ``state_dict()`` and ``to()`` of the transform; so do ``start``, ``masks`` and ``support``.

    Observations that no model takes as they are (images, continuous and discrete keys together) go
    through an `EncoderTransform` first. ``HERReplayBuffer`` changes goals after its transforms have
    run: where goals are part of the state, call the transform on what that buffer has sampled.

    Args:
        model (BacktrackModel): the model to walk with, as it is at each call.

    Keyword Args:
        num_steps (int): length ``T`` of the traces; set it at any time, see `TraceLengthScheduler`.
        num_traces (int, optional): number ``N`` of traces for each transition.
        in_keys (NestedKey or list of NestedKey, optional): where to read the states that traces end
            in, one key for each of the model's observation keys. Defaults to ``("next",
            observation)``.
        out_keys (NestedKey or list of NestedKey): where to write the traces.
        last_visit (bool): keep a step only if its state is not visited again later in the trace
            (for discrete states and lattices).
        start (StartStates, optional): where traces start, instead of the sampled transitions' next
            states; see `torchrl_recall.starts`. What a row holds is then not of its trace.
        masks (sequence of TraceMask): what else to leave out; see `torchrl_recall.trace_masks`.
        support (callable, optional): keeps traces inside the data; as for `sample_traces`, see
            `torchrl_recall.support`.
        num_candidates (int): predecessors drawn for each step, with ``support``.
        min_value (float, optional): mask traces whose start has a value below this.
        value_key (NestedKey): where to read that value, ``[*B]`` or ``[*B, 1]``.
        generator (torch.Generator, optional): source of randomness, on the model's device. By
            default an own one, seeded from torch's; it is saved in ``state_dict()``. Under
            ``torch.compile``, whose graphs take no generators, torch's own is drawn from instead
            (with ``start``, which is handed the generator, the graph breaks, and it serves on).
        backend (str): backend of `sample_traces`.
        precision (str): precision of `sample_traces`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: lengths below 1, or keys that do not match the model.

    Non-finite start states (such as the gaps that ``NextStateReconstructor`` leaves) and padding,
    masked at ``("collector", "mask")``, give a masked trace with finite entries.

    A start that the model's stop head takes for an episode's first state gives a masked trace, too.

    Source: Goyal et al., *Recall Traces*, ICLR 2019, https://arxiv.org/abs/1804.00379.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl_recall import BacktrackModel, BacktrackTransform
        >>> model = BacktrackModel(3, 1, num_cells=(32, 32))
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(10), batch_size=4,
        ...     transform=BacktrackTransform(model, num_steps=8))
        >>> _ = buffer.extend(TensorDict({"next": {"observation": torch.randn(10, 3)}}, [10]))
        >>> buffer.sample()["trace"].shape
        torch.Size([4, 8])
    """

    model: BacktrackModel
    start: StartStates | None
    masks: list[TraceMask]
    support: Support | None

    def __init__(
        self,
        model: BacktrackModel,
        *,
        num_steps: int,
        num_traces: int | None = None,
        in_keys: NestedKey | Sequence[NestedKey] | None = None,
        out_keys: NestedKey | Sequence[NestedKey] | None = None,
        start: StartStates | None = None,
        last_visit: bool = True,
        masks: Sequence[TraceMask] = (),
        support: Support | None = None,
        num_candidates: int = 4,
        min_value: float | None = None,
        value_key: NestedKey = "value_target",
        generator: torch.Generator | None = None,
        backend: Backend = "auto",
        precision: Precision = "float32",
    ) -> None:
        if not isinstance(model, BacktrackModel):
            raise TypeError(f"model must be a BacktrackModel, got {type(model).__name__}.")
        if start is not None:
            if in_keys is not None or min_value is not None:
                raise ValueError(
                    "start supplies the states, so in_keys and min_value, which read them from "
                    "the batch, cannot be given beside it."
                )
            if not callable(start):
                raise TypeError(f"start must be a StartStates, got {type(start).__name__}.")
            in_keys = []
        elif in_keys is None:
            in_keys = model.next_observation_keys
        else:
            in_keys = check_keys("in_keys", in_keys)
        out_keys = ["trace"] if out_keys is None else check_keys("out_keys", out_keys)
        if start is None and len(in_keys) != len(model.observation_keys):
            raise ValueError(
                f"in_keys {in_keys} must match the model's {model.observation_keys} one for one."
            )
        if len(out_keys) != 1:
            raise ValueError(f"out_keys must name one key for the traces, got {out_keys}.")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        if not isinstance(masks, Sequence):
            raise TypeError(f"masks must be a sequence of TraceMasks, got {type(masks).__name__}.")
        # In __dict__, or buffers would move it, switch it to eval and save it a second time.
        self.__dict__.update(model=model, start=start, masks=list(masks), support=support)
        for mask in self.masks:
            if not callable(mask):
                raise TypeError(f"masks must hold TraceMasks, got a {type(mask).__name__}.")
        if support is not None and not callable(support):
            raise TypeError(f"support must be callable, got {type(support).__name__}.")
        self.num_candidates: int = check_at_least_one("num_candidates", num_candidates)
        self.num_steps = num_steps
        self.num_traces: int | None = (
            None if num_traces is None else check_at_least_one("num_traces", num_traces)
        )
        self.last_visit: bool = check_flag("last_visit", last_visit)
        self.value_key: NestedKey = check_key("value_key", value_key)
        self.backend: Backend = check_choice("backend", backend, BACKENDS)
        self.precision: Precision = check_choice("precision", precision, PRECISIONS)
        if min_value is not None:
            min_value = check_real("min_value", min_value)
        self.min_value = min_value
        self.generator = own_generator(generator, model.device)

    @property
    def num_steps(self) -> int:
        """Length ``T`` of the traces; set it at any time, traces drawn ahead keep theirs."""
        return self._num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int) -> None:
        self._num_steps = check_at_least_one("num_steps", num_steps)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the traces of every row of ``tensordict`` at the out key.

        Args:
            tensordict (TensorDictBase): sampled transitions, any batch shape ``*B``.

        Returns:
            TensorDictBase: the same object with the traces (a shallow copy of a lazy stack).

        Raises:
            KeyError: a key is missing, unless ``missing_tolerance`` is set.
            ValueError: empty data, or wrong shapes, dtypes or devices.
        """
        if not isinstance(tensordict, TensorDictBase):
            raise TypeError(f"the data must be a TensorDict, got {type(tensordict).__name__}.")
        missing = [key for key in self.in_keys if tensordict.get(key, default=None) is None]
        if missing:
            if self.missing_tolerance:
                return tensordict
            raise KeyError(
                f"in_keys {missing} are missing from the data, which has {sorted_keys(tensordict)}."
            )
        if tensordict.shape.numel() == 0:
            raise ValueError(f"the data is empty: batch size {tuple(tensordict.shape)}.")
        if isinstance(tensordict, LazyStackedTensorDict):
            # Its parts may be a storage's own rows, which must not come to hold traces.
            tensordict = tensordict.copy()
        # Inside forward: grad mode is thread-local, and prefetch threads start with it on.
        with torch.no_grad():
            tensordict.set(self.out_keys[0], self._traces(tensordict))
        return tensordict

    def _traces(self, tensordict: TensorDictBase) -> TensorDict:
        start, eligible = self._starts(tensordict)
        if start.is_floating_point():
            finite = torch.isfinite(start).all(-1)
            start = torch.where(finite.unsqueeze(-1), start, torch.zeros_like(start))
            eligible = finite if eligible is None else eligible & finite
        # A graph of `torch.compile` cannot take a generator in.
        in_graph = self.start is None and torch.compiler.is_compiling()
        trace = sample_traces(
            self.model,
            self.model.observation.restore(start),
            num_steps=self.num_steps,
            num_traces=self.num_traces,
            last_visit=self.last_visit,
            generator=None if in_graph else self._generator(),
            backend=self.backend,
            precision=self.precision,
            support=self.support,
            num_candidates=self.num_candidates,
        )
        kept = trace.get(("collector", "mask"))
        if eligible is not None:
            kept &= eligible.reshape(*eligible.shape, *[1] * (kept.ndim - eligible.ndim))
        for mask in self.masks:
            kept &= _checked_mask(mask(trace), mask, kept)
        if any(name is not None for name in tensordict.names):
            # A rollout names its dimensions, and TensorDict cannot extend the names by itself.
            trace.names = [*tensordict.names, *[None] * (trace.ndim - tensordict.ndim)]
        return trace

    def _starts(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None]:
        """Return flat start states ``[*B, size]``, and which are eligible; None is all."""
        codec = self.model.observation
        if self.start is not None:
            found = self.start(tensordict, self._generator())
            if not isinstance(found, TensorDictBase) or found.shape != tensordict.shape:
                came = getattr(found, "shape", type(found).__name__)
                raise ValueError(
                    f"start must return a TensorDict of batch {tuple(tensordict.shape)}, got "
                    f"{came}."
                )
            eligible = found.get(("collector", "mask"), default=None)
            if eligible is not None:
                eligible = one_each(found, eligible, "start's ('collector', 'mask')").bool()
                found = blank_rows(found, eligible, self.model, codec.keys)
            return codec.read(found, require_finite=False), eligible
        data, eligible = tensordict, tensordict.get(("collector", "mask"), default=None)
        if eligible is not None:
            # Padding is not a place to go back from, and need not be valid.
            eligible = one_each(tensordict, eligible, "('collector', 'mask')").bool()
            data = blank_rows(tensordict, eligible, self.model, self.in_keys)
        if self.min_value is not None:
            reached = self._start_value(tensordict) >= self.min_value
            eligible = reached if eligible is None else eligible & reached
        return codec.read(data, self.in_keys, require_finite=False), eligible

    def _start_value(self, tensordict: TensorDictBase) -> Tensor:
        value = tensordict.get(self.value_key, default=None)
        if value is None:
            raise KeyError(
                f"value_key {self.value_key!r}, needed for min_value, is missing from the data, "
                f"which has {sorted_keys(tensordict)}."
            )
        return one_each(tensordict, value, f"value_key {self.value_key!r}")

    def _generator(self) -> torch.Generator:
        self.generator: torch.Generator = follow_device(self.generator, self.model.device)
        return self.generator

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict

    def transform_output_spec(self, output_spec: Any) -> Any:
        """Leave the environment's specs as they are: there the transform does nothing.

        Args:
            output_spec (Composite): the environment's.

        Returns:
            Composite: the same.
        """
        return output_spec

    def get_extra_state(self) -> Tensor:
        """Return the state of the generator."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of the generator.

        Args:
            state (Tensor): what `get_extra_state` returned, uint8 ``[bytes]``.
        """
        self._generator().set_state(state.cpu())

    def __getstate__(self) -> dict[str, Any]:
        return carry_generator(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(unpack_generator(state))

    def __deepcopy__(self, memo: dict[int, Any]) -> BacktrackTransform:
        _refuse_async_collector()
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new


def _checked_mask(kept: Tensor, mask: TraceMask, expected: Tensor) -> Tensor:
    """Return what a mask said, if it is one bool for each step."""
    if not isinstance(kept, Tensor):
        raise TypeError(
            f"{type(mask).__name__} in masks gave a {type(kept).__name__}, expected a bool tensor."
        )
    if kept.dtype != torch.bool or kept.shape != expected.shape:
        raise ValueError(
            f"{type(mask).__name__} in masks gave {kept.dtype} of shape {tuple(kept.shape)}, "
            f"expected bool of {tuple(expected.shape)}."
        )
    return kept


def _refuse_async_collector() -> None:
    # Nothing public tells that collector's copy from any other.
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").endswith("collectors._multi_async"):
            raise TypeError(
                "MultiAsyncCollector deep-copies its postproc, so a BacktrackTransform there would "
                "go on with frozen weights; append it to the replay buffer instead."
            )
        frame = frame.f_back
