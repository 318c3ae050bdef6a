"""The Protocol of a CUDA device: the memory, kernels, products and recordings that steps need.

`CupyDevice` implements it on an NVIDIA GPU. The tests implement it on a CPU, where the same
kernels, launch plans, products and steps run, with each CUDA thread as a fiber
(tests/backends/cuda/emulator).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlpcore.backends.cuda.gemm import Algorithms, Product
from mlpcore.core.device import Device
from mlpcore.core.ops import Array, Recording

Kernel = Any  # returned by `CudaDevice.kernel`, taken by `CudaDevice.launch`
Mark = Any  # an event


class Launch(NamedTuple):
    """The shape of a kernel's launch.

    Attributes:
        grid: blocks along x and y.
        block: threads along x and y.
        shared: bytes of dynamic shared memory.
    """

    grid: tuple[int, int]
    block: tuple[int, int]
    shared: int = 0


class CudaDevice(Device, Protocol):
    """A CUDA device, or a stand-in for one.

    Attributes:
        multiprocessors: number of multiprocessors.
        product_workspace: bytes of scratch that matrix products may use, on each stream.
        library: name and version of the library that multiplies matrices, and the GPU's name.
        lock: held during recording and timing. Hold it to call `algorithms` and to run a product
            for the first time: neither works while another thread records.
        choices: the algorithms of its products, by whether they are chosen without timing.
    """

    multiprocessors: int
    product_workspace: int
    library: str
    lock: AbstractContextManager[object]
    choices: dict[bool, Algorithms]

    def empty(self, nbytes: int) -> Array:
        """Return `nbytes` of uninitialised device memory, as a 1-D uint8 array."""

    def address(self, array: Array) -> int:
        """Return the array's address in device memory."""

    def kernel(self, source: str, name: str) -> Kernel:
        """Return the instance `name`, e.g. `"softmax<float>"`, of a source without includes.

        It is compiled once and cached.
        """

    def launch(self, kernel: Kernel, launch: Launch, arguments: Sequence[object]) -> None:
        """Run a kernel on the current stream. The caller must hold `active()`.

        Device arrays and None are passed as pointers, an int as a `long long`, a float as a
        `double`; NumPy scalars keep their type (`np.int32` is an `int`, `np.float32` a `float`); a
        record (a 0-d structured NumPy array) is passed as a struct by value, whose bytes are copied
        at launch or at recording.
        """

    def bind(
        self, kernel: Kernel, launch: Launch, arguments: Sequence[object]
    ) -> Callable[[], None]:
        """Return a prepared launch that passes these same objects at each call.

        Each call copies a record again, so the caller may change its fields between calls. The
        caller must hold `active()`.
        """

    def algorithms(self, product: Product) -> Sequence[bytes]:
        """Return the algorithms of a matrix product, the likeliest to be fast first.

        There is at least one. Must not be called while recording.
        """

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
        """Run a matrix product on the current stream. The caller must hold `active()`.

        The operands are addresses; bias and aux are 0 if absent.

        Raises:
            UnsupportedAlgorithm: the library does not support this algorithm for the product.
        """

    def seconds(self, run: Callable[[], None]) -> float:
        """Return the time in seconds that the device takes for `run`. Not while recording.

        `run` is called many times, and recorded: it must not wait for the device, nor allocate
        after its first call.
        """

    def record(self, run: Callable[[], None]) -> Recording:
        """Record the launches of `run` without executing them."""

    # -- copies and their order --

    def to_host(self, array: Array) -> np.ndarray:
        """Return the array as a NumPy array, after it is computed."""

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """Return page-locked host memory as a 1-D uint8 array; copies from it are asynchronous."""

    def upload(self, source: np.ndarray, destination: Array, after: Mark | None) -> Mark:
        """Copy page-locked memory to the device in a separate stream; return a mark of its end.

        The copy begins once `after` has passed.
        """

    def mark(self) -> Mark:
        """Return a mark of all work submitted so far to the current stream."""

    def wait(self, mark: Mark) -> None:
        """Make the current stream wait for a mark."""

    def synchronize(self, mark: Mark) -> None:
        """Block the host until a mark has passed."""

    def follow(self, stream: object) -> object:
        """Make the current stream wait for the work submitted so far to another one.

        Args:
            stream: the other stream, or None.

        Returns:
            The current stream.
        """
