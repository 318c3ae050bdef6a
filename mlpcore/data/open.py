"""Choice of the stream that reads a user's X, Y and row weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mlpcore.data.iterables import BatchStream
from mlpcore.data.slices import Slices, in_file, in_memory
from mlpcore.data.streams import Stream
from mlpcore.data.windows import RowStream, Source


def open_stream(
    X: Any, Y: Any = None, sample_weight: Any = None, dtype: DTypeLike = np.float64
) -> Stream | None:
    """Return a stream for data that are read block by block; None for arrays in memory.

    Args:
        X: a memmap or a view of one; an array that is sliced by rows (Zarr, h5py, …); `Parquet`; or
            without Y an iterable of batches that starts over in each epoch (a list, a DataLoader),
            or a function that returns an iterator of batches and may take `epoch`, counted from 0.
        Y, sample_weight: for a memmap or a sliced X, arrays of the same kinds or in memory.
        dtype: dtype in which all numbers must be finite.

    Raises:
        TypeError, ValueError: invalid argument; the message says what was expected.
    """
    if in_file(X):
        if Y is None:
            raise ValueError(f"Y is missing: X ({type(X).__name__}) holds no targets")
        return RowStream(Slices(X, Y, sample_weight), dtype)
    as_array = Y is not None and (isinstance(X, Sequence) or hasattr(X, "__array__"))
    if as_array or in_memory(X) or isinstance(X, str | bytes | Mapping):
        return None
    if not (isinstance(X, Source) or callable(X) or hasattr(X, "__iter__")):
        return None
    for name, value in (("Y", Y), ("sample_weight", sample_weight)):
        if value is not None:
            raise TypeError(f"{name} must be None: X ({type(X).__name__}) provides it")
    if isinstance(X, Source):
        return RowStream(X, dtype)
    if hasattr(X, "__next__"):
        raise TypeError(
            f"X is a {type(X).__name__}, which would be empty in the second epoch: pass a function "
            "that returns a new one, e.g. the generator function itself"
        )
    return BatchStream(X, dtype)
