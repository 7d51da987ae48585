"""Memory of large columns: used again, but never while anything can still see it."""

import ctypes
import mmap
import os
import pickle
import subprocess
import sys
import threading
from collections import deque

import pytest
import torch

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.traces import backends, large_columns, release_memory

SHAPE = (8, 16, 4)
SIZE = 8 * 16 * 4 * 4

pytestmark = pytest.mark.skipif(not large_columns._CAN_KEEP, reason="no MADV_FREE on this system")


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(large_columns, "SMALLEST", 64)
    monkeypatch.setattr(large_columns, "_idle", deque(maxlen=large_columns.MOST))
    monkeypatch.setattr(large_columns, "_watches", {})


def new(*shape):
    return large_columns.empty(*(shape or SHAPE), dtype=torch.float32, device="cpu")


def test_memory_is_used_again():
    places = set()
    for _ in range(5):
        column = new()
        assert column.shape == SHAPE
        assert column.dtype == torch.float32
        assert column.is_contiguous()
        assert not column.is_shared()
        places.add(column.data_ptr())
        del column
    assert len(places) == 1


KEEPERS = {
    "view": lambda column, weight: column[3:4, 2],
    "numpy": lambda column, weight: column.numpy(),
    "backward": lambda column, weight: (column * weight).sum(),
    "detach": lambda column, weight: column.detach(),
    "list": lambda column, weight: [column],
    "storage": lambda column, weight: column.untyped_storage(),
    "dlpack": lambda column, weight: torch.utils.dlpack.to_dlpack(column),
}


@pytest.mark.parametrize("keep", KEEPERS)
def test_not_while_something_sees_it(keep):
    column = new().fill_(7.0)
    place = column.data_ptr()
    weight = torch.ones((), requires_grad=True)
    kept = KEEPERS[keep](column, weight)
    del column
    for _ in range(3):
        other = new().fill_(-1.0)
        assert other.data_ptr() != place
    if keep == "backward":
        (slope,) = torch.autograd.grad(kept, weight)
        assert slope == 7 * SIZE // 4
    elif keep in ("view", "numpy", "detach"):
        assert (kept == 7).all()
    del kept
    assert place in {new().data_ptr(), other.data_ptr()}


def test_columns_at_a_time_differ():
    columns = [new() for _ in range(6)]
    assert len({column.data_ptr() for column in columns}) == 6


def test_what_lies_idle_is_bounded():
    columns = [new() for _ in range(8)]
    assert not large_columns._idle
    assert len(large_columns._watches) == 8
    del columns
    assert len(large_columns._idle) == large_columns.MOST
    assert not large_columns._watches
    # Of another size it goes back.
    other = new(5, 5)
    assert not large_columns._idle
    del other
    assert [len(memory) for memory in large_columns._idle] == [100]
    release_memory()
    assert not large_columns._idle


def test_what_lies_idle_is_the_systems_to_take(monkeypatch):
    """It is marked before anything else can get at it, and never again."""
    events = []

    class Memory(mmap.mmap):
        def madvise(self, option, *rest):
            events.append((option, len(large_columns._idle)))
            super().madvise(option, *rest)

    monkeypatch.setattr(large_columns.mmap, "mmap", Memory)
    column = new()
    places = {column.data_ptr()}
    events.clear()
    for _ in range(3):
        del column
        assert events == [(mmap.MADV_FREE, 0)]
        events.clear()
        column = new()
        places.add(column.data_ptr())
        assert not events
    assert len(places) == 1


def test_what_cannot_be_freed_is_not_kept(monkeypatch):
    class Locked(mmap.mmap):
        def madvise(self, option, *rest):
            raise OSError("locked")

    monkeypatch.setattr(large_columns.mmap, "mmap", Locked)
    column = new().fill_(1.0)
    del column
    assert not large_columns._idle


@pytest.mark.parametrize("bound", ["SMALLEST", "LARGEST"])
def test_other_columns_are_torch_s(bound, monkeypatch):
    monkeypatch.setattr(large_columns, bound, SIZE + 1 if bound == "SMALLEST" else SIZE - 1)
    new()
    assert not large_columns._idle
    monkeypatch.setattr(large_columns, bound, SIZE)
    new()
    assert len(large_columns._idle) == 1


def test_no_memory_is_torch_s_to_say(monkeypatch):
    def none(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(large_columns.mmap, "mmap", none)
    assert new().shape == SHAPE
    assert not large_columns._idle


def test_other_default_device():
    with torch.device("meta"):
        assert new().device.type == "cpu"


def test_threads_never_share():
    wrong = []

    def work(number):
        for _ in range(300):
            column = new().fill_(number)
            view = column[2:]
            del column
            if not bool((view == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not large_columns._watches


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_has_its_own():
    held, idle = new().fill_(1.0), new()
    place = idle.data_ptr()
    del idle
    child = os.fork()
    if child == 0:
        taken = new().fill_(5.0)
        there = held.data_ptr()
        held.fill_(5.0)
        same = taken.data_ptr() == place and bool((held == 5).all())
        del held
        same &= {memory_at(m) for m in large_columns._idle} == {there}
        os._exit(0 if same else 1)
    again = new().fill_(2.0)
    assert os.waitpid(child, 0)[1] == 0
    assert again.data_ptr() == place
    assert (held == 1).all()
    assert (again == 2).all()


def memory_at(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_traces_are_the_same(discrete, backend, monkeypatch, tmp_path):
    if not backends()[backend].available:
        pytest.skip("no C library")
    from torchrl_recall.envs import FourRoomsEnv

    if discrete:
        env = FourRoomsEnv(11, start="any", batch_size=(20,), seed=0)
        model, start = BacktrackModel.from_env(env, num_cells=(8,)), env.reset()["observation"]
    else:
        model, start = BacktrackModel(3, 2, num_cells=(8,)), torch.randn(20, 3)

    def walk():
        generator = torch.Generator().manual_seed(3)
        return sample_traces(model, start, num_steps=7, generator=generator, backend=backend)

    for _ in range(3):
        walk()  # dirties the memory
    assert large_columns._idle
    kept = walk()
    monkeypatch.setattr(large_columns, "SMALLEST", 2**40)
    plain = walk()
    assert (kept == plain).all()
    copies = pickle.loads(pickle.dumps(kept)), kept.clone(), kept.memmap(tmp_path)
    for copy in (*copies, kept.share_memory_()):
        assert (copy == plain).all()


MEASURE = """
import sys, torch
from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.traces import release_memory

def memory(name, path):
    lines = [line for line in open(path) if line.startswith(name)]
    return sum(int(line.split()[1]) * 1024 for line in lines)

def now():
    return memory("VmRSS:", "/proc/self/status")

torch.set_num_threads(1)
model, start = BacktrackModel(64, 2, num_cells=(8,)), torch.randn(8192, 64)
sample_traces(model, start, num_steps=2)
before = now()
out = 0
for _ in range(3):
    trace = sample_traces(model, start, num_steps=20)
    out = sum(value.nbytes for value in trace.values(True, True))
    assert now() - before < out + 2**26, "beside the outputs"
    del trace
lazy = memory("LazyFree:", "/proc/self/smaps")
assert now() - lazy - before < 2**23, "idle, and not the system's to take"
assert lazy <= 2**28
trace = sample_traces(model, start, num_steps=20)
view = trace["observation"][3]
del trace
release_memory()
# What the view holds remains.
assert now() - before < out / 2 + 2**23, "after release_memory"
del view
release_memory()
assert now() - before < 2**23, "after the view"
memory("VmHWM:", "/proc/self/status") - before < out + 2**26 or sys.exit("peak")
kept_till_exit = sample_traces(model, start, num_steps=20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's figures")
def test_memory_of_a_process():
    """Columns of 42 MB each: outputs and at most 64 MB while they live, nothing of ours after."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
