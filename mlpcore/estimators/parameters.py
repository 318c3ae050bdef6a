"""Parameters of both estimators, with defaults and checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn import neural_network
from sklearn.base import BaseEstimator
from sklearn.metrics import get_scorer_names
from sklearn.utils._param_validation import Interval, InvalidParameterError, StrOptions

from mlpcore.checks import values
from mlpcore.core import activations as activation_sheet
from mlpcore.core import losses as loss_sheet
from mlpcore.core.activations import Activation
from mlpcore.core.losses import Loss

THEIRS: dict[str, Any] = neural_network.MLPClassifier._parameter_constraints
STOCHASTIC = ("sgd", "adam")
WIDEST = 2**29  # most units in a layer: NumPy can still count its weights
LONGEST = 480  # most characters in an error message


@dataclass(eq=False, repr=False)
class Parameters(BaseEstimator):
    """The keyword parameters; a subclass adds the positional ones and its own."""

    _: KW_ONLY
    solver: str = "adam"
    alpha: float = 0.0001
    batch_size: Any = "auto"
    learning_rate: str = "constant"
    learning_rate_init: float = 0.001
    power_t: float = 0.5
    max_iter: int = 200
    shuffle: bool = True
    random_state: Any = None
    tol: float = 1e-4
    verbose: bool | int = False
    warm_start: bool = False
    momentum: float = 0.9
    nesterovs_momentum: bool = True
    early_stopping: bool = False
    validation_fraction: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    n_iter_no_change: float = 10
    max_fun: int = 15000
    dropout: Any = None
    device: str = "auto"
    precision: str | None = None
    memory_limit: int | str | None = None
    scoring: Any = None
    callbacks: Any = None
    progress: bool = False

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **THEIRS,
        "activation": [
            StrOptions({"logistic", *activation_sheet.names()}),
            tuple,
            list,
            Activation,
        ],
        "loss": [
            StrOptions({"log_loss", *loss_sheet.names()}),
            tuple,
            Loss,
        ],
        "dropout": [Interval(Real, 0, 1, closed="left"), list, tuple, np.ndarray, None],
        "device": [str],
        "precision": [StrOptions({"tf32", "bfloat16", "float16"}), None],
        "memory_limit": [Interval(Integral, 1, None, closed="left"), str, None],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "callbacks": [list, tuple, None],
        "progress": ["boolean"],
    }

    def _validate_params(self) -> None:
        listed = self.activation if isinstance(self.activation, list) else [self.activation]
        if not listed:
            raise InvalidParameterError(
                "a list for activation must have one name per hidden layer; got []"
            )
        _resolve_all("activation", listed, self.activation)
        _resolve_all("loss", [self.loss], self.loss)
        try:
            super()._validate_params()
        except InvalidParameterError as error:
            if len(str(error)) <= LONGEST:
                raise
            raise InvalidParameterError(f"{error!s:.{LONGEST}}…") from None

    def _check_widths(self) -> None:
        """Raise TypeError or ValueError if a hidden layer cannot have this many units."""
        sizes = self.hidden_layer_sizes
        hidden = list(sizes) if hasattr(sizes, "__iter__") else [sizes]
        if not np.any(np.array(hidden) <= 0):  # scikit-learn raises its own error for these
            for i, size in enumerate(hidden):
                values.positive_integer(size, f"hidden_layer_sizes[{i}]", most=WIDEST)

    def _hidden_activations(self, count: int) -> list[Any]:
        """Return the activation of each of `count` hidden layers."""
        if isinstance(self.activation, list):
            return list(self.activation)
        return [self.activation] * count

    def _dropout_rates(self) -> Any:
        """Return `dropout` in the trainer's form."""
        return self.dropout.tolist() if isinstance(self.dropout, np.ndarray) else self.dropout


def engine_name(activation: Any) -> Any:
    """Return the engine's name for a scikit-learn activation; other names unchanged."""
    return "sigmoid" if isinstance(activation, str) and activation == "logistic" else activation


def _resolve_all(name: str, specs: Iterable[Any], given: Any) -> None:
    """Raise an InvalidParameterError if the engine has no activation or loss with this spec.

    A single string is left to scikit-learn's check, whose message lists the choices.
    """
    if isinstance(given, str):
        return
    resolve = (activation_sheet if name == "activation" else loss_sheet).resolve
    for spec in specs:
        try:
            resolve(engine_name(spec), name)
        except (TypeError, ValueError) as error:
            widths = isinstance(given, list | tuple) and all(isinstance(n, Integral) for n in given)
            hint = f"; did you mean hidden_layer_sizes={given!r}?" if widths else ""
            raise InvalidParameterError(f"{error}{hint}") from None
