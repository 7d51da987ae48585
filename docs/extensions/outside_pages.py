"""What lives outside `docs/`: notebooks, the changelog, results.

Copied at each build and ignored by git: edit the originals.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGES = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md", "results": "RESULTS.md"}
MAY_BE_MISSING = ("composes", "results")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


def copy_pages(docs: Path) -> None:
    """Write the copies beside the site's own pages; those of vanished originals go."""
    root = docs.parent
    notebooks = docs / "tutorials"
    notebooks.mkdir(exist_ok=True)
    wanted = {notebooks / path.name: path for path in (root / "tutorials").glob("*.ipynb")}
    for name, source in PAGES.items():
        wanted[docs / f"{name}.md"] = root / source
    stale = {*notebooks.glob("*.ipynb"), *wanted} - {
        copy for copy, source in wanted.items() if source.exists()
    }
    for copy in stale:
        copy.unlink(missing_ok=True)
    for copy, source in wanted.items():
        if not source.exists():
            continue
        text = source.read_text(encoding="utf-8")
        if copy.suffix == ".ipynb":
            notebook = json.loads(text)
            for cell in notebook["cells"]:
                if cell["cell_type"] == "markdown":
                    cell["source"] = relink("".join(cell["source"]), source, copy)
            text = json.dumps(notebook)
        else:
            text = relink(text, source, copy)
        write(copy, text)


def leave_out(app: Any, docname: str, source: list[str]) -> None:
    """Take pages that are not there, as before the first results, out of the index."""
    if docname == "index":
        for name in MAY_BE_MISSING:
            if not (Path(app.srcdir) / f"{name}.md").exists():
                source[0] = re.sub(rf"(?m)^{name}\n", "", source[0])


def lead_inside(app: Any, docname: str, source: list[str]) -> None:
    """Lead links to the originals of copied pages, as GitHub wants them, to the copies."""
    for name, original in PAGES.items():
        if (Path(app.srcdir) / f"{name}.md").exists():
            source[0] = source[0].replace(f"](../{original}", f"]({name}.md")


def setup(app: Any) -> dict[str, bool]:
    """Register the readers."""
    app.connect("source-read", leave_out)
    app.connect("source-read", lead_inside)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(path: Path, text: str) -> None:
    """Write a file if it changes: Sphinx reads again what is newer than its last build."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def relink(text: str, source: Path, copy: Path) -> str:
    """Lead links to where their targets are in the site; to files that are not in it, by name."""
    root, docs = source.parents[source.parent.name == "tutorials"], copy.parent
    docs = docs.parent if docs.name == "tutorials" else docs
    pages = {root / original: docs / f"{name}.md" for name, original in PAGES.items()}
    up = "../" * (len(copy.relative_to(docs).parts) - 1)

    def replace(match: re.Match[str]) -> str:
        image, label, path, anchor = match.groups()
        target = (source.parent / path).resolve()
        if image:
            return f"![{label}]({up}../{target.relative_to(root.resolve()).as_posix()})"
        if target.suffix == ".ipynb":
            to = f"{up}tutorials/{target.name}"
        elif target in {original.resolve() for original in pages}:
            to = up + next(new.name for old, new in pages.items() if old.resolve() == target)
        elif target.is_relative_to(root.resolve() / "docs") and target.suffix == ".md":
            to = up + target.relative_to(root.resolve() / "docs").as_posix()
        else:
            inside = target.relative_to(root.resolve()).as_posix()
            return label if inside in label else f"{label} (`{inside}`)"
        return f"[{label}]({to}{anchor or ''})"

    return LINK.sub(replace, text)
