"""Scores over rows: accuracy, R², user metrics, and the loss of each row.

Chunks are merged in float64, means and spreads as in Chan, Golub and LeVeque (1979), so that an
offset in Y, unequal weights or the order of the chunks costs no digits. A row of weight 2 counts
twice, a row of weight 0 not at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core.losses import Loss, Objective
from mlpcore.core.program import program
from mlpcore.core.schedules import Adaptive
from mlpcore.core.targets import mixed
from mlpcore.data.batches import Data
from mlpcore.data.streams import Stream
from mlpcore.training.callbacks import EarlyStopping

Array = NDArray[Any]
Metric = Callable[..., Any]
HOST = NumpyOps()
ROWS, ENTRIES = 256, 2048  # processed at a time, whichever is more: saves memory


def names(loss: Loss) -> tuple[str, str]:
    """Return the names of the scores that `Trainer.evaluate` always reports."""
    return ("loss", "accuracy" if loss.classifies else "r2")


def require_followed(rate: object, loss: Loss, validated: bool, metrics: Collection[str]) -> None:
    """Raise a ValueError if a schedule follows a score that the history will not have."""
    if isinstance(rate, Adaptive):
        require_figure("learning_rate: Adaptive", rate, loss, validated, metrics)


def require_figure(
    argument: str,
    monitored: EarlyStopping | Adaptive,
    loss: Loss,
    validated: bool,
    metrics: Collection[str],
) -> None:
    """Raise a ValueError if `fit`'s history will not have the score that is monitored.

    Also raise it for a user metric without a `mode`, since it is unknown which side is better.
    """
    monitor = monitored.monitor
    if monitor.startswith("validation_") and not validated:
        raise ValueError(
            f"{argument} monitors {monitor!r}, but fit was given no validation=(Xv, Yv)"
        )
    figures = [f"validation_{key}" for key in (*names(loss), *metrics)] if validated else []
    values.one_of(monitor, f"{argument}: monitor", ("loss", *figures))
    if monitored.mode is None and monitor.removeprefix("validation_") in metrics:
        raise ValueError(
            f"{argument} monitors {monitor!r}: say which is better, mode='min' or mode='max'"
        )


class Scores:
    """An accumulator of accuracy, for losses that classify, or of R².

    Args:
        objective: the loss on the output activation.
        outputs: number of outputs, n_L.
    """

    def __init__(self, objective: Objective, outputs: int):
        self.objective, self.loss = objective, objective.loss
        self.right = self.weight = 0.0
        self.origin = np.zeros(outputs)  # a typical y, subtracted before the mean is taken
        # means of y - origin, (y - its mean)², (y - z)²
        self.mean, self.spread, self.residual = np.zeros((3, outputs))

    def add(self, output: Array, Y: Array, weights: Array | None) -> None:
        """Add a chunk: outputs (S[L] if loss and output match, else Z[L]), Y and weights."""
        rows = max(ROWS, ENTRIES // output.shape[1])
        for i in range(0, len(output), rows):
            part = slice(i, i + rows)
            z, y = output[part], Y[part]
            w = np.ones(len(z)) if weights is None else weights[part].astype(np.float64)
            if not w.all():
                z, y, w = z[w > 0], y[w > 0], w[w > 0]
            if len(w):
                self._add(z, y, w, float(w.sum()))

    def _add(self, output: Array, Y: Array, w: Array, total: float) -> None:
        before, self.weight = self.weight, self.weight + total
        if not self.loss.classifies:  # r2 needs the activation
            # each share by division: 1 - the other would be 0 next to a share near 1
            shares = np.array([before, total]) / self.weight
            self._merge(activated(self.objective, output), Y.astype(np.float64), w / total, shares)
            return
        if self.loss.takes_classes:  # S[L] and Z[L] rank classes alike
            hits = output.argmax(axis=1) == (Y if Y.ndim == 1 else Y.argmax(axis=1))
        else:
            hits = ((output > (0 if self.objective.matched else 0.5)) == (Y > 0.5)).mean(axis=1)
        # summed in the order of `total`, so that the accuracy is 1 if all are right
        self.right += float((w * hits).sum())

    @np.errstate(all="ignore")
    def _merge(self, output: Array, y: Array, w: Array, shares: Array) -> None:
        """Add rows whose weights w sum to 1; y is overwritten.

        `shares` are the shares of the earlier rows and of these rows in the total weight.
        """
        residual = y - output
        residual *= residual
        origin = y[w.argmax()].copy()
        y -= origin
        mean = w @ y
        y -= mean
        y *= y
        step = origin - self.origin + mean - self.mean
        old, new = shares
        self.spread = old * self.spread + new * (w @ y) + new * (old * step**2)
        self.residual = _mean(shares, np.stack([self.residual, _mean(w, residual)]))
        if new > old:
            self.origin, self.mean = origin, mean - old * step
        else:
            self.mean = self.mean + new * step

    def result(self) -> float:
        """Return the score over all rows seen.

        R² is the mean over the outputs; an output with a constant target has 1 if its predictions
        are perfect, else 0, as in scikit-learn's `r2_score(multioutput="uniform_average",
        force_finite=True)`.
        """
        if self.loss.classifies:
            return self.right / self.weight
        with np.errstate(all="ignore"):
            figures = 1 - self.residual / self.spread
        constant = (self.spread == 0) & np.isfinite(self.residual)
        return float(np.mean(np.where(constant, self.residual == 0, figures)))


def _mean(w: Array, squares: Array) -> Array:
    """Return w @ squares; a column that is not finite stays so, however small its weight."""
    largest: Array = squares.max(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(largest), w @ squares, largest)


def activated(objective: Objective, output: Array) -> Array:
    """Return Z[L] from a chunk's outputs, which are S[L] if loss and output match."""
    if not objective.matched:
        return output
    Z = np.array(output, order="C")
    with np.errstate(all="ignore"):
        HOST.bias_activation(Z, None, objective.output, Z)
    return Z


def row_losses(objective: Objective, output: Array, Y: Array) -> Array:
    """Return ℓ of each row (m,) in float64, from outputs and targets in the form of `Scores.add`.

    With class weights, ℓ is divided by the weight of the row's class, as in the engine.
    """
    losses, rows = np.empty(len(output)), max(ROWS, ENTRIES // output.shape[1])
    for start in range(0, len(output), rows):
        part = slice(start, start + rows)
        losses[part] = _row_losses(objective, output[part], Y[part])
    return losses


def _row_losses(objective: Objective, output: Array, Y: Array) -> Array:
    x, loss = np.ascontiguousarray(output, np.float64), objective.loss
    with np.errstate(all="ignore"):
        if loss.rowwise:
            target = mixed(loss, Y, x.shape[1], x.dtype) if loss.mixes(Y.ndim == 1) else Y
            return _cross_entropies(x, target, loss.most)
        scalars = dict(objective.scalars)
        compiled = program(f"v = {objective.value}", frozenset(scalars), "float64")
        constants = {key: np.asarray(value) for key, value in compiled.fold(scalars).items()}
        arrays = {"v": np.empty_like(x), "x": x, "y": np.ascontiguousarray(Y, np.float64)}
        if loss.columns:
            arrays["p"] = np.tile(loss.columns, (len(x), 1))
        HOST.map(compiled, {name: array.reshape(-1) for name, array in arrays.items()}, constants)
        losses: Array = arrays["v"].sum(axis=1)
    return losses


def _cross_entropies(S: Array, Y: Array, most: float | None) -> Array:
    """Return Σ y (log Σ exp(s) - s), relative to the likeliest class: exact near 0."""
    rows, top = np.arange(len(S)), S.argmax(axis=1)
    below = S - S[rows, top][:, None]
    others = np.exp(below)
    others[rows, top] = 0
    log_sum = np.log1p(others.sum(axis=1))
    each = log_sum[:, None] - below  # -log of each class's probability
    losses: Array = each[rows, Y] if Y.ndim == 1 else np.where(Y != 0, Y * each, 0).sum(axis=1)
    return losses if most is None else np.minimum(losses, most)


class Collected:
    """The rows of an evaluation, copied to the host for metrics, which need all of them at once.

    Args:
        objective: the loss on the output activation.
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        self.parts: tuple[list[Array], ...] = ([], [], [])  # targets, outputs, row weights

    def add(self, output: Array, Y: Array, weights: Array | None) -> None:
        """Keep a copy of a chunk, in the form of `Scores.add`."""
        for kept, array in zip(
            self.parts, (Y, activated(self.objective, output), weights), strict=True
        ):
            if array is not None:
                kept.append(np.array(array))

    def measure(self, metrics: Mapping[str, Metric], flat: bool) -> dict[str, float]:
        """Return each metric over all rows; with `flat`, it gets Y and outputs as (m,).

        Raises:
            TypeError: a metric takes no `sample_weight` although the rows have weights, or does not
                return a number; names the metric.
        """
        Y, Z = map(np.concatenate, self.parts[:2])
        w = np.concatenate(self.parts[2]) if self.parts[2] else None
        if flat:
            Y, Z = Y.reshape(-1), Z.reshape(-1)
        return {name: _number(name, metric, Y, Z, w) for name, metric in metrics.items()}


def require_metrics(metrics: object, loss: Loss, rows: Data | Stream | None) -> dict[str, Metric]:
    """Return a user's `{name: function}`, {} for None, checked as far as the rows are known.

    Raises:
        TypeError, ValueError: it is not such a dict; names the metric at fault.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"metrics must be a dict {{name: function (Y, output)}}; got {type(metrics).__name__}"
        )
    found = {}
    for key, metric in metrics.items():
        name = values.text(key, "metrics: a name")
        if not name:
            raise ValueError("metrics: a name must not be empty")
        if name in names(loss):
            raise ValueError(f"metrics: {name!r} is reported anyway; choose another name")
        if not callable(metric):
            raise TypeError(
                f"metrics[{name!r}] must be a function (Y, output) that returns a number; got "
                f"{shown(metric)}"
            )
        found[name] = metric
    if isinstance(rows, Data):
        for name, metric in found.items():
            require_weights_taken(name, metric, rows.weights is not None)
    return found


def require_weights_taken(name: str, metric: Metric, weighted: bool) -> None:
    """Raise a TypeError if the metric cannot be called with Y, output and, if any, weights."""
    more: dict[str, object] = {"sample_weight": None} if weighted else {}
    try:
        signature = inspect.signature(metric)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    try:
        signature.bind(None, None, **more)
    except TypeError as error:
        needed = (
            "(Y, output, sample_weight=...), as the rows have weights"
            if weighted
            else "(Y, output)"
        )
        raise TypeError(f"metrics[{name!r}] must be a function {needed}: {error}") from None


def _number(name: str, metric: Metric, Y: Array, Z: Array, w: Array | None) -> float:
    require_weights_taken(name, metric, w is not None)
    with _Named(f"raised by metrics[{name!r}]"):
        value = metric(Y, Z) if w is None else metric(Y, Z, sample_weight=w)
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        what = (
            f"an array of shape {value.shape}"
            if isinstance(value, np.ndarray)
            else f"{value!r:.100}"
        )
        raise TypeError(f"metrics[{name!r}] must return a number; it returned {what}")
    return float(value)


class _Named:
    """A context manager that adds a note to errors."""

    def __init__(self, note: str):
        self.note = note

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self.note)
