"""The table of differences between variants, and sections of some hosts only."""

from __future__ import annotations

import numpy as np

from bench.learning import results
from bench.learning.entry import Entry
from bench.learning.suite import Section
from bench.learning.tables import Row, comparisons


def never(seed):
    """Not to be called."""
    raise AssertionError(seed)


def row(variant: str, scores: list[float], algorithm: str = "sac", task: str = "maze") -> Row:
    """A row whose runs have these scores all along, so that they are the areas."""
    seeds = tuple(range(len(scores)))
    entry = Entry(task, algorithm, variant, seeds, 100, never, {"score_range": [0.0, 2.0]})
    runs = [
        {"steps": [0, 50], "score": [s, s], "seconds": [0.0, 1.0], "solved_at": None, "seed": i}
        for i, s in enumerate(scores)
    ]
    return Row(entry, runs)


class TestComparisons:
    def test_differences_are_shares_of_the_range(self):
        rows = [row("plain", [0.2] * 5), row("traces", [1.0] * 5), row("per", [0.4] * 5)]
        lines = comparisons({"maze": rows}, [("traces", "plain"), ("per", "traces")]).splitlines()
        assert lines[0] == "| task | host | traces − plain | per − traces |"
        assert lines[2:] == [
            "| maze | SAC | **+0.400 [+0.400, +0.400]** | -0.300 [-0.300, -0.300] † |"
        ]

    def test_marks(self):
        spread = row("traces", [0.0, 0.1, 0.5, 0.9, 1.0])
        level = row("plain", [0.5] * 5)
        text = comparisons({"maze": [spread, level]}, [("traces", "plain")])
        assert text.endswith(" † |")
        assert "**" not in text
        # Lost, but by less than .05.
        close = comparisons(
            {"maze": [row("traces", [0.48] * 5), level]}, [("traces", "plain")]
        ).splitlines()[-1]
        assert close == "| maze | SAC | -0.010 [-0.010, -0.010] |"

    def test_hosts_have_lines_of_their_own_and_missing_rows_are_empty(self):
        rows = [row("plain", [0.2] * 5), row("traces", [0.2] * 5)]
        rows += [row("plain", [0.0] * 5, "ppo"), row("traces", [2.0] * 5, "ppo")]
        pairs = [("traces", "plain"), ("traces", "per")]
        lines = comparisons({"maze": rows, "other": rows[:1]}, pairs).splitlines()
        assert lines[2:] == [
            "| maze | SAC | +0.000 [+0.000, +0.000] |  |",
            "| maze | PPO | **+1.000 [+1.000, +1.000]** |  |",
        ]

    def test_few_runs_say_nothing(self):
        rows = [row("plain", [0.2] * 4), row("traces", [1.0] * 5)]
        text = comparisons({"maze": rows}, [("traces", "plain")])
        assert text.endswith("| +0.400 [+0.400, +0.400], 5 and 4 runs |")

    def test_equal_runs_are_one_method(self):
        scores = [0.0, 0.4, 1.0, 1.5, 2.0]
        rows = [row("plain", scores), row("traces", scores)]
        text = comparisons({"maze": rows}, [("traces", "plain")])
        assert text.endswith("| SAC | +0.000 [+0.000, +0.000] |")
        # The same numbers of other seeds are not the same runs.
        rows[1].runs.reverse()
        for seed, run in enumerate(rows[1].runs):
            run["seed"] = seed
        text = comparisons({"maze": rows}, [("traces", "plain")])
        assert "| +0.000 [-" in text
        assert text.endswith(" † |")


def test_a_section_shows_its_own_hosts():
    rows = {"maze": [row("plain", [0.2]), row("plain", [0.2], "ppo")], "other": []}
    section = Section("one", "One", ("maze", "other", "absent"), (), algorithms=("ppo",))
    found = results._of_section(rows, section)
    assert {task: [r.entry.algorithm for r in some] for task, some in found.items()} == {
        "maze": ["ppo"]
    }
    assert np.isclose(found["maze"][0].areas, 0.1).all()
