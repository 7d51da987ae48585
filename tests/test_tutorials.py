"""The notebooks as committed: run from top to bottom, quiet, small, and with links that lead on.

That they still run is seen by executing them: ``pytest --nbmake tutorials`` (see CONTRIBUTING).
"""

# Needs a checkout.
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 1_500_000
# Of a machine, and of nobody else's.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|opt|tmp|usr|work|Users|var)/|[A-Z]:\\\\Users")


@pytest.fixture(params=TUTORIALS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text())


def cells(notebook, kind):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def outputs(notebook):
    return [output for cell in cells(notebook, "code") for output in cell["outputs"]]


def text(cell):
    return "".join(cell["source"])


def test_there_are_six_tutorials():
    assert [path.name[:2] for path in TUTORIALS] == ["01", "02", "03", "04", "05", "06"]


def test_committed_from_one_run_in_order(notebook):
    counts = [cell["execution_count"] for cell in cells(notebook, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert outputs(notebook)


def test_outputs_are_quiet(notebook):
    kinds = {output["output_type"] for output in outputs(notebook)}
    assert "error" not in kinds
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not MACHINE_PATH.search(json.dumps(notebook["cells"]))


def test_path_pattern_finds_what_it_should():
    assert MACHINE_PATH.search('File "/home/me/x.py"')
    assert not MACHINE_PATH.search("see ../bench/results/ray/a.json")


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_size(path):
    assert path.stat().st_size < MAX_BYTES


def test_begins_with_what_and_how_long_and_ends_with_what_next(notebook):
    first, last = text(notebook["cells"][0]), text(notebook["cells"][-1])
    assert "**What you will learn**" in first
    assert re.search(r"(minute|minutes) on two CPU cores", first.replace("\n", " "))
    assert "## What to try next" in last


def test_pictures_have_captions(notebook):
    """A picture is followed by text that says what it shows, for who cannot see it."""
    for cell, following in zip(notebook["cells"], notebook["cells"][1:], strict=False):
        shown = cell.get("outputs", [])
        if any("image/png" in o.get("data", {}) or "text/html" in o.get("data", {}) for o in shown):
            assert re.match(r"\*(Figure|Animation) \d+\. ", text(following)), text(cell)[:200]


def test_short_form_is_switched_by_one_variable(notebook):
    assert 'SMALL = "RECALL_TUTORIAL_SMALL" in os.environ' in text(cells(notebook, "code")[0])
    assert sum("SMALL" in text(cell) for cell in cells(notebook, "code")) > 1


def test_links_lead_to_files(notebook):
    for cell in cells(notebook, "markdown"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text(cell)):
            assert (FOLDER / target).exists(), target
