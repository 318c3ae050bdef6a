"""Checked arrays, their batches, and the properties that a memory plan depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlpcore.checks.arrays import Strided
from mlpcore.core.losses import Loss
from mlpcore.core.ops import Array


class Inputs(NamedTuple):
    """The properties of the caller's arrays that a memory plan depends on.

    Attributes:
        x_dtype, y_dtype, w_dtype: the arrays' dtypes, as NumPy strings; w_dtype is "" without row
            weights.
        classes: True if Y holds class indices, one per row.
        host: True if the arrays are on the host and must be copied to the training device.
    """

    x_dtype: str
    y_dtype: str
    w_dtype: str = ""
    classes: bool = False
    host: bool = False

    @classmethod
    def read(cls, values: Sequence[Any]) -> Inputs:
        """Return the inputs listed in a file; raise TypeError or ValueError if malformed."""
        found = cls(*values)
        kinds = [
            np.dtype(text).kind if isinstance(text, str) else "?"
            for text in found[:3]
            if text != ""
        ]
        if (
            not {*kinds} <= {*"fiub"}
            or len(kinds) < 2
            or not all(isinstance(flag, bool) for flag in found[3:])
        ):
            raise ValueError(f"malformed description of inputs: {values!r:.100}")
        return found


class Batch(NamedTuple):
    """The rows of one or more updates: all of X, or those listed in `rows`.

    Attributes:
        X, Y: the caller's arrays.
        weights: row weights, or None.
        rows: row numbers of the batch, or None for all rows in order.
        size: number of rows.
        steps: number of updates; `rows` lists this many batches of `size` rows in sequence.
    """

    X: Array
    Y: Array
    weights: Array | None
    rows: Array | None
    size: int
    steps: int = 1

    def single(self, number: int) -> Batch:
        """Return one of the batches, counted from 0."""
        if self.steps == 1:
            return self
        assert self.rows is not None
        return self._replace(rows=self.rows[number * self.size : (number + 1) * self.size], steps=1)


class Receiver(NamedTuple):
    """The network and the loss that data are checked for.

    Attributes:
        columns, outputs: widths n_0 and n_L.
        dtype: dtype of the parameters.
        device: device of the network.
    """

    columns: int
    outputs: int
    dtype: str
    device: str
    loss: Loss

    def __str__(self) -> str:
        ends = f"{self.columns} input(s), {self.outputs} output(s)"
        return f"{ends}, {self.dtype}, {self.device}, {self.loss.name}"


class Data(NamedTuple):
    """Checked arrays, as `Trainer.prepare` returns them and `fit`, `step` and `evaluate` use them.

    Attributes:
        X, Y, weights: as in `Batch`.
        inputs: properties for the plan.
        given: the user's row weights, without class weights, which accuracy ignores.
        receiver: the network and loss that the arrays were checked for; None if `weights` leaves
            out the class weights.
        flat: True if Y, one number per row, was given as (m,).
    """

    X: Array
    Y: Array
    weights: Array | None
    inputs: Inputs
    given: Array | None
    receiver: Receiver | None
    flat: bool = False

    @property
    def by_class(self) -> tuple[float, ...] | None:
        """The class weights that are included in `weights`, or None."""
        return None if self.receiver is None else self.receiver.loss.class_weight

    @classmethod
    def of(
        cls,
        X: Array,
        Y: Array,
        given: Array | None,
        classes: bool,
        staged: bool,
        weights: Array | None = None,
        receiver: Receiver | None = None,
        flat: bool = False,
    ) -> Data:
        """Return the arrays with their inputs.

        Args:
            X, Y: checked and laid out.
            given: the user's row weights, or None.
            classes: True if Y holds class indices.
            staged: True if the arrays are on the host and their rows are copied to the device.
            weights: the effective weights if they depend on the class, or None.
            receiver: the network and loss that the arrays were checked for, or None.
            flat: True if Y was given as (m,).
        """
        weights = given if weights is None else weights
        weight = "" if weights is None else weights.dtype.str
        inputs = Inputs(X.dtype.str, Y.dtype.str, weight, classes, staged)
        found = cls(X, Y, weights, inputs, given, receiver, flat)
        return found._staged() if staged else found

    def _staged(self) -> Data:
        """Return the data with native byte order in `inputs`, as a device needs it."""
        x, y, w = (name and np.dtype(name).newbyteorder("=").str for name in self.inputs[:3])
        return self._replace(inputs=self.inputs._replace(x_dtype=x, y_dtype=y, w_dtype=w))

    def strided(self) -> dict[str, tuple[Array, np.dtype[Any]]]:
        """Return the arrays that are not row-major, by name, each with the dtype for a copy."""
        named = {"X": self.X, "Y": self.Y, "weights": self.weights}
        return {
            name: (array, array.dtype.newbyteorder("=") if self.inputs.host else array.dtype)
            for name, array in named.items()
            if isinstance(array, Strided)
        }

    def batch(self, rows: Array | None, steps: int = 1) -> Batch:
        """Return a batch of these row numbers (None: all rows), for this number of equal steps."""
        size = len(self.X) if rows is None else len(rows)
        return Batch(self.X, self.Y, self.weights, rows, size // steps, steps)


def weight_of(batch: Batch) -> float:
    """Return Σ w over the rows of a batch, or their number if there are no weights."""
    if batch.weights is None:
        return float(batch.size)
    cuts = [slice(i, i + 2048) for i in range(0, batch.size, 2048)]
    pieces = (
        batch.weights[part] if batch.rows is None else batch.weights.take(batch.rows[part])
        for part in cuts
    )
    with np.errstate(over="ignore"):  # an infinite sum is refused later
        return sum(float(w.astype(np.float64).sum()) for w in pieces)
