"""Memory of large columns: used again, but never while anything can still see it."""

import gc
import os
import pickle
import threading
from collections import deque

import pytest
import torch

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.traces import large_columns, native

LIKE = torch.zeros(8, 16, 4)


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(large_columns, "SMALLEST", 64)
    monkeypatch.setattr(large_columns, "_blocks", deque())


def test_memory_is_used_again():
    places = set()
    for _ in range(5):
        column = large_columns.empty_like(LIKE)
        assert column.shape == LIKE.shape
        assert column.dtype == LIKE.dtype
        assert column.is_contiguous()
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
}


@pytest.mark.parametrize("keep", KEEPERS)
def test_not_while_something_sees_it(keep):
    column = large_columns.empty_like(LIKE).fill_(7.0)
    place = column.data_ptr()
    weight = torch.ones((), requires_grad=True)
    kept = KEEPERS[keep](column, weight)
    del column
    gc.collect()
    for _ in range(3):
        other = large_columns.empty_like(LIKE).fill_(-1.0)
        assert other.data_ptr() != place
    if keep == "backward":
        (slope,) = torch.autograd.grad(kept, weight)
        assert slope == 7 * LIKE.numel()
    elif keep in ("view", "numpy", "detach"):
        assert (kept == 7).all()
    del kept, other
    gc.collect()
    found = [large_columns.empty_like(LIKE) for _ in range(len(large_columns._blocks))]
    assert place in {column.data_ptr() for column in found}


def test_two_at_a_time_differ():
    columns = [large_columns.empty_like(LIKE) for _ in range(6)]
    assert len({column.data_ptr() for column in columns}) == 6


def test_what_is_kept_is_bounded(monkeypatch):
    size = LIKE.numel() * 4
    monkeypatch.setattr(large_columns, "MOST", 3 * size)
    columns = [large_columns.empty_like(LIKE) for _ in range(8)]
    assert len(large_columns._blocks) == 3
    del columns
    # Idle memory of another size goes back.
    other = large_columns.empty_like(torch.zeros(5, 5))
    assert [len(block.memory) for block in large_columns._blocks] == [other.numel() * 4]


def test_small_columns_are_malloc_s(monkeypatch):
    monkeypatch.setattr(large_columns, "SMALLEST", LIKE.numel() * 4 + 1)
    large_columns.empty_like(LIKE)
    assert not large_columns._blocks


def test_threads_never_share():
    wrong = []

    def work(number):
        for _ in range(300):
            column = large_columns.empty_like(LIKE)
            column.fill_(number)
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_has_its_own():
    held = large_columns.empty_like(LIKE).fill_(1.0)
    idle = large_columns.empty_like(LIKE).fill_(2.0)
    place = idle.data_ptr()
    del idle
    child = os.fork()
    if child == 0:
        taken = large_columns.empty_like(LIKE).fill_(5.0)
        held.fill_(5.0)
        os._exit(0 if taken.data_ptr() == place else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (held == 1).all()
    again = large_columns.empty_like(LIKE)
    assert again.data_ptr() == place
    assert (again == 2).all()


@pytest.mark.parametrize("discrete", [False, True])
def test_traces_are_the_same(discrete, monkeypatch):
    if isinstance(native.plan_of(BacktrackModel(3, 1, num_cells=(8,))), str):
        pytest.skip("no C library")
    from torchrl_recall.envs import FourRoomsEnv

    if discrete:
        env = FourRoomsEnv(11, start="any", batch_size=(20,), seed=0)
        model, start = BacktrackModel.from_env(env, num_cells=(8,)), env.reset()["observation"]
    else:
        model, start = BacktrackModel(3, 2, num_cells=(8,)), torch.randn(20, 3)

    def walk():
        generator = torch.Generator().manual_seed(3)
        return sample_traces(model, start, num_steps=7, generator=generator)

    for _ in range(3):
        walk()  # dirties the blocks
    kept = walk()
    assert large_columns._blocks
    monkeypatch.setattr(large_columns, "SMALLEST", 2**40)
    plain = walk()
    assert (kept == plain).all()
    for copy in (pickle.loads(pickle.dumps(kept)), kept.clone(), kept.share_memory_()):
        assert (copy == plain).all()
