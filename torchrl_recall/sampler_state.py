"""What a `ValuePrioritizedSampler` holds, and how that survives: state, files, pickles, copies.

`sampler.py` builds TorchRL's sampler on it.
"""

from __future__ import annotations

import json
import math
import threading
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import torch
from tensordict import MemoryMappedTensor
from torch import Tensor
from torchrl.data import PrioritizedSampler

from torchrl_recall.checks import check_size, check_tensor
from torchrl_recall.native import interface
from torchrl_recall.priorities.levels import TorchPriorities
from torchrl_recall.priorities.native import NativePriorities
from torchrl_recall.priorities.trajectory_draws import TrajectoryDraws
from torchrl_recall.priorities.weights import Parameters, checked_parameter

# "No value yet"; exact in float32, through which TorchRL passes `default_priority`.
NO_VALUE = torch.finfo(torch.float32).min
DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}
_VERSION = 2


def checked_parameters(parameters: dict[str, Any]) -> Parameters:
    """Return parameters, each checked."""
    return Parameters(**{name: checked_parameter(name, x) for name, x in parameters.items()})


def backend_on(device: torch.device | None) -> type[NativePriorities] | type[TorchPriorities]:
    """Return what keeps values there: the C library where it can, else torch operations."""
    on_cpu = torch.empty(0, device=device).device.type == "cpu"
    return NativePriorities if on_cpu and interface.load()[0] is not None else TorchPriorities


class SavedSampler(PrioritizedSampler):
    """A prioritised sampler without TorchRL's trees, and its persistence."""

    dtype: torch.dtype
    _parameters: Parameters
    _beta: float
    _max_capacity: int
    _priorities: NativePriorities | TorchPriorities
    _trajectories: TrajectoryDraws | None
    _oldest: int  # entry, where the ring of a storage is written next
    _lock: Any

    @property
    def device(self) -> torch.device:
        """Where the values live."""
        return self._priorities.values.device

    @property
    def values(self) -> Tensor:
        """A copy of the values, ``[max_size]``; ``-inf``: no value yet, NaN: never drawn."""
        with self._lock:
            return self._priorities.values.clone()

    def _hold(self, values: Tensor) -> None:
        """Start from values; ``-inf``: no value yet, NaN: never drawn."""
        self._priorities = self._holding(values, self._max_capacity)
        self._trajectories = None

    def _holding(self, values: Tensor, capacity: int) -> NativePriorities | TorchPriorities:
        priorities = backend_on(values.device)(capacity, self.dtype, values.device)
        priorities.restore(values)
        return priorities

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the values and parameters, as tensors and Python scalars."""
        with self._lock:
            return {
                "_schema_version": _VERSION,
                "_values": self.values,
                "_oldest": self._oldest,
                "beta": self.beta,
                **self._parameters._asdict(),
            }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in this sampler's dtype and on its device.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if the version is unknown or an entry is out of its range.
        """
        # First, as a state of another version may also have other entries.
        version = state_dict.get("_schema_version", _VERSION)
        if not isinstance(version, int) or version != _VERSION:
            raise ValueError(f"_schema_version must be {_VERSION}, got {version!r}")
        names = ("_schema_version", "_values", "_oldest", "beta", *Parameters._fields)
        missing = [name for name in names if name not in state_dict]
        if missing:
            raise KeyError(f"state_dict lacks {missing}; is it from a ValuePrioritizedSampler?")
        parameters = checked_parameters({name: state_dict[name] for name in Parameters._fields})
        beta = checked_parameter("beta", state_dict["beta"])
        saved = check_tensor("_values", state_dict["_values"]).detach()
        if saved.ndim != 1 or not saved.is_floating_point() or not saved.numel():
            raise ValueError(
                f"_values must be floats of shape [n], got {saved.dtype} of {tuple(saved.shape)}"
            )
        oldest = check_size("_oldest", state_dict["_oldest"])
        values = saved.to(self._priorities.values)
        # A float64 value may be too large for float32.
        values = values.masked_fill(values.isinf() & (saved != -math.inf).to(self.device), math.nan)
        capacity = max(self._max_capacity, values.numel())
        with self._lock:
            # All at last: where memory runs out, what was there stays.
            self._priorities = self._holding(values, capacity)
            self._parameters, self._beta, self._oldest = parameters, beta, oldest
            self._max_capacity, self._trajectories = capacity, None

    def dumps(self, path: Any) -> None:  # pyright: ignore
        """Write the state into the folder ``path``: a memory-mapped tensor and a JSON file."""
        folder = Path(path).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        values = state.pop("_values").cpu()
        MemoryMappedTensor.from_tensor(values, filename=folder / "values.memmap", existsok=True)
        state |= {"capacity": values.numel(), "dtype": str(values.dtype)}
        (folder / "sampler_metadata.json").write_text(json.dumps(state))

    def loads(self, path: Any) -> None:  # pyright: ignore
        """Restore what `dumps` wrote."""
        folder = Path(path).absolute()
        state = json.loads((folder / "sampler_metadata.json").read_text())
        values = MemoryMappedTensor.from_filename(
            folder / "values.memmap",
            DTYPES[state.pop("dtype")],
            torch.Size([state.pop("capacity")]),
        )
        self.load_state_dict({**state, "_values": values})

    def __getstate__(self) -> Any:
        if get_spawning_popen() is not None:
            raise RuntimeError(
                f"A {type(self).__name__} cannot be sent to another process: values set in one "
                "would not reach the other. Keep it with the learner; give workers a RandomSampler."
            )
        with self._lock:
            state = {**self.__dict__, "_rng": None, "_trajectories": None, "_lock": None}
            # A copy: a pickle may be written while values change.
            return {**state, "_priorities": None, "_kept": self._priorities.values.clone()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        values = state.pop("_kept")
        vars(self).update(state)
        self._lock = threading.RLock()
        self._hold(values)
