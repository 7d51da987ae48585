"""Walks in several threads and processes, and walks that are interrupted."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from trace_data import F32, assert_same, make_model, make_start, walk

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.native import interface
from torchrl_recall.traces import native

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    interface.load()[0] is None, reason=f"no native library: {interface.load()[1]}"
)


def test_threads_do_not_disturb_each_other():
    models = [make_model(dtype=F32, seed=i, stop=True, num_cells=(64, 64)) for i in range(2)]
    start = make_start(models[0], 200)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_traces(models[seed % 2], start, num_steps=8, generator=generator)

    alone = [draw(seed) for seed in range(24)]
    with ThreadPoolExecutor(6) as pool:
        for traces, expected in zip(pool.map(draw, range(24)), alone, strict=True):
            assert_same(traces, expected, 0)


def test_a_learner_may_write_while_another_thread_walks():
    model = BacktrackModel(3, 2, num_cells=(64, 64))
    start = torch.zeros(300, 3)

    def draw(seed):
        return sample_traces(model, start, num_steps=6)

    with ThreadPoolExecutor(2) as pool:
        walks = [pool.submit(draw, seed) for seed in range(40)]
        for _ in range(200):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.999)
        for future in walks:
            assert bool(torch.isfinite(future.result()["observation"]).all())
    assert_same(walk(model), walk(model, "eager"), 1e-5)


def test_parameters_may_be_set_while_another_thread_walks():
    model = BacktrackModel(3, 2, num_cells=(300, 300))
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    start = torch.zeros(4, 3)
    with ThreadPoolExecutor(1) as pool:
        walks = [pool.submit(sample_traces, model, start, num_steps=1) for _ in range(300)]
        while not walks[-1].done():
            nn.utils.vector_to_parameters(flat.clone(), model.parameters())
        for future in walks:
            assert bool(torch.isfinite(future.result()["observation"]).all())


INTERRUPTED = """
import os, signal, threading, torch
from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.traces import native

torch.set_num_threads(2)
model, start = BacktrackModel(64, 4, num_cells=(256, 256)), torch.randn(192, 64)
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    sample_traces(model, start, num_steps=600)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
for _ in range(50):
    torch.zeros(600 * 192, 64)
sample_traces(model, start, num_steps=3)
print("alive")
"""


def test_an_interrupted_walk_leaves_no_thread_writing_to_freed_memory():
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["interrupted", "alive"]


def draw_in_child(model, connection):
    torch.set_num_threads(2)
    native.WORK_OF_A_THREAD = 1
    generator = torch.Generator().manual_seed(4)
    connection.send(walk(model, generator=generator)["observation"].tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method, monkeypatch):
    model = BacktrackModel(3, 2, num_cells=(16,))
    monkeypatch.setattr(native, "WORK_OF_A_THREAD", 1)
    torch.set_num_threads(2)
    here = walk(model, generator=torch.Generator().manual_seed(4))
    torch.set_num_threads(1)
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        # Python's and JAX's warnings of forks beside threads are about others' threads.
        warnings.simplefilter("ignore")
        child = context.Process(target=draw_in_child, args=(model, sender))
        child.start()
    assert receiver.poll(60)
    assert receiver.recv() == here["observation"].tolist()
    child.join(10)
    assert child.exitcode == 0
