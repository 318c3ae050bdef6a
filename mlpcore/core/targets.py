"""Targets and row weights under class weights c and label smoothing ε, over K classes.

    J = Σ_i w_i ℓ_i / Σ_i w_i C_i
    ℓ_i = -Σ_k c_k ((1 - ε) y_ik + ε/K) log p_ik,   C_i = Σ_k c_k y_ik

The engine uses w_i C_i as the weight of a row and ℓ_i / C_i as its loss, so that J is a weighted
mean, as with any loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlpcore.core.loss import Loss

PIECE, PIECE_ELSEWHERE = 4096, 1 << 20  # rows weighted at a time: on the host, on a GPU
ENTRIES = 1 << 16  # maximum number of targets weighted at a time on the host


def row_weights(loss: Loss, Y: Any, weights: Any, out: Any, xp: Any = np) -> None:
    """Set out (m,) to w_i C_i, the product of row weight and class weight.

    Args:
        loss: a loss with class weights.
        Y: (m,) class indices, or (m, n_L) targets.
        weights: (m,) or None.
        out: the result.
        xp: the array module of these arrays.
    """
    assert loss.class_weight is not None
    by_class = xp.asarray(loss.class_weight, np.float64)
    piece = min(PIECE, max(1, ENTRIES // max(1, Y[:1].size))) if xp is np else PIECE_ELSEWHERE
    for start in range(0, len(out), piece):
        part = slice(start, start + piece)
        y = Y[part]
        if y.ndim == 1:
            # the step itself reports invalid classes
            found = by_class[y.astype(np.int64) % len(by_class)]
        else:
            found = (
                by_class[0] * (1.0 - y[:, 0]) + by_class[1] * y[:, 0]
                if loss.binary
                else y @ by_class
            )
        with np.errstate(over="ignore"):  # an infinite sum is rejected
            out[part] = found if weights is None else found * weights[part]


class RowWeights:
    """Row weights times class weights, computed for the rows in use.

    Args:
        loss, Y, weights: as in `row_weights`, on the host.
        dtype: dtype of the weights.
    """

    def __init__(self, loss: Loss, Y: Any, weights: Any, dtype: Any):
        self.loss, self.Y, self.weights, self.dtype = loss, Y, weights, np.dtype(dtype)

    def __getitem__(self, rows: Any) -> Any:
        Y = self.Y[rows]
        found = np.empty(len(Y), self.dtype)
        row_weights(self.loss, Y, None if self.weights is None else self.weights[rows], found)
        return found

    def take(self, rows: Any, axis: int = 0, out: Any = None, mode: str = "raise") -> Any:
        """Return the weights of the rows with these numbers, like NumPy's method."""
        found = self[rows]
        if out is not None:
            out[...] = found
        return found

    def any(self) -> bool:
        """Return True if any row has a nonzero weight."""
        return any(self[i : i + PIECE].any() for i in range(0, len(self.Y), PIECE))


def weighed(loss: Loss, Y: Any, weights: Any, dtype: Any, xp: Any = np) -> Any:
    """Return the row weights (m,), or None, times the weights of their classes, if any.

    Raises:
        ValueError: the class of every row has weight 0.
    """
    if loss.class_weight is None:
        return weights
    found = xp.empty(len(Y), dtype)
    row_weights(loss, Y, weights, found, xp)
    if not found.any():
        raise ValueError("sample_weight, times class_weight, must not be all zero")
    return found


def mixed(loss: Loss, Y: Any, outputs: int, dtype: Any, xp: Any = np) -> Any:
    """Return the shares t (m, n_L) in ℓ / C = -Σ t log p of cross-entropy.

    Y holds class indices or distributions.

    t_ik = c_k ((1 - ε) y_ik + ε/K) / C_i: smoothed, weighted by class, divided by the row's class
    weight.
    """
    t = (Y[:, None] == xp.arange(outputs)).astype(dtype) if Y.ndim == 1 else xp.array(Y, dtype)
    by_class = xp.asarray(loss.columns or (1.0,), dtype)
    weight = (
        (t * by_class).sum(axis=1, keepdims=True) if loss.columns else xp.ones((len(t), 1), dtype)
    )
    if loss.label_smoothing:
        t = (1 - loss.label_smoothing) * t + loss.label_smoothing / outputs
    weight[weight == 0] = 1  # such a row contributes nothing
    return (t * by_class / weight).astype(dtype)
