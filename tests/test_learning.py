"""The runner and the report of `python -m bench.learning`."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from bench.learning import __main__ as command
from bench.learning import jobs, measures, results, store, suite
from bench.learning.entry import Entry
from bench.learning.runner import run_missing
from bench.learning.suite import Section
from bench.learning.tables import Row, exponents, table

CALLS: list[tuple[str, int]] = []


def train(seed, name="plain", speed=1):
    """A run whose numbers are known: the score rises by a tenth every ten steps."""
    CALLS.append((name, seed))
    score = [min(1.0, 0.1 * speed * i) for i in range(11)]
    solved = next((10 * (i + seed) for i, s in enumerate(score) if s >= 0.9), None)
    steps = [0, *(10 * (i + seed) for i in range(1, 11))]
    return {
        "steps": steps,
        "score": score,
        "seconds": [0.01 * i for i in range(11)],
        "solved_at": solved,
        "log": {"speed": speed},
    }


def fail_at(bad, seed):
    """A run that fails with one seed, and takes a while with those that come later."""
    if seed == bad:
        raise RuntimeError(f"seed {seed}")
    time.sleep(0.5 * (seed > bad))
    return train(seed)


def entry(variant="plain", speed=1, seeds=(0, 1, 2), **options):
    run = partial(train, name=variant, speed=speed)
    options = {"definition": {"speed": speed}, "budget": 200, **options}
    return Entry("maze", "a2c", variant, seeds, train=run, **options)


SECTION = Section("mazes", "Mazes", ("maze",), ("a2c/fast",), in_readme=("a2c/plain",))


class TestEntry:
    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"seeds": ()}, "seeds"),
            ({"seeds": (1, 1)}, "seeds"),
            ({"budget": 0}, "budget"),
            ({"definition": {"cells": (64,)}}, "definition"),
            ({"variant": "../plain"}, "variant"),
        ],
    )
    def test_refuses(self, change, names):
        with pytest.raises(ValueError, match=names):
            replace(entry(), **change)

    def test_the_suite_has_no_entry_twice_and_its_sections_show_them_all(self):
        entries = suite.collect()
        tasks = {e.task for e in entries}
        names = {(e.task, e.name) for e in entries}
        shown = {(t, a) for s in suite.sections() for t in s.tasks for a in s.algorithms or ("",)}
        for e in entries:
            assert {(e.task, e.algorithm), (e.task, "")} & shown, (e.task, e.name)
        for section in suite.sections():
            assert set(section.tasks) <= tasks, section.name
            found = {name for task, name in names if task in section.tasks}
            assert set(section.in_readme) <= found, section.name
            assert not section.reference or set(section.reference) & found, section.name

    def test_select(self):
        entries = [entry(), entry("fast", 2)]
        assert suite.select(entries, variants=["fast"]) == entries[1:]
        assert suite.select(entries) == entries
        with pytest.raises(ValueError, match="slow"):
            suite.select(entries, variants=["slow"])


class TestRunner:
    def test_round_trip(self, tmp_path):
        assert run_missing([entry()], tmp_path) == 3
        runs = store.load(tmp_path, entry())
        assert [run["seed"] for run in runs] == [0, 1, 2]
        expected = train(1)
        for name in store.MEASURED:
            assert runs[1][name] == pytest.approx(expected[name])
        assert runs[1]["definition"] == {"speed": 1, "budget": 200}
        assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", runs[1]["commit"])
        simulators = {"gymnasium", "mujoco"}
        assert {"torch", "torchrl", "python"} == set(runs[1]["versions"]) - simulators
        assert runs[1]["machine"]
        assert not list(tmp_path.rglob("*.part"))

    def test_resumes_and_runs_nothing_twice(self, tmp_path):
        run_missing([entry()], tmp_path, seeds=[1])
        CALLS.clear()
        run_missing([entry(), entry("fast", 2)], tmp_path)
        assert CALLS == [("plain", 0), ("plain", 2), ("fast", 0), ("fast", 1), ("fast", 2)]
        CALLS.clear()
        assert run_missing([entry()], tmp_path) == 0
        assert CALLS == []

    def test_side_by_side(self, tmp_path):
        some = entry(seeds=(0, 1))
        run_missing([some], tmp_path / "two", workers=2)
        run_missing([some], tmp_path / "one")
        assert store.load(tmp_path / "two", some) == store.load(tmp_path / "one", some)

    @pytest.mark.parametrize("change", [{"definition": {"speed": 3}}, {"budget": 300}])
    def test_a_stale_definition_is_an_error(self, tmp_path, change):
        run_missing([entry()], tmp_path)
        name = "speed" if "definition" in change else "budget"
        with pytest.raises(ValueError, match=f"stale.*{name}"):
            store.load(tmp_path, entry(**change))
        with pytest.raises(ValueError, match="stale"):
            run_missing([entry(**change)], tmp_path)

    @pytest.mark.parametrize(
        ("damage", "names"),
        [
            (lambda run: "", "JSONDecodeError"),
            (lambda run: "[]", "TypeError"),
            (lambda run: json.dumps({k: v for k, v in run.items() if k != "score"}), "score"),
            (lambda run: json.dumps(run | {"seed": 99}), "seed is 99, not 1"),
            (lambda run: json.dumps(run | {"variant": "fast"}), "variant is 'fast'"),
            (lambda run: json.dumps(run | {"score": run["score"][:-1]}), "equally long"),
            (lambda run: json.dumps(run | {"score": [float("nan")] * 11}), "nan"),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path, damage, names):
        run_missing([entry()], tmp_path)
        file = store.path_of(tmp_path, entry(), 1)
        file.write_text(damage(json.loads(file.read_text())))
        with pytest.raises(ValueError, match=f"{re.escape(str(file))} is damaged.*{names}"):
            store.load(tmp_path, entry())

    def test_a_failure_loses_no_other_run(self, tmp_path):
        some = replace(entry(seeds=tuple(range(8))), train=partial(fail_at, 2))
        with pytest.raises(RuntimeError, match="seed 2"):
            run_missing([some], tmp_path, workers=2)
        done = {run["seed"] for run in store.load(tmp_path, some)}
        # All that was begun before, or beside it; and nothing long after.
        assert {0, 1} <= done
        assert 2 not in done
        assert done != set(range(8)) - {2}
        whole = entry(seeds=some.seeds)
        assert run_missing([whole], tmp_path, workers=2) == 8 - len(done)

    def test_what_another_process_made_meanwhile_is_left(self, tmp_path):
        def train_other(seed):
            if seed == 0:
                run_missing([entry()], tmp_path, seeds=[1])
            return train(seed)

        assert run_missing([replace(entry(), train=train_other)], tmp_path) == 2
        assert len(store.load(tmp_path, entry())) == 3

    def test_unknown_seeds_are_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=r"seeds \[77\].*\[0, 1, 2\]"):
            run_missing([entry()], tmp_path, seeds=[1, 77])

    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"score": [0.0, 1.2]}, "1.2"),
            ({"score": [0.0, float("nan")]}, "nan"),
            ({"steps": [0, 0]}, "rise"),
            ({"seconds": [0.0]}, "equally long"),
        ],
    )
    def test_refuses_what_is_not_as_promised(self, tmp_path, change, names):
        measured = {"steps": [0, 1], "score": [0.0, 1.0], "seconds": [0.0, 1.0]}
        measured |= {"solved_at": None, "log": {}}
        store.check(entry(), measured)
        with pytest.raises(ValueError, match=names):
            store.check(entry(), measured | change)
        with pytest.raises(ValueError, match="log"):
            store.check(entry(), {k: v for k, v in measured.items() if k != "log"})
        wide = entry(definition={"score_range": [-2, 2]})
        store.check(wide, measured | {"score": [-1.0, 1.5]})

    def test_the_command_line(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(suite, "collect", lambda: [entry(), entry("fast", 2)])
        monkeypatch.setattr(suite, "sections", lambda: [SECTION])
        out = ["--out", str(tmp_path / "runs")]
        command.main(["run", "--variants", "fast", "--seeds", "0", "2", *out])
        assert "about 0 min left" in capsys.readouterr().out
        command.main(["run", "--list", *out])
        assert capsys.readouterr().out == "maze a2c plain: 0/3\nmaze a2c fast: 2/3\n"
        command.main(["report", *out, "--to", str(tmp_path)])
        text = (tmp_path / "RESULTS.md").read_text()
        assert "- maze, a2c/plain: 0 of 3 seeds\n- maze, a2c/fast: 2 of 3 seeds" in text


class TestMeasures:
    def test_iqm_by_hand(self):
        # Of eight the two lowest and the two highest do not count.
        assert measures.iqm([9, 1, 2, 3, 4, 5, 100, -50]) == pytest.approx((2 + 3 + 4 + 5) / 4)
        # Of five one each, of three none.
        assert measures.iqm([1, 2, 6, 7, 100]) == pytest.approx(5)
        assert measures.iqm([1, 2, 6]) == pytest.approx(3)
        assert measures.iqm([[1, 2, 6], [3, 3, 3]], axis=1) == pytest.approx([3, 3])

    def test_probability_of_improvement_by_hand(self):
        # Of the six pairs (3, 1) (3, 2) (2, 1) win, (2, 2) and (3, 3) tie, (2, 3) loses.
        found = measures.probability_of_improvement([2, 3], [1, 2, 3], "name")
        assert found.estimate == pytest.approx((3 + 0.5 + 0.5) / 6)
        assert found.low <= found.estimate <= found.high
        sure = measures.probability_of_improvement([5, 6], [1, 2, 3], "name")
        assert sure == (1, 1, 1)

    def test_against_rliable(self):
        rliable = pytest.importorskip("rliable.metrics")
        random = np.random.default_rng(0)
        for count in (4, 5, 6, 7, 20):
            one, other = random.integers(0, 9, (2, count)).astype(float)
            assert measures.iqm(one) == pytest.approx(rliable.aggregate_iqm(one[:, None]))
            found = measures.probability_of_improvement(one, other, "name").estimate
            expected = rliable.probability_of_improvement(one[:, None], other[:, None])
            assert found == pytest.approx(expected)

    def test_intervals_cover(self):
        # The mean of 20 normal numbers: percentile intervals cover it in about 93 %.
        random, hits = np.random.default_rng(1), 0
        for trial in range(300):
            found = measures.interval(random.normal(size=20), f"{trial}", np.mean)
            hits += found.low <= 0 <= found.high
        # Four standard deviations of 300 trials: 0.93 ± 0.06.
        assert 0.87 < hits / 300 < 0.99

    def test_ratio_and_difference(self):
        found = measures.ratio([20, 20], [10, 10], "name")
        assert found == (2, 2, 2)
        found = measures.difference([3, 5], [1, 1], "name")
        assert (found.estimate, found.low, found.high) == (3, 2, 4)

    def test_area_by_hand(self):
        # 0 for 10 steps, .5 for 20, and 1 for the 70 that are left of the budget.
        assert measures.area([0, 10, 30], [0, 0.5, 1], 100) == pytest.approx(0.8)
        # What lies beyond the budget does not count.
        assert measures.area([0, 10, 130], [0, 0.5, 1], 100) == pytest.approx(0.45)

    def test_curve_holds_the_last_score(self):
        held = measures.hold([0, 10, 20], [0.1, 0.2, 0.3], [0, 9, 10, 25])
        assert held.tolist() == [0.1, 0.1, 0.2, 0.3]
        middle, low, high = measures.curve(
            [[0, 10]] * 4, [[0, 1], [0, 1], [0, 0], [0, 1]], [5, 10], "name"
        )
        assert middle.tolist() == [0, 1]  # of four runs the middle two
        assert low[1] < 1 == high[1]
        assert low[0] == high[0] == 0

    def test_exponent_of_a_power_law(self):
        found = measures.exponent([10, 20, 40], [[100, 100], [400, 400], [1600, 1600]], "name")
        assert found == pytest.approx((2, 2, 2))


class TestReport:
    @pytest.fixture
    def entries(self, tmp_path):
        entries = [entry(), entry("fast", 2, label="fast / label")]
        run_missing(entries, tmp_path / "runs")
        return entries

    def test_reproduces_byte_for_byte(self, entries, tmp_path):
        made = []
        for _ in range(2):
            written = results.report(entries, [SECTION], tmp_path / "runs", tmp_path)
            made.append([path.read_bytes() for path in written])
            assert len(written) == 3
        assert made[0] == made[1]

    def test_the_numbers(self, entries, tmp_path):
        plain, fast = results.collect(entries, tmp_path / "runs")["maze"]
        # Solved at the ninth or the fifth evaluation, ten steps later with each seed.
        assert plain.costs.tolist() == [90, 100, 110]
        assert fast.costs.tolist() == [50, 60, 70]
        lines = table([plain, fast], SECTION).splitlines()
        assert lines[1].count("|") == lines[2].count("|") == lines[0].count("|")
        assert "| 100 [" in lines[2]
        assert "| 3/3 | 1.67 [" in lines[2]
        assert "| 1.00 [1.00, 1.00] |" in lines[2]
        assert "reference" in lines[3]
        by_area = table([plain, fast], replace(SECTION, by_steps_to_solve=False))
        assert f"{measures.iqm(plain.areas):.3f} [" in by_area

    def test_unsolved_runs_count_as_the_budget(self, tmp_path):
        slow = entry("slow", 0)
        run_missing([slow, entry("fast", 2)], tmp_path)
        rows = results.collect([slow, entry("fast", 2)], tmp_path)["maze"]
        assert rows[0].costs.tolist() == [200] * 3
        assert "| 0/3 | ≥ 3.33 [" in table(rows, SECTION)

    def test_exponents_leave_out_what_is_not_solved(self):
        def row(cost, solved):
            runs = [{"solved_at": cost if i < solved else None} for i in range(10)]
            return Row(entry(budget=9999), runs)

        rows = {10: [row(100, 10)], 20: [row(400, 10)], 40: [row(1600, 7)]}
        assert "| 10, 20 | 100, 400 | 2.00 [2.00, 2.00] |" in exponents(rows)

    def test_scores_of_other_ranges(self):
        run = {"steps": [0, 10], "score": [-2.0, 2.0], "seconds": [0, 1], "solved_at": None}
        row = Row(entry(budget=20, definition={"score_range": [-2, 2]}), [run])
        assert row.finals.tolist() == [1]
        assert row.areas.tolist() == [0.5]

    @pytest.mark.parametrize(("last", "expected"), [(1.59, None), (1.61, 10)])
    def test_solved_is_a_share_of_the_range(self, last, expected):
        """.9 of the way from -2 to 2 is 1.6, whatever the host has made of the bare score."""
        run = {"steps": [0, 10], "score": [1.0, last], "seconds": [0, 1], "solved_at": 0}
        row = Row(entry(budget=20, definition={"score_range": [-2, 2]}), [run])
        assert row.solved_at == [expected]
        assert row.num_solved == (expected is not None)
        assert row.costs.tolist() == [expected or 20]

    def test_readme(self, entries, tmp_path):
        tables = results.in_readme(entries, [SECTION], tmp_path / "runs")
        assert "A2C, plain" in tables
        assert "fast / label" not in tables
        text = f"a\n{results.START}\nold\n{results.END}\nb\n"
        new = results.insert(text, tables)
        assert new == f"a\n{results.START}\n{tables}\n{results.END}\nb\n"
        assert results.insert(new, tables) == new
        with pytest.raises(ValueError, match="once"):
            results.insert("a", tables)

    def test_every_row_says_what_made_it(self, entries, tmp_path):
        results.report(entries, [SECTION], tmp_path / "runs", tmp_path)
        text = (tmp_path / "RESULTS.md").read_text()
        run = json.loads((tmp_path / "runs/maze/a2c/plain/0.json").read_text())
        assert "`python -m bench.learning run --tasks maze`; seeds 0 to 2" in text
        assert run["commit"] in text
        assert run["machine"] in text


@pytest.mark.parametrize("fails", [False, True])
def test_jobs_leave_this_process_as_it_was(fails, monkeypatch):
    # TensorDict asks for pandas at each call of a module; within jobs the answer is no.
    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    threads, seen = torch.get_num_threads(), []
    level = logging.getLogger("torchrl").level

    def run(job: int) -> int:
        seen.append((sys.modules["pandas"], torch.get_num_threads()))
        return 1 // job

    if fails:
        with pytest.raises(ZeroDivisionError):
            list(jobs.results([1, 0], run))
    else:
        assert list(jobs.results([1, 2], run)) == [(1, 1), (2, 0)]
    assert seen == [(None, 1)] * 2
    assert "pandas" not in sys.modules
    assert torch.get_num_threads() == threads
    assert logging.getLogger("torchrl").level == level
