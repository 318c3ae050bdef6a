"""Each operation of `CudaOps` on the device, against NumPy in double precision and against CuPy's
own operations.
"""

import numpy as np
import pytest

from mlpcore.backends.cuda.device import Launch
from mlpcore.backends.cuda.eager import CupyReference
from mlpcore.backends.cuda.gemm import describe
from mlpcore.backends.cuda.ops import EPILOGUES, OWN, CudaOps
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import activations, losses, sheet
from mlpcore.core.ops import accumulator
from mlpcore.core.program import program
from tests.backends.cuda.emulator.device import narrow, widen

# and their epsilon
PRECISIONS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SHAPES = [(1, 1), (1, 17), (67, 1), (31, 13), (130, 24), (65, 264)]


@pytest.fixture(autouse=True)
def active(device):
    """The device, as whoever calls operations makes it the current one."""
    with device.active():
        yield


def read(device, array, dtype):
    """The device's numbers in double."""
    return widen(device.to_host(array), dtype).astype(np.float64)


def drawn(rng, shape, dtype):
    """Random numbers of a precision, as they are stored, and in double."""
    stored = narrow(
        rng.standard_normal(shape).astype(np.float64 if dtype == "float64" else np.float32), dtype
    )
    return stored, widen(stored, dtype).astype(np.float64)


def close(got, want, epsilon, scale=1.0):
    assert got.shape == want.shape
    bound = epsilon * (abs(want) + scale)
    assert (abs(got - want) <= bound).all(), (
        f"off by {(abs(got - want) / bound).max():.1f} times the bound"
    )


# -- matrix products -------------------------------------------------------------------------------


def operand(device, stored, transposed, shift):
    """The array on the device, `shift` entries beyond an aligned address; as the transpose of a
    row-major one if asked.
    """
    laid = np.ascontiguousarray(stored.T if transposed else stored)
    memory = device.empty(laid.nbytes + shift * laid.itemsize)[shift * laid.itemsize :]
    array = memory.view(laid.dtype).reshape(laid.shape)
    array[...] = device.xp.array(laid)
    return array.T if transposed else array


# precision of the factors, of the result, tf32, epsilon of what enters, epsilon of what leaves
KINDS = {
    "float64": ("float64", "float64", False, 2.0**-52),
    "float32": ("float32", "float32", False, 2.0**-20),
    "tf32": ("float32", "float32", True, 2.0**-10),
    "float16": ("float16", "float16", False, 2.0**-10),
    "bfloat16": ("bfloat16", "bfloat16", False, 2.0**-7),
    "float16, float32 out": ("float16", "float32", False, 2.0**-20),
    "bfloat16, float32 out": ("bfloat16", "float32", False, 2.0**-20),
}


@pytest.mark.parametrize("accumulate", [False, True], ids=["", "accumulated"])
@pytest.mark.parametrize(
    "transposed", [(False, False), (True, False), (False, True), (True, True)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_in_any_transposition_of_any_size_from_any_address(
    device, kind, transposed, accumulate
):
    factor, result, tf32, epsilon = KINDS[kind]
    rng, ops = np.random.default_rng(0), CudaOps(device, tf32)
    for m, k, n in [(1, 1, 1), (7, 1, 5), (1, 33, 8), (33, 17, 65), (64, 128, 32), (130, 257, 31)]:
        for shifts in ((0, 0, 0), (1, 0, 0), (0, 3, 1)):
            (A, a), (B, b), (C, c) = (
                drawn(rng, shape, dtype)
                for shape, dtype in (((m, k), factor), ((k, n), factor), ((m, n), result))
            )
            left, right = (
                operand(device, x, *how)
                for x, how in zip((A, B), zip(transposed, shifts, strict=False), strict=True)
            )
            out = operand(device, C, False, shifts[2])
            expected = a @ b + (c if accumulate else 0)
            for _ in range(2 if not accumulate else 1):  # the second time the algorithm is known
                ops.gemm(left, right, out, accumulate)
                close(read(device, out, result), expected, epsilon, abs(a) @ abs(b) + 1)


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float64"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_a_layer_in_one_product_is_the_layer_in_two_launches(device, put, name, dtype):
    rng, sigma = np.random.default_rng(0), OWN[list(EPILOGUES).index(name)]
    wide, epsilon = (
        ("float64", 2.0**-50)
        if dtype == "float64"
        else ("float32", 2.0**-20 if dtype == "float32" else 2.0**-9)
    )
    offered = 0
    for m, k, n in [(1, 1, 1), (67, 13, 24), (5, 16, 7), (128, 64, 256)]:
        (A, a), (W, w), (b, bias) = (drawn(rng, shape, wide) for shape in ((m, k), (k, n), (n,)))
        left, right = put(A, W)
        # as in the flat vector, where nothing is aligned
        vector = operand(device, b[None], False, 3)[0]
        s = a @ w + bias
        z = s.copy()
        (reference := NumpyOps()).quietly(reference.bias_activation, s.copy(), None, sigma, z)
        ops = CudaOps(device, dtype == "tf32")
        S = operand(device, np.zeros((m, n), A.dtype), False, 0)
        Z = operand(device, np.zeros((m, n), A.dtype), False, 0) if sigma.slope_reads_s else S
        ops.layer(left, right, vector, sigma, S, Z)
        close(read(device, Z, wide), z, epsilon, 4 * np.sqrt(k))
        keep = device.address(S) if sigma.slope_reads_s else 0
        addresses = (device.address(left), device.address(right), device.address(Z))
        bias = device.address(vector)
        product = describe(
            left, right, Z, False, addresses, dtype == "tf32", EPILOGUES[name], bias, keep
        )
        for algorithm in device.algorithms(product):
            Z[...] = S[...] = 0
            try:
                ops._multiply(product, algorithm, addresses, device.address(vector), keep)
            except RuntimeError:
                continue  # `layer` does without it, too
            offered += 1
            close(read(device, Z, wide), z, epsilon, 4 * np.sqrt(k))
            if keep:
                close(read(device, S, wide), s, epsilon, 4 * np.sqrt(k))
    assert offered or dtype == "float64"


# -- passes over a matrix --------------------------------------------------------------------------


def reference(device, dtype):
    """CuPy's operations on the device's arrays, where it computes in the dtype."""
    return [CupyReference(device.xp)] if dtype in ("float32", "float64") else []


SLOPES = {"float64": 2.0**-48, "float32": 2.0**-19, "float16": 2.0**-9, "bfloat16": 2.0**-6}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", activations.names(output=True))
def test_an_activation_and_its_slope(device, put, name, dtype):
    sigma, rng, wide = (
        activations.resolve(name, output=True),
        np.random.default_rng(0),
        accumulator(dtype),
    )
    for m, n in (
        SHAPES if name in ("relu", "gelu", "gelu_erf", "softmax", "log_softmax") else SHAPES[3:5]
    ):
        (S, s), (G, g) = (drawn(rng, (m, n), dtype) for _ in range(2))
        b = rng.standard_normal(n).astype(wide)
        before = rng.standard_normal(n).astype(wide)
        z, d, db = np.empty_like(s), np.empty_like(s), before.astype(np.float64)
        pre = s.copy()
        NumpyOps().bias_activation(pre, b.astype(np.float64), sigma, z)
        stored_z = narrow(z.astype(wide), dtype)
        stored_s = narrow(pre.astype(wide), dtype)
        NumpyOps().activation_gradient(
            g,
            widen(stored_s, dtype).astype(np.float64),
            widen(stored_z, dtype).astype(np.float64),
            sigma,
            d,
            db,
            True,
        )
        for ops in (CudaOps(device), *reference(device, dtype)):
            there, bias = put(S, b)
            out = put(np.zeros_like(S)) if sigma.slope_reads_s else there
            ops.bias_activation(there, bias, sigma, out)
            close(read(device, out, dtype), z, PRECISIONS[dtype] + 16 * PRECISIONS[wide], 8)
            G_there, S_there, Z_there, D, db_there = put(
                G, stored_s, stored_z, np.zeros_like(S), before
            )
            ops.activation_gradient(G_there, S_there, Z_there, sigma, D, db_there, accumulate=True)
            close(read(device, D, dtype), d, SLOPES[dtype], 4)
            # softmax sums what is stored
            rounded = SLOPES[dtype] if sigma.rowwise else SLOPES[wide]
            close(read(device, db_there, wide), db, rounded, 8 * np.sqrt(m))
            # in place, without db
            ops.activation_gradient(G_there, S_there, Z_there, sigma, G_there, None)
            close(read(device, G_there, dtype), d, SLOPES[dtype], 4)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("each", [False, True], ids=["per layer", "per output"])
def test_a_learned_slope_and_its_gradient(device, put, each, dtype):
    rng, wide = np.random.default_rng(0), accumulator(dtype)
    for m, n in [*SHAPES, (70_001, 24), (3000, 1031)]:  # grids of many blocks, too
        (S, s), (G, g) = (drawn(rng, (m, n), dtype) for _ in range(2))
        a = rng.uniform(-1.5, 1.5, n if each else 1).astype(wide)
        before = rng.standard_normal(a.shape).astype(wide)
        z, d = np.where(s > 0, s, a * s), g * np.where(s > 0, 1, a)
        share = (g * np.minimum(s, 0)).sum(axis=0)
        da = before + (share if each else share.sum())
        for ops in (CudaOps(device), *reference(device, dtype)):
            S_there, G_there, Z, D, slope, found = put(
                S, G, np.zeros_like(S), np.zeros_like(S), a, before
            )
            sigma = activations.resolve("prelu").bound(slope, found)
            ops.bias_activation(S_there, None, sigma, Z)
            close(read(device, Z, dtype), z, 2 * PRECISIONS[dtype], 1)
            ops.activation_gradient(G_there, S_there, Z, sigma, D, None, accumulate=True)
            close(read(device, D, dtype), d, 4 * PRECISIONS[dtype], 1)
            close(read(device, found, wide), da, SLOPES[wide], 8 * np.sqrt(m * (1 if each else n)))
            first = read(device, found, wide)
            found[...] = put(before)
            ops.activation_gradient(G_there, S_there, Z, sigma, G_there, None, accumulate=True)
            # the order of sums is fixed
            np.testing.assert_array_equal(read(device, found, wide), first)


PAIRS = [
    (name, None) for name in losses.names(rowwise=False) if losses.resolve(name).outputs == "any"
]
PAIRS += [(name, output) for name, output in sheet.MATCHED] + [
    ("poisson", "softplus"),
    ("cross_entropy", "softmax"),
]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_loss_its_slope_and_the_bias_gradient(device, put, pair, dtype):
    name, output = pair
    objective = losses.pair(
        losses.resolve(name), output and activations.resolve(output, output=True)
    )
    rng, wide = np.random.default_rng(0), accumulator(dtype)
    for m, n in SHAPES if name == "cross_entropy" else SHAPES[1:5]:
        X, x = drawn(rng, (m, n), dtype)
        if not objective.matched and output:
            X, x = narrow(abs(x).astype(wide), dtype), abs(x)
        soft = rng.random((m, n)) + 1e-3
        targets = [(soft / soft.sum(axis=1, keepdims=True)).astype(wide)]
        targets += [rng.integers(0, n, m)] if name == "cross_entropy" else []
        for Y in targets:
            for k in (rng.random((m, 1)).astype(wide), np.array(1 / m, wide)):
                d, db, J = np.empty_like(x), np.zeros(n), np.zeros(())
                wide_Y = Y.astype(np.float64) if Y.ndim == 2 else Y
                NumpyOps().loss(x.copy(), wide_Y, k.astype(np.float64), objective, d, db, J, False)
                for ops in (CudaOps(device), *reference(device, dtype)):
                    there, Y_there, D, db_there = put(X, Y, np.zeros_like(X), np.full(n, 7, wide))
                    k_there = put(k) if k.ndim else put(k[None]).reshape(())
                    total = put(np.full(1, 1, wide)).reshape(())
                    ops.loss(there, Y_there, k_there, objective, D, db_there, total, False)
                    scale = float(k.max())
                    close(
                        read(device, D, dtype),
                        d,
                        SLOPES[dtype],
                        scale * 4 + (6e-8 if dtype == "float16" else 0),
                    )
                    close(read(device, db_there, wide), db, SLOPES[wide] * 8, scale * m * 8)
                    assert float(total) == pytest.approx(
                        1 + float(J), rel=2e-4 if wide == "float32" else 1e-11
                    )


def test_sums_and_elementwise_statements(device, put):
    rng, compiled = np.random.default_rng(0), program("w = a * w + g; g = w * w", frozenset({"a"}))
    for dtype, epsilon in (("float32", 1e-6), ("float64", 1e-14)):
        for size in (1, 5, 4096, 100003):
            v, g = rng.standard_normal((2, size)).astype(dtype)
            ops, (w_there, g_there) = CudaOps(device), put(v, g)
            assert ops.sum_squares(w_there) == pytest.approx(
                float(v.astype(np.float64) @ v), rel=1e-9
            )
            assert ops.sum_abs(w_there) == pytest.approx(
                float(abs(v.astype(np.float64)).sum()), rel=1e-9
            )
            ops.map(
                compiled, {"w": w_there, "g": g_there}, {"k0": put(np.full(1, 0.5)).reshape(())}
            )
            expected = 0.5 * v.astype(np.float64) + g
            close(read(device, w_there, dtype), expected, epsilon)
            close(read(device, g_there, dtype), expected**2, epsilon)


def test_sums_are_equal_to_the_bit_each_time(device, put):
    rng, sigma = np.random.default_rng(0), activations.resolve("tanh")
    arrays = [rng.standard_normal((5000, 24)).astype(np.float32) for _ in range(3)]
    found = set()
    for _ in range(4):
        G, S, Z, db = put(*arrays, np.zeros(24, np.float32))
        CudaOps(device).activation_gradient(G, S, Z, sigma, G, db)
        found.add(device.to_host(db).tobytes())
    assert len(found) == 1


RECORD = np.dtype(
    [("source", "u8"), ("first", "i8"), ("factors", "f4", 70), ("which", "i4")], align=True
)
BY_VALUE = """
struct Order { const float* source; long long first; float factors[70]; int which; };
__global__ void takes(const Order order, float* out, long long n, float more) {
  const int i = threadIdx.x;
  if (i < n) out[i] = order.source[order.first + i] * order.factors[order.which] + more;
}
"""


def test_a_bound_launch_passes_a_record_by_value_as_it_is_at_each_call(device, put):
    source, out = put(np.arange(100, dtype=np.float32)), put(np.zeros(32, np.float32))
    order = np.zeros((), RECORD)
    order["source"], order["factors"] = device.address(source), np.arange(70)
    arguments = [order, out, 32, np.float32(0.5)]
    kernel, shape = device.kernel(BY_VALUE, "takes"), Launch((1, 1), (32, 1))
    run = device.bind(kernel, shape, arguments)
    recording = None
    for which, first in ((3, 0), (69, 41), (1, 7)):
        order["which"], order["first"] = which, first
        expected = (np.arange(32) + first) * which + 0.5
        for launch in (run, lambda: device.launch(kernel, shape, arguments)):
            out[...] = 0
            launch()
            np.testing.assert_array_equal(device.to_host(out), expected)
        recording = recording or (device.record(run), expected)
    recording[0].replay()  # copied when it was recorded
    np.testing.assert_array_equal(device.to_host(out), recording[1])


@pytest.mark.gpu
def test_what_is_timed_is_the_device_and_not_the_host(gpu):
    kernel = gpu.kernel("__global__ void nothing() {}", "nothing")
    assert gpu.seconds(lambda: gpu.launch(kernel, Launch((1, 1), (32, 1)), [])) < 4e-6
    x = gpu.empty(1 << 28)
    # no GPU writes 20 TB/s
    assert gpu.seconds(lambda: x.data.memset_async(1, x.nbytes)) > 2**28 / 20e12
