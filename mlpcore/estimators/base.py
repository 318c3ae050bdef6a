"""Fitting as in scikit-learn: its checks, labels and initial weights, around the solvers."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import _fit_context

from mlpcore.backends import devices
from mlpcore.core import activations as activation_sheet
from mlpcore.estimators.fitted import Array, stand_in, to_numpy
from mlpcore.estimators.parameters import STOCHASTIC, engine_name
from mlpcore.estimators.stochastic import StochasticSolver

VALIDATED = ("best_loss_", "validation_scores_", "best_validation_score_")


class Estimator(StochasticSolver):
    """Base of both estimators, placed before scikit-learn's class in their bases.

    `super()` is scikit-learn's MLPClassifier or MLPRegressor.
    """

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, validation: Any = None) -> Any:
        """Train on X and y.

        Args:
            X: (m, n) numbers: NumPy, pandas, polars, sparse, or on a GPU.
            y: (m,) or (m, n_outputs_) labels or numbers; multilabel columns hold 0 and 1.
            sample_weight: (m,) row weights.
            validation: `(X, y)` or `(X, y, sample_weight)` to score after each epoch, instead
                of a part of X.
        """
        if validation is not None and self.solver not in STOCHASTIC:
            raise ValueError(
                f"validation needs solver='adam' or 'sgd': {self.solver!r} has no epochs to score"
            )
        self._passed = X, validation
        try:
            return self._fit(X, y, sample_weight)
        finally:
            self.__dict__.pop("_passed", None)

    def _fit(self, X: Any, y: Any, sample_weight: Any = None, incremental: bool = False) -> Any:
        self._check_widths()
        if sample_weight is not None:
            sample_weight = to_numpy(sample_weight, "sample_weight")
        with devices.find(self._fit_device(X)).active():
            super()._fit(X, y, sample_weight, incremental)
        if not all(np.isfinite(slopes).all() for slopes in self.slopes_):
            raise ValueError(
                "Solver produced non-finite parameter weights. The input data may contain large "
                "values and need to be preprocessed."
            )
        return self

    def _validate_input(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, Any]:
        rows = self._adopt_rows(X)
        X, Y = super()._validate_input(stand_in(X, rows), to_numpy(y, "y"), incremental, reset)
        return X if rows is None else rows, Y

    def _initialize(self, y: Any, layer_units: list[int], dtype: Any) -> None:
        for name in ("_net", "_trainer", "_optimizer", "_saved", "loss_curve_", *VALIDATED):
            self.__dict__.pop(name, None)
        self.slopes_: list[Array] = []  # the network has initial slopes
        super()._initialize(y, layer_units, dtype)
        del self._best_coefs, self._best_intercepts  # copies of all weights

    def _init_coef(self, fan_in: int, fan_out: int, dtype: Any) -> tuple[Array, Array]:
        """Draw W and b of the next layer, as scikit-learn does for one activation."""
        hidden = self._hidden_activations(self.n_layers_ - 2) or [self.activation]
        name = engine_name(hidden[min(len(self.coefs_), len(hidden) - 1)])
        factor = 2.0 if activation_sheet.resolve(name).name == "sigmoid" else 6.0
        bound, draw = np.sqrt(factor / (fan_in + fan_out)), self._random_state.uniform
        W = draw(-bound, bound, (fan_in, fan_out)).astype(dtype, copy=False)
        return W, draw(-bound, bound, fan_out).astype(dtype, copy=False)
