"""The public network class: build, predict, differentiate, copy, save and load.

    Z[0] = X,   Z[l] = σ_l(Z[l-1] W[l] + b[l]),   l = 1 … L

`core.network.Network` holds the parameters and their views. The passes and derivatives, methods of
`MLP`, are functions in `engine/passes.py` and `engine/derivatives.py`.
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
        activations: activations of the hidden layers, one for all or a list of L - 1; each is a
            name, `(name, parameter)` or `mc.Activation`. "prelu" learns its slope below 0, starting
            from the value given (He et al. 2015): `("prelu", 0.25)` has one slope per layer,
            `("prelu", 0.25, "per output")` one per output.
        output: activation of the last layer; may also be "softmax" or "log_softmax".
        bias: True if layers have a bias.
        tied: layers that share the matrix of an earlier layer, or its transpose: `{4: 1}`,
            `{4: "1.T"}`. Biases are not shared.
        dtype: "float32" or "float64".
        init: "auto" (by activation), "he", "glorot", "lecun", or "zeros". Biases start at 0,
            learned parameters of activations at the value given.
        device: "auto", "cpu", "cuda", "cuda:1".
        seed: seed of the initial weights, which are drawn in float64 on the host and are the same
            on every device.

    Attributes:
        W, b: tuples of views of `parameters`; index 0 is None. `net.W[1][...] = …` writes into the
            network. A transposed tie such as W[4] is a view W[1].T of the shared matrix.
        a: tuple of views of the activations' learned parameters; a[l] is (1,) or (n_l,), or None
            if layer l has none.
        parameters: flat vector of all W, then all b, then all a.
        predicts_1d: True if `predict` and `logits` return (m,) instead of (m, 1). A trainer sets
            it to match the shape of Y.

    Raises:
        TypeError, ValueError: invalid argument; the message says what was expected.
        DeviceUnavailable: the device cannot be used; the message says why.
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
            log.warning("network pickled on %s is restored on the CPU: %s", self.device, reason)
            self.device = "cpu"
        self._set(devices.find(self.device).to_device(parameters))  # a copy needs its own views

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
        """Return an independent network with equal parameters, in another dtype if one is given."""
        return self._copy(self.dtype if dtype is None else dtype, self.device)

    def _copy(self, dtype: Any, device: str) -> MLP:
        architecture = self.architecture.cast(dtype)
        flat = self._to_host().astype(architecture.dtype)
        return MLP._build(architecture, flat, device, self.predicts_1d)

    def to(self, device: str) -> MLP:
        """Return a copy of the network on another device, or the network itself if it is there.

        Args:
            device: "auto", "cpu", "cuda", "cuda:1".

        Raises:
            DeviceUnavailable: the device cannot be used; the message says why.
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
            path: path of the file.
            tensors: NumPy arrays to store with the parameters, by name.
            about: notes to store. JSON must hold them without change, except that tuples become
                lists: at most 100,000,000 bytes, nested at most 100 levels deep.

        Raises:
            OSError: the file cannot be written, or the existing one is not an mlpcore model; a
                trainer's checkpoint is not overwritten either. The existing file is left intact.
            TypeError, ValueError: invalid argument; the message says what was expected.
        """
        network_file.write(path, self.header(), self._to_host(), tensors, about)

    def header(self) -> dict[str, Any]:
        """Return the file header's description of the network, as JSON types."""
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
        """Write the network to an ONNX file (opset 17), atomically.

        Its input is "X" (rows, n_0), its output "Z" (rows, n_L), whatever `predicts_1d` is.

        Args:
            path: path of the file.
            mean, scale: (n_0,); the model then takes raw columns and computes (X - mean) / scale
                itself.
            target_mean, target_scale: (n_L,); the model then returns Z target_scale + target_mean.
            about: notes to store, e.g. class names; JSON must be able to hold them.

        Raises:
            ImportError: the package onnx is not installed.
            TypeError, ValueError: invalid argument; the message says what was expected.
            OSError: the file cannot be written, or the existing one is not an ONNX file; the
                existing file is left intact.
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
        """Return the network from a file that `save` wrote.

        Args:
            path: path of the file.
            device: "auto", "cpu", "cuda", "cuda:1".

        Raises:
            FileNotFoundError, OSError: the file cannot be read.
            ValueError: it is not an mlpcore model, is damaged, or comes from a newer version.
            DeviceUnavailable: the device cannot be used; the message says why.
        """
        return cls.load_with(path, device)[0]

    @classmethod
    def load_with(
        cls, path: str | os.PathLike[str], device: str = "auto"
    ) -> tuple[MLP, dict[str, Array], dict[str, Any]]:
        """Return the network from a file, and the `tensors` and `about` saved with it.

        Raises: as `load`.
        """
        devices.choose(device)
        header, tensors = model_file.read(path)
        return cls.from_header(path, header, tensors, device), tensors, header.get("about", {})

    @classmethod
    def from_header(
        cls, path: str | os.PathLike[str], header: Any, tensors: dict[str, Array], device: str
    ) -> MLP:
        """Return the network that a file's header describes; take "parameters" out of `tensors`.

        Raises:
            ValueError: they do not hold a network; the message names the path.
        """
        architecture, parameters, predicts_1d = network_file.parse(path, header, tensors)
        return cls._build(architecture, parameters, device, predicts_1d)

    # -- models of other libraries

    @classmethod
    def from_torch(cls, model: Any) -> MLP:
        """Return a network that predicts the same as a `torch.nn.Sequential`; weights are copied.

        The model must consist of Linear layers and activations. Dropout is left out, as in
        `model.eval()`. A matrix shared by two layers becomes tied; biases and PReLU slopes are not
        shared. If only some layers have a bias, the others get a bias of 0. The network has the
        device and dtype of the weights, but float32 for float16 and bfloat16.

        Raises:
            TypeError, ValueError: the model has a module without an equivalent here; the message
                names its place.
        """
        return cls._build(*convert.from_torch(model, devices.adopt_on_host))

    to_torch = convert.to_torch

    @classmethod
    def from_sklearn(cls, model: Any, device: str = "auto") -> MLP:
        """Return a network equal to scikit-learn's fitted `MLPClassifier` or `MLPRegressor`.

        Weights are copied. `predict` returns what `model.predict` does for a regressor and what
        `model.predict_proba` does for a classifier; with two classes, which have a single logistic
        output, it returns `model.predict_proba(X)[:, 1:]`.

        Raises:
            TypeError, ValueError: not such a model, or not fitted.
        """
        return cls._build(*convert.from_sklearn(model, device))
