"""`RecallCheckpoint`: resumed runs go on bit for bit, and no fault leaves half a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_run import Run

from torchrl_recall import BacktrackModel
from torchrl_recall.checkpoint import RecallCheckpoint

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = Run(tmp_path / "whole")
    losses = [whole.iterate() for _ in range(12)]

    first = Run(tmp_path / "cut")
    begun = [first.iterate() for _ in range(7)]
    first.checkpoint.save(7)
    # Another seed, and used: nothing of it may survive.
    second = Run(tmp_path / "cut", seed=5)
    for _ in range(3):
        second.iterate()
    assert second.checkpoint.load_latest() == 7
    resumed = [second.iterate() for _ in range(5)]

    assert begun + resumed == losses
    assert torch.equal(second.parameters(), whole.parameters())
    assert torch.equal(second.recall.sampler.weights(256), whole.recall.sampler.weights(256))
    assert torch.equal(second.replay[:]["observation"], whole.replay[:]["observation"])
    assert second.recall.storage is second.replay.storage
    assert second.recall._rng is second.replay._rng


def test_shared_storage_is_saved_once(tmp_path):
    run = Run(tmp_path)
    run.iterate()
    path = run.checkpoint.save(1)
    sizes = {p.parent.name: p.stat().st_size for p in path.rglob("state.pt")}
    replay, recall = (
        next(size for name, size in sizes.items() if name.endswith(end))
        for end in ("-replay", "-recall")
    )
    storage = sum(
        x.numel() * x.element_size() for x in run.replay.storage._storage.values(True, True)
    )
    assert replay > storage
    assert recall < replay


def test_nothing_but_tensors_is_unpickled(tmp_path):
    run = Run(tmp_path)
    run.iterate()
    path = run.checkpoint.save(1)
    files = list(path.rglob("state.pt"))
    assert len(files) == 8
    for file in files:
        torch.load(file, weights_only=True)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"state": Evil()}, next(f for f in files if "-model" in str(f)))
    with pytest.raises(Exception, match=r"incompatible|[Ww]eights"):
        run.checkpoint.load_latest()
    assert not (tmp_path / "evil").exists()


def test_20_kills_at_random_moments_leave_checkpoints_that_load(tmp_path):
    command = [sys.executable, str(HERE / "checkpoint_run.py"), str(tmp_path), "20"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line[0].isdigit()]
    assert len(rows) == 20
    before = 0
    for step, iterations, _, kept in rows:
        assert step == iterations
        assert int(step) > before
        assert int(kept) <= 3
        before = int(step)
    assert any(left == "True" for _, _, left, _ in rows), "no kill hit a save: nothing shown"

    # All that was cut 20 times is what one run without a cut would have learnt.
    torch.set_num_threads(1)
    survivor, whole = Run(tmp_path), Run(tmp_path / "whole")
    assert survivor.checkpoint.load_latest() == before
    for _ in range(before):
        whole.iterate()
    assert torch.equal(survivor.parameters(), whole.parameters())


def test_full_disk_is_an_error_and_the_old_checkpoint_stays(tmp_path):
    script = f"""
import resource, signal
from checkpoint_run import Run
run = Run({str(tmp_path)!r})
run.iterate()
run.checkpoint.save(1)
run.iterate()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    run.checkpoint.save(2)
except OSError as error:
    print("refused:", error)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000000001"]
    run = Run(tmp_path, seed=3)
    assert run.checkpoint.load_latest() == 1
    assert run.progress["iterations"] == 1


def test_a_damaged_part_is_reported_by_name(tmp_path):
    run = Run(tmp_path)
    run.iterate()
    path = run.checkpoint.save(1)
    file = next(f for f in path.rglob("state.pt") if "-replay" in str(f))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(Exception, match="replay"):
        run.checkpoint.load_latest()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="at least one part"):
        RecallCheckpoint(tmp_path)
    with pytest.raises(TypeError, match="policy is a function"):
        RecallCheckpoint(tmp_path, policy=lambda x: x)
    with pytest.raises(ValueError, match="directory is ''"):
        RecallCheckpoint("", numbers={"a": 1})
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        RecallCheckpoint(tmp_path, keep_last=0, model=BacktrackModel(3, 1, num_cells=(4,)))
    with pytest.raises(ValueError, match="global_rng"):
        RecallCheckpoint(tmp_path, global_rng={})
    checkpoint = RecallCheckpoint(tmp_path, numbers={"a": 1})
    assert checkpoint.load_latest() is None
    checkpoint.save(3)
    with pytest.raises(ValueError, match=r"step is 3, but .* has a checkpoint of step 3"):
        checkpoint.save(3)


def test_generators_are_restored_in_place(tmp_path):
    generator = torch.Generator().manual_seed(1)
    checkpoint = RecallCheckpoint(tmp_path, generator=generator)
    checkpoint.save(1)
    drawn = torch.rand(3, generator=generator), torch.rand(3)
    checkpoint.load_latest()
    assert torch.equal(torch.rand(3, generator=generator), drawn[0])
    assert torch.equal(torch.rand(3), drawn[1])


def test_saves_where_it_is_told(tmp_path, monkeypatch):
    """The working directory only if it is named."""
    monkeypatch.chdir(tmp_path)
    RecallCheckpoint("runs/a", numbers={"a": 1}).save(1)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    RecallCheckpoint(".", numbers={"a": 1}).save(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000000000001", "runs"]
