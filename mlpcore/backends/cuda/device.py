"""What the CUDA backend asks of a device, and no more: memory, kernels, matrix products, recording.

`CupyDevice` does it on an NVIDIA GPU. The tests do it on a CPU (tests/cuda_on_cpu): the same
kernels, launch plans, products and steps run there, with each CUDA thread as a fiber.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlpcore.backends.cuda.gemm import Product
from mlpcore.core.ops import Array, Recording

Kernel = Any  # what `Device.kernel` gives and `Device.launch` takes
Mark = Any  # an event


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        grid: blocks along x and y.
        block: threads along x and y.
        shared: bytes of dynamic shared memory.
    """

    grid: tuple[int, int]
    block: tuple[int, int]
    shared: int = 0


class Device(Protocol):
    """A CUDA device, or what stands in for one.

    Attributes:
        xp: the array module whose arrays lie there (CuPy; NumPy in the tests).
        name: "cuda:0", …
        multiprocessors: how many there are.
        product_workspace: bytes of scratch that matrix products may use, on each stream.
        captures: whether steps can be captured: not where cuBLASLt is missing.
        library: what multiplies matrices: its version, and on which GPU.
        lock: held while something is recorded or timed. Hold it where `algorithms` is called and
            where a product runs for the first time: neither goes while another thread records.
    """

    xp: Any
    name: str
    multiprocessors: int
    product_workspace: int
    captures: bool
    library: str
    lock: AbstractContextManager[object]

    def active(self) -> AbstractContextManager[object]:
        """Makes this the device of what `xp` does inside the `with` block."""

    def empty(self, nbytes: int) -> Array:
        """`nbytes` of uninitialised device memory, as a 1-D uint8 array."""

    def free_bytes(self) -> int:
        """Memory that may still be allocated."""

    def address(self, array: Array) -> int:
        """Where the array begins in the device's memory."""

    def kernel(self, source: str, name: str) -> Kernel:
        """The kernel instance `name`, e.g. `"softmax<float>"`, of a source without includes;
        compiled once, then kept.
        """

    def launch(self, kernel: Kernel, launch: Launch, arguments: Sequence[object]) -> None:
        """Run a kernel on the current stream. The caller holds `active()`.

        Arguments: device arrays and None stand for pointers; an int for `long long`; a float for
            `double`; NumPy scalars for
        themselves (`np.int32` for `int`, `np.float32` for `float`); a record (a 0-d structured
        NumPy array) for a struct by value, whose bytes are copied at the launch, or when it is
        recorded.
        """

    def bind(
        self, kernel: Kernel, launch: Launch, arguments: Sequence[object]
    ) -> Callable[[], None]:
        """Prepare a launch whose arguments are these same objects at each call.

        Each call copies a record anew, so that the caller may change its fields in between. The
        caller holds `active()`.
        """

    def algorithms(self, product: Product) -> Sequence[bytes]:
        """The ways to compute a matrix product, the likeliest to be fast first; at least one. Not
        while recording.
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
        """Run a matrix product on the current stream; the operands are addresses (bias and aux 0
        where there is none).

        The caller holds `active()`.

        Raises:
            Refused: the library does not compute it by this algorithm.
        """

    def seconds(self, run: Callable[[], None]) -> float:
        """Return how long the device itself takes for `run`. Not while recording.

        `run` is called many times, and recorded: it must not wait for the device, nor allocate
        after its first call.
        """

    def record(self, run: Callable[[], None]) -> Recording:
        """What `run` launches, recorded and not executed."""

    # -- arrays of the host and of the device --

    def holds(self, array: Array) -> bool:
        """Whether an array lies in this device's memory."""

    def adopt(self, value: object, name: str) -> Array:
        """What a user passed as an argument: an array of this device's (any library's, without a
        copy), or one of NumPy's.

        Raises:
            TypeError, ValueError: names the argument: no array, or one that lies on another device.
        """

    def to_device(self, array: Array) -> Array:
        """The array on this device."""

    def to_host(self, array: Array) -> np.ndarray:
        """The array as NumPy's; waits for it."""

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """Page-locked host memory, as a 1-D uint8 array: copies from it need not wait."""

    def upload(self, source: np.ndarray, destination: Array, after: Mark | None) -> Mark:
        """Copy page-locked memory to the device beside the current stream, once `after` has passed;
        the mark of its end.
        """

    def mark(self) -> Mark:
        """The point that the current stream has been asked to reach so far."""

    def wait(self, mark: Mark) -> None:
        """Let the current stream wait for a mark."""

    def settle(self, mark: Mark) -> None:
        """Wait, here on the host, for a mark."""

    def follow(self, stream: object) -> object:
        """Let the current stream, which is returned, wait for what `stream` (None: none) has been
        asked so far.
        """
