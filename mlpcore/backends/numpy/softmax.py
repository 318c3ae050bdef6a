"""Row-wise softmax, its Jacobian, and its cross-entropy; each is one call on a tape.

All work in place, on arrays that the caller has planned: `row` is (rows, 1), `powers` and `product`
have Z's shape. Ufuncs and methods are bound once: looking one up costs a tenth of its call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import add, copyto, divide, exp, log, log1p, matmul, minimum, multiply, subtract, vecdot

from mlpcore.core.losses import Loss
from mlpcore.core.ops import Array

# up to this many classes the work is done on the transpose, where sums over a row become sums of
# contiguous rows
NARROW = 64
total_of: Any = np.add.reduce
largest_of: Any = np.maximum.reduce


def softmax(S: Array, Z: Array, row: Array) -> None:
    """Set Z = exp(s) / Σ exp(s), s = S - max."""
    largest_of(S, 1, None, row, True)
    subtract(S, row, Z)
    exp(Z, Z)
    total_of(Z, 1, None, row, True)
    divide(Z, row, Z)


def log_softmax(
    S: Array, Z: Array, row: Array, powers: Array, largest: Array, at: Array, numbers: Array
) -> None:  # fmt: skip
    """Set Z = s - log Σ exp(s), s = S - max.

    The largest entry's 1 is left out of the sum and supplied by `log1p`. `largest`, `at` and
    `numbers` are int64, (rows,); `numbers` holds 0, 1, 2, …
    """
    S.argmax(1, largest)
    largest_of(S, 1, None, row, True)
    subtract(S, row, Z)
    exp(Z, powers)
    multiply(numbers, S.shape[1], at)
    add(at, largest, at)
    powers.reshape(-1).put(at, 0, "clip")
    total_of(powers, 1, None, row, True)
    log1p(row, row)
    subtract(Z, row, Z)


def softmax_gradient(G: Array, Z: Array, D: Array, row: Array, product: Array) -> None:
    """Set D = Z ⊙ (G - Σ_columns G ⊙ Z): the Jacobian of a row of softmax, applied."""
    multiply(G, Z, product)
    total_of(product, 1, None, row, True)
    subtract(G, row, product)
    multiply(product, Z, D)


def log_softmax_gradient(G: Array, Z: Array, D: Array, row: Array, powers: Array) -> None:
    """Set D = G - exp(Z) Σ_columns G: the Jacobian's transpose, applied."""
    exp(Z, powers)
    total_of(G, 1, None, row, True)
    multiply(powers, row, powers)
    subtract(G, powers, D)


class CrossEntropy:
    """ℓ = log Σ exp(s - max) - (s_y - max) and D = k (softmax(s) - onehot(y)), from S.

    Neither overflows nor cancels: one exponential e, the label's or the largest, is replaced by
    e - 1, so that the sum is Σ - 1, whose log1p keeps its digits; and that entry of D is
    -k R / Σ with the sum R of the others.

    Args:
        S, Y, k, D, J: as in `Ops.loss`.
        loss: the loss.
        weights: the loss's number for each class, or None.
        flat: scratch for exponentials, (rows · classes,), which holds P.
        sums: scratch, (4, rows, 1).
        places: scratch, (2, rows) of int64.
        numbers: 0, 1, 2, …, (rows,).
    """

    def __init__(
        self, S: Array, Y: Array, k: Array, D: Array, J: Array, loss: Loss,
        weights: Array | None, flat: Array, sums: Array, places: Array, numbers: Array,
    ) -> None:  # fmt: skip
        self.S, self.Y, self.k, self.D, self.J = S, Y, k, D, J
        self.weights, self.take, self.put = weights, flat.take, flat.put
        self.top, self.total, self.entry, self.value = sums
        self.tops, self.totals, self.entries, self.values = sums[..., 0]
        (rows, classes), (self.at, self.largest), labels = S.shape, places, Y.ndim == 1
        self.mixes, self.most, smoothing = loss.mixes(labels), loss.most, loss.label_smoothing
        self.labels = labels
        columns = Y if labels else self.largest
        if classes <= NARROW:  # position of an entry in `flat`: scaled · factor + added
            self.P = flat.reshape(classes, rows).T
            self.scaled, self.factor, self.added = columns, rows, numbers
        else:
            self.P = flat.reshape(rows, classes)
            self.scaled, self.factor, self.added = numbers, classes, columns
        numbers_of_loss = 1, 1 - smoothing, smoothing / classes, sum(loss.columns)
        self.one, self.kept, self.share, self.whole = (
            np.asarray(x, S.dtype) for x in numbers_of_loss
        )

    @property
    def run(self) -> Callable[[], None]:
        """Method that adds the rows' losses to J and sets D."""
        return self.of_labels if self.labels else self.of_distributions

    def of_labels(self) -> None:
        """Add the rows' losses to J and set D, if Y holds class indices."""
        P, at, take, put, k, J = self.P, self.at, self.take, self.put, self.k, self.J
        top, total, entry, value, tops = self.top, self.total, self.entry, self.value, self.tops
        copyto(P, self.S)
        multiply(self.scaled, self.factor, at)
        add(at, self.added, at)
        largest_of(P, 1, None, top, True)
        subtract(P, top, P)
        take(at, 0, self.entries, "clip")
        if self.mixes:
            self._mixed_labels()
            return
        exp(P, P)
        take(at, 0, tops, "clip")
        subtract(tops, self.one, tops)
        put(at, tops, "clip")
        total_of(P, 1, None, total, True)
        log1p(total, value)
        subtract(value, entry, value)
        if self.most is not None:
            minimum(value, self.most, out=value)
        multiply(value, k, value)
        J += total_of(self.values)
        subtract(top, total, top)  # -R
        add(total, self.one, total)
        divide(k, total, total)
        multiply(P, total, P)
        multiply(top, total, top)
        put(at, tops, "clip")
        copyto(self.D, P)

    def of_distributions(self) -> None:
        """Add the rows' losses to J and set D, if each row of Y is a distribution over classes."""
        P, at, take, put, k, J, D = self.P, self.at, self.take, self.put, self.k, self.J, self.D
        top, total, entry, value, tops = self.top, self.total, self.entry, self.value, self.tops
        copyto(P, self.S)
        self.S.argmax(1, self.largest)
        multiply(self.scaled, self.factor, at)
        add(at, self.added, at)
        take(at, 0, tops, "clip")
        subtract(P, top, P)
        if self.mixes:
            self._mixed_distributions()
            return
        multiply(self.Y, P, D)
        total_of(D, 1, None, entry, True)
        exp(P, P)
        take(at, 0, tops, "clip")
        subtract(tops, self.one, tops)
        put(at, tops, "clip")
        total_of(P, 1, None, total, True)
        log1p(total, value)
        total_of(self.Y, 1, None, top, True)
        multiply(value, top, value)
        subtract(value, entry, value)
        if self.most is not None:
            minimum(value, self.most, out=value)
        multiply(value, k, value)
        J += total_of(self.values)
        # the largest is 1, so that R = Σ - 1: its entry is (Σ_c y_c - y - y R) / Σ
        add(total, self.one, entry)
        divide(P, entry, P)
        multiply(P, top, P)
        subtract(P, self.Y, P)
        take(at, 0, self.values, "clip")
        multiply(total, value, total)
        add(top, value, top)
        add(total, top, total)
        divide(total, entry, total)
        put(at, self.totals, "clip")
        multiply(P, k, D)

    def _add_losses(self, value: Array) -> None:
        """Add Σ k (value - entry) to J, each row's loss at most `most`."""
        J = self.J
        subtract(value, self.entry, value)
        if self.most is not None:
            minimum(value, self.most, out=value)
        multiply(value, self.k, value)
        J += total_of(value.reshape(-1))

    def _mixed_distributions(self) -> None:
        """Set ℓ and D for the shares t = c ((1 - ε) Y + ε/K) / C (`targets.mixed`), held in D."""
        P, t, top, total = self.P, self.D, self.top, self.total
        multiply(self.Y, self.kept, t)
        add(t, self.share, t)
        if self.weights is not None:
            matmul(self.Y, self.weights, self.totals)
            total[total == 0] = 1
            multiply(t, self.weights, t)
            divide(t, total, t)
        vecdot(t, P, self.entries)
        total_of(t, 1, None, top, True)
        exp(P, P)
        total_of(P, 1, None, total, True)
        divide(P, total, P)
        log(total, total)
        multiply(total, top, total)
        self._add_losses(total)
        multiply(P, top, P)
        subtract(P, t, P)
        multiply(P, self.k, self.D)

    def _mixed_labels(self) -> None:
        """Set ℓ = -Σ t log p and D = k (Σ t softmax(s) - t) for mixed targets t.

        The targets are t = (1 - ε) onehot(y) + (ε/K) c / c_y.
        """
        P, weights, kept, share = self.P, self.weights, self.kept, self.share
        top, total, entry, own = self.top, self.total, self.entry, self.value
        multiply(entry, kept, entry)
        if weights is None:
            total_of(P, 1, None, top, True)
            multiply(top, share, top)
        else:
            matmul(P, weights, self.tops)
            self._spread(own)
            multiply(top, own, top)
        add(entry, top, entry)
        exp(P, P)
        total_of(P, 1, None, total, True)
        log(total, top)
        divide(self.k, total, total)
        if weights is not None:  # Σ t is not 1
            multiply(own, self.whole, own)
            add(own, kept, own)
            multiply(top, own, top)
            multiply(total, own, total)
        self._add_losses(top)
        multiply(P, total, P)
        if weights is None:
            multiply(self.k, share, top)
            subtract(P, top, P)
        else:
            self._spread(own)
            multiply(self.k, own, top)
            multiply(top, weights, self.D)
            subtract(P, self.D, P)
        self.take(self.at, 0, self.entries, "clip")
        multiply(self.k, kept, top)
        subtract(entry, top, entry)
        self.put(self.at, self.entries, "clip")
        copyto(self.D, P)

    def _spread(self, own: Array) -> None:
        """Set (ε/K) / c_y for each row."""
        assert self.weights is not None
        self.weights.take(self.Y, 0, self.values, "clip")
        own[own == 0] = 1
        divide(self.share, own, own)
