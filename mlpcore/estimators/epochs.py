"""The rows of one fit, its epochs, and what stands around them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.utils import gen_batches

from mlpcore.backends import devices
from mlpcore.checks.errors import NonFiniteLoss
from mlpcore.trainer import Trainer
from mlpcore.training import callbacks as hooks

Array = NDArray[Any]
SPARSE_BYTES = 64 << 20  # of the rows of a sparse X that are made dense in one go


class Rows:
    """The training rows, and scikit-learn's J on them: share * (the trainer's J without penalty) +
    penalty + offset.

    Dense rows are prepared once and read by their numbers; sparse ones are made dense batch by
    batch.

    Args:
        trainer: its `l2` is set to `alpha` over the weight of each batch.
        X, Y, weights: (m, n_0), (m, …) and (m,) or None.
        share: what scikit-learn reports of the loss, whose gradient is that of all of it.
        offsets: (m,), what a row's loss is more than the trainer's, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        X: Any,
        Y: Array,
        weights: Array | None,
        alpha: float,
        share: float,
        offsets: Array | None,
    ) -> None:
        self.trainer, self.X, self.Y, self.weights = trainer, X, Y, weights
        self.alpha, self.share, self.offsets = alpha, share, offsets
        self.data = None if issparse(X) else trainer.prepare(X, Y, weights)

    def step(self, rows: Array) -> tuple[Any, float]:
        """One update. Returns the trainer's J, and what is to be added to `share` times it."""
        constant = self._begin(rows)
        if self.data is not None:
            return self.trainer.step(self.data, rows=rows), constant
        return self.trainer.step(*self._dense(rows)), constant

    def gradient(self) -> tuple[float, Array]:
        """J over all rows and its gradient, which holds until the next call."""
        constant = self._begin(slice(None))
        if self.data is not None:
            J, gradient = self.trainer.gradient(self.data)
            return self.share * J + constant, devices.to_host(self.trainer.net.device, gradient)
        J, total = 0.0, np.zeros(self.trainer.net.store.flat.size)
        width, whole = self.X.shape[1] * self.X.dtype.itemsize, self._weight(slice(None))
        for part in gen_batches(self.X.shape[0], max(1, SPARSE_BYTES // width)):
            weight = self._weight(part) / whole
            if weight:
                value, gradient = self.trainer.gradient(*self._dense(part))
                J += weight * value
                total += weight * devices.to_host(self.trainer.net.device, gradient)
        return self.share * J + constant, total

    def _dense(self, rows: Any) -> tuple[Array, Array, Array | None]:
        return (
            self.X[rows].toarray(),
            self.Y[rows],
            None if self.weights is None else self.weights[rows],
        )

    def _weight(self, rows: Any) -> float:
        if self.weights is not None:
            return float(self.weights[rows].sum())
        return len(range(*rows.indices(len(self.Y)))) if isinstance(rows, slice) else len(rows)

    def _begin(self, rows: Any) -> float:
        """Sets the penalty for a batch; the constant of its J."""
        weight, trainer = self._weight(rows), self.trainer
        if weight == 0:
            raise ZeroDivisionError(
                "Weights sum to zero, can't be normalized: sample_weight is 0 on all rows of a "
                "batch"
            )
        l2 = self.alpha / weight
        if trainer.l2 != l2:
            trainer.l2 = l2
        constant = 0.0
        if self.offsets is not None:
            constant = float(
                np.average(
                    self.offsets[rows], weights=None if self.weights is None else self.weights[rows]
                )
            )
        if self.share != 1 and l2:
            W = trainer.net.store.flat[: trainer.net.layout.weights]
            constant += (1 - self.share) * 0.5 * l2 * trainer._step.ops.sum_squares(W)
        return constant


class Run:
    """What stands around the epochs of one fit: callbacks, the bar, the history."""

    def __init__(self, trainer: Trainer, callbacks: Any, epochs: int, progress: bool):
        self.trainer, self.observers = trainer, hooks.resolve(callbacks or [])
        self.total, self.shown = epochs, progress
        self.history: dict[str, list[float]] = {}
        self.stopped = False

    def __enter__(self) -> Run:
        from tqdm.auto import tqdm  # not at import: it brings asyncio

        self.bar = tqdm(total=self.total, unit="epoch", disable=not self.shown)
        self.began = time.perf_counter()
        for observer in self.observers:
            observer.fit_begin(self.trainer)
        return self

    def epoch_end(self, entry: dict[str, float]) -> bool:
        """Takes in one epoch; whether a callback wants no more."""
        now = time.perf_counter()
        entry["seconds"], self.began = now - self.began, now
        for key, value in entry.items():
            self.history.setdefault(key, []).append(value)
        self.bar.set_postfix(
            {key: f"{value:.4g}" for key, value in entry.items() if key != "seconds"}, refresh=False
        )
        self.bar.update()
        answers = [observer.epoch_end(self.trainer, entry) for observer in self.observers]
        self.stopped = any(isinstance(answer, bool | np.bool_) and answer for answer in answers)
        return self.stopped

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.bar.close()
        if kind is None:
            for observer in self.observers:
                observer.fit_end(self.trainer, self.history)


def epoch(rows: Rows, order: Array, size: int, run: Run) -> float:
    """One pass over the rows in this order; the mean of J, each batch by its rows.

    J or a gradient that overflows makes all parameters NaN, as it does where nobody looks, and the
    rest of the training is NaN.
    """
    net = rows.trainer.net
    found = []
    try:
        for batch in gen_batches(len(order), size):
            part = order[batch]
            J, constant = rows.step(part)
            found.append((J, constant, len(part)))
            for observer in run.observers:
                observer.step_end(rows.trainer, J)
        return sum(
            (rows.share * float(J) + constant) * count for J, constant, count in found
        ) / len(order)
    except NonFiniteLoss:
        net.store.write(np.nan)
        return float("nan")


def state_of(trainer: Trainer) -> dict[str, Any]:
    """What the trainer's next steps depend on beside the parameters, on the host."""
    vectors, facts = trainer._step.snapshot()
    vectors = {name: np.array(vector) for name, vector in vectors.items()}
    return {"progress": dataclasses.replace(trainer.progress), "vectors": vectors, "facts": facts}


def restore(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Puts back what `state_of` returned."""
    trainer.progress = dataclasses.replace(saved["progress"])
    trainer._step.restore(saved["vectors"], saved["facts"])
