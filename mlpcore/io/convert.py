"""Conversion of networks from PyTorch and scikit-learn, and to PyTorch.

Weights are copied; predictions are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks import arrays
from mlpcore.core import activations as sheet
from mlpcore.core.architecture import Architecture
from mlpcore.core.network import Network

Array = NDArray[Any]
Adopt = Callable[[object, str], Array]  # a user's array and its name: the array on the host
# our name: PyTorch's class, its argument for our parameter, and the settings for which both are
# equal, the one that `to_torch` uses first
TORCH: dict[str, tuple[str, str | None, dict[str, tuple[Any, ...]]]] = {
    "sigmoid": ("Sigmoid", None, {}),
    "tanh": ("Tanh", None, {}),
    "relu": ("ReLU", None, {}),
    "relu6": ("ReLU6", None, {}),
    "leaky_relu": ("LeakyReLU", "negative_slope", {}),
    "prelu": ("PReLU", "init", {}),  # its slope is a weight
    "elu": ("ELU", "alpha", {}),
    "selu": ("SELU", None, {}),
    # linear above the threshold: an error of 2e-9 at 20
    "softplus": ("Softplus", None, {"beta": (1,), "threshold": (50, 20)}),
    "gelu": ("GELU", None, {"approximate": ("tanh",)}),
    "gelu_erf": ("GELU", None, {"approximate": ("none",)}),
    "silu": ("SiLU", None, {}),
    "mish": ("Mish", None, {}),
    "hard_tanh": ("Hardtanh", None, {"min_val": (-1,), "max_val": (1,)}),
    "softmax": ("Softmax", None, {"dim": (1, -1)}),
    "log_softmax": ("LogSoftmax", None, {"dim": (1, -1)}),
}
NOTHING = ("Identity", "Dropout", "AlphaDropout")  # modules without effect on predictions
SKLEARN = {"logistic": "sigmoid"}  # the other names are the same


class Model(NamedTuple):
    """A network read from another library's model.

    Attributes:
        architecture: widths, activations, bias, ties and dtype.
        parameters: flat, on the host.
        device: device of the model.
        predicts_1d: True if the model's predictions have one axis.
    """

    architecture: Architecture
    parameters: Array
    device: str
    predicts_1d: bool = False


def from_torch(model: Any, adopt: Adopt) -> Model:
    """Return the network of a `torch.nn.Sequential`; see `mc.MLP.from_torch`."""
    linears, specs, slopes = _layers(model)
    for l, (one, other) in enumerate(itertools.pairwise(linears), 1):
        if one.out_features != other.in_features:
            raise ValueError(
                f"model: Linear layer {l} gives {one.out_features} numbers, the next takes "
                f"{other.in_features}"
            )
    matrices = [layer.weight for layer in linears]
    first = [next(i for i, x in enumerate(matrices) if x is weight) for weight in matrices]
    W, b, a = (
        [None if x is None else arrays.numeric(x.detach(), "model", adopt) for x in parts]
        for parts in (matrices, [layer.bias for layer in linears], slopes)
    )
    tied = {l + 1: owner + 1 for l, owner in enumerate(first) if owner != l}
    flat = _assemble([w.T for w in W if w is not None], b, a, specs, tied)
    return Model(*flat, str(matrices[0].device))


def _layers(model: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the Linear modules, and for each its activation and the learned slopes or None."""
    linears: list[Any] = []
    specs: list[Any] = []
    slopes: list[Any] = []
    for place, module in _modules(model, "model"):
        kind = _kind(module)
        if kind == "Linear":
            linears.append(module)
            specs.append(None)
            slopes.append(None)
        elif kind in NOTHING or (kind == "Flatten" and not linears and module.start_dim == 1):
            continue
        elif linears and specs[-1] is None:
            specs[-1] = _spec(module, place, linears[-1].out_features)
            slopes[-1] = getattr(module, "weight", None)
        else:
            raise ValueError(
                f"{place}: {module!r} has no place here: from_torch takes a torch.nn.Sequential of "
                "Linear layers, each followed by at most one activation"
            )
    if not linears:
        raise ValueError(f"model has no Linear layer: {model!r}")
    return linears, [spec or "identity" for spec in specs], slopes


def _kind(module: Any) -> str:
    """Return the class name of one of PyTorch's own modules; "" for any other class."""
    return type(module).__name__ if type(module).__module__.startswith("torch.nn.modules.") else ""


def _modules(model: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield the modules of a Sequential, including nested ones, in order, each with its place.

    Raises:
        ValueError: a module has hooks or a `forward` that change what its class computes.
    """
    if _kind(model) and (
        model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model)
    ):
        raise ValueError(
            f"{place}: {model!r} has forward hooks (as weight_norm and prune set) or its own "
            "forward: remove them first"
        )
    if _kind(model) != "Sequential":
        yield place, model
        return
    for name, module in enumerate(model):
        yield from _modules(module, f"{place}[{name}]")


def _spec(module: Any, place: str, n: int) -> Any:
    """Return the activation equal to a PyTorch module that follows a layer of n outputs."""
    if _kind(module) == "PReLU" and module.num_parameters not in (1, n):
        raise ValueError(
            f"{place}: {module!r} does not fit {n} outputs: its num_parameters must be 1 or {n}"
        )
    wrong = []
    for name, (kind, argument, settings) in TORCH.items():
        if kind == _kind(module):
            found = [
                f"{s} must be {' or '.join(map(repr, x))}"
                for s, x in settings.items()
                if getattr(module, s) not in x
            ]
            if not found:
                by_output = kind == "PReLU" and module.num_parameters > 1
                several = (sheet.LEARNED[1],) if by_output else ()
                return name if argument is None else (name, getattr(module, argument), *several)
            wrong += found
    if wrong:
        raise ValueError(f"{place}: {module!r} has no equivalent: {', or '.join(wrong)}")
    known = ", ".join(
        dict.fromkeys(
            ["Sequential", "Linear", "Flatten", *(kind for kind, *_ in TORCH.values()), *NOTHING]
        )
    )
    raise TypeError(f"{place} must be one of torch.nn's {known}; got {_kind(module)}")


def to_torch(net: Network) -> Any:
    """Return a `torch.nn.Sequential` that predicts the same; weights are copied.

    A matrix tied by its transpose becomes a separate matrix.

    Raises:
        ValueError: PyTorch has no equivalent of an activation; `mlpcore.torch.Module(net)` works
            for every network.
    """
    import torch

    layers: list[Any] = []
    linears: dict[int, Any] = {}
    owners = {tie.layer: tie.owner for tie in net.layout.ties if not tie.transposed}
    for l in range(1, net.layout.layers + 1):
        n_in, n_out = net.sizes[l - 1 : l + 1]
        linear = torch.nn.utils.skip_init(
            torch.nn.Linear,
            n_in,
            n_out,
            bias=net.layout.bias,
            device=net.device,
            dtype=getattr(torch, net.dtype.name),
        )
        with torch.no_grad():
            linear.weight.copy_(torch.from_dlpack(net.W[l]).T)
            if net.layout.bias:
                linear.bias.copy_(torch.from_dlpack(net.b[l]))
        if l in owners:
            linear.weight = linears[owners[l]].weight
        linears[l] = linear
        layers.append(linear)
        layers += _modules_of(torch.nn, net.activations[l], l)
        if net.a[l] is not None:
            layers[-1] = torch.nn.PReLU(
                net.a[l].size, layers[-1].init, device=net.device, dtype=linear.weight.dtype
            )
            with torch.no_grad():
                layers[-1].weight.copy_(torch.from_dlpack(net.a[l]))
    return torch.nn.Sequential(*layers)


def _modules_of(nn: Any, activation: Any, l: int) -> list[Any]:
    """Return a list of the PyTorch module equal to an activation; [] for the identity."""
    if activation.name == "identity":
        return []
    kind, argument, settings = TORCH.get(activation.name, ("", None, {}))
    equal = kind and (
        activation.rowwise or activation.value == sheet.resolve(activation.name).value
    )
    equal = equal and (activation.learned is not None) == (kind == "PReLU")
    if not equal or (argument is None and activation.parameter not in (None, 1.0)):
        raise ValueError(
            f"layer {l}: PyTorch has no module that equals {activation.spec!r}; use "
            "mlpcore.torch.Module(net)"
        )
    given = {} if argument is None else {argument: activation.parameter}
    return [getattr(nn, kind)(**given, **{name: values[0] for name, values in settings.items()})]


def from_sklearn(model: Any, device: str) -> Model:
    """Return the network of a fitted scikit-learn model; see `mc.MLP.from_sklearn`."""
    if not hasattr(model, "hidden_layer_sizes") or not hasattr(model, "activation"):
        raise TypeError(
            f"model must be a fitted MLPClassifier or MLPRegressor; got {type(model).__name__}"
        )
    if not hasattr(model, "coefs_"):
        raise ValueError(f"model: this {type(model).__name__} is not fitted yet")
    given = model.activation  # mlpcore's own estimators have a list, one per layer
    hidden = given if isinstance(given, list) else [given] * (len(model.coefs_) - 1)
    names = [
        SKLEARN.get(x, x) if isinstance(x, str) else x for x in (*hidden, model.out_activation_)
    ]
    slopes = iter(getattr(model, "slopes_", ()))  # those of mlpcore's own estimators
    learned = [
        None if sheet.resolve(name, output=True).learned is None else next(slopes) for name in names
    ]
    found, flat = _assemble(model.coefs_, model.intercepts_, learned, names, {})
    regression = not hasattr(model, "classes_") and found.layout.sizes[-1] == 1
    return Model(found, flat, device, predicts_1d=regression)


def _assemble(
    W: Sequence[Any],
    b: Sequence[Any],
    a: Sequence[Any],
    activations: list[Any],
    tied: dict[int, int],
) -> tuple[Architecture, Array]:
    """Return the architecture with these weights, biases and slopes, and its flat parameters.

    W[l] is (n_{l-1}, n_l), b[l] is (n_l,). If only some layers have biases, the others get 0. Half
    precision becomes float32.
    """
    architecture = Architecture.parse(
        [len(W[0]), *(w.shape[1] for w in W)],
        activations[:-1],
        activations[-1],
        bias=any(x is not None for x in b),
        tied=tied,
        dtype=np.result_type(W[0].dtype, np.float32),
    )
    layout = architecture.layout
    flat: Array = np.zeros(layout.size, architecture.dtype)
    for views, found in zip((*layout.views(flat), layout.slopes(flat)), (W, b, a), strict=True):
        for view, array in zip(views[1:], found, strict=True):
            if view is not None and array is not None:
                view[...] = array
    return architecture, flat
