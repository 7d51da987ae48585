"""Processes as Linux shows them in /proc, by what they inherit and are called; and Ray's start."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest


def _read(pid, name):
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended
        return b""


def command_of(pid):
    """What a process is called, with its arguments."""
    return _read(pid, "cmdline").replace(b"\0", b" ").decode().strip()


def marked(mark):
    """Pids of living processes that inherited ``mark``, ``NAME=value``, in their environment."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = [pid for pid in pids if mark.encode() in _read(pid, "environ").split(b"\0")]
    return [pid for pid in found if _read(pid, "stat").rpartition(b")")[2].split()[:1] != [b"Z"]]


def ray_workers(name, session):
    """Pids of the workers of a Ray session whose class is called ``name``."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    called = [pid for pid in pids if command_of(pid).startswith(f"ray::{name}")]
    return [pid for pid in called if os.path.basename(session) in _open_files(pid)]


def _open_files(pid):
    try:
        links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return ""
    return "\n".join(links)


def wait_until(condition, seconds):
    """Whether a condition became true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def ray_or_skip(num_cpus):
    """Ray, started here and ended at last; the test is skipped where Ray does not start."""
    import ray

    from torchrl_recall.demo.ray_collectors import ray_running

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, while it starts
        running, reason = ExitStack(), ""
        try:
            running.enter_context(ray_running(num_cpus))
        except Exception as error:  # its own services have 15 seconds, or Ray gives up
            reason = str(error)
        if reason:
            gc.collect()  # while its warnings of what it left are ignored
            pytest.skip(f"Ray does not start here: {reason}")
        with running:
            yield ray
