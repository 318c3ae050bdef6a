"""Checks and layout of a user's X, Y and row weights.

X, Y, weights → as_data → Data → take_batch → Batch            a step
                open_rows → Data, scanned once, or Stream      fit, evaluate
a stream's rows → load_piece → Data
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import arrays
from mlpcore.checks.errors import named
from mlpcore.core.losses import Loss
from mlpcore.core.ops import Buffer
from mlpcore.core.targets import RowWeights, row_weights
from mlpcore.data.batches import Batch, Data, Inputs, Receiver, weight_of
from mlpcore.data.open import open_stream
from mlpcore.data.parquet import Parquet
from mlpcore.data.streams import Stream

Array = NDArray[Any]
RANGES: dict[str, tuple[float, float]] = {  # allowed range of targets, by loss
    "binary_cross_entropy": (0, 1),
    "poisson": (0, math.inf),
}


def _are_plain(*values: Any) -> bool:
    """Return True for numeric NumPy arrays, not 0-d, whose rows can be read in place."""
    for value in values:
        if type(value) is not np.ndarray or value.dtype.char not in arrays.PLAIN or not value.ndim:
            return False
        if not (value.dtype.isnative and value.flags.c_contiguous and value.flags.aligned):
            return False
    return True


class Intake:
    """The checks and the layout of the arrays that one network is trained on.

    Args:
        device: device of the network.
        sizes: widths n_0 … n_L.
        dtype: dtype of the parameters.
        loss: the loss, which decides which targets are valid.
    """

    def __init__(self, device: str, sizes: Sequence[int], dtype: np.dtype[Any], loss: Loss):
        self.device, self.dtype, self.loss = device, dtype, loss
        self.columns, self.outputs = sizes[0], sizes[-1]
        self.receiver = Receiver(self.columns, self.outputs, dtype.name, device, loss)
        self.takes_classes = loss.takes_classes
        self.on_host = device == "cpu"
        self._adopt = devices.find(device).adopt
        self._plain = self.on_host and loss.class_weight is None  # plain arrays need no copy

    # -- arrays in memory --

    def as_data(self, X: Any, Y: Any = None, weights: Any = None) -> Data:
        """Return the arrays, checked by shape, dtype and class, in a layout that steps can read.

        Args:
            X: (m, n_0) numbers, or `Data`, which is returned unchanged.
            Y: (m, n_L) targets, (m,) class indices, or (m,) if there is one output.
            weights: (m,) row weights, or None.

        Raises:
            TypeError, ValueError: invalid argument; the message says what was expected.
        """
        if isinstance(X, Data):
            return self._require_own(X, Y, weights)
        given = (X, Y) if weights is None else (X, Y, weights)
        if self._plain and _are_plain(*given):  # the fast path
            flat = Y.ndim == 1 and not self.takes_classes
            classes = Y.ndim == 1 and self.takes_classes and Y.dtype.kind in "iu"
            y = Y[:, None] if flat and self.outputs == 1 else Y
            form = (len(X),) if classes else (len(X), self.outputs)
            if X.shape == (len(X), self.columns) and X.size and y.shape == form:
                if classes:
                    arrays.require_classes(y, self.outputs)
                w = None if weights is None else arrays.weights(weights, len(X))
                w_dtype = "" if w is None else w.dtype.str
                inputs = Inputs(X.dtype.str, y.dtype.str, w_dtype, classes)
                return Data(X, y, w, inputs, w, self.receiver, flat)
        return self._check(X, Y, weights)

    def _require_own(self, data: Data, Y: ArrayLike | None, weights: ArrayLike | None) -> Data:
        """Return the prepared data; raise an error if they are not for this trainer's loss."""
        if Y is not None or weights is not None:
            raise TypeError(
                "Y and sample_weight must be left out if X is the result of prepare: it contains "
                "them"
            )
        if data.by_class != self.loss.class_weight:
            raise ValueError(
                f"X was prepared by a trainer with class_weight={data.by_class}; this one has "
                f"{self.loss.class_weight}"
            )
        if data.receiver != self.receiver:
            raise ValueError(
                f"X was prepared by a trainer with {data.receiver}; this one has {self.receiver}"
            )
        return data

    def _check(self, X: ArrayLike, Y: ArrayLike | None, weights: ArrayLike | None) -> Data:
        """Return arrays of any library and layout as `Data`; see `as_data`."""
        adopt = self._adopt
        x = arrays.matrix(X, self.columns, adopt=adopt)
        given = arrays.numeric(Y, "Y", adopt)
        y, classes = arrays.target(given, len(x), self.outputs, self.loss, adopt=adopt)
        w = arrays.weights(weights, len(x), adopt=adopt)
        staged = not self.on_host and not devices.open_device(self.device).holds(x)
        y, w = self._to_layout(y, staged), None if w is None else self._to_layout(w, staged)
        lazy = self.on_host and self.loss.class_weight is not None
        by_class: Any = (
            RowWeights(self.loss, y, w, self.dtype) if lazy else self._weigh_classes(y, w)
        )
        if by_class is not None and (lazy or arrays.on_host(by_class)) and not by_class.any():
            raise ValueError("sample_weight, times class_weight, must not be all zero")
        return Data.of(
            self._to_layout(x, staged),
            y,
            w,
            classes,
            staged,
            by_class,
            self.receiver,
            flat=not classes and given.ndim == 1,
        )

    def validate(self, X: ArrayLike | Data, Y: ArrayLike | None, weights: ArrayLike | None) -> Data:
        """Return the arrays as `as_data` does, after a scan of all their values.

        Raises:
            ValueError: X or Y is NaN or infinite in the network's dtype, or a target is outside the
                loss's range; names the row.
        """
        data = self.as_data(X, Y, weights)
        if data is not X:
            self.require_finite(data)
            self._require_range(data.Y, data.inputs.classes)
        return data

    def require_finite(self, data: Data) -> None:
        """Raise a ValueError if a number is not finite in the network's dtype; name the first."""
        arrays.require_finite(data.X, "X", self.dtype)
        arrays.require_finite(data.Y, "Y", self.dtype)

    def copy_rows(
        self, X: ArrayLike | Data, Y: ArrayLike | None, weights: ArrayLike | None
    ) -> Data:
        """Return the arrays as `validate` does, with strided ones copied to row-major order."""
        data = self.validate(X, Y, weights)
        copies: dict[str, Any] = {
            name: np.array(x, dtype, order="C") for name, (x, dtype) in data.strided().items()
        }
        return with_all_weights(data._replace(**copies))

    def take_batch(self, data: Data, rows: ArrayLike | None) -> Batch:
        """Return these rows of the data, or all of them for None, as a batch.

        Raises:
            TypeError, ValueError: `rows` are not row numbers, or their weights are all zero.
        """
        if rows is None:
            return Batch(data.X, data.Y, data.weights, None, len(data.X))
        index = arrays.row_index(rows, len(data.X), adopt=self._adopt)
        batch = data.batch(self._to_layout(index, data.inputs.host))
        known = isinstance(batch.weights, np.ndarray | RowWeights)
        if known and weight_of(batch) == 0:
            by_class = "" if self.loss.class_weight is None else ", times class_weight,"
            raise ValueError(
                f"sample_weight{by_class} must not be all zero on the rows of the batch"
            )
        return batch

    def as_gradient(self, gradient: object, size: int) -> Array:
        """Return a user's flat gradient, of `size` entries, on the network's device."""
        array = arrays.numeric(gradient, "gradient", self._adopt)
        if array.shape != (size,):
            raise ValueError(
                f"gradient must be laid out as net.parameters, ({size},); got {array.shape}"
            )
        placed: Array = devices.find(self.device).to_device(array)
        return placed

    def _to_layout(self, array: Any, staged: bool) -> Array:
        """Return the array on the device of X (the host if staged), ready for gathering rows."""
        if staged:
            on_host = arrays.on_host(array)
            return arrays.by_rows(array if on_host else devices.find(self.device).to_host(array))
        return arrays.by_rows(devices.find(self.device).to_device(array))

    def _weigh_classes(
        self, Y: Array, weights: Array | None, place: Array | None = None
    ) -> Array | None:
        """Return row weights times class weights; None without class weights.

        They are written to the first entries of `place`, if it is given.
        """
        if self.loss.class_weight is None:
            return None
        xp = np if arrays.on_host(Y) else devices.find(self.device).xp
        found: Array = xp.empty(len(Y), self.dtype) if place is None else place[: len(Y)]
        row_weights(self.loss, Y, weights, found, xp)
        return found

    def weight_buffers(self, rows: int) -> list[Buffer]:
        """Return the plan's buffer for weights that depend on the class, as a list; or []."""
        if not rows or self.loss.class_weight is None:
            return []
        what = "by class, times sample_weight"
        return [Buffer("row weights", (rows,), self.dtype.name, what)]

    # -- rows that may be read block by block --

    def open_rows(self, X: Any, Y: Any = None, weights: Any = None) -> Data | Stream:
        """Return arrays in memory as `validate` does; return rows read as needed as a stream.

        Raises:
            TypeError, ValueError: invalid argument; the message says what was expected.
        """
        stream = None if isinstance(X, Data) else open_stream(X, Y, weights, self.dtype)
        if stream is None:
            return self.validate(X, Y, weights)
        if stream.columns not in (None, self.columns):
            raise ValueError(f"X has {stream.columns} columns; the network takes {self.columns}")
        if stream.like is not None and stream.rows is not None:
            Y = stream.like[1]
            Y = np.broadcast_to(np.zeros((), Y.dtype), (stream.rows, *Y.shape[1:]))
            arrays.target_form(Y, stream.rows, self.outputs, self.loss)
        stream.require_targets = self._require_targets
        return stream

    def open_validation(self, validation: Any) -> Data | Stream | None:
        """Return the rows of `fit(validation=…)`, opened as `open_rows` does; None for None."""
        if validation is None:
            return None
        alone = isinstance(validation, Parquet) or callable(validation)
        parts = (validation,) if alone else validation
        if not isinstance(parts, list | tuple) or not (alone or len(parts) in (2, 3)):
            raise TypeError(
                "validation must be (X, Y), (X, Y, sample_weight), mc.Parquet(…) or a function "
                "that returns batches"
            )
        try:
            return self.open_rows(*parts)
        except (TypeError, ValueError) as error:
            raise named("validation", error) from None

    def load_piece(
        self, X: Array, Y: Array, weights: Array | None, place: Array | None = None
    ) -> Data:
        """Return a piece of a stream, whose values are checked already, laid out for the steps.

        Args:
            X, Y, weights: the rows; the weights may be all zero.
            place: array for the weights of the rows, if they depend on the class.
        """
        staged = not self.on_host
        x = arrays.matrix(X, self.columns)
        y, classes = arrays.target_form(Y, len(x), self.outputs, self.loss)
        w = None
        if weights is not None:
            w = self._to_layout(arrays.numeric(weights, "sample_weight"), staged)
        y = self._to_layout(y, staged)
        return Data.of(
            self._to_layout(x, staged),
            y,
            w,
            classes,
            staged,
            self._weigh_classes(y, w, place),
            self.receiver,
            flat=not classes and Y.ndim == 1,
        )

    def _require_targets(self, Y: Array, name: str, first: int) -> None:
        """Raise an error if the loss refuses a stream's targets; the first has number `first`."""
        y, classes = arrays.target_form(Y, len(Y), self.outputs, self.loss, name)
        self._require_range(y, classes, name, first)

    def _require_range(self, Y: Array, classes: bool, name: str = "Y", first: int = 0) -> None:
        """Raise a ValueError that names the first row whose target is outside the loss's range."""
        if classes:
            arrays.require_classes(Y, self.outputs, name, first)
        elif self.takes_classes:
            arrays.require_distribution(Y, name, first)
        low, high = RANGES.get(self.loss.name, (-math.inf, math.inf))
        arrays.require_range(Y, low, high, f"{name}: {self.loss.name}", first)


def with_all_weights(data: Data) -> Data:
    """Return the data with lazy weights replaced by an array of the weights of all rows."""
    return data._replace(weights=data.weights[:]) if isinstance(data.weights, RowWeights) else data
