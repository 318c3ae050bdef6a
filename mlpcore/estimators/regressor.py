"""MLPRegressor: numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from scipy.special import xlogy
from sklearn import neural_network
from sklearn.metrics import r2_score
from sklearn.utils._param_validation import StrOptions

from mlpcore.core import losses as loss_sheet
from mlpcore.core.losses import Loss
from mlpcore.estimators.base import Array, Estimator


@dataclass(eq=False, repr=False)
class MLPRegressor(Estimator, neural_network.MLPRegressor):
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
        "loss": [StrOptions(set(loss_sheet.sheet())), tuple, Loss],
    }
    _metric: ClassVar[Callable[..., float]] = r2_score

    def _reported(self, Y: Array) -> tuple[float, Array | None]:
        if self.loss == "poisson":
            return 1.0, (xlogy(Y, Y) - Y).sum(axis=1)
        return (1 / self.n_outputs_ if self.loss == "squared_error" else 1.0), None

    def _initialize(self, y: Any, layer_units: list[int], dtype: Any) -> None:
        super()._initialize(y, layer_units, dtype)
        self.out_activation_ = {"poisson": "exp", "binary_cross_entropy": "logistic"}.get(
            loss_sheet.resolve(self.loss).name, "identity"
        )

    def _predicted(self, output: Array) -> Array:
        return output.reshape(-1) if output.shape[1] == 1 else output
