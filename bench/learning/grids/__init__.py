"""Four rooms: goals found by reward, goals known, and data in short fragments."""

from __future__ import annotations

from bench.learning.entry import Entry
from bench.learning.grids import rows
from bench.learning.suite import Section


def entries() -> list[Entry]:
    """Return what there is to run."""
    return [*rows.reported(), *rows.tuning()]


def sections() -> list[Section]:
    """Return the parts of the report."""
    return rows.sections()
