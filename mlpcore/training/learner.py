"""A network that learns: its step, the clock, and what is known of its runs."""

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
        """Flat vector of the parameters, and its views."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the parameters."""

    def header(self) -> dict[str, Any]:
        """Return the network without its parameters, as what JSON holds."""


class UnderWay(Protocol):
    """A run of `fit` that is under way."""

    def pause(self) -> None:
        """Bring state and clock up to date, so that they can be saved."""

    def unfinished(self) -> Unfinished:
        """Return the run as a file holds it, with the best parameters where they are."""


class Learner:
    """One network in training: what a trainer's calls and its runs of `fit` work on.

    Args:
        net: the network.
        loss: the loss on its output.
        optimizer: the update rule's settings.
        settings: those of the steps.
        precision: "tf32", "bfloat16", "float16", or None for the network's dtype.
        deterministic: True if no timing may choose the algorithms.

    Attributes:
        step: the engine's step, with its arrays.
        intake: the way in for a user's arrays.
        evaluation: the figures over many rows.
        turns: the locks of the trainer's calls.
        progress: the clock: steps and epochs so far.
        history: the history of the last run that has ended.
        run: the run of `fit` that is under way.
        left: the run that the same call of `fit` goes on with.
        id: identifier kept by files and copies, which may replace its unfinished run.
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
        self._may_be_flat = net.layout.sizes[-1] == 1  # whether Y may come as (m,) numbers
        self.intake = Intake(net.device, net.layout.sizes, net.dtype, loss)
        self.evaluation = Evaluation(self.step, self.intake)
        watch_forks(self)

    def copied(self) -> dict[str, Any]:
        """Return what a copy, or a pickle, is made of and goes on from; see `restore`.

        Raises:
            RuntimeError: `fit` runs.
        """
        if self.run is not None:
            raise RuntimeError("a trainer cannot be copied or pickled while fit runs")
        self.count_skipped()
        step, precision, deterministic = self.step, self.precision, self.deterministic
        made_of = self.loss, step.problem.optimizer, step.problem.settings, precision, deterministic
        kept = ("progress", "history", "id", "left")
        state = {name: getattr(self, name) for name in kept}
        return {"made of": made_of, **state, "snapshot": step.snapshot()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `copied` returned."""
        self.progress, self.history = state["progress"], state["history"]
        self.id, self.left = state["id"], state["left"]
        self.step.restore(*state["snapshot"])

    def set(self, **settings: Any) -> None:
        """Replace settings of the steps, from the next one on."""
        self.step.problem.settings = dataclasses.replace(self.step.problem.settings, **settings)

    def update(self, data: Data, batch: Batch) -> Any:
        """Update the parameters once by this batch; return J before it.

        Raises:
            NonFiniteLoss: names the layer where it began.
        """
        plan = self.step.prepare(batch.size, data.inputs)
        try:
            J = self.step.run(batch, plan, self.progress)
        except NonFiniteLoss as error:
            raise self.explain(error, data, batch) from None
        if self._may_be_flat and self.net.predicts_1d != data.flat:
            self.net.predicts_1d = data.flat
        return J

    def explain(self, error: NonFiniteLoss, data: Data, batch: Batch) -> Exception:
        """Return the error with the layer where it began.

        Raises:
            ValueError: the data are to blame.
        """
        self.intake.require_finite(data)
        layer = self.step.first_not_finite(batch, self.step.prepare(batch.size, data.inputs))
        where = "" if layer is None else f"; it began in layer {layer} of {self.net.layout.layers}"
        explained = NonFiniteLoss(f"{error}{where}", error.step, error.learning_rate, layer)
        explained.add_note("a lower learning rate or clip_norm=1.0 may help")
        return explained

    def gradient(self, data: Data, batch: Batch) -> tuple[float, Array]:
        """Return J and its gradient in the step's own array; dropout is that of the next step."""
        plan = self.step.prepare(batch.size, data.inputs)
        J = self.step.loss_and_gradient(batch, plan, self.progress.step + 1)
        self.net.predicts_1d = data.flat
        return J, self.step.gradient

    def count_skipped(self) -> int:
        """Return how many steps were left out; waits for the device."""
        self.step.count_skipped(self.progress)
        return self.progress.skipped

    # -- runs --

    @contextlib.contextmanager
    def at_rest(self, history: History) -> Iterator[None]:
        """Be at rest, as a run's end is saved, and in the run again if the saving fails."""
        before = self.run, self.left, self.history, self.progress.total
        self.run, self.left, self.history, self.progress.total = None, None, history, None
        try:
            yield
            before = None, None, self.history, None
        finally:
            self.run, self.left, self.history, self.progress.total = before

    def rest(self) -> None:
        """End the run that was under way, and give its arrays back."""
        self.run = None
        if self.left is None:
            self.progress.total = None
        self.step.untouched = False
        self.step.workspace.reserve([])

    def renew(self) -> None:
        """Begin anew in a forked process, without the threads of its parent."""
        if self.turns.renew():
            self.step.renew()
            self.rest()

    def abandon(self) -> None:
        """Give up the unfinished run."""
        self.left = None
        self.progress.total = None

    def keep(self, left: Unfinished) -> None:
        """Keep a run that has broken off, with a copy of its best parameters on the host."""
        best = left.best
        if best is not None:
            best = devices.find(self.net.device).to_host(best).copy()
        self.left = left._replace(best=best)
