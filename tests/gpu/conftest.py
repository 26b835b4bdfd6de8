"""Tests that need an NVIDIA GPU; skipped without one."""

from __future__ import annotations

import pytest
import torch

WHY = "no NVIDIA GPU here; on a host that has one: `pytest tests/gpu`, or examples/airgap/gpu.sh"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=WHY))
