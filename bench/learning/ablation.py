"""What each part of recall traces is worth on four rooms.

`python -m bench.learning.ablation run` runs what has no result yet, `report` writes the table and
the figure from the results. Both may be stopped and started again at any time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.learning.report import draw, read, table
from bench.learning.rows import BUDGET, ROWS, SEEDS, SIZE
from bench.learning.runs import run_missing
from bench.machine import RESULTS

FOLDER = RESULTS / "ablation"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--size", type=int, default=SIZE, help=f"side of the maze ({SIZE})")
    parser.add_argument("--steps", type=int, default=BUDGET, help=f"budget of a run ({BUDGET})")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side (1)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or report."""
    options = parse(arguments)
    if options.command == "run":
        jobs = [(name, seed) for name in options.rows for seed in options.seeds]
        run_missing(jobs, options.out, options.size, options.steps, options.workers)
        return 0
    runs = read(options.out, options.size, options.steps)
    if not runs:
        print(f"no results in {options.out}")
        return 1
    text = table(runs, options.steps, len(options.seeds))
    (options.out / "report.md").write_text(text)
    draw(runs, options.out / "ablation.png", options.steps)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
