"""Batches from a user's iterable or function, in their own order."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mlpcore.core.ops import Buffer
from mlpcore.data.slices import on_host, require_form
from mlpcore.data.streams import NAMES, Block, Piece, Pieces, Stream

Array = NDArray[Any]
Place = list[Array | None]  # copies of X, Y and row weights, reused if large enough


class BatchStream(Stream):
    """A stream of ready-made batches `(X, Y)` or `(X, Y, sample_weight)`, in their own order.

    The reader thread copies them, so that the source may reuse its arrays. Two copies are held,
    outside the memory plan.
    """

    def __init__(self, source: Any, dtype: DTypeLike = np.float64):
        super().__init__(dtype)
        self._source = source
        self._count = _length(source)
        self._weighted: bool | None = None  # True if batches have row weights
        self._takes_epoch = not hasattr(source, "__iter__") and _takes_epoch(source)
        if isinstance(source, list | tuple):
            given = [self._check(batch, number) for number, batch in enumerate(source)]
            if not given:
                raise ValueError("X is empty: a list of batches needs at least one")
            self.rows = sum(len(batch.X) for batch in given)
            self.like = given[0].rows(0, 0)

    def batches(self, batch_size: int) -> int | None:
        """Return the source's number of batches, whatever their size; None until it is known."""
        return self._count

    def buffers(self, batch_size: int, limit: int | None = None) -> list[Buffer]:
        """Return []: the source chooses the size of its batches."""
        return []

    def epoch(
        self,
        batch_size: int,
        order: np.random.Generator | None,
        skip: int,
        arrays: Mapping[str, Array],
    ) -> Pieces:
        """Return the source's batches, one per piece, whatever `batch_size` and `order`.

        Skipped batches are produced but not checked.
        """
        number, rows = self.epochs, 0
        self.epochs += 1
        batches: Iterator[tuple[int, Any]] | None = None

        def fill(place: Place) -> Piece | None:
            nonlocal batches, rows
            if batches is None:
                batches = itertools.islice(enumerate(self._begin(number)), skip, None)
            at, batch = next(batches, (-1, None))
            if at < 0:
                if not rows and not skip:
                    raise ValueError(
                        f"X gave no batches in epoch {number}; it must start over in each epoch"
                    )
                if not skip:
                    self.rows = rows
                return None
            given = self._check(batch, at)
            self.require_values(given, f"batch {at}: ")
            X, Y, weights = (_copy_into(place, i, x) for i, x in enumerate(given))
            rows += len(X)
            self._count = max(self._count or 0, at + 1)
            return Piece(X, Y, weights, [None])

        places: list[Place] = [[None] * 3, [None] * 3]
        return self._ahead(fill, places, threading.Event())

    def _begin(self, number: int) -> Iterator[Any]:
        """Return an iterator of the batches of an epoch, from the first one on."""
        source = self._source
        if hasattr(source, "__iter__"):
            return iter(source)
        batches = source(epoch=number) if self._takes_epoch else source()
        if not hasattr(batches, "__iter__"):
            raise TypeError(
                "X() must return an iterator of batches (X, Y); it returned "
                f"{type(batches).__name__}"
            )
        return iter(batches)

    def _check(self, batch: Any, number: int) -> Block:
        """Return a batch as arrays on the host; raise an error if it is not valid."""
        prefix = f"batch {number}: "
        if not isinstance(batch, list | tuple) or len(batch) not in (2, 3):
            raise TypeError(
                f"{prefix}must be (X, Y) or (X, Y, sample_weight); got {type(batch).__name__}"
            )
        X, Y, w = (*batch, None)[:3]
        block = Block(
            on_host(X, prefix + "X"),
            on_host(Y, prefix + "Y"),
            None if w is None else on_host(w, prefix + "sample_weight"),
        )
        for name, array in zip(NAMES, block, strict=True):
            if array is not None:
                rows = None if name == "X" else block.X.shape[0]
                require_form(name, array.shape, array.dtype, rows, prefix)
        self._weighted = w is not None if self._weighted is None else self._weighted
        if self._weighted != (w is not None):
            found, before = ("has no", "have one") if w is None else ("has a", "have none")
            raise TypeError(f"{prefix}{found} sample_weight; earlier ones {before}")
        columns = block.X.shape[1]
        self.columns = columns if self.columns is None else self.columns
        if columns != self.columns:
            raise ValueError(f"{prefix}X has {columns} columns; earlier ones have {self.columns}")
        return block


def _length(source: Any) -> int | None:
    """Return the number of batches by the source's `len`; None if it has none."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def _takes_epoch(function: Callable[..., Any]) -> bool:
    """Return True if a function takes `epoch`; raise a TypeError if it needs anything else."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C
        return False
    takes = "epoch" in signature.parameters
    try:
        signature.bind(**({"epoch": 0} if takes else {}))
    except TypeError:
        raise TypeError(
            "X, a function that makes batches, must take no argument or `epoch`; its parameters "
            f"are {signature}"
        ) from None
    return takes


def _copy_into(place: Place, i: int, array: Array | None) -> Any:
    """Return a copy of the array, in the place's memory if it fits."""
    if array is None:
        return None
    old, dtype = place[i], array.dtype.newbyteorder("=")
    fits = old is not None and old.dtype == dtype and old.shape[1:] == array.shape[1:]
    if old is None or not fits or len(old) < len(array):
        place[i] = old = np.empty(array.shape, dtype)
    old[: len(array)] = array
    return old[: len(array)]
