"""MLPClassifier: labels, probabilities, class weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import cycle
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import issparse
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import column_or_1d, compute_class_weight, compute_sample_weight
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import _check_partial_fit_first_call, type_of_target, unique_labels

from mlpcore.backends import devices
from mlpcore.checks.errors import shown
from mlpcore.core import losses as loss_sheet
from mlpcore.core.losses import Loss
from mlpcore.core.sheet import MATCHED
from mlpcore.estimators.base import STOCHASTIC, Array, Estimator, host
from mlpcore.mlp import MLP

# the binary cross-entropy of a probability that has been rounded, as scikit-learn's is where it
# nears 1
LOG_LOSS = Loss(
    "log_loss",
    "-y * log(maximum(z, T(1e-30))) - (1 - y) * log(maximum(1 - z, T(1e-30)))",
    "(z - y) / maximum(z * (1 - z), T(1e-30))",
    outputs="sigmoid",
    matched=(
        "y * (maximum(-s, 0) + log1p(exp(-abs(s)))) - (1 - y) * log(maximum(1 - 1 / (1 + exp(-s)), "
        "T(1e-30)))",
        MATCHED["binary_cross_entropy", "sigmoid"].slope,
    ),
)


@dataclass(eq=False, repr=False)
class MLPClassifier(ClassifierMixin, Estimator):
    """scikit-learn's MLPClassifier on the engine: its parameters, attributes, results, warnings and
    errors, and more.

    Args:
        hidden_layer_sizes: widths of the hidden layers.
        activation: "identity", "logistic", "tanh", "relu" or another of the engine's, `(name,
            parameter)`, `mc.Activation`, or a list with one for each hidden layer.
        dropout: share of each hidden layer's outputs that a step zeroes, one number or one a layer,
            drawn by `random_state`.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".
        precision, memory_limit: as in `mc.Trainer`.
        scoring: what `validation_scores_` hold: a scorer's name or a function `(estimator, X, y)`;
            None: accuracy, R².
        callbacks: a list as in `mc.Trainer.fit`; an entry has "loss", "learning_rate" and perhaps
            "validation_score".
        progress: whether to show a bar.
        class_weight: `{label: weight}` or "balanced" (n / (k n_c), with the sums of `sample_weight`
            for counts), times `sample_weight`; a list of such for many labels.
        loss: "log_loss", or a loss of the engine's that its output, softmax or sigmoid, allows.

    The parameters that are not listed here, and all attributes but `slopes_`, are scikit-learn's.
    `slopes_` lists the learned parameters of activations ("prelu"), (1,) or (n_l,) for each layer
    that has some.
    """

    hidden_layer_sizes: Any = (100,)
    activation: Any = "relu"
    _: KW_ONLY
    class_weight: Any = None
    loss: Any = "log_loss"

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **Estimator._parameter_constraints,
        "class_weight": [dict, list, StrOptions({"balanced"}), None],
    }
    _metric: ClassVar[Callable[..., float]] = accuracy_score
    score = Estimator.score  # the mixin's takes no arrays of a GPU

    def _validate_input(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, Any]:
        X, y = self._read(X, y, reset)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if not hasattr(self, "classes_") or not (self.warm_start or incremental):
            self._label_binarizer = LabelBinarizer().fit(y)
            self.classes_ = self._label_binarizer.classes_
            return X, y
        classes = unique_labels(y)
        if self.warm_start and set(classes) != set(self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous "
                "call to fit. Previously got"
                f" {self.classes_}, `y` has {classes}"
            )
        if len(np.setdiff1d(classes, self.classes_, assume_unique=True)):
            raise ValueError(
                f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. 'y' "
                f"has {classes}."
            )
        return X, y

    def _weighted(self, y: Any, weights: Array | None, incremental: bool) -> Array | None:
        if self.class_weight is None:
            return weights
        if incremental and self.class_weight == "balanced":
            raise ValueError(
                "class_weight='balanced' needs all rows at once, not partial_fit: give partial_fit "
                "a dict"
            )
        try:
            by_class = _by_class(self.class_weight, y, weights)
        except OverflowError:  # an integer of hundreds of digits
            by_class = np.array([np.inf])
        if not np.isfinite(by_class).all() or by_class.min() < 0 or not by_class.any():
            raise ValueError(
                "class_weight must be finite, none below 0 and not all 0; got "
                f"{shown(self.class_weight)}"
            )
        return by_class if weights is None else weights * by_class

    def _check_held_out(self, y: Any) -> None:
        if not self._label_binarizer.y_type_.startswith("multilabel"):
            unseen = set(np.ravel(y).tolist()) - set(self.classes_.tolist())
            if unseen:
                raise ValueError(
                    "validation: y has labels that the training rows have not: "
                    f"{sorted(map(repr, unseen))}"
                )

    def _targets(self, y: Any) -> Array:
        numbers = self.loss in ("log_loss", loss_sheet.CROSS_ENTROPY.name)
        if numbers and self._label_binarizer.y_type_ == "multiclass" and y.ndim == 1:
            return np.searchsorted(self.classes_, y)
        return self._label_binarizer.transform(y).astype(bool)

    def _objective(self, dtype: Any) -> Loss:
        if self.loss != "log_loss":
            return loss_sheet.resolve(self.loss)
        # scikit-learn clips probabilities at the dtype's epsilon before it takes their logarithm
        most = float(-np.log(np.finfo(dtype).eps))
        return dataclasses.replace(
            loss_sheet.CROSS_ENTROPY if self.out_activation_ == "softmax" else LOG_LOSS, most=most
        )

    def _out_activation(self) -> str:
        return "softmax" if self._label_binarizer.y_type_ == "multiclass" else "logistic"

    def _score_of(self, y: Any, predicted: Any, weights: Array | None) -> float:
        if not (
            isinstance(y, np.ndarray)
            and isinstance(predicted, np.ndarray)
            and y.shape == predicted.shape
        ):
            return super()._score_of(y, predicted, weights)
        right = (
            (y == predicted).reshape(len(y), -1).all(axis=1)
        )  # a tenth of accuracy_score's time, once an epoch
        return float(np.average(right, weights=weights))

    def _predicted(self, output: Array) -> Array:
        if isinstance(output, np.ndarray):
            return self._label_binarizer.inverse_transform(
                output.ravel() if self.n_outputs_ == 1 else output
            )
        if self._label_binarizer.y_type_.startswith("multilabel"):
            return (output > 0.5).astype(np.int64)
        numbers = (output > 0.5).reshape(-1) if self.n_outputs_ == 1 else output.argmax(axis=1)
        numbers = numbers.astype(np.int64) * (len(self.classes_) > 1)
        if self.classes_.dtype.kind in "biuf":
            return devices.module(devices.of(output, "output")).asarray(self.classes_)[numbers]
        return self.classes_[host(numbers, "prediction")]

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, validation: Any = None
    ) -> MLPClassifier:
        """Train on X and y.

        Args:
            X: (m, n) numbers: NumPy, pandas, polars, sparse, or on a GPU.
            y: (m,) labels, or (m, n_outputs_) of 0 and 1.
            sample_weight: (m,) row weights.
            validation: `(X, y)` or `(X, y, sample_weight)`, scored after each epoch, instead of a
                part of X.
        """
        return self._fit(X, y, sample_weight, validation, incremental=False)

    def _check_solver(self) -> bool:
        if self.solver not in STOCHASTIC:
            raise AttributeError(
                f"partial_fit is only available for stochastic optimizers. {self.solver} is not "
                "stochastic."
            )
        return True

    @available_if(lambda estimator: estimator._check_solver())
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(
        self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None
    ) -> MLPClassifier:
        """One epoch on X and y, from where the last call left off.

        Args:
            X, y, sample_weight: as in `fit`.
            classes: all labels that any call will bring; for the first call.
        """
        if _check_partial_fit_first_call(self, classes):
            self._label_binarizer = LabelBinarizer().fit(
                y if type_of_target(y).startswith("multilabel") else classes
            )
        return self._fit(X, y, sample_weight, None, incremental=True)

    def predict_proba(self, X: Any) -> Any:
        """The probability of each class in the order of `classes_`, (m, number of classes), for
        rows X as in `predict`.
        """
        X = self._checked(X)
        with devices.active(devices.of(X, "X")):
            if self.n_outputs_ > 1:
                return self._output(X, self._network())
            S = self._scores(X)
            of_0, of_1 = (
                np.exp(np.minimum(S * sign, 0)) / (1 + np.exp(-abs(S))) for sign in (-1, 1)
            )  # 1 - P has lost digits
            return _two(of_0, of_1)

    def predict_log_proba(self, X: Any) -> Any:
        """The logarithm of `predict_proba`."""
        return np.log(self.predict_proba(X))

    def _scores(self, X: Any) -> Array:
        """S[L] (m, n_L) of checked rows: the output before its activation."""
        net = self._network()
        scores = MLP(
            net.sizes, list(net.activations[1:-1]), dtype=net.dtype, init="zeros", device=net.device
        )
        scores._set(net.store.flat)
        return self._output(X, scores)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


def _by_class(class_weight: Any, y: Any, weights: Array | None) -> Array:
    """Return scikit-learn's `compute_sample_weight`, which knows no row weights, with these: 2
    counts as the row twice.
    """
    product: Array = compute_sample_weight(class_weight, y)
    specs = class_weight if isinstance(class_weight, list) else [class_weight]
    if weights is None or "balanced" not in specs or not weights.any():
        return product
    counted, product = (
        weights != 0,
        np.ones(y.shape[0]),
    )  # a label that weighs nothing is no class to balance
    for spec, column in zip(
        cycle(specs), (y.toarray() if issparse(y) else y).reshape(y.shape[0], -1).T, strict=False
    ):
        if spec == "balanced":
            classes, at = np.unique(column[counted], return_inverse=True)
            of = compute_class_weight(
                spec, classes=classes, y=column[counted], sample_weight=weights[counted]
            )
            product[counted] *= of[at]
        else:
            product *= compute_sample_weight(spec, column)
    return product


def _two(first: Array, second: Array) -> Array:
    """Two columns (m, 1) side by side."""
    both = devices.module(devices.of(first, "P")).empty((len(first), 2), first.dtype)
    both[:, :1], both[:, 1:] = first, second
    return both
