"""Training: one step, whole runs, evaluation.

trainer = Trainer(net, loss="cross_entropy", optimizer=AdamW(1e-3))
history = trainer.fit(X, Y, epochs=10, batch_size=256, validation=(Xv, Yv))
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore import callbacks as hooks
from mlpcore.backends import device as devices
from mlpcore.backends.numpy_ops import NumpyOps
from mlpcore.callbacks import EarlyStopping, Entry
from mlpcore.core import inputs
from mlpcore.core import losses as loss_sheet
from mlpcore.core.errors import NonFiniteLoss, unknown
from mlpcore.core.optimizers import AdamW, Adaptive, Optimizer, Progress
from mlpcore.mlp import MLP
from mlpcore.training import plan as planning
from mlpcore.training.chunks import Batch
from mlpcore.training.new_step import new_step
from mlpcore.training.plan import Inputs, Plan
from mlpcore.training.planned import Settings

Array = NDArray[Any]
History = dict[str, list[float]]
log = logging.getLogger("mlpcore")
HOST = NumpyOps()
_PRECISIONS = ("tf32", "bfloat16", "float16")


class Data(NamedTuple):
    """Checked arrays, of `Trainer.prepare`: what `fit`, `step` and `evaluate` work on."""

    X: Array
    Y: Array
    weights: Array | None
    inputs: Inputs

    @classmethod
    def of(cls, X: Array, Y: Array, weights: Array | None, classes: bool, staged: bool) -> Data:
        """With what the plan must know; `staged`: they lie on the host and go to the device row by row."""
        weight = "" if weights is None else weights.dtype.str
        return cls(X, Y, weights, Inputs(X.dtype.str, Y.dtype.str, weight, classes, staged))

    def batch(self, rows: Array | None) -> Batch:
        """The rows of these numbers; None: all."""
        return Batch(self.X, self.Y, self.weights, rows, len(self.X) if rows is None else len(rows))


class Trainer:
    """Trains one network.

    Args:
        net: the network; its parameters are updated in place.
        loss: a name, `(name, parameter)` or `mc.Loss`. It must be defined on the network's output.
        optimizer: `mc.SGD(0.1)`, `mc.AdamW(1e-3)` (the default), …
        l1, l2: J gains l1 Σ|W| + ½ l2 Σ W², over weights, not biases.
        clip_norm: scale the gradient down to this Euclidean norm where it is longer.
        precision: "tf32", "bfloat16", "float16": for GPUs; a CPU computes in the network's dtype and says so.
        memory_limit: bytes, or "2 GiB", that all the trainer's arrays together may take; sets the chunk.
        chunk_rows: at most so many rows at a time go forward and backward; "auto" fits them to the cache.
        deterministic: on CUDA, no timing in the choice of algorithms; NumPy is deterministic anyway.
        workers: threads that run chunks of large batches side by side; None chooses.
        seed: of the row order in `fit`.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """

    def __init__(
        self,
        net: MLP,
        loss: Any = "cross_entropy",
        optimizer: Optimizer | None = None,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        clip_norm: float | None = None,
        precision: str | None = None,
        memory_limit: int | str | None = None,
        chunk_rows: int | str = "auto",
        deterministic: bool = False,
        workers: int | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(net, MLP):
            raise TypeError(f"net must be an mc.MLP; got {type(net).__name__}")
        optimizer = AdamW() if optimizer is None else optimizer
        if not isinstance(optimizer, Optimizer) or type(optimizer) is Optimizer:
            raise TypeError(f"optimizer must be one such as mc.SGD(0.1) or mc.AdamW(1e-3); got {optimizer!r}")
        if precision is not None and precision not in _PRECISIONS:
            raise unknown("precision", precision, _PRECISIONS)
        if precision is not None and net.device == "cpu":
            log.warning("precision=%r is for GPUs: on the CPU the network computes in %s", precision, net.dtype.name)
        elif precision is not None and net.dtype != np.float32:
            raise ValueError(f"precision={precision!r} is for a float32 network; this one is {net.dtype.name}")
        if isinstance(chunk_rows, str) and chunk_rows != "auto":
            raise ValueError(f"chunk_rows must be 'auto' or a number of rows; got {chunk_rows!r}")
        if clip_norm is not None and not inputs.not_negative(clip_norm, "clip_norm"):
            raise ValueError("clip_norm must be positive; got 0 (None: no clipping)")
        last = net.activations[-1]
        assert last is not None
        self.net = net
        self.loss = loss_sheet.resolve(loss)
        self._optimizer = optimizer
        self.deterministic = deterministic
        self.progress = Progress()
        self._rng = np.random.default_rng(inputs.positive_integer(seed, "seed", least=0))
        self._settings = Settings(
            l1=inputs.not_negative(l1, "l1"),
            l2=inputs.not_negative(l2, "l2"),
            clip_norm=clip_norm,
            chunk_rows=None if chunk_rows == "auto" else inputs.positive_integer(chunk_rows, "chunk_rows"),
            memory_limit=planning.parse_bytes(memory_limit),
            workers=None if workers is None else inputs.positive_integer(workers, "workers"),
        )
        self._step = new_step(
            net.device, net.layout, net.parameters, net.activations, loss_sheet.pair(self.loss, last), optimizer,
            self._settings, precision, deterministic,
        )  # fmt: skip

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer's settings; what is set on it counts from the next step on."""
        return self._optimizer

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._optimizer.rate(self.progress)

    @property
    def l1(self) -> float:
        """J gains l1 Σ|W|; what is set counts from the next step on."""
        return self._settings.l1

    @l1.setter
    def l1(self, value: float) -> None:
        self._set(l1=inputs.not_negative(value, "l1"))

    @property
    def l2(self) -> float:
        """J gains ½ l2 Σ W²; what is set counts from the next step on."""
        return self._settings.l2

    @l2.setter
    def l2(self, value: float) -> None:
        self._set(l2=inputs.not_negative(value, "l2"))

    def _set(self, **settings: Any) -> None:
        self._settings = self._step.settings = dataclasses.replace(self._settings, **settings)

    def __repr__(self) -> str:
        return f"Trainer({self.net!r}, loss={self.loss.spec!r}, optimizer={self._optimizer!r}, step {self.progress.step})"

    def plan(self, batch_size: int, rows: int = 0, early_stopping: bool = False) -> Plan:
        """The memory table for steps of `batch_size` rows, before anything is allocated; `print` it.

        Args:
            batch_size: rows of a batch.
            rows: rows of the data set, for `fit`: adds their order.
            early_stopping: adds the best parameters.

        Raises:
            MemoryError: `memory_limit` cannot be kept; prints the largest buffers.
        """
        size = inputs.positive_integer(batch_size, "batch_size")
        dtype = self.net.dtype.str
        like = Inputs(dtype, "int64" if self.loss.takes_classes else dtype, "", self.loss.takes_classes)
        reserved = self._step.fit_buffers(inputs.positive_integer(rows, "rows", least=0), early_stopping)
        return self._step.make_plan(size, like, reserved)

    # -- one step --

    def prepare(self, X: ArrayLike, Y: ArrayLike | None, sample_weight: ArrayLike | None = None) -> Data:
        """The arrays checked and laid out once, to be given to many calls of `step`, `gradient` or `evaluate` in place of X.

        Args, Raises: as `step`. The arrays are scanned for NaN and infinity as in `fit`.
        """
        return self._scanned(X, Y, sample_weight)

    def step(
        self, X: ArrayLike | Data, Y: ArrayLike | None = None, sample_weight: ArrayLike | None = None, *,
        rows: ArrayLike | None = None,
    ) -> Any:  # fmt: skip
        """One update on these rows. Returns J before it: a float; on a GPU a `DeviceLoss`, which stays there until `float(J)`.

        Args:
            X: (m, n_0) numbers, or what `prepare` returned, then without Y and sample_weight.
            Y: (m, n_L) targets; (m,) where there is one output; (m,) class indices or one-hot for cross_entropy.
            sample_weight: (m,) row weights, not negative; J divides by their sum over the batch.
            rows: row numbers of a mini-batch within X and Y, read without copying the batch.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came.
            NonFiniteLoss: J or its gradient overflowed; the parameters are as before the step.
        """
        data = self._given(X, Y, sample_weight)
        return self._update(data, self._batch(data, rows))

    def gradient(
        self, X: ArrayLike | Data, Y: ArrayLike | None = None, sample_weight: ArrayLike | None = None, *,
        rows: ArrayLike | None = None,
    ) -> tuple[float, Array]:  # fmt: skip
        """J and ∂J/∂parameters of these rows, penalties included, without an update: for optimizers of your own.

        Returns:
            J, and the gradient laid out as `net.parameters`, on its device; it holds until the trainer's next call.

        Args, Raises: as `step`; a J that is not finite is returned as it is.
        """
        data = self._given(X, Y, sample_weight)
        batch = self._batch(data, rows)
        with devices.active(self.net.device):
            J = self._step.loss_and_gradient(batch, self._step.prepare(batch.size, data.inputs))
        return J, self._step.gradient

    def _given(self, X: ArrayLike | Data, Y: ArrayLike | None, sample_weight: ArrayLike | None) -> Data:
        if not isinstance(X, Data):
            return self._checked(X, Y, sample_weight)
        if Y is not None or sample_weight is not None:
            raise TypeError("Y and sample_weight must be left out where X is what prepare returned: it holds them")
        return X

    def _scanned(self, X: ArrayLike | Data, Y: ArrayLike | None, sample_weight: ArrayLike | None) -> Data:
        data = self._given(X, Y, sample_weight)
        if data is not X:
            _require_finite(data, self.loss, self.net)
        return data

    def _batch(self, data: Data, rows: ArrayLike | None) -> Batch:
        index = inputs.row_index(rows, len(data.X), adopt=devices.adopter(self.net.device))
        if index is not None:
            index = self._laid(index, data.inputs.host)
        batch = data.batch(index)
        if self._step.weight(batch) == 0:
            raise ValueError("sample_weight must not be all zero on the rows of the batch")
        return batch

    def _checked(self, X: ArrayLike, Y: ArrayLike | None, sample_weight: ArrayLike | None) -> Data:
        device = self.net.device
        adopt = devices.adopter(device)
        x = inputs.matrix(X, self.net.sizes[0], adopt=adopt)
        y, classes = inputs.target(Y, len(x), self.net.sizes[-1], self.loss, adopt=adopt)
        w = inputs.weights(sample_weight, len(x), adopt=adopt)
        staged = device != "cpu" and not devices.open_device(device).holds(x)
        return Data.of(
            self._laid(x, staged), self._laid(y, staged), None if w is None else self._laid(w, staged), classes, staged
        )

    def _laid(self, array: Array, staged: bool) -> Array:
        """The array row-major and where X lies: on the host if it is staged, in the machine's byte order."""
        device = self.net.device
        if staged:
            array = devices.to_host(device, array) if not inputs.on_host(array) else array
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
        return inputs.contiguous(array if staged else devices.to_device(device, array))

    def _update(self, data: Data, batch: Batch) -> Any:
        plan = self._step.prepare(batch.size, data.inputs)
        try:
            return self._step.run(batch, plan, self.progress)
        except NonFiniteLoss as error:
            inputs.require_finite(data.X, "X", self.net.dtype)  # the culprit is looked for only now
            inputs.require_finite(data.Y, "Y", self.net.dtype)
            error.add_note("a lower learning rate or clip_norm=1.0 may help")
            raise

    # -- whole runs --

    def fit(
        self,
        X: ArrayLike,
        Y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        epochs: int = 10,
        batch_size: int = 256,
        validation: Sequence[Any] | None = None,
        early_stopping: EarlyStopping | None = None,
        callbacks: Sequence[Any] = (),
        shuffle: bool = True,
        progress: bool = True,
    ) -> History:
        """Train for `epochs` passes over the rows, in shuffled mini-batches with a last partial one.

        Args:
            X, Y, sample_weight: as in `step`; scanned once for NaN, infinity and impossible labels.
            validation: `(Xv, Yv)` or `(Xv, Yv, weights)`, evaluated after each epoch.
            early_stopping: when to stop before; the best weights come back.
            callbacks: `mc.Callback` objects, or functions `(trainer, entry)`; one that returns True stops.
            shuffle: a new row order each epoch, from the trainer's seed.
            progress: a bar with rows/s, loss and the validation figure.

        Returns:
            A dict of lists, one entry an epoch: "loss" (mean of J over its steps), "learning_rate" (of its last step),
            "seconds", and with validation "validation_loss" and "validation_accuracy" or "validation_r2".

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came; nothing is trained yet.
            NonFiniteLoss: J or its gradient overflowed; the parameters are as before that step.
        """
        if self.progress.total is not None:
            raise RuntimeError("fit is running: a callback may call step, evaluate and predict, but not fit")
        data = self._scanned(X, Y, sample_weight)
        held_out = self._validation(validation)
        stopping = self._early_stopping(early_stopping, held_out is not None)
        observers = hooks.resolve(callbacks)
        epochs, size = inputs.positive_integer(epochs, "epochs"), inputs.positive_integer(batch_size, "batch_size")
        rows = 0 if data.inputs.host else len(data.X)  # a staged batch is picked on the host
        arrays = self._step.reserve(self._step.fit_buffers(rows, stopping is not None and stopping.restore_best))
        try:
            size = min(size, len(data.X))
            with devices.active(self.net.device):
                return self._fit(data, held_out, arrays, epochs, size, _Watch(stopping), observers, shuffle, progress)
        finally:
            self.progress.total = None
            self._step.untouched = False
            self._step.reserve([])

    def _fit(
        self, data: Data, held_out: Data | None, arrays: dict[str, Array], epochs: int, size: int, watch: _Watch,
        observers: list[hooks.Callback], shuffle: bool, progress: bool,
    ) -> History:  # fmt: skip
        there = arrays.get("row order")  # on the data's device
        order = there if isinstance(there, np.ndarray) else np.empty(len(data.X), np.int64)
        order[...] = 1
        np.subtract(np.cumsum(order, out=order), 1, out=order)  # 0, 1, 2, … without a second array of that size
        count = len(order)
        steps = -(-count // size)
        self.progress.begun, self.progress.total = self.progress.step, epochs * steps
        history: History = {}
        adaptive = _Watch(self._adaptive())
        for observer in observers:
            observer.fit_begin(self)
        from tqdm.auto import tqdm  # not at import: it brings asyncio

        with tqdm(total=epochs * count, unit="row", unit_scale=True, disable=not progress) as bar:
            for epoch in range(1, epochs + 1):
                begin = time.perf_counter()
                if shuffle:
                    self._rng.shuffle(order)
                bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
                if there is not None and there is not order:
                    there[...] = devices.to_device(self.net.device, order)
                entry = {"loss": self._epoch(data, order if there is None else there, size, observers, bar)}
                entry["learning_rate"] = self._optimizer.rate(dataclasses.replace(self.progress, step=self.progress.step - 1))
                if held_out is not None:
                    entry |= {f"validation_{key}": value for key, value in self._evaluate(held_out).items()}
                entry["seconds"] = time.perf_counter() - begin
                for key, value in entry.items():
                    history.setdefault(key, []).append(value)
                bar.set_postfix({k: f"{entry[k]:.4g}" for k in entry if k.startswith(("loss", "validation"))})
                if adaptive.stopping != self._adaptive():  # set in the meantime
                    adaptive = _Watch(self._adaptive())
                if adaptive.sees(entry):
                    adaptive.waited = 0
                    self.progress.reductions += 1
                stop = watch.sees(entry)
                if watch.improved and "best" in arrays:
                    arrays["best"][...] = self.net.parameters
                # every callback sees every epoch: no short cut
                answers = [observer.epoch_end(self, entry) for observer in observers]
                if stop or any(isinstance(answer, bool | np.bool_) and answer for answer in answers):
                    break
        if "best" in arrays and watch.best is not None:
            self.net.parameters[...] = arrays["best"]
        for observer in observers:
            observer.fit_end(self, history)
        return history

    def _epoch(self, data: Data, order: Array, size: int, observers: list[hooks.Callback], bar: Any) -> float:
        """One pass over the rows; the mean of J, each step by its weight. On a GPU nobody waits for J before the end."""
        losses, weights = [], []
        for start in range(0, len(order), size):
            batch = data.batch(order[start : start + size])
            w = self._step.weight(batch)
            if w != 0:  # a batch of rows that weigh nothing says nothing
                J = self._update(data, batch)
                self._step.untouched = not observers
                losses.append(J)
                weights.append(w)
                for observer in observers:
                    observer.step_end(self, J)
            bar.update(batch.size)
        values = [float(J) for J in losses]
        known = [J.weight if w is None else w for J, w in zip(losses, weights, strict=True)]
        return float(np.dot(values, known) / sum(known))

    def _validation(self, validation: Any) -> Data | None:
        if validation is None:
            return None
        if not isinstance(validation, list | tuple) or len(validation) not in (2, 3):
            raise TypeError("validation must be (X, Y) or (X, Y, sample_weight)")
        try:
            data = self._checked(*([*list(validation), None])[:3])
            _require_finite(data, self.loss, self.net)
        except (TypeError, ValueError) as error:
            raise type(error)(f"validation: {error}") from None
        return data

    def _early_stopping(self, stopping: EarlyStopping | None, validated: bool) -> EarlyStopping | None:
        if stopping is None:
            return None
        if not isinstance(stopping, EarlyStopping):
            raise TypeError(f"early_stopping must be mc.EarlyStopping(patience=…); got {stopping!r}")
        figures = [f"validation_{key}" for key in self._figures()] if validated else []
        if stopping.monitor not in ("loss", *figures):
            if stopping.monitor.startswith("validation_") and not validated:
                raise ValueError(f"early_stopping monitors {stopping.monitor!r}, but fit was given no validation=(Xv, Yv)")
            raise unknown("early_stopping: monitor", stopping.monitor, ("loss", *figures))
        return stopping

    def _adaptive(self) -> EarlyStopping | None:
        schedule = self._optimizer.learning_rate
        if not isinstance(schedule, Adaptive):
            return None
        return EarlyStopping(schedule.patience, "loss", schedule.tolerance, restore_best=False)

    # -- evaluation --

    def evaluate(self, X: ArrayLike | Data, Y: ArrayLike | None = None, sample_weight: ArrayLike | None = None) -> Entry:
        """The mean loss over these rows, without penalties, and "accuracy" (classification) or "r2" (regression).

        Accuracy is the share of right classes, of right outputs with binary_cross_entropy. r2 is averaged over the outputs.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came.
        """
        return self._evaluate(self._scanned(X, Y, sample_weight))

    def _figures(self) -> tuple[str, str]:
        return ("loss", "accuracy" if self.loss.classifies else "r2")

    def _evaluate(self, data: Data) -> Entry:
        batch = data.batch(None)
        step = self._step
        rows = step.allocated.rows if step.allocated else planning.WIDEST  # those that are there will do
        plan = step.prepare(min(batch.size, rows), data.inputs)
        scores = _Scores(self.loss, self.net.sizes[-1])

        def see(output: Array, start: int, stop: int) -> None:
            Y, w = (None if x is None else devices.to_host(self.net.device, x[start:stop]) for x in (data.Y, data.weights))
            assert Y is not None
            for i in range(0, stop - start, 256):  # a few rows at a time: what the figures need stays small
                part = slice(i, i + 256)
                piece = output[part]
                if step.objective.matched and not self.loss.classifies:  # S[L], of which r2 wants the activation
                    piece = piece.copy()
                    with np.errstate(all="ignore"):
                        HOST.bias_activation(piece, None, step.objective.output, piece)
                scores.add(piece, Y[part], None if w is None else w[part], from_s=step.objective.matched)

        loss = step.evaluate(batch, plan, see)
        return dict(zip(self._figures(), (loss, scores.result()), strict=True))


def _require_finite(data: Data, loss: loss_sheet.Loss, net: MLP) -> None:
    """The scan of `fit` and `evaluate`: no NaN, no infinity (in the network's dtype), no target outside the loss's range."""
    inputs.require_finite(data.X, "X", net.dtype)
    inputs.require_finite(data.Y, "Y", net.dtype)
    if data.inputs.classes:
        inputs.require_classes(data.Y, net.sizes[-1])
    elif loss.takes_classes:
        inputs.require_distribution(data.Y)
    low, high = {"binary_cross_entropy": (0, 1), "poisson": (0, math.inf)}.get(loss.name, (-math.inf, math.inf))
    inputs.require_range(data.Y, low, high, f"Y: {loss.name}")


class _Watch:
    """The best value so far of the monitored figure, and how long ago it was."""

    def __init__(self, stopping: EarlyStopping | None):
        self.stopping, self.best, self.waited, self.improved = stopping, None, 0, False

    best: float | None

    def sees(self, entry: Entry) -> bool:
        """Take in one epoch; whether patience is at its end."""
        if self.stopping is None:
            return False
        value = entry[self.stopping.monitor]
        self.improved = self.stopping.improves(value, self.best)
        self.waited = 0 if self.improved else self.waited + 1
        self.best = value if self.improved else self.best
        return self.waited >= self.stopping.patience


class _Scores:
    """Accuracy or R², added up over chunks in float64."""

    def __init__(self, loss: loss_sheet.Loss, outputs: int):
        self.loss = loss
        self.right = self.weight = 0.0
        self.moments = np.zeros((3, outputs))  # Σ w (y - z)², Σ w (y - origin), Σ w (y - origin)²
        self.origin: Array | None = None  # y of the first row that weighs anything, so that a shift of Y costs no digits

    def add(self, output: Array, Y: Array, weights: Array | None, from_s: bool) -> None:
        """Take in the outputs of one chunk: S[L] if `from_s`, else Z[L]; both rank classes alike."""
        w = np.ones(len(Y)) if weights is None else weights.astype(np.float64)
        self.weight += float(w.sum())
        if self.loss.takes_classes:
            self.right += float(w @ (output.argmax(axis=1) == (Y if Y.ndim == 1 else Y.argmax(axis=1))))
        elif self.loss.classifies:
            self.right += float(w @ ((output > (0 if from_s else 0.5)) == (Y > 0.5)).mean(axis=1))
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
