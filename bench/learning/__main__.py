"""Learning curves: tasks × algorithms × variants × seeds, run and reported.

`python -m bench.learning run` trains what has no result yet, one JSON a run in
``bench/results/learning/``; `python -m bench.learning report` makes ``RESULTS.md`` and its figures
from these files alone. Both may be stopped and started again at any time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.learning import store, suite
from bench.learning.runner import run_missing


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what has no result yet")
    report = commands.add_parser("report", help="tables and figures from the results")
    for command in (run, report):
        command.add_argument("--out", type=Path, default=store.FOLDER, help="folder of results")
    for name in ("tasks", "algorithms", "variants"):
        run.add_argument(f"--{name}", nargs="+", help=f"only these {name}")
    run.add_argument("--seeds", nargs="+", type=int, help="only these of the entries' seeds")
    run.add_argument("--workers", type=int, default=1, help="processes side by side (1)")
    run.add_argument("--list", action="store_true", help="say what there is to run, and end")
    report.add_argument("--to", type=Path, default=store.ROOT, help="folder of RESULTS.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or report."""
    options = parse(arguments)
    entries = suite.collect()
    if options.command == "report":
        from bench.learning.results import report

        report(entries, suite.sections(), options.out, options.to)
        return 0
    chosen = suite.select(entries, options.tasks, options.algorithms, options.variants)
    if options.list:
        for entry in chosen:
            done = len(store.load(options.out, entry))
            print(f"{entry.task} {entry.algorithm} {entry.variant}: {done}/{len(entry.seeds)}")
        return 0
    run_missing(chosen, options.out, options.seeds, options.workers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
