"""The experiment on GoalGAN and recall traces: short runs, exact coverage, a report by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from bench.learning import goal_coverage
from bench.learning.goal_training import VARIANTS, Run, Settings

TINY = replace(
    Settings(),
    num_envs=32,
    max_steps=12,
    iterations=3,
    round_iterations=1,
    evaluation_iterations=1,
    gan_steps=2,
    model_steps=2,
    num_traces=4,
    trace_steps=5,
    epochs=1,
    grid_spacing=0.5,
)


@pytest.mark.parametrize("variant", goal_coverage.ORDER)
def test_short_run_repeats(variant):
    one, two = (Run(variant, 3, TINY).run() for _ in range(2))
    assert one["coverage"] == two["coverage"]
    assert one["log"] == two["log"]
    assert one["steps"] == [0, 1024, 2048, 3072]
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
    goal_coverage.path_of(variant, seed).write_text(json.dumps(result))


def test_report_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(goal_coverage, "FOLDER", tmp_path)
    monkeypatch.setattr(goal_coverage, "FIGURE", tmp_path / "figure.png")
    for i, variant in enumerate(goal_coverage.ORDER):
        for seed in range(3):
            fake(tmp_path, variant, seed, [0.0, 0.1 * i, 0.2 * i + 0.01 * seed])
    fake(tmp_path, "uniform", 9, [0.0, 1.0, 1.0])  # a seed that the others lack
    goal_coverage.report()
    printed = capsys.readouterr().out
    # Three seeds: mean .61, standard deviation .01, t(2) = 4.3027, over the root of 3.
    assert "| GoalGAN | 0.610 ± 0.025 | 0.303 ± 0.006 |" in printed
    assert "| GoalGAN − uniform | +0.600 ± 0.000 | +0.300 ± 0.000 |" in printed
    assert "3 seeds, 20 environment steps" in printed
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    fake(tmp_path, "uniform", 0, [0.0, 0.0, 0.0], settings={"a": 2})
    with pytest.raises(SystemExit, match="of 2 settings"):
        goal_coverage.report()


def test_runs_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(goal_coverage, "FOLDER", tmp_path)
    made = []

    class FakeRun:
        def __init__(self, variant, seed, settings):
            made.append((variant, seed))

        def run(self):
            return {"coverage": [0.5]}

    monkeypatch.setattr("bench.learning.goal_training.Run", FakeRun)
    (tmp_path / "goalgan_1.running").touch()
    goal_coverage.run(0, 2)
    goal_coverage.run(0, 2)
    assert len(made) == 11
    assert ("GoalGAN", 1) not in made
    assert len(list(tmp_path.glob("*.json"))) == 11
