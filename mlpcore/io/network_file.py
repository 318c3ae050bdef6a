"""Networks in model files: the architecture in the header, the parameters as a tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core.architecture import Architecture
from mlpcore.io import kinds, model_file

Array = NDArray[Any]


def describe(architecture: Architecture, predicts_1d: bool) -> dict[str, Any]:
    """Return the header entries that describe a network, as JSON types."""
    return {**architecture.describe(), **({"predicts_1d": True} if predicts_1d else {})}


def write(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    parameters: Array,
    tensors: object,
    about: Mapping[str, Any] | None,
) -> None:
    """Write a network to a safetensors file, atomically; see `mc.MLP.save`.

    Args:
        path: path of the file.
        header: as `describe` returns it.
        parameters: flat, on the host.
        tensors, about: as in `mc.MLP.save`.
    """
    named = require_tensors(tensors)
    kinds.require_replaceable(values.path(path), kinds.NETWORKS)
    whole = {**header, "about": {} if about is None else about}
    model_file.write(path, whole, {"parameters": parameters, **named})


def require_tensors(tensors: object) -> dict[str, Any]:
    """Return the caller's tensors as a dict, {} for None.

    Raises:
        TypeError, ValueError: it is not a dict of NumPy arrays, or a name is reserved.
    """
    named = {} if tensors is None else tensors
    if not isinstance(named, Mapping) or not all(
        isinstance(x, np.ndarray | np.generic) for x in named.values()
    ):
        raise TypeError(f"tensors must be a dict of NumPy arrays; got {shown(named)}")
    for name in named:
        if not isinstance(name, str) or name in ("parameters", "__metadata__"):
            raise ValueError(
                f"tensors: {shown(name)} cannot be a name: it is not text, or it is reserved"
            )
    return dict(named)


def parse(
    path: str | os.PathLike[str], header: Any, tensors: dict[str, Array]
) -> tuple[Architecture, Array, bool]:
    """Return architecture, parameters and `predicts_1d`; pop "parameters" from `tensors`.

    Raises:
        ValueError: header and tensors do not hold a network; names the path.
    """
    try:
        parameters = tensors.pop("parameters")
        architecture = Architecture.from_description(header, parameters.dtype)
        size = architecture.layout.size
        if parameters.shape != (size,):
            raise ValueError(
                f"parameters have shape {parameters.shape}; the network needs ({size},)"
            )
        predicts_1d = values.boolean(header.get("predicts_1d", False), "predicts_1d")
        if predicts_1d and architecture.layout.sizes[-1] != 1:
            raise ValueError("predicts_1d of a network with several outputs")
    except (
        ArithmeticError,
        AttributeError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ValueError(f"{str(path)!r} does not hold a network: {error!r}") from None
    return architecture, parameters, predicts_1d
