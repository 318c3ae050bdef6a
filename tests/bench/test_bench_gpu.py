"""Dry runs on a device that the CPU plays: `--suite gpu`, and the bandwidths of the kernels."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from bench import kernels, store
from mlpcore.backends import devices
from tests.backends.cuda.emulator import compiler
from tests.backends.cuda.emulator.device import CpuDevice

pytestmark = [
    pytest.mark.slow,
    pytest.mark.emulated,
    pytest.mark.skipif(shutil.which("g++") is None and "CI" not in os.environ, reason="needs g++"),
]

PLAYED = """
import dataclasses
from bench import bounds, cases
from mlpcore.backends import devices
from tests.backends.cuda.emulator.device import CpuDevice

devices._opened["cuda:0"] = CpuDevice()
bounds.GPU_ORDER, bounds.GPU_ENTRIES = 16, 1024
for name, case in cases.CASES.items():
    cases.CASES[name] = dataclasses.replace(case, sizes=tuple(min(n, 8) for n in case.sizes))
"""


def test_a_dry_run_of_the_gpu_suite_measures_its_points(root, tmp_path):
    # Python imports it at the start of every process
    (tmp_path / "sitecustomize.py").write_text(PLAYED)
    path = os.pathsep.join(map(str, (tmp_path, root)))
    words = [
        "--suite",
        "gpu",
        "--cases",
        "latency,narrow",
        "--batches",
        "8",
        "--rounds",
        "6",
        "--no-footprint",
    ]
    command = [sys.executable, str(root / "bench" / "run.py"), *words, "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = store.load(tmp_path / "result.json")
    assert list(result["points"]) == ["latency/8/AdamW/float32/cuda", "narrow/8/AdamW/float16/cuda"]
    assert set(result["ceilings"]) == {"cuda/float32", "cuda/float16"}
    for point in result["points"].values():
        ours, again = point["peers"]["mlpcore"], point["peers"]["mlpcore again"]
        assert len(ours["losses"]) == 10
        assert ours["losses"] == again["losses"]
        assert {what: len(series) for what, series in ours["series"].items()} == {
            "step": 6,
            "gemms": 6,
        }


class Timer(CpuDevice):
    """A played device on which all takes a millisecond; it fails after `patience` timings."""

    def __init__(self, patience):
        super().__init__()
        self.patience = patience

    def seconds(self, run):
        if self.patience == 0:
            raise TimeoutError("no patience left")
        self.patience -= 1
        known = len(compiler._kernels)
        run()
        assert len(compiler._kernels) == known, "a kernel was compiled while it was timed"
        return 1e-3


GIB = "0.00001"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(kernels, "COLUMNS", 256)


def test_the_bandwidths_of_the_kernels_are_kept_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setitem(devices._opened, "cuda:0", Timer(patience=5))
    with pytest.raises(TimeoutError):
        kernels.main(["--gib", GIB, "--rounds", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert [(row["kernel"], row["over copy"]) for row in rows] == [
        ("copy", 1.0),
        ("bias_activation relu", 1.0),
    ]


def test_bytes_over_the_time_of_a_kernel_are_its_bandwidth(tmp_path, monkeypatch):
    monkeypatch.setitem(devices._opened, "cuda:0", Timer(patience=-1))
    assert kernels.main(["--gib", GIB, "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert len(rows) == 2 * (1 + 2 * len(kernels.ACTIVATIONS))
    found = {(row["kernel"], row["dtype"]): row for row in rows}
    entries = int(float(GIB) * 2**30) // (4 * kernels.COLUMNS) * kernels.COLUMNS  # of float32
    assert found["copy", "float32"]["GB/s"] == pytest.approx(2 * 4 * entries / 1e-3 / 1e9)
    # three arrays in the time of a copy's two
    assert found["activation_gradient tanh", "float32"]["over copy"] == 1.5
