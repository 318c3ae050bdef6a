"""Networks from models of PyTorch and scikit-learn, and as one of PyTorch: copied weights, equal
predictions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlpcore.backends import devices
from mlpcore.checks import arrays
from mlpcore.core import activations as sheet

if TYPE_CHECKING:
    from mlpcore.mlp import MLP

# ours: PyTorch's class, its argument that is our parameter, and the settings with which they are
# equal, ours first
TORCH: dict[str, tuple[str, str | None, dict[str, tuple[Any, ...]]]] = {
    "sigmoid": ("Sigmoid", None, {}),
    "tanh": ("Tanh", None, {}),
    "relu": ("ReLU", None, {}),
    "relu6": ("ReLU6", None, {}),
    "leaky_relu": ("LeakyReLU", "negative_slope", {}),
    "prelu": ("PReLU", "init", {}),  # whose slope is a weight
    "elu": ("ELU", "alpha", {}),
    "selu": ("SELU", None, {}),
    "softplus": (
        "Softplus",
        None,
        {"beta": (1,), "threshold": (50, 20)},
    ),  # a straight line from there on: 2e-9 off at 20
    "gelu": ("GELU", None, {"approximate": ("tanh",)}),
    "gelu_erf": ("GELU", None, {"approximate": ("none",)}),
    "silu": ("SiLU", None, {}),
    "mish": ("Mish", None, {}),
    "hard_tanh": ("Hardtanh", None, {"min_val": (-1,), "max_val": (1,)}),
    "softmax": ("Softmax", None, {"dim": (1, -1)}),
    "log_softmax": ("LogSoftmax", None, {"dim": (1, -1)}),
}
NOTHING = ("Identity", "Dropout", "AlphaDropout")  # what does nothing, at least to predictions
SKLEARN = {"logistic": "sigmoid"}  # the other names are ours


def from_torch(make: type[MLP], model: Any) -> MLP:
    """See `MLP.from_torch`."""
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
                "Linear layers, each with "
                "at most one activation behind it"
            )
    if not linears:
        raise ValueError(f"model has no Linear layer: {model!r}")
    for l, (one, other) in enumerate(itertools.pairwise(linears), 1):
        if one.out_features != other.in_features:
            raise ValueError(
                f"model: Linear layer {l} gives {one.out_features} numbers, the next takes "
                f"{other.in_features}"
            )
    matrices = [layer.weight for layer in linears]
    first = [
        next(i for i, x in enumerate(matrices) if x is weight) for weight in matrices
    ]  # where the matrix stands first
    W, b, a = (
        [
            None if x is None else arrays.numeric(x.detach(), "model", devices.adopt_on_host)
            for x in parts
        ]
        for parts in (matrices, [layer.bias for layer in linears], slopes)
    )
    return _assembled(
        make, [w.T for w in W if w is not None], b, a, [spec or "identity" for spec in specs],
        tied={l + 1: owner + 1 for l, owner in enumerate(first) if owner != l}, device=str(matrices[0].device),
    )  # fmt: skip


def _kind(module: Any) -> str:
    """The name of a class of PyTorch's own; "" for a class of somebody else's."""
    return type(module).__name__ if type(module).__module__.startswith("torch.nn.modules.") else ""


def _modules(model: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The modules of a Sequential, and of those in it, in order, each with the place where it
    stands.

    Raises:
        ValueError: one computes more at a call than its class does.
    """
    if _kind(model) and (
        model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model)
    ):
        raise ValueError(
            f"{place}: {model!r} has forward hooks (those of weight_norm and prune are such) or a "
            "forward of its own: "
            "remove them first"
        )
    if _kind(model) != "Sequential":
        yield place, model
        return
    for name, module in enumerate(model):
        yield from _modules(module, f"{place}[{name}]")


def _spec(module: Any, place: str, n: int) -> Any:
    """Our activation that equals PyTorch's, behind a layer of n outputs."""
    if _kind(module) == "PReLU" and module.num_parameters not in (1, n):
        raise ValueError(
            f"{place}: {module!r} has no place behind {n} outputs: its num_parameters must be 1 or "
            f"{n}"
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
                several = (
                    (sheet.LEARNED[1],) if kind == "PReLU" and module.num_parameters > 1 else ()
                )
                return name if argument is None else (name, getattr(module, argument), *several)
            wrong += found
    if wrong:
        raise ValueError(f"{place}: {module!r} has no equal here: {', or '.join(wrong)}")
    known = ", ".join(
        dict.fromkeys(
            ["Sequential", "Linear", "Flatten", *(kind for kind, *_ in TORCH.values()), *NOTHING]
        )
    )
    raise TypeError(f"{place} must be one of torch.nn's {known}; got {_kind(module)}")


def to_torch(net: MLP) -> Any:
    """See `MLP.to_torch`."""
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
    """PyTorch's module that equals an activation; none for the identity."""
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


def from_sklearn(make: type[MLP], model: Any, device: str) -> MLP:
    """See `MLP.from_sklearn`."""
    if not hasattr(model, "hidden_layer_sizes") or not hasattr(model, "activation"):
        raise TypeError(
            f"model must be a fitted MLPClassifier or MLPRegressor; got {type(model).__name__}"
        )
    if not hasattr(model, "coefs_"):
        raise ValueError(f"model: this {type(model).__name__} is not fitted yet")
    given = model.activation  # a list, one a layer, of mlpcore's own estimators
    hidden = given if isinstance(given, list) else [given] * (len(model.coefs_) - 1)
    names = [
        SKLEARN.get(x, x) if isinstance(x, str) else x for x in (*hidden, model.out_activation_)
    ]
    slopes = iter(getattr(model, "slopes_", ()))  # those of mlpcore's own estimators
    learned = [
        None if sheet.resolve(name, output=True).learned is None else next(slopes) for name in names
    ]
    net = _assembled(make, model.coefs_, model.intercepts_, learned, names, {}, device)
    net.predicts_1d = not hasattr(model, "classes_") and net.sizes[-1] == 1  # as a regressor does
    return net


def _assembled(
    make: type[MLP], W: Sequence[Any], b: Sequence[Any], a: Sequence[Any], activations: list[Any], tied: dict[int, int],
    device: str,
) -> MLP:  # fmt: skip
    """A network with these weights (n_{l-1}, n_l), biases (n_l,) and learned parameters; biases of
    layers without are 0.

    Of half precision becomes a float32 network.
    """
    net = make(
        [len(W[0]), *(w.shape[1] for w in W)], activations[:-1], activations[-1], bias=any(x is not None for x in b), tied=tied,
        dtype=np.result_type(W[0].dtype, np.float32), init="zeros", device=device,
    )  # fmt: skip
    flat = np.zeros(net.layout.size, net.dtype)
    for views, found in zip(
        (*net.layout.views(flat), net.layout.slopes(flat)), (W, b, a), strict=True
    ):
        for view, array in zip(views[1:], found, strict=True):
            if view is not None and array is not None:
                view[...] = array
    net._set(flat)
    return net
