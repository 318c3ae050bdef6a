"""Computations before a launch, without a device: grids and blocks, scratch, the column-major
products for cuBLASLt.
"""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpcore.backends import devices as device
from mlpcore.backends import formula_text
from mlpcore.backends.cuda import gemm as products
from mlpcore.backends.cuda import grids as launches
from mlpcore.backends.cuda import ops as cuda_ops
from mlpcore.backends.cuda import slot as cuda_slot
from mlpcore.backends.cuda import source as cuda_source
from mlpcore.backends.cuda.eager import CupyReference
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import activations, losses
from mlpcore.core.program import program
from tests.backends.cuda.emulator.device import CpuDevice, algorithm, matrix, narrow, widen

SIZES = st.integers(1, 3000)


@given(
    rows=st.integers(0, 1 << 22),
    columns=st.integers(1, 1 << 15),
    itemsize=st.sampled_from([2, 4, 8]),
)
@settings(max_examples=300, deadline=None)
def test_tiles_cover_every_column_and_stay_within_what_a_gpu_takes(rows, columns, itemsize):
    vector = launches.vector_width(columns, itemsize)
    (across, down), (x, y), shared = launches.tiles(rows, columns, vector, 132).launch
    assert columns % vector == 0
    assert vector * itemsize in (itemsize, 16)
    assert across * x * vector >= columns > (across - 1) * x * vector
    assert x * y == launches.THREADS
    assert y & (y - 1) == 0  # add_down halves it
    assert 1 <= down <= 65535
    assert down == 1 or (down - 1) * y * launches.ROWS < rows  # no block without rows
    assert shared == 0


def test_a_large_matrix_fills_every_multiprocessor():
    for columns in (1, 10, 64, 1000, 4096, 32768):
        tiled = launches.tiles(1 << 20, columns, launches.vector_width(columns, 4), 132)
        assert (
            132 * launches.BLOCKS // 2
            <= tiled.partials
            <= 132 * launches.BLOCKS + tiled.launch.grid[0]
        )


@given(
    rows=st.integers(1, 1 << 21), columns=st.integers(1, 1 << 15), itemsize=st.sampled_from([4, 8])
)
@settings(max_examples=300, deadline=None)
def test_cross_entropy_keeps_a_row_of_sums_for_each_warp_in_shared_memory_or_none(
    rows, columns, itemsize
):
    launch, fused = launches.cross_entropy(rows, columns, itemsize, 132)
    assert fused == (columns * itemsize <= launches.SHARED)
    assert launch.shared == (launch.block[1] * columns * itemsize if fused else 0)
    assert launch.shared <= launches.SHARED
    assert launch.block[0] == 32
    assert 1 <= launch.block[1] <= 8


@given(
    rows=SIZES,
    columns=st.lists(SIZES, min_size=1, max_size=4),
    wide=st.booleans(),
    half=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_the_planned_scratch_is_enough_for_every_kernel_of_a_step(rows, columns, wide, half):
    layer, accumulator = (2 if half else 8 if wide else 4), (8 if wide else 4)
    numbers, counters = launches.partial_sums(rows, columns, (layer, accumulator), 7)
    twice = launches.partial_sums(rows, columns, (layer, accumulator), 7, columns[:1])
    assert twice >= (numbers, counters)
    for n, m in itertools.product(columns, {1, rows // 2 + 1, rows}):
        for vector in {1, launches.vector_width(n, layer), launches.vector_width(n, accumulator)}:
            tiled = launches.tiles(m, n, vector, 7)
            across, down = tiled.launch.grid
            assert numbers >= tiled.partials + down * n
            assert counters >= across + 1
            assert n != columns[0] or (twice[0] >= 2 * down * n and twice[1] >= 2 * across)
        launch, _ = launches.cross_entropy(m, n, accumulator, 7)
        assert numbers >= launch.grid[0] * (1 + n)
    assert numbers >= 2 * launches.flat(1 << 30, 7).grid[0]
    assert counters >= 2


# -- products --------------------------------------------------------------------------------------


def address(array):
    return array.ctypes.data


@given(
    m=st.integers(1, 9),
    k=st.integers(1, 9),
    n=st.integers(1, 9),
    a=st.booleans(),
    b=st.booleans(),
    pad=st.integers(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_a_column_major_reading_of_the_buffers_gives_the_row_major_product(m, k, n, a, b, pad):
    rng = np.random.default_rng(m + 10 * k + 100 * n)

    def operand(rows, columns, transposed):
        stored = rng.standard_normal((columns, rows + pad) if transposed else (rows, columns + pad))
        return stored[:, :rows].T if transposed else stored[:, :columns]

    A, B, C = operand(m, k, a), operand(k, n, b), np.zeros((m, n))
    p = products.describe(A, B, C, False, tuple(map(address, (A, B, C))))
    L = matrix(address(B), (p.k, p.m) if p.transpose_left else (p.m, p.k), p.left_stride, "float64")
    R = matrix(
        address(A), (p.n, p.k) if p.transpose_right else (p.k, p.n), p.right_stride, "float64"
    )
    D = matrix(address(C), (p.m, p.n), p.result_stride, "float64")
    D[...] = (L.T if p.transpose_left else L) @ (R.T if p.transpose_right else R)
    np.testing.assert_allclose(C, A @ B, rtol=1e-12, atol=1e-12)
    promised = p.right_alignment, p.left_alignment, p.result_alignment
    assert promised == tuple(products.alignment(x) for x in map(address, (A, B, C)))


def test_strides_that_are_neither_are_refused():
    with pytest.raises(AssertionError, match="neither row-major"):
        products.operand(np.zeros((6, 8))[::2, ::2])


def test_the_alignment_of_an_operand_is_its_own():
    A, B, C = np.zeros((4, 8)), np.zeros((8, 6)), np.zeros((4, 6))
    p = products.describe(
        A, B, C, False, (256, 4096 + 64, 512), epilogue="gelu", bias=4, aux=1024 + 16
    )
    assert (p.left_alignment, p.right_alignment, p.result_alignment) == (64, 256, 256)
    assert (p.bias_alignment, p.aux_alignment) == (4, 16)


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [((256, 1024), 256), ((256, 272), 16), ((4,), 4), ((12, 8), 4), ((0,), 256)],
)
def test_the_alignment_of_several_addresses(addresses, expected):
    assert products.alignment(*addresses) == expected


@pytest.mark.parametrize(
    "ops", [NumpyOps, lambda: cuda_ops.CudaOps(CpuDevice())], ids=["numpy", "cuda"]
)
@pytest.mark.parametrize("name", ["identity", "relu", "gelu", "tanh"])
def test_a_layer_is_its_product_and_its_activation_fused_or_not(ops, name):
    rng = np.random.default_rng(0)
    A, W, b = rng.standard_normal((7, 5)), rng.standard_normal((5, 8)), rng.standard_normal(8)
    sigma = activations.resolve(name)
    expected = A @ W + b
    for _ in range(2):
        S, Z = np.zeros((7, 8)), np.zeros((7, 8))
        ops().layer(A, W, b, sigma, S, Z)
        if sigma.slope_reads_s:
            np.testing.assert_allclose(S, expected, rtol=1e-12)
        NumpyOps().bias_activation(expected.copy(), None, sigma, out := np.empty_like(expected))
        np.testing.assert_allclose(
            Z, out if name != "identity" else expected, rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("faster", ["fused", "apart"])
def test_timing_decides_whether_an_activation_joins_its_product(faster):
    device = CpuDevice()
    launched, launch = [], device.launch
    device.launch = lambda kernel, *rest: launched.append(kernel.name) or launch(kernel, *rest)
    # the product alone: two candidates; fused: two candidates; then the two launches
    device.times = itertools.cycle([5.0, 4.0, 3.0, 2.0, 9.0 if faster == "fused" else 1.0])
    ops = cuda_ops.CudaOps(device)
    A, W, b, Z = np.ones((6, 4)), np.ones((4, 4)), np.ones(4), np.zeros((6, 4))
    relu = activations.resolve("relu")
    ops.layer(A, W, b, relu, Z, Z)
    launched.clear()
    ops.layer(A, W, b, relu, Z, Z)
    assert (Z == 5).all()
    assert launched == ([] if faster == "fused" else ["bias_activation<double, Formula, 2, false>"])


class Offering(CpuDevice):
    """A device whose algorithms are refused, or spoil the result, as `spoiled` says by their
    number.
    """

    def __init__(self, **spoiled):
        super().__init__()
        self.spoiled = {int(number[1:]): how for number, how in spoiled.items()}
        self.runs = []

    def multiply(self, product, chosen, left, right, result, bias, aux, workspace):
        how = self.spoiled.get(int(chosen[:1]), {}).get(product.epilogue)
        self.runs.append((product, chosen, self._records()))
        if how is idle:
            return
        super().multiply(product, chosen, left, right, result, bias, aux, workspace)
        if how:
            how(matrix(result, (product.m, product.n), product.result_stride, product.result_dtype))


def idle(C):
    """Computes nothing."""


def refuse(C):
    raise products.UnsupportedAlgorithm("no")


def swallow(C):
    C[np.isnan(C)] = 0


def blur(C):
    C *= 1 + 2.0**-11


def shift(C):
    C += 1e-6


def layer(ops, name, dtype=np.float32, b=None):
    """A layer on fresh arrays of a device; its S and Z."""
    rng = np.random.default_rng(0)
    put = ops.device.to_device
    A, W = (put(rng.standard_normal(shape).astype(dtype)) for shape in ((70, 16), (16, 24)))
    S, Z = put(np.zeros((70, 24), dtype)), put(np.zeros((70, 24), dtype))
    sigma = activations.resolve(name)
    ops.layer(
        A, W, put(np.ones(24, dtype)) if b is None else b, sigma, S if sigma.slope_reads_s else Z, Z
    )
    return S, Z


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *(("relu", x) for x in (swallow, refuse, idle)),
        *(("gelu", x) for x in (blur, shift, idle)),
        ("identity", blur),
    ],
)
def test_an_epilogue_that_is_not_right_is_not_taken_however_fast(name, fault):
    for wrong, taken in (({0}, 1), ({1}, 0), (set(), 1), ({0, 1}, None)):
        epilogue = cuda_ops.EPILOGUES[name]
        device = Offering(**{f"_{number}": {epilogue: fault} for number in wrong})
        device.times = iter([0.0, 0.0, *([3.0, 2.0] if not wrong else [2.0]), 9.0])
        ops = cuda_ops.CudaOps(device)
        layer(ops, name)
        ((product, pays),) = ops.algorithms.fused.items()
        assert pays == (taken is not None)
        if pays:
            assert ops.algorithms.chosen[product] == algorithm(product, taken)
        assert np.isfinite(layer(ops, name)[1]).all()


def test_trying_an_epilogue_leaves_numbers_behind_for_what_is_tried_next():
    device = Offering(_0={"relu": swallow}, _1={"relu": swallow})
    A, W, b, Z = np.ones((6, 4)), np.ones((4, 4)), np.ones(4), np.zeros((6, 4))
    ops = cuda_ops.CudaOps(device)
    ops.record(lambda: ops.layer(A, W, b, activations.resolve("relu"), Z, Z))
    assert not any(ops.algorithms.fused.values())
    assert (Z == 5).all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_what_is_not_finite_comes_through_a_layer_fused_or_not(name, fused):
    device = CpuDevice()
    device.times = iter([0.0, 0.0, 1.0, 1.0, 9.0 if fused else 0.5])
    ops = cuda_ops.CudaOps(device)
    layer(ops, name)
    assert [*ops.algorithms.fused.values()] == [fused]
    _, Z = layer(ops, name, b=device.to_device(np.resize(np.array([np.nan, 1], np.float32), 24)))
    assert np.isnan(Z[:, ::2]).all()
    assert np.isfinite(Z[:, 1::2]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_a_layer_of_half_precision_adds_the_bias_of_the_copy_in_its_precision(name, dtype):
    rng, device = np.random.default_rng(3), CpuDevice()
    device.times = iter([0.0, 0.0, 1.0, 1.0, 9.0])
    flat = device.to_device(rng.standard_normal(16 * 24 + 1 + 24).astype(np.float32))
    low = device.to_device(narrow(flat, dtype))
    W, b = low[: 16 * 24].reshape(16, 24), flat[-24:]
    A = device.to_device(narrow(rng.standard_normal((70, 16)).astype(np.float32), dtype))
    S, Z, sigma = (
        *(device.to_device(np.zeros((70, 24), A.dtype)) for _ in range(2)),
        activations.resolve(name),
    )
    apart, ops = cuda_ops.CudaOps(CpuDevice()), cuda_ops.CudaOps(device)
    for one in (apart, ops):
        one.low = None if one is apart else (flat, low)
        one.layer(A, W, b, sigma, S if sigma.slope_reads_s else Z, Z)
        s = widen(A, dtype) @ widen(W, dtype) + b
        z = np.empty_like(s)
        (reference := NumpyOps()).quietly(reference.bias_activation, s.copy(), None, sigma, z)
        epsilon = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
        np.testing.assert_allclose(widen(Z, dtype), z, rtol=0, atol=2 * epsilon * abs(s).max())
    assert not apart.algorithms.fused
    ((product, pays),) = ops.algorithms.fused.items()
    assert pays
    assert (product.result_dtype, product.bias_alignment) == (
        dtype,
        products.alignment(device.address(low[-24:])),
    )


def test_a_deterministic_product_takes_the_first_algorithm_that_is_not_refused():
    A, B, C = np.ones((6, 4)), np.ones((4, 4)), np.zeros((6, 4))
    ops = cuda_ops.CudaOps(
        Offering(_0={"": refuse}), algorithms=products.Algorithms(deterministic=True)
    )
    for _ in range(2):
        ops.gemm(A, B, C, accumulate=True)
    assert (C == 8).all()
    ((product, chosen),) = ops.algorithms.chosen.items()
    assert chosen == algorithm(product, 1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_product_that_the_library_refuses_by_every_algorithm_is_an_error_that_names_it(
    deterministic,
):
    device = Offering(_0={"": refuse}, _1={"": refuse})
    ops = cuda_ops.CudaOps(device, algorithms=products.Algorithms(deterministic))
    with pytest.raises(
        products.UnsupportedAlgorithm, match=r"each of the 2 algorithms .* Product\(m=4, n=6, k=5"
    ):
        ops.gemm(np.ones((6, 5)), np.ones((5, 4)), np.zeros((6, 4)))


@pytest.mark.parametrize("what", ["gemm", "accumulated", "relu", "gelu"])
def test_a_product_that_a_checkpoint_settled_runs_once_before_it_is_captured(what):
    first, device = cuda_ops.CudaOps(CpuDevice()), Offering()
    first.device.times = iter([0.0, 0.0, 1.0, 1.0, 9.0])
    A, B, C = np.ones((6, 4)), np.ones((4, 4)), np.zeros((6, 4))

    def run(ops):
        if what in ("relu", "gelu"):
            layer(ops, what)
        else:
            ops.gemm(A, B, C, accumulate=what == "accumulated")

    run(first)
    ops = cuda_ops.CudaOps(device)
    ops.algorithms.chosen |= first.algorithms.chosen
    ops.algorithms.fused |= first.algorithms.fused
    for expected in ([False, True], [True]):
        device.runs.clear()
        if what in ("gemm", "accumulated"):
            ops.record(lambda: run(ops))
            assert [recorded for *_, recorded in device.runs] == expected
        else:
            run(ops)
            assert len(device.runs) == len(expected)
    (product, chosen), *_ = ops.algorithms.chosen.items()
    ops.algorithms.chosen[product] = algorithm(product, 1 - int(chosen[:1]))
    device.runs.clear()
    if what == "gemm":
        ops.record(lambda: run(ops))
        assert [recorded for *_, recorded in device.runs] == [False, True]


def test_algorithms_are_chosen_while_nobody_records():
    device, started, chosen = CpuDevice(), threading.Event(), threading.Event()
    one, other = cuda_ops.CudaOps(device), cuda_ops.CudaOps(device)
    faults = []

    def choose():
        started.wait(10)
        try:
            other.gemm(np.ones((6, 4)), np.ones((4, 4)), C)
        except RuntimeError as fault:
            faults.append(fault)
        chosen.set()

    def run():
        if device._records():
            started.set()
            assert not chosen.wait(0.2), faults

    C, thread = np.zeros((6, 4)), threading.Thread(target=choose)
    thread.start()
    one.record(run)
    thread.join()
    assert not faults
    assert (C == 4).all()


def test_the_text_of_a_kernel_is_built_once():
    sigma = activations.resolve("gelu")
    objective = losses.pair(losses.resolve("huber"), activations.resolve("tanh", output=True))
    compiled = program("w = w - rate * g", frozenset({"rate"}))
    for build in (
        lambda: formula_text.activation(sigma),
        lambda: formula_text.loss(objective),
        lambda: formula_text.update(compiled, ["w", "g"], ["rate"], ("rate",), "g"),
    ):
        assert build() is build()


def test_a_users_activation_of_a_known_name_is_not_taken_for_cublas_own():
    mine = activations.Activation("relu", "maximum(s, 0) + 1", "positive(z - 1)")
    ops, Z = cuda_ops.CudaOps(CpuDevice()), np.zeros((6, 4))
    ops.layer(np.ones((6, 4)), np.ones((4, 4)), np.ones(4), mine, Z, Z)
    assert (Z == 6).all()


# -- the rest --------------------------------------------------------------------------------------


def test_a_slot_has_a_word_for_each_field_and_they_are_where_cpp_has_them():
    record = cuda_slot.SlotRecord()
    for name, place in cuda_slot.WORD.items():
        record.words[place] = place + 1
        assert record.array[name].view(np.int64).flat[0] == place + 1
    record.numbers[cuda_slot.WORD["weight"]] = 2.5
    assert record.array["weight"] == 2.5
    source = cuda_source.text("updates.cu")
    assert source.index("struct Slot {") < source.index("set_slot(")
    assert f"sizeof(Slot) == {cuda_slot.SLOT.itemsize}" in source  # which the compilers check


@pytest.mark.parametrize(
    ("output", "classes"),
    [("softmax", True), ("softmax", False), ("sigmoid", False), ("identity", False)],
)
def test_the_unfused_reference_is_the_numpy_backend(output, classes):
    rng = np.random.default_rng(0)
    loss = {
        "softmax": "cross_entropy",
        "sigmoid": "binary_cross_entropy",
        "identity": "squared_error",
    }[output]
    objective = losses.pair(losses.resolve(loss), activations.resolve(output, output=True))
    x, k = rng.standard_normal((6, 4)), rng.random((6, 1))
    Y = rng.integers(0, 4, 6) if classes else rng.random((6, 4))
    found = []
    for ops in (NumpyOps(), CupyReference(np)):
        D, db, J, Z = np.empty_like(x), np.empty(4), np.zeros(()), np.empty_like(x)
        ops.loss(x.copy(), Y, k, objective, D, db, J, False)
        ops.bias_activation(x.copy(), None, activations.resolve(output, output=True), Z)
        G = np.empty_like(x)
        ops.activation_gradient(x, x, Z, activations.resolve(output, output=True), G, None)
        found.append((D, db, J, Z, G))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-15)


def test_an_array_tells_where_it_lies():
    class OnGpu:
        @property
        def __cuda_array_interface__(self):
            return {"shape": (1, 3), "typestr": "<f4", "data": (0, False), "version": 3}

    assert device.of(np.ones(3), "X") == device.of([1, 2], "X") == "cpu"
    import mlpcore as mc

    net = mc.MLP([3, 2], device="cpu")
    with pytest.raises(TypeError, match=r"X is on a GPU, but the network is on the CPU"):
        net.predict(OnGpu())
    with pytest.raises(mc.DeviceUnavailable, match="CuPy"):
        mc.loss("squared_error")(OnGpu(), np.ones((1, 3)))
