"""What the benchmark ran on, and the name of its result file."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.ours import backends

RESULTS = Path(__file__).parent / "results"


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the machine, the versions of what takes part, and our backends.

    Args:
        device (torch.device): what the benchmark ran on.

    Returns:
        dict: for the result file.
    """
    device = torch.device(device)
    peers = {name: version_of(name) for name in ("jax", "mbrl", "cpprb")}
    return {
        "processor": _processor(),
        "count": os.cpu_count(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchrl": version("torchrl"),
        "python": platform.python_version(),
        "peers": {name: found for name, found in peers.items() if found},
        "backends": backends(),
    }


def result_file(machine: dict[str, Any]) -> Path:
    """Return where the results of a machine go: one file each, whatever the versions."""
    name = f"{machine['processor']} x{machine['count']} {machine['device']}"
    if machine["device"] != "cpu":
        name = machine["device"]
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def version_of(package: str) -> str | None:
    """Return the version of a package; None: it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()
