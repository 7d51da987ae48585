"""The Triton walk without a GPU: what it refuses, its numbers when interpreted, that it compiles.

On a GPU: test_traces_cuda.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import philox_stream
import pytest
import torch
from torch import nn
from torchrl.data import Unbounded
from trace_data import F32, make_model

from torchrl_recall import BacktrackModel
from torchrl_recall.traces.triton_walk import choose_tiles, networks, unsupported

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


KNOWN = [
    (0, 0, 0, 0, 0, 0, "6627e8d5e169c58dbc57ac4c9b00dbd8"),
    (*[0xFFFFFFFF] * 6, "408f276d41c83b0ea20bc7c66d5451fd"),
    (
        *(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
        "d16cfe0994fdcceb5001e42024126ea1",
    ),
]


@pytest.mark.parametrize("known", KNOWN)
def test_the_written_out_philox_gives_the_known_answers(known):
    found = philox_stream.philox(known[:4], known[4:6])
    assert "".join(f"{int(word):08x}" for word in found) == known[6]


@needs_triton
def test_its_numbers_when_interpreted():
    # Triton must be told to interpret before it is imported, and torch.compile imports it here.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(TESTS / "triton_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("this Triton's interpreter does not go with this NumPy")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize(
    ("precision", "num_cells", "stop"), [("float32", (16,), True), ("float16", (64, 64), False)]
)
def test_it_compiles_for_a_gpu(precision, num_cells, stop, tmp_path, monkeypatch):
    import triton

    bench = pytest.importorskip("bench.triton_resources", reason="not in a checkout")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernel, _ = bench.compile_walk(11, 3, num_cells, precision, 64, stop=stop)
    assert bench.resources(kernel)["spill_store_bytes"] == 0


def with_network(layers, **kwargs):
    """A model whose action network is another one."""
    model = BacktrackModel(3, 1, num_cells=(16, 16), **kwargs)
    model.action_network = nn.Sequential(*layers)
    return model


def hooked():
    model = BacktrackModel(3, 1, num_cells=(16,))
    model.action_network.register_forward_hook(lambda *arguments: None)
    return model


def partly_double():
    model = BacktrackModel(3, 1, num_cells=(16,))
    model.action_network[0].double()
    return model


UNSUPPORTED = {
    "observation is not continuous": lambda: make_model("support", dtype=F32),
    "not continuous with a Gaussian": lambda: make_model("lattice", dtype=F32),
    "action is not continuous": lambda: make_model("normal", "categorical", dtype=F32),
    "129 features, more than 128": lambda: BacktrackModel(129, 1, num_cells=(16,)),
    "17 values, more than 16": lambda: BacktrackModel(3, 17, num_cells=(16,)),
    "wider than 1024": lambda: BacktrackModel(3, 1, num_cells=(1025,)),
    "different widths": lambda: BacktrackModel(3, 1, num_cells=(16, 32)),
    "float64": lambda: BacktrackModel(3, 1, num_cells=(16,), dtype=torch.float64),
    "not all float32": partly_double,
    "hooks": hooked,
    "no activation Hardswish": lambda: with_network(
        [nn.Linear(3, 16), nn.Hardswish(), nn.Linear(16, 2)]
    ),
    "no activation Softplus": lambda: with_network(
        [nn.Linear(3, 16), nn.Softplus(2.0), nn.Linear(16, 2)]
    ),
    "different activations": lambda: with_network(
        [nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)]
    ),
    "hidden layers have": lambda: with_network([nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)]),
    "action_network is not": lambda: with_network([nn.Linear(3, 16), nn.Linear(16, 2)]),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_it_says_why_it_cannot_run_a_model(reason):
    assert reason in str(unsupported(UNSUPPORTED[reason]()))


@pytest.mark.parametrize("num_cells", [(), (16,), (50, 50), (256,) * 3])
def test_it_lacks_but_the_machine_for_others(num_cells):
    model = BacktrackModel(3, Unbounded((2,)), num_cells=num_cells, stop=True)
    assert len(networks(model)) == 3
    missing = "triton is not installed" if find_spec("triton") is None else "not on an NVIDIA GPU"
    assert missing in str(unsupported(model))


def test_small_batches_get_small_tiles():
    from torchrl_recall.traces.triton_pack import Sizes

    sizes = Sizes(features=111, actions=8, layers=2, width=256, stops=False, half=True)
    rows = [choose_tiles(sizes, n, 132, 232448).rows for n in (64, 2112, 4000, 8192, 10**6)]
    assert rows == [16, 16, 32, 64, 64]
    assert choose_tiles(sizes, 8192, 128, 101376).stages == 2
