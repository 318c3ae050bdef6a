"""One fit around the trainer's steps: scikit-learn's J, epochs, callbacks, optimizer state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
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
SPARSE_BYTES = 64 << 20  # of a sparse X made dense at a time


class Objective:
    """scikit-learn's J on the training rows: share (the trainer's J - penalty) + penalty + offset.

    Dense rows are prepared once and read by index; sparse ones are made dense batch by batch.

    Args:
        trainer: the trainer; its `l2` is set to `alpha` over the weight of each batch.
        X, Y, weights: (m, n_0), (m, …), and (m,) or None.
        alpha: scikit-learn's penalty, for a whole batch.
        share: factor of the reported loss; the gradient is of the whole loss.
        offsets: (m,) constants of the rows that the trainer's loss leaves out, or None.
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
        self.trainer, self.Y, self.weights = trainer, Y, weights
        self.X = X.tocsr() if issparse(X) else X
        self.alpha, self.share, self.offsets = alpha, share, offsets
        self.data = None if issparse(X) else trainer.prepare(X, Y, weights)

    def step(self, rows: Array) -> tuple[Any, float]:
        """Update once; return the trainer's J and the constant to add to `share` * J."""
        constant = self._set_penalty(rows)
        if self.data is not None:
            return self.trainer.step(self.data, rows=rows), constant
        return self.trainer.step(*self._dense(rows)), constant

    def gradient(self) -> tuple[float, Array]:
        """Return J over all rows and its gradient on the host, valid until the next call."""
        constant = self._set_penalty(slice(None))
        if self.data is not None:
            J, gradient = self.trainer.gradient(self.data)
            return self.share * J + constant, devices.find(self.trainer.net.device).to_host(
                gradient
            )
        J, total = 0.0, np.zeros(self.trainer.net.store.flat.size)
        whole = self._weight(slice(None))
        for part in dense_parts(self.X):
            weight = self._weight(part) / whole
            if weight:
                value, gradient = self.trainer.gradient(*self._dense(part))
                J += weight * value
                total += weight * devices.find(self.trainer.net.device).to_host(gradient)
        return self.share * J + constant, total

    def _dense(self, rows: Any) -> tuple[Array, Array, Array | None]:
        weights = None if self.weights is None else self.weights[rows]
        return self.X[rows].toarray(), self.Y[rows], weights

    def _weight(self, rows: Any) -> float:
        if self.weights is not None:
            return float(self.weights[rows].sum())
        return len(range(*rows.indices(len(self.Y)))) if isinstance(rows, slice) else len(rows)

    def _set_penalty(self, rows: Any) -> float:
        """Set the trainer's penalty for a batch; return the constant part of J."""
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
            weights = None if self.weights is None else self.weights[rows]
            constant = float(np.average(self.offsets[rows], weights=weights))
        if self.share != 1 and l2:
            W = trainer.net.store.flat[: trainer.net.layout.weights]
            constant += (1 - self.share) * 0.5 * l2 * trainer._step.ops.sum_squares(W)
        return constant


class Reporter:
    """The callbacks, the progress bar and the history of one fit.

    Attributes:
        stopped: True if a callback asked to stop.
    """

    def __init__(self, trainer: Trainer, callbacks: Any, epochs: int, progress: bool) -> None:
        self.trainer, self.observers = trainer, hooks.resolve(callbacks or [])
        self.total, self.shown = epochs, progress
        self.history: dict[str, list[float]] = {}
        self.stopped = False

    def __enter__(self) -> Reporter:
        from tqdm.auto import tqdm  # imported late, because it imports asyncio

        self.bar = tqdm(total=self.total, unit="epoch", disable=not self.shown)
        self.began = time.perf_counter()
        for observer in self.observers:
            observer.fit_begin(self.trainer)
        return self

    def end_epoch(self, entry: dict[str, float]) -> bool:
        """Report an epoch; return True if a callback asks to stop."""
        now = time.perf_counter()
        entry["seconds"], self.began = now - self.began, now
        for key, value in entry.items():
            self.history.setdefault(key, []).append(value)
        shown = {key: f"{value:.4g}" for key, value in entry.items() if key != "seconds"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        answers = [observer.epoch_end(self.trainer, entry) for observer in self.observers]
        self.stopped = any(isinstance(answer, bool | np.bool_) and answer for answer in answers)
        return self.stopped

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.bar.close()
        if kind is None:
            for observer in self.observers:
                observer.fit_end(self.trainer, self.history)


class Best:
    """Parameters of the epoch with the best score, within the trainer's memory plan.

    Args:
        trainer: the trainer, whose parameters are the best until `keep` is called.
        found: True if `restore` should write even without a call of `keep`.
    """

    def __init__(self, trainer: Trainer, found: bool) -> None:
        self.store, self.found = trainer.net.store, found
        self.array: Array = trainer._step.workspace.reserve(
            trainer._step.workspace.fit_buffers(0, True)
        )["best"]
        self.array[...] = self.store.flat

    def keep(self) -> None:
        """Copy the network's parameters."""
        self.array[...], self.found = self.store.flat, True

    def restore(self) -> None:
        """Write the best parameters into the network."""
        if self.found:
            self.store.write(self.array)


def train_epoch(objective: Objective, order: Array, size: int, reporter: Reporter) -> float:
    """Train on the rows in this order; return the mean of J, weighted by batch size.

    If J or the gradient overflows, all parameters become NaN for the rest of the training, as in
    scikit-learn, which does not check.
    """
    trainer = objective.trainer
    found = []
    try:
        for batch in gen_batches(len(order), size):
            part = order[batch]
            J, constant = objective.step(part)
            found.append((J, constant, len(part)))
            for observer in reporter.observers:
                observer.step_end(trainer, J)
        total = sum((objective.share * float(J) + constant) * rows for J, constant, rows in found)
        return total / len(order)
    except NonFiniteLoss:
        trainer.net.store.write(np.nan)
        return float("nan")


def dense_parts(X: Any) -> Iterator[slice]:
    """Return the slices of rows in which a sparse X is made dense."""
    parts: Iterator[slice] = gen_batches(
        X.shape[0], max(1, SPARSE_BYTES // (X.shape[1] * X.dtype.itemsize))
    )
    return parts


def take_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state of the trainer's next steps, without the parameters, on the host."""
    vectors, facts = trainer._step.snapshot()
    vectors = {name: np.array(vector) for name, vector in vectors.items()}
    return {"progress": dataclasses.replace(trainer.progress), "vectors": vectors, "facts": facts}


def restore_state(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Set the trainer's state to one returned by `take_state`."""
    trainer.progress = dataclasses.replace(saved["progress"])
    trainer._step.restore(saved["vectors"], saved["facts"])
