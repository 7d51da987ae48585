"""``python -m torchrl_recall``: watch recall traces work on four rooms, beside A2C and SIL."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from torchrl_recall.demo import METHODS


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
        return value

    parser = argparse.ArgumentParser(prog="python -m torchrl_recall", description=__doc__)
    parser.add_argument("--size", type=int, default=15, help="side of the maze, odd (15)")
    parser.add_argument("--start", choices=("fixed", "room", "any"), default="fixed")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs a method (3)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="K")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--steps", type=positive, default=200_000, help="environment steps of a run (200000)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR")
    namespace = parser.parse_args(arguments)
    if namespace.size < 5 or namespace.size % 2 == 0:
        parser.error(f"argument --size: must be odd and at least 5, got {namespace.size}")
    if namespace.out.exists() and not namespace.out.is_dir():
        parser.error(f"argument --out: must be a folder, got the file {namespace.out}")
    namespace.methods = list(dict.fromkeys(namespace.methods))
    return namespace


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all methods and seeds, print the table, write ``results.json`` and ``recall.png``."""
    options = parse(arguments)
    missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        print(f"missing {missing}: pip install 'torchrl-recall[demo]'", file=sys.stderr)
        return 2
    import torch

    from torchrl_recall.demo.report import draw, save_json, table
    from torchrl_recall.demo.run import run_all
    from torchrl_recall.demo.train import Settings
    from torchrl_recall.envs import FourRoomsEnv

    try:
        torch.zeros((), device=options.device)
    except (RuntimeError, AssertionError) as error:
        print(f"argument --device: {options.device!r} cannot be used: {error}", file=sys.stderr)
        return 2
    settings = Settings(
        size=options.size, start=options.start, steps=options.steps, device=options.device
    )
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = run_all([(method, seed) for method in options.methods for seed in seeds], settings)
    save_json(runs, options.out / "results.json")
    walls = FourRoomsEnv(options.size).walls.numpy()
    draw(runs, walls, options.steps, options.out / "recall.png")
    print(f"\nFour rooms {options.size} x {options.size}, start {options.start!r}\n")
    print(table(runs, options.steps))
    print(f"\nWrote {options.out / 'results.json'} and {options.out / 'recall.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
