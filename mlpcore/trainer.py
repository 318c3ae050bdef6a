"""Training: one step, whole runs, evaluation.

trainer = Trainer(net, loss="cross_entropy", optimizer=AdamW(1e-3))
history = trainer.fit(X, Y, epochs=10, batch_size=256, validation=(Xv, Yv))
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore._version import __version__
from mlpcore.backends import devices
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.checks import arrays, values
from mlpcore.checks.errors import NonFiniteLoss, named, shown
from mlpcore.core import losses as loss_sheet
from mlpcore.core.dropout import rates
from mlpcore.core.ops import Buffer
from mlpcore.core.optimizers import AdamW, Optimizer
from mlpcore.core.schedules import Adaptive, Progress
from mlpcore.core.targets import RowWeights, row_weights
from mlpcore.data.batches import Batch, Data, Inputs
from mlpcore.data.epochs import Rows, Sample, Streamed, inputs_of
from mlpcore.data.open import open_stream
from mlpcore.data.parquet import Parquet
from mlpcore.data.streams import Stream
from mlpcore.engine import plan as planning
from mlpcore.engine.make_step import make_step
from mlpcore.engine.parts import StepParts
from mlpcore.engine.plan import Plan
from mlpcore.engine.workspace import Settings
from mlpcore.io import kinds, model_file
from mlpcore.mlp import MLP, Gradient
from mlpcore.training import callbacks as hooks
from mlpcore.training import saving as files
from mlpcore.training import scores
from mlpcore.training.callbacks import EarlyStopping, Entry
from mlpcore.training.loop import History, Run, State
from mlpcore.training.saving import Checkpoints
from mlpcore.training.scores import Metric

Array = NDArray[Any]
log = logging.getLogger("mlpcore")
_PRECISIONS = ("tf32", "bfloat16", "float16")
EVALUATED = 16 << 20  # bytes of the windows in which a stream is evaluated, at most
LEAST = 64  # rows of a chunk of an evaluation, where the memory allows: fewer take long
FORK_WAITS = 1.0  # seconds that a fork waits for steps of other threads
_trainers: weakref.WeakSet[Trainer] = weakref.WeakSet()
_forking = threading.local()  # the trainers that a thread which forks has paused
_MOST_WORKERS = 1024


class Trainer:
    """Trains one network.

    Args:
        net: the network; its parameters are updated in place.
        loss: a name, `(name, parameter)` or `mc.Loss`, defined on the network's output. None: the
            one that fits it, i.e. cross_entropy behind softmax, binary_cross_entropy behind
            sigmoid, poisson behind exp, else squared_error.
        optimizer: `mc.SGD(0.1)`, `mc.AdamW(1e-3)` (the default), …
        class_weight: what the rows of each class count, a list or {class: weight} (others 1), for
            cross_entropy, and for binary_cross_entropy of one output. J = Σ w ℓ / Σ w C, where C is
            the weight of the row's class, as PyTorch's `weight=`; accuracy does not count it.
        label_smoothing: ε in [0, 1): the target of each class is (1 - ε) y + ε/n_L (cross_entropy),
            of each output (1 - ε) y + ε/2 (binary_cross_entropy).
        pos_weight: what y = 1 counts in binary_cross_entropy, a number or one for each output, as
            PyTorch's.
        l1, l2: J gains l1 Σ|W| + ½ l2 Σ W², over weights, not biases.
        clip_norm: scale the gradient down to this Euclidean norm where it is longer; frozen layers
            do not count.
        dropout: in a step, each output of a hidden layer is zeroed with this probability, and the
            others divided by what is left of 1; or a list of rates, one for each hidden layer.
            Evaluation and prediction drop nothing.
        precision: "tf32", "bfloat16", "float16": for GPUs; a CPU computes in the network's dtype
            and says so.
        memory_limit: bytes, "2 GiB", or a share of the device's free memory ("50%" or 0.5), that
            all the trainer's arrays together may take; sets the chunk.
        chunk_rows: at most so many rows at a time go forward and backward; "auto" fits them to the
            cache.
        deterministic: on CUDA, no timing in the choice of algorithms; NumPy is deterministic
            anyway.
        workers: threads that run chunks of large batches side by side, 1,024 at most; None chooses.
        on_non_finite: "raise" NonFiniteLoss when loss, gradient or update overflows; "skip" that
            step, and count it in `skipped`.
        seed: of the row order in `fit`, and of dropout.

    Attributes:
        about: notes for the files, as far as JSON can hold them: `save` writes them, `load` and
            `mc.MLP.load_with` read them.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """

    def __init__(
        self,
        net: MLP,
        loss: Any = None,
        optimizer: Optimizer | None = None,
        *,
        class_weight: Any = None,
        label_smoothing: float | None = None,
        pos_weight: Any = None,
        l1: float = 0.0,
        l2: float = 0.0,
        clip_norm: float | None = None,
        dropout: float | Sequence[float] | None = None,
        precision: str | None = None,
        memory_limit: float | str | None = None,
        chunk_rows: int | str = "auto",
        deterministic: bool = False,
        workers: int | None = None,
        on_non_finite: str = "raise",
        seed: int = 0,
    ) -> None:
        if not isinstance(net, MLP):
            raise TypeError(f"net must be an mc.MLP; got {type(net).__name__}")
        optimizer = AdamW() if optimizer is None else optimizer
        if not isinstance(optimizer, Optimizer) or type(optimizer) is Optimizer:
            raise TypeError(
                "optimizer must be one such as mc.SGD(0.1) or mc.AdamW(1e-3); got "
                f"{shown(optimizer)}"
            )
        optimizer.require_epsilon(net.dtype.name)
        optimizer.require_layers(net.layout.layers)
        if precision is not None:
            precision = values.one_of(precision, "precision", _PRECISIONS)
        if precision is not None and net.device == "cpu":
            log.warning(
                "precision=%r is for GPUs: on the CPU the network computes in %s",
                precision,
                net.dtype.name,
            )
        elif precision is not None and net.dtype != np.float32:
            raise ValueError(
                f"precision={precision!r} is for a float32 network; this one is {net.dtype.name}"
            )
        if isinstance(chunk_rows, str) and chunk_rows != "auto":
            raise ValueError(
                f"chunk_rows must be 'auto' or a number of rows; got {shown(chunk_rows)}"
            )
        seed = values.seed(seed)
        settings = Settings(
            l1=_penalty(l1, "l1", net),
            l2=_penalty(l2, "l2", net),
            clip_norm=None if clip_norm is None else values.number(clip_norm, "clip_norm", above=0),
            chunk_rows=None
            if isinstance(chunk_rows, str)
            else values.positive_integer(chunk_rows, "chunk_rows"),
            memory_limit=planning.parse_bytes(
                memory_limit, free=lambda: devices.free_bytes(net.device)
            ),
            workers=None
            if workers is None
            else values.positive_integer(workers, "workers", most=_MOST_WORKERS),
            tolerant=values.one_of(on_non_finite, "on_non_finite", ("raise", "skip")) == "skip",
            dropout=rates(dropout, len(net.sizes) - 2),
            seed=seed,
        )
        deterministic = values.boolean(deterministic, "deterministic")
        last = net.activations[-1]
        assert last is not None
        resolved = loss_sheet.resolve(loss_sheet.matching(last) if loss is None else loss)
        resolved = loss_sheet.with_options(
            resolved, class_weight, label_smoothing, pos_weight, net.sizes[-1]
        )
        resolved.require_held(net.dtype.name)
        self._build(net, resolved, optimizer, settings, precision, deterministic, seed)

    def _build(
        self, net: MLP, loss: loss_sheet.Loss, optimizer: Optimizer, settings: Settings, precision: str | None,
        deterministic: bool, seed: int,
    ) -> None:  # fmt: skip
        last = net.activations[-1]
        assert last is not None
        self.net, self.loss, self.deterministic = net, loss, deterministic
        self.progress = Progress()
        self.history: History = {}
        self.about: dict[str, Any] = {}
        self._id = secrets.token_hex(
            8
        )  # kept by files and copies, which may replace its unfinished run
        self._optimizer, self._settings, self._precision, self._seed = (
            optimizer,
            settings,
            precision,
            seed,
        )
        self._calls = threading.RLock()  # held by a call, whatever the thread: one at a time
        self._state = threading.RLock()  # held as well, but not between the steps of `fit`
        self._visitors: dict[object, None] = {}  # who waits for that, or makes use of it
        _trainers.add(self)
        self._run: Run | None = None  # the fit that is under way
        self._unfinished: tuple[State, Array | None] | None = (
            None  # a loaded one, and its best parameters
        )
        self._step = make_step(
            net.device, net.layout, net.store, net.activations, loss_sheet.pair(loss, last), optimizer, settings,
            precision, deterministic,
        )  # fmt: skip

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer's settings; what is set on it counts from the next step on."""
        return self._optimizer

    @property
    def on_non_finite(self) -> str:
        """What becomes of a step whose loss or gradient is not finite: "raise" or "skip"."""
        return "skip" if self._settings.tolerant else "raise"

    @property
    def skipped(self) -> int:
        """Steps left out so far because loss or gradient was not finite; on a GPU it waits for the
        steps.
        """
        self._step.count_skipped(self.progress)
        return self.progress.skipped

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self._optimizer.rate(self.progress)

    @property
    def l1(self) -> float:
        """J gains l1 Σ|W|; what is set counts from the next step on."""
        return self._settings.l1

    @l1.setter
    def l1(self, value: float) -> None:
        self._set(l1=_penalty(value, "l1", self.net))

    @property
    def l2(self) -> float:
        """J gains ½ l2 Σ W²; what is set counts from the next step on."""
        return self._settings.l2

    @l2.setter
    def l2(self, value: float) -> None:
        self._set(l2=_penalty(value, "l2", self.net))

    def _set(self, **settings: Any) -> None:
        self._settings = self._step.settings = dataclasses.replace(self._settings, **settings)

    def __repr__(self) -> str:
        return f"Trainer({self.net!r}, loss={self.loss}, optimizer={self._optimizer!r}, step {self.progress.step})"

    def plan(self, batch_size: int, rows: int = 0, early_stopping: bool = False) -> Plan:
        """The memory table for steps of `batch_size` rows, before anything is allocated; `print`
        it.

        Args:
            batch_size: rows of a batch.
            rows: rows of the data set, for `fit`: adds their order.
            early_stopping: adds the best parameters.

        Raises:
            MemoryError: `memory_limit` cannot be kept; prints the largest buffers.
        """
        size = values.positive_integer(batch_size, "batch_size")
        dtype = self.net.dtype.str
        weight = "" if self.loss.class_weight is None else dtype
        like = Inputs(
            dtype, "int64" if self.loss.takes_classes else dtype, weight, self.loss.takes_classes
        )
        keeps_best = values.boolean(early_stopping, "early_stopping")
        rows = values.positive_integer(rows, "rows", least=0)
        reserved = [*self._step.fit_buffers(rows, keeps_best), *self._row_weights(rows)]
        return self._step.make_plan(size, like, reserved)

    def _row_weights(self, rows: int) -> list[Buffer]:
        """The weights of so many rows where they depend on the class, for the plan."""
        there = rows > 0 and self.loss.class_weight is not None
        return (
            [Buffer("row weights", (rows,), self.net.dtype.name, "by class, times sample_weight")]
            if there
            else []
        )

    # -- one step --

    def prepare(
        self, X: ArrayLike, Y: ArrayLike | None, sample_weight: ArrayLike | None = None
    ) -> Data:
        """The arrays checked and laid out once, to be given to many calls of `step`, `gradient` or
        `evaluate` in place of X.

        An array that is not row-major is copied as a whole; the copy is yours, outside
        `memory_limit`.

        Args, Raises: as `step`. The arrays are scanned for NaN and infinity as in `fit`.
        """
        data = self._scanned(X, Y, sample_weight)
        strided = data.strided().items()
        copies: dict[str, Any] = {
            name: np.array(x, dtype, order="C") for name, (x, dtype) in strided
        }
        return _weighed(data._replace(**copies))

    def step(
        self, X: ArrayLike | Data, Y: ArrayLike | None = None, sample_weight: ArrayLike | None = None, *,
        rows: ArrayLike | None = None,
    ) -> Any:  # fmt: skip
        """One update on these rows. Returns J before it: a float; on a GPU a `DeviceLoss`, which
        stays there until `float(J)`.

        Args:
            X: (m, n_0) numbers, or what `prepare` returned, then without Y and sample_weight.
            Y: (m, n_L) targets; (m,) where there is one output; (m,) class indices or one-hot for
                cross_entropy.
            sample_weight: (m,) row weights, not negative; J divides by their sum over the batch.
            rows: row numbers of a mini-batch within X and Y, read without copying the batch.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came.
            NonFiniteLoss: J, its gradient or the update overflowed; the parameters are as before
                the step.
        """
        with self._calls, self._state:
            data = self._given(X, Y, sample_weight)
            return self._update(data, self._batch(data, rows))

    def gradient(
        self, X: ArrayLike | Data, Y: ArrayLike | None = None, sample_weight: ArrayLike | None = None, *,
        rows: ArrayLike | None = None,
    ) -> tuple[float, Array]:  # fmt: skip
        """J and ∂J/∂parameters of these rows, penalties included, without an update: for `apply`,
        or optimizers of your own.

        It is 0 for frozen layers.

        Dropout is that of the next step: `trainer.progress.step` counts them.

        Returns:
            J, and the gradient laid out as `net.parameters`, on its device; it holds until the
            trainer's next call.

        Args, Raises: as `step`; a J that is not finite is returned as it is.
        """
        with self._calls, self._state, devices.active(self.net.device):
            data = self._given(X, Y, sample_weight)
            batch = self._batch(data, rows)
            J = self._step.loss_and_gradient(
                batch, self._step.prepare(batch.size, data.inputs), self.progress.step + 1
            )
            self.net.predicts_1d = data.flat
            return J, self._step.gradient

    def apply(self, gradient: Gradient | ArrayLike) -> None:
        """Update the parameters by a gradient of yours, as `step` does by its own: schedule,
        clipping, decay, faults, counts.

        `apply` after `trainer.gradient` is `step`, to the bit; in between, the gradients of several
        machines can be averaged. Penalties are not added: `trainer.gradient` includes them,
        `net.backward` does not. On a GPU it waits for the update.

        Args:
            gradient: flat, laid out as `net.parameters`, from any library and of any number type;
                or what `net.backward` returned. It is only read, unless it is the trainer's own
                array.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came.
            NonFiniteLoss: the gradient is not finite, or the update would overflow; the parameters
                are as before. With on_non_finite="skip" the step is counted as skipped instead.
        """
        if isinstance(gradient, tuple) and not isinstance(gradient, Gradient):
            raise TypeError(
                "gradient must be one flat array; got a tuple: trainer.gradient returns J and the "
                "gradient"
            )
        flat = gradient.flat if isinstance(gradient, Gradient) else gradient
        device, size = self.net.device, self.net.layout.size
        with self._calls, self._state, devices.active(device):
            array = arrays.numeric(flat, "gradient", devices.adopter(device))
            if array.shape != (size,):
                raise ValueError(
                    f"gradient must be laid out as net.parameters, ({size},); got {array.shape}"
                )
            self._step.apply(devices.to_device(device, array), self.progress)

    def parts(
        self, X: ArrayLike | Data, Y: ArrayLike | None = None, sample_weight: ArrayLike | None = None, *,
        rows: ArrayLike | None = None,
    ) -> StepParts:  # fmt: skip
        """Take the step on these rows apart, to measure it: its graphs, its matrix products alone,
        what was chosen. CUDA only.

        Nothing is updated here, but replaying the step's graph updates the parameters; see
        `StepParts`.

        Args, Raises: as `step`; DeviceUnavailable where steps are not captured, as on a CPU.
        """
        with self._calls, self._state, devices.active(self.net.device):
            data = self._given(X, Y, sample_weight)
            batch = self._batch(data, rows)
            return self._step.parts(
                batch, self._step.prepare(batch.size, data.inputs), self.progress
            )

    def _given(
        self, X: ArrayLike | Data, Y: ArrayLike | None, sample_weight: ArrayLike | None
    ) -> Data:
        if not isinstance(X, Data):
            return self._checked(X, Y, sample_weight)
        if Y is not None or sample_weight is not None:
            raise TypeError(
                "Y and sample_weight must be left out where X is what prepare returned: it holds "
                "them"
            )
        if X.by_class != self.loss.class_weight:
            raise ValueError(
                f"X was prepared by a trainer with class_weight={X.by_class}; this one has "
                f"{self.loss.class_weight}"
            )
        return X

    def _scanned(
        self, X: ArrayLike | Data, Y: ArrayLike | None, sample_weight: ArrayLike | None
    ) -> Data:
        data = self._given(X, Y, sample_weight)
        if data is not X:
            _require_finite(data, self.loss, self.net)
        return data

    def _batch(self, data: Data, rows: ArrayLike | None) -> Batch:
        index = arrays.row_index(rows, len(data.X), adopt=devices.adopter(self.net.device))
        if index is not None:
            index = self._laid(index, data.inputs.host)
        batch = data.batch(index)
        if self._step.weight(batch) == 0:
            by_class = "" if self.loss.class_weight is None else ", times class_weight,"
            raise ValueError(
                f"sample_weight{by_class} must not be all zero on the rows of the batch"
            )
        return batch

    def _checked(self, X: ArrayLike, Y: ArrayLike | None, sample_weight: ArrayLike | None) -> Data:
        device = self.net.device
        adopt = devices.adopter(device)
        x = arrays.matrix(X, self.net.sizes[0], adopt=adopt)
        given = arrays.numeric(Y, "Y", adopt)
        y, classes = arrays.target(given, len(x), self.net.sizes[-1], self.loss, adopt=adopt)
        w = arrays.weights(sample_weight, len(x), adopt=adopt)
        staged = device != "cpu" and not devices.open_device(device).holds(x)
        y, w = self._laid(y, staged), None if w is None else self._laid(w, staged)
        lazy = device == "cpu" and self.loss.class_weight is not None
        by_class: Any = (
            RowWeights(self.loss, y, w, self.net.dtype) if lazy else self._by_class(y, w)
        )
        if by_class is not None and (lazy or arrays.on_host(by_class)) and not by_class.any():
            raise ValueError("sample_weight, times class_weight, must not be all zero")
        flat = not classes and given.ndim == 1
        return Data.of(
            self._laid(x, staged), y, w, classes, staged, by_class, self.loss.class_weight, flat
        )

    def _by_class(
        self, Y: Array, weights: Array | None, place: Array | None = None
    ) -> Array | None:
        """Return the rows' weights times those of their classes, in `place` if it is given; None
        without class weights.
        """
        if self.loss.class_weight is None:
            return None
        xp = np if arrays.on_host(Y) else devices.module(self.net.device)
        found: Array = xp.empty(len(Y), self.net.dtype) if place is None else place[: len(Y)]
        row_weights(self.loss, Y, weights, found, xp)
        return found

    def _laid(self, array: Array, staged: bool) -> Array:
        """Return the array where X lies, on the host if it is staged, for rows to be gathered."""
        device = self.net.device
        if staged:
            array = devices.to_host(device, array) if not arrays.on_host(array) else array
        return arrays.by_rows(array if staged else devices.to_device(device, array))

    def _update(self, data: Data, batch: Batch) -> Any:
        plan = self._step.prepare(batch.size, data.inputs)
        try:
            J = self._step.run(batch, plan, self.progress)
        except NonFiniteLoss as error:
            raise self._explained(error, data, batch) from None
        self.net.predicts_1d = data.flat
        return J

    def _explained(self, error: NonFiniteLoss, data: Data, batch: Batch) -> Exception:
        """The error with the layer where it began; or another one, if the data are to blame. Looked
        for only now.
        """
        arrays.require_finite(data.X, "X", self.net.dtype)
        arrays.require_finite(data.Y, "Y", self.net.dtype)
        layer = self._step.first_not_finite(batch, self._step.prepare(batch.size, data.inputs))
        where = "" if layer is None else f"; it began in layer {layer} of {self.net.layout.layers}"
        explained = NonFiniteLoss(f"{error}{where}", error.step, error.learning_rate, layer)
        explained.add_note("a lower learning rate or clip_norm=1.0 may help")
        return explained

    # -- whole runs --

    def fit(
        self,
        X: Any,
        Y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        epochs: int = 10,
        batch_size: int = 256,
        validation: Sequence[Any] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        early_stopping: EarlyStopping | None = None,
        callbacks: Sequence[Any] = (),
        shuffle: bool = True,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        every: str = "1 epoch",
        keep: int = 1,
    ) -> History:
        """Train for `epochs` passes over the rows, in shuffled mini-batches with a last partial
        one.

        An `unfinished` run goes on if the call is as before. Compared are batch_size, shuffle,
        early_stopping, the names of metrics, and of X, Y, sample_weight and validation the number
        of rows and their values as the network computes with them: all up to 1 MiB, of more up to
        16 blocks of 64 KiB spread over the rows. Their container and dtype may be others. Batches
        as they come, callbacks and the functions behind metrics are not compared. `epochs` may be
        another number that is not below what is done; schedules that read the length of the run
        follow it. After the last epoch, where only the last save is missing, it may not if early
        stopping has put the best parameters back. A run of which no batch is done is begun anew by
        any call.

        Args:
            X, Y, sample_weight: as in `step`; scanned once for NaN, infinity and impossible labels.
                Rows that lie in files are read block by block as they are needed, a block ahead,
                and shuffled in blocks: `np.memmap`, Zarr, h5py, or in place of X and Y
                `mc.Parquet(path, target)`, an iterable of batches `(X, Y)` or `(X, Y, weights)`
                that can be iterated once an epoch, or a function that returns one.
            validation: `(Xv, Yv)` or `(Xv, Yv, weights)`, evaluated after each epoch; also
                `mc.Parquet` or a function.
            metrics: functions of the validation rows by name, as in `evaluate`.
            early_stopping: when to stop before; the best weights come back.
            callbacks: `mc.Callback` objects, or functions `(trainer, entry)`; one that returns True
                stops.
            shuffle: a new row order each epoch, from the trainer's seed.
            progress: a bar with rows/s, loss and the validation figure.
            checkpoint: a file that `Trainer.load` can go on from, written at the end and meanwhile,
                atomically. SIGINT and SIGTERM then finish the step, save, and end the run. Whatever
                else ends it before its time, but NonFiniteLoss, leaves it `unfinished` in this
                trainer as well. Without a checkpoint a run that stops is over: the next `fit`
                trains on from there.
            every: how often: "1000 steps", "5 min", "1 epoch".
            keep: versions of the file to keep; those before are `name.1.suffix`, …

        Returns:
            A dict of lists, one entry an epoch: "loss" (mean of J over its steps), "learning_rate"
            (of its last step), "seconds", with validation "validation_loss", "validation_accuracy"
            or "validation_r2" and a "validation_<name>" for each metric, and with
            on_non_finite="skip" "skipped" (steps so far).

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came; nothing is
                trained yet, unless a number that is not finite, or a label, lies further on in a
                file. Numbers that a checkpoint could not count are refused here: epochs times
                batches must be below 2^63.
            NonFiniteLoss: J, its gradient or an update overflowed; the parameters, and the
                checkpoint, are as before that step.
            OSError: the checkpoint cannot be written; the one before is intact. The run is
                `unfinished`: it can be saved elsewhere, and the same call goes on with it; where
                only the last save is missing, it trains no further step and tells no callback
                again. At the start, when nothing is trained
                yet: no file can be written there, another training writes it, or it is not a
                    checkpoint, or
                holds another trainer's unfinished run.
        """
        with self._calls, contextlib.ExitStack() as leaving:
            if self._run is not None:
                raise RuntimeError(
                    "fit is running: a callback may call step, evaluate and predict, but not fit"
                )
            leaving.callback(self._release_state)
            self._state.acquire()
            return self._fit(
                X, Y, sample_weight, epochs, batch_size, validation, metrics, early_stopping, callbacks, shuffle, progress,
                checkpoint, every, keep, leaving,
            )  # fmt: skip

    def _release_state(self) -> None:
        with contextlib.suppress(RuntimeError):  # an interrupt while `fit` waited for it
            self._state.release()

    @contextlib.contextmanager
    def _away(self) -> Iterator[None]:
        """Let other threads save meanwhile, and those that wait already before the block ends."""
        self._state.release()
        try:
            yield
        finally:
            waiting = [*self._visitors]
            while any(one in self._visitors for one in waiting):
                time.sleep(0.001)  # a lock would be this thread's again at once
            self._state.acquire()

    @contextlib.contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Wait until no step is under way, for a call that may come between two steps of another
        thread's `fit`.
        """
        visitor = object()
        try:
            self._visitors[visitor] = None
            with self._state:
                yield
        finally:
            self._visitors.pop(visitor, None)

    def _fit(
        self, X: Any, Y: Any, sample_weight: Any, epochs: int, batch_size: int, validation: Any, metrics: Any,
        early_stopping: EarlyStopping | None, callbacks: Any, shuffle: bool, progress: bool, checkpoint: Any, every: str,
        keep: int, leaving: contextlib.ExitStack,
    ) -> History:  # fmt: skip
        self._step.require_whole()
        table = self._held(X, Y, sample_weight)
        held_out = self._validation(validation)
        measures = self._metrics(metrics, held_out)
        if measures and held_out is None:
            raise ValueError(
                "metrics are measured on the validation rows, but fit was given no validation=(Xv, "
                "Yv)"
            )
        stopping = self._early_stopping(early_stopping, held_out is not None, measures)
        observers = hooks.resolve(callbacks)
        shuffle, progress = values.boolean(shuffle, "shuffle"), values.boolean(progress, "progress")
        epochs, size = (
            values.positive_integer(epochs, "epochs"),
            values.positive_integer(batch_size, "batch_size"),
        )
        checkpoints = None if checkpoint is None else Checkpoints(checkpoint, every, keep)
        if checkpoints is None and every != "1 epoch":
            log.warning("every=%s saves nothing without checkpoint=…", shown(every))
        if checkpoints is not None:
            files.describe(
                self._optimizer
            )  # what cannot be saved is noticed here, not after an hour
            model_file.as_json(self.about, "about")
        self._require_followed(self._optimizer.learning_rate, held_out is not None, measures)
        monitor = None if stopping is None else dataclasses.asdict(stopping)
        rows = len(table.X) if isinstance(table, Data) else table.rows
        size = size if rows is None else min(size, rows)
        state = State(epochs, size, shuffle, rows, held_out is not None, monitor, sorted(measures))
        state, best, begins = self._begin(state, table, held_out)
        if state.epoch < epochs:  # a schedule without a rate is noticed before anything changes
            self._optimizer.rate(
                dataclasses.replace(begins, epochs=begins.epochs + (state.batch == 0))
            )
        keeps_best = stopping is not None and stopping.restore_best
        claim = checkpoints.claimed(self, self._id) if checkpoints else contextlib.nullcontext()
        if checkpoints is not None:
            leaving.enter_context(checkpoints.signals)  # obeyed when all below is done
        try:
            with devices.active(self.net.device), claim:
                arrays, source = self._source(table, size, keeps_best)
                if best is not None:
                    arrays["best"][...] = devices.to_device(self.net.device, best)
                keeper = arrays.get("best")
                run = Run(
                    self,
                    source,
                    state,
                    held_out,
                    measures,
                    stopping,
                    keeper,
                    observers,
                    checkpoints,
                )
                self._run, self._unfinished = run, (state, best) if checkpoints else None
                self.progress.begun, self.progress.total = begins.begun, begins.total
                return self._go(run, progress)
        finally:
            self._rest()

    def _rest(self) -> None:
        """Be a trainer at rest: no `fit` is under way."""
        self._run = None
        if self._unfinished is None:
            self.progress.total = None
        self._step.untouched = False
        self._step.reserve([])

    def _renew(self) -> None:
        """Begin anew in a forked process, where the other threads are not, nor what they were doing
        with this trainer.
        """
        self._visitors.clear()
        if not self._state.acquire(blocking=False):
            self._state = threading.RLock()
            self._state.acquire()
        self._state.release()
        if self._calls.acquire(blocking=False):
            self._calls.release()
            return
        self._calls = threading.RLock()
        self._step.renew()
        self._rest()

    def _go(self, run: Run, progress: bool) -> History:
        """Train to the end; return the history. With a checkpoint, what stops before is unfinished."""
        try:
            try:
                return run.go(progress)
            except (KeyboardInterrupt, SystemExit) as error:
                run.leave(error)
                raise
            finally:
                if self._unfinished is not None:
                    run.pause()
                    best = run.best_so_far()
                    kept_best = (
                        None if best is None else devices.to_host(self.net.device, best).copy()
                    )
                    self._unfinished = run.state, kept_best
        except NonFiniteLoss:
            self._unfinished = None  # the step would overflow again
            raise

    def _begin(
        self,
        new: State,
        table: Data | Stream,
        held_out: Data | Stream | None,
    ) -> tuple[State, Array | None, Progress]:
        """Return state, best parameters and progress with which a call of `fit` begins, or goes on.

        Raises:
            ValueError: another call than that of the unfinished run; names the argument.
        """
        left, best = (None, None) if self._unfinished is None else self._unfinished
        if left is not None and not (left.epoch or left.batch):  # nothing is done: any call begins
            left, best = None, None
        if left is not None:
            left.require_same(new)
        device, loss, dtype = self.net.device, self.loss, self.net.dtype
        with devices.active(device):
            for name, rows in (("data", table), ("held_out", held_out)):
                setattr(new, name, Sample.of(rows, loss, dtype, device, getattr(left, name, None)))
        if left is None:
            size = new.batch_size
            steps = -(-len(table.X) // size) if isinstance(table, Data) else table.batches(size)
            left, begun = new, self.progress.step
        else:
            left.require_same_rows(new)
            total, begun = self.progress.total, self.progress.begun
            steps = None if total is None else total // left.epochs
        if steps is not None and new.epochs * steps > values.LARGEST:
            raise ValueError(
                f"epochs must be at most {values.LARGEST // steps}, with {steps} batches in each; "
                f"got {new.epochs}"
            )
        total = None if steps is None else new.epochs * steps
        state = dataclasses.replace(left, epochs=new.epochs)
        if new.epochs > left.epochs:
            state.ended, state.told = False, 0
        state.data, state.held_out = left.data or new.data, left.held_out or new.held_out
        return state, best, dataclasses.replace(self.progress, begun=begun, total=total)

    def _source(
        self, table: Data | Stream, size: int, keeps_best: bool
    ) -> tuple[dict[str, Array], Rows | Streamed]:  # fmt: skip
        """The arrays of a `fit` beside those of the steps, and where its batches come from."""
        device, step = self.net.device, self._step
        if isinstance(table, Data):
            table = _weighed(table)
            rows = 0 if table.inputs.host else len(table.X)
            buffers, weights = step.fit_buffers(rows, keeps_best), self._row_weights(rows)
            copies = self._copies(table, size, [*buffers, *weights])
            if device == "cpu":
                arrays = step.reserve([*buffers, *copies.values()], weights)
            else:  # the copies are the host's
                arrays = step.reserve(buffers, weights)
                arrays |= planning.allocate(NumpyOps(), list(copies.values()))
            made: dict[str, Any] = {name: arrays[buffer.name] for name, buffer in copies.items()}
            for name, array in made.items():
                array[...] = getattr(table, name)
            return arrays, Rows(table._replace(**made), size, arrays.get("row order"), device)
        given = inputs_of(table, self.loss, self.net.dtype.str)
        buffers, limit = step.fit_buffers(0, keeps_best), self._settings.memory_limit
        if limit is not None and given is not None and device == "cpu":
            limit = max(0, limit - step.make_plan(1, given, buffers).total_bytes) // 2
        windows = table.buffers(size, limit)
        windows += self._row_weights(windows[0].shape[0] if windows else 0)
        if device == "cpu":
            arrays = step.reserve([*buffers, *windows])
        else:  # the windows are the host's
            arrays = step.reserve(buffers) | planning.allocate(NumpyOps(), windows)
        lay = functools.partial(self._laid_piece, place=arrays.get("row weights"))
        return arrays, Streamed(table, size, arrays, lay)

    def _copies(self, table: Data, size: int, reserved: list[Buffer]) -> dict[str, Buffer]:
        """Return the row-major copies of what is not, which a shuffled epoch reads faster, by name.

        There are none where `memory_limit` leaves them no room beside chunks of the usual size.
        """
        why = "a copy that rows are gathered from faster"
        copies = {
            name: Buffer(f"{name} row-major", x.shape, dtype.str, why)
            for name, (x, dtype) in table.strided().items()
        }
        if self._settings.memory_limit is None or self.net.device != "cpu" or not copies:
            return copies
        alone = self._step.make_plan(size, table.inputs, reserved)
        try:
            beside = self._step.make_plan(size, table.inputs, [*reserved, *copies.values()])
        except MemoryError:
            return {}
        return copies if (beside.rows, beside.workers) == (alone.rows, alone.workers) else {}

    def _laid_piece(
        self, X: Array, Y: Array, sample_weight: Array | None, place: Array | None = None
    ) -> Data:
        """A piece of a stream, whose values the stream has looked at; its weights may be all zero."""
        staged = self.net.device != "cpu"
        x = arrays.matrix(X, self.net.sizes[0])
        y, classes = arrays.target_form(Y, len(x), self.net.sizes[-1], self.loss)
        w = (
            None
            if sample_weight is None
            else self._laid(arrays.numeric(sample_weight, "sample_weight"), staged)
        )
        y = self._laid(y, staged)
        return Data.of(
            self._laid(x, staged), y, w, classes, staged, self._by_class(y, w, place), self.loss.class_weight,
            not classes and Y.ndim == 1,
        )  # fmt: skip

    def _require_stream_targets(self, Y: Array, name: str, first: int) -> None:
        y, classes = arrays.target_form(Y, len(Y), self.net.sizes[-1], self.loss, name)
        _require_targets(y, classes, self.loss, self.net, name, first)

    @contextlib.contextmanager
    def _at_rest(self, history: History) -> Iterator[None]:
        """Be a trainer at rest, which is what is saved at a run's end; be in the run again if the
        saving fails.
        """
        before = self._run, self._unfinished, self.history, self.progress.total
        self._run, self._unfinished, self.history, self.progress.total = None, None, history, None
        try:
            yield
            before = None, None, self.history, None
        finally:
            self._run, self._unfinished, self.history, self.progress.total = before

    @property
    def unfinished(self) -> str | None:
        """The place where the run stopped with which the same call of `fit` goes on; None if there
        is none.

        The run is that of a loaded checkpoint, or one with `checkpoint=` that this trainer could
        not end.
        """
        return None if self._unfinished is None or self._run else str(self._unfinished[0])

    @property
    def unsaved(self) -> bool:
        """True if the `unfinished` run has ended but for its last save, which failed."""
        return self._unfinished is not None and self._unfinished[0].ended and self._run is None

    def abandon(self) -> None:
        """Give up the unfinished run: the next `fit` begins a new one, from the parameters and
        optimizer state as they are.
        """
        self._unfinished = None
        self.progress.total = None

    def _validation(self, validation: Any) -> Data | Stream | None:
        if validation is None:
            return None
        parts = (
            [validation] if isinstance(validation, Parquet) or callable(validation) else validation
        )
        if not isinstance(parts, list | tuple) or (
            parts is validation and len(parts) not in (2, 3)
        ):
            raise TypeError(
                "validation must be (X, Y), (X, Y, sample_weight), mc.Parquet(…) or a function "
                "that returns batches"
            )
        try:
            return self._held(*([*list(parts), None, None])[:3])
        except (TypeError, ValueError) as error:
            raise named("validation", error) from None

    def _held(self, X: Any, Y: Any, sample_weight: Any) -> Data | Stream:
        """What is evaluated: checked arrays, or a stream."""
        stream = None if isinstance(X, Data) else open_stream(X, Y, sample_weight, self.net.dtype)
        if stream is None:
            return self._scanned(X, Y, sample_weight)
        columns, takes = stream.columns, self.net.sizes[0]
        if columns is not None and columns != takes:
            raise ValueError(f"X has {columns} columns; the network takes {takes}")
        if stream.like is not None and stream.rows is not None:
            Y = stream.like[1]
            Y = np.broadcast_to(np.zeros((), Y.dtype), (stream.rows, *Y.shape[1:]))
            arrays.target_form(Y, stream.rows, self.net.sizes[-1], self.loss)
        stream.require_targets = self._require_stream_targets
        return stream

    def _metrics(self, metrics: Any, held: Data | Stream | None) -> dict[str, Metric]:
        """Return the user's metrics, checked as far as can be before the rows are read."""
        measures = scores.require_metrics(metrics, self.loss)
        if isinstance(held, Data):
            for name, metric in measures.items():
                scores.require_weights_taken(name, metric, held.weights is not None)
        return measures

    def _early_stopping(
        self, stopping: EarlyStopping | None, validated: bool, measures: Mapping[str, Metric]
    ) -> EarlyStopping | None:
        if stopping is None:
            return None
        if not isinstance(stopping, EarlyStopping):
            raise TypeError(
                f"early_stopping must be mc.EarlyStopping(patience=…); got {shown(stopping)}"
            )
        self._require_figure("early_stopping", stopping, validated, measures)
        return stopping

    def _require_followed(self, rate: object, validated: bool, measures: Collection[str]) -> None:
        """Raise a ValueError if a schedule follows a figure that the history will not have."""
        if isinstance(rate, Adaptive):
            self._require_figure("learning_rate: Adaptive", rate, validated, measures)

    def _require_figure(
        self,
        argument: str,
        monitored: EarlyStopping | Adaptive,
        validated: bool,
        measures: Collection[str],
    ) -> None:
        """Raise a ValueError if `fit`'s history will not have the figure, or nobody says which side
        of it is better.
        """
        monitor = monitored.monitor
        figures = (
            [f"validation_{key}" for key in (*scores.names(self.loss), *measures)]
            if validated
            else []
        )
        if monitor.startswith("validation_") and not validated:
            raise ValueError(
                f"{argument} monitors {monitor!r}, but fit was given no validation=(Xv, Yv)"
            )
        values.one_of(monitor, f"{argument}: monitor", ("loss", *figures))
        if monitored.mode is None and monitor.removeprefix("validation_") in measures:
            raise ValueError(
                f"{argument} monitors {monitor!r}: say which is better, mode='min' or mode='max'"
            )

    # -- checkpoints and copies --

    def _description(self) -> dict[str, Any]:
        """Return all but arrays as what JSON can hold, with the lists that `files.pack` takes out.

        Raises:
            TypeError, ValueError: the optimizer has been given settings that could not be loaded
                again.
        """
        self._optimizer.require_epsilon(self.net.dtype.name)
        self._optimizer.require_layers(self.net.layout.layers)
        run = self._run.state if self._run else self._unfinished[0] if self._unfinished else None
        return {
            "loss": dict(vars(self.loss)), "optimizer": files.describe(self._optimizer),
            "settings": dataclasses.asdict(self._settings),
            "id": self._id, "precision": self._precision,
            "deterministic": self.deterministic, "seed": self._seed, "device": self.net.device,
            "progress": files.describe_progress(self.progress), "history": dict(self.history),
            "run": None if run is None else run.describe(),
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str], keep: int = 1) -> None:
        """Write all that the training depends on to a safetensors file, atomically; also while
        `fit` runs.

        Args:
            path: of the file.
            keep: versions to keep; those before are `name.1.suffix`, `name.2.suffix`, …

        Raises:
            OSError: the file cannot be written, or there is one that is not mlpcore's, or another
                trainer's unfinished run; what was there before is intact.
            TypeError: optimizer or schedule is a class of the user's own, or JSON cannot hold
                `about`.
        """
        with self._between_steps():
            run = self._run
            if run is not None:
                run.pause()
            self._step.count_skipped(self.progress)
            vectors, facts = self._step.snapshot()
            best = run.best_so_far() if run else self._unfinished[1] if self._unfinished else None
            tensors = {
                "parameters": devices.to_host(self.net.device, self.net.store.flat),
                **vectors,
            }
            if best is not None:
                tensors["best"] = devices.to_host(self.net.device, best)
            versions = {"mlpcore": __version__, "numpy": np.__version__}
            keep = values.positive_integer(keep, "keep")
            kinds.require_replaceable(values.path(path), kinds.TRAINERS, keep, self._id)
            described = {**self._description(), "step": facts, "versions": versions}
            lists = {name: files.pack(part, names) for name, part, names in _lists(described)}
            tensors |= {name: numbers for name, numbers in lists.items() if len(numbers)}
            header = {"version": model_file.NEWEST, **self.net.header(), "trainer": described}
            if self.about:
                header["about"] = self.about
            model_file.write(path, header, tensors, keep, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto") -> Trainer:
        """The trainer of a file that `save`, or `fit(checkpoint=…)`, wrote.

        On the same machine the training goes on as if it had never stopped, to the bit. If it was
        in the middle of a `fit` (`unfinished` says where), the same call of `fit` goes on there.
        Callbacks and data are not in the file, but digests of the data are, which `fit` compares.
        After the end of a run it begins a new one.

        Raises:
            FileNotFoundError, OSError: it cannot be read.
            ValueError: it is no such file, a damaged one, or one of a newer version.
        """
        devices.choose(device)
        header, tensors = model_file.read(path)
        if "trainer" not in header:
            raise ValueError(
                f"{str(path)!r} holds a network without a trainer: load it by mc.MLP.load"
            )
        net = MLP.from_header(path, header, tensors, device)
        try:
            described = header["trainer"]
            for name, part, names in _lists(described):
                files.unpack(part, names, tensors.pop(name, np.empty(0)))
            loss, optimizer = (
                loss_sheet.Loss(**described["loss"]),
                files.optimizer(described["optimizer"]),
            )
            trainer = cls(net, loss, optimizer, **files.arguments(described))
            trainer._go_on(described, tensors)
            trainer.about = files.typed_value(header.get("about", {}), dict[str, Any], "about")
        except (
            ArithmeticError,
            AttributeError,
            KeyError,
            IndexError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            raise ValueError(f"{str(path)!r} does not hold a trainer: {error!r}") from None
        return trainer

    def _go_on(self, described: dict[str, Any], tensors: dict[str, Array]) -> None:
        self.progress = files.progress(described["progress"])
        self.history = files.typed_value(described["history"], History, "history")
        self._id = files.typed_value(described.get("id", ""), str, "id")
        if described["run"] is not None:
            state, best = State.read(described["run"]), tensors.pop("best", None)
            if best is not None and (best.shape, best.dtype) != (
                self.net.store.flat.shape,
                self.net.dtype,
            ):
                raise ValueError(
                    f"best: {best.dtype} {best.shape}, where the parameters are "
                    f"{self.net.layout.size}"
                )
            self._unfinished = state, best
        self._step.restore(tensors, described["step"])
        if described["device"] != self.net.device:
            log.warning(
                "saved on %s, goes on on %s: not equal to the bit",
                described["device"],
                self.net.device,
            )

    def __getstate__(self) -> dict[str, Any]:
        with self._calls, self._state:
            if self._run is not None:
                raise RuntimeError("a trainer cannot be copied or pickled while fit runs")
            self._step.count_skipped(self.progress)
            vectors, facts = self._step.snapshot()
            kept = ("net", "loss", "_optimizer", "_settings", "_precision", "deterministic", "_seed", "progress", "history",
                    "about", "_id", "_unfinished")  # fmt: skip
            return {name: getattr(self, name) for name in kept} | {
                "vectors": vectors,
                "facts": facts,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build(
            *(
                state[name]
                for name in (
                    "net",
                    "loss",
                    "_optimizer",
                    "_settings",
                    "_precision",
                    "deterministic",
                    "_seed",
                )
            )
        )
        self.progress, self.history, self._unfinished = (
            state["progress"],
            state["history"],
            state["_unfinished"],
        )
        self.about, self._id = state["about"], state["_id"]
        self._step.restore(state["vectors"], state["facts"])

    # -- evaluation --

    def evaluate(
        self, X: Any, Y: ArrayLike | None = None, sample_weight: ArrayLike | None = None, *,
        metrics: Mapping[str, Metric] | None = None,
    ) -> Entry:  # fmt: skip
        """Return the mean loss over these rows, without penalties, "accuracy" (classification) or
        "r2", and metrics.

        Accuracy is the share of right classes, of right outputs with binary_cross_entropy; class
        weights, label smoothing and pos_weight count in the loss alone. r2 is the mean over the
        outputs; that of an output whose target is constant is 1 for perfect predictions, else 0, as
        scikit-learn's `r2_score` has it.

        Args:
            X, Y, sample_weight: as in `fit`.
            metrics: `{name: function}`, where `function(Y, output)` returns a number, as those of
                `sklearn.metrics` do; where rows have weights it gets `sample_weight` (m,), too. It
                is given all rows at once, on the host: targets as Y has them, outputs as
                `net.predict` gives them after training on this Y (behind softmax and sigmoid:
                probabilities). They are kept until then, outside `memory_limit`. Rows of streamed
                windows that weigh nothing are left out.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came; of metrics
                the one at fault.
        """
        with self._calls, self._state, devices.active(self.net.device):
            held = self._held(X, Y, sample_weight)
            return self._evaluate(held, self._metrics(metrics, held))

    def losses(self, X: Any, Y: ArrayLike | None = None) -> Array:
        """Return the loss ℓ of each row, without weights and penalties: (m,) float64, on the host.

        Their mean, with row weights the weighted one, is the "loss" of `evaluate`; with class
        weights each is divided by the weight of the row's class, which counts among the row
        weights. Where loss and output match they are computed from the logits, so that no row
        overflows or is rounded to 0.

        Args:
            X, Y: as in `fit`; weights that they come with do not count.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came.
        """
        with self._calls, self._state, devices.active(self.net.device):
            held = self._held(X, Y, None)
            rows = len(held.X) if isinstance(held, Data) else held.rows
            losses, at = np.empty(rows or 0), 0

            def see(output: Array, Y: Array, weights: Array | None) -> None:
                nonlocal losses, at
                found = scores.row_losses(self._step.objective, output, Y)
                if rows is None:
                    losses = np.append(losses, found)
                losses[at : at + len(found)] = found
                at += len(found)

            with contextlib.closing(self._windows(held)) as windows:
                for data in windows:
                    given = data.inputs._replace(w_dtype="")
                    self._evaluate_data(data._replace(weights=None, given=None, inputs=given), see)
        return losses

    def _evaluate(self, held: Data | Stream, metrics: Mapping[str, Metric]) -> Entry:
        objective, flat = self._step.objective, False
        found, collected = scores.Scores(objective, self.net.sizes[-1]), scores.Collected(objective)

        def see(output: Array, Y: Array, weights: Array | None) -> None:
            found.add(output, Y, weights)
            if metrics:
                collected.add(output, Y, weights)

        losses, weights = [], []
        with contextlib.closing(self._windows(held)) as windows:
            for data in windows:
                w = self._step.weight(data.batch(None)) or 0.0
                if w or isinstance(held, Data):
                    losses.append(self._evaluate_data(data, see))
                    weights.append(w)
                    flat = data.flat
                elif data.by_class:  # their classes weigh nothing: accuracy counts them
                    plain = Data.of(
                        data.X, data.Y, data.given, data.inputs.classes, data.inputs.host
                    )
                    if self._step.weight(plain.batch(None)):
                        self._evaluate_data(plain, see)
        if not sum(weights) < math.inf:
            raise ValueError(
                f"sample_weight sums to {sum(weights):g}, out of the range of float64: rescale the "
                "weights"
            )
        loss = losses[0] if len(losses) == 1 else float(np.average(losses, weights=weights))
        own = collected.measure(metrics, flat) if metrics else {}
        return dict(zip(scores.names(self.loss), (loss, found.result()), strict=True)) | own

    def _windows(self, held: Data | Stream) -> Generator[Data, None, None]:
        """Yield what is evaluated, a stream window by window."""
        if isinstance(held, Data):
            yield held
            return
        size, buffers = self._evaluation_windows(held)
        here = self.net.device == "cpu"  # on a GPU the windows are the host's
        with contextlib.ExitStack() as stack:
            lend = self._step.lent(buffers) if here else None
            arrays = stack.enter_context(lend) if lend else planning.allocate(NumpyOps(), buffers)
            lay = functools.partial(self._laid_piece, place=arrays.get("row weights"))
            source = Streamed(held, size, arrays, lay)
            for data, _ in stack.enter_context(contextlib.closing(source.windows(0, None, 0))):
                yield data

    def _evaluation_windows(self, stream: Stream) -> tuple[int, list[Buffer]]:
        """Return rows of which windows are multiples, and the windows, in half of what a plan
        leaves.
        """
        given, limit = inputs_of(stream, self.loss, self.net.dtype.str), self._settings.memory_limit
        most, size = EVALUATED, planning.WIDEST
        if limit is not None and given is not None and self.net.device == "cpu":
            least = self._step.make_plan(1, given, self._step.reserved)
            most = min(most, max(0, limit - least.total_bytes) // 2)

        def windows(size: int) -> list[Buffer]:
            every = stream.buffers(size, most)
            found = [x for x in every if not x.name.startswith("order")]  # rows come as they lie
            return found + self._row_weights(found[0].shape[0] if found else 0)

        if limit is not None and planning.part_bytes(windows(size)) > most:
            size = 1
        return size, windows(size)

    def _evaluate_data(
        self, data: Data, see: Callable[[Array, Array, Array | None], None]
    ) -> float:
        """Return the mean loss; `see` gets each chunk on the host, as `Scores.add` takes it."""
        batch, step = data.batch(None), self._step
        # the arrays that are there will do, unless those of a short batch are
        rows = max(LEAST, step.allocated.rows) if step.allocated else planning.WIDEST
        plan = step.prepare(min(batch.size, rows), data.inputs)

        def chunk(output: Array, start: int, stop: int) -> None:
            Y, w = (
                None if x is None else np.asarray(devices.to_host(self.net.device, x[start:stop]))
                for x in (data.Y, data.given)
            )
            assert Y is not None
            see(output, Y, w)

        return step.evaluate(batch, plan, chunk)


def _lists(described: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], Collection[str]]]:
    """Yield the parts of a checkpoint's header that hold long lists: a tensor's name, the part, its
    lists.
    """
    yield "loss options", described["loss"], ("class_weight", "pos_weight")
    yield "history", described["history"], described["history"].keys()
    if described["run"] is not None:
        yield "run history", described["run"]["history"], described["run"]["history"].keys()


def _pause_for_fork() -> None:
    """Wait for a moment until no thread is in the middle of a step.

    A forked process then finds whole parameters, and BLAS in no product, which it would wait for in
    vain.
    """
    _forking.trainers = held = list[Trainer]()
    deadline = time.monotonic() + FORK_WAITS
    for trainer in [*_trainers]:
        trainer._visitors[_forking] = None
        if trainer._state.acquire(timeout=max(0.0, deadline - time.monotonic())):
            held.append(trainer)


def _go_on_after_fork() -> None:
    """Give back what `_pause_for_fork` took."""
    for trainer in _forking.trainers:
        trainer._state.release()
    for trainer in [*_trainers]:
        trainer._visitors.pop(_forking, None)


def _renew_after_fork() -> None:
    """Free, in a forked process, what threads of its parent held."""
    _go_on_after_fork()
    for trainer in _trainers:
        trainer._renew()
    if "tqdm.auto" in sys.modules:
        sys.modules["tqdm.auto"].tqdm.set_lock(threading.RLock())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_pause_for_fork, after_in_parent=_go_on_after_fork, after_in_child=_renew_after_fork
    )


def _weighed(data: Data) -> Data:
    """Return the data with the weights of all rows, where they are worked out for those in use."""
    return data._replace(weights=data.weights[:]) if isinstance(data.weights, RowWeights) else data


def _penalty(value: object, name: str, net: MLP) -> float:
    """Return the factor of a penalty as a float that the network's dtype holds."""
    factor = values.number(value, name, least=0)
    values.require_held(factor, net.dtype.name, name)
    return factor


def _require_finite(data: Data, loss: loss_sheet.Loss, net: MLP) -> None:
    """The scan of `fit` and `evaluate`: no NaN, no infinity (in the network's dtype), no target
    outside the loss's range.
    """
    arrays.require_finite(data.X, "X", net.dtype)
    arrays.require_finite(data.Y, "Y", net.dtype)
    _require_targets(data.Y, data.inputs.classes, loss, net)


def _require_targets(
    Y: Array, classes: bool, loss: loss_sheet.Loss, net: MLP, name: str = "Y", first: int = 0
) -> None:  # fmt: skip
    """Raise a ValueError that names the first row whose target is outside the loss's range; `first`
    is that of Y.
    """
    if classes:
        arrays.require_classes(Y, net.sizes[-1], name, first)
    elif loss.takes_classes:
        arrays.require_distribution(Y, name, first)
    low, high = {"binary_cross_entropy": (0, 1), "poisson": (0, math.inf)}.get(
        loss.name, (-math.inf, math.inf)
    )
    arrays.require_range(Y, low, high, f"{name}: {loss.name}", first)
