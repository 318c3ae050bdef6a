"""The small measurements behind the NumPy backend's choices.

    python bench/choices.py

One line per question: medians in microseconds of each way, interleaved. The first way is the one in
use.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

import mlpcore as mc
from mlpcore.backends.numpy import ops as numpy_ops
from mlpcore.backends.numpy import programs
from mlpcore.core.activations import resolve
from mlpcore.core.program import program
from mlpcore.core.schedules import Progress

Ways = dict[str, Callable[[], Any]]
rng = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    """Random float32."""
    return rng.standard_normal(shape, dtype=np.float32)


def gemm_and_accumulate() -> Ways:
    """S = Z W and dW += Zᵀ D, 1,024 x 784 x 512."""
    Z, W, D, S = numbers(1024, 784), numbers(784, 512), numbers(1024, 512), numbers(1024, 512)
    dW, product = np.zeros_like(W), np.empty_like(W)

    def numpy_and_add() -> None:
        np.matmul(Z, W, out=S)
        np.matmul(Z.T, D, out=product)
        np.add(dW, product, out=dW)

    ways: Ways = {"matmul, matmul, add": numpy_and_add}
    with contextlib.suppress(ImportError):  # SciPy is not a dependency
        ways["SciPy's sgemm, beta = 1"] = _scipy_gemms(Z, W, D, S, dW)
    return ways


def _scipy_gemms(
    Z: np.ndarray, W: np.ndarray, D: np.ndarray, S: np.ndarray, dW: np.ndarray
) -> Callable[[], None]:
    """Multiply by SciPy's C pointer, which is column-major: C = A B is Cᵀ = Bᵀ Aᵀ."""
    from scipy.linalg import cython_blas

    capsule = cython_blas.__pyx_capi__["sgemm"]
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    sgemm = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)(pointer(capsule, name(capsule)))
    n, t = ctypes.c_char(b"N"), ctypes.c_char(b"T")
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    (m, k), n_out = Z.shape, W.shape[1]
    size = {value: ctypes.c_int(value) for value in (m, k, n_out)}

    def ref(*values: Any) -> list[Any]:
        return [v.ctypes.data if isinstance(v, np.ndarray) else ctypes.addressof(v) for v in values]

    M, K, N = size[m], size[k], size[n_out]
    forward = ref(n, n, N, M, K, one, W, N, Z, K, zero, S, N)
    backward = ref(n, t, N, K, M, one, D, N, Z, K, one, dW, N)

    def run(keep: tuple[Any, ...] = (n, t, one, zero, size)) -> None:
        sgemm(*forward)
        sgemm(*backward)

    return run


def outer_product() -> Ways:
    """G = D Wᵀ with one output, 1,024 x 1 x 64."""
    D, W, G = numbers(1024, 1), numbers(1, 64), numbers(1024, 64)
    return {"multiply": lambda: np.multiply(D, W, G), "matmul": lambda: np.matmul(D, W, G)}


def narrow_softmax() -> Ways:
    """Maximum, subtract, exp, sum, divide over 10 classes of 1,024 rows."""
    S, row = numbers(1024, 10), numbers(1024, 1)
    P, T = np.empty_like(S), np.empty((10, 1024), np.float32).T

    def softmax(out: np.ndarray) -> None:
        np.copyto(out, S)
        np.maximum.reduce(out, 1, None, row, True)
        np.subtract(out, row, out)
        np.exp(out, out)
        np.add.reduce(out, 1, None, row, True)
        np.divide(out, row, out)

    return {"on the transpose": lambda: softmax(T), "on rows": lambda: softmax(P)}


def relu_slope() -> Ways:
    """D = G ⊙ positive(z), 512 x 512."""
    Z, G, D = numbers(512, 512), numbers(512, 512), numbers(512, 512)
    mask = np.empty(Z.shape, bool)

    def floats() -> None:
        np.greater(Z, 0, D, casting="unsafe")
        np.multiply(G, D, D)

    def by_mask() -> None:
        np.greater(Z, 0, mask)
        np.multiply(G, mask, D)

    return {"comparison into floats": floats, "mask, then multiply": by_mask}


def broadcast_buffer() -> Ways:
    """S += b, 1,024 x 512, by the size of NumPy's buffer."""
    S, b = numbers(1024, 512), np.zeros(512, np.float32)

    def add(size: int) -> None:
        with np.errstate():
            np.setbufsize(size)
            np.add(S, b, S)

    return {"2,048 entries": lambda: add(2048), "8,192 entries, the default": lambda: add(8192)}


def adamw_pieces() -> Ways:
    """AdamW on 669,706 parameters, one thread, by the number of entries per round of passes."""
    optimizer, vectors = mc.AdamW(1e-8), {name: abs(numbers(669706)) for name in "wgmv"}
    compiled = program(optimizer.statements, frozenset(optimizer.scalars(Progress(total=1))))
    scalars = {
        key: np.float32(value)
        for key, value in compiled.fold(optimizer.scalars(Progress(step=9))).items()
    }
    return {
        f"{piece:,} entries": _by_pieces(compiled, vectors, scalars, piece)
        for piece in (32768, 4096, 669706)
    }


def gelu_slope_pieces() -> Ways:
    """D = G ⊙ gelu'(S), 512 x 1,024, by the number of entries per round of passes."""
    compiled = program(f"g = g * ({resolve('gelu').slope})", frozenset())
    arrays = {name: numbers(512 * 1024) for name in "gs"}
    scalars = {key: np.float32(value) for key, value in compiled.fold({}).items()}
    return {
        f"{piece:,} entries": _by_pieces(compiled, arrays, scalars, piece)
        for piece in (32768, 524288)
    }


def _by_pieces(
    compiled: Any, arrays: dict[str, np.ndarray], scalars: dict[str, Any], piece: int
) -> Callable[[], None]:
    ops, kept = numpy_ops.NumpyOps(), programs.PIECE
    programs.PIECE = piece
    tape = ops.record(
        lambda: ops.map(
            compiled, arrays, {key: np.asarray(value) for key, value in scalars.items()}
        )
    )
    programs.PIECE = kept
    return lambda: ops.quietly(tape.replay)


def combination() -> Ways:
    """The sum m = β m + g, 32,768 entries: two passes, or a product with a row of two numbers."""
    both, c, out = numbers(2, 32768), np.array([0.9, 1.0], np.float32), numbers(32768)

    def passes() -> None:
        np.multiply(c[0], both[0], both[0])
        np.add(both[0], both[1], both[0])

    return {"multiply, add": passes, "matmul": lambda: np.matmul(c, both, out)}


def small_product() -> Ways:
    """S = Z W, 32 x 64 x 10."""
    Z, W, S = numbers(32, 64), numbers(64, 10), numbers(32, 10)
    return {"dot": lambda: np.dot(Z, W, S), "matmul": lambda: np.matmul(Z, W, S)}


def large_product() -> Ways:
    """The product dW = Zᵀ D, 784 x 32 x 128."""
    Z, D, dW = numbers(32, 784), numbers(32, 128), numbers(784, 128)
    return {
        "matmul": lambda: np.matmul(Z.T, D, dW),
        "dot, which writes zeros first": lambda: np.dot(Z.T, D, dW),
    }


def quiet() -> Ways:
    """An empty call with NumPy's warnings off."""
    context = contextvars.copy_context()
    context.run(np.seterr, all="ignore")

    def block() -> None:
        with np.errstate(all="ignore"):
            pass

    return {"in a context made before": lambda: context.run(int), "np.errstate": block}


QUESTIONS = (
    gemm_and_accumulate, outer_product, narrow_softmax, relu_slope, broadcast_buffer, adamw_pieces,
    gelu_slope_pieces, combination, small_product, large_product, quiet,
)  # fmt: skip


def main() -> None:
    for question in QUESTIONS:
        ways = question()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(15):
            for name, run in ways.items():
                time.sleep(0.1)  # see docs/performance.md: an idle BLAS thread spins
                run()
                begin, count = time.perf_counter(), 0
                while time.perf_counter() - begin < 0.03:
                    run()
                    count += 1
                times[name].append((time.perf_counter() - begin) / count * 1e6)
        print(question.__doc__)
        print(
            "   "
            + ";  ".join(f"{name}: {statistics.median(v):,.1f} us" for name, v in times.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
