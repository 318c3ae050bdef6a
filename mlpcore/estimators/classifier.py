"""MLPClassifier: targets that are labels; probabilities and class weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import cycle
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import issparse
from sklearn import neural_network
from sklearn.metrics import accuracy_score
from sklearn.utils import compute_class_weight, compute_sample_weight
from sklearn.utils._param_validation import StrOptions

from mlpcore.backends import devices
from mlpcore.checks.errors import shown
from mlpcore.core import losses as loss_sheet
from mlpcore.core.losses import Loss
from mlpcore.core.sheet import MATCHED
from mlpcore.estimators.base import Estimator
from mlpcore.estimators.fitted import Array, to_numpy
from mlpcore.mlp import MLP

# binary cross-entropy of the rounded probability, as in scikit-learn, which loses digits near 1
LOG_LOSS = Loss(
    "log_loss",
    "-y * log(maximum(z, 1e-30)) - (1 - y) * log(maximum(1 - z, 1e-30))",
    "(z - y) / maximum(z * (1 - z), 1e-30)",
    outputs="sigmoid",
    matched=(
        "y * (maximum(-s, 0) + log1p(exp(-abs(s)))) - (1 - y) * log(maximum(1 - 1 / (1 + exp(-s)), "
        "1e-30))",
        MATCHED["binary_cross_entropy", "sigmoid"].slope,
    ),
)


@dataclass(eq=False, repr=False)
class MLPClassifier(Estimator, neural_network.MLPClassifier):
    """A drop-in for scikit-learn's MLPClassifier that trains and predicts on the engine.

    Args:
        hidden_layer_sizes: widths of the hidden layers.
        activation: "identity", "logistic", "tanh", "relu", another of the engine's activations,
            `(name, parameter)`, an `mc.Activation`, or a list with one for each hidden layer.
        dropout: share of each hidden layer's outputs that a step zeroes, a number or one for each
            layer; drawn from `random_state`.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".
        precision, memory_limit: as in `mc.Trainer`.
        scoring: scorer of `validation_scores_`, a name or a function `(estimator, X, y)`; None for
            accuracy or R².
        callbacks: a list as in `mc.Trainer.fit`; an entry has "loss", "learning_rate" and, if rows
            are held out, "validation_score".
        progress: True to show a progress bar.
        class_weight: `{label: weight}` or "balanced" (n / (k n_c), counted in `sample_weight`),
            times `sample_weight`; for multilabel targets a list of these.
        loss: "log_loss", or a loss of the engine's that allows the output, softmax or sigmoid.

    The other parameters, and all attributes except `slopes_`, are scikit-learn's.

    Attributes:
        slopes_: learned parameters of activations ("prelu"), (1,) or (n_l,) for each layer that has
            them.
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

    def _row_weights(self, Y: Array, weights: Array | None, incremental: bool) -> Array | None:
        if self.class_weight is None:
            return weights
        if incremental and self.class_weight == "balanced":
            raise ValueError(
                "class_weight='balanced' needs all rows at once: call fit, or give partial_fit a "
                "dict of weights"
            )
        try:
            by_class = _weigh_classes(self.class_weight, self._decode(Y), weights)
        except OverflowError:  # an integer with hundreds of digits
            by_class = np.array([np.inf])
        if not np.isfinite(by_class).all() or by_class.min() < 0 or not by_class.any():
            raise ValueError(
                "class_weight must be finite, not negative and not all 0; got "
                f"{shown(self.class_weight)}"
            )
        return by_class if weights is None else weights * by_class

    def _check_held_out(self, y: Any) -> None:
        if not self._label_binarizer.y_type_.startswith("multilabel"):
            unseen = set(np.ravel(y).tolist()) - set(self.classes_.tolist())
            if unseen:
                raise ValueError(
                    "validation: y has labels that do not occur in the training rows: "
                    f"{sorted(map(repr, unseen))}"
                )

    def _trainer_targets(self, Y: Array) -> Array:
        numbers = self.loss in ("log_loss", loss_sheet.CROSS_ENTROPY.name)
        return Y.argmax(axis=1) if numbers and self.out_activation_ == "softmax" else Y

    def _trainer_loss(self, dtype: Any) -> Loss:
        if self.loss != "log_loss":
            return super()._trainer_loss(dtype)
        # scikit-learn clips probabilities at the dtype's epsilon before their logarithm
        most = float(-np.log(np.finfo(dtype).eps))
        return dataclasses.replace(
            loss_sheet.CROSS_ENTROPY if self.out_activation_ == "softmax" else LOG_LOSS, most=most
        )

    def _measure(self, y: Any, predicted: Any, weights: Array | None) -> float:
        if not (
            isinstance(y, np.ndarray)
            and isinstance(predicted, np.ndarray)
            and y.shape == predicted.shape
        ):
            return super()._measure(y, predicted, weights)
        # ten times as fast as accuracy_score
        right = (y == predicted).reshape(len(y), -1).all(axis=1)
        return float(np.average(right, weights=weights))

    def _decode(self, output: Array) -> Array:
        if isinstance(output, np.ndarray):
            return self._label_binarizer.inverse_transform(
                output.ravel() if self.n_outputs_ == 1 else output
            )
        if self._label_binarizer.y_type_.startswith("multilabel"):
            return (output > 0.5).astype(np.int64)
        numbers = (output > 0.5).reshape(-1) if self.n_outputs_ == 1 else output.argmax(axis=1)
        numbers = numbers.astype(np.int64) * (len(self.classes_) > 1)
        if self.classes_.dtype.kind in "biuf":
            return devices.find(devices.of(output, "output")).xp.asarray(self.classes_)[numbers]
        return self.classes_[to_numpy(numbers, "prediction")]

    def predict_proba(self, X: Any) -> Any:
        """Return P (m, number of classes) for rows X, in the order of `classes_`."""
        X = self._check_rows(X)
        with devices.find(devices.of(X, "X")).active():
            if self.n_outputs_ > 1:
                return self._output(X, self._network())
            S = self._scores(X)
            of_1, scale = np.exp(np.minimum(S, 0)), 1 + np.exp(-abs(S))
            of_0 = np.exp(np.minimum(-S, 0))  # 1 - P would lose digits
            both = devices.find(devices.of(S, "S")).xp.empty((len(S), 2), S.dtype)
            both[:, :1], both[:, 1:] = of_0 / scale, of_1 / scale
            return both

    def predict_log_proba(self, X: Any) -> Any:
        """Return the logarithm of `predict_proba`."""
        return np.log(self.predict_proba(X))

    def _scores(self, X: Any) -> Array:
        """Return S[L] (m, n_L) of checked rows, the output before its activation."""
        net = self._network()
        scores = MLP(
            net.sizes, list(net.activations[1:-1]), dtype=net.dtype, init="zeros", device=net.device
        )
        scores._set(net.store.flat)
        return self._output(X, scores)


def _weigh_classes(class_weight: Any, y: Any, weights: Array | None) -> Array:
    """Return row weights (m,) as `compute_sample_weight` does, but counting given row weights.

    A row of weight 2 counts as two rows.
    """
    product: Array = compute_sample_weight(class_weight, y)
    specs = class_weight if isinstance(class_weight, list) else [class_weight]
    if weights is None or "balanced" not in specs or not weights.any():
        return product
    counted = weights != 0  # a label without weight does not take part in balancing
    product, labels = np.ones(y.shape[0]), y.toarray() if issparse(y) else y
    for spec, column in zip(cycle(specs), labels.reshape(y.shape[0], -1).T, strict=False):
        if spec == "balanced":
            some, w = column[counted], weights[counted]
            classes, at = np.unique(some, return_inverse=True)
            by_class = compute_class_weight(spec, classes=classes, y=some, sample_weight=w)
            product[counted] *= by_class[at]
        else:
            product *= compute_sample_weight(spec, column)
    return product
