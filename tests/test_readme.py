"""What README and pages show is what the tests run and what commands draw from results."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import five_lines
import pytest
import test_integration

from bench.learning import goal_coverage, results, suite
from bench.learning import report as ablation
from bench.report import in_readme, machine_line
from torchrl_recall.demo.report import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LEARNING = (ROOT / "docs" / "learning.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
# What a build of the site copies there.
COPIED = {"changelog.md", "contributing.md", "results.md"}


def test_the_diff_is_the_tested_script():
    quick_start = (ROOT / "docs" / "quickstart.md").read_text()
    for page, names in ((README, ["ppo"]), (quick_start, ["ppo", "sac"])):
        shown = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
        assert shown == [five_lines.diff(name) for name in names]


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_a_script_gets_five_statements_and_one_other_optimizer(name):
    assert len(five_lines.added(name)) == 5
    added = re.findall(r"^[+-] .*", five_lines.diff(name), re.MULTILINE)
    changed = [line for line in added if line.startswith("-")]
    assert len(changed) == 1
    assert "optimizer = " in changed[0]


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_a_script_without_the_five_statements_is_stock_torchrl(name, monkeypatch):
    """The integration test runs the script as it was before; nothing of ours may be called."""
    before = five_lines.without_recall(name)
    for ours in ("Backtrack", "Recall", "ValuePrioritized", "recall", "trace_", "transition_value"):
        assert ours not in before.partition('"""')[2].partition('"""')[2]
    scope = dict(vars(test_integration))
    exec(before, scope)
    log = run_stock(name, scope[name])
    assert len(log) == {"ppo": 8, "sac": 8}[name]
    for losses in log:
        assert all(bool(value.isfinite().all()) for value in losses.values())
        assert not {"loss_imitation", "loss_backtrack"} & set(losses.keys())


def run_stock(name, script):
    t = test_integration
    t.torch.manual_seed(0)
    env = t.TransformedEnv(
        t.GymEnv("Pendulum-v1"), t.Compose(t.StepCounter(max_steps=50), t.InitTracker())
    )
    critic = t.ValueOperator(t.MLP(3, 1, num_cells=[16]))
    if name == "ppo":
        return script(env, t.make_actor(env, return_log_prob=True), critic)
    qvalue = t.ValueOperator(t.MLP(4, 1, num_cells=[16]), ["action", "observation"])
    replay = t.TensorDictReplayBuffer(storage=t.LazyTensorStorage(1_000), batch_size=32)
    return script(env, t.make_actor(env), qvalue, copy.deepcopy(critic), replay, generator=None)


def test_the_tables_are_drawn_from_the_committed_results():
    for size, pages in ((15, (README, LEARNING)), (19, (LEARNING,))):
        runs = json.loads((ROOT / f"bench/results/four_rooms_{size}/results.json").read_text())
        assert all(table(runs, 200_000) in page for page in pages)


def test_the_speeds_are_the_committed_ones():
    saved = json.loads((ROOT / "bench/results/amd-epyc-x2-cpu.json").read_text())
    tables = in_readme(saved)
    assert len(tables) == 3
    for wanted in (machine_line(saved), *tables):
        assert wanted in PERFORMANCE
    assert machine_line(saved) in README
    assert tables[0] in README


def test_what_the_parts_are_worth_is_drawn_from_the_committed_results():
    assert ablation.in_readme(ablation.read(ROOT / "bench/results/ablation")) in LEARNING
    for maze in goal_coverage.MAZES.values():
        assert goal_coverage.tables(maze.load())[0] in LEARNING


def test_the_learning_tables_are_drawn_from_the_committed_results():
    tables = results.in_readme(suite.collect(), suite.sections())
    assert results.insert(README, tables) == README
    report = (ROOT / "RESULTS.md").read_text()
    for line in tables.splitlines():
        if line.startswith("| A2C"):
            assert f"|{line.split('|')[1]}|{line.split('|')[2]}|" in report


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in COPIED], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", text):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}
            assert anchor in anchors, anchor


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 210


def test_there_are_exactly_two_setup_commands():
    commands = re.findall(r"<!-- ci: (\w+) -->\n```bash\n(.+)\n```", README)
    assert [name for name, _ in commands] == ["demo", "test"]
    assert all("python3 -m venv .venv && .venv/bin/pip install" in text for _, text in commands)


def test_help_names_every_option():
    out = subprocess.run(
        [sys.executable, "-m", "torchrl_recall", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    options = ["size", "start", "seeds", "first-seed", "methods", "steps", "device", "out"]
    for option in options:
        assert f"--{option}" in out
