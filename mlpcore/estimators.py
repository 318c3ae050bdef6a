"""scikit-learn's MLPClassifier and MLPRegressor, computed by this engine: one import changes and nothing else.

    from mlpcore.estimators import MLPClassifier, MLPRegressor

Initial weights and shuffles are drawn from `random_state` in scikit-learn's order; batches, penalty, stopping rules and the
reported loss are its own. In float64 the loss curves agree to rounding. Rows, forward and backward passes and updates are the
trainer's. See docs/estimators.md.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.optimize
from numpy.typing import NDArray
from scipy.sparse import issparse
from scipy.special import xlogy
from sklearn import neural_network
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, check_scoring, get_scorer_names, r2_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import _safe_indexing, check_random_state, column_or_1d, compute_sample_weight, gen_batches
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import _check_partial_fit_first_call, type_of_target, unique_labels
from sklearn.utils.optimize import _check_optimize_result
from sklearn.utils.validation import (
    _check_feature_names,
    _check_n_features,
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)

from mlpcore import callbacks as hooks
from mlpcore.backends import device as devices
from mlpcore.core import activations as activation_sheet
from mlpcore.core import inputs
from mlpcore.core import losses as loss_sheet
from mlpcore.core.activations import Activation
from mlpcore.core.errors import DeviceUnavailable, NonFiniteLoss
from mlpcore.core.losses import Loss
from mlpcore.core.optimizers import SGD, Adam
from mlpcore.mlp import MLP
from mlpcore.trainer import Trainer

__all__ = ["MLPClassifier", "MLPRegressor"]

Array = NDArray[Any]
log = logging.getLogger("mlpcore")
STOCHASTIC = ("sgd", "adam")
OUTPUTS = {"logistic": "sigmoid"}  # scikit-learn's name of an activation: ours
SPARSE_BYTES = 64 << 20  # of the rows of a sparse X that are made dense in one go
# the binary cross-entropy of a probability that has been rounded, as scikit-learn's is where it nears 1
LOG_LOSS = Loss(
    "log_loss",
    "-y * log(maximum(z, T(1e-30))) - (1 - y) * log(maximum(1 - z, T(1e-30)))",
    "(z - y) / maximum(z * (1 - z), T(1e-30))",
    outputs="sigmoid",
    matched=(
        "y * (maximum(-s, 0) + log1p(exp(-abs(s)))) - (1 - y) * log(maximum(1 - 1 / (1 + exp(-s)), T(1e-30)))",
        "z - y",
    ),
)
THEIRS: dict[str, Any] = neural_network.MLPClassifier._parameter_constraints


class HeldOut(NamedTuple):
    """The rows that `validation_scores_` are about."""

    X: Any
    y: Any
    weights: Any


class Rows:
    """The training rows, and scikit-learn's J on them: share * (the trainer's J without penalty) + penalty + offset.

    Dense rows are prepared once and read by their numbers; sparse ones are made dense batch by batch.

    Args:
        trainer: its `l2` is set to `alpha` over the weight of each batch.
        X, Y, weights: (m, n_0), (m, …) and (m,) or None.
        share: what scikit-learn reports of the loss, whose gradient is that of all of it.
        offsets: (m,), what a row's loss is more than the trainer's, or None.
    """

    def __init__(
        self, trainer: Trainer, X: Any, Y: Array, weights: Array | None, alpha: float, share: float, offsets: Array | None
    ) -> None:
        self.trainer, self.X, self.Y, self.weights = trainer, X, Y, weights
        self.alpha, self.share, self.offsets = alpha, share, offsets
        self.data = None if issparse(X) else trainer.prepare(X, Y, weights)

    def step(self, rows: Array) -> tuple[Any, float]:
        """One update. Returns the trainer's J, and what is to be added to `share` times it."""
        constant = self._begin(rows)
        if self.data is not None:
            return self.trainer.step(self.data, rows=rows), constant
        return self.trainer.step(*self._dense(rows)), constant

    def gradient(self) -> tuple[float, Array]:
        """J over all rows and its gradient, which holds until the next call."""
        constant = self._begin(slice(None))
        if self.data is not None:
            J, gradient = self.trainer.gradient(self.data)
            return self.share * J + constant, devices.to_host(self.trainer.net.device, gradient)
        J, total = 0.0, np.zeros(self.trainer.net.parameters.size)
        width, whole = self.X.shape[1] * self.X.dtype.itemsize, self._weight(slice(None))
        for part in gen_batches(self.X.shape[0], max(1, SPARSE_BYTES // width)):
            weight = self._weight(part) / whole
            if weight:
                value, gradient = self.trainer.gradient(*self._dense(part))
                J += weight * value
                total += weight * devices.to_host(self.trainer.net.device, gradient)
        return self.share * J + constant, total

    def _dense(self, rows: Any) -> tuple[Array, Array, Array | None]:
        return self.X[rows].toarray(), self.Y[rows], None if self.weights is None else self.weights[rows]

    def _weight(self, rows: Any) -> float:
        part = self.Y[rows] if self.weights is None else self.weights[rows]
        return float(len(part) if self.weights is None else part.sum())

    def _begin(self, rows: Any) -> float:
        """Sets the penalty for a batch; the constant of its J."""
        weight, trainer = self._weight(rows), self.trainer
        if weight == 0:
            raise ZeroDivisionError("Weights sum to zero, can't be normalized: sample_weight is 0 on all rows of a batch")
        l2 = self.alpha / weight
        if trainer.l2 != l2:
            trainer.l2 = l2
        constant = 0.0
        if self.offsets is not None:
            constant = float(np.average(self.offsets[rows], weights=None if self.weights is None else self.weights[rows]))
        if self.share != 1 and l2:
            W = trainer.net.parameters[: trainer.net.layout.weights]
            constant += (1 - self.share) * 0.5 * l2 * float(W @ W)
        return constant


@dataclass(eq=False, repr=False)
class _Estimator(BaseEstimator):
    """What the two have in common: parameters, fitting, the network behind `coefs_` and `intercepts_`.

    The fields are the parameters; a subclass puts the positional ones before them.
    """

    _: KW_ONLY
    solver: str = "adam"
    alpha: float = 0.0001
    batch_size: int | str = "auto"
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
    device: str = "auto"
    precision: str | None = None
    memory_limit: int | str | None = None
    scoring: Any = None
    callbacks: Any = None
    progress: bool = False

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **THEIRS,
        "activation": [StrOptions({"logistic", *activation_sheet.names()}), tuple, list, Activation],
        "loss": [StrOptions({"log_loss", *loss_sheet.sheet(), loss_sheet.CROSS_ENTROPY.name}), tuple, Loss],
        "device": [str],
        "precision": [StrOptions({"tf32", "bfloat16", "float16"}), None],
        "memory_limit": [Interval(Integral, 1, None, closed="left"), str, None],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "callbacks": [list, tuple, None],
        "progress": ["boolean"],
    }

    # what the subclasses know of their targets

    _metric: ClassVar[Callable[..., float]]

    def _validate_input(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, Any]:
        raise NotImplementedError

    def _targets(self, y: Any) -> Array:
        """What the trainer takes for y: (m,) class numbers, or (m, n_L)."""
        raise NotImplementedError

    def _objective(self, dtype: Any) -> Loss:
        """The trainer's loss."""
        raise NotImplementedError

    def _reported(self, Y: Array) -> tuple[float, Array | None]:
        """Share and offsets, as `Rows` takes them."""
        return 1.0, None

    def _out_activation(self) -> str:
        raise NotImplementedError

    def _predicted(self, output: Array) -> Array:
        """The prediction that an output (m, n_L) means."""
        raise NotImplementedError

    # -- fitting --

    def _fit(self, X: Any, y: Any, sample_weight: Any, validation: Any, incremental: bool) -> Any:
        sizes = self.hidden_layer_sizes
        hidden = list(sizes) if hasattr(sizes, "__iter__") else [sizes]
        if np.any(np.array(hidden) <= 0):
            raise ValueError(f"hidden_layer_sizes must be > 0, got {hidden}.")
        first = not hasattr(self, "coefs_") or (not self.warm_start and not incremental)
        given = X
        X, y = self._validate_input(X, y, incremental, reset=first)
        weights = None if sample_weight is None else _check_sample_weight(_host(sample_weight, "sample_weight"), X)
        Y = self._targets(y)
        self.n_outputs_ = len(self.classes_) if Y.ndim == 1 else Y.shape[1]
        random = check_random_state(self.random_state)
        units = [X.shape[1], *hidden, self.n_outputs_]
        if first:
            self._initialize(units, random, X.dtype, validation is not None)
        elif [len(w) for w in self.coefs_] + [len(self.intercepts_[-1])] != units:
            raise ValueError(f"hidden_layer_sizes and y make layers of {units}; what was fitted before has other ones")
        training = self._weighted(y, weights, incremental)
        if self.solver == "lbfgs":
            self._fit_lbfgs(X, Y, training)
        else:
            self._fit_stochastic(X, y, Y, weights, training, given, validation, random, incremental)
        if not all(np.isfinite(array).all() for array in (*self.coefs_, *self.intercepts_)):
            raise ValueError(
                "Solver produced non-finite parameter weights. The input data may contain large values and need to be"
                " preprocessed."
            )
        return self

    def _weighted(self, y: Any, weights: Array | None, incremental: bool) -> Array | None:
        """The row weights that the loss gets."""
        return weights

    def _initialize(self, units: list[int], random: np.random.RandomState, dtype: Any, validated: bool) -> None:
        """Initial weights, drawn layer by layer, W before b, and the attributes as they are before the first epoch."""
        for name in ("_net", "_trainer", "_saved"):
            vars(self).pop(name, None)
        self.n_iter_ = self.t_ = 0
        self.n_layers_ = len(units)
        self.out_activation_ = self._out_activation()
        self.coefs_: list[Array] = []
        self.intercepts_: list[Array] = []
        hidden = self._hidden(len(units) - 2) or [self.activation]
        for l, (wide, out) in enumerate(pairwise(units)):
            name = hidden[min(l, len(hidden) - 1)]
            bound = np.sqrt((2.0 if activation_sheet.resolve(_ours(name)).name == "sigmoid" else 6.0) / (wide + out))
            self.coefs_.append(random.uniform(-bound, bound, (wide, out)).astype(dtype, copy=False))
            self.intercepts_.append(random.uniform(-bound, bound, out).astype(dtype, copy=False))
        if self.solver in STOCHASTIC:
            self.loss_curve_: list[float] = []
            self._no_improvement_count = 0
            scored = self.early_stopping or validated
            self.best_loss_ = None if self.early_stopping else np.inf
            self.validation_scores_ = [] if scored else None
            self.best_validation_score_ = -np.inf if scored else None

    def _hidden(self, count: int) -> list[Any]:
        """The activation of each hidden layer."""
        return list(self.activation) if isinstance(self.activation, list) else [self.activation] * count

    def _begin(self, net: MLP, optimizer: Any) -> Trainer:
        loss = self._objective(net.dtype)
        return Trainer(net, loss, optimizer, precision=self.precision, memory_limit=self.memory_limit)

    def _rows(self, trainer: Trainer, X: Any, Y: Array, weights: Array | None) -> Rows:
        X = X.tocsr() if issparse(X) else X
        return Rows(trainer, X, Y, weights, self.alpha, *self._reported(Y))

    def _fit_lbfgs(self, X: Any, Y: Array, weights: Array | None) -> None:
        """SciPy's L-BFGS-B on the trainer's gradient, in float64."""
        self.coefs_, self.intercepts_ = ([a.astype(np.float64, copy=False) for a in x] for x in (self.coefs_, self.intercepts_))
        net = self._network(self._place(X))
        trainer = self._begin(net, SGD(0.0))
        rows = self._rows(trainer, X, Y, weights)

        def value_and_gradient(parameters: Array) -> tuple[float, Array]:
            net.parameters[...] = devices.to_device(net.device, parameters)
            J, gradient = rows.gradient()
            return J, gradient.copy()

        with Run(self, trainer) as run:

            def iteration(intermediate_result: Any) -> None:
                if run.epoch_end({"loss": float(intermediate_result.fun)}):
                    raise StopIteration

            result = scipy.optimize.minimize(
                value_and_gradient,
                devices.to_host(net.device, net.parameters).copy(),
                method="L-BFGS-B",
                jac=True,
                options={"maxfun": self.max_fun, "maxiter": self.max_iter, "gtol": self.tol},
                callback=iteration,
            )
            net.parameters[...] = devices.to_device(net.device, result.x)
        if run.stopped:
            result.status = 0  # as asked for
        self.n_iter_ = _check_optimize_result("lbfgs", result, self.max_iter)
        self.loss_ = float(result.fun)
        self._show(net)

    def _fit_stochastic(
        self, X: Any, y: Any, Y: Array, weights: Array | None, training: Array | None, given: Any, validation: Any,
        random: np.random.RandomState, incremental: bool,
    ) -> None:  # fmt: skip
        """Epochs of shuffled mini-batches until scikit-learn's rules stop them; one of them if `incremental`."""
        if self.early_stopping and incremental:
            raise ValueError("partial_fit does not support early_stopping=True")
        trainer = self._resume(self._network(self._place(X)), incremental)
        train, held_out = self._hold_out(X, y, Y, weights, given, validation, random)
        rows, size, net = self._rows(trainer, X, Y, training), self._batch_rows(len(train)), trainer.net
        best = net.parameters.copy() if self.early_stopping else None
        self.n_iter_ = 0
        with Run(self, trainer) as run:
            try:
                while self.n_iter_ < self.max_iter:
                    if self.shuffle:
                        order = np.arange(len(train))
                        random.shuffle(order)
                        train = train[order]
                    self.loss_ = _epoch(rows, train, size, run)
                    self.n_iter_ += 1
                    self.t_ += len(train)
                    self.loss_curve_.append(self.loss_)
                    self._say("Iteration %d, loss = %.8f", self.n_iter_, self.loss_)
                    entry = {"loss": self.loss_, "learning_rate": trainer.learning_rate}
                    if held_out is not None:
                        entry["validation_score"] = self._score_epoch(net, held_out)
                        if best is not None and self._is_best(entry["validation_score"]):
                            best[...] = net.parameters
                    self._count(entry)
                    if self.learning_rate == "invscaling" and self.solver == "sgd":
                        self._optimizer.learning_rate = self.learning_rate_init / (self.t_ + 1) ** self.power_t
                    stop = run.epoch_end(entry)
                    if self._no_improvement_count > self.n_iter_no_change and self._stops():
                        break
                    if incremental or stop:
                        break
                    if self.n_iter_ == self.max_iter:
                        warnings.warn(
                            f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the optimization hasn't"
                            " converged yet.",
                            ConvergenceWarning,
                            stacklevel=2,
                        )
            except KeyboardInterrupt:
                warnings.warn("Training interrupted by user.", stacklevel=2)
            if best is not None:
                net.parameters[...] = best
        if incremental:
            self._trainer = trainer
        else:
            self._saved = _state(trainer)
        self._show(net)

    def _resume(self, net: MLP, incremental: bool) -> Trainer:
        """A trainer of this network: a fresh one, or with the optimizer's state of the last call."""
        trainer = vars(self).pop("_trainer", None)
        if incremental and trainer is not None:
            if trainer.net is net:
                return trainer
            self._saved = _state(trainer)
        if not incremental or not hasattr(self, "_optimizer"):
            self._saved = None
            if self.solver == "sgd":
                self._optimizer: Any = SGD(self.learning_rate_init, self.momentum, bool(self.nesterovs_momentum))
            else:
                self._optimizer = Adam(self.learning_rate_init, self.beta_1, self.beta_2, self.epsilon, epsilon_hat=True)
        trainer = self._begin(net, self._optimizer)
        if self._saved:
            _restore(trainer, self._saved)
        return trainer

    def _hold_out(
        self, X: Any, y: Any, Y: Array, weights: Array | None, given: Any, validation: Any, random: np.random.RandomState
    ) -> tuple[Array, HeldOut | None]:
        """Numbers of the rows to train on, and those that are held out: the user's, or a part of X for early stopping."""
        everything = np.arange(X.shape[0])
        if validation is not None:
            if not isinstance(validation, list | tuple) or len(validation) not in (2, 3):
                raise TypeError("validation must be (X, y) or (X, y, sample_weight)")
            Xv, yv, wv = (*validation, None)[:3]
            return everything, HeldOut(Xv if self.scoring else self._checked(Xv), _host(yv, "validation: y"), wv)
        if not self.early_stopping:
            return everything, None
        stratify = Y if isinstance(self, ClassifierMixin) and self.n_outputs_ == 1 else None
        train, held = train_test_split(
            everything, random_state=random, test_size=self.validation_fraction, stratify=stratify
        )  # fmt: skip
        if len(held) < 2:
            raise ValueError("The validation set is too small. Increase 'validation_fraction' or the size of your dataset.")
        Xv = _safe_indexing(given, held) if self.scoring else X[devices.to_device(devices.of(X), held)]
        return train, HeldOut(Xv, y[held], None if weights is None else weights[held])

    def _batch_rows(self, count: int) -> int:
        if self.batch_size == "auto":
            return min(200, count)
        if self.batch_size > count:
            warnings.warn("Got `batch_size` less than 1 or larger than sample size. It is going to be clipped", stacklevel=2)
        return int(np.clip(self.batch_size, 1, count))

    def _score_epoch(self, net: MLP, held_out: HeldOut) -> float:
        """The score on the held-out rows; NaN where a prediction is not finite."""
        X, y, weights = held_out
        if self.scoring is not None:
            self._show(net)
            more = {} if weights is None else {"sample_weight": weights}
            score = float(check_scoring(self, self.scoring)(self, X, y, **more))
        else:
            predicted = _host(self._predicted(self._output(X, net)), "prediction")
            usable = predicted.dtype.kind != "f" or np.isfinite(predicted).all()
            score = float(type(self)._metric(y, predicted, sample_weight=weights)) if usable else np.nan
        self.validation_scores_ = [*(self.validation_scores_ or ()), score]
        return score

    def _is_best(self, score: float) -> bool:
        return score > self.best_validation_score_

    def _count(self, entry: dict[str, float]) -> None:
        """How many epochs in a row have not improved by `tol`: in the score with early stopping, else in the loss."""
        score = entry.get("validation_score")
        if self.early_stopping:
            self._no_improvement_count = self._no_improvement_count + 1 if score < self.best_validation_score_ + self.tol else 0
        else:
            worse = self.loss_ > self.best_loss_ - self.tol
            self._no_improvement_count = self._no_improvement_count + 1 if worse else 0
            if self.loss_ < self.best_loss_:
                self.best_loss_ = self.loss_
        if score is not None:
            self._say("Validation score: %f", score)
            if score > self.best_validation_score_:
                self.best_validation_score_ = score

    def _stops(self) -> bool:
        """Whether too many epochs without an improvement end the training; an adaptive rate falls instead while it can."""
        figure = "Validation score" if self.early_stopping else "Training loss"
        message = f"{figure} did not improve more than tol={self.tol:f} for {self.n_iter_no_change} consecutive epochs."
        if self.learning_rate != "adaptive" or self.solver != "sgd":
            self._say(f"{message} Stopping.")
            return True
        if self._optimizer.learning_rate <= 1e-6:
            self._say(f"{message} Learning rate too small. Stopping.")
            return True
        self._optimizer.learning_rate /= 5
        self._say(f"{message} Setting learning rate to %f", self._optimizer.learning_rate)
        self._no_improvement_count = 0
        return False

    def _say(self, message: str, *values: object) -> None:
        if self.verbose:
            print(message % values if values else message)

    # -- the network behind coefs_ and intercepts_ --

    def _place(self, X: Any) -> str:
        """The device to fit on: with "auto" the one on which X lies, if it lies on one."""
        there = devices.of(X)
        return there if self.device == "auto" and there != "cpu" else devices.choose(self.device)

    def _network(self, device: str | None = None) -> MLP:
        """The network of `coefs_` and `intercepts_` as they are now; on the CPU they become views of its parameters."""
        arrays = (*self.coefs_, *self.intercepts_)
        sizes = [len(w) for w in self.coefs_] + [len(self.intercepts_[-1])]
        dtype = "float32" if all(array.dtype == np.float32 for array in arrays) else "float64"
        net: MLP | None = vars(self).get("_net")
        if net is not None and (list(net.sizes), net.dtype, device or net.device) == (sizes, dtype, net.device):
            if net.device == "cpu" and all(mine is its for mine, its in zip(arrays, (*net.W[1:], *net.b[1:]), strict=True)):
                return net
        else:
            hidden = [_ours(name) for name in self._hidden(len(sizes) - 2)]
            output = _ours(self.out_activation_)
            net = MLP(sizes, hidden, output, dtype=dtype, init="zeros", device=device or self._usable())
            self._net = net
        flat = np.concatenate([np.ravel(array) for array in arrays]).astype(dtype, copy=False)
        net.parameters[...] = devices.to_device(net.device, flat)
        if net.device == "cpu":
            self._show(net)
        return net

    def _usable(self) -> str:
        """The device to predict on; the CPU on a machine without the GPU of the one where it was fitted."""
        try:
            return devices.choose(self.device)
        except DeviceUnavailable as reason:
            log.warning("an estimator of %s predicts on the CPU: %s", self.device, reason)
            return "cpu"

    def _show(self, net: MLP) -> None:
        """The network's parameters as `coefs_` and `intercepts_`: views on the CPU, copies from a GPU."""
        self.coefs_[:] = [devices.to_host(net.device, w) for w in net.W[1:]]
        self.intercepts_[:] = [devices.to_host(net.device, b) for b in net.b[1:]]

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in super().__getstate__().items() if key not in ("_net", "_trainer")}
        return state | {"_saved": _state(self._trainer)} if "_trainer" in vars(self) else state

    # -- X, and predictions --

    def _read(self, X: Any, y: Any, reset: bool, **options: Any) -> tuple[Any, Any]:
        """X and y as scikit-learn checks them; of an X on a GPU the engine does, and it stays there."""
        y = _host(y, "y")
        options["multi_output"] = True
        if devices.of(X) == "cpu":
            return validate_data(
                self, X, y, accept_sparse=["csr", "csc"], dtype=(np.float64, np.float32), reset=reset, **options
            )  # fmt: skip
        y = validate_data(self, y=y, reset=reset, **options)
        X = self._adopted(X, reset)
        if len(X) != len(y):
            raise ValueError(f"X has {len(X)} rows and y {len(y)}: they must have as many")
        return X, y

    def _adopted(self, X: Any, reset: bool) -> Any:
        X = inputs.matrix(X, None, adopt=devices.adopter(devices.of(X)))
        inputs.require_finite(X, "X")
        _check_n_features(self, X, reset=reset)
        return X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)

    def _checked(self, X: Any) -> Any:
        """Rows to predict for."""
        check_is_fitted(self)
        if devices.of(X) == "cpu":
            return validate_data(self, X, accept_sparse=["csr", "csc"], reset=False)
        _check_feature_names(self, X, reset=False)
        return self._adopted(X, reset=False)

    def _output(self, X: Any, net: MLP) -> Array:
        """Z[L] (m, n_L) of checked rows, in X's library and on its device."""
        logistic = self.out_activation_ == "logistic"
        if logistic:  # from S[L]: the engine's sigmoid rounds to 0 where this one has digits left
            scores = MLP(net.sizes, list(net.activations[1:-1]), dtype=net.dtype, init="zeros", device=net.device)
            scores._set(net.parameters)
            net = scores
        if issparse(X):
            X = X.tocsr()
            parts = gen_batches(X.shape[0], max(1, SPARSE_BYTES // (X.shape[1] * X.dtype.itemsize)))
            output: Array = np.concatenate([net.predict(X[part].toarray()) for part in parts])
        else:
            output = net.predict(X)
        output = output.astype(np.result_type(X.dtype, net.dtype), copy=False)
        return np.exp(np.minimum(output, 0)) / (1 + np.exp(-abs(output))) if logistic else output

    def predict(self, X: Any) -> Any:
        """The prediction for each row of X: a label or number; (m, n_outputs_) of them where y had several columns.

        Args:
            X: (m, n_features_in_), dense or sparse; on a GPU, the result is there as well.
        """
        X = self._checked(X)
        return self._predicted(self._output(X, self._network()))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy or R² of the prediction for X, (m, n_features_in_), as scikit-learn defines them; a float."""
        if devices.of(X) == "cpu":
            return super().score(X, y, sample_weight)  # type: ignore[misc]
        weights = None if sample_weight is None else _host(sample_weight, "sample_weight")
        return float(type(self)._metric(_host(y, "y"), _host(self.predict(X), "prediction"), sample_weight=weights))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


@dataclass(eq=False, repr=False)
class MLPClassifier(ClassifierMixin, _Estimator):
    """scikit-learn's MLPClassifier on the engine: its parameters, attributes, results, warnings and errors, and more.

    Args:
        hidden_layer_sizes: widths of the hidden layers.
        activation: "identity", "logistic", "tanh", "relu" or another of the engine's, `(name, parameter)`, `mc.Activation`,
            or a list with one for each hidden layer.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".
        precision, memory_limit: as in `mc.Trainer`.
        scoring: what `validation_scores_` hold: a scorer's name or a function `(estimator, X, y)`; None: accuracy, R².
        callbacks: a list as in `mc.Trainer.fit`; an entry has "loss", "learning_rate" and perhaps "validation_score".
        progress: whether to show a bar.
        class_weight: `{label: weight}` or "balanced", beside `sample_weight`; a list of such for many labels.
        loss: "log_loss", or a loss of the engine's that its output, softmax or sigmoid, allows.

    The parameters that are not listed here, and all attributes, are scikit-learn's.
    """

    hidden_layer_sizes: Any = (100,)
    activation: Any = "relu"
    _: KW_ONLY
    class_weight: Any = None
    loss: Any = "log_loss"

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **_Estimator._parameter_constraints,
        "class_weight": [dict, list, StrOptions({"balanced"}), None],
    }
    _metric: ClassVar[Callable[..., float]] = accuracy_score

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
                "warm_start can only be used where `y` has the same classes as in the previous call to fit. Previously got"
                f" {self.classes_}, `y` has {classes}"
            )
        if len(np.setdiff1d(classes, self.classes_, assume_unique=True)):
            raise ValueError(f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. 'y' has {classes}.")
        return X, y

    def _weighted(self, y: Any, weights: Array | None, incremental: bool) -> Array | None:
        if self.class_weight is None:
            return weights
        if incremental and self.class_weight == "balanced":
            raise ValueError("class_weight='balanced' needs all rows at once, not partial_fit: give partial_fit a dict")
        by_class = compute_sample_weight(self.class_weight, y)
        return by_class if weights is None else weights * by_class

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
        return dataclasses.replace(loss_sheet.CROSS_ENTROPY if self.out_activation_ == "softmax" else LOG_LOSS, most=most)

    def _out_activation(self) -> str:
        return "softmax" if self._label_binarizer.y_type_ == "multiclass" else "logistic"

    def _predicted(self, output: Array) -> Array:
        if isinstance(output, np.ndarray):
            return self._label_binarizer.inverse_transform(output.ravel() if self.n_outputs_ == 1 else output)
        if self._label_binarizer.y_type_.startswith("multilabel"):
            return (output > 0.5).astype(np.int64)
        numbers = (output > 0.5).reshape(-1) if self.n_outputs_ == 1 else output.argmax(axis=1)
        numbers = numbers.astype(np.int64) * (len(self.classes_) > 1)
        if self.classes_.dtype.kind in "biuf":
            return devices.module(devices.of(output)).asarray(self.classes_)[numbers]
        return self.classes_[_host(numbers, "prediction")]

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, validation: Any = None) -> MLPClassifier:
        """Train on X and y.

        Args:
            X: (m, n) numbers: NumPy, pandas, polars, sparse, or on a GPU.
            y: (m,) labels, or (m, n_outputs_) of 0 and 1.
            sample_weight: (m,) row weights.
            validation: `(X, y)` or `(X, y, sample_weight)`, scored after each epoch, for early stopping in place of a part of X.
        """
        return self._fit(X, y, sample_weight, validation, incremental=False)

    def _check_solver(self) -> bool:
        if self.solver not in STOCHASTIC:
            raise AttributeError(f"partial_fit is only available for stochastic optimizers. {self.solver} is not stochastic.")
        return True

    @available_if(lambda estimator: estimator._check_solver())
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> MLPClassifier:
        """One epoch on X and y, from where the last call left off.

        Args:
            X, y, sample_weight: as in `fit`.
            classes: all labels that any call will bring; for the first call.
        """
        if _check_partial_fit_first_call(self, classes):
            self._label_binarizer = LabelBinarizer().fit(y if type_of_target(y).startswith("multilabel") else classes)
        return self._fit(X, y, sample_weight, None, incremental=True)

    def predict_proba(self, X: Any) -> Any:
        """The probability of each class in the order of `classes_`, (m, number of classes), for rows X as in `predict`."""
        X = self._checked(X)
        P = self._output(X, self._network())
        return np.stack([1 - P[:, 0], P[:, 0]], axis=1) if self.n_outputs_ == 1 else P

    def predict_log_proba(self, X: Any) -> Any:
        """The logarithm of `predict_proba`."""
        return np.log(self.predict_proba(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


@dataclass(eq=False, repr=False)
class MLPRegressor(RegressorMixin, _Estimator):
    """scikit-learn's MLPRegressor on the engine: its parameters, attributes, results, warnings and errors, and more.

    Args:
        loss: "squared_error", "poisson" (behind an exponential), or another of the engine's, `(name, parameter)`, `mc.Loss`.
        hidden_layer_sizes, activation, device, precision, memory_limit, scoring, callbacks, progress: as in `MLPClassifier`.

    The parameters that are not listed here, and all attributes, are scikit-learn's.
    """

    loss: Any = "squared_error"
    hidden_layer_sizes: Any = (100,)
    activation: Any = "relu"

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **_Estimator._parameter_constraints,
        "loss": [StrOptions(set(loss_sheet.sheet())), tuple, Loss],
    }
    _metric: ClassVar[Callable[..., float]] = r2_score

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
        return {"poisson": "exp", "binary_cross_entropy": "logistic"}.get(loss_sheet.resolve(self.loss).name, "identity")

    def _predicted(self, output: Array) -> Array:
        return output.reshape(-1) if output.shape[1] == 1 else output

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, validation: Any = None) -> MLPRegressor:
        """Train on X and y.

        Args:
            X: (m, n) numbers: NumPy, pandas, polars, sparse, or on a GPU.
            y: (m,) or (m, n_outputs_) numbers.
            sample_weight: (m,) row weights.
            validation: `(X, y)` or `(X, y, sample_weight)`, scored after each epoch, for early stopping in place of a part of X.
        """
        return self._fit(X, y, sample_weight, validation, incremental=False)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> MLPRegressor:
        """One epoch on X and y, as `fit` takes them, from where the last call left off."""
        return self._fit(X, y, sample_weight, None, incremental=True)


class Run:
    """What stands around the epochs of one fit: callbacks, the bar, the history."""

    def __init__(self, estimator: _Estimator, trainer: Trainer):
        self.trainer, self.observers = trainer, hooks.resolve(estimator.callbacks or [])
        self.total, self.shown = estimator.max_iter, estimator.progress
        self.history: dict[str, list[float]] = {}
        self.stopped = False

    def __enter__(self) -> Run:
        from tqdm.auto import tqdm  # not at import: it brings asyncio

        self.bar = tqdm(total=self.total, unit="epoch", disable=not self.shown)
        self.began = time.perf_counter()
        for observer in self.observers:
            observer.fit_begin(self.trainer)
        return self

    def epoch_end(self, entry: dict[str, float]) -> bool:
        """Takes in one epoch; whether a callback wants no more."""
        now = time.perf_counter()
        entry["seconds"], self.began = now - self.began, now
        for key, value in entry.items():
            self.history.setdefault(key, []).append(value)
        self.bar.set_postfix({key: f"{value:.4g}" for key, value in entry.items() if key != "seconds"}, refresh=False)
        self.bar.update()
        answers = [observer.epoch_end(self.trainer, entry) for observer in self.observers]
        self.stopped = any(isinstance(answer, bool | np.bool_) and answer for answer in answers)
        return self.stopped

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.bar.close()
        if kind is None:
            for observer in self.observers:
                observer.fit_end(self.trainer, self.history)


def _epoch(rows: Rows, order: Array, size: int, run: Run) -> float:
    """One pass over the rows in this order; the mean of J, each batch by its rows.

    J or a gradient that overflows makes all parameters NaN, as it does where nobody looks, and the rest of the training is NaN.
    """
    net = rows.trainer.net
    found = []
    try:
        for batch in gen_batches(len(order), size):
            part = order[batch]
            J, constant = rows.step(part)
            found.append((J, constant, len(part)))
            for observer in run.observers:
                observer.step_end(rows.trainer, J)
        return sum((rows.share * float(J) + constant) * count for J, constant, count in found) / len(order)
    except NonFiniteLoss:
        net.parameters[...] = np.nan
        return float("nan")


def _state(trainer: Trainer) -> dict[str, Any]:
    """The optimizer's state, on the host."""
    device = trainer.net.device
    vectors = {name: np.array(devices.to_host(device, vector)) for name, vector in trainer._step.state.items()}
    return {"step": trainer.progress.step, "vectors": vectors}


def _restore(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Puts back what `_state` returned."""
    trainer._step._bind_optimizer()
    trainer.progress.step = saved["step"]
    for name, vector in trainer._step.state.items():
        vector[...] = devices.to_device(trainer.net.device, saved["vectors"][name])


def _ours(activation: Any) -> Any:
    """The engine's name of an activation."""
    return OUTPUTS.get(activation, activation) if isinstance(activation, str) else activation


def _host(array: Any, name: str) -> Any:
    """An array of a GPU's as NumPy's; anything else as it is."""
    return array if devices.of(array) == "cpu" else devices.adopt_on_host(array, name)
