"""An NVIDIA GPU as a `CudaDevice`, through CuPy: memory pool, `RawModule`, cuBLASLt, CUDA graphs.

Only this module imports CuPy. It is imported when a CUDA device is requested or searched for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import cupy
import cupyx
import numpy as np

from mlpcore.backends.cuda.cublaslt import CublasLt
from mlpcore.backends.cuda.device import Launch, Mark
from mlpcore.backends.cuda.gemm import Algorithms, Product
from mlpcore.backends.cuda.ops import new_operations
from mlpcore.checks import arrays
from mlpcore.checks.errors import DeviceUnavailable
from mlpcore.core.ops import Array, Ops

log = logging.getLogger("mlpcore")
OLDEST = (14, 2)  # the oldest CuPy that reads template instances back from its disk cache
PRODUCT_WORKSPACE = 32 << 20  # bytes: the default of cuBLAS on Hopper
RUNS, LONG = 16, 2e-4  # calls timed in one graph, unless one call takes this many seconds
AHEAD, TIMED = 2, 5  # graphs launched before the timed one, and number of repetitions
PER_THREAD = 2  # cudaStreamPerThread: the same number in all threads


@functools.cache
def why_not() -> str:
    """Return why CUDA cannot be used although CuPy is installed, and a remedy; "" if it can."""
    version = tuple(int(part) for part in cupy.__version__.split(".")[:2] if part.isdigit())
    if version < OLDEST:
        return (
            f"CuPy {cupy.__version__} is too old: {'.'.join(map(str, OLDEST))} or later is needed"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return (
            f"CuPy finds no usable NVIDIA driver or GPU ({error}): install the driver, or use "
            "device='cpu'"
        )
    if count == 0:
        return "CuPy finds no NVIDIA GPU: use device='cpu'"
    try:
        cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing").compile()
    except (cupy.cuda.compiler.CompileException, RuntimeError, OSError, ImportError) as error:
        last = str(error).strip().splitlines()[-1]
        return (
            f"NVRTC cannot compile ({last}): pip install 'cupy-cuda13x[ctk]' or 'cupy-cuda12x[ctk]'"
        )
    return ""


def describe() -> str:
    """Return device 0 and the versions of driver, runtime and cuBLASLt, in one line."""
    runtime = cupy.cuda.runtime
    found = runtime.getDeviceProperties(0)
    name, generation = found["name"].decode(), f"sm_{found['major']}{found['minor']}"
    versions = f"driver {runtime.driverGetVersion()}, runtime {runtime.runtimeGetVersion()}"
    return f"{name}, {generation}, {found['totalGlobalMem'] >> 30} GiB; {versions}, {products_by()}"


@functools.cache
def products(index: int) -> CublasLt | None:
    """Return cuBLASLt for one GPU, since handles belong to a GPU; None if it cannot be loaded."""
    try:
        return CublasLt()
    except OSError:
        return None


def products_by() -> str:
    """Return the name and version of the library that multiplies matrices."""
    library = products(0)
    return (
        f"cuBLASLt {library.version}"
        if library
        else "cuBLASLt cannot be loaded: unfused CuPy operations, without graphs"
    )


def _argument(x: object) -> object:
    """Return a kernel's argument in a form that CuPy passes on unchanged, and keeps alive."""
    if isinstance(x, cupy.ndarray):
        return x.data
    value: object = 0 if x is None else x
    return cupy.cuda.function.CNumpyArray(np.asarray(value))  # takes the address of its bytes


class GraphRecording:
    """A captured CUDA graph."""

    def __init__(self, graph: Any):
        self.graph = graph

    def replay(self) -> None:
        """Launch the graph on the current stream. The caller holds `active()`."""
        self.graph.launch()


class CupyDevice:
    """An NVIDIA GPU.

    Args:
        index: number of the GPU.

    Raises:
        DeviceUnavailable: there is no GPU with this number.
    """

    xp: Any = cupy
    product_workspace = PRODUCT_WORKSPACE

    def __init__(self, index: int):
        count = cupy.cuda.runtime.getDeviceCount()
        if index >= count:
            raise DeviceUnavailable(
                f"device='cuda:{index}': there {'is 1 GPU' if count == 1 else f'are {count} GPUs'}"
            )
        self.index, self.name = index, f"cuda:{index}"
        self.device = cupy.cuda.Device(index)
        self.multiprocessors = int(self.device.attributes["MultiProcessorCount"])
        self.products = products(index)
        model = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
        self.captures, self.library = self.products is not None, f"{products_by()} on {model}"
        self.lock: AbstractContextManager[object] = threading.RLock()
        self.choices: dict[bool, Algorithms] = {}
        if not self.captures:
            log.warning("%s: %s", self.name, self.library)
        self._kernels: dict[tuple[str, str], Any] = {}
        with self.device:
            self._copies = cupy.cuda.Stream(non_blocking=True)

    def active(self) -> AbstractContextManager[object]:
        """Return a context in which this is CuPy's current device."""
        # a new object each time, since it remembers the device to restore
        device: AbstractContextManager[object] = cupy.cuda.Device(self.index)
        return device

    def operations(self, tf32: bool = False, deterministic: bool = False) -> Callable[[], Ops]:
        """Return a factory of fused operations, or of CuPy's own if cuBLASLt is missing."""
        return new_operations(self, tf32, deterministic)

    # -- memory and kernels --

    def empty(self, nbytes: int) -> Array:
        """Return `nbytes` of uninitialised device memory, as a 1-D uint8 array."""
        with self.device:
            return cupy.empty(nbytes, cupy.uint8)

    def free_bytes(self) -> int:
        """Return the bytes that are free on the GPU or unused in CuPy's pool."""
        with self.device:
            unused = cupy.get_default_memory_pool().free_bytes()
            return int(cupy.cuda.runtime.memGetInfo()[0] + unused)

    def address(self, array: Array) -> int:
        """Return the array's address in device memory."""
        return int(array.data.ptr)

    def kernel(self, source: str, name: str) -> Any:
        """Return the instance `name` of a source, loaded; CuPy keeps the compiled code on disk."""
        if (source, name) not in self._kernels:
            with self.device, self.lock:
                # without the non-ASCII letters of comments: CuPy writes it in the locale's encoding
                code = source.encode("ascii", "ignore").decode()
                module = cupy.RawModule(
                    code=code, options=("--std=c++17",), name_expressions=(name,)
                )
                kernel = module.get_function(name)
                _ = kernel.num_regs  # loads it now: inside a capture, a first launch must not
            self._kernels[source, name] = kernel
        return self._kernels[source, name]

    def launch(self, kernel: Any, launch: Launch, arguments: Sequence[object]) -> None:
        """Run a kernel on the current stream."""
        # CuPy does not convert None to a null pointer (its issue 9046)
        given = tuple(0 if x is None else x for x in arguments)
        kernel(launch.grid, launch.block, given, shared_mem=launch.shared)

    def bind(self, kernel: Any, launch: Launch, arguments: Sequence[object]) -> Callable[[], None]:
        """Return a prepared launch that passes these same objects at each call."""
        with self.device:
            function = kernel.kernel  # `RawKernel.__call__` looks it up by the current device
        given = tuple(map(_argument, arguments))
        return functools.partial(function, launch.grid, launch.block, given, launch.shared)

    # -- products --

    def algorithms(self, product: Product) -> Sequence[bytes]:
        """Return cuBLASLt's candidates, the likeliest to be fast first."""
        assert self.products is not None
        with self.device:
            found = self.products.algorithms(product, PRODUCT_WORKSPACE)
        if not found and not product.epilogue:
            raise RuntimeError(f"cuBLASLt has no algorithm for {product}")
        return found

    def multiply(
        self,
        product: Product,
        algorithm: bytes,
        left: int,
        right: int,
        result: int,
        bias: int,
        aux: int,
        workspace: int,
    ) -> None:
        """Run a matrix product on the current stream."""
        assert self.products is not None
        stream = cupy.cuda.get_current_stream().ptr
        self.products.multiply(
            product, algorithm, left, right, result, bias, aux, workspace, PRODUCT_WORKSPACE, stream
        )

    def seconds(self, run: Callable[[], None]) -> float:
        """Return the median time of `run` on the device, by events around graphs of several runs.

        Events around a launch on an idle stream measure how long the host takes to launch. So the
        timed graph is launched while the device is still busy with earlier ones.
        """

        def several() -> None:
            for _ in range(runs):
                run()

        with self.device, self.lock:
            run()  # loads kernels, or fails, before anything is captured
            runs = 1 if min(self._elapsed(run) for _ in range(3)) > LONG else RUNS
            graph = self.record(several)
            times = []
            for _ in range(TIMED):
                for _ in range(AHEAD):
                    graph.replay()
                times.append(self._elapsed(graph.replay))
        return statistics.median(times) / runs

    @staticmethod
    def _elapsed(run: Callable[[], None]) -> float:
        """Return the seconds between two events around the work of `run`; wait for it."""
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, stop)) / 1e3

    # -- recording --

    def record(self, run: Callable[[], None]) -> GraphRecording:
        """Capture the launches of `run` as a CUDA graph."""
        with self.device, self.lock, cupy.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            try:
                run()
            except BaseException:
                failed = cupy.cuda.runtime.CUDARuntimeError  # raised by the capture
                with contextlib.suppress(failed):
                    stream.end_capture()
                raise
            return GraphRecording(stream.end_capture())

    # -- arrays on the host and on the device --

    def holds(self, array: Array) -> bool:
        """Return True if an array is in this device's memory."""
        return isinstance(array, cupy.ndarray)

    def adopt(self, value: object, name: str) -> Array:
        """Return a user's argument as this device's array, without a copy, or as a NumPy array."""
        if not isinstance(value, cupy.ndarray):
            if arrays.gpu(value, name) is None:
                return arrays.host_array(value, name)
            # DLPack orders the streams
            dlpack = hasattr(value, "__dlpack__")
            value = cupy.from_dlpack(value) if dlpack else cupy.asarray(value)
        assert isinstance(value, cupy.ndarray)
        if value.device.id != self.index:
            raise ValueError(f"{name} is on cuda:{value.device.id}; the network is on {self.name}")
        return value

    def to_device(self, array: Array) -> Array:
        """Return the array on this device; the same array if it is already there."""
        with self.device:
            return cupy.asarray(array)

    def to_host(self, array: Array) -> np.ndarray:
        """Return the array as a NumPy array, after it is computed."""
        with self.device:
            host: np.ndarray = cupy.asnumpy(array)
            return host

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """Return page-locked host memory, as a 1-D uint8 array."""
        with self.device:
            buffer: np.ndarray = cupyx.empty_pinned(nbytes, np.uint8)
            return buffer

    def upload(self, source: np.ndarray, destination: Array, after: Mark | None) -> Mark:
        """Copy page-locked memory to the device in a separate stream; return a mark of its end."""
        with self.device:
            if after is not None:
                self._copies.wait_event(after)
            destination.data.copy_from_host_async(source.ctypes.data, source.nbytes, self._copies)
            return self._event(self._copies)

    # -- order --

    @staticmethod
    def _event(stream: Any) -> Mark:
        event = cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    def mark(self) -> Mark:
        """Return a mark of all work submitted so far to the current stream."""
        with self.device:
            return self._event(cupy.cuda.get_current_stream())

    def wait(self, mark: Mark) -> None:
        """Make the current stream wait for a mark."""
        with self.device:
            cupy.cuda.get_current_stream().wait_event(mark)

    def synchronize(self, mark: Mark) -> None:
        """Block the host until a mark has passed."""
        mark.synchronize()

    def follow(self, stream: object) -> tuple[Any, threading.Thread | None]:
        """Make the current stream wait for the work of another, or of None, and return it.

        A per-thread default stream has one number in all threads, and is returned with its thread.
        """
        now = cupy.cuda.get_current_stream(self.index)
        current = now, threading.current_thread() if now.ptr == PER_THREAD else None
        if stream is None or current == stream:
            return current
        assert isinstance(stream, tuple)
        theirs, thread = stream
        with self.device:
            if thread in (None, current[1]):
                now.wait_event(self._event(theirs))
            else:  # another thread's default stream: this thread cannot record an event in it
                with self.lock:
                    cupy.cuda.runtime.deviceSynchronize()
        return current
