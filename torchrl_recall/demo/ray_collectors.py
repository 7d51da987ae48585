"""Rollouts from several Ray workers, whichever are alive: `RayCollector` under supervision.

TorchRL's `RayCollector` starts the workers; its own iterator ends with the first worker that dies,
so rollouts are asked for here, one call at a time and each with a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.collectors.distributed import RayCollector


@contextmanager
def ray_running(num_cpus: int, address: str | None = None, tries: int = 3) -> Iterator[None]:
    """Have Ray running: what is there already stays; what is started here ends here.

    Args:
        num_cpus (int): places for workers, if Ray is started here, however few cores there are.
        address (str, optional): of a cluster to join, such as ``"auto"``.
        tries (int): how often to try; on a busy machine Ray's own services may start too late.
    """
    ray: Any = import_module("ray")

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address is None:
        options |= {"num_cpus": num_cpus, "include_dashboard": False}
        options |= {"object_store_memory": 256 * 1024**2}
    for left in reversed(range(tries)):
        try:
            ray.init(**options)
            break
        except Exception:
            ray.shutdown()
            if not left:
                raise
    try:
        yield
    finally:
        ray.shutdown()


class Rollout(NamedTuple):
    """What one worker brought."""

    data: TensorDictBase
    worker: int
    version: int  # of the weights it was collected with
    weights: Any  # these, where `ray.get` finds them


class _Call(NamedTuple):
    worker: int
    version: int
    weights: Any
    weights_arrived: Any
    deadline: float


class SupervisedCollectors:
    """Collects with one policy in several Ray workers, some of which may die.

    Each call for a rollout is preceded by a call that hands over the weights. Ray runs a worker's
    calls in the order they were made, so a rollout is collected with the weights sent along with
    it, by whichever process answers: a worker that died comes back with the policy it was first
    given. Workers wait for no one: while the learner works on one's rollout, the others collect
    with weights a few updates old (`Rollout.version` tells).

    A worker that dies is started again by Ray, and asked again; one that does not answer in time is
    killed first. The others go on meanwhile. Its unfinished rollout is lost.

    Args:
        make_envs (sequence of callable): one for each worker, called there. It must seed that
            process's ``torch.manual_seed``, or all workers draw the same actions.
        policy (nn.Module): what the workers begin with.

    Keyword Args:
        frames_per_batch (int): steps of a rollout.
        timeout (float): seconds in which a worker must answer; its start counts.

    Raises:
        TimeoutError: while collecting, if no worker has brought a rollout for three times
            ``timeout``.
    """

    def __init__(
        self,
        make_envs: Sequence[Callable[[], Any]],
        policy: nn.Module,
        *,
        frames_per_batch: int,
        timeout: float = 60.0,
    ) -> None:
        self.policy, self.timeout = policy, timeout
        self.version = 0
        self.num_failures = 0
        self._calls: dict[Any, _Call] = {}
        self._sent: tuple[int, Any] | None = None
        self._collector = RayCollector(
            list(make_envs),
            policy,
            frames_per_batch=frames_per_batch,
            num_collectors=len(make_envs),
            collector_kwargs={"auto_register_policy_transforms": False},
            # TorchRL's scheme joins all workers in one process group, which does not outlive the
            # first of them.
            weight_sync_schemes={},
            remote_configs={"num_cpus": 1, "max_restarts": -1, "max_task_retries": 0},
        )

    def rollouts(self) -> Iterator[Rollout]:
        """Yield rollouts as they come, for ever; increase ``version`` whenever weights change.

        The worker whose rollout was yielded gets its next call when the loop asks for more, so
        with the weights as they are then.
        """
        ray: Any = import_module("ray")
        RayActorError = import_module("ray.exceptions").RayActorError

        for worker in range(len(self._collector.remote_collectors)):
            self._call(worker)
        last, failure = time.monotonic(), None
        while True:
            ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=1.0)
            for future in ready:
                call = self._calls.pop(future)
                try:
                    _, data = ray.get([call.weights_arrived, future])
                except RayActorError as error:
                    failure = error
                    self.num_failures += 1
                    time.sleep(0.1)  # while Ray starts a worker, calls to it may fail at once
                else:
                    yield Rollout(data, call.worker, call.version, call.weights)
                    last = time.monotonic()
                self._call(call.worker)
            self._kill_overdue()
            if time.monotonic() - last > 3 * self.timeout:
                raise TimeoutError(f"no rollout for {3 * self.timeout} seconds") from failure

    def _call(self, worker: int) -> None:
        ray: Any = import_module("ray")

        if self._sent is None or self._sent[0] != self.version:
            # One copy in Ray's object store, whatever the number of workers.
            weights: Any = TensorDict.from_module(self.policy)
            self._sent = self.version, ray.put(weights.data.clone())
        version, weights = self._sent
        actor = self._collector.remote_collectors[worker]
        arrived = actor.update_policy_weights_.remote(weights)
        deadline = time.monotonic() + self.timeout
        self._calls[actor.next.remote()] = _Call(worker, version, weights, arrived, deadline)

    def _kill_overdue(self) -> None:
        ray: Any = import_module("ray")

        now = time.monotonic()
        for future, call in list(self._calls.items()):
            if call.deadline < now:
                # Its calls fail now, which `rollouts` sees.
                ray.kill(self._collector.remote_collectors[call.worker], no_restart=False)
                self._calls[future] = call._replace(deadline=now + self.timeout)

    def shutdown(self) -> None:
        """End all workers."""
        self._calls.clear()
        self._collector.shutdown()
