"""The main job: its command line, its numbers, its files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
import torch
from tensordict import TensorDict

from torchrl_recall.__main__ import main, parse
from torchrl_recall.demo import report
from torchrl_recall.demo.sil import SelfImitation
from torchrl_recall.demo.train import A2C, METHODS, Settings, evaluate, train
from torchrl_recall.envs import FourRoomsEnv, start_success

SMALL = Settings(size=7, steps=512, num_cells=(16,))
KEYS = {"method", "seed", "goal_known", "steps", "success", "t90", "wall_s"}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_says_what_it_promises_and_repeats_itself(method):
    first, second = train(method, 3, SMALL), train(method, 3, SMALL)
    for run in (first, second):
        assert run.keys() == KEYS | {"traces"}
        del run["wall_s"]
        assert len(run.pop("traces")) == (2 if method.startswith("recall") else 0)
    assert first == second
    assert first["method"] == method
    assert first["goal_known"] is (method == "recall_known")
    assert len(first["steps"]) == len(first["success"])
    assert max(np.diff(first["steps"])) <= 256
    assert first["steps"][-1] <= 512
    assert all(0 <= value <= 1 for value in first["success"])
    assert train(method, 4, SMALL)["success"] != first["success"]


def test_t90_is_the_first_crossing_and_ends_the_run():
    run = train("recall_known", 0, Settings(size=7, steps=20_000))
    assert run["t90"] == run["steps"][-1] < 20_000
    assert run["success"][-1] >= 0.9 > max(run["success"][:-1])


def test_success_is_exact():
    env = FourRoomsEnv(7, batch_size=(2,))
    torch.manual_seed(0)
    actor = A2C(env, SMALL).actor
    cells = [[row, column] for row in range(7) for column in range(7)]
    table = actor.get_dist(TensorDict({"observation": torch.tensor(cells)}, [49])).probs
    assert evaluate(env, actor) == pytest.approx(start_success(env, table), abs=1e-12)


def test_unknown_method():
    with pytest.raises(ValueError, match="method must be one of"):
        train("ppo", 0, SMALL)


def test_self_imitation_stores_discounted_returns_of_rewarded_episodes():
    env = FourRoomsEnv(7, batch_size=(16,))
    sil = SelfImitation(env, A2C(env, SMALL), SMALL)
    cell = torch.tensor([1, 1]).expand(16, 1, 2)
    for reward, done in [(0.0, False), (0.0, False), (1.0, True)]:
        rows = torch.zeros(16, 1, 1)
        rows[5] = reward
        ended = torch.zeros(16, 1, 1, dtype=torch.bool)
        ended[4:6] = done  # row 4 ends without reward
        step = {"observation": cell, "action": torch.zeros(16, 1, dtype=torch.int64)}
        sil._record(TensorDict(step | {"next": {"reward": rows, "done": ended}}, [16, 1])[:, 0])
    assert sil.buffer[:]["return"].tolist() == pytest.approx([0.99**2, 0.99, 1.0])
    assert sil.length.tolist() == [3, 3, 3, 3, 0, 0] + [3] * 10


def test_intervals_against_scipy():
    generator = np.random.default_rng(0)
    for n in (2, 3, 10, 31):
        values = generator.normal(size=n)
        low, high = scipy.stats.t.interval(0.95, n - 1, values.mean(), values.std(ddof=1) / n**0.5)
        assert report.half_width(values) == pytest.approx((high - low) / 2, rel=1e-3)
    assert np.isnan(report.half_width(np.ones(1)))
    numerator, denominator = generator.normal(20, 2, 10), generator.normal(5, 1, 10)
    ratio, low, high = report.ratio_interval(numerator, denominator)
    reference = scipy.stats.bootstrap(
        (numerator, denominator),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        method="percentile",
        rng=1,
        vectorized=True,
    ).confidence_interval
    assert ratio == pytest.approx(numerator.mean() / denominator.mean())
    assert (low, high) == pytest.approx(tuple(reference), rel=0.03)


def test_table_counts_unsolved_runs_at_the_budget():
    common = {"wall_s": 1.0, "steps": [0], "success": [0.0]}
    runs = [
        {"method": "a2c", "seed": 0, "goal_known": False, "t90": None, **common},
        {"method": "a2c", "seed": 1, "goal_known": False, "t90": 500, **common},
        {"method": "recall_known", "seed": 0, "goal_known": True, "t90": 250, **common},
    ]
    assert report.costs(runs, "a2c", 1000).tolist() == [1000.0, 500.0]
    lines = report.table(runs, 1000).splitlines()
    assert "750" in lines[1]
    assert "1/2" in lines[1]
    assert "goal known" in lines[2]
    assert "3.0 [2.0, 4.0]" in lines[2]
    assert any("privileged" in line for line in lines)


def test_curve_keeps_what_was_reached():
    run = {"steps": [0, 128, 256], "success": [0.1, 0.5, 0.9]}
    grid = np.array([0, 127, 128, 300, 10_000])
    assert report.curve(run, grid).tolist() == [0.1, 0.1, 0.5, 0.9, 0.9]


def test_main_writes_its_files(tmp_path, capsys):
    options = ["--size", "5", "--seeds", "1", "--first-seed", "7", "--steps", "384"]
    assert main([*options, "--methods", "a2c", "recall_found", "--out", str(tmp_path / "o")]) == 0
    runs = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [(run["method"], run["seed"]) for run in runs] == [("a2c", 7), ("recall_found", 7)]
    assert all(run.keys() == KEYS for run in runs)
    settings = Settings(size=5, steps=384)
    assert runs[1]["success"] == train("recall_found", 7, settings)["success"]
    assert (tmp_path / "o" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert "A2C + recall traces (goal found by reward)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--size", "8"], "--size"),
        (["--size", "3"], "--size"),
        (["--seeds", "0"], "--seeds"),
        (["--methods", "ppo"], "--methods"),
        (["--start", "goal"], "--start"),
        (["--steps", "-1"], "--steps"),
    ],
)
def test_bad_arguments_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_without_the_demo_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("torchrl_recall.__main__.find_spec", lambda name: None)
    assert main([]) == 2
    assert "torchrl-recall[demo]" in capsys.readouterr().err
