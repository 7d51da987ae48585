"""Results of entries: one JSON file a run, and what made it."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

from bench.learning.entry import Entry
from bench.machine import RESULTS, describe, version_of
from bench.result_files import write_result

FOLDER = RESULTS / "learning"
ROOT = RESULTS.parent.parent
CODE = ("torchrl_recall", "bench/learning", ":(exclude)*.md")
# A run says with which of these it was made, where they are.
SIMULATORS = ("gymnasium", "mujoco")
MEASURED = ("steps", "score", "seconds", "solved_at", "log")


def path_of(folder: Path, entry: Entry, seed: int) -> Path:
    """Return where a run's result is."""
    return folder / entry.task / entry.algorithm / entry.variant / f"{seed}.json"


def provenance() -> dict[str, Any]:
    """Return what a run is made with: commit, machine and versions."""
    machine = describe()
    return {
        "commit": commit(),
        "machine": f"{machine['processor']} x{machine['count']}",
        "versions": {name: machine[name] for name in ("torch", "torchrl", "python")}
        | {name: found for name in SIMULATORS if (found := version_of(name))},
    }


def commit() -> str:
    """Return the commit of the checkout, with a mark if its code has been changed since."""
    found = _git("rev-parse", "HEAD")
    if found is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", *CODE)
    return f"{found[:12]}{'+changes' if changed else ''}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def save(
    folder: Path, entry: Entry, seed: int, measured: dict[str, Any], made: dict[str, Any]
) -> dict[str, Any]:
    """Write a run's result and return it.

    Args:
        folder: of all results.
        entry: what was run.
        seed: with which seed.
        measured: what `Entry.train` returned.
        made: what `provenance` said when the runs began.

    Raises:
        ValueError: what was measured is not as `Entry` says.
    """
    check(entry, measured)
    result = {
        "task": entry.task,
        "algorithm": entry.algorithm,
        "variant": entry.variant,
        "seed": seed,
        "definition": entry.full_definition,
        **made,
        "steps": [int(step) for step in measured["steps"]],
        "score": [round(float(score), 6) for score in measured["score"]],
        "seconds": [round(float(second), 3) for second in measured["seconds"]],
        "solved_at": measured["solved_at"],
        "log": measured["log"],
    }
    write_result(path_of(folder, entry, seed), result, indent=None)
    return result


def check(entry: Entry, measured: dict[str, Any]) -> None:
    """Refuse what is not as `Entry` says.

    Raises:
        ValueError: an entry is missing, lengths differ, steps do not rise, or a score is out of
            range.
    """
    missing = [name for name in MEASURED if name not in measured]
    if missing:
        raise ValueError(f"{entry.task} {entry.name} returned no {missing}.")
    steps, score, seconds = (measured[name] for name in MEASURED[:3])
    if not len(steps) == len(score) == len(seconds) > 0:
        raise ValueError(
            f"steps, score and seconds must be equally long, got {len(steps)}, {len(score)} and "
            f"{len(seconds)} of {entry.task} {entry.name}."
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(f"steps of {entry.task} {entry.name} must rise.")
    low, high = entry.definition.get("score_range", (0.0, 1.0))
    # Written so that NaN fails as well.
    outside = [value for value in score if not low - 1e-6 <= value <= high + 1e-6]
    if outside:
        raise ValueError(
            f"scores of {entry.task} {entry.name} must lie in {low} to {high}, got {outside[0]}."
        )


def load(folder: Path, entry: Entry) -> list[dict[str, Any]]:
    """Read what has been run of an entry's seeds, by seed.

    Raises:
        ValueError: a file is damaged, or its run was made with another definition than the entry
            has now.
    """
    runs = []
    for seed in sorted(entry.seeds):
        file = path_of(folder, entry, seed)
        if not file.exists():
            continue
        run = _read(file, entry, seed)
        if run["definition"] != entry.full_definition:
            old, new = run["definition"], entry.full_definition
            keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            raise ValueError(
                f"{file} is stale: it was run with another definition than {entry.task} "
                f"{entry.name} has now; they differ in {keys}."
            )
        runs.append(run)
    return runs


def _read(file: Path, entry: Entry, seed: int) -> dict[str, Any]:
    try:
        run = json.loads(file.read_text())
        named = {"task": entry.task, "algorithm": entry.algorithm, "variant": entry.variant}
        for name, expected in {**named, "seed": seed}.items():
            if run[name] != expected:
                raise ValueError(f"{name} is {run[name]!r}, not {expected!r}")
        if run["definition"] == entry.full_definition:
            check(entry, run)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}.") from error
    return run
