"""What is loaded, from where, and what is left behind: no code or pickle of somebody else's."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchrl_recall
from torchrl_recall.checkpoint import RecallCheckpoint
from torchrl_recall.native import interface
from torchrl_recall.traces import triton_walk
from torchrl_recall.traces.triton_cache import exposed_cache, why_exposed

PACKAGE = Path(torchrl_recall.__file__).parent
RUN = """
import torch
from torchrl_recall import BacktrackModel, ValuePrioritizedSampler, sample_traces
from torchrl_recall.native import interface
sample_traces(BacktrackModel(3, 1, num_cells=(4,)), torch.zeros(2, 3), num_steps=2)
ValuePrioritizedSampler(4)
print(interface.LIBRARY, interface.load()[0])
"""
# Calls that run what a file says.
UNSAFE = re.compile(r"(^|\.)(pickle|dill|cloudpickle|marshal|shelve)(\.|$)|^(eval|exec)$")


def calls_of(path):
    """Each call in a file, as its dotted name and its keyword arguments."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: k.value for k in node.keywords}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def unsafe(path):
    """What a file does that could run what another file says."""
    found = [name for name in imports_of(path) if UNSAFE.search(name)]
    for name, options in calls_of(path):
        if name.endswith("torch.load"):
            only = options.get("weights_only")
            if not (isinstance(only, ast.Constant) and only.value is True):
                found.append(name)
        elif UNSAFE.search(name) or (name.endswith(("np.load", "numpy.load"))):
            found.append(name)
    return found


def test_the_library_unpickles_nothing():
    """By its source; TorchRL's `Checkpoint`, which reads for it, is tried in `test_checkpoint`."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 80
    assert {str(path): unsafe(path) for path in files if unsafe(path)} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_that_test_sees_what_is_unsafe(line, tmp_path):
    file = tmp_path / "a.py"
    file.write_text(line)
    assert unsafe(file)
    file.write_text("torch.load(f, weights_only=True)\nmodel.eval()\n")
    assert not unsafe(file)


@pytest.mark.skipif(interface.load()[0] is None, reason="there is no native library")
def test_code_comes_with_the_package_and_none_is_cached(tmp_path):
    """The C library is built at installation. None is sought or kept where others can write."""
    folders = {name: tmp_path / name for name in ("home", "temporary", "cache", "working")}
    for folder in folders.values():
        folder.mkdir()
        (folder / interface.LIBRARY.name).write_bytes(b"not a library")
    environment = {k: v for k, v in os.environ.items() if k != "TORCHRL_RECALL_LIBRARY"}
    environment |= {
        "HOME": str(folders["home"]),
        "TMPDIR": str(folders["temporary"]),
        "XDG_CACHE_HOME": str(folders["cache"]),
        "LD_LIBRARY_PATH": str(folders["working"]),
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=folders["working"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # As installed, unless a variable names another build.
    built = PACKAGE / "native" / interface.LIBRARY.name
    assert done.stdout.split()[0] == str(built)
    assert f"CDLL '{built}'" in done.stdout
    ours = [
        path
        for folder in folders.values()
        for path in folder.rglob("*")
        if path.is_file() and path.read_bytes() != b"not a library" and "recall" in path.name
    ]
    assert ours == []


@pytest.mark.skipif(os.name == "nt", reason="modes are of POSIX")
def test_checkpoints_are_as_private_as_their_owner_says(tmp_path):
    """A checkpoint obeys the umask: what others may not read or write, they cannot."""
    before = os.umask(0o077)
    try:
        path = RecallCheckpoint(tmp_path / "runs", numbers={"a": 1}).save(1)
    finally:
        os.umask(before)
    for part in [path, *path.rglob("*")]:
        mode = part.stat().st_mode
        assert mode & 0o077 == 0, part
        assert part.stat().st_uid == os.getuid()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes are of POSIX")
class TestKernelCache:
    """Triton's, from which kernels for GPUs are loaded."""

    def test_is_made_for_its_owner_alone(self, tmp_path):
        folder = tmp_path / "triton" / "cache"
        assert why_exposed(folder) is None
        assert folder.stat().st_mode & 0o777 == 0o700
        assert why_exposed(folder) is None

    def test_is_refused_where_others_write(self, tmp_path, monkeypatch):
        tmp_path.chmod(0o757)
        assert "can be written by others" in why_exposed(tmp_path)
        tmp_path.chmod(0o775)
        assert why_exposed(tmp_path) is None  # the user's own group
        monkeypatch.setattr(os, "getgid", lambda: tmp_path.stat().st_gid + 1)
        assert "can be written by others" in why_exposed(tmp_path)
        tmp_path.chmod(0o700)

    def test_is_refused_if_it_is_anothers(self, tmp_path, monkeypatch):
        owner = tmp_path.stat().st_uid
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
        if owner == 0:  # root, who may write anywhere
            assert why_exposed(tmp_path) is None
            os.chown(tmp_path, 12345, -1)
        assert "belongs to another user" in why_exposed(tmp_path)

    def test_is_where_triton_looks(self, tmp_path, monkeypatch):
        for name in ("TRITON_HOME", "TRITON_CACHE_DIR"):
            monkeypatch.setenv(name, str(tmp_path / name))
            (tmp_path / name).mkdir()
            exposed_cache.cache_clear()
            assert exposed_cache() is None
            folder = tmp_path / name
            folder = folder / ".triton" / "cache" if name == "TRITON_HOME" else folder
            folder.chmod(0o777)
            exposed_cache.cache_clear()
            assert str(folder) in exposed_cache()
        exposed_cache.cache_clear()
        # What is refused is a reason not to run there.
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(triton_walk, "unavailable", lambda: None)
        assert str(folder) in triton_walk._wrong_machine(torch.device("cuda"))
        exposed_cache.cache_clear()
