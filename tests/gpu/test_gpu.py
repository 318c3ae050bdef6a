"""Tests of a real GPU alone: streams, threads, memory, other libraries."""

import gc
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends.cuda import grids as launches
from mlpcore.backends.cuda import slot as cuda_slot
from mlpcore.backends.cuda.ops import CudaOps
from mlpcore.core import activations, losses
from tests.gpu.test_training import ROWS, data, near, trainer

pytestmark = pytest.mark.gpu
HERE = Path(__file__).parent


def run_alone(code):
    """Return the output of this code in its own Python process."""
    folder = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{folder}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=35)
    return done.returncode, done.stdout + done.stderr


# -- devices ---------------------------------------------------------------------------------------


def test_importing_creates_no_context_and_imports_no_cupy(gpu):
    code = (
        "import sys, ctypes, mlpcore as mc\n"
        "mc.Trainer(mc.MLP([2, 3, 1], device='cpu'), 'squared_error')\n"
        "cuda = ctypes.CDLL('libcuda.so.1'); assert cuda.cuInit(0) == 0\n"
        "device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int(-1)\n"
        "assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0\n"
        "assert cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) "
        "== 0\n"
        "print('active', active.value, 'cupy' in sys.modules)\n"
        "{more}"
        "assert cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) "
        "== 0\n"
        "print('later', active.value)"
    )
    status, text = run_alone(code.format(more="mc.MLP([2, 3, 1], device='cuda')\n"))
    assert status == 0, text
    assert "active 0 False" in text
    assert "later 1" in text  # so that the question can be answered otherwise


def test_info_names_the_gpu_and_what_multiplies(gpu):
    found = mc.info()
    assert found["device"] == "cuda:0"
    assert "sm_" in found["cuda"]
    assert "cuBLASLt" in found["cuda"]
    assert "cannot" not in found["cuda"]
    assert gpu.captures
    assert gpu.name == "cuda:0"


def test_a_gpu_that_is_not_there_is_said_to_be_none(gpu):
    with pytest.raises(mc.DeviceUnavailable, match="cuda:99"):
        mc.MLP([2, 1], device="cuda:99")
    with pytest.raises(mc.DeviceUnavailable, match="cuda:99"):
        mc.MLP([2, 1], device="cpu").to("cuda:99")


# -- streams and threads ---------------------------------------------------------------------------


def run_of(one, arrays, count=12, between=lambda i: None):
    found = []
    for i in range(count):
        between(i)
        found.append(one.step(*arrays, rows=np.arange(ROWS - i % 3)))
    return [float(J) for J in found]


@pytest.mark.parametrize("precision", [None, "bfloat16"])
@pytest.mark.parametrize("chunk_rows", ["auto", 5])
def test_a_users_own_work_between_the_steps_changes_no_bit(cupy, chunk_rows, precision):
    arrays = [cupy.asarray(x) for x in data()]
    settings = {"deterministic": True, "chunk_rows": chunk_rows, "precision": precision}
    quiet = trainer("cuda", **settings)
    expected = run_of(quiet, arrays)
    kept, other = [], cupy.cuda.Stream(non_blocking=True)

    def busy(i):
        # takes memory that was given back
        kept.append(cupy.full((1 << (10 + i % 8),), cupy.nan, cupy.float32))
        kept.append(cupy.random.random((333, 77)) @ cupy.random.random((77, 50)))
        with other:
            kept.append(cupy.full(1 << 16, 7.0))
            kept[-1] *= 2
        if i % 4 == 3:
            kept.clear()
        if i % 5 == 4:
            cupy.get_default_memory_pool().free_all_blocks()

    disturbed = trainer("cuda", **settings)
    assert run_of(disturbed, arrays, between=busy) == expected
    cupy.testing.assert_array_equal(disturbed.net.parameters, quiet.net.parameters)


@pytest.mark.parametrize("staged", [False, True], ids=["on the device", "from the host"])
def test_steps_on_one_stream_and_another_are_in_order_and_j_may_be_read_on_a_third(cupy, staged):
    arrays = data() if staged else [cupy.asarray(x) for x in data()]
    cupy.cuda.Device().synchronize()
    expected = run_of(trainer("cuda", deterministic=True), arrays)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    one, found = trainer("cuda", deterministic=True), []
    cupy.cuda.Device().synchronize()
    for i in range(12):
        with streams[i % 3]:
            found.append(one.step(*arrays, rows=np.arange(ROWS - i % 3)))
            if i == 7:
                assert float(found[3]) == expected[3]
    assert [
        float(J) for J in found
    ] == expected  # on the default stream, which waits for none of them by itself


def test_steps_on_the_default_streams_of_several_threads_are_in_order(cupy):
    arrays = [cupy.asarray(x) for x in data()]
    expected = run_of(trainer("cuda", deterministic=True), arrays)
    one, found = trainer("cuda", deterministic=True), []
    cupy.cuda.Device().synchronize()

    def step(i):
        with cupy.cuda.Stream.ptds:
            found.append(one.step(*arrays, rows=np.arange(ROWS - i % 3)))

    for i in range(12):
        thread = threading.Thread(target=step, args=(i,))
        thread.start()
        thread.join()
    assert [float(J) for J in found] == expected


def test_an_answer_is_waited_for_on_whatever_stream_it_is_read(cupy):
    arrays = [cupy.asarray(x) for x in data()]
    one, stream = trainer("cuda", deterministic=True), cupy.cuda.Stream(non_blocking=True)
    expected = float(trainer("cuda", deterministic=True).step(*arrays))
    A = cupy.random.random((4096, 4096), dtype=cupy.float32)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            A = A @ A / 4096  # keeps the stream busy
        J = one.step(*arrays)
    assert float(J) == expected


def test_losses_may_be_read_in_another_thread_while_steps_are_launched(cupy):
    arrays = [cupy.asarray(x) for x in data()]
    one, alone = (trainer("cuda", optimizer=mc.SGD(0.1), deterministic=True) for _ in range(2))
    taken, found = queue.SimpleQueue(), []

    def read():
        while (J := taken.get(timeout=20)) is not None:
            found.append(float(J))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for _ in range(300):
        taken.put(one.step(*arrays))
    taken.put(None)
    reader.join(30)
    assert found == [float(alone.step(*arrays)) for _ in range(300)]


@pytest.mark.parametrize("hidden", ["relu", "gelu"])
def test_two_trainers_in_two_threads_do_not_meet(cupy, hidden):
    X, Y, _ = data()
    found, errors = {}, []

    def work(name, seed, own_stream):
        try:
            stream = cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null
            with stream:
                net = mc.MLP([7, 32, 16, 5], hidden, "softmax", device="cuda", seed=seed)
                one = mc.Trainer(net, "cross_entropy", mc.SGD(0.1))
                found[name] = [
                    float(one.step(X[: ROWS - i % 5], Y[: ROWS - i % 5])) for i in range(40)
                ]
        except BaseException as error:
            errors.append(error)

    for i in range(4):
        work(("alone", i), i, False)
    for own_stream in (False, True):
        threads = [
            threading.Thread(target=work, args=((own_stream, i), i, own_stream)) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        for i in range(4):
            near(found["alone", i], found[own_stream, i], 1e-4)


def test_a_capture_goes_on_beside_a_thread_that_allocates_and_launches(cupy):
    stop, errors = threading.Event(), []

    def busy():
        try:
            while not stop.is_set():
                cupy.get_default_memory_pool().free_all_blocks()
                float((cupy.arange(10000, dtype=cupy.float64) * 2).sum())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        X, Y, _ = (cupy.asarray(x) for x in data())
        one = trainer("cuda")
        assert all(np.isfinite(float(one.step(X[:n], Y[:n]))) for n in range(1, 25))
    finally:
        stop.set()
        thread.join()
    assert not errors


# -- memory ----------------------------------------------------------------------------------------


def hook_of(cupy):
    """Counts what the pool is asked for."""

    class Asked(cupy.cuda.MemoryHook):
        name = "asked"

        def __init__(self):
            super().__init__()
            self.sizes = []

        def malloc_preprocess(self, **given):
            self.sizes.append(given["size"])

    return Asked()


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "float16", "l2": 0.1}, {"chunk_rows": 5}], ids=str
)
def test_what_is_allocated_is_what_the_plan_says_to_the_byte(cupy, settings):
    arrays = [cupy.asarray(x) for x in data()[:2]]
    one = trainer("cuda", **settings)
    trainer("cuda", **settings).step(*arrays)  # compiles, and settles algorithms
    plan, asked = one.plan(ROWS), hook_of(cupy)
    with asked:
        J = one.step(*arrays)
        float(J)
    # room for 2,048 answers; a control block on its way
    beside = [32 * 2048, cuda_slot.CONTROL.itemsize]
    sizes = [n for n in asked.sizes if n not in beside]
    assert sum(sizes) + one.net.parameters.nbytes == plan.total_bytes, (asked.sizes, str(plan))
    again = hook_of(cupy)
    with again:
        for _ in range(5):
            float(one.step(*arrays))
    assert not again.sizes


def test_a_batch_from_the_host_allocates_its_staging_and_nothing_later(cupy):
    X, Y, w = data()
    trainer("cuda").step(X, Y, w)
    one, asked = trainer("cuda"), hook_of(cupy)
    plan = one._step.workspace.make_plan(ROWS, one._intake.as_data(X, Y, w).inputs)
    with asked:
        float(one.step(X, Y, w))
    beside = [32 * 2048, cuda_slot.CONTROL.itemsize]
    assert (
        sum(n for n in asked.sizes if n not in beside) + one.net.parameters.nbytes
        == plan.total_bytes
    )
    again = hook_of(cupy)
    with again:
        for _ in range(5):
            one.step(X, Y, w)
    assert not again.sizes


def test_a_larger_batch_takes_the_place_of_the_smaller_ones_arrays(cupy):
    X, Y, _ = (cupy.asarray(x) for x in data(rows=5000))
    pool = cupy.get_default_memory_pool()
    one = trainer("cuda")
    for n in (4000, 4500, 5000):
        float(one.step(X[:n], Y[:n]))
    gc.collect()
    used = pool.used_bytes()
    plan = one.plan(5000).total_bytes
    del one
    gc.collect()
    assert used - pool.used_bytes() == pytest.approx(plan + 32 * 2048, abs=8 * 512)


# -- rows from the host ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunk_rows", ["auto", 500], ids=["staged at once", "staged chunk by chunk"]
)
def test_a_batch_of_the_host_may_be_overwritten_as_soon_as_step_returns(cupy, chunk_rows):
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((5000 - 7 * (i % 3), 256)).astype(np.float32) for i in range(24)]
    found = []
    for on_device in (True, False):
        net = mc.MLP([256, 512, 512, 8], device="cuda", seed=1)
        one = mc.Trainer(
            net, "squared_error", mc.SGD(1e-3), chunk_rows=chunk_rows, deterministic=True
        )
        losses_, buffer = [], np.empty((5000, 256), np.float32)
        for batch in batches:
            X = buffer[: len(batch)]
            X[...] = batch
            Y = X[:, :8].copy()
            losses_.append(
                one.step(cupy.asarray(X), cupy.asarray(Y)) if on_device else one.step(X, Y)
            )
            X[...] = np.nan
        found.append([float(J) for J in losses_])
    assert found[0] == found[1]


def test_page_locked_memory_is_not_given_back_while_a_copy_reads_it(cupy):
    rng = np.random.default_rng(0)
    X, Y = (
        rng.standard_normal((20000, 256)).astype(np.float32),
        rng.standard_normal((20000, 8)).astype(np.float32),
    )

    def parameters(disturb):
        net = mc.MLP([256, 1024, 1024, 8], device="cuda", seed=1)
        one = mc.Trainer(net, "squared_error", mc.SGD(1e-3), deterministic=True)
        for _ in range(4):
            one.step(X, Y)
        if disturb:
            one.step(X[:, ::-1], Y)
            del one  # two batches may still be on their way
            junk = cupy.asarray(np.full_like(X, np.nan))
            del junk
        else:
            float(one.step(X[:, ::-1], Y))
        return cupy.asnumpy(net.parameters)

    np.testing.assert_array_equal(parameters(True), parameters(False))


# -- other libraries' arrays -----------------------------------------------------------------------


def addresses_of_a_step(one, *arrays):
    """Return the addresses from which a step reads, and J."""
    seen, set_slot = [], one._step.kernels.set_slot
    one._step.kernels.set_slot = lambda sources, *rest: (
        seen.append([None if x is None else x.data.ptr for x in sources])
        or (set_slot(sources, *rest))
    )
    return float(one.step(*arrays)), seen[0]


def test_arrays_of_pytorch_are_read_where_they_lie(cupy):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    X, Y, w = data()
    there = [torch.from_numpy(x).cuda() for x in (X, Y, w)]
    one = trainer("cuda")
    expected = float(trainer("cuda").step(*(cupy.asarray(x) for x in (X, Y, w))))
    torch.cuda.synchronize()
    assert float(one.step(*there)) == expected
    J, seen = addresses_of_a_step(one, *there)
    assert np.isfinite(J)
    assert seen == [x.data_ptr() for x in there]
    # of the host's, too
    assert float(trainer("cuda").step(torch.from_numpy(X), torch.from_numpy(Y))) == pytest.approx(
        float(trainer("cuda").step(X, Y)), rel=1e-6
    )
    P = one.net.predict(there[0])
    assert isinstance(P, torch.Tensor)
    assert P.device.type == "cuda"
    strided = torch.from_numpy(np.repeat(X, 2, axis=1)).cuda()[:, ::2]
    assert float(trainer("cuda").step(strided, *there[1:])) == expected


@pytest.mark.parametrize("own_stream", [False, True])
def test_a_layer_of_pytorch_on_a_gpu_has_the_gradients_of_one_on_the_cpu(cupy, own_stream):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    module = pytest.importorskip("mlpcore.torch").Module(
        mc.MLP([7, 16, 5], "tanh", dtype="float64", device="cpu")
    )
    X = torch.from_numpy(data()[0]).double()
    found = []
    for where in ("cpu", "cuda"):
        stream = (
            torch.cuda.Stream() if own_stream and where == "cuda" else torch.cuda.default_stream()
        )
        with torch.cuda.stream(stream):
            module.to(where)
            module.flat.grad = None
            x = X.to(where).requires_grad_()
            (module(2 * x) ** 2).sum().backward()
            found.append([t.cpu() for t in (x.grad, module.flat.grad)])
    assert module.net.device == "cuda:0"
    assert module.flat.data_ptr() == module.net.parameters.data.ptr
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_host_arrays_of_any_kind_are_the_numbers_they_hold(cupy):
    X, Y, w = data()
    expected = float(trainer("cuda").step(X, Y, w)), trainer("cuda").net.predict(X)
    for x in (X.astype(np.longdouble), X.astype(">f4"), np.asfortranarray(X), X[::-1].copy()[::-1]):
        assert float(trainer("cuda").step(x, Y, w)) == expected[0]
        np.testing.assert_array_equal(trainer("cuda").net.predict(x), expected[1])


def test_what_speaks_dlpack_alone_is_read_where_it_lies(cupy):
    class Foreign:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **more):
            return self.array.__dlpack__(**more)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    arrays = [cupy.asarray(x) for x in data()]
    one = trainer("cuda")
    expected = float(trainer("cuda").step(*arrays))
    assert float(one.step(*map(Foreign, arrays))) == expected
    assert addresses_of_a_step(one, *map(Foreign, arrays))[1] == [x.data.ptr for x in arrays]


def test_arrays_of_jax_are_read_where_they_lie(cupy):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU")
    X, Y, _ = data()
    there = [jax.device_put(x) for x in (X, Y.astype(np.int32))]
    jax.block_until_ready(there)
    expected = float(trainer("cuda").step(X, Y))
    one = trainer("cuda")
    assert float(one.step(*there)) == pytest.approx(expected, rel=1e-6)
    assert addresses_of_a_step(one, *there)[1][:2] == [x.unsafe_buffer_pointer() for x in there]


# -- limits of the hardware ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1500, 1536, 3072, 6144, 12288, 12289, 40000])
def test_cross_entropy_over_as_many_classes_as_fill_shared_memory(cupy, gpu, n):
    rng, objective = (
        np.random.default_rng(0),
        losses.pair(losses.resolve("cross_entropy"), activations.SOFTMAX),
    )
    for dtype in ("float32", "float64"):
        S, Y = rng.standard_normal((37, n)).astype(dtype), rng.integers(0, n, 37)
        D, db, J = cupy.empty((37, n), dtype), cupy.empty(n, dtype), cupy.zeros((), dtype)
        k = cupy.full((), 1 / 37, dtype)
        CudaOps(gpu).loss(cupy.asarray(S), cupy.asarray(Y), k, objective, D, db, J, False)
        P = np.exp(S.astype(np.float64))
        P /= P.sum(axis=1, keepdims=True)
        assert float(J) == pytest.approx(-np.log(P[np.arange(37), Y]).mean(), rel=1e-5)
        P[np.arange(37), Y] -= 1
        near(P / 37, cupy.asnumpy(D), 1e-5)
        near(P.sum(axis=0) / 37, cupy.asnumpy(db), 1e-5)


def test_matrices_of_more_than_two_thousand_million_entries(cupy, gpu):
    m, n = (1 << 21) + 5, 1032
    if cupy.cuda.runtime.memGetInfo()[0] < 16 << 30:
        pytest.skip("less than 16 GiB of GPU memory are free")
    sigma, ops = activations.resolve("relu"), CudaOps(gpu)
    S = cupy.zeros((m, n), cupy.float16)
    S[-1] = cupy.arange(n) - 500
    b = cupy.ones(n, cupy.float32)
    ops.bias_activation(S, b, sigma, S)
    np.testing.assert_array_equal(
        cupy.asnumpy(S[-1]), np.maximum(np.arange(n) - 499, 0).astype(np.float16)
    )
    assert float(S[:-1].min()) == float(S[:-1].max()) == 1
    db = cupy.empty(n, cupy.float32)
    S[...] = 1
    ops.activation_gradient(S, S, S, sigma, S, db)
    np.testing.assert_array_equal(cupy.asnumpy(db), np.full(n, m, np.float32))
    del S
    cupy.get_default_memory_pool().free_all_blocks()


def test_a_batch_of_a_million_rows(cupy):
    X = cupy.random.standard_normal((1 << 20, 3), dtype=cupy.float32)
    Y = X @ cupy.asarray([[1.0], [-2.0], [0.5]], cupy.float32)
    one = mc.Trainer(
        mc.MLP([3, 16, 1], "tanh", device="cuda", seed=0), "squared_error", mc.Adam(1e-2)
    )
    found = [float(one.step(X, Y)) for _ in range(30)]
    assert found[-1] < 0.5 * found[0]
    expected = mc.Trainer(
        mc.MLP([3, 16, 1], "tanh", device="cpu", seed=0), "squared_error", mc.Adam(1e-2)
    )
    near(expected.step(cupy.asnumpy(X), cupy.asnumpy(Y)), found[0], 1e-4)


def test_the_kernels_leave_room_for_their_own_shared_memory(gpu):
    from mlpcore.backends.cuda import source as cuda_source

    kernel = gpu.kernel(cuda_source.text("losses.cu"), "softmax_cross_entropy<double>")
    with gpu.device:
        assert kernel.shared_size_bytes + launches.SHARED <= 48 << 10
        assert kernel.max_dynamic_shared_size_bytes >= launches.SHARED
