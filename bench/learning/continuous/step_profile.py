"""Where a training step's time goes: `python -m bench.learning.continuous.step_profile`.

Each host runs with and without recall traces, in turns, iteration by iteration, so that what else
the machine does meets all of them; processor time is counted, of one thread. Results go to
``bench/results/learning/profile.json``, of which the report draws a figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.learning import store
from bench.learning.continuous import variants as on_policy
from bench.learning.continuous.off_policy import OffPolicy
from bench.learning.continuous.off_policy_rows import OFF_POLICY_TASKS, VARIANTS
from bench.learning.continuous.ppo import PPO
from bench.learning.continuous.tasks import TASKS
from bench.result_files import write_result

FILE = store.FOLDER / "profile.json"
HOSTS = ("ppo", "sac", "td3")
ADDED = ("model and traces", "imitation")
REST = "backward and the rest"


class Stopwatch:
    """Processor time by part, of calls that may be inside of one another.

    Time inside an inner call is that call's alone.
    """

    def __init__(self, now: Callable[[], float] = time.process_time) -> None:
        self.now = now
        self.parts: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def _pass(self) -> None:
        at = self.now()
        if self._open:
            part = self._open[-1]
            self.parts[part] = self.parts.get(part, 0.0) + at - self._since
        self._since = at

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count what a method of an object takes."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            self._open.append(part)
            try:
                return inner(*args, **kwargs)
            finally:
                self._pass()
                self._open.pop()

        # Past a module's own __setattr__.
        object.__setattr__(owner, name, timed)


def make_ppo(task_name: str, traces: bool, budget: int) -> tuple[PPO, dict[str, float]]:
    """Return a PPO with its time by part."""
    variant = on_policy.VARIANTS["traces" if traces else "plain"]
    host, watch = PPO(TASKS[task_name], 0, variant.make(), budget), Stopwatch()
    watch.wrap(host, "iterate", REST)
    watch.wrap(host, "_collect", "environment and policy")
    watch.wrap(host.history, "extend", "replay buffer")
    watch.wrap(host.advantage, "forward", "advantages")
    watch.wrap(host.ppo_loss, "forward", "losses")
    watch.wrap(host.optimizer, "step", "optimizer and targets")
    for name, part in (("update", ADDED[0]), ("loss", ADDED[1]), ("finish", ADDED[1])):
        if hasattr(host.guide, name):
            watch.wrap(host.guide, name, part)
    return host, watch.parts


def make_off_policy(
    algorithm: str, task_name: str, traces: bool, budget: int
) -> tuple[OffPolicy, dict[str, float]]:
    """Return SAC or TD3 with its time by part."""
    task, variant = OFF_POLICY_TASKS[task_name], VARIANTS["traces" if traces else "plain"]
    host = OffPolicy(task.task, 0, task.settings, algorithm, variant.make(), budget=budget)
    return host, host.parts


def measure(task_name: str, steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the milliseconds of 1,000 environment steps, by host, kind and part.

    Args:
        task_name: of the task.
        steps: environment steps that count, after a fourth as many that do not.
    """
    hosts: dict[tuple[str, str], tuple[Any, dict[str, float]]] = {}
    budget = steps + steps // 4
    for name in HOSTS:
        for kind in ("without", "with"):
            traces = kind == "with"
            if name == "ppo":
                hosts[name, kind] = make_ppo(task_name, traces, budget)
            else:
                hosts[name, kind] = make_off_policy(name, task_name, traces, budget)
    counted = dict.fromkeys(hosts, 0)
    for begin in range(0, budget, 2048):
        for key, (host, parts) in hosts.items():
            if begin == steps // 4 // 2048 * 2048:
                parts.clear()
                counted[key] = len(host.history)
            while len(host.history) < min(begin + 2048, host.history.size):
                host.iterate()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, kind), (host, parts) in hosts.items():
        share = 1e6 / (len(host.history) - counted[name, kind])
        found.setdefault(name, {})[kind] = {p: round(s * share, 3) for p, s in parts.items()}
    return found


def summary(hosts: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Return a line for each host: steps a second without and with traces, and their ratio."""
    lines = []
    for name, kinds in hosts.items():
        without, with_ = (sum(kinds[kind].values()) for kind in ("without", "with"))
        lines.append(
            f"{name.upper()}: {1e6 / without:,.0f} steps/s without traces, "
            f"{1e6 / with_:,.0f} with, {with_ / without:.2f} times the time"
        )
    return lines


def draw(measured: dict[str, Any], path: Path) -> None:
    """Draw the parts of each host's time as bars, without and with traces.

    Args:
        measured: what `main` wrote.
        path: picture to write.
    """
    from bench.learning.figures import COLOURS, pyplot

    plt = pyplot()
    tasks = measured["tasks"]
    kinds = ("without", "with")
    names = dict.fromkeys(
        p for t in tasks.values() for h in t.values() for k in kinds for p in h[k]
    )
    names = [*(p for p in names if p not in ADDED), *(p for p in ADDED if p in names)]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.6 * len(tasks) + 1, 3.6), layout="constrained", squeeze=False
    )
    for axis, (task, hosts) in zip(axes[0], tasks.items(), strict=True):
        labels = [f"{host.upper()}\n{kind}" for host in hosts for kind in kinds]
        bars = [hosts[host][kind] for host in hosts for kind in kinds]
        left = [0.0] * len(bars)
        for number, name in enumerate(names):
            widths = [bar.get(name, 0.0) for bar in bars]
            axis.barh(range(len(bars)), widths, left=left, label=name, color=COLOURS[number])
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_yticks(range(len(bars)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("processor ms for 1,000 environment steps")
        axis.spines[["top", "right"]].set_visible(False)
    handles, found = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, found, loc="outside right upper", frameon=False, fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8192, help="of each host on each task")
    parser.add_argument("--tasks", nargs="+", default=["u_maze", "half_cheetah"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made = store.provenance()
    tasks = {name: measure(name, options.steps) for name in options.tasks}
    write_result(FILE, {"steps": options.steps, "tasks": tasks, **made})
    for name, hosts in tasks.items():
        print(name, *summary(hosts), sep="\n  ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
