"""A network in training: its step, its progress and its runs."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlpcore.backends import devices
from mlpcore.checks.errors import NonFiniteLoss
from mlpcore.core.activations import Activation
from mlpcore.core.layout import Layout, Parameters
from mlpcore.core.losses import Loss, pair
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.schedules import Progress
from mlpcore.data.batches import Batch, Data
from mlpcore.data.intake import Intake
from mlpcore.engine.make_step import make_step
from mlpcore.engine.problem import Settings
from mlpcore.training.evaluation import Evaluation
from mlpcore.training.state import History, Unfinished
from mlpcore.training.turns import Turns, watch_forks

Array = NDArray[Any]


class Network(Protocol):
    """The parts of a network that learning needs."""

    device: str
    layout: Layout
    activations: tuple[Activation | None, ...]
    predicts_1d: bool

    @property
    def store(self) -> Parameters:
        """Flat vector of the parameters, with its views."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the parameters."""

    def header(self) -> dict[str, Any]:
        """Return the network without its parameters, as JSON types."""


class UnderWay(Protocol):
    """A run of `fit` in progress."""

    def pause(self) -> None:
        """Update state and progress, so that they can be saved."""

    def unfinished(self) -> Unfinished:
        """Return the run as it is saved; the best parameters stay on their device."""


class Learner:
    """One network in training, shared by a trainer's calls and its runs of `fit`.

    Args:
        net: the network.
        loss: the loss on its output.
        optimizer: the update rule's settings.
        settings: settings of the steps.
        precision: "tf32", "bfloat16", "float16", or None for the network's dtype.
        deterministic: True if algorithms must not be chosen by timing them.

    Attributes:
        step: the engine's step, with its arrays.
        intake: checks and lays out a user's arrays.
        evaluation: loss, scores and metrics over many rows.
        turns: locks of the trainer's calls.
        progress: steps and epochs so far.
        history: history of the last completed run.
        run: the current run of `fit`, or None.
        left: the unfinished run that the same call of `fit` resumes, or None.
        id: identifier, also of files and copies of this trainer: they may replace its unfinished
            run.
    """

    def __init__(
        self,
        net: Network,
        loss: Loss,
        optimizer: Optimizer,
        settings: Settings,
        precision: str | None,
        deterministic: bool,
    ) -> None:
        output = net.activations[-1]
        assert output is not None
        self.net, self.loss, self.precision, self.deterministic = (
            net,
            loss,
            precision,
            deterministic,
        )
        self.turns, self.progress, self.history = Turns(), Progress(), History()
        self.run: UnderWay | None = None
        self.left: Unfinished | None = None
        self.id = secrets.token_hex(8)
        self.step = make_step(
            net.device,
            net.layout,
            net.store,
            net.activations,
            pair(loss, output),
            optimizer,
            settings,
            precision,
            deterministic,
        )
        self._may_be_flat = net.layout.sizes[-1] == 1  # Y may then be (m,) numbers
        self.intake = Intake(net.device, net.layout.sizes, net.dtype, loss)
        self.evaluation = Evaluation(self.step, self.intake)
        watch_forks(self)

    def copied(self) -> dict[str, Any]:
        """Return the state of a copy or pickle: constructor arguments, and input of `restore`.

        Raises:
            RuntimeError: `fit` is running.
        """
        if self.run is not None:
            raise RuntimeError("a trainer cannot be copied or pickled while fit is running")
        self.count_skipped()
        step, precision, deterministic = self.step, self.precision, self.deterministic
        made_of = self.loss, step.problem.optimizer, step.problem.settings, precision, deterministic
        kept = ("progress", "history", "id", "left")
        state = {name: getattr(self, name) for name in kept}
        return {"made of": made_of, **state, "snapshot": step.snapshot()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the state that `copied` returned."""
        self.progress, self.history = state["progress"], state["history"]
        self.id, self.left = state["id"], state["left"]
        self.step.restore(*state["snapshot"])

    def set(self, **settings: Any) -> None:
        """Replace settings of the steps; they take effect with the next one."""
        self.step.problem.settings = dataclasses.replace(self.step.problem.settings, **settings)

    def update(self, data: Data, batch: Batch) -> Any:
        """Update the parameters once by this batch; return J before it.

        Raises:
            NonFiniteLoss: a value overflowed; the message names the layer where it began.
        """
        plan, before = self.step.prepare(batch.size, data.inputs), self.progress.step
        try:
            J = self.step.run(batch, plan, self.progress)
        except NonFiniteLoss as error:
            raise self.explain(error, data, batch.single(self.progress.step - before)) from None
        if self._may_be_flat and self.net.predicts_1d != data.flat:
            self.net.predicts_1d = data.flat
        return J

    def explain(self, error: NonFiniteLoss, data: Data, batch: Batch) -> Exception:
        """Return the error with the layer where it began.

        Raises:
            ValueError: the data are not finite.
        """
        self.intake.require_finite(data)
        layer = self.step.first_not_finite(batch, self.step.prepare(batch.size, data.inputs))
        where = "" if layer is None else f"; it began in layer {layer} of {self.net.layout.layers}"
        explained = NonFiniteLoss(f"{error}{where}", error.step, error.learning_rate, layer)
        explained.add_note("a lower learning rate or clip_norm=1.0 may help")
        return explained

    def gradient(self, data: Data, batch: Batch) -> tuple[float, Array]:
        """Return J and its gradient, in the step's own array, with the next step's dropout."""
        plan = self.step.prepare(batch.size, data.inputs)
        J = self.step.loss_and_gradient(batch, plan, self.progress.step + 1)
        self.net.predicts_1d = data.flat
        return J, self.step.gradient

    def count_skipped(self) -> int:
        """Return the number of skipped steps; waits for the device."""
        self.step.count_skipped(self.progress)
        return self.progress.skipped

    # -- runs --

    @contextlib.contextmanager
    def at_rest(self, history: History) -> Iterator[None]:
        """Leave the run while its end is saved; return to it if saving fails."""
        before = self.run, self.left, self.history, self.progress.total
        self.run, self.left, self.history, self.progress.total = None, None, history, None
        try:
            yield
            before = None, None, self.history, None
        finally:
            self.run, self.left, self.history, self.progress.total = before

    def rest(self) -> None:
        """End the current run and release its arrays."""
        self.run = None
        if self.left is None:
            self.progress.total = None
        self.step.untouched = False
        self.step.workspace.reserve([])

    def renew(self) -> None:
        """Reset in a forked process, which lacks the threads of its parent."""
        if self.turns.renew():
            self.step.renew()
            self.rest()

    def abandon(self) -> None:
        """Discard the unfinished run."""
        self.left = None
        self.progress.total = None

    def keep(self, left: Unfinished) -> None:
        """Keep an interrupted run, with a copy of its best parameters on the host."""
        best = left.best
        if best is not None:
            best = devices.find(self.net.device).to_host(best).copy()
        self.left = left._replace(best=best)
