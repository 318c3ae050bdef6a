"""The public network class: build, predict, differentiate, copy, save and load.

    Z[0] = X,   Z[l] = σ_l(Z[l-1] W[l] + b[l]),   l = 1 … L

Parameters and their views are `core.network.Network`'s; the passes and derivatives that are
methods here are functions of `engine/passes.py` and `engine/derivatives.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import values
from mlpcore.checks.errors import DeviceUnavailable
from mlpcore.core.architecture import Architecture, initial_parameters
from mlpcore.core.network import Cache, Gradient, Network
from mlpcore.engine import derivatives, passes
from mlpcore.engine.loss_function import LossFunction, loss
from mlpcore.io import convert, kinds, model_file, network_file, onnx_file

__all__ = ["MLP", "Cache", "Gradient", "LossFunction", "loss"]

Array = NDArray[Any]
log = logging.getLogger("mlpcore")


class MLP(Network):
    """A multilayer perceptron.

    Args:
        sizes: widths n_0 … n_L, e.g. `[784, 512, 10]`.
        activations: of the hidden layers: one for all, or a list of L - 1. A name, `(name,
            parameter)` or `mc.Activation`. "prelu" learns its slope below 0: `("prelu", 0.25)` one
            for a layer, `("prelu", 0.25, "per output")` one for each output, from the value given
            (He et al. 2015).
        output: activation of the last layer; also "softmax" and "log_softmax".
        bias: whether layers have a bias.
        tied: layers that share a matrix, or its transpose, with one below: `{4: 1}`, `{4: "1.T"}`.
            Their biases stay apart.
        dtype: "float32" or "float64".
        init: "auto" (by activation), "he", "glorot", "lecun", or "zeros". Biases start at 0,
            learned parameters of activations at the value given.
        device: "auto", "cpu", "cuda", "cuda:1".
        seed: of the initial weights, drawn in float64 on the host: equal on every device.

    Attributes:
        W, b: tuples of views of `parameters`, index 0 None. `net.W[1][...] = …` writes into the
            network. A tied W[4] is the view W[1].T of the one matrix there is.
        a: a tuple of views of the activations' learned parameters, a[l] (1,) or (n_l,), None where
            there are none.
        parameters: the flat vector, all W, then all b, then all a.
        predicts_1d: whether `predict` and `logits` return (m,) in place of (m, 1); a trainer sets
            it by the Y that it is given.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
        DeviceUnavailable: the device cannot be used; says why.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activations: Any = "relu",
        output: Any = "identity",
        *,
        bias: bool = True,
        tied: Mapping[int, int | str] | None = None,
        dtype: Any = "float32",
        init: str = "auto",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        architecture = Architecture.parse(
            sizes, activations, output, bias=bias, tied=tied, dtype=dtype
        )
        chosen = devices.choose(device)
        flat = initial_parameters(architecture, init, values.seed(seed))
        super().__init__(architecture, chosen, devices.find(chosen).to_device(flat))

    @classmethod
    def _build(
        cls, architecture: Architecture, flat: Array, device: str, predicts_1d: bool = False
    ) -> MLP:
        """Return a network with these parameters, a flat vector on the host."""
        layout, (_, *activations, output) = architecture.layout, architecture.activations
        net = cls(
            layout.sizes,
            activations,
            output,
            bias=layout.bias,
            tied=architecture.tied,
            dtype=architecture.dtype,
            init="zeros",
            device=device,
        )
        net._set(devices.find(net.device).to_device(flat))
        net.predicts_1d = predicts_1d
        return net

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key != "_store"}
        return state | {"parameters": self._to_host()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = state.pop("parameters")
        vars(self).update(state)
        try:
            self.device = devices.choose(self.device)
        except DeviceUnavailable as reason:  # pickled on a machine with a GPU
            log.warning("a network of %s is put on the CPU: %s", self.device, reason)
            self.device = "cpu"
        self._set(devices.find(self.device).to_device(parameters))  # a copy has views of its own

    def _to_host(self) -> Array:
        """Return the parameters, flat, on the host."""
        flat: Array = devices.find(self.device).to_host(self.store.flat)
        return flat

    def __repr__(self) -> str:
        hidden = ", ".join(
            str(a.spec) if isinstance(a.spec, tuple) else a.name
            for a in self.activations[1:-1]
            if a
        )
        last = self.activations[-1]
        assert last is not None
        shape = f"{'-'.join(map(str, self.sizes))}, activations=[{hidden}], output={last.spec!r}"
        ties = f", tied={self.tied}" if self.tied else ""
        size = f"{self.layout.size:,} parameters, {self.dtype.name} on {self.device}"
        return f"MLP({shape}{ties}; {size})"

    # -- passes and derivatives

    forward = passes.forward
    backward = passes.backward
    predict = passes.predict
    logits = passes.logits
    jvp = derivatives.jvp
    vjp = derivatives.vjp
    hvp = derivatives.hvp
    gnvp = derivatives.gnvp

    # -- copies and files

    def copy(self, dtype: Any = None) -> MLP:
        """Return an independent network with equal parameters, on request in another dtype."""
        return self._copy(self.dtype if dtype is None else dtype, self.device)

    def _copy(self, dtype: Any, device: str) -> MLP:
        architecture = self.architecture.cast(dtype)
        flat = self._to_host().astype(architecture.dtype)
        return MLP._build(architecture, flat, device, self.predicts_1d)

    def to(self, device: str) -> MLP:
        """Return a copy on another device ("cpu", "cuda", "cuda:1", "auto"), or itself if there.

        Raises:
            DeviceUnavailable: the device cannot be used; says why.
        """
        chosen = devices.choose(device)
        return self if chosen == self.device else self._copy(self.dtype, chosen)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        tensors: dict[str, Array] | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Write the network to a safetensors file, atomically.

        Args:
            path: of the file.
            tensors: arrays to store with the parameters, by name.
            about: what else to remember, as far as JSON can hold it and gives it back equal, but
                for tuples, which become lists: at most 100,000,000 bytes of it, in at most 100
                levels.

        Raises:
            OSError: the file cannot be written, or there is one that is no model of mlpcore, or the
                checkpoint of an unfinished run; what was there before is intact.
            TypeError, ValueError: names the argument, what was expected and what came.
        """
        network_file.write(path, self.header(), self._to_host(), tensors, about)

    def header(self) -> dict[str, Any]:
        """Return the entries about the network in a file's header, of types that JSON has."""
        return network_file.describe(self.architecture, self.predicts_1d)

    def to_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        mean: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        target_mean: ArrayLike | None = None,
        target_scale: ArrayLike | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an ONNX file (opset 17), atomically: from "X" (rows, n_0) to "Z" (rows, n_L).

        "Z" has that shape whatever `predicts_1d` is.

        Args:
            path: of the file.
            mean, scale: (n_0,); with them columns go in as they are, and (X - mean) / scale is part
                of the file.
            target_mean, target_scale: (n_L,); with them Z target_scale + target_mean comes out.
            about: notes to store, e.g. class names, as far as JSON can hold them.

        Raises:
            ImportError: the package onnx is not installed.
            TypeError, ValueError: names the argument, what was expected and what came.
            OSError: the file cannot be written, or there is one that is no ONNX file; what was
                there before is intact.
        """
        given = {
            "mean": mean,
            "scale": scale,
            "target_mean": target_mean,
            "target_scale": target_scale,
        }
        rows = onnx_file.as_rows(self.sizes, given, devices.adopt_on_host)
        kinds.require_replaceable(values.path(path), ("onnx",))
        onnx_file.write(path, self.architecture, self._to_host(), rows, about or {})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto") -> MLP:
        """Return the network of a file that `save` wrote.

        Raises:
            FileNotFoundError, OSError: it cannot be read.
            ValueError: it is no such file, a damaged one, or one of a newer version.
        """
        return cls.load_with(path, device)[0]

    @classmethod
    def load_with(
        cls, path: str | os.PathLike[str], device: str = "auto"
    ) -> tuple[MLP, dict[str, Array], dict[str, Any]]:
        """Return the network of a file, and the `tensors` and `about` that were saved with it."""
        devices.choose(device)
        header, tensors = model_file.read(path)
        return cls.from_header(path, header, tensors, device), tensors, header.get("about", {})

    @classmethod
    def from_header(
        cls, path: str | os.PathLike[str], header: Any, tensors: dict[str, Array], device: str
    ) -> MLP:
        """Return the network that a file's header describes; take "parameters" out of `tensors`.

        Raises:
            ValueError: they do not hold a network; names the path.
        """
        architecture, parameters, predicts_1d = network_file.parse(path, header, tensors)
        return cls._build(architecture, parameters, device, predicts_1d)

    # -- models of other libraries

    @classmethod
    def from_torch(cls, model: Any) -> MLP:
        """Return the network that equals a `torch.nn.Sequential`, with its weights copied.

        The model consists of Linear layers and activations. The network predicts what
        `model.eval()` does: Dropout is left out. A matrix that two layers share is tied, their
        biases and slopes (PReLU) are not. Where some layers have a bias and others none, those
        others get one of 0. It is on the device of the weights and in their dtype, float32 where
        that is float16 or bfloat16.

        Raises:
            TypeError, ValueError: a module that has no equal here; names its place.
        """
        return cls._build(*convert.from_torch(model, devices.adopt_on_host))

    to_torch = convert.to_torch

    @classmethod
    def from_sklearn(cls, model: Any, device: str = "auto") -> MLP:
        """Return the network of scikit-learn's fitted `MLPClassifier` or `MLPRegressor`.

        Weights are copied. Its predictions are `model.predict` of a regressor,
        `model.predict_proba` of a classifier; of one with two classes, which has a single logistic
        output, `model.predict_proba(X)[:, 1:]`.

        Raises:
            TypeError, ValueError: no such model, or not fitted.
        """
        return cls._build(*convert.from_sklearn(model, device))
