"""The cost of mlpcore apart from training: seconds to import and first step, installed bytes.

The first step is timed from the start of Python to the loss of one step of 784-128-10 on 128 rows;
on a GPU once with an empty kernel cache and once with the cache left by that run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import stats
from bench.machine import PINS, ROOT

FIRST_STEP = """
import numpy, mlpcore
X, Y = numpy.ones((128, 784), numpy.float32), numpy.zeros(128, numpy.int64)
if {device!r} == "cuda":
    import cupy
    X, Y = cupy.asarray(X), cupy.asarray(Y)
float(mlpcore.Trainer(mlpcore.MLP([784, 128, 10], output="softmax", device={device!r})).step(X, Y))
"""


def _seconds(code: str, **environment: str) -> float:
    """Return the seconds that a Python process takes to run `code`."""
    kept = {key: value for key, value in os.environ.items() if key not in PINS}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], env={**kept, "PYTHONPATH": path, **environment}, check=True
    )
    return time.perf_counter() - begin


def _installed(names: list[str]) -> int:
    """Return the bytes of these distributions and their dependencies, without extras."""
    total, seen, left = 0, set(), list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        files = [
            Path(str(file.locate()))
            for file in distribution.files or ()
            if "__pycache__" not in str(file)
        ]
        total += sum(file.stat().st_size for file in files if file.is_file())
        needed = [line for line in distribution.requires or () if ";" not in line]
        left += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed]
    return total


def _requirements() -> list[str]:
    """Return the names in pyproject's dependencies."""
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        dependencies: list[str] = tomllib.load(file)["project"]["dependencies"]
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in dependencies]


def _wheel() -> tuple[int | None, str]:
    """Return the bytes of the wheel built from the checkout, or None and the reason."""
    if not importlib.util.find_spec("hatchling"):
        return None, "needs hatchling"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
        built = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        sizes = [file.stat().st_size for file in Path(folder).glob("*.whl")]
        return (sizes[0], "") if sizes else (None, built.stderr.strip().splitlines()[-1])


def _own() -> int:
    """Return the bytes of mlpcore's own files, kernels included, wherever it is imported from."""
    import mlpcore

    package = Path(mlpcore.__file__).parent
    kernels = [] if (package / "kernels").exists() else [ROOT / "kernels"]
    files = [file for folder in (package, *kernels) for file in folder.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file() and file.suffix != ".pyc")


def measure(device: str, repeats: int = 3) -> dict[str, Any]:
    """Return seconds as medians with bounds, bytes, and what could not be measured."""
    series: dict[str, list[float]] = {
        "python": [],
        "import numpy": [],
        "import mlpcore": [],
        "first step on the CPU": [],
    }
    codes = dict(
        zip(
            series,
            ("", "import numpy", "import mlpcore", FIRST_STEP.format(device="cpu")),
            strict=True,
        )
    )
    for _ in range(repeats):
        for name, code in codes.items():
            series[name].append(_seconds(code))
    if device == "cuda":
        series |= {"first step, cold kernel cache": [], "first step, warm kernel cache": []}
        with tempfile.TemporaryDirectory() as cache:
            for name in list(series)[-2:]:
                series[name].append(
                    _seconds(FIRST_STEP.format(device="cuda"), CUPY_CACHE_DIR=cache)
                )
    own, (wheel, why) = _own(), _wheel()
    sizes = {
        "mlpcore's own files": own,
        "installed, with what it needs": own + _installed(_requirements()),
        "wheel": wheel,
    }
    return {
        "seconds": {name: stats.bounded(values) for name, values in series.items()},
        "bytes": {name: size for name, size in sizes.items() if size is not None},
        "missing": {"wheel": why} if why else {},
    }
