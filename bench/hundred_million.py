"""How draws by value scale: memory and times at 100 million entries, a fresh process a mode.

`python -m bench.hundred_million` writes ``bench/results/hundred_million.json``. Memory is what the
process needs beside the values that it is handed, its peak included, in bytes an entry.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchrl_recall import ValuePrioritizedSampler

# Bytes an entry beside the storage, at most.
LIMITS = {"top": 9.0, "soft": 9.0, "per": 9.0, "rank": 13.0}
BATCH, REPEATS = 256, 100


class Stored:
    """As much of a storage as a sampler looks at."""

    ndim, device = 1, torch.device("cpu")

    def __init__(self, entries: int) -> None:
        self.max_size = self.entries = entries

    def __len__(self) -> int:
        return self.entries


def memory(name: str) -> int:
    """Bytes of this process: ``VmRSS`` now, or ``VmHWM`` at most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def forget_peak() -> None:
    """Let ``VmHWM`` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def use(entries: int, mode: str, values: torch.Tensor, repeats: int) -> dict[str, float]:
    """Fill a sampler, draw, update and refresh it; return the times."""
    storage, sampler = Stored(entries), ValuePrioritizedSampler(entries, mode=mode)
    generator = torch.Generator().manual_seed(0)
    result = {}

    def timed(name: str, function: Callable[[], Any], times: int) -> None:
        result[f"{name}_milliseconds"] = milliseconds(function, times)

    def draw() -> Any:
        return sampler.sample(storage, BATCH)

    def update() -> None:
        index = torch.randint(values.numel(), (BATCH,), generator=generator)
        # Not above the largest, which would change what all weights refer to.
        sampler.update_priority(index, values[index])

    timed("first_refresh", lambda: sampler.refresh(values), 1)
    timed("first_draw", draw, 1)
    timed("draw", draw, repeats)
    timed("update", update, repeats)
    timed("draw_after_update", draw, 1)  # the mode "rank" sorts
    timed("refresh", lambda: sampler.refresh(values), 3)
    timed("draw_after_refresh", draw, 1)
    return result


def measure(entries: int, mode: str, share: float = 1.0) -> dict[str, Any]:
    """Measure in this process, which should be a fresh one.

    Args:
        entries: capacity of the sampler, all of it stored.
        mode: of the sampler.
        share: of the entries that get a value.

    Returns:
        Times, and bytes an entry at the end (``"bytes"``) and at most (``"peak_bytes"``).
    """
    torch.set_num_threads(1)
    use(10_000, mode, torch.randn(10_000), 3)  # whatever is loaded once
    values = torch.randn(int(entries * share), generator=torch.Generator().manual_seed(1))
    before = memory("VmRSS")
    forget_peak()
    result: dict[str, Any] = {"entries": entries, "mode": mode}
    result |= use(entries, mode, values, REPEATS)
    result["peak_bytes"] = (memory("VmHWM") - before) / entries
    return result


def measure_apart(entries: int, mode: str, share: float = 1.0) -> dict[str, Any]:
    """`measure` in a fresh process."""
    arguments = ["--entries", str(entries), "--share", str(share), "--only", mode]
    command = [sys.executable, "-m", "bench.hundred_million", *arguments]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", type=int, default=100_000_000)
    parser.add_argument("--share", type=float, default=1.0, help="of entries that get a value")
    parser.add_argument("--only", choices=list(LIMITS), help="one mode, in this process")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.entries, arguments.only, arguments.share)))
        return
    from bench.machine import RESULTS, describe

    runs = [measure_apart(arguments.entries, mode, arguments.share) for mode in LIMITS]
    result = {"machine": describe(), "batch": BATCH, "limits": LIMITS, "runs": runs}
    text = json.dumps(result, indent=1)
    print(text)
    (RESULTS / "hundred_million.json").write_text(text + "\n")
    for run in runs:
        if run["peak_bytes"] > LIMITS[run["mode"]] or run["draw_milliseconds"] > 1:
            raise SystemExit(f"over the limit: {run}")


if __name__ == "__main__":
    main()
