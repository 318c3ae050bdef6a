"""Activations by name: the built-in ones, and the parser of a user's `activations=`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlpcore.checks.errors import shown
from mlpcore.core.activation import INITIAL, LEARNED, Activation
from mlpcore.core.sheet import ACTIVATIONS

__all__ = [
    "INITIAL", "LEARNED", "SOFTMAX", "Activation", "bind", "described", "names", "resolve",
    "restored",
]  # fmt: skip

SOFTMAX = ACTIVATIONS["softmax"]


def names(output: bool = False) -> list[str]:
    """Return the names allowed for a hidden layer, or for the output layer."""
    return [name for name, sigma in ACTIVATIONS.items() if output or not sigma.rowwise]


def resolve(spec: object, argument: str = "activations", output: bool = False) -> Activation:
    """Return the activation that a user's argument describes.

    Args:
        spec: `"relu"`, `("sigmoid", 2.0)`, `("prelu", 0.25, "per output")` or `Activation(…)`.
        argument: the argument's name in errors.
        output: True for the output layer, which may have a softmax.

    Raises:
        TypeError, ValueError: names `argument`, and the nearest known name or the fault of the
            parameter.
    """
    first = spec[0] if isinstance(spec, tuple | list) and spec else spec
    row = ACTIVATIONS.get(first) if isinstance(first, str) else first
    if isinstance(row, Activation) and row.rowwise and not output:
        raise ValueError(
            f"{argument}: {row.name} is for the output layer only (output={row.name!r})"
        )
    if not isinstance(spec, tuple | list) or len(spec) != 3 or not isinstance(first, str):
        return Activation.resolve(spec, argument, ACTIVATIONS, names(output))
    *pair, shared = spec
    sigma = Activation.resolve(tuple(pair), argument, ACTIVATIONS, names(output))
    if sigma.learned is None:
        what = "takes no" if sigma.parameter is None else "has no learned"
        raise ValueError(f"{argument}: {sigma.name} {what} parameter; got {shown(spec)}")
    if shared not in LEARNED:
        raise ValueError(
            f"{argument}: {sigma.name} is learned {' or '.join(map(repr, LEARNED))}; got "
            f"{shown(shared)}"
        )
    return replace(sigma, learned=shared)


def described(sigma: Activation) -> dict[str, Any]:
    """Return an activation's arguments for a file; `learned` only if it is set."""
    arguments = sigma.described(ACTIVATIONS)
    if sigma.learned is None:
        del arguments["learned"]
    return arguments


def restored(arguments: Mapping[str, Any]) -> Activation:
    """Return the activation that `described` described. Raises TypeError or ValueError."""
    return Activation.restored(arguments, ACTIVATIONS)


def bind(
    activations: Sequence[Activation | None], a: Sequence[Any], da: Sequence[Any] | None = None
) -> tuple[Activation | None, ...]:
    """Return the activations of layers 0 … L, each bound to its learned parameter if it has one.

    Args:
        activations: the activations of the layers.
        a: the learned parameters by layer.
        da: arrays for their gradients in a backward pass, by layer; None: not written.
    """
    bound = list(activations)
    for l, sigma in enumerate(activations):
        if sigma is not None and sigma.learned:
            bound[l] = sigma.bound(a[l], None if da is None else da[l])
    return tuple(bound)
