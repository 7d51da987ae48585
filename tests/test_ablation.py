"""The ablation of `bench.learning`: variants do what they say, runs resume, reports repeat."""

from __future__ import annotations

import json

import pytest
import scipy.stats
import torch
from tensordict import TensorDict
from torchrl.envs import InitTracker, TransformedEnv

from bench.learning import ablation, report
from bench.learning.best_episodes import BestEpisodes
from bench.learning.rows import ROWS
from bench.learning.runs import every_cell, load, path_of, run, run_missing
from bench.learning.variants import Options, Variant
from torchrl_recall.demo.train import A2C, Settings, train
from torchrl_recall.envs import FourRoomsEnv, success_probability

SIZE, BUDGET = 5, 256


def make(options, size=7, start="any", seed=0, **settings):
    """A variant as `train` would build it, and its environment."""
    torch.manual_seed(seed)
    settings = Settings(size=size, steps=4096, num_cells=(16,), **settings)
    env = FourRoomsEnv(size, start=start, batch_size=(settings.num_envs,), seed=seed)
    return Variant(env, A2C(env, settings), settings, True, options=options), env


class TestVariants:
    def test_the_default_is_the_main_job_digit_for_digit(self):
        mine = run(ROWS["default"], 3, 7, 1024)
        theirs = train("recall_known", 3, Settings(size=7, steps=1024))
        assert (mine["t90"], mine["success"]) == (
            theirs["t90"],
            pytest.approx(theirs["success"][-1], abs=1e-6),
        )
        other = run(ROWS["every_visit"], 3, 7, 1024)
        assert (other["t90"], other["success"]) != (mine["t90"], mine["success"])

    def test_no_two_rows_are_the_same(self):
        definitions = [json.dumps(row.definition(15, 100)) for row in ROWS.values()]
        assert len(set(definitions)) == len(definitions)
        for row in ROWS.values():
            reference = ROWS[row.reference]
            assert reference.reference == reference.name
            assert reference.method == row.method

    @pytest.mark.parametrize("every", [1, 2, 3])
    def test_old_traces_are_imitated_again(self, every):
        variant, _ = make(Options(trace_every=every), imitation_updates=2)
        drawn = [[variant.sample() for _ in range(2)] for _ in range(7)]
        for turn in range(7):
            assert drawn[turn][0] is not drawn[turn][1]
            for step in range(2):
                first = turn - turn % every
                assert drawn[turn][step] is drawn[first][step]
                if turn == first:
                    assert all(drawn[turn][step] is not drawn[t][step] for t in range(turn))

    def test_starts_of_episodes_are_marked_as_torchrl_marks_them(self):
        variant, env = make(Options(stop=True), model_updates=1)
        marked = TransformedEnv(env, InitTracker())
        td, expected = marked.reset(), []
        for _ in range(4):
            data = marked.rollout(8, auto_reset=False, tensordict=td, break_when_any_done=False)
            expected.append(data["is_init"].reshape(-1, 1))
            variant.observe(data.exclude("is_init"))
            td = marked.maybe_reset(data[:, -1]["next"].exclude("reward"))
        expected = torch.cat(expected)
        assert torch.equal(variant.recall_buffer[:]["is_init"], expected)
        assert 16 < expected.sum() < len(expected) / 2

    def test_growing(self):
        variant, env = make(Options(growing=True), model_updates=1)
        lengths = []
        for _ in range(20):
            variant.observe(env.rollout(8, break_when_any_done=False))
            lengths.append(variant.sample()["trace"].shape[1])
        assert lengths[0] == 8
        assert lengths == sorted(lengths)
        assert lengths[15:] == [28] * 5

    def test_weights_know_what_the_goal_is_worth(self):
        variant, _ = make(Options(weight="advantage", last_visit=False))
        with torch.no_grad():
            variant.a2c.critic.module[-1][-1].weight.zero_()
            variant.a2c.critic.module[-1][-1].bias.zero_()
        losses = variant.recall_loss(variant.sample())
        # Of a critic that says 0: the mean of 0.99 ** (steps to the goal).
        powers = sum(0.99**k for k in range(28)) / 28
        assert losses["trace_weight"].item() == pytest.approx(powers, rel=1e-5)

    def test_success_from_every_cell(self):
        variant, env = make(Options())
        cells = torch.cartesian_prod(torch.arange(7), torch.arange(7))
        policy = torch.stack([_probability(variant.a2c, cell) for cell in cells])
        success = success_probability(env, policy.detach())
        rows = env.render().splitlines()
        inner = [
            success[7 * r + c].item() for r in range(7) for c in range(7) if rows[r][c] in "S "
        ]
        assert len(inner) == 19
        assert every_cell(variant) == pytest.approx(sum(inner) / 19, abs=1e-6)


def _probability(a2c, cell):
    return a2c.actor.get_dist(TensorDict({"observation": cell}, [])).probs


class TestBestEpisodes:
    def test_against_the_definition(self):
        env = FourRoomsEnv(5, start="any", batch_size=(4,), max_steps=9, seed=0)
        data = env.rollout(96, break_when_any_done=False)
        buffer = BestEpisodes(4, 10, 0.9, 32)
        assert len(buffer) == 0
        episodes, ended = [], 0
        for begin in range(0, 96, 8):
            buffer.extend(data[:, begin : begin + 8])
        # One step at a time, in the order in which rollouts end episodes.
        for begin in range(0, 96, 8):
            for row in range(4):
                for t in range(begin, begin + 8):
                    if not data["next", "done"][row, t].item():
                        continue
                    first = t
                    while first > 0 and not data["next", "done"][row, first - 1].item():
                        first -= 1
                    rewards = data["next", "reward"][row, first : t + 1, 0].tolist()
                    value = sum(0.9**k * reward for k, reward in enumerate(rewards))
                    ended += 1
                    episodes.append((value, ended, data[row, first : t + 1]))
        best = sorted(episodes, key=lambda episode: (round(episode[0], 9), episode[1]))[-10:]
        assert best[0][0] > 0
        expected = sorted(map(tuple, _flat(torch.cat([episode for _, _, episode in best]))))
        assert sorted(map(tuple, _flat(buffer.steps))) == expected
        assert set(map(tuple, _flat(buffer.sample()))) <= set(expected)

    def test_empty(self):
        with pytest.raises(RuntimeError, match="no episode has finished yet"):
            BestEpisodes(2, 5, 0.9, 8).sample()


def _flat(steps):
    columns = [steps["observation"], steps["action"].unsqueeze(-1), steps["next", "observation"]]
    return torch.cat(columns, -1).tolist()


class TestRuns:
    JOBS = (("default", 1), ("every_visit", 1), ("default", 2))

    def test_none_is_run_twice(self, tmp_path, capsys):
        run_missing(self.JOBS, tmp_path, SIZE, BUDGET)
        assert "0 of 3 runs are there" in capsys.readouterr().out
        files = [path_of(tmp_path, job) for job in self.JOBS]
        before = [file.read_bytes() for file in files]
        files[1].unlink()
        files[1].with_suffix(".part").write_text("{ half a resu")
        run_missing(self.JOBS, tmp_path, SIZE, BUDGET)
        out = capsys.readouterr().out
        assert "2 of 3 runs are there" in out
        assert "[1/1] every_visit 1" in out
        assert "min left" in out
        assert [file.read_bytes() for file in (files[0], files[2])] == [before[0], before[2]]
        again, first = (json.loads(text) for text in (files[1].read_bytes(), before[1]))
        assert again.pop("wall_s") > 0
        del first["wall_s"]
        assert again == first
        assert [r["seed"] for r in load(tmp_path, ROWS["default"], SIZE, BUDGET)] == [1, 2]

    def test_results_of_other_settings_are_refused(self, tmp_path):
        run_missing(self.JOBS[:1], tmp_path, SIZE, BUDGET)
        with pytest.raises(ValueError, match="other settings than 'default' has now"):
            load(tmp_path, ROWS["default"], SIZE, 2 * BUDGET)


class TestReport:
    @staticmethod
    def write(folder, name, costs, every=0.5):
        for seed, t90 in enumerate(costs):
            file = path_of(folder, (name, seed))
            file.parent.mkdir(exist_ok=True)
            content = {
                "row": name,
                "seed": seed,
                "definition": ROWS[name].definition(15, 1000),
                "t90": t90,
                "success": 0.9,
                "every_cell": every,
                "wall_s": 1.5,
            }
            file.write_text(json.dumps(content))

    def test_numbers(self, tmp_path):
        self.write(tmp_path, "default", [100, 200, 300])
        self.write(tmp_path, "every_visit", [400, None, 600], every=0.25)
        text = report.table(report.read(tmp_path, 15, 1000), 1000, 3)
        (default,) = (line for line in text.splitlines() if line.startswith("| default: "))
        (every,) = (line for line in text.splitlines() if line.startswith("| every visit"))
        half = scipy.stats.t.ppf(0.975, 2) * 100 / 3**0.5
        assert default.split(" | ")[1:] == [
            f"200 ± {half:.0f}",
            "reference",
            "3/3",
            "0.50 ± 0.00",
            "1.5 |",
        ]
        cells = every.split(" | ")
        assert cells[1].startswith("667 ± ")
        assert cells[2].startswith("3.33 [")
        low, high = (float(bound) for bound in cells[2][6:-1].split(", "))
        assert 1.3 < low < 3.33 < high < 10
        assert cells[3:5] == ["2/3", "0.25 ± 0.00"]
        assert "Not run: rising_value" in text
        assert "Fewer than" not in text
        assert "Fewer than 4 seeds: default, every_visit." in report.table(
            report.read(tmp_path, 15, 1000), 1000, 4
        )

    def test_the_same_bytes_again(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        self.write(tmp_path, "default", [100, 200, 300])
        self.write(tmp_path, "found_default", [400, None, 600])
        self.write(tmp_path, "found_every_visit", [400, 500])
        arguments = ["report", "--out", str(tmp_path), "--steps", "1000", "--seeds", "0", "1", "2"]
        written = []
        for _ in range(2):
            assert ablation.main(arguments) == 0
            files = [tmp_path / "report.md", tmp_path / "ablation.png"]
            written.append([file.read_bytes() for file in files])
            for file in files:
                file.unlink()
        assert written[0] == written[1]
        assert written[0][1].startswith(b"\x89PNG")
        text = written[0][0].decode()
        assert capsys.readouterr().out == 2 * text
        # A2C and SIL are cut off at the same budget.
        assert "| A2C | 1,000 ± 0 |" in text
        assert "Fewer than 3 seeds: found_every_visit." in text

    def test_nothing_to_report(self, tmp_path, capsys):
        assert ablation.main(["report", "--out", str(tmp_path)]) == 1
        assert "no results" in capsys.readouterr().out
