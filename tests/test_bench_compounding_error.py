"""The report of ``bench/compounding_error.py`` is drawn from its files alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("gymnasium")
from bench import compounding_error as bench


def write(folder, task, model, seed, **more):
    steps = np.array(bench.STEPS)
    result = {"task": task, "model": model, "seed": seed, "lost": 0, "path": [0.5]}
    result["median"] = (steps * 0.1 + seed).tolist()
    result["mean"] = (steps * 0.1).tolist()
    (folder / f"{task}_{model}_{seed}.json").write_text(json.dumps({**result, **more}))


def test_tables_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "FIGURE", tmp_path / "figure.png")
    for seed in range(3):
        walls = {"nll": -1.0 - seed, "ks": 0.25, "outside": 0.5, "in_walls": 0.125}
        write(tmp_path, "maze", "single", seed, **walls)
        write(tmp_path, "maze", "real", seed)
        write(tmp_path, "half_cheetah", "mixture", seed, nll=2.0, ks=0.1, outside=0.0)
    bench.report()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    table = {row[0].strip("| "): [cell.strip("| ") for cell in row[1:]] for row in rows}
    # Seeds 0, 1 and 2 lie one apart: the interval by scipy.
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    expected = [f"{k * 0.1 + 1:.3f} ± {half:.3f} ({k * 0.1:.2f})" for k in bench.STEPS]
    assert table["single Gaussian"][:4] == expected
    assert table["single Gaussian"][4:] == [
        "0.50 ± 0.00",
        f"-2.00 ± {half:.2f}",
        "0.25 ± 0.00",
        "0.50 ± 0.00",
        "0.12 ± 0.00",
    ]
    assert table["control: real"][5:] == ["", "", "", ""]
    assert table["mixture of 5"][5:] == ["2.00 ± 0.00", "0.10 ± 0.00", "0.00 ± 0.00"]
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_controls_of_the_maze():
    """Real trajectories replay to nothing; begun off, they end off by no more than walls add."""
    task = bench.maze("position")
    (real,) = bench.control("maze", task, "real", 0)
    (moved,) = bench.control("maze", task, "perturbed", 0)
    assert max(real["mean"]) < 1e-5
    assert real["in_walls"] == 0
    assert real["outside"] < 0.1
    assert 0.02 < min(moved["median"]) < max(moved["median"]) < 0.1
