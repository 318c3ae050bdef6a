"""The structure of a network without its numbers: widths, activations, bias, ties and dtype.

`Architecture.parse` takes the input of a user, a file or another library; `initial_parameters`
draws the flat vector that a new network starts from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core import activations as activation_sheet
from mlpcore.core.activations import Activation
from mlpcore.core.layout import Layout, Tie, parse_ties

DTYPES = ("float32", "float64")
MOST_LAYERS, MOST_PARAMETERS = 10_000, 2**58  # limits that keep byte counts within NumPy's range


class Architecture(NamedTuple):
    """The structure of a network, without its numbers.

    Attributes:
        layout: sizes, bias and ties, and the place of each parameter in the flat vector.
        activations: the activations of the layers; index 0 is None.
        dtype: float32 or float64.
    """

    layout: Layout
    activations: tuple[Activation | None, ...]
    dtype: np.dtype[Any]

    @classmethod
    def parse(
        cls,
        sizes: object,
        activations: Any,
        output: Any,
        *,
        bias: object = True,
        tied: object = None,
        dtype: Any = "float32",
    ) -> Architecture:
        """Return the architecture described by the arguments of `mc.MLP`.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what was passed.
        """
        widths = _parse_sizes(sizes)
        resolved = _parse_activations(activations, output, len(widths) - 1)
        ties = () if tied is None else parse_ties(tied, widths)
        layout = _make_layout(widths, values.boolean(bias, "bias"), ties, resolved)
        return cls(layout, resolved, np.dtype(np.float64)).cast(dtype)

    def cast(self, dtype: Any) -> Architecture:
        """Return this architecture in another dtype, which must hold the activations' parameters.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what was passed.
        """
        parsed = _parse_dtype(dtype)
        for i, activation in enumerate(self.activations[1:]):
            if activation is not None and activation.parameter is not None:
                where = "output" if i == self.layout.layers - 1 else f"activations[{i}]"
                name = f"{where}: the parameter of {activation.name}"
                values.require_held(activation.parameter, parsed.name, name)
        return self._replace(dtype=parsed)

    @property
    def tied(self) -> dict[int, int | str]:
        """Layers without a matrix of their own, in the user's notation: `{4: "1.T"}`."""
        return {
            layer: f"{owner}.T" if transposed else owner
            for layer, owner, transposed in self.layout.ties
        }

    def describe(self) -> dict[str, Any]:
        """Return the description that model files store, made of JSON types."""
        rows = [
            activation_sheet.described(sigma) for sigma in self.activations if sigma is not None
        ]
        named = {str(layer): owner for layer, owner in self.tied.items()}
        ties = {"tied": named} if named else {}
        return {"sizes": self.layout.sizes, "bias": self.layout.bias, "activations": rows, **ties}

    @classmethod
    def from_description(cls, described: Mapping[str, Any], dtype: Any) -> Architecture:
        """Return the architecture that `describe` described; raise any error if it is invalid."""
        rows = [activation_sheet.restored(row) for row in described["activations"]]
        tied = {int(layer): owner for layer, owner in described.get("tied", {}).items()}
        return cls.parse(
            described["sizes"],
            rows[:-1],
            rows[-1],
            bias=described["bias"],
            tied=tied,
            dtype=dtype,
        )


def initial_parameters(architecture: Architecture, init: object, seed: int) -> NDArray[Any]:
    """Return initial parameters, a flat vector on the host, drawn in float64.

    Args:
        architecture: the network's architecture.
        init: "auto" (each activation's own rule), "he", "glorot", "lecun" or "zeros".
        seed: the generator's seed.

    Raises:
        TypeError, ValueError: `init` is not one of these.
        MemoryError: the vector does not fit into memory.
    """
    rule = values.one_of(init, "init", ("auto", *activation_sheet.INITIAL, "zeros"))
    layout, activations = architecture.layout, architecture.activations
    try:
        flat = np.zeros(layout.size, architecture.dtype)
    except MemoryError:
        count = f"{layout.size:,} parameters in {architecture.dtype.name}"
        raise MemoryError(f"sizes: there is no memory for {count}") from None
    for activation, a in zip(activations, layout.slopes(flat), strict=True):
        if activation is not None and a is not None:
            a[...] = activation.parameter
    if rule == "zeros":
        return flat
    rng = np.random.default_rng(seed)
    L, W = layout.layers, layout.views(flat)[0]
    plain = None if rule == "auto" else Activation("identity", "s", "1", init=rule)
    for l in layout.owners:
        activation, last = plain or activations[l], plain is None and l == L
        assert activation is not None
        draw = rng.standard_normal(W[l].shape)
        n_in, n_out = W[l].shape
        draw *= activation.standard_deviation(n_in, n_out, output=last)
        W[l][...] = draw
    return flat


def _parse_sizes(sizes: object) -> tuple[int, ...]:
    unordered = isinstance(sizes, str | bytes | Set | Mapping)
    if unordered or not isinstance(sizes, Iterable) or getattr(sizes, "shape", None) == ():
        raise TypeError(
            f"sizes must be a list of widths such as [784, 512, 10]; got {shown(sizes)}"
        )
    several = itertools.islice(sizes, MOST_LAYERS + 2)  # stops a generator that never ends
    widths = tuple(values.positive_integer(n, f"sizes[{i}]") for i, n in enumerate(several))
    if len(widths) < 2:
        raise ValueError(f"sizes needs at least an input and an output width; got {list(widths)}")
    if len(widths) > MOST_LAYERS + 1:
        raise ValueError(f"sizes must describe at most {MOST_LAYERS:,} layers; got more")
    return widths


def _parse_activations(hidden: Any, output: Any, layers: int) -> tuple[Activation | None, ...]:
    one = isinstance(hidden, str | Activation) or (
        isinstance(hidden, tuple)
        and len(hidden) in (2, 3)
        and not isinstance(hidden[1], str | Activation | tuple | list)
    )
    if one:
        hidden = [hidden] * (layers - 1)
    elif not isinstance(hidden, list | tuple):
        raise TypeError(
            "activations must be a name, (name, parameter), mc.Activation or a list of them; got "
            f"{shown(hidden)}"
        )
    if len(hidden) != layers - 1:
        raise ValueError(
            f"activations must be one, or {layers - 1}: one per hidden layer; got {len(hidden)}"
        )
    resolved = [
        activation_sheet.resolve(spec, f"activations[{i}]") for i, spec in enumerate(hidden)
    ]
    return (None, *resolved, activation_sheet.resolve(output, "output", output=True))


def _parse_dtype(dtype: Any) -> np.dtype[Any]:
    wanted = f"dtype must be one of {', '.join(DTYPES)}"
    try:
        parsed: np.dtype[Any] = np.dtype("" if dtype is None else dtype).newbyteorder("=")
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"{wanted}; got {shown(dtype)}") from None
    if parsed.name not in DTYPES:
        raise ValueError(f"{wanted}; got {shown(parsed.name)}")
    return parsed


def _make_layout(
    widths: tuple[int, ...],
    bias: bool,
    ties: tuple[Tie, ...],
    activations: Sequence[Activation | None],
) -> Layout:
    learned = tuple(
        σ.learned_numbers(n) for n, σ in zip(widths, activations, strict=True) if σ is not None
    )
    layout = Layout(widths, bias, ties, learned if any(learned) else ())
    if layout.size > MOST_PARAMETERS:
        made = f"{shown(list(widths))} make {layout.size:.3g}"
        raise ValueError(f"sizes must make at most 2**58 parameters; {made}")
    return layout
