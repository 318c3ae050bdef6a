"""Kernel launches that run at once, are recorded, or are rehearsed, and their planned memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mlpcore.backends.cuda import grids
from mlpcore.backends.cuda.device import CudaDevice, Launch
from mlpcore.backends.cuda.gemm import STORAGE, alignment
from mlpcore.backends.cuda.source import TYPES
from mlpcore.core.ops import Array, Buffer, ChunkShape, Recording, accumulator, storage


def c_type(array: Array) -> str:
    """Return the C++ type of an array's entries."""
    return TYPES[STORAGE[array.dtype.name]]


class Launcher:
    """The memory and the launches of one stream of work.

    Args:
        device: the device.

    Attributes:
        gain: the loss scale, 0-d, or None.
        control: the memory in which kernels report faults, or None.
        step: the slot, or None.
        first: the row at which a chunk begins, counted from the slot's first row.
        only_products: True to leave out everything but matrix products, for measurements.
    """

    stages = False  # gather casts directly: rows need no second buffer
    gathers = False  # the loss reads targets and weights in place

    def __init__(self, device: CudaDevice):
        self.device, self.xp = device, device.xp
        self.gain: Array | None = None
        self.control: Array | None = None
        self.step: Array | None = None
        self.first = 0
        self.only_products = False
        self._scratch: Mapping[str, Array] = {}
        self._rehearsing = False

    # -- memory --

    def empty(self, nbytes: int) -> Array:
        """Return `nbytes` of uninitialised memory, as a 1-D uint8 array."""
        return self.device.empty(nbytes)

    def scratch(self, chunk: ChunkShape) -> list[Buffer]:
        """Return the arrays that this backend needs for a chunk in addition, for the plan."""
        rows, sizes, wide = chunk.rows, chunk.sizes, accumulator(chunk.dtype)
        itemsizes = (np.dtype(storage(chunk.dtype)).itemsize, np.dtype(wide).itemsize)
        learned = {
            n
            for n, σ in zip(sizes, chunk.activations, strict=True)
            if σ is not None and σ.a is not None and σ.a.size > 1
        }
        numbers, counters = grids.partial_sums(
            rows, sizes[1:], itemsizes, self.device.multiprocessors, learned
        )
        buffers = [
            Buffer("partial sums", (numbers,), wide, "of db and J, one per block"),
            Buffer("counters", (counters,), "uint32", "of blocks that have finished"),
            Buffer("product workspace", (self.device.product_workspace,), "uint8", "of cuBLASLt"),
        ]
        if chunk.objective.loss.columns:
            why = "class weights or pos_weight of the loss"
            buffers.append(Buffer("column weights", (sizes[-1],), wide, why))
        return buffers

    def use(self, scratch: Mapping[str, Array]) -> None:
        """Use these arrays, as listed by `scratch`, instead of allocating at each call."""
        self._scratch = scratch
        if "counters" in scratch:
            scratch["counters"][...] = 0

    def partials(self, numbers: int, counters: int, dtype: Any) -> tuple[Array, Array]:
        """Return scratch for sums over blocks, and counters that kernels expect and leave at 0."""
        if "partial sums" in self._scratch:
            partials, counted = self._scratch["partial sums"], self._scratch["counters"]
            assert numbers <= partials.size, "the plan's scratch is too small"
            assert counters <= counted.size, "the plan's scratch is too small"
            return partials, counted
        return self.xp.empty(max(1, numbers), dtype), self.xp.zeros(counters, self.xp.uint32)

    # -- launches --

    def record(self, run: Callable[[], None]) -> Recording:
        """Record the operations that `run` calls, after a rehearsal that compiles and times."""
        self._rehearsing = True
        try:
            run()
        finally:
            self._rehearsing = False
        return self.device.record(run)

    def launch(self, code: str, name: str, launch: Launch, *arguments: object) -> None:
        """Launch the instance `name` of a kernel's source; during a rehearsal only compile it."""
        kernel = self.device.kernel(code, name)
        if not self._rehearsing and not self.only_products:
            self.device.launch(kernel, launch, arguments)

    def _tiles(self, like: Array, *arrays: Array) -> grids.Tiled:
        """Return the launch over a matrix with a vector width that all these arrays allow."""
        m, n = like.shape
        together = alignment(*(self.device.address(array) for array in arrays))
        vector = grids.vector_width(n, like.dtype.itemsize, together)
        return grids.tiles(m, n, vector, self.device.multiprocessors)
