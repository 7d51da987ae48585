"""The package as it is built and installed: with its C library, and without a compiler."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "torchrl_recall/native/librecall." + ("dll" if os.name == "nt" else "so")
REASON = "torchrl_recall/native/librecall.txt"
BUILD_SDIST = "from setuptools import build_meta; build_meta.build_sdist('dist')"
SAMPLE = """
import sys, warnings
import torch
import torchrl_recall
from torchrl_recall.native import interface

assert torchrl_recall.__file__.startswith(sys.argv[1]), torchrl_recall.__file__
library, reason = interface.load()
print(reason)
model = torchrl_recall.BacktrackModel(3, 2, num_cells=(8,))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    traces = torchrl_recall.sample_traces(
        model, torch.randn(70, 3), num_steps=4, backend="auto" if library is None else "native"
    )
assert traces.shape == (70, 4) and bool(traces["observation"].isfinite().all())
"""


def compiler():
    names = [os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"]
    return next((name for name in names if name and shutil.which(name.split()[0])), None)


def is_installed(distribution):
    """Ask the metadata: looking for the module `pip` switches setuptools' distutils off."""
    return any(importlib.metadata.distributions(name=distribution))


pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests are not in a checkout"),
    pytest.mark.skipif(
        not all(map(is_installed, ("setuptools", "pip"))),
        reason="building needs setuptools and pip",
    ),
]
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C compiler")


def run(command, cwd, **environment):
    cleared = {"PYTHONPATH": "", "TORCHRL_RECALL_NO_NATIVE": "", "TORCHRL_RECALL_LIBRARY": None}
    variables = {**os.environ, **cleared, **environment}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Unpack an sdist, so that all that follows is built from nothing else."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "librecall.*")
    shutil.copytree(ROOT / "torchrl_recall", copy / "torchrl_recall", ignore=ignored)
    run(["-c", BUILD_SDIST], copy)
    (sdist,) = (copy / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(copy / "unpacked", filter="data")
    (root,) = (copy / "unpacked").iterdir()
    return root


def build(sources, to, **environment):
    """Build a wheel and unpack it; return where, its file name and what the build said."""
    options = ["--no-build-isolation", "--no-deps", "--disable-pip-version-check", "-v"]
    said = run(["-m", "pip", "wheel", *options, "-w", to, "."], sources, **environment)
    (wheel,) = to.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to / "unpacked")
    return to / "unpacked", wheel.name, said


def sample(package):
    said = run(["-c", SAMPLE, str(package)], package.parent, PYTHONPATH=str(package))
    return said.splitlines()[0]


def test_the_sdist_holds_the_c_sources(sources):
    for source in (ROOT / "torchrl_recall" / "native" / "src").iterdir():
        assert (sources / source.relative_to(ROOT)).read_text() == source.read_text()
    assert not (sources / LIBRARY).exists()


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"TORCHRL_RECALL_NO_NATIVE": "1"}, "TORCHRL_RECALL_NO_NATIVE was set"),
        ({"CC": "/bin/false"}, "the C compiler '/bin/false' failed: exit status 1"),
        ({"CC": "/nowhere/cc"}, "there is no C compiler '/nowhere/cc'"),
    ],
)
def test_a_wheel_without_the_library_is_pure_and_says_why(sources, tmp_path, environment, why):
    # What an earlier build could have left.
    for built in (sources / "build").glob("lib*"):
        (built / LIBRARY).touch()
    package, name, said = build(sources, tmp_path, **environment)
    assert name.endswith("-py3-none-any.whl")
    assert not (package / LIBRARY).exists()
    assert (package / REASON).read_text() == why + "\n"
    assert sum(line.endswith(why) for line in said.splitlines()) == 1
    if "CC" not in environment:
        assert why in sample(package)


@needs_compiler
def test_a_wheel_with_the_library_fits_every_python_of_its_platform(sources, tmp_path):
    package, name, _ = build(sources, tmp_path)
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert (package / LIBRARY).exists()
    assert not (package / REASON).exists()
    assert not list(package.rglob("*.[ch]"))
    assert sample(package) == "None"
