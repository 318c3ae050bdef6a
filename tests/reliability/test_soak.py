"""Many steps: the process does not grow, steps do not get slower, threads do not become more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlpcore as mc

STEPS = 5_000


def soaked(kind, steps):
    """Return the findings of `soak.py` in its own process."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{Path(mc.__file__).parents[1]}{os.pathsep}{root}"}
    command = [sys.executable, "-m", "tests.reliability.soak", kind, str(steps)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="Linux tells what a process takes"
)
@pytest.mark.parametrize("kind", ["step", "fit"])
def test_memory_time_and_threads_stay_as_they_are(kind):
    check(kind, STEPS)


def check(kind, steps):
    """Others may be busy on the machine: a slow end is measured again, growth is not."""
    for _ in range(3):
        found = soaked(kind, steps)
        assert found["growth"] <= 1 << 20
        assert len(found["threads"]) == 1
        if found["slowdown"] < 1.2:
            return
    raise AssertionError(f"steps of {kind} took {found['slowdown']:.2f} times as long at the end")
