"""Compiled products of small matrices, against NumPy's in float64."""

import ctypes
import itertools

import numpy as np
import pytest

from mlpcore.backends.compiled import compiler, steps
from mlpcore.backends.compiled.ops import CompiledOps
from mlpcore.core.ops import Input

pytestmark = pytest.mark.skipif(bool(compiler.why_not()), reason=compiler.why_not())
SHAPES = [
    (1, 1, 1), (1, 8, 2), (8, 1, 5), (1, 1, 300), (7, 3, 1), (5, 17, 9), (6, 32, 16), (13, 33, 64),
    (16, 16, 257), (3, 70, 600), (32, 10, 128), (9, 31, 256), (4, 8, 0),
    (66, 64, 200), (100, 300, 193), (65, 47, 17), (2, 600, 700), (1030, 260, 200),
]  # fmt: skip
both_types = pytest.mark.parametrize("dtype", ["float32", "float64"])


def matrix(rng, m, n, transposed, dtype):
    whole = rng.standard_normal((n, m) if transposed else (m, n)).astype(dtype)
    return whole.T if transposed else whole


def check(found, A, B, before):
    wide = [x.astype(np.float64) for x in (A, B, before)]
    exact = wide[0] @ wide[1] + wide[2]
    size = abs(wide[0]) @ abs(wide[1]) + abs(wide[2])
    eps = np.finfo(found.dtype).eps
    assert (abs(found - exact) <= (A.shape[1] + 2) * eps * size).all()


@both_types
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_all_layouts(shape, dtype):
    m, n, k = shape
    rng, ops = np.random.default_rng(0), CompiledOps()
    ops.in_one_call = True
    for by_columns, accumulate in itertools.product(itertools.product((0, 1), repeat=3), (0, 1)):
        A, B, C = (
            matrix(rng, *sizes, flag, dtype)
            for sizes, flag in zip(((m, k), (k, n), (m, n)), by_columns, strict=True)
        )
        before = C * accumulate
        ops.gemm(A, B, C, bool(accumulate))
        check(C, A, B, before)


@both_types
def test_a_product_writes_its_rows_and_columns_alone(dtype):
    rng = np.random.default_rng(1)
    A, B = rng.standard_normal((5, 7)).astype(dtype), rng.standard_normal((7, 19)).astype(dtype)
    whole = np.full((9, 40), 3, dtype)
    C = whole[2:7, 10:29]
    CompiledOps().gemm(A, B, C)
    check(C.copy(), A, B, np.zeros((5, 19)))
    C[...] = 3
    assert (whole == 3).all()


@both_types
def test_nan_and_infinity_pass(dtype):
    A, B, C = np.ones((3, 4), dtype), np.ones((4, 5), dtype), np.empty((3, 5), dtype)
    A[1, 2], B[0, 3] = np.nan, np.inf
    CompiledOps().gemm(A, B, C)
    np.testing.assert_array_equal(C, A @ B)


@both_types
def test_large_products_are_numpys_but_for_those_in_one_call(dtype):
    rng, ops = np.random.default_rng(2), CompiledOps()
    A, B = rng.standard_normal((170, 180)).astype(dtype), rng.standard_normal((180, 190))
    A, B, C = A, B.astype(dtype), np.zeros((170, 190), dtype)
    calls = ops.record(lambda: ops.gemm(A, B, C)).calls
    assert calls[0][0] is np.matmul
    ops.in_one_call = True
    for left, right, out in ((A, B, C), (B.T, A.T, C.T.copy()), (A, B, C.T.copy().T)):
        recorded = ops.record(lambda a=left, b=right, c=out: ops.gemm(a, b, c))
        steps.addresses(recorded.calls)
        recorded.replay()
        check(out, left, right, np.zeros_like(out))


@both_types
def test_threads_share_rows_or_columns_and_change_no_bits(dtype):
    rng, ops = np.random.default_rng(3), CompiledOps()
    ops.in_one_call = True
    for m, n, k in ((70, 300, 20), (300, 70, 20), (129, 129, 400), (5, 5, 5), (3, 1, 9)):
        A, B = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (k, n)))
        whole, shared = np.empty((m, n), dtype), np.full((m, n), np.nan, dtype)
        for C, threads in ((whole, 1), (shared, 3)):
            ((run, arguments),) = ops.record(lambda a=A, b=B, c=C: ops.gemm(a, b, c)).calls
            for index in range(threads):
                run.library.run_part(
                    arguments, ctypes.c_longlong(index), ctypes.c_longlong(threads)
                )
        np.testing.assert_array_equal(whole, shared)


def test_other_products_are_numpys():
    ops = CompiledOps()
    A, B, C = np.ones((3, 4)), np.ones((4, 5)), np.empty((3, 5))
    for left in (Input(A), A.astype(np.float32), A.astype(">f8")):
        calls = ops.record(lambda a=left: ops.gemm(a, B, C)).calls
        with pytest.raises(steps.NotCompiled):
            steps.addresses(calls)
        ops.gemm(left, B, C)
        assert (C == 4).all()


def test_products_are_compiled_with_fused_multiply_adds():
    """1 - x², for an x near 1, keeps the digits of x² that rounding would lose."""
    x = 1 + 3 * np.finfo(np.float64).eps
    A, B, C = np.array([[1.0, x]]), np.array([[-1.0] * 32, [x] * 32]), np.empty((1, 32))
    CompiledOps().gemm(A, B, C)
    rounded = x * x - 1
    assert (rounded != C).all() or not compiler_fuses()
    np.testing.assert_allclose(C, rounded, rtol=1e-15)


def compiler_fuses():
    """True if the processor has a fused multiply-add."""
    return "fma" in compiler._processor() or "aarch64" in compiler._processor()
