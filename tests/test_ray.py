"""The program on Ray: it learns, its weights are in step, and it outlives its workers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from processes import command_of, marked, ray_or_skip, ray_workers, wait_until
from tensordict import TensorDict

from torchrl_recall.demo.train import A2C, Settings
from torchrl_recall.envs import FourRoomsEnv

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray is not installed; it is optional"
    ),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks into /proc"),
    # Ray's own, of its files and processes.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
SMALL = Settings(size=7, num_envs=4, num_cells=(32,), model_updates=2, imitation_updates=2)


@pytest.fixture(autouse=True)
def _deadline():
    """A hang fails, whatever hangs."""

    def fail(*_):
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def ray():
    with ray_or_skip(4) as started:
        yield started


def steps_of(count):
    return Settings(**{**vars(SMALL), "steps": count})


def workers(ray, name="Collector"):
    session = ray._private.worker.global_worker.node.get_session_dir_path()
    return ray_workers(name, session)


def test_learns_with_weights_in_step(ray):
    from torchrl_recall.demo.ray import train

    result = train(Settings(size=11, steps=40_000), num_collectors=2, check=True)
    assert result["success"] >= 0.9
    assert result["goal_found"] > 0
    assert result["failures"] == 0
    # The worker computed them from the same numbers with the same operations.
    assert result["weights_error"] <= 1e-6
    # Not because all weights are alike: each worker's are at most what the other's turns made of
    # them old, and the check tells the versions apart.
    assert 0 < result["lag_max"] <= 4
    assert wait_until(lambda: not workers(ray), 10)


def test_check_of_weights_tells_versions_apart(ray):
    from torchrl_recall.demo.ray import weights_error
    from torchrl_recall.demo.ray_collectors import Rollout

    torch.manual_seed(0)
    env = FourRoomsEnv(7, batch_size=(4,), seed=0)
    actor = A2C(env, SMALL).actor
    data = env.rollout(8, actor, break_when_any_done=False).detach()
    sent = TensorDict.from_module(actor).data.clone()
    assert weights_error(actor, Rollout(data, 0, 0, ray.put(sent))) == 0.0
    other = sent.apply(lambda x: x * 1.001 if x.is_floating_point() else x)
    error = weights_error(actor, Rollout(data, 0, 0, ray.put(other)))
    assert 1e-6 < error < 1e-2
    # It put the actor's own weights back.
    assert bool((TensorDict.from_module(actor).data == sent).all())


def test_traces_are_walked_with_the_model_that_is_trained(ray):
    from torchrl_recall.demo.ray import RemoteRecall

    torch.manual_seed(0)
    env = FourRoomsEnv(7, batch_size=(4,), seed=0)
    recall = RemoteRecall(env, A2C(env, SMALL), SMALL, seed=0)
    try:
        seen = []
        for _ in range(2):
            recall.observe(env.rollout(16, break_when_any_done=False))
            trace = recall.transform(recall.buffer.sample())["trace"]
            trace = trace[trace["collector", "mask"]]
            terms = recall.model.step_log_prob(*recall.model.read(trace))
            for name in ("action", "delta"):
                found = trace[f"{name}_log_prob"]
                torch.testing.assert_close(found, terms[name].detach(), rtol=1e-4, atol=1e-5)
            seen.append(TensorDict.from_module(recall.model).data.clone())
        assert bool((seen[0] != seen[1]).any())
    finally:
        recall.close()


class Enough(Exception):
    """Seen what there was to see."""


@pytest.mark.parametrize(
    ("sign", "number"), [(signal.SIGKILL, 2), (signal.SIGSTOP, 2), (signal.SIGKILL, 1)]
)
def test_goes_on_without_a_worker(ray, sign, number):
    """A worker is killed, or hangs; it comes back, and no other waited for it."""
    from torchrl_recall.demo.ray import train

    hit, alive = [], []

    def progress(steps):
        if steps < 500:
            return
        if not hit:
            hit.append(workers(ray)[0])
            os.kill(hit[0], sign)
            return
        alive.append(len(set(workers(ray)) - set(hit)))
        if len(alive) > 20 and alive[-1] == number:
            raise Enough

    with pytest.raises(Enough):
        train(
            steps_of(300_000),
            num_collectors=number,
            timeout=20.0,
            stop_when_solved=False,
            progress=progress,
        )
    if number == 2:
        assert alive.count(1) > 5  # training went on meanwhile, with one worker
    assert wait_until(lambda: not workers(ray), 10)


def test_gives_up_without_the_buffer(ray):
    from torchrl_recall.demo.ray import train

    def progress(steps):
        if steps >= 100:
            for pid in workers(ray, "TensorDictReplayBuffer"):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(ray.exceptions.RayActorError):
        train(steps_of(300_000), stop_when_solved=False, progress=progress)
    assert wait_until(lambda: not workers(ray), 10)


@pytest.mark.parametrize("killed", [False, True])
def test_no_process_is_left(killed):
    """After the end of a run, and after its learner was killed."""
    mark = f"RECALL_TEST_MARK={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    steps = "100000000" if killed else "256"
    command = [sys.executable, "-m", "torchrl_recall.demo.ray", "--size", "21", "--steps", steps]
    run = subprocess.Popen(
        [*command, "--collectors", "1"],
        env={**os.environ, name: value},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )

    def left():
        # Ray's two agents look for their parent only once in a while, and end within a minute.
        agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent") if killed else ()
        return [pid for pid in marked(mark) if not command_of(pid).startswith(agents)]

    try:
        if killed:
            is_running = lambda: any(  # noqa: E731
                command_of(pid).startswith("ray::Collector") for pid in marked(mark)
            )
            assert wait_until(is_running, 200)
            run.kill()
        _, errors = run.communicate()
        if b"timed out during startup" in errors.rpartition(b"Exception: ")[2]:
            pytest.skip("Ray does not start here")
        assert killed or run.returncode == 0, errors.decode()
        assert wait_until(lambda: not left(), 30), [command_of(pid) for pid in left()]
    finally:
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
