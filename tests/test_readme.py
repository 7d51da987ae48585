"""What the README shows is what the tests run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.learning import goal_coverage
from bench.learning import report as ablation
from bench.report import in_readme, machine_line
from torchrl_recall.demo.report import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_snippets_are_the_integration_tests():
    source = (ROOT / "tests" / "test_integration.py").read_text()
    assert len(SNIPPETS) == 2
    for snippet in SNIPPETS:
        assert snippet.strip() in source


def test_a_snippet_adds_five_lines():
    for snippet in SNIPPETS:
        assert len(re.findall("# recall", snippet)) == 5


@pytest.mark.parametrize("size", [15, 19])
def test_the_tables_are_drawn_from_the_committed_results(size):
    runs = json.loads((ROOT / f"bench/results/four_rooms_{size}/results.json").read_text())
    assert table(runs, 200_000) in README


def test_the_speeds_are_the_committed_ones():
    saved = json.loads((ROOT / "bench/results/amd-epyc-x2-cpu.json").read_text())
    tables = in_readme(saved)
    assert len(tables) == 3
    for wanted in (machine_line(saved), *tables):
        assert wanted in README


def test_what_the_parts_are_worth_is_drawn_from_the_committed_results():
    assert ablation.in_readme(ablation.read(ROOT / "bench/results/ablation")) in README
    assert goal_coverage.tables(goal_coverage.load())[0] in README


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


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
