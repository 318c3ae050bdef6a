"""Ways to compute the CPU's passes, compared: NumPy, C++ compilers on this machine, numba.

    python bench/compilers.py ["CXX" …]

Without arguments it tries g++, clang++ and, if the package ziglang is installed, `zig c++`; numba
is measured if it is installed. Each way runs in a process of its own: seconds until the passes are
compiled in an empty cache folder (the second time, too, since a compiler may build its own
libraries first), then medians in microseconds, one thread, float32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

from mlpcore.backends.numpy.host import HostDevice
from mlpcore.core.activations import resolve
from mlpcore.core.optimizers import AdamW
from mlpcore.core.program import program
from mlpcore.core.schedules import Progress

PARAMETERS, ROUNDS = 669_706, 40
ADAMW = AdamW(1e-3, weight_decay=0.01)


def arrays(*shape: int) -> np.ndarray:
    """Random float32."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def ours() -> dict[str, Callable[[], Any]]:
    """Return the passes of mlpcore as this process computes them, by name."""
    ops, tanh = HostDevice().operations()(), resolve("tanh")
    passes = {}
    for rows in (32, 1024):
        S, b, G = arrays(rows, 64), arrays(64), arrays(rows, 64)
        db = np.empty_like(b)
        up = ops.record(lambda S=S, b=b: ops.bias_activation(S, b, tanh, S))
        down = ops.record(lambda G=G, Z=S, db=db: ops.activation_gradient(G, Z, Z, tanh, G, db))
        passes[f"bias + tanh, {rows} x 64"] = up.replay
        passes[f"gradient + db, {rows} x 64"] = down.replay
    compiled = program(ADAMW.statements, frozenset({"rate", "t", *ADAMW.constants()}))
    values = compiled.fold(ADAMW.scalars(Progress(step=9)))
    scalars = {key: np.array(value, np.float32) for key, value in values.items()}
    vectors = {name: abs(arrays(PARAMETERS)) for name in ("w", "g", "m", "v")}
    update = ops.record(lambda: ops.map(compiled, vectors, scalars))
    passes[f"AdamW, {PARAMETERS:,}"] = update.replay
    return passes


def numbas() -> dict[str, Callable[[], Any]]:
    """Return the same passes as numba compiles them."""
    import numba

    @numba.njit(error_model="numpy", nogil=True)
    def activate(S: Any, b: Any) -> None:
        for i in range(S.shape[0]):
            for j in range(S.shape[1]):
                S[i, j] = np.tanh(S[i, j] + b[j])

    @numba.njit(error_model="numpy", nogil=True)
    def descend(G: Any, Z: Any, db: Any) -> None:
        db[:] = 0
        for i in range(G.shape[0]):
            for j in range(G.shape[1]):
                G[i, j] *= np.float32(1) - Z[i, j] * Z[i, j]
                db[j] += G[i, j]

    @numba.njit(error_model="numpy", nogil=True)
    def adamw(w: Any, g: Any, m: Any, v: Any, k: Any) -> None:
        for i in range(w.size):
            m[i] = k[0] * m[i] + k[1] * g[i]
            v[i] = k[2] * v[i] + k[3] * g[i] * g[i]
            w[i] = k[4] * w[i] - k[5] * (m[i] / (np.sqrt(v[i]) + k[6]))

    passes: dict[str, Callable[[], Any]] = {}
    for rows in (32, 1024):
        S, b, G = arrays(rows, 64), arrays(64), arrays(rows, 64)
        db = np.empty_like(b)
        passes[f"bias + tanh, {rows} x 64"] = lambda S=S, b=b: activate(S, b)
        passes[f"gradient + db, {rows} x 64"] = lambda G=G, S=S, db=db: descend(G, S, db)
    vectors = [abs(arrays(PARAMETERS)) for _ in range(4)]
    k = np.array([0.9, 0.1, 0.999, 0.001, 0.99999, 1e-3, 1e-8], np.float32)
    passes[f"AdamW, {PARAMETERS:,}"] = lambda: adamw(*vectors, k)
    return passes


def measure(way: str) -> dict[str, float]:
    """Return seconds until the first calls have returned, and each pass's microseconds."""
    begin = time.perf_counter()
    passes = numbas() if way == "numba" else ours()
    for run in passes.values():
        run()
    found = {"seconds": time.perf_counter() - begin}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(ROUNDS):
        for name, run in passes.items():
            begin = time.perf_counter()
            for _ in range(10):
                run()
            times[name].append((time.perf_counter() - begin) / 10)
    return found | {name: 1e6 * statistics.median(each) for name, each in times.items()}


def in_a_process(way: str, zig: str) -> dict[str, float]:
    """Measure a way in a new process.

    Args:
        way: "numpy", "numba" or the command of a compiler.
        zig: the folder of zig's own libraries.
    """
    with tempfile.TemporaryDirectory() as cache:
        own = {"MLPCORE_COMPILE": "0" if way == "numpy" else "1", "MLPCORE_CACHE": cache}
        environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", "ZIG_GLOBAL_CACHE_DIR": zig}
        if way not in ("numpy", "numba"):
            environment["CXX"] = way
        command = [sys.executable, __file__, "--child", way]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure every way twice, and print a table in Markdown."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    zig = shlex.join([sys.executable, "-m", "ziglang", "c++"])
    known = [name for name in ("g++", "clang++") if shutil.which(name)]
    known += [zig] if importlib.util.find_spec("ziglang") else []
    ways = ["numpy", *(sys.argv[1:] or known)]
    ways += ["numba"] if importlib.util.find_spec("numba") else []
    with tempfile.TemporaryDirectory() as libraries:
        first, again = ({way: in_a_process(way, libraries) for way in ways} for _ in range(2))
    names = [name for name in again["numpy"] if name != "seconds"]
    print("| way | first, s | again, s |", " | ".join(f"{name}, us" for name in names), "|")
    print("|---" * (3 + len(names)) + "|")
    for way in ways:
        cells = [f"{found[way]['seconds']:.2f}" for found in (first, again)]
        cells += [f"{again[way][name]:.1f}" for name in names]
        print(f"| {'zig c++' if way == zig else way} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
