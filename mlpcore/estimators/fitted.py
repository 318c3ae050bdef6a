"""The network behind `coefs_`, `intercepts_` and `slopes_`, and its predictions."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, issparse
from sklearn.utils.validation import check_is_fitted, validate_data

from mlpcore.backends import devices
from mlpcore.checks import arrays
from mlpcore.checks.errors import DeviceUnavailable
from mlpcore.core import activations as activation_sheet
from mlpcore.estimators.epochs import dense_parts, take_state
from mlpcore.estimators.parameters import Parameters, engine_name
from mlpcore.mlp import MLP

Array = NDArray[Any]
log = logging.getLogger("mlpcore")


class FittedNetwork(Parameters):
    """A network whose parameters are read and written as scikit-learn's attributes.

    Attributes:
        coefs_, intercepts_, slopes_: lists of W (n_{l-1}, n_l), b (n_l,) and the learned parameters
            of activations, (1,) or (n_l,); views of the network on a CPU, copies from a GPU.
    """

    _metric: ClassVar[Callable[..., float]]

    @abstractmethod
    def _decode(self, output: Array) -> Any:
        """Return the labels or numbers for an output (m, n_L)."""

    # -- the network --

    def _fit_device(self, X: Any) -> str:
        """Return the device to fit on; "auto" prefers the GPU that holds X, if any."""
        there = devices.of(X, "X")
        return there if self.device == "auto" and there != "cpu" else devices.choose(self.device)

    def _network(self, device: str | None = None) -> MLP:
        """Return the network with the current `coefs_`, `intercepts_` and `slopes_`.

        On the CPU they become views of its parameters.
        """
        arrays = (*self.coefs_, *self.intercepts_)
        if not hasattr(self, "slopes_"):  # the user set the weights
            self.slopes_: list[Array] = []
        sizes = [len(w) for w in self.coefs_] + [len(self.intercepts_[-1])]
        dtype = "float32" if all(array.dtype == np.float32 for array in arrays) else "float64"
        names = self._hidden_activations(len(sizes) - 2)
        hidden = [activation_sheet.resolve(engine_name(name), "activation") for name in names]
        net: MLP | None = vars(self).get("_net")
        wanted = (sizes, dtype, hidden, device or (net and net.device))
        if (
            net is not None
            and (list(net.sizes), net.dtype.name, list(net.activations[1:-1]), net.device) == wanted
        ):
            views = (*net.W[1:], *net.b[1:], *learned_slopes(net))
            if net.device == "cpu" and [*map(id, (*arrays, *self.slopes_))] == [*map(id, views)]:
                return net
        else:
            net = MLP(
                sizes,
                hidden,
                engine_name(self.out_activation_),
                dtype=dtype,
                init="zeros",
                device=device or self._predict_device(),
            )
            self._net = net
        slopes = [devices.find(net.device).to_host(a) for a in learned_slopes(net)]
        if [a.shape for a in self.slopes_] == [a.shape for a in slopes]:
            slopes = self.slopes_
        flat = np.concatenate([np.ravel(array) for array in (*arrays, *slopes)])
        net.store.write(devices.find(net.device).to_device(flat.astype(dtype, copy=False)))
        if net.device == "cpu":
            self._expose(net)
        return net

    def _predict_device(self) -> str:
        """Return the device to predict on: the CPU if the GPU of the fit is not available."""
        try:
            return devices.choose(self.device)
        except DeviceUnavailable as reason:
            log.warning("an estimator for %s predicts on the CPU: %s", self.device, reason)
            return "cpu"

    def _expose(self, net: MLP) -> None:
        """Set `coefs_`, `intercepts_` and `slopes_` to the network's parameters."""
        self.coefs_[:] = [devices.find(net.device).to_host(w) for w in net.W[1:]]
        self.intercepts_[:] = [devices.find(net.device).to_host(b) for b in net.b[1:]]
        self.slopes_[:] = [devices.find(net.device).to_host(a) for a in learned_slopes(net)]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__().copy()
        for name in ("_net", "_trainer", "_passed"):
            state.pop(name, None)
        return state | {"_saved": take_state(self._trainer)} if "_trainer" in vars(self) else state

    # -- predictions --

    def _adopt_rows(self, X: Any) -> Any:
        """Return X on a GPU, checked by the engine; None if X is on the host."""
        device = devices.of(X, "X")
        if device == "cpu":
            return None
        X = arrays.matrix(X, None, adopt=devices.find(device).adopt)
        arrays.require_finite(X, "X")
        return X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)

    def _check_rows(self, X: Any) -> Any:
        """Return the rows to predict for, checked, on their device."""
        check_is_fitted(self)
        rows = self._adopt_rows(X)
        X = validate_data(self, stand_in(X, rows), accept_sparse=["csr", "csc"], reset=False)
        return X if rows is None else rows

    def _output(self, X: Any, net: MLP) -> Array:
        """Return Z[L] (m, n_L) of checked rows, in X's library and on its device."""
        if issparse(X):
            X = X.tocsr()
            output: Array = np.concatenate([net.predict(X[i].toarray()) for i in dense_parts(X)])
        else:
            output = net.predict(X)
        return output.astype(np.result_type(X.dtype, net.dtype), copy=False)

    def _forward_pass_fast(self, X: Any, check_input: bool = True) -> Array:
        X = self._check_rows(X) if check_input else X
        with devices.find(devices.of(X, "X")).active():
            return self._output(X, self._network())

    def _predict(self, X: Any, check_input: bool = True) -> Any:
        output = self._forward_pass_fast(X, check_input)
        with devices.find(devices.of(output, "output")).active():
            return self._decode(output)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return scikit-learn's accuracy or R² of the predictions for X (m, n_features_in_)."""
        weights = None if sample_weight is None else to_numpy(sample_weight, "sample_weight")
        predicted = to_numpy(self.predict(X), "prediction")
        return float(type(self)._metric(to_numpy(y, "y"), predicted, sample_weight=weights))


def stand_in(X: Any, rows: Any) -> Any:
    """Return X, or an empty sparse matrix that scikit-learn can check if the rows are on a GPU."""
    return X if rows is None else csr_array(rows.shape)


def learned_slopes(net: MLP) -> list[Any]:
    """Return the learned parameters of the activations, layer by layer."""
    return [a for a in net.a if a is not None]


def to_numpy(array: Any, name: str) -> Any:
    """Return a GPU array as a NumPy array; anything else unchanged."""
    return array if devices.of(array, name) == "cpu" else devices.adopt_on_host(array, name)
