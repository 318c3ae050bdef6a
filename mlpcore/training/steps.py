"""Single steps of a trainer: memory plan, step, gradient only, update only."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import values
from mlpcore.core.network import Gradient
from mlpcore.data.batches import Data, Inputs
from mlpcore.data.intake import Intake
from mlpcore.engine.parts import StepParts
from mlpcore.engine.plan import Plan
from mlpcore.engine.step import Step
from mlpcore.training.controls import Controls
from mlpcore.training.turns import Turns

Array = NDArray[Any]


class Steps(Controls):
    """The part of `mc.Trainer` for loops of your own."""

    _step: Step
    _intake: Intake
    _turns: Turns

    def plan(self, batch_size: int, rows: int = 0, early_stopping: bool = False) -> Plan:
        """Return a printable table of the memory that steps need; nothing is allocated.

        Args:
            batch_size: rows of a batch.
            rows: rows of the data set; for `fit`, this adds their shuffled order.
            early_stopping: True to add the best parameters that early stopping keeps.

        Raises:
            TypeError, ValueError: invalid argument; the message says what was expected.
            MemoryError: `memory_limit` is too small; the message lists the largest buffers.
        """
        size = values.positive_integer(batch_size, "batch_size")
        keeps_best = values.boolean(early_stopping, "early_stopping")
        rows = values.positive_integer(rows, "rows", least=0)
        dtype, classes = self._learner.net.dtype.str, self.loss.takes_classes
        weight = "" if self.loss.class_weight is None else dtype
        like = Inputs(dtype, "int64" if classes else dtype, weight, classes)
        workspace, weights = self._step.workspace, self._intake.weight_buffers(rows)
        order = workspace.fit_buffers(rows, keeps_best)
        return workspace.make_plan(size, like, [*order, *weights])

    def prepare(
        self, X: ArrayLike, Y: ArrayLike | None, sample_weight: ArrayLike | None = None
    ) -> Data:
        """Return the arrays checked and laid out once, for many calls of `step` or `gradient`.

        Pass the result in place of X to `step`, `gradient`, `evaluate` or `fit`. Arrays that are
        not row-major are copied as a whole; the copies do not count towards `memory_limit`.

        Args, Raises: as `step`. The arrays are scanned for NaN and infinity as in `fit`.
        """
        return self._intake.copy_rows(X, Y, sample_weight)

    def step(
        self,
        X: ArrayLike | Data,
        Y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        rows: ArrayLike | None = None,
    ) -> Any:
        """Update the parameters once from these rows; return the loss J before the update.

        J is a float; on a GPU it is a `DeviceLoss`, which is not copied to the host until
        `float(J)`.

        Args:
            X: (m, n_0) numbers, or the result of `prepare`, then without Y and sample_weight.
            Y: (m, n_L) targets; (m,) if there is one output; for cross_entropy (m,) class indices
                or (m, n_L) class probabilities, e.g. one-hot.
            sample_weight: (m,) non-negative row weights; J is the weighted mean over the batch.
            rows: row numbers of a mini-batch in X and Y, read without copying the batch.

        Raises:
            TypeError, ValueError: invalid argument; the message says what was expected.
            NonFiniteLoss: J, its gradient or the update overflowed; the parameters are as they were
                before the step.
        """
        with self._turns.calls, self._turns.steps:
            data = self._intake.as_data(X, Y, sample_weight)
            return self._learner.update(data, self._intake.take_batch(data, rows))

    def gradient(
        self,
        X: ArrayLike | Data,
        Y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        rows: ArrayLike | None = None,
    ) -> tuple[float, Array]:
        """Return J and ∂J/∂parameters of these rows, penalties included, without an update.

        Pass the gradient to `apply`, or to an optimizer of your own. It is 0 for frozen layers.
        Dropout is that of the next step, which depends on `trainer.progress.step`.

        Returns:
            J, and the gradient laid out as `net.parameters`, on its device. The array is valid
            until the trainer's next call.

        Args, Raises: as `step`, but a J that is not finite is returned, not raised.
        """
        with self._turns.calls, self._turns.steps, devices.find(self._learner.net.device).active():
            data = self._intake.as_data(X, Y, sample_weight)
            return self._learner.gradient(data, self._intake.take_batch(data, rows))

    def apply(self, gradient: Gradient | ArrayLike) -> None:
        """Update the parameters from a given gradient, as `step` does from its own.

        Schedule, clipping, decay, errors and counters work as in `step`: `trainer.gradient`
        followed by `apply` equals `step`, bit for bit. In between you can, for example, average the
        gradients of several machines. Penalties are not added: `trainer.gradient` includes them,
        `net.backward` does not. On a GPU, `apply` waits for the update.

        Args:
            gradient: flat, laid out as `net.parameters`, from any array library and of any numeric
                dtype, or the result of `net.backward`. It is not modified, unless it is the
                trainer's own array.

        Raises:
            TypeError, ValueError: invalid argument; the message says what was expected.
            NonFiniteLoss: the gradient is not finite, or the update would overflow; the parameters
                are unchanged. With on_non_finite="skip", the step counts as skipped instead.
        """
        if isinstance(gradient, tuple) and not isinstance(gradient, Gradient):
            raise TypeError(
                "gradient must be one flat array; got a tuple: trainer.gradient returns J and the "
                "gradient"
            )
        flat = gradient.flat if isinstance(gradient, Gradient) else gradient
        with self._turns.calls, self._turns.steps, devices.find(self._learner.net.device).active():
            array = self._intake.as_gradient(flat, self._learner.net.layout.size)
            self._step.apply(array, self.progress)

    def parts(
        self,
        X: ArrayLike | Data,
        Y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        rows: ArrayLike | None = None,
    ) -> StepParts:
        """Return the parts of the step on these rows, for measurements; CUDA only.

        These are its CUDA graphs, its matrix products alone, and the algorithms chosen. This call
        updates nothing, but replaying the graph of the step does; see `StepParts`.

        Args, Raises: as `step`; DeviceUnavailable if steps are not captured, as on a CPU.
        """
        with self._turns.calls, self._turns.steps, devices.find(self._learner.net.device).active():
            data = self._intake.as_data(X, Y, sample_weight)
            batch = self._intake.take_batch(data, rows)
            plan = self._step.prepare(batch.size, data.inputs)
            return self._step.parts(batch, plan, self.progress)
