"""Every tutorial runs from top to bottom."""

# Needs a checkout.
from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


# Jupyter's own: a kernel is not a child that our warnings filter should judge.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path):
    notebook = nbformat.read(path, as_version=4)
    committed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in committed), "commit notebooks with their outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    printed = [output for cell in committed for output in cell.outputs]
    assert not [output for output in printed if output.get("name") == "stderr"]


def test_there_are_tutorials():
    assert TUTORIALS
