"""MLPRegressor: numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from scipy.special import xlogy
from sklearn.base import RegressorMixin, _fit_context
from sklearn.metrics import r2_score
from sklearn.utils import column_or_1d
from sklearn.utils._param_validation import StrOptions

from mlpcore.core import losses as loss_sheet
from mlpcore.core.losses import Loss
from mlpcore.estimators.base import Array, Estimator


@dataclass(eq=False, repr=False)
class MLPRegressor(RegressorMixin, Estimator):
    """scikit-learn's MLPRegressor on the engine: its parameters, attributes, results, warnings and
    errors, and more.

    Args:
        loss: "squared_error", "poisson" (behind an exponential), or another of the engine's,
            `(name, parameter)`, `mc.Loss`.
        hidden_layer_sizes, activation, dropout, device, precision, memory_limit, scoring,
            callbacks, progress: as in `MLPClassifier`.

    The parameters that are not listed here, and all attributes but `slopes_`, are scikit-learn's.
    `slopes_` lists the learned parameters of activations ("prelu"), (1,) or (n_l,) for each layer
    that has some.
    """

    loss: Any = "squared_error"
    hidden_layer_sizes: Any = (100,)
    activation: Any = "relu"

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **Estimator._parameter_constraints,
        "loss": [StrOptions(set(loss_sheet.names(rowwise=False))), tuple, Loss],
    }
    _metric: ClassVar[Callable[..., float]] = r2_score
    score = Estimator.score  # the mixin's takes no arrays of a GPU

    def _validate_input(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, Any]:
        X, y = self._read(X, y, reset, y_numeric=True)
        return X, column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y

    def _targets(self, y: Any) -> Array:
        return y.reshape(-1, 1) if y.ndim == 1 else y

    def _objective(self, dtype: Any) -> Loss:
        return loss_sheet.resolve(self.loss)

    def _reported(self, Y: Array) -> tuple[float, Array | None]:
        if self.loss == "poisson":
            return 1.0, (xlogy(Y, Y) - Y).sum(axis=1)
        return (1 / self.n_outputs_ if self.loss == "squared_error" else 1.0), None

    def _out_activation(self) -> str:
        return {"poisson": "exp", "binary_cross_entropy": "logistic"}.get(
            loss_sheet.resolve(self.loss).name, "identity"
        )

    def _predicted(self, output: Array) -> Array:
        return output.reshape(-1) if output.shape[1] == 1 else output

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, validation: Any = None
    ) -> MLPRegressor:
        """Train on X and y.

        Args:
            X: (m, n) numbers: NumPy, pandas, polars, sparse, or on a GPU.
            y: (m,) or (m, n_outputs_) numbers.
            sample_weight: (m,) row weights.
            validation: `(X, y)` or `(X, y, sample_weight)`, scored after each epoch, instead of a
                part of X.
        """
        return self._fit(X, y, sample_weight, validation, incremental=False)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> MLPRegressor:
        """One epoch on X and y, as `fit` takes them, from where the last call left off."""
        return self._fit(X, y, sample_weight, None, incremental=True)
