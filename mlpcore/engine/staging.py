"""Rows that lie on the host, on their way to a CUDA device: gathered into page-locked memory,
copied beside the computation.

There are two of everything: while a step works on one half, the next rows are gathered and copied
into the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlpcore.backends.cuda.device import Device, Mark
from mlpcore.core.layout import Layout
from mlpcore.core.ops import Array, Buffer
from mlpcore.data.batches import Inputs

NAMES = ("X", "Y", "w")


def staging_buffers(layout: Layout, inputs: Inputs, rows: int) -> list[Buffer]:
    """Device memory for two times `rows` rows of the inputs as they are given; the host holds as
    much.
    """
    shapes = {
        "X": (rows, layout.sizes[0]),
        "Y": (rows,) if inputs.classes else (rows, layout.sizes[-1]),
        "w": (rows,),
    }
    dtypes = {"X": inputs.x_dtype, "Y": inputs.y_dtype, "w": inputs.w_dtype}
    return [
        Buffer(
            f"{name} staged {half}", shapes[name], dtypes[name], "rows on their way from the host"
        )
        for half in (1, 2)
        for name in NAMES
        if dtypes[name]
    ]


class Staging:
    """Two halves of device memory for rows, each with its counterpart on the host.

    Args:
        device: where they go.
        arrays: as `staging_buffers` lists them.

    Attributes:
        halves: the device arrays for X, Y and row weights (or None), half by half.
    """

    def __init__(self, device: Device, arrays: Mapping[str, Array]):
        self.device = device
        self.halves: list[list[Array | None]] = [
            [arrays.get(f"{name} staged {half}") for name in NAMES] for half in (1, 2)
        ]
        self.host = [
            [None if x is None else self._counterpart(x) for x in half] for half in self.halves
        ]
        self.copied: list[Mark] = [None, None]  # when a half's rows have left the host
        born = device.mark()  # what had this memory before may still be at work
        self.free: list[Mark] = [born, born]  # when the work on a half is done
        self.half = 1
        self._placed: list[dict[int, list[Array | None]]] = [
            {},
            {},
        ]  # the first rows of a half, made once

    def _counterpart(self, array: Array) -> np.ndarray:
        nbytes = array.size * array.dtype.itemsize
        counterpart: np.ndarray = (
            self.device.host_buffer(nbytes)[:nbytes].view(array.dtype).reshape(array.shape)
        )
        return counterpart

    def __del__(self) -> None:
        for mark in (
            self.copied
        ):  # copies under way read page-locked memory that is somebody else's afterwards
            if mark is not None:
                self.device.synchronize(mark)

    def put(
        self, sources: Sequence[Array | None], rows: Array | None, start: int, stop: int
    ) -> list[Array | None]:
        """Rows start … stop of a batch (`rows` of the sources, or all) on the device, for the
        current stream's next work.
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
        """The work on the rows that were put last has been asked for."""
        self.free[self.half] = self.device.mark()
