"""Tests mean the CPU unless they stand in tests/gpu: on a machine with a GPU, `device="auto"` would take it."""

import pytest

from mlpcore.backends import device as devices


@pytest.fixture(autouse=True)
def cpu(request, monkeypatch):
    if "tests/gpu" not in request.node.nodeid:
        monkeypatch.setattr(devices, "why_no_cuda", lambda: f"CuPy is not installed: {devices.INSTALL}")
