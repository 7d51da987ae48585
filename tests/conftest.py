"""One thread for all tests: their networks are small, and results must not vary by machine."""

from __future__ import annotations

import pytest
import torch

# Shared modules that assert: let failures there show their values too.
pytest.register_assert_rewrite("loss_contract", "trace_data")

torch.set_num_threads(1)
