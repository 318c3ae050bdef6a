"""Training: one step, whole runs, evaluation.

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
    """The training of one network: steps, whole runs, evaluation, files.

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
        seed: seed of the row order in `fit`, and of dropout.

    Attributes:
        net, loss, deterministic: as given; the loss is an `mc.Loss`.
        about: notes for the files, as far as JSON can hold them: `save` writes them, `load` and
            `mc.MLP.load_with` read them.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """

    net: MLP

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
        self.net, self.loss, self.deterministic = net, learner.loss, learner.deterministic
        self.about: dict[str, Any] = {}
        self._learner, self._step = learner, learner.step
        self._intake, self._turns = learner.intake, learner.turns

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
        """Train for `epochs` passes over the rows, in shuffled mini-batches, the last one partial.

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
                again. At the start, when nothing is trained yet: no file can be written there,
                another training writes it, or it is not a checkpoint, or holds another trainer's
                unfinished run.
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
        """Return the "loss" of these rows, "accuracy" or "r2", and the metrics, by name.

        The loss is the mean over the rows, without penalties. Accuracy is the share of right
        classes, of right outputs with binary_cross_entropy; class weights, label smoothing and
        pos_weight count in the loss alone. r2, where no classes are told apart, is the mean over
        the outputs; that of an output whose target is constant is 1 for perfect predictions, else
        0, as scikit-learn's `r2_score` has it.

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
        with self._turns.calls, self._turns.steps, devices.find(self.net.device).active():
            table = self._intake.open_rows(X, Y, sample_weight)
            measures = scores.require_metrics(metrics, self.loss, table)
            return self._learner.evaluation.evaluate(table, measures)

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
        with self._turns.calls, self._turns.steps, devices.find(self.net.device).active():
            return self._learner.evaluation.row_losses(self._intake.open_rows(X, Y))

    # -- files and copies --

    def save(self, path: str | os.PathLike[str], keep: int = 1) -> None:
        """Write all that the training depends on to a safetensors file, atomically.

        It may be called while `fit` runs, also from another thread.

        Args:
            path: path of the file.
            keep: versions to keep; those before are `name.1.suffix`, `name.2.suffix`, …

        Raises:
            OSError: the file cannot be written, or there is one that is not mlpcore's, or another
                trainer's unfinished run; what was there before is intact.
            TypeError: optimizer or schedule is a class of the user's own, or JSON cannot hold
                `about`.
        """
        with self._turns.between_steps():
            saving.write(self._learner, path, keep, self.about)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto") -> Trainer:
        """Return the trainer of a file that `save`, or `fit(checkpoint=…)`, wrote.

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
