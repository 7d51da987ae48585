"""Results of runs, one JSON file each: written whole or not at all, so that runs can be resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_result(path: Path, content: Any, *, indent: int | None = 1) -> None:
    """Write a result under its name only once it is complete.

    Args:
        path: where it goes; its folder is made.
        content: what JSON can hold.
        indent: of JSON; None is one line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A run that is cut off leaves no half a result, and two processes do not share a file.
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    part.replace(path)
