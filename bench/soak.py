"""Minutes of everything at once: `python -m bench.soak --seconds 600`.

Four threads prefetch batches (sampler and transform, with the model that is being trained), one
extends the buffer, one refreshes values, and the learner fits model and policy. What must hold:

- resident memory, after a warm-up of a quarter of the time (in which the ring fills up), stays
  within 2 %;
- every thread gets on: whichever makes no step for 60 seconds is stuck, and the run is ended with
  the stacks of all threads;
- nothing raises, and all losses are finite.

Then, with one worker (no prefetching, all in the learner's thread), two runs from the same seeds
must be equal bit for bit: losses, parameters, traces, priorities.

The result goes to ``bench/results/soak/``, a file each machine.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import ProbabilisticActor, TanhNormal

from bench.machine import RESULTS, describe, result_file
from torchrl_recall import (
    BacktrackLoss,
    BacktrackModel,
    BacktrackTransform,
    RecallTraceLoss,
    ValuePrioritizedSampler,
    ValueRefresh,
)

SIZE, ACTION, ROWS, BATCH, TRACE = 8, 2, 256, 64, 16
THREADS, STUCK, LIMIT, WARM_UP = 4, 60.0, 0.02, 0.25


class Learner:
    """All that learns, and what it learns from.

    Args:
        seed (int): of everything.
        capacity (int): rows of the ring.
        threads (int): that prefetch; 0 samples in the learner's thread.
    """

    def __init__(self, seed: int, capacity: int, threads: int) -> None:
        torch.manual_seed(seed)
        self.model = BacktrackModel(SIZE, ACTION, num_cells=(32,))
        net = nn.Sequential(nn.Linear(SIZE, 2 * ACTION), NormalParamExtractor())
        self.actor = ProbabilisticActor(
            TensorDictModule(net, ["observation"], ["loc", "scale"]),
            ["loc", "scale"],
            distribution_class=TanhNormal,
        )
        critic = TensorDictModule(nn.Linear(SIZE, 1), ["observation"], ["state_value"])
        self.sampler = ValuePrioritizedSampler(capacity, mode="soft", temperature=1.0)
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(capacity),
            sampler=self.sampler,
            transform=BacktrackTransform(
                self.model, num_steps=TRACE, generator=torch.Generator().manual_seed(seed)
            ),
            priority_key="value",
            batch_size=BATCH,
            prefetch=threads or None,
            generator=torch.Generator().manual_seed(seed),
        )
        self.refresh = ValueRefresh(self.buffer, critic, gamma=0.99, slice_size=2048)
        self.model_loss, self.recall_loss = BacktrackLoss(self.model), RecallTraceLoss(self.actor)
        parameters = [*self.model.parameters(), *self.actor.parameters()]
        self.optimizer = torch.optim.Adam(parameters, 1e-4)
        self.data = torch.Generator().manual_seed(seed)

    def extend(self) -> None:
        """Add rows, some of them of no value."""
        state = torch.randn(ROWS, SIZE, generator=self.data)
        drift = 0.1 * torch.randn(ROWS, SIZE, generator=self.data)
        following = {"observation": state + drift, "reward": state[:, :1]}
        following["terminated"] = torch.rand(ROWS, 1, generator=self.data) < 0.05
        action = 1.8 * torch.rand(ROWS, ACTION, generator=self.data) - 0.9
        rows = {"observation": state, "action": action, "value": state[:, 0], "next": following}
        self.buffer.extend(TensorDict(rows, [ROWS]))

    def step(self) -> float:
        """Sample, and descend both losses."""
        batch: Any = self.buffer.sample()
        losses = [self.model_loss(batch)["loss_backtrack"]]
        losses.append(self.recall_loss(batch)["loss_imitation"])
        total = torch.stack(losses).sum()
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.actor.parameters()], 1.0)
        self.optimizer.step()
        return float(total.detach())

    def digest(self) -> str:
        """Return a checksum of parameters, statistics, rows, priorities and generators."""
        total = hashlib.sha256()
        buffer = self.buffer.storage[:].flatten_keys(".").to_dict()
        states = [self.model.state_dict(), self.actor.state_dict(), dict(sorted(buffer.items()))]
        states.append({"values": self.sampler.values, "generator": self.data.get_state()})
        for state in states:
            for value in state.values():
                total.update(value.detach().contiguous().numpy().tobytes())
        return total.hexdigest()


def resident_mib() -> float:
    """Return the memory of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS")


def soak(seconds: float, capacity: int) -> dict[str, Any]:
    """Run all threads and watch them.

    Args:
        seconds (float): how long.
        capacity (int): rows of the ring.

    Returns:
        dict: steps of each thread, memory over time, its ``spread`` (largest over smallest after
        the warm-up, minus 1) and ``drift`` (mean of its last tenth over its first, minus 1).

    Raises:
        RuntimeError: a thread raised.
    """
    learner = Learner(0, capacity, THREADS)
    stop, errors = threading.Event(), []
    counts = {"learner": 0, "extend": 0, "refresh": 0}

    def work(name: str, action: Any, pause: float) -> None:
        try:
            while not stop.wait(pause):
                action()
                counts[name] += 1
        except Exception as error:
            errors.append(f"{name}: {error!r}")
            stop.set()

    def learn() -> None:
        loss = learner.step()
        if not loss == loss or abs(loss) == float("inf"):
            raise ValueError(f"the loss is {loss}")

    learner.extend()
    threads = [
        threading.Thread(target=work, args=("learner", learn, 0.0), daemon=True),
        threading.Thread(target=work, args=("extend", learner.extend, 0.005), daemon=True),
        threading.Thread(target=work, args=("refresh", learner.refresh, 0.05), daemon=True),
    ]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    memory: list[tuple[float, float]] = []
    moved: dict[str, tuple[int, float]] = dict.fromkeys(counts, (0, began))
    interval = max(0.1, seconds / 300)
    while (now := time.monotonic()) < began + seconds and not stop.wait(interval):
        memory.append((round(now - began, 2), round(resident_mib(), 2)))
        for name, count in counts.items():
            if count != moved[name][0]:
                moved[name] = count, now
            elif now - moved[name][1] > STUCK:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                raise RuntimeError(f"{name} is stuck at step {count}")
    stop.set()
    for thread in threads:
        thread.join(STUCK)
    errors += [f"{t.name} does not end" for t in threads if t.is_alive()]
    if errors:
        raise RuntimeError("; ".join(errors))
    settled = [mib for at, mib in memory if at >= WARM_UP * seconds]
    tenth = max(1, len(settled) // 10)
    first, last = sum(settled[:tenth]) / tenth, sum(settled[-tenth:]) / tenth
    return {
        "seconds": seconds,
        "capacity": capacity,
        "threads": THREADS,
        "steps": counts,
        "rows_written": int(learner.buffer.write_count),
        "spread": max(settled) / min(settled) - 1,
        "drift": last / first - 1,
        "memory_mib": memory[:: max(1, len(memory) // 100)],
    }


def is_deterministic(steps: int = 200, capacity: int = 2000) -> bool:
    """Return whether two runs with one worker are equal bit for bit."""
    digests = []
    for _ in range(2):
        learner, losses = Learner(1, capacity, 0), []
        for _ in range(steps):
            learner.extend()
            learner.refresh()
            losses.append(learner.step())
        trace: Any = learner.buffer.sample()["trace", "observation"]
        digests.append((losses, learner.digest(), trace.numpy().tobytes()))
    return digests[0] == digests[1]


def main(arguments: list[str] | None = None) -> int:
    """Run both parts, print the result and save it; 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--capacity", type=int, default=50_000)
    parser.add_argument("--dry", action="store_true", help="do not save the result")
    options = parser.parse_args(arguments)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    machine = describe()
    result = soak(options.seconds, options.capacity)
    result["deterministic"] = is_deterministic()
    result["passed"] = bool(result["deterministic"] and result["spread"] <= LIMIT)
    result = {"machine": machine, **result}
    if not options.dry:
        path = RESULTS / "soak" / result_file(machine).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    shown = {name: value for name, value in result.items() if name not in ("machine", "memory_mib")}
    print(json.dumps(shown))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
