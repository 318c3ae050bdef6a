"""What is computed before a launch, without a device: grids and blocks, scratch, the column-major products for cuBLASLt."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpcore.backends import cuda_ops, cuda_slot, cuda_source, device, launches, products
from mlpcore.backends.cupy_reference import CupyReference
from mlpcore.backends.numpy_ops import NumpyOps
from mlpcore.core import activations, losses
from tests.cuda_on_cpu.device import CpuDevice, matrix

SIZES = st.integers(1, 3000)


@given(rows=st.integers(0, 1 << 22), columns=st.integers(1, 1 << 15), itemsize=st.sampled_from([2, 4, 8]))
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
        assert 132 * launches.BLOCKS // 2 <= tiled.partials <= 132 * launches.BLOCKS + tiled.launch.grid[0]


@given(rows=st.integers(1, 1 << 21), columns=st.integers(1, 1 << 15), itemsize=st.sampled_from([4, 8]))
@settings(max_examples=300, deadline=None)
def test_cross_entropy_keeps_a_row_of_sums_for_each_warp_in_shared_memory_or_none(rows, columns, itemsize):
    launch, fused = launches.cross_entropy(rows, columns, itemsize, 132)
    assert fused == (columns * itemsize <= launches.SHARED)
    assert launch.shared == (launch.block[1] * columns * itemsize if fused else 0)
    assert launch.shared <= launches.SHARED
    assert launch.block[0] == 32
    assert 1 <= launch.block[1] <= 8


@given(rows=SIZES, columns=st.lists(SIZES, min_size=1, max_size=4), wide=st.booleans(), half=st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_planned_scratch_is_enough_for_every_kernel_of_a_step(rows, columns, wide, half):
    layer, accumulator = (2 if half else 8 if wide else 4), (8 if wide else 4)
    numbers, counters = launches.partial_sums(rows, columns, (layer, accumulator), 7)
    for n, m in itertools.product(columns, {1, rows // 2 + 1, rows}):
        for vector in {1, launches.vector_width(n, layer), launches.vector_width(n, accumulator)}:
            tiled = launches.tiles(m, n, vector, 7)
            across, down = tiled.launch.grid
            assert numbers >= tiled.partials + down * n
            assert counters >= across + 1
        launch, _ = launches.cross_entropy(m, n, accumulator, 7)
        assert numbers >= launch.grid[0] * (1 + n)
    assert numbers >= 2 * launches.flat(1 << 30, 7).grid[0]
    assert counters >= 2


# -- products ----------------------------------------------------------------------------------------------------------


def address(array):
    return array.ctypes.data


@given(m=st.integers(1, 9), k=st.integers(1, 9), n=st.integers(1, 9), a=st.booleans(), b=st.booleans(), pad=st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_a_column_major_reading_of_the_buffers_gives_the_row_major_product(m, k, n, a, b, pad):
    rng = np.random.default_rng(m + 10 * k + 100 * n)

    def operand(rows, columns, transposed):
        stored = rng.standard_normal((columns, rows + pad) if transposed else (rows, columns + pad))
        return stored[:, :rows].T if transposed else stored[:, :columns]

    A, B, C = operand(m, k, a), operand(k, n, b), np.zeros((m, n))
    p = products.describe(A, B, C, False, tuple(map(address, (A, B, C))))
    L = matrix(address(B), (p.k, p.m) if p.transpose_left else (p.m, p.k), p.left_stride, "float64")
    R = matrix(address(A), (p.n, p.k) if p.transpose_right else (p.k, p.n), p.right_stride, "float64")
    D = matrix(address(C), (p.m, p.n), p.result_stride, "float64")
    D[...] = (L.T if p.transpose_left else L) @ (R.T if p.transpose_right else R)
    np.testing.assert_allclose(C, A @ B, rtol=1e-12, atol=1e-12)
    assert all(x % p.alignment == 0 for x in map(address, (A, B, C)))


def test_strides_that_are_neither_are_refused():
    with pytest.raises(AssertionError, match="neither row-major"):
        products.operand(np.zeros((6, 8))[::2, ::2])


@pytest.mark.parametrize(
    ("addresses", "expected"), [((256, 1024), 256), ((256, 272), 16), ((4,), 4), ((12, 8), 4), ((0,), 256)]
)
def test_the_alignment_of_several_addresses(addresses, expected):
    assert products.alignment(*addresses) == expected


@pytest.mark.parametrize("ops", [NumpyOps, lambda: cuda_ops.CudaOps(CpuDevice())], ids=["numpy", "cuda"])
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
        np.testing.assert_allclose(Z, out if name != "identity" else expected, rtol=1e-12, atol=1e-14)


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


def test_a_users_activation_of_a_known_name_is_not_taken_for_cublas_own():
    mine = activations.Activation("relu", "maximum(s, 0) + 1", "positive(z - 1)")
    ops, Z = cuda_ops.CudaOps(CpuDevice()), np.zeros((6, 4))
    ops.layer(np.ones((6, 4)), np.ones((4, 4)), np.ones(4), mine, Z, Z)
    assert (Z == 6).all()


# -- the rest ------------------------------------------------------------------------------------------------------------


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
    ("output", "classes"), [("softmax", True), ("softmax", False), ("sigmoid", False), ("identity", False)]
)
def test_the_unfused_reference_is_the_numpy_backend(output, classes):
    rng = np.random.default_rng(0)
    loss = {"softmax": "cross_entropy", "sigmoid": "binary_cross_entropy", "identity": "squared_error"}[output]
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
    with pytest.raises(TypeError, match=r"X lies on a GPU and the network on the CPU"):
        net.predict(OnGpu())
    with pytest.raises(mc.DeviceUnavailable, match="CuPy"):
        mc.loss("squared_error")(OnGpu(), np.ones((1, 3)))
