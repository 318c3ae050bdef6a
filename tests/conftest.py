"""Tests mean the CPU unless they stand in tests/gpu: on a machine with a GPU, `device="auto"` would take it."""

import pytest

from mlpcore.backends import device as devices

REASON = "CuPy is not installed, as far as these tests go: pip install 'mlpcore[cuda13]'"


@pytest.fixture(autouse=True)
def cpu(request, monkeypatch):
    if "tests/gpu" not in request.node.nodeid:
        monkeypatch.setattr(devices, "why_no_cuda", lambda: REASON)
