"""Measurements behind the design: rates, launch costs, cuBLASLt epilogues, choices, resuming."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu import clock, kit, resume
from mlpcore.backends import devices
from mlpcore.backends.cuda.device import CudaDevice, Launch
from mlpcore.backends.cuda.gemm import UnsupportedAlgorithm, describe
from mlpcore.backends.cuda.ops import EPILOGUES, OWN
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core.activations import Activation
from mlpcore.core.ops import Array, accumulator, storage
from tests.backends.cuda.emulator.device import narrow, widen

NAN = 5  # index of the row of NaN
COUNTS = 20, 16  # integers and doubles, as many as a step's settings
KERNELS = """
struct Record { long long whole[20]; double real[16]; };
template <int> __global__ void one(const float* x) {}
template <int> __global__ void many(const float* x, WHOLE, REAL) {}
template <int> __global__ void record(const float* x, Record all) {}
template <int> __global__ void add(float* x) { x[blockIdx.x * blockDim.x + threadIdx.x] += 1; }
"""
for word, kind, count in (("WHOLE", "long long i", COUNTS[0]), ("REAL", "double d", COUNTS[1])):
    KERNELS = KERNELS.replace(word, ", ".join(f"{kind}{i}" for i in range(count)))


def times(count: int, run: Callable[[], None]) -> None:
    """Run it `count` times."""
    for _ in range(count):
        run()


def rates(device: CudaDevice, small: bool) -> dict[str, Any]:
    """Return the device's ceilings: GB/s of a copy (both ways), TFLOP/s of a square product."""
    xp, out, rng = device.xp, {}, device.xp.random.default_rng(0)
    sizes = (1,) if small else (4, 32, 256, 1024)
    source = rng.standard_normal(sizes[-1] << 18, dtype=xp.float32)
    target = xp.empty_like(source)
    for mib in sizes:
        n = mib << 18
        copy = functools.partial(xp.copyto, target[:n], source[:n])
        out[f"copy of {mib} MiB, GB/s"] = 2 * n * 4 / clock.microseconds(device, copy, 4) / 1e3
    n = 32 if small else 4096
    for name in ("float32", "tf32", "float16"):
        ops: Any = devices.find(device.name).operations(name == "tf32")()
        dtype = xp.float16 if name == "float16" else xp.float32
        A, B = (rng.standard_normal((n, n), dtype=xp.float32).astype(dtype) for _ in "AB")
        product = functools.partial(ops.gemm, A, B, xp.empty_like(A))
        product()  # chooses the algorithm
        us = clock.microseconds(device, product, 2)
        out[f"product of {n} x {n} in {name}, TFLOP/s"] = 2 * n**3 / us / 1e6
    return out


def launches(device: CudaDevice, small: bool) -> dict[str, Any]:
    """Return microseconds of a launch by its arguments, of a graph's node and its launch."""
    x = device.xp.ones(1 << 20, device.xp.float32)
    count, nodes = (2, (2,)) if small else (200, (16, 64, 256))

    def launch(name: str, *more: object, grid: int = 1, block: int = 1) -> Callable[[], None]:
        kernel = device.kernel(KERNELS, f"{name}<0>")
        return functools.partial(device.launch, kernel, Launch((grid, 1), (block, 1)), [x, *more])

    def host(run: Callable[[], None]) -> float:
        run()  # loads it
        return clock.host_and_wall(device, run, count)[0]

    record = np.zeros((), [("whole", "i8", COUNTS[0]), ("real", "f8", COUNTS[1])])
    bound = device.bind(device.kernel(KERNELS, "record<0>"), clock.ONE, [x, record])
    out = {
        "1 argument, host us": host(launch("one")),
        "37 arguments, host us": host(launch("many", *range(COUNTS[0]), *[0.5] * COUNTS[1])),
        "36 of them in a struct, host us": host(launch("record", record)),
        "the same, bound beforehand, host us": host(bound),
        "a launch, device us": clock.microseconds(device, launch("one"), count),
    }
    for n in nodes:
        graph = device.record(functools.partial(times, n, launch("one")))
        out[f"graph of {n} empty nodes, host us"] = host(graph.replay)
        us = clock.microseconds(device, graph.replay, 8)
        out[f"graph of {n} empty nodes, device us a node"] = us / n
    n = nodes[0]
    add = launch("add", grid=1 if small else 4096, block=32 if small else 256)
    graph = device.record(functools.partial(times, n, add))
    us = clock.microseconds(device, graph.replay, 8)
    out["a node over 4 MiB in the cache, device us"] = us / n
    return out


class Multiplied:
    """A product C = A B on the device, with its operands and the function that runs it."""

    def __init__(
        self,
        device: CudaDevice,
        A: Array,
        B: Array,
        C: Array,
        tf32: bool = False,
        epilogue: str = "",
        bias: Array | None = None,
        aux: Array | None = None,
    ) -> None:
        self.device, self.arrays = device, (A, B, C, bias, aux)
        self.at = [0 if x is None else device.address(x) for x in self.arrays]
        self.product = describe(A, B, C, False, tuple(filter(None, self.at)), tf32, epilogue)
        self.workspace = device.empty(device.product_workspace)

    def algorithms(self) -> Sequence[bytes]:
        """The candidates."""
        return self.device.algorithms(self.product)

    def run(self, algorithm: bytes) -> None:
        """Multiply by one of them."""
        A, B, C, bias, aux = self.at
        workspace = self.device.address(self.workspace)
        self.device.multiply(self.product, algorithm, B, A, C, bias, aux, workspace)


class Layer:
    """One layer in a precision, with a row of NaN: as one product with an epilogue, or separate."""

    def __init__(self, device: CudaDevice, precision: str, m: int, k: int, n: int) -> None:
        self.device, self.tf32 = device, precision == "tf32"
        self.dtype = "float32" if self.tf32 else precision
        rng = np.random.default_rng(0)
        A, W, b = (rng.standard_normal(size, dtype=np.float32) for size in ((m, k), (k, n), (n,)))
        A[NAN] = np.nan
        stored = [narrow(x, self.dtype) for x in (A, W, b)]
        A, W, b = (widen(x, self.dtype).astype(np.float64) for x in stored)
        with np.errstate(invalid="ignore"):
            self.s = A @ W + b
        self.A, self.W, self.b = (device.to_device(x) for x in stored)
        self.wide_b = device.to_device(b.astype(accumulator(self.dtype)))
        self.S, self.Z = (device.to_device(np.zeros((m, n), storage(self.dtype))) for _ in "SZ")
        self.ops: Any = devices.find(device.name).operations(self.tf32)()

    def looked_at(self, sigma: Activation, run: Callable[[], None]) -> dict[str, Any]:
        """Return the largest error of Z after a run, whether NaN stays NaN, and the time."""
        z = np.empty_like(self.s)
        NumpyOps().bias_activation(self.s.copy(), None, sigma, z)
        self.Z[...] = 7
        run()
        got = widen(self.device.to_host(self.Z), self.dtype)
        error = float(np.abs(np.delete(got - z, NAN, axis=0)).max())
        time = clock.microseconds(self.device, run, 8)
        return {"error": error, "NaN kept": bool(np.isnan(got[NAN]).all()), "device us": time}

    def apart(self, sigma: Activation) -> dict[str, Any]:
        """Run the layer as a product and a kernel."""
        S = self.S if sigma.slope_reads_s else self.Z

        def run() -> None:
            self.ops.gemm(self.A, self.W, S)
            self.ops.bias_activation(S, self.wide_b, sigma, self.Z)

        return self.looked_at(sigma, run)

    def joined(self, sigma: Activation) -> list[dict[str, Any]]:
        """Run the layer as one product, by every candidate."""
        aux = self.S if sigma.slope_reads_s else None
        made = Multiplied(
            self.device, self.A, self.W, self.Z, self.tf32, EPILOGUES[sigma.name], self.b, aux
        )  # fmt: skip
        found: list[dict[str, Any]] = []
        for algorithm in made.algorithms():
            try:
                found.append(self.looked_at(sigma, functools.partial(made.run, algorithm)))
            except UnsupportedAlgorithm as error:
                found.append({"refused": str(error)})
        return found


def epilogues(device: CudaDevice, small: bool) -> dict[str, Any]:
    """Return error and NaN of every cuBLASLt epilogue, compared with a product and a kernel."""
    found = {}
    for precision in ("float32", "tf32", "bfloat16", "float16"):
        layer = Layer(device, precision, *((8, 16, 16) if small else (128, 256, 256)))
        for sigma in OWN:
            name = f"{sigma.name} in {precision}"
            found[name] = {"apart": layer.apart(sigma), "joined": layer.joined(sigma)}
    return found


def choices(device: CudaDevice, small: bool) -> dict[str, Any]:
    """Return the time of each candidate by `Device.seconds`, and in a graph as in a step."""
    sizes = [(128, 256, 256, False, "float32"), (256, 128, 256, True, "float32")]
    sizes += [(29127, 64, 64, False, "float16"), (64, 29127, 64, True, "float16")]
    xp, rng, found = device.xp, device.xp.random.default_rng(0), {}
    for m, k, n, gradient, dtype in [(8, 8, 8, False, "float32")] if small else sizes:
        shapes = ((k, m) if gradient else (m, k)), (k, n)
        A, B = (rng.standard_normal(shape, dtype=xp.float32).astype(dtype) for shape in shapes)
        C = xp.empty((m, n), "float32" if gradient else dtype)
        made = Multiplied(device, A.T if gradient else A, B, C)
        rows = [both for one in made.algorithms() if (both := _both_times(made, one))]
        chosen, best = min(rows)[1], min(true for _, true in rows)
        name = f"{m} x {k} x {n} {dtype}{', dW' if gradient else ''}"
        found[name] = {"us by seconds(), in a graph": rows, "chosen over best": chosen / best}
    return found


def _both_times(made: Multiplied, algorithm: bytes) -> tuple[float, float] | None:
    """Return microseconds of an algorithm when chosen and in a graph; None if unsupported."""
    run = functools.partial(made.run, algorithm)
    try:
        taken = made.device.seconds(run) * 1e6
    except UnsupportedAlgorithm:
        return None
    graph = made.device.record(lambda: times(16, run))
    return taken, clock.microseconds(made.device, graph.replay, 4) / 16


def resumed(device: CudaDevice, small: bool) -> dict[str, Any]:
    """Return J of the step after a checkpoint, in the original run and resumed in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "run")
        if small:
            here, there = (call(path) for call in resume.CALLS.values())
        else:
            here, there = (float(_alone(name, path)) for name in resume.CALLS)
    if here != there:
        raise ArithmeticError(f"the resumed run differs: J {there!r} instead of {here!r}")
    return {"J, in the run and resumed": [here, there]}


def _alone(name: str, path: str) -> str:
    """Return the output of a separate process for a call of `resume`."""
    command = [sys.executable, "-m", "bench.gpu.resume", name, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    if done.returncode:
        raise ChildProcessError(f"{name}: {done.stderr[-2000:]}")
    return done.stdout


QUESTIONS = (rates, launches, epilogues, choices, resumed)


def main(arguments: Sequence[str] | None = None) -> int:
    options = kit.options(__doc__, arguments)
    device, report = kit.opened(), kit.Report(options.out, "probe")
    for question in QUESTIONS:
        report.add(question.__name__, functools.partial(question, device, options.small))
    answered = len(QUESTIONS) - len(report.failed)
    return report.finish(f"{answered} of {len(QUESTIONS)} questions answered")


if __name__ == "__main__":
    sys.exit(main())
