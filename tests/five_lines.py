"""The five lines that a script gets, as a diff: `python tests/five_lines.py ppo`.

Made from the scripts that `test_integration.py` runs, where added statements end in ``# recall``.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
from pathlib import Path

SCRIPTS = (Path(__file__).parent / "test_integration.py").read_text(encoding="utf-8")
MARK = "# recall"
# The one statement that changes, rather than being added.
PARAMETERS = re.compile(r"\[\*(\w+\.parameters\(\)), \*model\.parameters\(\)\]")


def with_recall(name: str) -> str:
    """Return a script as it is tested."""
    for node in ast.parse(SCRIPTS).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return ast.get_source_segment(SCRIPTS, node) + "\n"
    raise KeyError(f"test_integration.py has no script {name!r}.")


def added(name: str) -> list[ast.stmt]:
    """Return the statements that bear the mark."""
    script = with_recall(name)
    lines = script.splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith(MARK)}
    simple = [
        node
        for node in ast.walk(ast.parse(script))
        if isinstance(node, ast.stmt) and not hasattr(node, "body")
    ]
    found = [
        node for node in simple if marked & set(range(node.lineno, (node.end_lineno or 0) + 1))
    ]
    if len(found) != len(marked):
        raise ValueError(f"{name}: {len(marked)} marks, but {len(found)} marked statements.")
    return found


def without_recall(name: str) -> str:
    """Return the script as it was before: stock TorchRL."""
    lines = with_recall(name).splitlines(keepends=True)
    for node in added(name):
        lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or 0) - node.lineno + 1)
    return PARAMETERS.sub(r"\1", "".join(lines))


def diff(name: str) -> str:
    """Return what a user adds, all lines of the script shown."""
    before, after = without_recall(name), re.sub(rf" *{MARK}$", "", with_recall(name), flags=re.M)
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), n=1_000)
    return "".join(list(lines)[3:])


if __name__ == "__main__":
    print(diff(sys.argv[1]), end="")
