"""What the benchmark ran on, and the name of its result file."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Return the machine and the versions: processor, count, device, torch, torchrl, Python."""
    return {
        "processor": _processor(),
        "count": os.cpu_count(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchrl": version("torchrl"),
        "python": platform.python_version(),
    }


def result_file(machine: dict[str, Any]) -> Path:
    """Return where the results of a machine go: one file each, whatever the versions."""
    name = f"{machine['processor']} x{machine['count']} {machine['device']}"
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()
