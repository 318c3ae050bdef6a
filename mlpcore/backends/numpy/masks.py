"""Dropout: the masks of `core.dropout`, drawn and applied in pieces of rows that stay in cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlpcore.backends.numpy.formulas import FormulaOps
from mlpcore.backends.numpy.programs import piece_rows
from mlpcore.core import dropout
from mlpcore.core.ops import Array


class MaskOps(FormulaOps):
    """The part of the operations that drops entries.

    Attributes:
        places: number of the step, and the row of the batch at which the chunk begins; the third
            entry is the address of the row numbers of a `StepLoop`.
    """

    def __init__(self, xp: Any = np):
        super().__init__(xp)
        self.places = np.zeros(3, np.int64)

    @property
    def step(self) -> Any:
        """The number of the step."""
        return int(self.places[0])

    @step.setter
    def step(self, number: int) -> None:
        self.places[0] = number

    @property
    def first(self) -> Any:
        """The row of the batch at which the chunk begins."""
        return int(self.places[1])

    @first.setter
    def first(self, row: int) -> None:
        self.places[1] = row

    def _drop(self, Z: Array, key: int, threshold: int) -> None:
        """Set Z = -0 where the mask drops an entry."""
        xp, do, (m, n), few = self.xp, self._do, Z.shape, piece_rows(*Z.shape)
        signed, unsigned = (np.dtype(f"{kind}{8 * Z.dtype.itemsize}") for kind in ("int", "uint"))
        numbers = self._numbers("mask numbers", max(m, n), xp.uint32)
        keys, shifted = self._take("mask keys", (2, m + n), xp.uint32)
        draws = self._take("draws", (few * n,), xp.uint32)
        mask = self._take("mask", (few * n,), signed)
        do(self._place, key, numbers, keys[:m], keys[m:])
        self._scramble(keys, shifted)
        do(xp.right_shift, keys, self._constant(dropout.SHIFTS[2], keys), shifted)
        do(xp.bitwise_xor, keys, shifted, keys)
        for start in range(0, m, few):
            rows = slice(start, min(m, start + few))
            words = Z[rows].reshape(-1).view(signed)
            u, dropped = draws[: words.size], mask[: words.size]
            bits, below = dropped.view(unsigned), u.view(xp.int32)
            do(xp.bitwise_xor, keys[rows, None], keys[m:], u.reshape(-1, n))
            self._scramble(u, dropped.view(xp.uint32)[: words.size])
            do(xp.right_shift, u, self._constant(32 - dropout.BITS, u), u)
            do(xp.subtract, u, self._constant(threshold, u), u)
            # sets all bits if u was below the threshold
            do(xp.right_shift, below, self._constant(31, below), dropped)
            do(xp.bitwise_or, words, dropped, words)
            do(xp.right_shift, bits, self._constant(1, bits), bits)  # all but the sign
            do(xp.bitwise_xor, words, dropped, words)

    def _place(self, key: int, numbers: Array, rows: Array, columns: Array) -> None:
        """Shift row and column numbers to this step's masks, since replays differ in step."""
        base = dropout.mix(key + self.step)
        self.xp.add(numbers[: len(rows)], (base + self.first) & 0xFFFFFFFF, rows)
        self.xp.add(numbers[: len(columns)], dropout.mix(base + dropout.GOLDEN), columns)

    def _scramble(self, x: Array, shifted: Array) -> None:
        """Apply the steps of `dropout.mix` up to the last multiplication, in place."""
        for shift, factor in zip(dropout.SHIFTS, dropout.FACTORS, strict=False):
            self._do(self.xp.right_shift, x, self._constant(shift, x), shifted)
            self._do(self.xp.bitwise_xor, x, shifted, x)
            self._do(self.xp.multiply, x, self._constant(factor, x), x)
