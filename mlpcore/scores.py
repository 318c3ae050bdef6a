"""Accuracy and R², added up over chunks of rows in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.backends.numpy_ops import NumpyOps
from mlpcore.core.losses import Loss, Objective

Array = NDArray[Any]
HOST = NumpyOps()
PIECE = 256  # rows at a time: what the figures need stays small


def names(loss: Loss) -> tuple[str, str]:
    """What `Trainer.evaluate` reports."""
    return ("loss", "accuracy" if loss.classifies else "r2")


class Scores:
    """Accuracy, where the loss classifies, or R².

    Args:
        objective: the loss on the output activation.
        outputs: n_L.
    """

    def __init__(self, objective: Objective, outputs: int):
        self.objective, self.loss = objective, objective.loss
        self.right = self.weight = 0.0
        self.moments = np.zeros((3, outputs))  # Σ w (y - z)², Σ w (y - origin), Σ w (y - origin)²
        self.origin: Array | None = None  # y of the first row that weighs anything, so that a shift of Y costs no digits

    def add(self, output: Array, Y: Array, weights: Array | None) -> None:
        """Take in a chunk: its outputs, S[L] where loss and output match, else Z[L]; targets and row weights."""
        for i in range(0, len(output), PIECE):
            part = slice(i, i + PIECE)
            piece = output[part]
            if self.objective.matched and not self.loss.classifies:  # S[L], of which r2 wants the activation
                piece = piece.copy()
                with np.errstate(all="ignore"):
                    HOST.bias_activation(piece, None, self.objective.output, piece)
            self._add(piece, Y[part], None if weights is None else weights[part])

    def _add(self, output: Array, Y: Array, weights: Array | None) -> None:
        w = np.ones(len(Y)) if weights is None else weights.astype(np.float64)
        self.weight += float(w.sum())
        if self.loss.takes_classes:  # S[L] and Z[L] rank classes alike
            self.right += float(w @ (output.argmax(axis=1) == (Y if Y.ndim == 1 else Y.argmax(axis=1))))
        elif self.loss.classifies:
            self.right += float(w @ ((output > (0 if self.objective.matched else 0.5)) == (Y > 0.5)).mean(axis=1))
        else:
            y = Y.astype(np.float64)
            if self.origin is None:
                self.origin = y[np.argmax(w > 0)].copy()
            residual, y = y - output, y - self.origin
            self.moments += np.stack([w @ residual**2, w @ y, w @ y**2])

    def result(self) -> float:
        """The figure over all rows seen; r2 is NaN where Y is constant."""
        if self.loss.classifies:
            return self.right / self.weight
        residual, first, second = self.moments
        spread = second - first**2 / self.weight
        with np.errstate(all="ignore"):
            return float(np.mean(np.where(spread > 0, 1 - residual / spread, math.nan)))
