"""Tests mean the CPU unless they stand in tests/gpu: on a machine with a GPU, `device="auto"` would
take it.
"""

import gc
import signal

import pytest

from mlpcore.backends import devices
from mlpcore.backends.compiled import compiler
from tests.backends.cuda.emulator.device import CpuDevice

# a shell starts a background job with SIGINT ignored, and all processes that the tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header():
    """Say why tests for a GPU are skipped."""
    reason = devices.why_no_cuda()
    return f"tests on a GPU are skipped: {reason}" if reason else "tests on a GPU: they run"


def pytest_configure(config):
    """Let pytest-xdist hand out files as they are collected: by default those with the fewest tests
    come last, among them the longest.
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """Keep collected tests and what earlier files imported out of all garbage collections: a full
    one takes a third of a second otherwise, and some tests make hundreds.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Mark as `emulated` the tests of the CUDA room, and those on a device that the CPU plays."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        names = {value.split(",")[0] for value in values if isinstance(value, str)}
        played = names & {"cuda", "cuda:0", "played"} or "played" in item.fixturenames
        if played or "tests/backends/cuda/" in item.nodeid:
            item.add_marker(pytest.mark.emulated)


@pytest.fixture(autouse=True)
def cpu(request, monkeypatch):
    if "tests/gpu" not in request.node.nodeid:
        monkeypatch.setattr(
            devices, "why_no_cuda", lambda: f"CuPy is not installed: {devices.INSTALL}"
        )


@pytest.fixture(autouse=True)
def compiled():
    """Fail a test in which a pass did not compile: NumPy would have computed it in silence."""
    yield
    assert not compiler._failure


@pytest.fixture(params=["cpu", "cuda:0"])
def device(request, monkeypatch):
    """The name of a device: the CPU, and a CUDA device that the CPU plays."""
    if request.param != "cpu":
        monkeypatch.setitem(devices._opened, "cuda:0", CpuDevice())
    return request.param
