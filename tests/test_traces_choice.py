"""Which backend walks, what is said when it is not the quickest, and what is refused."""

from __future__ import annotations

import ctypes.util
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from trace_data import F32, F64, assert_same, make_model, make_noise, make_start, walk

from torchrl_recall import BacktrackModel, sample_traces
from torchrl_recall.native import interface
from torchrl_recall.traces import backends

needs_library = pytest.mark.skipif(
    interface.load()[0] is None, reason=f"no native library: {interface.load()[1]}"
)


@needs_library
def test_a_model_partly_in_double_walks_in_torch():
    model = make_model("normal", "normal", dtype=F32)
    model.action.head.normalizer.double()
    with pytest.warns(UserWarning, match=r"falls back .*dtype torch.float64"):
        sample_traces(model, torch.zeros(2, 3), num_steps=2)


def test_another_library_of_that_name_is_refused(tmp_path, monkeypatch):
    found = ctypes.util.find_library("c")
    if found is None:
        pytest.skip("there is no C library to take for ours")
    monkeypatch.setattr(interface, "LIBRARY", Path(found))
    monkeypatch.setattr(Path, "exists", lambda self: True)
    library, reason = interface.load.__wrapped__()
    assert library is None
    assert "does not load" in reason


def test_backends_are_told():
    status = backends()
    assert set(status) == {"native", "triton", "table", "graph", "eager", "reference"}
    assert all(one.detail for one in status.values())
    assert status["native"].available == (interface.load()[0] is not None)


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(interface, "load", lambda: (None, "librecall.so was not built"))
    module = importlib.import_module("torchrl_recall.traces.backends")
    monkeypatch.setattr(module, "_warned_of_library", False)


@pytest.mark.usefixtures("no_library")
def test_without_the_library_one_warning_and_the_torch_path():
    model = BacktrackModel(3, 2, num_cells=(16,))
    with pytest.warns(UserWarning, match=r"falls back to the eager backend.*was not built") as seen:
        traces = walk(model)
    assert seen[0].filename == walk.__code__.co_filename  # the line that called sample_traces
    # Warnings are errors here: there is no second one.
    walk(BacktrackModel(3, 2, num_cells=(16,)))
    assert_same(traces, walk(model, "eager"), 0)
    with pytest.raises(ValueError, match=r"backend='native' cannot run this model.*not built"):
        walk(model, "native")
    status = backends()["native"]
    assert not status.available
    assert "not built" in status.detail


@needs_library
def test_a_model_that_the_kernel_cannot_run():
    model = BacktrackModel(3, 2, num_cells=(16,), activation_class=nn.Hardtanh)
    with pytest.warns(UserWarning, match=r"falls back to the eager backend.*Hardtanh"):
        traces = walk(model)
    walk(model)
    assert_same(traces, walk(model, "eager"), 0)
    with pytest.raises(ValueError, match=r"backend='native' cannot run this model.*Hardtanh"):
        walk(model, "native")


def test_float64_walks_in_torch_without_a_word():
    model = make_model(dtype=F64)
    assert_same(walk(model), walk(model, "eager"), 0)
    with pytest.raises(ValueError, match="float64"):
        walk(model, "native")


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_noise_of_another_kind_is_refused(backend):
    model = make_model(dtype=F32, stop=True)
    if backend == "native" and interface.load()[0] is None:
        pytest.skip("no native library")
    for part in ("action", "delta", "stop"):
        for wrong, message in (
            (lambda x: x.double(), "has dtype torch.float64, expected torch.float32"),
            (lambda x: x.to("meta"), "is on device meta"),
        ):
            noise = make_noise(model, 3, 9)
            noise = noise._replace(**{part: wrong(getattr(noise, part))})
            with pytest.raises(ValueError, match=f"noise.{part} {message}"):
                sample_traces(
                    model, make_start(model, 9), num_steps=3, noise=noise, backend=backend
                )


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'float8'"):
        walk(make_model(dtype=F32), precision="float8")
