"""``python -m torchrl_recall.demo.ray``: recall traces on Ray, several collectors and one learner.

Where things are, and how weights get there:

- *Collectors* are Ray workers, each with its environments and a copy of the policy. The learner
  sends the weights along with each call for a rollout (`ray_collectors.py`); ``--check`` compares
  the log-probabilities that came with a rollout to those of the weights that were sent.
- *The recall buffer* is one Ray actor, TorchRL's `RayReplayBuffer` with a
  `ValuePrioritizedSampler`. It stores and draws transitions, and holds no network: values come to
  it from the learner, with new rows, and by `ValueRefresh` for old ones.
- *The learner* has the backtracking model and the `BacktrackTransform`, which walks back from what
  the buffer drew. It is not given to the buffer as ``transform_factory``: there it would walk with
  a copy of the model, which changes with each of the learner's steps, and TorchRL has no way to
  update it. Here it is the very model that is trained, and what travels is a few transitions, not
  ``num_traces * num_steps`` steps. (``ValueRefresh`` and ``buffer[index]`` also read through the
  buffer's transforms, and would pay for traces that nobody wants.)

So policy and model are in step with what they are used for: a rollout tells the version of its
weights (``lag_mean`` and ``lag_max`` of the result say how many updates old they were), and a trace
is walked with the parameters of the moment. Without ``--address``, Ray is started here and ended.

A worker that is killed is started again; without the buffer's actor the run ends with an error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.data import LazyTensorStorage, RayReplayBuffer, TensorDictReplayBuffer

from torchrl_recall.backtrack_loss import BacktrackLoss
from torchrl_recall.demo import SOLVED
from torchrl_recall.demo.ray_collectors import Rollout, SupervisedCollectors, ray_running
from torchrl_recall.demo.train import A2C, Settings, evaluate
from torchrl_recall.envs import FourRoomsEnv
from torchrl_recall.loss import RecallTraceLoss
from torchrl_recall.model import BacktrackModel
from torchrl_recall.refresh import ValueRefresh
from torchrl_recall.sampler import ValuePrioritizedSampler
from torchrl_recall.transform import BacktrackTransform
from torchrl_recall.values import transition_value

ROWS = ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "done"))
# The reward ends the episode here, and the start of the next one is no consequence of it.
TERMINATED = ("next", "reward")
REFRESH_ROWS = 4096  # values brought up to date with each rollout, beside those of new rows


def make_env(settings: Settings, seed: int) -> FourRoomsEnv:
    """Make a worker's environments, and seed what draws its actions."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return FourRoomsEnv(
        settings.size, start=settings.start, batch_size=(settings.num_envs,), seed=seed
    )


class RemoteRecall:
    """The learner's side of recall traces, on a recall buffer in another process.

    Args:
        env (FourRoomsEnv): for its specs.
        a2c (A2C): owns the actor.
        settings (Settings): the numbers.
        seed (int): of what the buffer and the transform draw.
    """

    def __init__(self, env: FourRoomsEnv, a2c: A2C, settings: Settings, seed: int) -> None:
        self.a2c, self.settings = a2c, settings
        self.model = BacktrackModel.from_env(env, num_cells=settings.num_cells)
        self.model_loss = BacktrackLoss(self.model)
        self.recall_loss = RecallTraceLoss(a2c.actor, imitation_coeff=settings.imitation_coeff)
        self.optimizer = torch.optim.Adam(self.model_loss.parameters(), settings.learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.transform = BacktrackTransform(
            self.model,
            num_steps=settings.trace_length * settings.size,
            generator=torch.Generator().manual_seed(seed + 1),
        )
        self.visits = torch.zeros(settings.size**2)
        # Reward 1 is worth more than any state without: -1 for one seen once, less for others. So
        # traces start from rare states until the goal is found, and from the goal then.
        rarity = TensorDictModule(self._rarity, ["observation"], ["state_value"])
        options: Any = {"gamma": 1.0, "terminated_key": TERMINATED}
        self.value = partial(transition_value, value_network=rarity, **options)
        capacity = settings.steps + settings.num_envs * settings.rollout
        self.buffer = RayReplayBuffer(
            replay_buffer_cls=TensorDictReplayBuffer,
            storage=partial(LazyTensorStorage, capacity),
            sampler=partial(ValuePrioritizedSampler, capacity, mode="soft"),
            priority_key="value",
            batch_size=settings.num_traces * settings.imitation_updates,
            remote_config={"num_cpus": 1},
        )
        self.buffer.set_rng(torch.Generator().manual_seed(seed))
        self.refresh = ValueRefresh(self.buffer, rarity, slice_size=REFRESH_ROWS, **options)

    def _rarity(self, observation: torch.Tensor) -> torch.Tensor:
        return -self.visits[self.model.observation.joint_index(observation)].unsqueeze(-1)

    def observe(self, data: TensorDictBase) -> None:
        """Store a rollout, bring values up to date, and fit the model on all data."""
        rows = data.select(*ROWS).reshape(-1)
        cell = self.model.observation.joint_index(rows["next", "observation"])
        self.visits += cell.bincount(minlength=len(self.visits))
        self.buffer.extend(rows.set("value", self.value(rows)))
        self.refresh()
        updates, batch = self.settings.model_updates, self.settings.model_batch
        chosen = torch.randint(len(self.buffer), (updates * batch,), generator=self.generator)
        for part in self.buffer[chosen].split(batch):
            loss = self.model_loss(part)["loss_backtrack"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def imitate(self) -> None:
        """Walk back from what the buffer draws, and imitate it, a part at a time."""
        traces = self.transform(self.buffer.sample()).select("trace")
        for part in traces.split(self.settings.num_traces):
            self.a2c.step(self.recall_loss(part))

    def close(self) -> None:
        """End the buffer's actor."""
        self.buffer.close()


def weights_error(actor: Any, rollout: Rollout) -> float:
    """Return how far a rollout's log-probabilities are from those of the weights sent for it."""
    ray: Any = import_module("ray")

    weights: Any = ray.get(rollout.weights)
    with torch.no_grad(), weights.to_module(actor):
        expected = actor.get_dist(rollout.data).log_prob(rollout.data["action"])
    return float((rollout.data["action_log_prob"] - expected).abs().max())


def train(
    settings: Settings,
    *,
    num_collectors: int = 2,
    seed: int = 0,
    timeout: float = 60.0,
    address: str | None = None,
    check: bool = False,
    stop_when_solved: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Run until the maze is solved or the budget is spent.

    Args:
        settings (Settings): the numbers; ``num_envs`` and ``rollout`` are those of one collector.
        num_collectors (int): Ray workers.
        seed (int): of networks, environments and draws. Which worker is first is not seeded.
        timeout (float): seconds in which a worker must answer.
        address (str, optional): of a Ray cluster; None starts Ray here, and ends it.
        check (bool): compare each rollout with the weights that were sent for it.
        stop_when_solved (bool): stop at a success of 0.9.
        progress (callable, optional): called with the environment steps so far.

    Returns:
        dict: ``steps``, ``success`` (exact, at the end), ``goal_found`` (rewards stored),
        ``failures`` of workers, ``lag_mean`` and ``lag_max`` of the weights in updates,
        ``weights_error`` (largest difference found by ``check``), and ``seconds`` of the learner
        from the first rollout on: ``wait`` for rollouts, ``actor``, ``observe`` (the buffer and the
        model), ``imitate``, ``evaluate``.
    """
    torch.manual_seed(seed)
    env = make_env(settings, seed)
    a2c = A2C(env, settings)
    with ExitStack() as stack:
        stack.enter_context(ray_running(num_collectors + 1, address))
        recall = RemoteRecall(env, a2c, settings, seed)
        stack.callback(recall.close)
        collectors = SupervisedCollectors(
            [partial(make_env, settings, seed + 1 + i) for i in range(num_collectors)],
            a2c.actor,
            frames_per_batch=settings.num_envs * settings.rollout,
            timeout=timeout,
        )
        stack.callback(collectors.shutdown)
        return _learn(collectors, recall, env, check, stop_when_solved, progress)


def _learn(
    collectors: SupervisedCollectors,
    recall: RemoteRecall,
    env: FourRoomsEnv,
    check: bool,
    stop_when_solved: bool,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    a2c, settings = recall.a2c, recall.settings
    steps, goal_found, lags, error, success, watch = 0, 0, [], 0.0, 0.0, _Stopwatch()
    for rollout in collectors.rollouts():
        if steps:
            watch.lap("wait")
        else:
            watch = _Stopwatch()  # workers were still starting
        data = rollout.data
        lags.append(collectors.version - rollout.version)
        if check:
            error = max(error, weights_error(a2c.actor, rollout))
        with torch.no_grad():
            a2c.advantage(data)
        a2c.step(a2c.loss(data.reshape(-1)))
        watch.lap("actor")
        recall.observe(data)
        watch.lap("observe")
        recall.imitate()
        watch.lap("imitate")
        collectors.version += 1
        steps += data.numel()
        goal_found += int((data["next", "reward"] > 0).sum())
        success = evaluate(env, a2c.actor)
        watch.lap("evaluate")
        if progress is not None:
            progress(steps)
        if steps >= settings.steps or (stop_when_solved and success >= SOLVED):
            break
    return {
        "steps": steps,
        "success": success,
        "goal_found": goal_found,
        "failures": collectors.num_failures,
        "lag_mean": sum(lags) / len(lags),
        "lag_max": max(lags),
        "weights_error": error,
        "seconds": watch.seconds,
    }


class _Stopwatch:
    """Where the learner's time goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line and print the result as JSON."""
    parser = argparse.ArgumentParser(prog="python -m torchrl_recall.demo.ray")
    parser.add_argument("--size", type=int, default=11, help="side of the maze, odd (11)")
    parser.add_argument("--collectors", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60_000, help="environment steps (60000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", help="of a Ray cluster, such as auto; default: start Ray here")
    parser.add_argument("--check", action="store_true", help="check the weights of each rollout")
    options = parser.parse_args(arguments)
    if find_spec("ray") is None:
        print("missing ray: pip install ray", file=sys.stderr)
        return 2
    result = train(
        Settings(size=options.size, steps=options.steps),
        num_collectors=options.collectors,
        seed=options.seed,
        address=options.address,
        check=options.check,
    )
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
