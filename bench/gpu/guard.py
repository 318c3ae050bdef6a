"""A pytest plugin: without a GPU the run fails, and a broken CUDA context costs one test.

A kernel's fault is reported by a later call, and from then on by every call of the process.
Therefore the device is synchronized after each test; if that fails, the process ends, and
pytest-xdist reports that test and starts another process.
"""

from __future__ import annotations

import os
import sys

import pytest

from mlpcore.backends import devices

BROKEN = 86  # exit status of a process with a broken context


def pytest_configure(config: pytest.Config) -> None:
    if reason := devices.why_no_cuda():
        pytest.exit(f"no GPU: {reason}", returncode=1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return
    try:
        cupy.cuda.runtime.deviceSynchronize()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        message = f"{item.nodeid} broke the CUDA context: {error}"
        if not hasattr(item.config, "workerinput"):  # without xdist, no other process takes over
            pytest.exit(message, returncode=BROKEN)
        with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(message, file=sys.stderr, flush=True)
        os._exit(BROKEN)
