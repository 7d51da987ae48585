"""Print the saved benchmark as markdown tables: `python -m bench.report [FILE ...]`.

It reads the JSON alone (all of ``bench/results/`` by default), a table for each machine. The last
column is the median time of the other contender relative to ours: above 1, ours is the faster.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import RESULTS


def table(content: dict[str, Any]) -> str:
    """Return the tables of one machine.

    Args:
        content (dict): what a result file holds.

    Returns:
        str: markdown.
    """
    machine = content["machine"]
    lines = [
        f"{machine['processor']}, {machine['count']} CPUs, {machine['threads']} thread in use, "
        f"device {machine['device']}; torch {machine['torch']}, torchrl {machine['torchrl']}, "
        f"Python {machine['python']}",
        "",
        "| case | ours | other | time of the other / ours |",
        "|---|---|---|---|",
    ]
    for record in content["records"]:
        ours, *others = record["ratios"]
        lines += [
            f"| {record['case']} | {ours} | {other} | {record['ratios'][other]:.3g} |"
            for other in others
        ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print the tables of the named files, or of all."""
    paths = [Path(argument) for argument in arguments] or sorted(RESULTS.glob("*.json"))
    if not paths:
        sys.exit(f"no results in {RESULTS}; run `pytest bench/` first")
    print("\n\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in paths))


if __name__ == "__main__":
    main(sys.argv[1:])
