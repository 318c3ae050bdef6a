"""A training step over the time of its GEMMs alone: how much is lost around them.

    python bench/step_over_gemms.py [--cases 784-512-512-10] [--json FILE]

The GEMMs are the step's own: the same backend, BLAS and threads, whole batch, preallocated outputs, random data. Step and
GEMMs run interleaved in one process; a ratio is taken of each pair, the median printed with its 95% bound. "A/A" is the ratio
between two runs of the GEMMs, the band inside which nothing is a difference. The run is repeated in a child process without the
environment's pins of OpenBLAS (OPENBLAS_CORETYPE), where there are any.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import mlpcore as mc
from mlpcore.backends import blas
from mlpcore.backends.numpy_ops import NumpyOps
from mlpcore.core.optimizers import Optimizer

PINS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
CASES = [  # sizes, hidden activation, batch sizes; 10 outputs mean softmax and cross-entropy, others squared error
    ([784, 128, 10], "relu", [32, 128, 512]),
    ([784, 512, 512, 10], "relu", [128, 1024, 8192]),
    ([64, 64, 64, 64, 1], "tanh", [32, 1024, 65536]),
    ([256, 1024, 1024, 256], "gelu", [512]),
]
OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {"SGD": lambda: mc.SGD(1e-5), "AdamW": lambda: mc.AdamW(1e-6)}


def gemms(net: mc.MLP, X: np.ndarray) -> Callable[[], None]:
    """The GEMMs of one step on the whole batch, into preallocated outputs."""
    rng, ops, L = np.random.default_rng(1), NumpyOps(), len(net.sizes) - 1
    Z = [X, *(rng.standard_normal((len(X), n), dtype=np.float32) for n in net.sizes[1:])]
    out = [np.empty_like(z) for z in Z]
    dW = [None, *(np.empty_like(W) for W in net.W[1:])]

    def run() -> None:
        for l in range(1, L + 1):
            ops.gemm(Z[l - 1], net.W[l], out[l])
        for l in range(L, 0, -1):
            ops.gemm(Z[l - 1].T, Z[l], dW[l])
            if l > 1:
                ops.gemm(Z[l], net.W[l].T, out[l - 1])

    return run


def measure(sizes: list[int], activation: str, batch: int, optimizer: str, rounds: int) -> dict[str, Any]:
    """Ratios of one case: median, 95% bound, A/A."""
    rng = np.random.default_rng(0)
    classes = sizes[-1] == 10
    net = mc.MLP(sizes, activation, "softmax" if classes else "identity")
    trainer = mc.Trainer(net, "cross_entropy" if classes else "squared_error", OPTIMIZERS[optimizer]())
    X = rng.standard_normal((batch, sizes[0]), dtype=np.float32)
    Y = rng.integers(0, 10, batch) if classes else rng.standard_normal((batch, sizes[-1]), dtype=np.float32)
    runs = {"gemms": gemms(net, X), "step": lambda: trainer.step(X, Y)}
    order = ["gemms", "step", "gemms again"]
    runs["gemms again"] = runs["gemms"]
    for run in runs.values():
        run()
    begin = time.perf_counter()
    runs["step"]()
    repeat = max(1, int(0.15 / (time.perf_counter() - begin)))
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(rounds):
        for name in order if turn % 2 else order[::-1]:
            time.sleep(0.1)  # BLAS threads spin for a while after their last GEMM: let those of the run before fall asleep
            runs[name]()
            begin = time.perf_counter()
            for _ in range(repeat):
                runs[name]()
            seconds[name].append((time.perf_counter() - begin) / repeat)
    floor = (np.array(seconds["gemms"]) + np.array(seconds["gemms again"])) / 2
    ratios = np.sort(np.array(seconds["step"]) / floor)
    same = np.sort(np.abs(np.array(seconds["gemms again"]) / np.array(seconds["gemms"]) - 1))
    margin = int(0.98 * np.sqrt(rounds))  # order statistics that bound the median at 95%
    middle = rounds // 2
    plan = trainer.plan(batch)
    return {
        "case": "-".join(map(str, sizes)), "activation": activation, "batch": batch, "optimizer": optimizer,
        "gemms_ms": float(np.median(floor) * 1e3), "step_ms": float(np.median(seconds["step"]) * 1e3),
        "ratio": float(np.median(ratios)),
        "low": float(ratios[max(0, middle - margin)]), "high": float(ratios[min(rounds - 1, middle + margin)]),
        "a_a": float(np.median(same)), "chunk_rows": plan.rows, "workers": plan.workers,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="only cases whose sizes contain this")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if any(pin in os.environ for pin in PINS):
        print(f"without the environment's {blas.pin()}:")
        environment = {key: value for key, value in os.environ.items() if key not in PINS}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    info = mc.info()
    kernels = ", ".join(f"{pool['architecture']} kernels on {pool['num_threads']} threads" for pool in info["blas"])
    print(f"{info['cpu']}, {info['cpus']} CPUs; numpy {np.__version__}; {kernels}")
    head = f"{'case':<21}{'batch':>7} {'optimizer':<10}{'GEMMs ms':>10}{'step ms':>10}{'ratio':>7}"
    print(f"{head}  {'95% bound':<12}{'A/A':>6}  chunk")
    rows = []
    for sizes, activation, batches in CASES:
        if options.cases not in "-".join(map(str, sizes)):
            continue
        for batch in batches:
            for optimizer in OPTIMIZERS:
                row = measure(sizes, activation, batch, optimizer, options.rounds)
                rows.append(row)
                times = f"{row['gemms_ms']:>10.3f}{row['step_ms']:>10.3f}{row['ratio']:>7.2f}"
                bounds = f"{row['low']:.2f} … {row['high']:.2f} {row['a_a']:>6.1%}  {row['chunk_rows']} x {row['workers']}"
                print(f"{row['case']:<21}{batch:>7,} {optimizer:<10}{times}  {bounds}", flush=True)
    if options.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        for pool in info["blas"]:
            pool["filepath"] = Path(pool["filepath"]).name  # no machine's paths
        result = {"info": info, "commit": commit, "rounds": options.rounds, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
