"""The experiment on GoalGAN and recall traces: short runs, exact coverage, a report by hand."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from bench.learning import goal_coverage, results
from bench.learning.goal_mazes import PointSettings
from bench.learning.goal_training import VARIANTS, Run
from bench.result_files import write_result

SHORT = {
    "max_steps": 12,
    "iterations": 3,
    "round_iterations": 1,
    "evaluation_iterations": 1,
    "gan_steps": 2,
    "model_steps": 2,
    "num_traces": 4,
    "trace_steps": 5,
    "epochs": 1,
}
TINY = PointSettings(**SHORT, num_envs=32, grid_spacing=0.5)
POINT = goal_coverage.MAZES["point"]


@pytest.mark.parametrize("variant", goal_coverage.ORDER)
def test_short_run_repeats(variant):
    one, two = (Run(variant, 3, TINY).run() for _ in range(2))
    check_short_run(variant, one, two, 1024)


def check_short_run(variant, one, two, frames):
    assert one["coverage"] == two["coverage"]
    assert one["log"] == two["log"]
    assert one["steps"] == [0, frames, 2 * frames, 3 * frames]
    assert all(0 <= x <= 1 for x in one["coverage"])
    uses_gan, imitates = VARIANTS[variant]
    assert ("goals_in_walls" in one["log"]) is uses_gan
    assert ("trace_kept" in one["log"]) is (imitates is not None)
    assert ("loss_backtrack" in one["log"]) is (imitates == "model")
    if imitates is not None:
        assert max(one["log"]["trace_kept"]) > 0


def test_variants_begin_alike():
    """The same networks and the same evaluation: the same coverage before the first step."""
    assert len({Run(variant, 3, TINY).coverage() for variant in VARIANTS}) == 1


@pytest.mark.parametrize("push", [(0.0, 0.0), (1.0, 0.0), (-1.0, 0.0)])
def test_coverage_of_a_known_policy(push):
    """One that stands still, or runs along the lower arm, by hand."""
    run = Run("uniform", 0, replace(TINY, max_steps=60, grid_spacing=0.25))
    action = torch.tensor(push) * 8  # tanh of it is 1 to 1e-6

    def policy(state, goal):
        loc = action.expand(len(state), 2)
        return loc, torch.full_like(loc, 1e-4)

    run.policy = policy
    start = run.env.start_position
    place, speed, track = start.clone(), torch.zeros(2), []
    for _ in range(60):
        speed = 0.8 * speed + 0.2 * 0.12 * torch.tensor(push)
        place = place + speed
        place[0] = place[0].clamp(1.001, 3.999)  # the walls at both ends
        track.append(place.clone())
    distance = torch.cdist(run.grid, torch.stack(track)).amin(1)
    near = (distance - run.env.goal_radius).abs() < 2e-3
    reached = distance <= run.env.goal_radius
    count = len(run.grid)
    assert abs(run.coverage() - float(reached.float().mean())) <= float(near.sum()) / count + 1e-6
    assert run.coverage() > 0


def test_states_near_goals():
    run = Run("GoalGAN", 0, TINY)
    state = run.env.reset().select("observation", "desired_goal", "elapsed")
    data, _ = run._act(state)
    run.states.extend(data.select("observation", "action", ("next", "observation")).reshape(-1))
    goals = torch.tensor([[1.5, 1.5], [1.5, 3.5]])  # the start, and the other end of the U
    near, far = run.nearest_state(goals)
    assert (near[:2] - goals[0]).norm() <= run.env.goal_radius
    assert far.isnan().all()


def test_the_real_past_is_what_happened():
    settings = replace(
        TINY, max_steps=20, rollout_steps=8, trace_steps=6, iterations=4, num_traces=200
    )
    run = Run("uniform + real past", 0, settings)
    state = run.env.reset().select("observation", "desired_goal", "elapsed")
    steps = []
    for _ in range(4):
        data, state = run._act(state)
        steps.append(data)
        run.states.extend(
            data.select("observation", "action", ("next", "observation"), ("next", "done")).reshape(
                -1
            )
        )
    trace = run._real_past()
    kept = trace["collector", "mask"]
    before, after = trace["observation"], trace["next", "observation"]
    # Unmasked steps were taken in this order by one maze, up to the start of the episode.
    replayed = run.env.step_states(before[kept], trace["action"][kept])
    torch.testing.assert_close(replayed, after[kept])
    run.settings = replace(run.settings, radius=0.0)  # all but exact returns
    trace = run._real_past()
    kept = trace["collector", "mask"]
    joined = kept[:, 1:] & kept[:, :-1]
    assert (
        trace["next", "observation"][:, :-1][joined] == trace["observation"][:, 1:][joined]
    ).all()
    assert joined.sum() > 50
    # Across the boundary of rollouts, too: mazes of 20 steps, rollouts of 8.
    assert (kept.sum(1) == 6).any()


def fake(folder, variant, seed, curve, settings=None):
    result = {"variant": variant, "seed": seed, "steps": [0, 10, 20], "coverage": curve}
    result |= {"settings": settings or {"a": 1}, "seconds": 2.0, "log": {}}
    write_result(POINT.path(variant, seed, folder), result)


def test_report_by_hand(tmp_path):
    for i, variant in enumerate(goal_coverage.ORDER):
        for seed in range(3):
            fake(tmp_path, variant, seed, [0.0, 0.1 * i, 0.2 * i + 0.01 * seed])
    fake(tmp_path, "uniform", 9, [0.0, 1.0, 1.0])  # a seed that the others lack
    runs = POINT.load(tmp_path)
    one, two = goal_coverage.tables(runs)
    # Three seeds: mean .61, standard deviation .01, t(2) = 4.3027, over the root of 3.
    assert "| GoalGAN | 0.610 ± 0.025 | 0.303 ± 0.006 |" in one
    assert "| GoalGAN − uniform | +0.600 ± 0.000 | +0.300 ± 0.000 |" in two
    assert goal_coverage.described(runs) == "3 seeds, 20 environment steps"
    figure = goal_coverage.draw(POINT, runs, tmp_path)
    assert figure.stat().st_size > 10_000
    # The same in the report of all results, and nothing of the ant, who has no runs.
    results.report([], [], tmp_path / "learning", tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(part in text for part in (one, two, "3 seeds", "](goal_coverage.png)"))
    assert text.count("### ") == 1
    fake(tmp_path, "uniform", 0, [0.0, 0.0, 0.0], settings={"a": 2})
    with pytest.raises(ValueError, match="of 2 settings"):
        POINT.load(tmp_path)
    copied = POINT.path("uniform", 8, tmp_path)
    copied.write_text(POINT.path("uniform", 9, tmp_path).read_text())
    with pytest.raises(ValueError, match=r"uniform_8\.json holds uniform, seed 9"):
        POINT.load(tmp_path)


def test_the_report_says_which_maze_is_not_complete(tmp_path):
    fake(tmp_path, "uniform", 0, [0.0, 0.0, 0.0])
    results.report([], [], tmp_path / "learning", tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "Not complete: 0 complete seeds of goal_coverage; run first." in text


def test_report_without_all_controls(tmp_path):
    """A control that lacks a seed is left out; a seed that a main variant lacks is, too."""
    for variant in goal_coverage.ORDER:
        for seed in range(2 if "past" in variant else 3):
            fake(tmp_path, variant, seed, [0.0, 0.5, 0.5])
    assert tuple(POINT.load(tmp_path)) == goal_coverage.MAIN
    POINT.path("GoalGAN", 2, tmp_path).unlink()
    runs = POINT.load(tmp_path)
    assert tuple(runs) == goal_coverage.ORDER
    assert all(list(found) == [0, 1] for found in runs.values())
    POINT.path("uniform", 1, tmp_path).unlink()
    with pytest.raises(FileNotFoundError, match="1 complete seeds of goal_coverage"):
        POINT.load(tmp_path)


def test_runs_are_made_once(tmp_path, monkeypatch):
    maze = goal_coverage.Maze("small", "", "bench.learning.goal_mazes:PointSettings", 2)
    made = []

    class FakeRun:
        def __init__(self, variant, seed, settings):
            assert settings == PointSettings()
            made.append((variant, seed))

        def run(self):
            return {"coverage": [0.5]}

    monkeypatch.setattr("bench.learning.goal_training.Run", FakeRun)
    folder = tmp_path / "small"
    monkeypatch.setattr(
        goal_coverage.Maze, "path", lambda self, v, s: folder / f"{v.replace(' ', '_')}_{s}.json"
    )
    folder.mkdir()
    (folder / "GoalGAN_1.running").touch()
    goal_coverage.run(maze, 0, 2)
    goal_coverage.run(maze, 0, 2)
    assert len(made) == 11
    assert ("GoalGAN", 1) not in made
    saved = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    assert {(r["variant"], r["seed"]) for r in saved} == set(made)


def test_the_committed_runs_have_these_numbers():
    """What is reported was run with the numbers that a new run would have."""
    for maze in goal_coverage.MAZES.values():
        module, _, name = maze.settings.partition(":")
        settings = asdict(getattr(importlib.import_module(module), name)())
        for found in maze.load().values():
            assert all(result["settings"] == settings for result in found.values())
