"""`CpuDevice` notices what a GPU would not forgive; its matrix products are NumPy's, read column by
column.
"""

# ruff: noqa: E501, a kernel is a row of a table

from __future__ import annotations

import os
import shutil
import threading

import numpy as np
import pytest

from mlpcore.backends.cuda import gemm as products
from mlpcore.backends.cuda.device import Launch
from mlpcore.backends.cuda.gemm import Product
from tests.backends.cuda.emulator import compiler
from tests.backends.cuda.emulator.device import CpuDevice
from tests.backends.cuda.trial import fresh, launch, read, stored

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CI" not in os.environ, reason="needs g++"
)

KERNELS = """
#define SIGNATURE int* in, int* out, long long n
#define KERNEL(name, body) __global__ void name(SIGNATURE) { const int t = threadIdx.x; __shared__ int shared[64]; body }
struct alignas(16) Four { int at[4]; };

KERNEL(copies, if (t < n) out[t] = in[t];)
KERNEL(reverses, shared[t] = in[t]; __syncthreads(); out[t] = shared[63 - t];)
KERNEL(forgets_a_barrier, shared[t] = in[t]; out[t] = shared[63 - t];)
KERNEL(reuses_too_early, shared[t] = in[t]; __syncthreads(); out[t] = shared[63 - t]; shared[t] = 0;)
KERNEL(reads_the_unwritten, if (t < 32) shared[t] = in[t]; __syncthreads(); out[t] = shared[t];)
KERNEL(returns_before_a_barrier, if (t == 5) return; __syncthreads(); out[t] = in[t];)
__global__ void meets_at_two_barriers(SIGNATURE) {
#line 12
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
}
KERNEL(shuffles_with_half_a_warp, if (t % 32 < 16) out[t] = __shfl_xor_sync(~0u, in[t], 1);)
KERNEL(sums_a_warp, int x = in[t]; for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d); out[t] = x;)
KERNEL(shifts_down, out[t] = __shfl_down_sync(~0u, in[t], 3u) + 100 * __shfl_sync(~0u, in[t], 7);)
KERNEL(reads_beyond_the_end, out[t] = in[t + n];)
KERNEL(writes_before_the_begin, out[t - n] = in[t];)
KERNEL(writes_dynamic_shared_memory, DYNAMIC_SHARED(int, more); more[t] = in[t]; __syncthreads(); out[t] = more[63 - t];)
KERNEL(publishes, out[t] = in[t]; __threadfence(); __syncthreads(); if (t == 9) atomicAdd((unsigned*)in + 64, 1u);)
KERNEL(publishes_unfenced, out[t] = in[t]; __syncthreads(); if (t == 9) atomicAdd((unsigned*)in + 64, 1u);)
KERNEL(publishes_too_early, out[t] = in[t]; __threadfence(); if (t == 9) atomicAdd((unsigned*)in + 64, 1u);)
KERNEL(reads_16_bytes, if (t < n / 4) *reinterpret_cast<Four*>(out + 4 * t) = *reinterpret_cast<const Four*>(in + 4 * t);)
__global__ void takes(const float* x, float y, double z, int i, unsigned u, long long l, void* any) {}

struct Order { const int* source[2]; long long first; double settings[40]; int which; };
__global__ void obeys(const Order order, int* out) {
  out[threadIdx.x] = order.source[order.which][order.first + threadIdx.x] + int(order.settings[39]);
}
__global__ void remembers(Order* kept, Order order) { if (threadIdx.x == 0) *kept = order; }
"""
ORDER = np.dtype(
    [("source", "u8", 2), ("first", "i8"), ("settings", "f8", 40), ("which", "i4")], align=True
)
BLOCK = Launch((1, 1), (64, 1))


def trial(name, n=0, shape=BLOCK, size=64):
    return launch(
        KERNELS, name, shape, np.arange(size, dtype=np.int32), np.full(size, -7, np.int32), n
    )[1]


for line in KERNELS.splitlines():
    if line.startswith("KERNEL("):
        compiler.kernel(KERNELS, line[7 : line.index(",")])
for name in ("takes", "obeys", "remembers"):
    compiler.kernel(KERNELS, name)


def test_threads_share_memory_and_shuffle_as_cuda_says():
    numbers = np.arange(64)
    np.testing.assert_array_equal(trial("reverses"), numbers[::-1])
    np.testing.assert_array_equal(
        trial("writes_dynamic_shared_memory", shape=Launch((2, 1), (64, 1), 256)), numbers[::-1]
    )
    np.testing.assert_array_equal(
        trial("sums_a_warp"), np.repeat([numbers[:32].sum(), numbers[32:].sum()], 32)
    )
    lanes = numbers % 32
    np.testing.assert_array_equal(
        trial("shifts_down"), numbers + np.where(lanes < 29, 3, 0) + 100 * (numbers - lanes + 7)
    )


@pytest.mark.parametrize("name", ["forgets_a_barrier", "reuses_too_early"])
def test_a_missing_barrier_changes_the_result_with_the_order(name):
    with pytest.raises(AssertionError, match="depends on the order"):
        trial(name)


def test_shared_memory_is_poisoned_before_a_block():
    np.testing.assert_array_equal(trial("reads_the_unwritten"), [*range(32), *[-1] * 32])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("returns_before_a_barrier", {}, "waits in vain at the barrier of line"),
        ("shuffles_with_half_a_warp", {}, "waits in vain"),
        (
            "meets_at_two_barriers",
            {},
            "comes to the barrier of line 1[23], where others wait at that of line 1[23]",
        ),
        ("reads_beyond_the_end", {"n": 1}, r"thread \(63, 0\): out of bounds: a read of 4 bytes"),
        (
            "writes_before_the_begin",
            {"n": 1},
            r"thread \(0, 0\): out of bounds: a write of 4 bytes",
        ),
        (
            "writes_dynamic_shared_memory",
            {"shape": Launch((1, 1), (64, 1), 252)},
            "out of bounds: a write",
        ),
    ],
)
def test_what_goes_wrong_in_a_kernel_is_an_error_and_the_next_launch_works(
    name, arguments, message
):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{name}.*{message}"):
            trial(name, **arguments)
    np.testing.assert_array_equal(trial("reverses"), np.arange(64)[::-1])


def test_results_that_are_published_without_a_fence_or_before_all_are_there_are_an_error():
    np.testing.assert_array_equal(trial("publishes", size=65)[:64], np.arange(64))
    with pytest.raises(RuntimeError, match=r"publishes what thread \d wrote without a fence"):
        trial("publishes_unfenced", size=65)
    with pytest.raises(
        RuntimeError, match="publishes what thread 0 wrote, with no barrier between"
    ):
        trial("publishes_too_early", size=65)


@pytest.mark.parametrize("which", [0, 1])
def test_an_access_of_16_bytes_to_a_misaligned_address_is_an_error(which):
    device = CpuDevice()
    arrays = [device.to_device(np.zeros(68, np.int32)) for _ in range(2)]
    kernel = device.kernel(KERNELS, "reads_16_bytes")
    device.launch(kernel, BLOCK, [*arrays, 64])
    arrays[which] = arrays[which][1:]
    with pytest.raises(RuntimeError, match="misaligned"):
        device.launch(kernel, BLOCK, [*arrays, 64])


def test_a_null_pointer_is_out_of_bounds():
    device = CpuDevice()
    with pytest.raises(RuntimeError, match="out of bounds: a read of 4 bytes at 0x0"):
        device.launch(
            device.kernel(KERNELS, "copies"),
            BLOCK,
            [None, device.to_device(np.zeros(64, np.int32)), 64],
        )


RIGHT = [
    np.zeros(3, np.float32),
    np.float32(1),
    2.0,
    np.int32(3),
    np.uint32(4),
    5,
    np.zeros(2, np.int8),
]


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        *((0, x) for x in (np.zeros(3), 8, np.float32(1), np.zeros(12, np.uint16))),
        *((1, x) for x in (1.0, np.zeros(3, np.float32), None, np.int32(1))),
        *((2, x) for x in (2, np.float32(2))),
        *((3, x) for x in (3, np.int64(3), 3.0, np.uint32(3))),
        *((4, x) for x in (4, np.int32(4))),
        *((5, x) for x in (np.int32(5), 5.0)),
        (6, 6),
    ],
)
def test_an_argument_of_another_type_than_the_parameter_is_an_error(place, wrong):
    device = CpuDevice()
    kernel = device.kernel(KERNELS, "takes")
    device.launch(kernel, BLOCK, RIGHT)
    device.launch(kernel, BLOCK, [None, *RIGHT[1:6], None])
    with pytest.raises(TypeError, match=f"takes: argument {place} is"):
        device.launch(kernel, BLOCK, [*RIGHT[:place], wrong, *RIGHT[place + 1 :]])
    with pytest.raises(TypeError, match="takes 7 arguments"):
        device.launch(kernel, BLOCK, RIGHT[:6])
    with pytest.raises(TypeError, match=f"argument {place} is"):
        device.record(
            lambda: device.launch(kernel, BLOCK, [*RIGHT[:place], wrong, *RIGHT[place + 1 :]])
        )


# -- records -------------------------------------------------------------------------------------


@pytest.fixture
def order():
    """A device, a record of two arrays of 68 numbers there, those arrays, and a result."""
    device = CpuDevice()
    arrays = [device.to_device(np.arange(68, dtype=np.int32) + 1000 * i) for i in range(2)]
    record = np.zeros((), ORDER)
    record["source"] = [device.address(x) for x in arrays]
    return device, record, arrays, device.to_device(np.zeros(64, np.int32))


def test_a_record_is_a_struct_by_value_and_a_bound_launch_reads_its_fields_at_each_call(order):
    device, record, _, out = order
    run = device.bind(device.kernel(KERNELS, "obeys"), BLOCK, [record, out])
    for which, first, more in [(0, 0, 0), (1, 4, 7), (0, 2, 5)]:
        record["which"], record["first"], record["settings"][39] = which, first, more
        run()
        np.testing.assert_array_equal(out, np.arange(64) + 1000 * which + first + more)


def test_a_record_is_copied_when_its_launch_is_recorded(order):
    device, record, _, out = order
    record["which"] = 1
    run = device.bind(device.kernel(KERNELS, "obeys"), BLOCK, [record, out])
    recording = device.record(run)
    record["which"] = 0
    recording.replay()
    np.testing.assert_array_equal(out, np.arange(64) + 1000)


def test_a_record_of_another_size_than_the_struct_is_an_error(order):
    device, _, _, out = order
    kernel = device.kernel(KERNELS, "obeys")
    packed = np.zeros((), np.dtype([(name, ORDER[name]) for name in ORDER.names]))
    for wrong in (packed, np.zeros((), [("first", "i8")])):
        with pytest.raises(TypeError, match="argument 0 is 'Order' of 352 bytes; got a record of"):
            device.launch(kernel, BLOCK, [wrong, out])
    for wrong in (np.zeros(352, np.uint8), 5, None):
        with pytest.raises(TypeError, match="argument 0 is 'Order'"):
            device.launch(kernel, BLOCK, [wrong, out])
    record = np.zeros((), [("z", "f8")])
    with pytest.raises(TypeError, match="takes: argument 2 is 'double'"):
        device.launch(device.kernel(KERNELS, "takes"), BLOCK, [*RIGHT[:2], record, *RIGHT[3:]])


def test_what_a_record_leads_to_is_all_that_a_kernel_may_read(order):
    device, record, arrays, out = order
    run = device.bind(device.kernel(KERNELS, "obeys"), BLOCK, [record, out])
    record["first"] = 5
    with pytest.raises(RuntimeError, match="out of bounds: a read of 4 bytes"):
        run()
    record["first"] = 0
    record["source"][1] = 0
    run()
    record["source"][1] = 8
    with pytest.raises(RuntimeError, match="a record leads to 0x8, which is no array's address"):
        run()
    record["source"][1] = 0
    record["source"][0] += 4
    run()
    np.testing.assert_array_equal(out, np.arange(1, 65))
    record["source"][0] -= 4
    arrays.clear()
    with pytest.raises(RuntimeError, match="has been freed"):
        run()


def test_a_record_arrives_in_device_memory_as_it_is(order):
    device, record, arrays, _ = order
    record["settings"] = np.arange(40)
    record["which"] = 1
    kept = device.empty(ORDER.itemsize)
    device.launch(device.kernel(KERNELS, "remembers"), BLOCK, [kept, record])
    for name in ORDER.names:
        np.testing.assert_array_equal(kept.view(ORDER)[0][name], record[name])
    assert arrays


@pytest.mark.parametrize(
    "shape",
    [
        Launch((0, 1), (64, 1)),
        Launch((1, 65536), (64, 1)),
        Launch((1, 1), (1025, 1)),
        Launch((1, 1), (64, 1), 1 << 20),
    ],
)
def test_a_launch_that_no_gpu_takes_is_an_error(shape):
    with pytest.raises(ValueError, match="cannot be launched"):
        trial("copies", 64, shape)


def test_a_kernel_that_does_not_compile_is_an_error_and_others_asked_for_with_it_work():
    device = CpuDevice()
    trial("copies", 64)  # whatever else waits is compiled by then
    good = device.kernel(KERNELS + "\n// once more", "copies")
    bad = device.kernel("__global__ void broken(int* x) { x[0] = unknown; }", "broken")
    zeros = device.to_device(np.zeros(64, np.int32))
    with pytest.raises(RuntimeError, match=r"does not compile broken(.|\n)*unknown"):
        device.launch(bad, BLOCK, [zeros])
    device.launch(good, BLOCK, [zeros, zeros, 64])


# -- recordings ------------------------------------------------------------------------------------


def test_a_recording_runs_when_it_is_replayed_on_what_lies_there_then():
    device = CpuDevice()
    a, b = (device.to_device(np.arange(64, dtype=np.int32)) for _ in range(2))
    n = 10
    recording = device.record(
        lambda: device.launch(device.kernel(KERNELS, "copies"), BLOCK, [a, b, n])
    )
    n = 64
    np.testing.assert_array_equal(b, np.arange(64))
    for start in (100, 200):
        a[...] = np.arange(start, start + 64)
        recording.replay()
        np.testing.assert_array_equal(b, [*range(start, start + 10), *range(10, 64)])


def test_a_recording_does_not_keep_memory_alive_and_says_when_it_is_gone():
    device = CpuDevice()
    arrays = [device.to_device(np.zeros(64, np.int32)) for _ in range(2)]
    recording = device.record(
        lambda: device.launch(device.kernel(KERNELS, "copies"), BLOCK, [*arrays, 32])
    )
    recording.replay()
    arrays.clear()
    with pytest.raises(RuntimeError, match="has been freed"):
        recording.replay()


@pytest.mark.parametrize("what", ["empty", "algorithms", "seconds", "record", "to_host"])
def test_what_breaks_a_capture_is_an_error_and_the_next_recording_works(what):
    device = CpuDevice()
    argument = {"empty": 8, "to_host": np.zeros(1)}.get(what, lambda: None)
    with pytest.raises(RuntimeError, match=f"{what} during a recording"):
        device.record(lambda: getattr(device, what)(argument))
    assert device.record(lambda: None).calls == []


def test_another_thread_launches_at_once_while_one_records():
    device = CpuDevice()
    a, b = (device.to_device(np.arange(64, dtype=np.int32) * i) for i in (1, 0))
    kernel = device.kernel(KERNELS, "copies")

    def run():
        thread = threading.Thread(target=device.launch, args=(kernel, BLOCK, [a, b, 64]))
        thread.start()
        thread.join()

    assert device.record(run).calls == []
    np.testing.assert_array_equal(a, b)


def test_uploads_come_as_late_as_they_may_and_must_not_overtake_the_work_before_them():
    device = CpuDevice()
    host, there = device.host_buffer(256).view(np.int32), device.empty(256).view(np.int32)
    out = device.empty(256).view(np.int32)
    host[...] = np.arange(64)
    mark = device.upload(host, there, None)
    assert (there == -1).all()
    device.wait(mark)
    np.testing.assert_array_equal(there, np.arange(64))
    device.launch(device.kernel(KERNELS, "copies"), BLOCK, [there, out, 64])
    with pytest.raises(RuntimeError, match="earlier launches may still read"):
        device.upload(host, there, mark)
    with pytest.raises(RuntimeError, match="before its last upload was settled"):
        device.upload(host, there, device.mark())
    device.synchronize(mark)
    device.upload(host, there, device.mark())


# -- matrix products -------------------------------------------------------------------------------

ALIGNED = {"left_alignment": 8, "right_alignment": 8, "result_alignment": 8}
BITS = {"float64": 52, "float32": 23, "tf32": 10, "bfloat16": 7, "float16": 10}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", ["", "A", "B", "AB"])
def test_products_are_numpys(transposed, accumulate, dtype):
    random, device = np.random.default_rng(1), CpuDevice()
    work = device.empty(device.product_workspace)
    T = {"float64": "double", "float16": "half_t", "bfloat16": "bfloat16_t"}.get(dtype, "float")

    def matrix(rows, columns, turn, padding):
        shape = (columns, rows + padding) if turn else (rows, columns + padding)
        memory = device.to_device(stored(random.standard_normal(shape), T))
        return memory[:, :rows].T if turn else memory[:, :columns]

    for padding in (0, 8):
        A, B = matrix(5, 7, "A" in transposed, padding), matrix(7, 3, "B" in transposed, padding)
        memory = matrix(5, 3 + padding, False, 0)
        C, outside = memory[:, :3], memory[:, 3:].tobytes()
        want = read(A, T) @ read(B, T) + (read(C, T) if accumulate else 0)
        addresses = tuple(map(device.address, (A, B, C)))
        product = products.describe(A, B, C, accumulate, addresses, tf32=dtype == "tf32")
        assert product.dtype == dtype
        a, b, c = addresses
        device.multiply(product, device.algorithms(product)[1], b, a, c, 0, 0, device.address(work))
        np.testing.assert_allclose(read(C, T), want, rtol=0, atol=20 * 2.0 ** -BITS[dtype])
        assert abs(read(C, T) - want).max() > 0 or dtype == "float64"
        assert memory[:, 3:].tobytes() == outside


@pytest.mark.parametrize("epilogue", ["bias", "relu", "gelu"])
def test_epilogues_add_the_bias_to_every_row_and_apply_the_activation(epilogue):
    random, device = np.random.default_rng(2), CpuDevice()
    A, B, b = (device.to_device(random.standard_normal(shape)) for shape in ((5, 7), (7, 3), 3))
    C, aux = (device.to_device(fresh((5, 3), "double")) for _ in range(2))
    work = device.empty(device.product_workspace)
    product = Product(
        3,
        5,
        7,
        False,
        False,
        3,
        7,
        3,
        "float64",
        "float64",
        False,
        epilogue,
        left_alignment=8,
        right_alignment=8,
        result_alignment=8,
    )
    at = device.address
    kept = at(aux) if epilogue == "gelu" else 0
    device.multiply(
        product, device.algorithms(product)[0], at(B), at(A), at(C), at(b), kept, at(work)
    )
    s = A @ B + b
    cdf = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (s + 0.044715 * s**3)))
    np.testing.assert_allclose(
        C, {"bias": s, "relu": np.maximum(s, 0), "gelu": s * cdf}[epilogue], rtol=1e-12
    )
    if kept:
        np.testing.assert_allclose(aux, s, rtol=1e-12)
    assert (work == 0xFF).all()


def test_an_algorithm_is_good_for_its_own_product_only():
    device = CpuDevice()
    one, other = (
        Product(m, 2, 2, False, False, m, 2, m, "float64", "float64", False) for m in (2, 3)
    )
    with pytest.raises(AssertionError, match="is not for"):
        device.multiply(one, device.algorithms(other)[0], 256, 256, 256, 0, 0, 256)


def test_a_recorded_product_of_memory_that_is_freed_is_an_error():
    device = CpuDevice()
    product = Product(2, 2, 2, False, False, 2, 2, 2, "float64", "float64", False, **ALIGNED)
    arrays = [device.to_device(np.zeros((2, 2))) for _ in range(3)]
    at, algorithm = [device.address(x) for x in arrays], device.algorithms(product)[0]
    work = device.empty(device.product_workspace)
    recording = device.record(
        lambda: device.multiply(product, algorithm, *at, 0, 0, device.address(work))
    )
    recording.replay()
    arrays.pop()
    with pytest.raises(RuntimeError, match="has been freed"):
        recording.replay()
