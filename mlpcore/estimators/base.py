"""What both estimators have in common: parameters, fitting by scikit-learn's rules, the network
behind `coefs_`.
"""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.optimize
import threadpoolctl
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn import neural_network
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import check_scoring, get_scorer_names
from sklearn.model_selection import train_test_split
from sklearn.utils import _safe_indexing, check_random_state, gen_batches
from sklearn.utils._param_validation import Interval, InvalidParameterError, StrOptions
from sklearn.utils.optimize import _check_optimize_result
from sklearn.utils.validation import (
    _check_feature_names,
    _check_n_features,
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)

from mlpcore.backends import devices
from mlpcore.checks import arrays, values
from mlpcore.checks.errors import DeviceUnavailable
from mlpcore.core import activations as activation_sheet
from mlpcore.core import losses as loss_sheet
from mlpcore.core.activations import Activation
from mlpcore.core.losses import Loss
from mlpcore.core.optimizers import SGD, Adam
from mlpcore.estimators.epochs import SPARSE_BYTES, Rows, Run, epoch, restore, state_of
from mlpcore.mlp import MLP
from mlpcore.trainer import Trainer

Array = NDArray[Any]
log = logging.getLogger("mlpcore")
STOCHASTIC = ("sgd", "adam")
WIDEST, LONGEST = (
    2**29,
    480,
)  # a layer, so that NumPy can count its weights; characters of a message
OUTPUTS = {"logistic": "sigmoid"}  # scikit-learn's name of an activation: ours
VALIDATED = ("best_loss_", "validation_scores_", "best_validation_score_")
THEIRS: dict[str, Any] = neural_network.MLPClassifier._parameter_constraints


class HeldOut(NamedTuple):
    """The rows that `validation_scores_` are about."""

    X: Any
    y: Any
    weights: Any


@dataclass(eq=False, repr=False)
class Estimator(BaseEstimator, ABC):
    """What the two have in common: parameters, fitting, the network behind `coefs_` and
    `intercepts_`.

    The fields are the parameters; a subclass puts the positional ones before them.
    """

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
            StrOptions({"log_loss", *loss_sheet.sheet(), loss_sheet.CROSS_ENTROPY.name}),
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

    # what the subclasses know of their targets

    _metric: ClassVar[Callable[..., float]]

    @abstractmethod
    def _validate_input(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, Any]:
        """X and y as scikit-learn checks them for this estimator."""

    @abstractmethod
    def _targets(self, y: Any) -> Array:
        """What the trainer takes for y: (m,) class numbers, or (m, n_L)."""

    @abstractmethod
    def _objective(self, dtype: Any) -> Loss:
        """The trainer's loss."""

    def _reported(self, Y: Array) -> tuple[float, Array | None]:
        """Share and offsets, as `Rows` takes them."""
        return 1.0, None

    @abstractmethod
    def _out_activation(self) -> str:
        """scikit-learn's name of the output activation."""

    @abstractmethod
    def _predicted(self, output: Array) -> Array:
        """The prediction that an output (m, n_L) means."""

    def _score_of(self, y: Any, predicted: Any, weights: Array | None) -> float:
        """The metric, of arrays that need no more checks."""
        return type(self)._metric(y, predicted, sample_weight=weights)

    def _check_held_out(self, y: Any) -> None:
        """Raises a ValueError if these targets of held-out rows can never be met."""

    # -- fitting --

    def _validate_params(self) -> None:
        for name, resolve in (
            ("activation", activation_sheet.resolve),
            ("loss", loss_sheet.resolve),
        ):
            given = getattr(self, name)
            if isinstance(given, str):
                continue  # its own constraint says more
            if name == "activation" and isinstance(given, list):
                if not given:
                    raise InvalidParameterError(
                        "activation must name one for each hidden layer if it is a list; got []"
                    )
                specs = given
            else:
                specs = [given]
            for spec in specs:
                try:
                    resolve(ours(spec), name)
                except (TypeError, ValueError) as error:
                    sizes = isinstance(given, list | tuple) and all(
                        isinstance(entry, Integral) for entry in given
                    )
                    hint = f"; did you mean hidden_layer_sizes={given!r}?" if sizes else ""
                    raise InvalidParameterError(f"{error}{hint}") from None
        try:
            super()._validate_params()
        except InvalidParameterError as error:
            if len(str(error)) <= LONGEST:
                raise
            raise InvalidParameterError(f"{error!s:.{LONGEST}}…") from None

    def _fit(self, X: Any, y: Any, sample_weight: Any, validation: Any, incremental: bool) -> Any:
        sizes = self.hidden_layer_sizes
        hidden = list(sizes) if hasattr(sizes, "__iter__") else [sizes]
        if np.any(np.array(hidden) <= 0):
            raise ValueError(f"hidden_layer_sizes must be > 0, got {hidden}.")
        hidden = [
            values.positive_integer(n, f"hidden_layer_sizes[{i}]", most=WIDEST)
            for i, n in enumerate(hidden)
        ]
        first = not hasattr(self, "coefs_") or (not self.warm_start and not incremental)
        if validation is not None and self.solver not in STOCHASTIC:
            raise ValueError(
                f"validation needs solver='adam' or 'sgd': {self.solver!r} has no epochs to score"
            )
        given = X
        X, y = self._validate_input(X, y, incremental, reset=first)
        weights = (
            None
            if sample_weight is None
            else _check_sample_weight(host(sample_weight, "sample_weight"), X)
        )
        Y = self._targets(y)
        self.n_outputs_ = len(self.classes_) if Y.ndim == 1 else Y.shape[1]
        random = self._random_state = check_random_state(self.random_state)
        if first:
            self._initialize([X.shape[1], *hidden, self.n_outputs_], random, X.dtype)
        elif (
            len(self.intercepts_[-1]) != self.n_outputs_
        ):  # the hidden layers stay those that were fitted
            raise ValueError(
                f"y makes {self.n_outputs_} output(s); what was fitted before has "
                f"{len(self.intercepts_[-1])}"
            )
        training = self._weighted(y, weights, incremental)
        place = self._place(X)
        with devices.active(place):
            net = self._network(place)
            if self.solver == "lbfgs":
                self._fit_lbfgs(net, X, Y, training, random)
            else:
                self._fit_stochastic(
                    net, X, y, Y, weights, training, given, validation, random, first, incremental
                )
        if not all(
            np.isfinite(array).all() for array in (*self.coefs_, *self.intercepts_, *self.slopes_)
        ):
            raise ValueError(
                "Solver produced non-finite parameter weights. The input data may contain large "
                "values and need to be"
                " preprocessed."
            )
        return self

    def _weighted(self, y: Any, weights: Array | None, incremental: bool) -> Array | None:
        """The row weights that the loss gets."""
        return weights

    def _initialize(self, units: list[int], random: np.random.RandomState, dtype: Any) -> None:
        """Initial weights, drawn layer by layer, W before b."""
        for name in ("_net", "_trainer", "_optimizer", "_saved", "loss_curve_", *VALIDATED):
            self.__dict__.pop(name, None)
        self.slopes_: list[
            Array
        ] = []  # learned parameters of activations, as the network begins with them
        self.n_iter_ = self.t_ = 0
        self.n_layers_ = len(units)
        self.out_activation_ = self._out_activation()
        self.coefs_: list[Array] = []
        self.intercepts_: list[Array] = []
        hidden = self._hidden(len(units) - 2) or [self.activation]
        for l, (wide, out) in enumerate(pairwise(units)):
            name = hidden[min(l, len(hidden) - 1)]
            bound = np.sqrt(
                (2.0 if activation_sheet.resolve(ours(name)).name == "sigmoid" else 6.0)
                / (wide + out)
            )
            self.coefs_.append(random.uniform(-bound, bound, (wide, out)).astype(dtype, copy=False))
            self.intercepts_.append(random.uniform(-bound, bound, out).astype(dtype, copy=False))

    def _begin_curves(self) -> None:
        """The attributes as they are before the first epoch."""
        self.loss_curve_: list[np.float64] = []
        self._no_improvement_count = 0
        self.best_loss_: Any = None if self.early_stopping else np.inf
        self.validation_scores_: Any = [] if self.early_stopping else None
        self.best_validation_score_: Any = -np.inf if self.early_stopping else None

    def _hidden(self, count: int) -> list[Any]:
        """The activation of each hidden layer."""
        return (
            list(self.activation)
            if isinstance(self.activation, list)
            else [self.activation] * count
        )

    def _dropout(self) -> Any:
        """`dropout`, of an array as a list."""
        return self.dropout.tolist() if isinstance(self.dropout, np.ndarray) else self.dropout

    def _begin(self, net: MLP, optimizer: Any, random: np.random.RandomState) -> Trainer:
        dropout = self._dropout()
        seed = (
            int(random.randint(1 << 31)) if dropout else 0
        )  # without dropout the draws are scikit-learn's
        return Trainer(
            net, self._objective(net.dtype), optimizer, dropout=dropout, seed=seed, precision=self.precision,
            memory_limit=self.memory_limit,
        )  # fmt: skip

    def _rows(self, trainer: Trainer, X: Any, Y: Array, weights: Array | None) -> Rows:
        X = X.tocsr() if issparse(X) else X
        return Rows(trainer, X, Y, weights, self.alpha, *self._reported(Y))

    def _fit_lbfgs(
        self, net: MLP, X: Any, Y: Array, weights: Array | None, random: np.random.RandomState
    ) -> None:
        """SciPy's L-BFGS-B on the trainer's gradient, in float64 whatever X is, as scikit-learn's."""
        if net.dtype != np.float64:
            self.coefs_ = [w.astype(np.float64) for w in self.coefs_]
            net = self._network(net.device)
        if self._dropout():
            raise ValueError(
                "dropout is for solver='sgd' or 'adam': L-BFGS needs the same loss at every call"
            )
        trainer = self._begin(net, SGD(0.0), random)
        rows = self._rows(trainer, X, Y, weights)

        def value_and_gradient(parameters: Array) -> tuple[float, Array]:
            net.store.write(devices.to_device(net.device, parameters))
            J, gradient = rows.gradient()
            return J, gradient.copy()

        with Run(trainer, self.callbacks, self.max_iter, self.progress) as run:

            def iteration(intermediate_result: Any) -> None:
                if run.epoch_end({"loss": float(intermediate_result.fun)}):
                    raise StopIteration

            with _scipy_alone():
                result = scipy.optimize.minimize(
                    value_and_gradient,
                    devices.to_host(net.device, net.store.flat).copy(),
                    method="L-BFGS-B",
                    jac=True,
                    options={"maxfun": self.max_fun, "maxiter": self.max_iter, "gtol": self.tol},
                    callback=iteration,
                )
            net.store.write(devices.to_device(net.device, result.x))
        if run.stopped:
            result.status = 0  # as asked for
        self.n_iter_ = _check_optimize_result("lbfgs", result, self.max_iter)
        self.loss_ = np.float64(result.fun)
        self._show(net)

    def _fit_stochastic(
        self, net: MLP, X: Any, y: Any, Y: Array, weights: Array | None, training: Array | None, given: Any, validation: Any,
        random: np.random.RandomState, first: bool, incremental: bool,
    ) -> None:  # fmt: skip
        """Epochs of shuffled mini-batches until scikit-learn's rules stop them; one of them if
        `incremental`.
        """
        if self.early_stopping and incremental:
            raise ValueError("partial_fit does not support early_stopping=True")
        if not hasattr(self, "loss_curve_") or (self.best_loss_ is None) != self.early_stopping:
            self._begin_curves()
        trainer = self._resume(net, random, incremental)
        train, held_out = self._hold_out(X, y, Y, weights, given, validation, random)
        rows, size = self._rows(trainer, X, Y, training), self._batch_rows(len(train))
        buffers = trainer._step.workspace.fit_buffers(0, self.early_stopping)
        best = trainer._step.workspace.reserve(buffers).get("best")
        if best is not None:
            best[...] = net.store.flat
        # scikit-learn's weights go on as they are where a warm start has not improved on the score
        # before it
        found = first
        self.n_iter_ = 0
        with Run(trainer, self.callbacks, self.max_iter, self.progress) as run:
            try:
                while self.n_iter_ < self.max_iter:
                    if self.shuffle:
                        order = np.arange(len(train))
                        random.shuffle(order)
                        train = train[order]
                    self.loss_ = np.float64(epoch(rows, train, size, run))
                    self.n_iter_ += 1
                    self.t_ += len(train)
                    self.loss_curve_.append(self.loss_)
                    self._say("Iteration %d, loss = %.8f", self.n_iter_, self.loss_)
                    entry = {"loss": self.loss_, "learning_rate": trainer.learning_rate}
                    if held_out is not None:
                        entry["validation_score"] = self._score_epoch(net, held_out)
                        if (
                            best is not None
                            and entry["validation_score"] > self.best_validation_score_
                        ):
                            best[...], found = net.store.flat, True
                    self._count(entry)
                    if self.learning_rate == "invscaling" and self.solver == "sgd":
                        self._optimizer.learning_rate = (
                            self.learning_rate_init / (self.t_ + 1) ** self.power_t
                        )
                    stop = run.epoch_end(entry)
                    if self._no_improvement_count > self.n_iter_no_change and self._stops():
                        break
                    if incremental or stop:
                        break
                    if self.n_iter_ == self.max_iter:
                        warnings.warn(
                            f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached "
                            "and the optimization hasn't"
                            " converged yet.",
                            ConvergenceWarning,
                            stacklevel=2,
                        )
            except KeyboardInterrupt:
                warnings.warn("Training interrupted by user.", stacklevel=2)
            if best is not None and found:
                net.store.write(best)
        if incremental:
            self._trainer = trainer
        else:
            self._saved: Any = state_of(trainer)
        self._show(net)

    def _resume(self, net: MLP, random: np.random.RandomState, incremental: bool) -> Trainer:
        """A trainer of this network: a fresh one, or with the optimizer's state of the last call."""
        trainer = self.__dict__.pop("_trainer", None)
        if incremental and trainer is not None:
            if trainer.net is net and trainer.loss == self._objective(net.dtype):
                return trainer
            self._saved = state_of(trainer)
        if not incremental or not hasattr(self, "_optimizer"):
            self._saved = None
            if self.solver == "sgd":
                self._optimizer: Any = SGD(
                    self.learning_rate_init, self.momentum, bool(self.nesterovs_momentum)
                )
            else:
                self._optimizer = Adam(
                    self.learning_rate_init,
                    self.beta_1,
                    self.beta_2,
                    self.epsilon,
                    epsilon_hat=True,
                )
        trainer = self._begin(net, self._optimizer, random)
        if self._saved:
            restore(trainer, self._saved)
        return trainer

    def _hold_out(
        self,
        X: Any,
        y: Any,
        Y: Array,
        weights: Array | None,
        given: Any,
        validation: Any,
        random: np.random.RandomState,
    ) -> tuple[Array, HeldOut | None]:
        """Numbers of the rows to train on, and those that are held out: the user's, or a part of X
        for early stopping.
        """
        everything = np.arange(X.shape[0])
        if validation is not None:
            if not isinstance(validation, list | tuple) or len(validation) not in (2, 3):
                raise TypeError("validation must be (X, y) or (X, y, sample_weight)")
            Xv, yv, wv = (*validation, None)[:3]
            yv = host(yv, "validation: y")
            self._check_held_out(yv)
            return everything, HeldOut(Xv if self.scoring else self._checked(Xv), yv, wv)
        if not self.early_stopping:
            return everything, None
        stratify = Y if isinstance(self, ClassifierMixin) and self.n_outputs_ == 1 else None
        train, held = train_test_split(
            everything, random_state=random, test_size=self.validation_fraction, stratify=stratify
        )  # fmt: skip
        if len(held) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of "
                "your dataset."
            )
        Xv = (
            _safe_indexing(given, held)
            if self.scoring
            else X[devices.to_device(devices.of(X, "X"), held)]
        )
        return train, HeldOut(Xv, y[held], None if weights is None else weights[held])

    def _batch_rows(self, count: int) -> int:
        if self.batch_size == "auto":
            return min(200, count)
        if self.batch_size > count:
            warnings.warn(
                "Got `batch_size` less than 1 or larger than sample size. It is going to be "
                "clipped",
                stacklevel=2,
            )
        return int(np.clip(self.batch_size, 1, count))

    def _score_epoch(self, net: MLP, held_out: HeldOut) -> float:
        """The score on the held-out rows; NaN where a prediction is not finite."""
        X, y, weights = held_out
        if self.scoring is not None:
            self._show(net)
            more = {} if weights is None else {"sample_weight": weights}
            score = float(check_scoring(self, self.scoring)(self, X, y, **more))
        else:
            predicted = host(self._predicted(self._output(X, net)), "prediction")
            usable = predicted.dtype.kind != "f" or np.isfinite(predicted).all()
            score = float(self._score_of(y, predicted, weights)) if usable else np.nan
        if self.validation_scores_ is None:
            self.validation_scores_, self.best_validation_score_ = [], -np.inf
        self.validation_scores_.append(score)
        return score

    def _count(self, entry: dict[str, float]) -> None:
        """How many epochs in a row have not improved by `tol`: in the score with early stopping,
        else in the loss.
        """
        score = entry.get("validation_score", -np.inf)
        if self.early_stopping:
            worse = score < self.best_validation_score_ + self.tol
        else:
            worse = self.loss_ > self.best_loss_ - self.tol
            self.best_loss_ = self.loss_ if self.loss_ < self.best_loss_ else self.best_loss_
        self._no_improvement_count = self._no_improvement_count + 1 if worse else 0
        if "validation_score" in entry:
            self._say("Validation score: %f", score)
            if score > self.best_validation_score_:
                self.best_validation_score_ = score

    def _stops(self) -> bool:
        """Whether too many epochs without an improvement end the training; an adaptive rate falls
        instead while it can.
        """
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
        there = devices.of(X, "X")
        return there if self.device == "auto" and there != "cpu" else devices.choose(self.device)

    def _network(self, device: str | None = None) -> MLP:
        """The network of `coefs_`, `intercepts_`, `slopes_` as they are now; on the CPU they become
        views of its parameters.
        """
        arrays = (*self.coefs_, *self.intercepts_)
        if not hasattr(self, "slopes_"):  # one whose weights were set by hand
            self.slopes_ = []
        sizes = [len(w) for w in self.coefs_] + [len(self.intercepts_[-1])]
        dtype = "float32" if all(array.dtype == np.float32 for array in arrays) else "float64"
        net: MLP | None = vars(self).get("_net")
        hidden = [
            activation_sheet.resolve(ours(name), "activation")
            for name in self._hidden(len(sizes) - 2)
        ]
        wanted = (sizes, dtype, hidden, device or (net and net.device))
        if (
            net is not None
            and (list(net.sizes), net.dtype.name, list(net.activations[1:-1]), net.device) == wanted
        ):
            views = (*net.W[1:], *net.b[1:], *_learned(net))
            if net.device == "cpu" and [*map(id, (*arrays, *self.slopes_))] == [*map(id, views)]:
                return net
        else:
            output = ours(self.out_activation_)
            net = MLP(
                sizes, hidden, output, dtype=dtype, init="zeros", device=device or self._usable()
            )
            self._net = net
        slopes = [devices.to_host(net.device, a) for a in _learned(net)]
        if [a.shape for a in self.slopes_] == [a.shape for a in slopes]:
            slopes = self.slopes_
        flat = np.concatenate([np.ravel(array) for array in (*arrays, *slopes)]).astype(
            dtype, copy=False
        )
        net.store.write(devices.to_device(net.device, flat))
        if net.device == "cpu":
            self._show(net)
        return net

    def _usable(self) -> str:
        """The device to predict on; the CPU on a machine without the GPU of the one where it was
        fitted.
        """
        try:
            return devices.choose(self.device)
        except DeviceUnavailable as reason:
            log.warning("an estimator of %s predicts on the CPU: %s", self.device, reason)
            return "cpu"

    def _show(self, net: MLP) -> None:
        """The network's parameters as `coefs_`, `intercepts_`, `slopes_`: views on the CPU, copies
        from a GPU.
        """
        self.coefs_[:] = [devices.to_host(net.device, w) for w in net.W[1:]]
        self.intercepts_[:] = [devices.to_host(net.device, b) for b in net.b[1:]]
        self.slopes_[:] = [devices.to_host(net.device, a) for a in _learned(net)]

    def __getstate__(self) -> dict[str, Any]:
        state = {
            key: value
            for key, value in super().__getstate__().items()
            if key not in ("_net", "_trainer")
        }
        return state | {"_saved": state_of(self._trainer)} if "_trainer" in vars(self) else state

    # -- X, and predictions --

    def _read(self, X: Any, y: Any, reset: bool, **options: Any) -> tuple[Any, Any]:
        """X and y as scikit-learn checks them; of an X on a GPU the engine does, and it stays
        there.
        """
        y = host(y, "y")
        options["multi_output"] = True
        if devices.of(X, "X") == "cpu":
            return validate_data(
                self, X, y, accept_sparse=["csr", "csc"], dtype=(np.float64, np.float32), reset=reset, **options
            )  # fmt: skip
        y = validate_data(self, y=y, reset=reset, **options)
        X = self._adopted(X, reset)
        if len(X) != len(y):
            raise ValueError(f"X has {len(X)} rows and y {len(y)}: they must have as many")
        return X, y

    def _adopted(self, X: Any, reset: bool) -> Any:
        X = arrays.matrix(X, None, adopt=devices.adopter(devices.of(X, "X")))
        arrays.require_finite(X, "X")
        _check_n_features(self, X, reset=reset)
        return X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)

    def _checked(self, X: Any) -> Any:
        """Rows to predict for."""
        check_is_fitted(self)
        if devices.of(X, "X") == "cpu":
            return validate_data(self, X, accept_sparse=["csr", "csc"], reset=False)
        _check_feature_names(self, X, reset=False)
        return self._adopted(X, reset=False)

    def _output(self, X: Any, net: MLP) -> Array:
        """Z[L] (m, n_L) of checked rows, in X's library and on its device."""
        if issparse(X):
            X = X.tocsr()
            parts = gen_batches(X.shape[0], max(1, SPARSE_BYTES // (X.shape[1] * X.dtype.itemsize)))
            output: Array = np.concatenate([net.predict(X[part].toarray()) for part in parts])
        else:
            output = net.predict(X)
        return output.astype(np.result_type(X.dtype, net.dtype), copy=False)

    def predict(self, X: Any) -> Any:
        """The prediction for each row of X: a label or number; (m, n_outputs_) of them where y had
        several columns.

        Args:
            X: (m, n_features_in_), dense or sparse; on a GPU, the result is there as well.
        """
        X = self._checked(X)
        with devices.active(devices.of(X, "X")):
            return self._predicted(self._output(X, self._network()))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy or R² of the prediction for the rows of X (m, n_features_in_), as scikit-learn
        defines them.
        """
        weights = None if sample_weight is None else host(sample_weight, "sample_weight")
        return float(
            type(self)._metric(
                host(y, "y"), host(self.predict(X), "prediction"), sample_weight=weights
            )
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def _scipy_alone() -> AbstractContextManager[object]:
    """SciPy's own BLAS on one thread: idle ones would spin beside those of NumPy's, at several
    times the cost of a fit.
    """
    pools = threadpoolctl.ThreadpoolController()
    own = [pool.filepath for pool in pools.lib_controllers if "scipy.libs" in pool.filepath]
    return pools.select(filepath=own).limit(limits=1)


def _learned(net: MLP) -> list[Any]:
    """Return the learned parameters of the activations, layer by layer."""
    return [a for a in net.a if a is not None]


def ours(activation: Any) -> Any:
    """The engine's name of an activation."""
    return OUTPUTS.get(activation, activation) if isinstance(activation, str) else activation


def host(array: Any, name: str) -> Any:
    """An array of a GPU's as NumPy's; anything else as it is."""
    return array if devices.of(array, name) == "cpu" else devices.adopt_on_host(array, name)
