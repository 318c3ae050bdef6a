"""MLPRegressor: targets that are numbers."""

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
from mlpcore.estimators.base import Estimator
from mlpcore.estimators.fitted import Array


@dataclass(eq=False, repr=False)
class MLPRegressor(Estimator, neural_network.MLPRegressor):
    """A drop-in for scikit-learn's MLPRegressor that trains and predicts on the engine.

    Args:
        loss: "squared_error", "poisson" (the output is an exponential), another of the engine's
            losses, `(name, parameter)` or an `mc.Loss`.
        hidden_layer_sizes, activation, dropout, device, precision, memory_limit, scoring,
            callbacks, progress: as in `MLPClassifier`.

    The other parameters, and all attributes except `slopes_`, are scikit-learn's.

    Attributes:
        slopes_: learned parameters of activations ("prelu"), (1,) or (n_l,) for each layer that has
            them.
    """

    loss: Any = "squared_error"
    hidden_layer_sizes: Any = (100,)
    activation: Any = "relu"

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **Estimator._parameter_constraints,
        "loss": [StrOptions(set(loss_sheet.names(rowwise=False))), tuple, Loss],
    }
    _metric: ClassVar[Callable[..., float]] = r2_score

    def _report_terms(self, Y: Array) -> tuple[float, Array | None]:
        if self.loss == "poisson":
            return 1.0, (xlogy(Y, Y) - Y).sum(axis=1)
        return (1 / self.n_outputs_ if self.loss == "squared_error" else 1.0), None

    def _initialize(self, y: Any, layer_units: list[int], dtype: Any) -> None:
        super()._initialize(y, layer_units, dtype)
        self.out_activation_ = {"poisson": "exp", "binary_cross_entropy": "logistic"}.get(
            loss_sheet.resolve(self.loss).name, "identity"
        )

    def _decode(self, output: Array) -> Array:
        return output.reshape(-1) if output.shape[1] == 1 else output
