"""Staging of rows from the host to a CUDA device, copied while a step computes.

The rows are gathered into page-locked memory. Everything exists twice: while a step works on one
half, the next rows are gathered and copied into the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlpcore.backends.cuda.device import CudaDevice, Mark
from mlpcore.core.layout import Layout
from mlpcore.core.ops import Array, Buffer
from mlpcore.data.batches import Inputs

NAMES = ("X", "Y", "w")


def staging_buffers(layout: Layout, inputs: Inputs, rows: int) -> list[Buffer]:
    """List device memory for twice `rows` rows of the inputs; the host holds as much."""
    shapes = {
        "X": (rows, layout.sizes[0]),
        "Y": (rows,) if inputs.classes else (rows, layout.sizes[-1]),
        "w": (rows,),
    }
    dtypes = {"X": inputs.x_dtype, "Y": inputs.y_dtype, "w": inputs.w_dtype}
    return [
        Buffer(f"{name} staged {half}", shapes[name], dtypes[name], "rows staged from the host")
        for half in (1, 2)
        for name in NAMES
        if dtypes[name]
    ]


class Staging:
    """Two halves of device memory for rows, each with its counterpart on the host.

    Args:
        device: destination of the rows.
        arrays: the arrays listed by `staging_buffers`.

    Attributes:
        halves: the device arrays for X, Y and row weights (or None), by half.
        host: their counterparts on the host.
        copied: marks that each half's rows have left the host.
        free: marks that the work on each half is done.
        half: the half that was filled last.
    """

    def __init__(self, device: CudaDevice, arrays: Mapping[str, Array]):
        self.device = device
        self.halves: list[list[Array | None]] = [
            [arrays.get(f"{name} staged {half}") for name in NAMES] for half in (1, 2)
        ]
        self.host = [
            [None if x is None else self._counterpart(x) for x in half] for half in self.halves
        ]
        self.copied: list[Mark] = [None, None]
        born = device.mark()  # earlier users of this memory may still be at work
        self.free: list[Mark] = [born, born]
        self.half = 1
        # the first rows of each half, created once
        self._placed: list[dict[int, list[Array | None]]] = [{}, {}]

    def _counterpart(self, array: Array) -> np.ndarray:
        nbytes = array.size * array.dtype.itemsize
        counterpart: np.ndarray = (
            self.device.host_buffer(nbytes)[:nbytes].view(array.dtype).reshape(array.shape)
        )
        return counterpart

    def __del__(self) -> None:
        # running copies read page-locked memory that is reused afterwards
        for mark in self.copied:
            if mark is not None:
                self.device.synchronize(mark)

    def put(
        self, sources: Sequence[Array | None], rows: Array | None, start: int, stop: int
    ) -> list[Array | None]:
        """Return rows start … stop of a batch on the device, for the current stream's next work.

        Args:
            sources: X, Y, and row weights or None.
            rows: row numbers of the batch in the sources; None for all in order.
            start, stop: the part of the batch.
        """
        self.half = half = 1 - self.half
        n = stop - start
        if n not in self._placed[half]:
            self._placed[half] = {
                n: [None if there is None else there[:n] for there in self.halves[half]]
            }
        placed = self._placed[half][n]
        if self.copied[half] is not None:
            self.device.synchronize(self.copied[half])
        mark = self.free[half]
        for source, host, there in zip(sources, self.host[half], placed, strict=True):
            if source is None or host is None or there is None:
                continue
            if rows is None:
                host[:n] = source[start:stop]
            else:
                np.take(source, rows[start:stop], axis=0, out=host[:n], mode="clip")
            mark = self.device.upload(host[:n], there, mark)
        self.copied[half] = mark
        self.device.wait(mark)
        return placed

    def done(self) -> None:
        """Note that all work on the last rows has been submitted."""
        self.free[self.half] = self.device.mark()
