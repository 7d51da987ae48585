"""Save a training run and resume it: TorchRL's checkpoints, with what recall traces need of them.

Beside the data's way. `torchrl.checkpoint` writes to a hidden folder, then renames it; what is here
keeps two views of one storage from being saved twice, saves generators in place, and unpickles
nothing but tensors.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointRotation,
    GlobalRNGState,
    StateDictCheckpointAdapter,
)
from torchrl.data import ReplayBuffer

from torchrl_recall.checks import check_at_least_one, check_size

__all__ = ["RecallCheckpoint"]


class _PlainFile(StateDictCheckpointAdapter):
    """One file for each part, read back with ``weights_only=True``.

    Not the default memory maps: writing to one on a full disk kills the process.
    """

    def __init__(self) -> None:
        super().__init__("torch")

    def save(
        self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        path.mkdir(parents=True)
        state = component.state_dict(*args, **kwargs)
        with (path / self.state_torch).open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # What torch makes of a write that failed.
                raise OSError(f"{path / self.state_torch} cannot be written: {error}") from error
            # On the disk before the folder gets its name.
            file.flush()
            os.fsync(file.fileno())


class RecallCheckpoint:
    """Saves all parts of a run with one call, and restores them in place.

    Give it whatever has ``state_dict`` and ``load_state_dict`` (modules, losses, optimizers,
    environments, samplers), replay buffers, ``torch.Generator`` objects, and numbers or strings in
    a dict. Replay buffers that share a storage, such as a learner's and its recall view, save it
    once. A loss holds its networks' parameters: register the one or the other. The global
    generators of Python, NumPy and torch are always saved. On the CPU, with every part that changes
    registered and no prefetching, a resumed run goes on bit for bit.

    A checkpoint is a folder of its own, put in its place by renaming it: one that a killed process
    or a full disk left half-written is never loaded. One process may write to ``directory``.

    Args:
        directory (str or Path): where the checkpoints are kept, one folder each; made if missing.
        keep_last (int): how many of them to keep.
        **components: the parts, by name.

    Raises:
        TypeError: a part that cannot be saved.
        ValueError: ``keep_last`` below 1, no parts, or an empty string for ``directory``.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from torchrl_recall import BacktrackModel
        >>> from torchrl_recall.checkpoint import RecallCheckpoint
        >>> model, progress = BacktrackModel(3, 1, num_cells=(8,)), {"frames": 100}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     checkpoint = RecallCheckpoint(directory, model=model, progress=progress)
        ...     _ = checkpoint.save(step=100)
        ...     progress["frames"] = 0
        ...     checkpoint.load_latest(), progress
        (100, {'frames': 100})
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 2, **components: Any) -> None:
        keep_last = check_at_least_one("keep_last", keep_last)
        if not isinstance(directory, str | Path):
            raise TypeError(f"directory must be a path, got {type(directory).__name__}.")
        if directory == "":
            raise ValueError("directory is '', expected a path; '.' is the working directory.")
        if not components:
            raise ValueError("components must name at least one part to save, got none.")
        if "global_rng" in components:
            raise ValueError("components cannot have the name 'global_rng', which is taken.")
        self.rotation = CheckpointRotation(directory, keep_last=keep_last)
        self.checkpoint = Checkpoint()
        storages: list[Any] = []
        for name, part in components.items():
            self._register(name, part, storages)
        self._register("global_rng", GlobalRNGState(), storages)

    def _register(self, name: str, part: Any, storages: list[Any]) -> None:
        if isinstance(part, torch.Generator):
            part = _GeneratorState(part)
        elif isinstance(part, ReplayBuffer):
            shares = any(part.storage is storage for storage in storages)
            storages.append(part.storage)
            part = _ViewState(part) if shares else _BufferState(part)
        elif isinstance(part, Mapping):
            self.checkpoint.register(name, part)
            return
        elif isinstance(part, type) or not (
            hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
        ):
            raise TypeError(
                f"{name} is a {type(part).__name__}, expected something with state_dict and "
                "load_state_dict, a replay buffer, a torch.Generator or a dict."
            )
        self.checkpoint.register(name, part, adapter=_PlainFile())

    def save(self, step: int, metadata: dict[str, Any] | None = None) -> Path:
        """Save all parts.

        Args:
            step (int): what this checkpoint is called by and ordered by, larger than those before.
            metadata (dict, optional): numbers and strings to note beside it.

        Returns:
            Path: the new folder.

        Raises:
            ValueError: a checkpoint of this or a later step is there.
            OSError: it cannot be written; the ones before are as they were.
        """
        step = check_size("step", step)
        if not (metadata is None or isinstance(metadata, dict)):
            raise TypeError(f"metadata must be a dict, got {type(metadata).__name__}.")
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(
                f"step is {step}, but {self.rotation.directory} has a checkpoint of step {latest}; "
                "load it, or use another directory."
            )
        return self.rotation.save(self.checkpoint, step=step, metadata=metadata)

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None if there is none."""
        latest = self.rotation.latest()
        return None if latest is None else int(latest.name.rpartition("-")[2])

    def load_latest(self) -> int | None:
        """Restore all parts from the newest complete checkpoint.

        Returns:
            int or None: its step; None if there is none, and nothing is changed.

        Raises:
            CheckpointError: the checkpoint lacks a part, or one does not fit.
        """
        self._clear_leftovers()
        step = self.latest_step()
        if step is not None:
            self.rotation.load_latest(self.checkpoint)
        return step

    def _clear_leftovers(self) -> None:
        """Remove what processes left that were killed while they saved."""
        prefix = f".{self.rotation.prefix}-"
        for kind in ("stage", "delete", "backup"):
            for path in self.rotation.directory.glob(f"{prefix}*.{kind}-*"):
                shutil.rmtree(path, ignore_errors=True)


class _GeneratorState:
    """A generator's state, restored in place: others may hold the same object."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        self.generator.set_state(state_dict["state"].cpu())


class _BufferState:
    """A replay buffer with its storage; its generator stays the object it was."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        generator = self.buffer._rng
        self.buffer.load_state_dict(dict(state_dict))
        saved = state_dict.get("_rng")
        if generator is not None and saved is not None:
            generator.set_state(saved[0].cpu())
            self.buffer.set_rng(generator=generator)


class _ViewState:
    """What a second view on a storage has of its own: its sampler and its transform."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer

    def state_dict(self) -> dict[str, Any]:
        return {
            "sampler": self.buffer.sampler.state_dict(),
            "transform": self.buffer.transform.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.buffer.sampler.load_state_dict(state_dict["sampler"])
        self.buffer.transform.load_state_dict(state_dict["transform"])
