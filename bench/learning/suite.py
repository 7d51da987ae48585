"""All entries and sections of the report, collected from the modules that define them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from bench.learning.entry import Entry

# Each has `entries()`, which returns Entry objects, and `sections()`, which returns Section ones.
MODULES = (
    "bench.learning.grids",
    "bench.learning.continuous",
    "bench.learning.continuous.off_policy_rows",
    "bench.learning.mujoco",
)


@dataclass(frozen=True)
class Section:
    """A part of the report: tasks that are read together.

    Args:
        name: of the file with its reading, ``bench/learning/readings/<name>.md``, and of its
            figures.
        title: its heading.
        tasks: its tasks, in order; each becomes a table.
        reference: ``algorithm/variant`` that ratios and probabilities compare the others with, of
            each task that has it.
        in_readme: rows (``algorithm/variant``) that the README shows.
        readme_tasks: the tasks whose tables it shows; empty: all.
        by_steps_to_solve: tables count the steps until solved; else the area under the curve.
        figures: whether there are figures; grids of settings have none.
        sizes: the tasks' sizes, to fit how the cost grows with them; empty: not fitted.
        algorithms: the hosts whose rows it shows; empty: all.
        against: pairs of variants, of which one table over tasks and hosts shows the differences.
        profile: file among the results that says where a training step's time goes; empty: none.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    reference: tuple[str, ...]
    in_readme: tuple[str, ...] = ()
    readme_tasks: tuple[str, ...] = ()
    by_steps_to_solve: bool = True
    figures: bool = True
    sizes: tuple[int, ...] = ()
    algorithms: tuple[str, ...] = ()
    against: tuple[tuple[str, str], ...] = ()
    profile: str = ""


def collect() -> list[Entry]:
    """Return all entries.

    Raises:
        ValueError: two entries have the same task, algorithm and variant.
    """
    entries = [entry for name in MODULES for entry in importlib.import_module(name).entries()]
    names = [(entry.task, entry.name) for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"entries must differ in task, algorithm or variant, got twice: {twice}.")
    return entries


def sections() -> list[Section]:
    """Return the report's sections in order."""
    return [section for name in MODULES for section in importlib.import_module(name).sections()]


def select(
    entries: Sequence[Entry],
    tasks: Sequence[str] | None = None,
    algorithms: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
) -> list[Entry]:
    """Return the entries of these tasks, algorithms and variants; None is all.

    Raises:
        ValueError: a name that no entry has.
    """
    for attribute, wanted in (("task", tasks), ("algorithm", algorithms), ("variant", variants)):
        known = {getattr(entry, attribute) for entry in entries}
        unknown = sorted(set(wanted or ()) - known)
        if unknown:
            raise ValueError(f"no entry has the {attribute} {unknown}; there are {sorted(known)}.")
        entries = [e for e in entries if wanted is None or getattr(e, attribute) in wanted]
    return list(entries)
