"""The memory of the process stays within the plan and the limit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlpcore as mc

PEAK = """
import sys, numpy as np, mlpcore as mc
def status(key):
    lines = open("/proc/self/status").readlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
limit = sys.argv[1] if len(sys.argv) > 1 else None
rng = np.random.default_rng(0)
X, Y = rng.standard_normal((4096, 256), np.float32), rng.standard_normal((4096, 8), np.float32)
net = mc.MLP([256, 2048, 2048, 8], "relu", device="cpu")
def make():
    return mc.Trainer(net, "squared_error", mc.AdamW(1e-3), memory_limit=limit)
make().step(X, Y)  # BLAS's own buffers
trainer = make()
plan = trainer.plan(len(X))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
trainer.step(X, Y)
trainer.step(X, Y)
print(plan.total_bytes, plan.total_bytes - net.parameters.nbytes, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak"
)
@pytest.mark.parametrize("limit", ["", "100 MiB"])
def test_the_process_takes_what_the_plan_says_within_2_percent(limit):
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *([limit] if limit else [])],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    total, planned, peak = map(int, run.stdout.split())
    assert 0.97 * planned < peak < 1.02 * planned
    if limit:
        assert 90 << 20 < total <= 100 << 20


MAPPED = """
import sys, numpy as np, mlpcore as mc
def status(key):
    lines = open("/proc/self/status").readlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
X = np.memmap(sys.argv[1], np.float32, "w+", shape=(65536, 128))
X[:] = 1
Y = np.ones((65536, 1), np.float32)
X._mmap.madvise(4)  # its pages do not count to this process
net = mc.MLP([128, 32, 1], "relu", device="cpu")
trainer = mc.Trainer(net, "squared_error", mc.SGD(1e-9), memory_limit="6 MiB")
small, fit = np.ones((600, 128), np.float32), {"epochs": 1, "batch_size": 64, "progress": False}
# what Python and BLAS take at first
trainer.fit(small, Y[:600], validation=(X[:999], Y[:999]), **fit)
net.predict(small, memory_limit="6 MiB"), trainer.losses(X[:999], Y[:999])
for call in (
    lambda: trainer.evaluate(X, Y),
    lambda: trainer.losses(X, Y),
    lambda: trainer.fit(small, Y[:600], validation=(X, Y), **fit),
    lambda: net.predict(X, memory_limit="6 MiB"),
    lambda: net.predict(X[::-1], memory_limit="6 MiB"),
):
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = status("VmRSS")
    call()
    print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak"
)
def test_the_process_evaluates_and_predicts_a_mapped_file_within_the_limit(tmp_path):
    """32 MiB in a file, 6 MiB allowed: windows, and those pages of the file that are in use."""
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    command = [sys.executable, "-c", MAPPED, str(tmp_path / "X")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    peaks = [int(line) for line in run.stdout.split()]
    assert len(peaks) == 5
    assert max(peaks) < 8 << 20, peaks
