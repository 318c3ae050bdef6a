"""A real GPU, and beside it a device that the CPU plays: `device` is either, `gpu` and `cupy` are
the real one alone.
"""

from __future__ import annotations

import os
import shutil
import warnings

import numpy as np
import pytest

from mlpcore.backends import devices
from mlpcore.engine import capture

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of the GPU


def pytest_addoption(parser):
    try:  # pyproject.toml says it in every run; `pytest tests/gpu` needs no pytest-benchmark
        parser.addoption(
            "--benchmark-skip",
            action="store_true",
            help="of pytest-benchmark, which is not installed",
        )
    except ValueError:
        return  # it is


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = devices.why_no_cuda()
    for item in marked:
        # what others deprecate is not ours to fail for
        item.add_marker(pytest.mark.filterwarnings("default"))
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {reason}"))


def real():
    """The GPU, where there is one."""
    return devices.open_device("cuda:0")


@pytest.fixture
def gpu():
    return real()


@pytest.fixture
def cupy(gpu):
    return gpu.xp


@pytest.fixture(params=["played", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A device whose graphs hold 8 chunks, so that a few rows try batches of more."""
    monkeypatch.setattr(capture, "UNROLLED", 8)
    if request.param == "cuda":
        return real()
    if shutil.which("g++") is None and "CI" not in os.environ:
        pytest.skip("needs g++")
    from tests.gpu.strict import StrictDevice

    played = StrictDevice()
    monkeypatch.setitem(devices._opened, "cuda:0", played)
    return played


@pytest.fixture
def put(device):
    """Return a function that copies NumPy arrays to the device, each to its own memory."""

    def there(*arrays):
        found = [None if x is None else device.xp.array(np.ascontiguousarray(x)) for x in arrays]
        return found[0] if len(found) == 1 else found

    return there
