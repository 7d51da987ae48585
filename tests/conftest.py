"""One thread for all tests: their networks are small, and results must not vary by machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

# Shared modules that assert: let failures there show their values too.
pytest.register_assert_rewrite("loss_contract", "trace_data")

torch.set_num_threads(1)

TESTS = Path(__file__).parent
# The tests go with the sdist, and can be run against any installed package. What is about the
# programs, notebooks and pages beside the package is left out where these are not.
BESIDE = re.compile(r"^(?:from|import) bench\b|^# Needs a checkout\.$", re.MULTILINE)
IN_CHECKOUT = all((TESTS.parent / name).is_dir() for name in ("bench", "docs", "tutorials"))
collect_ignore = [
    path.name
    for path in sorted(TESTS.glob("test_*.py"))
    if not IN_CHECKOUT and BESIDE.search(path.read_text(encoding="utf-8"))
]


def pytest_report_header() -> list[str]:
    """Say what is left out, and why."""
    if IN_CHECKOUT:
        return []
    return [f"not in a checkout, so left out: {', '.join(collect_ignore)}"]
