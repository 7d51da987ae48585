"""Print the saved benchmark as markdown: `python -m bench.report [FILE ...] [--figure PICTURE]`.

It reads the JSON alone (all of ``bench/results/`` by default), some tables for each machine. A
number is the time of a contender relative to ours, with the quartiles over the rounds: above 1,
ours is the faster. With ``--figure`` it draws the first machine's instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import RESULTS

# Groups that are tables of contenders by case, and what a table's corner says.
MATRICES = {
    "traces": "time / `sample_traces`",
    "variants": "time / `sample_traces` without",
    "sampler of 1e6": "time / `ValuePrioritizedSampler`, 1e6 entries",
    "sampler of 1e5": "time / `ValuePrioritizedSampler`, 1e5 entries",
    "sampler sizes": "entries, time / that of 1e6",
    "threads": "time / two threads",
    "scaling": "time / `sample_traces` around M",
}


def group(record: dict[str, Any]) -> str:
    """Return what a case belongs to: its name up to the first comma."""
    return record["case"].partition(", ")[0]


def name(record: dict[str, Any]) -> str:
    """Return the rest of a case's name."""
    return record["case"].partition(", ")[2]


def machine_line(content: dict[str, Any]) -> str:
    """Return what the results were measured on."""
    machine = content["machine"]
    peers = [f"{package} {version}" for package, version in machine.get("peers", {}).items()]
    parts = [
        f"{machine['processor']}, {machine['count']} CPUs, {machine['threads']} thread in use",
        f"device {machine['device']}",
        ", ".join([f"torch {machine['torch']}", f"torchrl {machine['torchrl']}", *peers]),
        f"Python {machine['python']}",
    ]
    return "; ".join(parts)


def matrices(content: dict[str, Any]) -> list[str]:
    """Return the tables of the groups in `MATRICES`, one for each axis of the scaling."""
    tables = []
    for wanted, corner in MATRICES.items():
        records = [record for record in content["records"] if group(record) == wanted]
        axes = dict.fromkeys(record.get("axis") for record in records)
        for axis in axes:
            tables.append(matrix([r for r in records if r.get("axis") == axis], corner))
    return tables


def in_readme(content: dict[str, Any]) -> list[str]:
    """Return the tables that the README shows: traces, their variants, the sampler."""
    shown = list(MATRICES)[:3]
    return matrices({"records": [r for r in content["records"] if group(r) in shown]})


def matrix(records: list[dict[str, Any]], corner: str) -> str:
    """Return one table, contenders by case.

    Args:
        records (list of dict): the cases.
        corner (str): what the numbers are.

    Returns:
        str: markdown, empty if nothing was compared.
    """
    others = dict.fromkeys(other for record in records for other in list(record["ratios"])[1:])
    rows = [[other, *(_cell(record, other) for record in records)] for other in others]
    if any("floor" in record for record in records):
        floors = [record.get("floor", {}).get("ours") for record in records]
        rows.append(["the floor", *(_number(1 / ours) if ours else "" for ours in floors)])
    if not rows:
        return ""
    head = [corner, *map(name, records)]
    return "\n".join([_row(head), "|---" * len(head) + "|", *map(_row, rows)])


def rest(content: dict[str, Any]) -> str:
    """Return the table of the cases whose contenders have nothing in common."""
    lines = ["| case | ours | other | time of the other / ours |", "|---|---|---|---|"]
    for record in content["records"]:
        if group(record) in MATRICES:
            continue
        ours, *others = record["ratios"]
        for other in others:
            bar = record.get("bar", {}).get(other)
            allowed = "" if bar is None else f", at most {bar}"
            if other in record.get("at_least", {}):
                allowed = f", at least {record['at_least'][other]}"
            lines.append(_row([record["case"], ours, other, _cell(record, other) + allowed]))
    return "\n".join(lines) if len(lines) > 2 else ""


def left_out(content: dict[str, Any]) -> str:
    """Return which contenders did not run, where and why."""
    cases: dict[tuple[str, str], list[str]] = {}
    for record in content["records"]:
        for contender, reason in record.get("skipped", {}).items():
            cases.setdefault((contender, reason), []).append(name(record))
    reasons = [f"{who} ({', '.join(where)}: {why})" for (who, why), where in cases.items()]
    return f"Left out: {'; '.join(reasons)}." if reasons else ""


def table(content: dict[str, Any]) -> str:
    """Return all tables of one machine.

    Args:
        content (dict): what a result file holds.

    Returns:
        str: markdown.
    """
    parts = [machine_line(content), *matrices(content), rest(content), left_out(content)]
    return "\n\n".join(part for part in parts if part)


def _cell(record: dict[str, Any], other: str) -> str:
    if other not in record["ratios"]:
        return ""
    ratio = _number(record["ratios"][other])
    interval = record.get("intervals", {}).get(other)
    return f"{ratio} [{', '.join(map(_number, interval))}]" if interval else ratio


def _number(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    """Print the tables of the named files, or of all; or draw the figure."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="PICTURE", help="draw, instead of tables")
    chosen = parser.parse_args(arguments)
    paths = chosen.files or sorted(RESULTS.glob("*.json"))
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    # Other results of the folder have no times.
    contents = [content for content in contents if "records" in content]
    if not contents:
        sys.exit(f"no results in {RESULTS}; run `pytest bench/` first")
    if chosen.figure is None:
        print("\n\n".join(map(table, contents)))
        return
    # Here, since the tables need no matplotlib.
    from bench.figure import draw

    draw(contents[0], chosen.figure)
    print(f"{chosen.figure}: {machine_line(contents[0])}")


if __name__ == "__main__":
    main(sys.argv[1:])
