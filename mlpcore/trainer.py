"""The trainer: single steps, whole runs, evaluation, checkpoints.

trainer = Trainer(net, loss="cross_entropy", optimizer=AdamW(1e-3))
history = trainer.fit(X, Y, epochs=10, batch_size=256, validation=(Xv, Yv))
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import values
from mlpcore.core.optimizers import Optimizer
from mlpcore.io import model_file
from mlpcore.mlp import MLP
from mlpcore.training import saving, scores
from mlpcore.training.callbacks import EarlyStopping, Entry
from mlpcore.training.fit import Fit
from mlpcore.training.learner import Learner
from mlpcore.training.scores import Metric
from mlpcore.training.settings import make_learner
from mlpcore.training.state import History
from mlpcore.training.steps import Steps

Array = NDArray[Any]


class Trainer(Steps):
    """A trainer for one network: single steps, whole runs, evaluation and checkpoints.

    Args:
        net: the network; its parameters are updated in place.
        loss: a name, `(name, parameter)` or `mc.Loss`, defined on the network's output. None picks
            the loss that matches the output activation: cross_entropy for softmax,
            binary_cross_entropy for sigmoid, poisson for exp, squared_error for all others.
        optimizer: `mc.SGD(0.1)`, `mc.AdamW(1e-3)` (the default), …
        class_weight: weight of each class, as a list or as {class: weight} (1 for classes not
            named). For cross_entropy, and for binary_cross_entropy with one output. As with
            PyTorch's `weight=`, J = Σ w ℓ / Σ w C, where C is the weight of the row's class.
            Accuracy ignores it.
        label_smoothing: ε in [0, 1). Targets become (1 - ε) y + ε/n_L for cross_entropy, and
            (1 - ε) y + ε/2 for binary_cross_entropy.
        pos_weight: weight of y = 1 in binary_cross_entropy, one number or one per output, as in
            PyTorch.
        l1, l2: add l1 Σ|W| + ½ l2 Σ W² to J, over weights but not biases.
        clip_norm: scale the gradient down to this Euclidean norm if it is longer. Frozen layers
            are left out of the norm.
        dropout: probability p with which a training step zeroes each output of a hidden layer; the
            others are divided by 1 - p. One rate, or a list with one per hidden layer. Evaluation
            and prediction do not use dropout.
        precision: "tf32", "bfloat16" or "float16", for GPUs. A CPU logs a warning and computes in
            the network's dtype.
        memory_limit: limit for all the trainer's arrays together: bytes, "2 GiB", or a share of the
            device's free memory ("50%" or 0.5). Large batches are processed in chunks that fit.
        chunk_rows: maximum number of rows that go forward and backward at a time; "auto" fits them
            to the cache.
        deterministic: True to choose CUDA algorithms without timing them. NumPy is always
            deterministic.
        workers: threads that process chunks of large batches in parallel, at most 1,024; None
            chooses a number.
        on_non_finite: "raise" to raise NonFiniteLoss if the loss, the gradient or the update
            overflows; "skip" to skip that step and count it in `skipped`.
        seed: seed of the row order in `fit` and of dropout.

    Attributes:
        net, loss, deterministic: as given; the loss is an `mc.Loss`.
        about: dict of notes that JSON can hold. `save` writes them; `load` and `mc.MLP.load_with`
            read them.

    Raises:
        TypeError, ValueError: invalid argument; the message says what was expected.
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
        learner = make_learner(
            net, loss, optimizer, class_weight, label_smoothing, pos_weight, l1, l2, clip_norm,
            dropout, precision, memory_limit, chunk_rows, deterministic, workers, on_non_finite,
            seed,
        )  # fmt: skip
        self._hold(net, learner)

    def _hold(self, net: MLP, learner: Learner) -> None:
        self._net = net
        self.about: dict[str, Any] = {}
        self._learner, self._step = learner, learner.step
        self._intake, self._turns = learner.intake, learner.turns

    @property
    def net(self) -> MLP:
        """The network in training."""
        return self._net

    def __repr__(self) -> str:
        rule, step = self.optimizer, self.progress.step
        return f"Trainer({self.net!r}, loss={self.loss}, optimizer={rule!r}, step {step})"

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
        """Train for a number of epochs in shuffled mini-batches; the last batch may be smaller.

        If the trainer has an `unfinished` run, repeating the call resumes it. The call must match
        in batch_size, shuffle, early_stopping, the names of the metrics, and the data: X, Y,
        sample_weight and validation must have the same number of rows and the same values in the
        network's dtype. Up to 1 MiB all values are compared; beyond that, up to 16 blocks of 64 KiB
        spread over the rows. Container and dtype may differ. Batches from an iterable or a
        function, callbacks and the metric functions are not compared. `epochs` may change but not
        fall below what is already done; schedules that depend on the length of the run adjust. If
        all epochs are done and only the final save failed, `epochs` must not change if early
        stopping has restored the best parameters. A run without a finished batch restarts with any
        call.

        Args:
            X, Y, sample_weight: as in `step`; scanned once for NaN, infinity and invalid labels.
                Data in files are read ahead block by block and shuffled by blocks: `np.memmap`,
                Zarr, h5py. In place of X and Y: `mc.Parquet(path, target)`, an iterable of batches
                `(X, Y)` or `(X, Y, weights)` that can be iterated once per epoch, or a function
                that returns one.
            validation: `(Xv, Yv)` or `(Xv, Yv, weights)`, evaluated after each epoch; also
                `mc.Parquet` or a function.
            metrics: `{name: function}`, measured on the validation rows as in `evaluate`.
            early_stopping: `mc.EarlyStopping(patience=…)`; by default it restores the best weights.
            callbacks: `mc.Callback` objects or functions `(trainer, entry)`, called after each
                epoch; return True to stop.
            shuffle: True for a new row order in each epoch, from the trainer's seed.
            progress: True to show a progress bar with rows/s, loss and validation figures.
            checkpoint: path of a file that `Trainer.load` can resume from, written atomically
                during the run and at its end. SIGINT and SIGTERM then finish the step, save, and
                end the run. A run interrupted in any other way, except by NonFiniteLoss, also stays
                `unfinished` in this trainer. Without a checkpoint, a stopped run cannot be
                resumed: the next `fit` starts a new run from the current parameters.
            every: interval between checkpoints: "1000 steps", "5 min", "1 epoch".
            keep: versions of the file to keep; older ones are `name.1.suffix`, `name.2.suffix`, …

        Returns:
            The history, a dict of lists with one entry per epoch: "loss" (mean of J over its
            steps), "learning_rate" (of its last step) and "seconds"; with validation also
            "validation_loss", "validation_accuracy" or "validation_r2", and "validation_<name>" for
            each metric; with on_non_finite="skip" also "skipped" (steps skipped so far).

        Raises:
            TypeError, ValueError: invalid argument; the message says what was expected. Raised
                before training, except for a non-finite number or an invalid label further on in a
                file. The total number of steps, epochs times batches, must be below 2^63.
            NonFiniteLoss: J, its gradient or an update overflowed; the parameters and the
                checkpoint are as they were before that step.
            OSError: the checkpoint cannot be written; the previous one is intact. The run is
                `unfinished`: it can be saved elsewhere, and the same call resumes it. If only the
                final save failed, that call takes no step and does not repeat callbacks. Raised
                before training if no file can be written there, if another training is writing it,
                if it is not a checkpoint, or if it holds another trainer's unfinished run.
        """
        with self._turns.calls, contextlib.ExitStack() as leaving:
            if self._learner.run is not None:
                raise RuntimeError(
                    "fit is running: a callback may call step, evaluate and predict, but not fit"
                )
            self._turns.take_steps(leaving)
            rows = (X, Y, sample_weight)
            return Fit(
                self._learner, self, rows, self.about, epochs, batch_size, validation, metrics,
                early_stopping, callbacks, shuffle, progress, checkpoint, every, keep,
            ).go()  # fmt: skip

    # -- evaluation --

    def evaluate(
        self,
        X: Any,
        Y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        metrics: Mapping[str, Metric] | None = None,
    ) -> Entry:
        """Return "loss", "accuracy" or "r2", and the metrics over these rows, by name.

        The loss is the mean over the rows, without penalties. Accuracy is the share of correct
        classes, or of correct outputs for binary_cross_entropy. Class weights, label smoothing and
        pos_weight affect only the loss. For regression, r2 is the mean over the outputs; an output
        with a constant target has 1 if its predictions are perfect, else 0, as in scikit-learn's
        `r2_score`.

        Args:
            X, Y, sample_weight: as in `fit`.
            metrics: `{name: function}`, where `function(Y, output)` returns a number, as in
                `sklearn.metrics`; if rows have weights, it also gets `sample_weight` (m,). It is
                called once with all rows, on the host: targets in the form of Y, outputs in the
                form that `net.predict` returns after training on this Y (probabilities for softmax
                and sigmoid). Storing them takes memory outside `memory_limit`. Streamed windows
                whose rows all have weight 0 are left out.

        Raises:
            TypeError, ValueError: invalid argument or metric; the message says what was expected.
        """
        with self._turns.calls, self._turns.steps, devices.find(self.net.device).active():
            table = self._intake.open_rows(X, Y, sample_weight)
            measures = scores.require_metrics(metrics, self.loss, table)
            return self._learner.evaluation.evaluate(table, measures)

    def losses(self, X: Any, Y: ArrayLike | None = None) -> Array:
        """Return the loss ℓ of each row, without weights and penalties: (m,) float64, on the host.

        The "loss" of `evaluate` is their mean, weighted by the row weights if there are any. With
        class weights, each ℓ is divided by the weight of the row's class, which then counts as a
        row weight. If the loss matches the output activation, ℓ is computed from the logits, so
        that no row overflows or is rounded to 0.

        Args:
            X, Y: as in `fit`; row weights that come with them are ignored.

        Raises:
            TypeError, ValueError: invalid argument; the message says what was expected.
        """
        with self._turns.calls, self._turns.steps, devices.find(self.net.device).active():
            return self._learner.evaluation.row_losses(self._intake.open_rows(X, Y))

    # -- files and copies --

    def save(self, path: str | os.PathLike[str], keep: int = 1) -> None:
        """Write a checkpoint, with all that training depends on, to a safetensors file, atomically.

        It may be called while `fit` runs, including from another thread.

        Args:
            path: path of the file.
            keep: versions to keep; older ones are `name.1.suffix`, `name.2.suffix`, …

        Raises:
            OSError: the file cannot be written, or the existing one is not an mlpcore file or holds
                another trainer's unfinished run; the existing file is left intact.
            TypeError: the optimizer or the schedule is a user-defined class, or JSON cannot hold
                `about`.
        """
        with self._turns.between_steps():
            saving.write(self._learner, path, keep, self.about)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto") -> Trainer:
        """Return the trainer from a file that `save` or `fit(checkpoint=…)` wrote.

        On the same machine, training continues bit for bit as if it had never stopped. If the file
        was written in the middle of a `fit` (`unfinished` tells where), the same call of `fit`
        resumes the run; after a completed run, `fit` begins a new one. The file holds neither
        callbacks nor data, only digests of the data, which `fit` compares.

        Args:
            path: path of the file.
            device: "auto", "cpu", "cuda", "cuda:1".

        Raises:
            FileNotFoundError, OSError: the file cannot be read.
            ValueError: it is not an mlpcore checkpoint, is damaged, or comes from a newer version.
            DeviceUnavailable: the device cannot be used; the message says why.
        """
        devices.choose(device)
        header, tensors = model_file.read(path)
        if "trainer" not in header:
            raise ValueError(
                f"{str(path)!r} holds a network without a trainer: load it with mc.MLP.load"
            )
        net = MLP.from_header(path, header, tensors, device)
        try:
            described = header["trainer"]
            trainer = cls(net, **saving.read_arguments(described, tensors))
            saving.restore(trainer._learner, described, tensors)
            trainer.about = values.typed_value(header.get("about", {}), dict[str, Any], "about")
        except saving.DAMAGES as error:
            raise ValueError(f"{str(path)!r} does not hold a trainer: {error!r}") from None
        return trainer

    def __getstate__(self) -> dict[str, Any]:
        with self._turns.calls, self._turns.steps:
            return {"net": self.net, "about": self.about, **self._learner.copied()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._hold(state["net"], Learner(state["net"], *state["made of"]))
        self.about = state["about"]
        self._learner.restore(state)
