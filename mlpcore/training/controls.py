"""Settings, clock and unfinished run of a trainer, as its user reads and sets them."""

from __future__ import annotations

from mlpcore.core.optimizers import Optimizer
from mlpcore.core.schedules import Progress
from mlpcore.training.learner import Learner
from mlpcore.training.settings import check_penalty
from mlpcore.training.state import History


class Controls:
    """The part of `mc.Trainer` that reads or sets what its steps and runs work with."""

    _learner: Learner

    @property
    def optimizer(self) -> Optimizer:
        """Settings of the optimizer; what is set on it counts from the next step on."""
        return self._learner.step.optimizer

    @property
    def progress(self) -> Progress:
        """Clock of the training: steps and epochs so far."""
        return self._learner.progress

    @progress.setter
    def progress(self, clock: Progress) -> None:
        self._learner.progress = clock

    @property
    def history(self) -> History:
        """History of the last run of `fit` that has ended."""
        return self._learner.history

    @history.setter
    def history(self, history: History) -> None:
        self._learner.history = history

    @property
    def on_non_finite(self) -> str:
        """Fate of a step whose loss or gradient is not finite: "raise" or "skip"."""
        return self._learner.step.settings.on_non_finite

    @property
    def skipped(self) -> int:
        """Number of steps left out because J or its gradient was not finite; waits for a GPU."""
        return self._learner.count_skipped()

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return self._learner.step.optimizer.rate(self.progress)

    @property
    def l1(self) -> float:
        """Factor of Σ|W| in J; what is set counts from the next step on."""
        return self._learner.step.settings.l1

    @l1.setter
    def l1(self, value: float) -> None:
        self._learner.set(l1=check_penalty(value, "l1", self._learner.net))

    @property
    def l2(self) -> float:
        """Factor of ½ Σ W² in J; what is set counts from the next step on."""
        return self._learner.step.settings.l2

    @l2.setter
    def l2(self, value: float) -> None:
        self._learner.set(l2=check_penalty(value, "l2", self._learner.net))

    @property
    def unfinished(self) -> str | None:
        """Place where the run stopped with which the same call of `fit` goes on; None without one.

        The run is that of a loaded checkpoint, or one with `checkpoint=` that this trainer could
        not end.
        """
        left = self._learner.left
        return None if left is None or self._learner.run else str(left.state)

    @property
    def unsaved(self) -> bool:
        """True if the `unfinished` run has ended but for its last save, which failed."""
        left = self._learner.left
        return left is not None and left.state.ended and self._learner.run is None

    def abandon(self) -> None:
        """Give up the unfinished run: the next `fit` begins a new one.

        It begins from the parameters and the optimizer state as they are.
        """
        self._learner.abandon()
