"""SGD and Adam by scikit-learn's rules: its draws, curves, held-out rows and stopping."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import check_scoring
from sklearn.model_selection import train_test_split
from sklearn.utils import _safe_indexing

from mlpcore.backends import devices
from mlpcore.core.optimizers import SGD, Adam
from mlpcore.estimators.epochs import (
    Best,
    Objective,
    Reporter,
    restore_state,
    take_state,
    train_epoch,
)
from mlpcore.estimators.fitted import Array, to_numpy
from mlpcore.estimators.solver import Solver
from mlpcore.mlp import MLP
from mlpcore.trainer import Trainer


class HeldOut(NamedTuple):
    """The rows behind `validation_scores_`."""

    X: Any
    y: Any
    weights: Any


class StochasticSolver(Solver):
    """Epochs of mini-batches, with scikit-learn's results, attributes, messages and warnings."""

    _passed: Any = (None, None)  # during `fit`, X and `validation` as the user passed them

    def _check_held_out(self, y: Any) -> None:
        """Raise a ValueError if predictions can never equal these targets of held-out rows."""

    def _measure(self, y: Any, predicted: Any, weights: Array | None) -> float:
        """Return the metric of targets and predictions that are already checked."""
        return type(self)._metric(y, predicted, sample_weight=weights)

    def _fit_stochastic(self, X: Any, Y: Array, sample_weight: Any, *unused: Any) -> None:
        """Train until scikit-learn's rules end the fit, or in `partial_fit` for one epoch."""
        incremental = unused[-1]
        if self.early_stopping and incremental:
            raise ValueError("partial_fit does not support early_stopping=True")
        if not hasattr(self, "loss_curve_") or (self.best_loss_ is None) != self.early_stopping:
            self._begin_curves()
        net = self._network(self._fit_device(X))
        trainer = self._resume(net, incremental)
        rows, held_out = self._hold_out(X, Y, sample_weight)
        weights = self._row_weights(Y, sample_weight, incremental)
        objective = self._make_objective(trainer, X, Y, weights)
        # after a warm start without a better score, scikit-learn keeps the latest weights
        best = Best(trainer, found=not self.loss_curve_) if self.early_stopping else None
        self.n_iter_ = 0
        with Reporter(trainer, self.callbacks, self.max_iter, self.progress) as reporter:
            try:
                self._train(objective, rows, held_out, best, reporter, incremental)
            except KeyboardInterrupt:
                warnings.warn("Training interrupted by user.", stacklevel=2)
            if best is not None:
                best.restore()
        if incremental:
            self._trainer = trainer
        else:
            self._saved: Any = take_state(trainer)
        self._expose(net)

    def _train(
        self,
        objective: Objective,
        rows: Array,
        held_out: HeldOut | None,
        best: Best | None,
        reporter: Reporter,
        incremental: bool,
    ) -> None:
        size = self._batch_rows(len(rows))
        while self.n_iter_ < self.max_iter:
            if self.shuffle:
                order = np.arange(len(rows))
                self._random_state.shuffle(order)
                rows = rows[order]
            self.loss_ = np.float64(train_epoch(objective, rows, size, reporter))
            self.n_iter_ += 1
            self.t_ += len(rows)
            entry = self._record(objective.trainer, held_out, best)
            stop = reporter.end_epoch(entry)
            if self._no_improvement_count > self.n_iter_no_change and self._should_stop():
                return
            if incremental or stop:
                return
        warnings.warn(
            f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the "
            "optimization hasn't converged yet.",
            ConvergenceWarning,
            stacklevel=2,
        )

    # -- the start of a fit --

    def _begin_curves(self) -> None:
        """Reset curves and counts to their state before the first epoch."""
        self.loss_curve_: list[np.float64] = []
        self._no_improvement_count = 0
        self.best_loss_: Any = None if self.early_stopping else np.inf
        self.validation_scores_: Any = [] if self.early_stopping else None
        self.best_validation_score_: Any = -np.inf if self.early_stopping else None

    def _resume(self, net: MLP, incremental: bool) -> Trainer:
        """Return a trainer of this network, in `partial_fit` with the previous call's state."""
        trainer: Trainer | None = self.__dict__.pop("_trainer", None)
        if incremental and trainer is not None:
            if trainer.net is net and trainer.loss == self._trainer_loss(net.dtype):
                return trainer
            self._saved = take_state(trainer)
        if not incremental or not hasattr(self, "_optimizer"):
            self._saved = None
            self._optimizer = self._make_optimizer()
        trainer = self._make_trainer(net, self._optimizer)
        if self._saved:
            restore_state(trainer, self._saved)
        return trainer

    def _make_optimizer(self) -> Any:
        rate = self.learning_rate_init
        if self.solver == "sgd":
            return SGD(rate, self.momentum, bool(self.nesterovs_momentum))
        return Adam(rate, self.beta_1, self.beta_2, self.epsilon, epsilon_hat=True)

    def _hold_out(self, X: Any, Y: Array, weights: Any) -> tuple[Array, HeldOut | None]:
        """Return the indices of the rows to train on, and the rows to score.

        The rows to score are the user's, or for early stopping a part of X.
        """
        passed, validation = self._passed
        rows = np.arange(X.shape[0])
        if validation is not None:
            if not isinstance(validation, list | tuple) or len(validation) not in (2, 3):
                raise TypeError("validation must be (X, y) or (X, y, sample_weight)")
            Xv, yv, wv = (*validation, None)[:3]
            yv = to_numpy(yv, "validation: y")
            self._check_held_out(yv)
            return rows, HeldOut(Xv if self.scoring else self._check_rows(Xv), yv, wv)
        if not self.early_stopping:
            return rows, None
        rows, held = train_test_split(
            rows,
            random_state=self._random_state,
            test_size=self.validation_fraction,
            stratify=Y if is_classifier(self) and self.n_outputs_ == 1 else None,
        )
        if len(held) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of "
                "your dataset."
            )
        if self.scoring:  # a scorer also gets the column names
            Xv = _safe_indexing(passed, held)
        else:
            Xv = X[devices.find(devices.of(X, "X")).to_device(held)]
        wv = None if weights is None else weights[held]
        return rows, HeldOut(Xv, self._decode(Y[held]), wv)

    def _batch_rows(self, rows: int) -> int:
        if self.batch_size == "auto":
            return min(200, rows)
        if self.batch_size > rows:
            warnings.warn(
                "Got `batch_size` less than 1 or larger than sample size. It is going to be "
                "clipped",
                stacklevel=2,
            )
        return int(np.clip(self.batch_size, 1, rows))

    # -- the end of an epoch --

    def _record(
        self, trainer: Trainer, held_out: HeldOut | None, best: Best | None
    ) -> dict[str, float]:
        """Update curves, counts and learning rate; return the epoch's entry."""
        self.loss_curve_.append(self.loss_)
        self._print("Iteration %d, loss = %.8f", self.n_iter_, self.loss_)
        entry = {"loss": self.loss_, "learning_rate": trainer.learning_rate}
        score = -np.inf
        if held_out is not None:
            score = entry["validation_score"] = self._score_held_out(trainer.net, held_out)
        if self.early_stopping:
            worse = score < self.best_validation_score_ + self.tol
        else:
            worse = self.loss_ > self.best_loss_ - self.tol
            self.best_loss_ = self.loss_ if self.loss_ < self.best_loss_ else self.best_loss_
        self._no_improvement_count = self._no_improvement_count + 1 if worse else 0
        if held_out is not None:
            self._print("Validation score: %f", score)
            if score > self.best_validation_score_:
                self.best_validation_score_ = score
                if best is not None:
                    best.keep()
        if self.learning_rate == "invscaling" and self.solver == "sgd":
            rate = self.learning_rate_init / (self.t_ + 1) ** self.power_t
            self._optimizer.learning_rate = rate
        return entry

    def _score_held_out(self, net: MLP, held_out: HeldOut) -> float:
        """Append and return the score on the held-out rows; NaN if a prediction is not finite."""
        X, y, weights = held_out
        if self.scoring is not None:
            self._expose(net)
            more = {} if weights is None else {"sample_weight": weights}
            score = float(check_scoring(self, self.scoring)(self, X, y, **more))
        else:
            predicted = to_numpy(self._decode(self._output(X, net)), "prediction")
            usable = predicted.dtype.kind != "f" or np.isfinite(predicted).all()
            score = float(self._measure(y, predicted, weights)) if usable else np.nan
        if self.validation_scores_ is None:
            self.validation_scores_, self.best_validation_score_ = [], -np.inf
        self.validation_scores_.append(score)
        return score

    def _should_stop(self) -> bool:
        """Return True if epochs without an improvement end the training.

        An adaptive learning rate is lowered instead, while it can be.
        """
        figure = "Validation score" if self.early_stopping else "Training loss"
        epochs = f"{self.n_iter_no_change} consecutive epochs"
        message = f"{figure} did not improve more than tol={self.tol:f} for {epochs}."
        if self.learning_rate != "adaptive" or self.solver != "sgd":
            self._print(f"{message} Stopping.")
            return True
        if self._optimizer.learning_rate <= 1e-6:
            self._print(f"{message} Learning rate too small. Stopping.")
            return True
        self._optimizer.learning_rate /= 5
        self._print(f"{message} Setting learning rate to %f", self._optimizer.learning_rate)
        self._no_improvement_count = 0
        return False

    def _print(self, message: str, *values: object) -> None:
        if self.verbose:
            print(message % values if values else message)
