"""Single steps of a trainer: their plan, a step, a gradient without an update, an update alone."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import values
from mlpcore.core.losses import Loss
from mlpcore.core.network import Gradient, Network
from mlpcore.data.batches import Data, Inputs
from mlpcore.data.intake import Intake
from mlpcore.engine.parts import StepParts
from mlpcore.engine.plan import Plan
from mlpcore.engine.step import Step
from mlpcore.training.controls import Controls
from mlpcore.training.turns import Turns

Array = NDArray[Any]


class Steps(Controls):
    """The part of `mc.Trainer` for loops of your own.

    Attributes:
        net: the network; loss: an `mc.Loss`.
    """

    net: Network
    loss: Loss
    _step: Step
    _intake: Intake
    _turns: Turns

    def plan(self, batch_size: int, rows: int = 0, early_stopping: bool = False) -> Plan:
        """Return the memory table for steps of `batch_size` rows, to `print`; nothing is allocated.

        Args:
            batch_size: rows of a batch.
            rows: rows of the data set, for `fit`: adds their order.
            early_stopping: adds the best parameters.

        Raises:
            MemoryError: `memory_limit` cannot be kept; prints the largest buffers.
        """
        size = values.positive_integer(batch_size, "batch_size")
        keeps_best = values.boolean(early_stopping, "early_stopping")
        rows = values.positive_integer(rows, "rows", least=0)
        dtype, classes = self.net.dtype.str, self.loss.takes_classes
        weight = "" if self.loss.class_weight is None else dtype
        like = Inputs(dtype, "int64" if classes else dtype, weight, classes)
        workspace, weights = self._step.workspace, self._intake.weight_buffers(rows)
        order = workspace.fit_buffers(rows, keeps_best)
        return workspace.make_plan(size, like, [*order, *weights])

    def prepare(
        self, X: ArrayLike, Y: ArrayLike | None, sample_weight: ArrayLike | None = None
    ) -> Data:
        """Return the arrays checked and laid out, for many calls of `step`, `gradient`, `evaluate`.

        It is given to them in place of X. An array that is not row-major is copied as a whole; the
        copy is yours, outside `memory_limit`.

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
        """Update the parameters once by these rows; return J before it.

        J is a float; on a GPU it is a `DeviceLoss`, which stays there until `float(J)`.

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

        It is meant for `apply`, or for optimizers of your own. It is 0 for frozen layers. Dropout
        is that of the next step: `trainer.progress.step` counts them.

        Returns:
            J, and the gradient laid out as `net.parameters`, on its device; it holds until the
            trainer's next call.

        Args, Raises: as `step`; a J that is not finite is returned as it is.
        """
        with self._turns.calls, self._turns.steps, devices.find(self.net.device).active():
            data = self._intake.as_data(X, Y, sample_weight)
            return self._learner.gradient(data, self._intake.take_batch(data, rows))

    def apply(self, gradient: Gradient | ArrayLike) -> None:
        """Update the parameters by a gradient of yours, as `step` does by its own.

        Schedule, clipping, decay, faults and counts are those of `step`: `apply` after
        `trainer.gradient` is `step`, to the bit; in between, the gradients of several machines can
        be averaged. Penalties are not added: `trainer.gradient` includes them, `net.backward` does
        not. On a GPU it waits for the update.

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
        with self._turns.calls, self._turns.steps, devices.find(self.net.device).active():
            array = self._intake.as_gradient(flat, self.net.layout.size)
            self._step.apply(array, self.progress)

    def parts(
        self,
        X: ArrayLike | Data,
        Y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        rows: ArrayLike | None = None,
    ) -> StepParts:
        """Return the parts of the step on these rows, to measure them. CUDA only.

        They are its graphs, its matrix products alone, and the choices made. Nothing is updated
        here, but replaying the step's graph updates the parameters; see `StepParts`.

        Args, Raises: as `step`; DeviceUnavailable where steps are not captured, as on a CPU.
        """
        with self._turns.calls, self._turns.steps, devices.find(self.net.device).active():
            data = self._intake.as_data(X, Y, sample_weight)
            batch = self._intake.take_batch(data, rows)
            plan = self._step.prepare(batch.size, data.inputs)
            return self._step.parts(batch, plan, self.progress)
