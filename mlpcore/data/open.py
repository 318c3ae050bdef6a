"""The stream of whatever a user passes as X, Y and row weights."""

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
    """Return the stream of what is read block by block; None for arrays in memory.

    Args:
        X: a memmap or a view of one; an array that is sliced by rows (Zarr, h5py …); `Parquet`;
            with Y None also an iterable of batches that begins anew for each epoch (a list, a
            DataLoader), or a function that returns an iterator of them and may take the number of
            the `epoch`, counted from 0.
        Y, sample_weight: with the first two kinds of X, arrays of such a kind or in memory.
        dtype: number type in which numbers must be finite.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
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
            raise TypeError(f"{name} must be None: X ({type(X).__name__}) brings it along")
    if isinstance(X, Source):
        return RowStream(X, dtype)
    if hasattr(X, "__next__"):
        raise TypeError(
            f"X is a {type(X).__name__}, which would be empty in the second epoch: pass a function "
            "that returns a new one, e.g. the generator function itself"
        )
    return BatchStream(X, dtype)
