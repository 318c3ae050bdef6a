"""The Protocol of a CUDA device: the memory, kernels, products and recordings that steps need.

`CupyDevice` implements it on an NVIDIA GPU. The tests implement it on a CPU, where the same
kernels, launch plans, products and steps run with each CUDA thread as a fiber
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

Kernel = Any  # what `CudaDevice.kernel` returns and `CudaDevice.launch` takes
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
        multiprocessors: their number.
        product_workspace: bytes of scratch that matrix products may use, on each stream.
        library: name and version of the library that multiplies matrices, and its GPU.
        lock: held while something is recorded or timed. Hold it where `algorithms` is called and
            where a product runs for the first time: neither goes while another thread records.
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
        """Return the array's address in the device's memory."""

    def kernel(self, source: str, name: str) -> Kernel:
        """Return the instance `name`, e.g. `"softmax<float>"`, of a source without includes.

        It is compiled once and kept.
        """

    def launch(self, kernel: Kernel, launch: Launch, arguments: Sequence[object]) -> None:
        """Run a kernel on the current stream. The caller holds `active()`.

        Arguments: device arrays and None are pointers; an int is a `long long`; a float is a
        `double`; NumPy scalars keep their type (`np.int32` is an `int`, `np.float32` a `float`); a
        record (a 0-d structured NumPy array) is a struct by value, whose bytes are copied at the
        launch, or when it is recorded.
        """

    def bind(
        self, kernel: Kernel, launch: Launch, arguments: Sequence[object]
    ) -> Callable[[], None]:
        """Return a prepared launch whose arguments are these same objects at each call.

        Each call copies a record anew, so that the caller may change its fields in between. The
        caller holds `active()`.
        """

    def algorithms(self, product: Product) -> Sequence[bytes]:
        """Return the algorithms of a matrix product, the likeliest to be fast first.

        There is at least one. Not while recording.
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
        """Run a matrix product on the current stream. The caller holds `active()`.

        The operands are addresses; bias and aux are 0 where there is none.

        Raises:
            UnsupportedAlgorithm: the library does not compute it by this algorithm.
        """

    def seconds(self, run: Callable[[], None]) -> float:
        """Return how long the device itself takes for `run`. Not while recording.

        `run` is called many times, and recorded: it must not wait for the device, nor allocate
        after its first call.
        """

    def record(self, run: Callable[[], None]) -> Recording:
        """Record what `run` launches, without executing it."""

    # -- copies and their order --

    def to_host(self, array: Array) -> np.ndarray:
        """Return the array as NumPy's, once it is computed."""

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """Return page-locked host memory as a 1-D uint8 array: copies from it need not wait."""

    def upload(self, source: np.ndarray, destination: Array, after: Mark | None) -> Mark:
        """Copy page-locked memory to the device in a stream of its own; return the end's mark.

        The copy begins once `after` has passed.
        """

    def mark(self) -> Mark:
        """Return a mark of everything that the current stream has been asked for so far."""

    def wait(self, mark: Mark) -> None:
        """Let the current stream wait for a mark."""

    def synchronize(self, mark: Mark) -> None:
        """Wait, here on the host, for a mark."""

    def follow(self, stream: object) -> object:
        """Let the current stream wait for the work that another has been asked for so far.

        Args:
            stream: the other one, or None.

        Returns:
            The current stream.
        """
