"""Properties of a trainer: settings, progress, history and the unfinished run."""

from __future__ import annotations

from mlpcore.core.losses import Loss
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.schedules import Progress
from mlpcore.training.learner import Learner
from mlpcore.training.settings import check_penalty
from mlpcore.training.state import History

FIXED = (
    "class_weight", "label_smoothing", "pos_weight", "clip_norm", "dropout", "precision",
    "memory_limit", "chunk_rows", "workers", "seed",
)  # fmt: skip


class Controls:
    """The part of `mc.Trainer` that reads and sets settings, progress and history."""

    _learner: Learner

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute; raise an AttributeError for a setting that only `mc.Trainer` takes."""
        if name in FIXED:
            raise AttributeError(
                f"{name} of a trainer is fixed; make a new one with mc.Trainer(…, {name}=…)"
            )
        super().__setattr__(name, value)

    @property
    def loss(self) -> Loss:
        """The loss, defined on the network's output."""
        return self._learner.loss

    @property
    def deterministic(self) -> bool:
        """True if no algorithm is chosen by timing, on CUDA."""
        return self._learner.deterministic

    @property
    def optimizer(self) -> Optimizer:
        """Settings of the optimizer; changes take effect with the next step."""
        return self._learner.step.problem.optimizer

    @property
    def progress(self) -> Progress:
        """Progress of the training: steps and epochs so far."""
        return self._learner.progress

    @progress.setter
    def progress(self, clock: Progress) -> None:
        self._learner.progress = clock

    @property
    def history(self) -> History:
        """History of the last completed run of `fit`."""
        return self._learner.history

    @history.setter
    def history(self, history: History) -> None:
        self._learner.history = history

    @property
    def on_non_finite(self) -> str:
        """Response to a loss, gradient or update that is not finite: "raise" or "skip"."""
        return self._learner.step.problem.settings.on_non_finite

    @property
    def skipped(self) -> int:
        """Number of steps skipped because J or its gradient was not finite; waits for a GPU."""
        return self._learner.count_skipped()

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return self._learner.step.problem.optimizer.rate(self.progress)

    @property
    def l1(self) -> float:
        """Factor of Σ|W| in J; changes take effect with the next step."""
        return self._learner.step.problem.settings.l1

    @l1.setter
    def l1(self, value: float) -> None:
        self._learner.set(l1=check_penalty(value, "l1", self._learner.net))

    @property
    def l2(self) -> float:
        """Factor of ½ Σ W² in J; changes take effect with the next step."""
        return self._learner.step.problem.settings.l2

    @l2.setter
    def l2(self, value: float) -> None:
        self._learner.set(l2=check_penalty(value, "l2", self._learner.net))

    @property
    def unfinished(self) -> str | None:
        """Description of where the unfinished run stopped; None if there is none.

        An unfinished run comes from a loaded checkpoint, or is a `fit` with `checkpoint=` that was
        interrupted. The same call of `fit` resumes it; `abandon` discards it.
        """
        left = self._learner.left
        return None if left is None or self._learner.run else str(left.state)

    @property
    def unsaved(self) -> bool:
        """True if only the final save of the `unfinished` run is missing, because it failed."""
        left = self._learner.left
        return left is not None and left.state.ended and self._learner.run is None

    def abandon(self) -> None:
        """Discard the unfinished run, so that the next `fit` begins a new one.

        The new run starts from the current parameters and optimizer state.
        """
        self._learner.abandon()
