"""Arrays that are sliced by rows: mapped files, Zarr, HDF5, NumPy."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks import arrays
from mlpcore.data.streams import NAMES, Slot

Array = NDArray[Any]

AROUND = 64 << 10  # bytes that the kernel maps at a time
_AXES = {"X": (2,), "Y": (1, 2), "sample_weight": (1,)}
_IN_MEMORY = (
    "__array_interface__",
    "__cuda_array_interface__",
    "__dlpack__",
    "__arrow_c_stream__",
    "to_numpy",
    "toarray",
)


class Slices:
    """Arrays that are sliced by rows, each of a kind of its own: mapped files, Zarr, HDF5, NumPy."""

    def __init__(self, X: Any, Y: Any, sample_weight: Any):
        self._arrays: list[Any] = [X]
        for name, value in (("Y", Y), ("sample_weight", sample_weight)):
            self._arrays.append(value if value is None or in_file(value) else on_host(value, name))
        self.like: Slot = []
        for name, array in zip(NAMES, self._arrays, strict=True):
            if array is not None:
                require_form(name, array.shape, array.dtype, None if name == "X" else X.shape[0])
            dtype = None if array is None else np.dtype(array.dtype).newbyteorder("=")
            self.like.append(None if array is None else np.empty((0, *array.shape[1:]), dtype))
        self.rows = int(X.shape[0])
        self._maps = [MappedFile.of(array) for array in self._arrays]
        chunks = getattr(X, "chunks", None)
        self.chunk = (
            chunks[0] if isinstance(chunks, tuple) and isinstance(chunks[0], int) else 1
        )  # Dask's are tuples
        self.starts = range(0, self.rows, self.chunk)

    def reader(self) -> Callable[[int, int, Slot], None]:
        """They are read without a state."""
        return self._read

    def _read(self, start: int, stop: int, parts: Slot) -> None:
        for name, array, mapping, part in zip(NAMES, self._arrays, self._maps, parts, strict=True):
            if part is None:
                continue
            rows = np.asarray(array[start:stop])
            if rows.shape != part.shape:
                raise ValueError(
                    f"{name}[{start}:{stop}] must have shape {part.shape}; it has {rows.shape}"
                )
            part[...] = rows
            if mapping is not None:
                mapping.give_back(rows)


class MappedFile:
    """The mapped file behind an array."""

    def __init__(self, pages: mmap.mmap):
        self._pages = pages
        self._address: int = np.frombuffer(pages, np.uint8).__array_interface__["data"][0]

    @classmethod
    def of(cls, array: Any) -> MappedFile | None:
        """That of a memmap or of a view of one, where its pages can be given back; None otherwise."""
        mapped = _memmap(array)
        if (
            mapped is None or mapped.mode == "c" or not hasattr(mmap.mmap, "madvise")
        ):  # "c": what was written is nowhere else
            return None
        return cls(mapped.base)  # type: ignore[arg-type]

    def give_back(self, rows: Array) -> None:
        """Take the pages of these rows out of the process's memory; the system keeps them cached as
        long as it has room.
        """
        low, high = (end - self._address for end in np.lib.array_utils.byte_bounds(rows))
        start = max(0, low - AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        self._pages.madvise(mmap.MADV_DONTNEED, start, high + AROUND - start)


def _memmap(array: Any) -> np.memmap[Any, Any] | None:
    """The memmap that an array is, or is a view of."""
    ma = sys.modules.get("numpy.ma")  # imported by whoever holds a masked array
    while isinstance(array, np.ndarray) and not (ma and isinstance(array, ma.MaskedArray)):
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):
            return array
        array = array.base
    return None


def in_memory(value: Any) -> bool:
    """Return True for an array in memory, of whatever library."""
    return isinstance(value, np.ndarray | memoryview) or any(
        hasattr(type(value), name) for name in _IN_MEMORY
    )


def in_file(value: Any) -> bool:
    """Whether it is sliced by rows and not in memory as a whole: a memmap or a view of one, Zarr,
    h5py.
    """
    if isinstance(value, type) or in_memory(value):
        return _memmap(value) is not None
    described = (
        isinstance(getattr(value, "shape", None), tuple)
        and getattr(value, "dtype", None) is not None
    )
    return described and hasattr(value, "__getitem__")


def on_host(value: Any, name: str) -> Array:
    """Return an argument as an array on the host; TypeError for one on a GPU or with masked entries."""
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(
            f"{name} lies on a GPU; rows that are read block by block must lie on the host"
        )
    if np.ma.is_masked(value):
        raise TypeError(
            f"{name} is a masked array with masked entries; fill them first, e.g. with "
            f"{name}.filled(0)"
        )
    return arrays.host_array(value, name)


def require_form(
    name: str, shape: tuple[int, ...], dtype: Any, rows: int | None, prefix: str = ""
) -> None:
    """Raise a TypeError or ValueError where an argument cannot be X, Y or sample_weight beside an X
    of `rows` rows.
    """
    if np.dtype(dtype).kind not in "fiub":
        raise TypeError(f"{prefix}{name} must hold real numbers; its dtype is {dtype}")
    if len(shape) not in _AXES[name]:
        raise ValueError(
            f"{prefix}{name} must have {' or '.join(map(str, _AXES[name]))} axes; it has shape "
            f"{tuple(shape)}"
        )
    if not all(
        isinstance(n, int | np.integer) for n in shape
    ):  # Dask's, before its chunks are computed
        raise ValueError(f"{prefix}{name} must know its size; it has shape {tuple(shape)}")
    if 0 in shape:
        raise ValueError(f"{prefix}{name} is empty: shape {tuple(shape)}")
    if rows is not None and shape[0] != rows:
        raise ValueError(f"{prefix}{name} has {shape[0]} rows; X has {rows}")
