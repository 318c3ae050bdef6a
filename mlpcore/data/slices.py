"""Arrays that are read by slicing rows: mapped files, Zarr, HDF5, NumPy."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks import arrays
from mlpcore.data.streams import NAMES, Block
from mlpcore.data.windows import Source

Array = NDArray[Any]

AROUND = 64 << 10  # bytes that the kernel may map around a fault
_AXES = {"X": (2,), "Y": (1, 2), "sample_weight": (1,)}
_IN_MEMORY = (
    "__array_interface__",
    "__cuda_array_interface__",
    "__dlpack__",
    "__arrow_c_stream__",
    "to_numpy",
    "toarray",
)


class Slices(Source):
    """A source of arrays that are sliced by rows; X, Y and weights may differ in kind."""

    def __init__(self, X: Any, Y: Any, sample_weight: Any):
        self._arrays = Block(
            X,
            Y if in_file(Y) else on_host(Y, "Y"),
            sample_weight
            if sample_weight is None or in_file(sample_weight)
            else on_host(sample_weight, "sample_weight"),
        )
        for name, array in zip(NAMES, self._arrays, strict=True):
            if array is not None:
                require_form(name, array.shape, array.dtype, None if name == "X" else X.shape[0])
        self.like = self._arrays.each(
            lambda x: np.empty((0, *x.shape[1:]), np.dtype(x.dtype).newbyteorder("="))
        )
        self.rows = int(X.shape[0])
        self._maps = [MappedFile.of(array) for array in self._arrays]
        chunks = getattr(X, "chunks", None)  # Dask's are tuples
        if isinstance(chunks, tuple) and isinstance(chunks[0], int):
            self.chunk = chunks[0]
        self.starts = range(0, self.rows, self.chunk)

    def reader(self) -> Callable[[int, int, Block], None]:
        """Return the method that slices; it has no state."""
        return self._read

    def _read(self, start: int, stop: int, block: Block) -> None:
        for name, array, mapping, part in zip(NAMES, self._arrays, self._maps, block, strict=True):
            if part is None or array is None:
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
    """The mapped file that holds an array's memory."""

    def __init__(self, pages: mmap.mmap):
        self._pages = pages
        self._address: int = np.frombuffer(pages, np.uint8).__array_interface__["data"][0]

    @classmethod
    def of(cls, array: Any) -> MappedFile | None:
        """Return the mapped file of a memmap or a view of one; None if pages cannot be released."""
        mapped = _memmap(array)
        # with mode "c", the pages are the only copy of what was written
        if mapped is None or mapped.mode == "c" or not hasattr(mmap.mmap, "madvise"):
            return None
        return cls(mapped.base)  # type: ignore[arg-type]

    def give_back(self, rows: Array) -> None:
        """Release the pages of these rows from the process; the system may keep them cached."""
        low, high = (end - self._address for end in np.lib.array_utils.byte_bounds(rows))
        start = max(0, low - AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        self._pages.madvise(mmap.MADV_DONTNEED, start, high + AROUND - start)


def _memmap(array: Any) -> np.memmap[Any, Any] | None:
    """Return the memmap that an array is or is a view of; None if there is none."""
    ma = sys.modules.get("numpy.ma")  # already imported if there are masked arrays
    while isinstance(array, np.ndarray) and not (ma and isinstance(array, ma.MaskedArray)):
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):
            return array
        array = array.base
    return None


def in_memory(value: Any) -> bool:
    """Return True for an array in memory, of any library."""
    return isinstance(value, np.ndarray | memoryview) or any(
        hasattr(type(value), name) for name in _IN_MEMORY
    )


def in_file(value: Any) -> bool:
    """Return True for data outside memory that is sliced by rows: memmaps, Zarr, h5py."""
    if isinstance(value, type) or in_memory(value):
        return _memmap(value) is not None
    described = (
        isinstance(getattr(value, "shape", None), tuple)
        and getattr(value, "dtype", None) is not None
    )
    return described and hasattr(value, "__getitem__")


def on_host(value: Any, name: str) -> Array:
    """Return an argument as a host array; raise a TypeError for GPU arrays or masked entries."""
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(
            f"{name} is on a GPU; rows that are read block by block must be on the host"
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
    """Raise an error if an argument cannot be X, Y or sample_weight with `rows` rows."""
    if np.dtype(dtype).kind not in "fiub":
        raise TypeError(f"{prefix}{name} must hold real numbers; its dtype is {dtype}")
    if len(shape) not in _AXES[name]:
        raise ValueError(
            f"{prefix}{name} must have {' or '.join(map(str, _AXES[name]))} axes; it has shape "
            f"{tuple(shape)}"
        )
    # Dask's is NaN before its chunks are computed
    if not all(isinstance(n, int | np.integer) for n in shape):
        raise ValueError(f"{prefix}{name} must have a known shape; it has {tuple(shape)}")
    if 0 in shape:
        raise ValueError(f"{prefix}{name} is empty: shape {tuple(shape)}")
    if rows is not None and shape[0] != rows:
        raise ValueError(f"{prefix}{name} has {shape[0]} rows; X has {rows}")
