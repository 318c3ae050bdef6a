"""Dropout zeroes entries of a hidden Z with probability p and scales the others by 1 / (1 - p).

    z̃ = m k z,   ∂J/∂s = g m k σ'(s, z)       k = 1 / (1 - p), m = 0 or 1

m is a pure function of (seed, layer, step, row in the batch, column): there is no state, and
chunks, threads and device do not change it. With `mix` a permutation of 32-bit integers and all
sums modulo 2³²:

    base = mix(key + step),   r = mix(base + row),   c = mix(mix(base + GOLDEN) + column)
    m = 0 if draw(r xor c) < p 2³¹

Z̃ itself stores m: a dropped entry is -0, and a kept one never is. So the backward pass needs no
stored or redrawn mask.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core import formulas
from mlpcore.core.activation import Activation

# 2³² over the golden ratio: added to a number, it separates one use of it from the next
GOLDEN = 0x9E3779B9
# C. Wellons, "Prospecting for Hash Functions" (2018), nullprogram.com: the function "lowbias32"
SHIFTS, FACTORS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)
# bits of a draw: it omits the last shift and xor of `mix`, which do not change the highest bits
BITS = 31


@dataclass(frozen=True)
class Dropped(Activation):
    """An activation followed by dropout: `value` gives k z, and a backend applies the mask.

    Attributes:
        undropped: the activation without dropout.
        key: 32-bit key of this layer's masks.
        threshold: p 2³¹; a draw below it drops the entry.
    """

    undropped: Activation | None = None
    key: int = 0
    threshold: int = 0

    def __post_init__(self) -> None:
        """Skip the checks: the formulas come from checked ones."""

    @functools.cached_property
    def by_parameter(self) -> str:
        """∂z̃/∂a, a formula in s, a and z̃."""
        return f"({super().by_parameter}) * kept(z)"


def mix(x: int) -> int:
    """Return a permutation of the 32-bit integers at x that spreads each bit over all bits."""
    x &= 0xFFFFFFFF
    for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
        x = (x ^ x >> shift) * factor & 0xFFFFFFFF
    return x


def layer_key(seed: int, layer: int) -> int:
    """Return a 32-bit key that makes the masks differ between layers and between seeds."""
    key = mix(layer)
    while seed:
        key, seed = mix(key + GOLDEN + (seed & 0xFFFFFFFF)), seed >> 32
    return key


def rates(given: object, hidden: int) -> tuple[float, ...]:
    """Return the dropout rate of each hidden layer from a user's `dropout=`; () drops nothing.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what was passed.
    """
    if given is None:
        return ()
    several = isinstance(given, list | tuple)
    each = list(given) if isinstance(given, list | tuple) else [given] * max(1, hidden)
    found = tuple(
        values.number(p, f"dropout[{i}]" if several else "dropout", least=0, below=1)
        for i, p in enumerate(each)
    )
    if several and len(found) != hidden:
        raise ValueError(
            f"dropout must be a rate, or {hidden}: one per hidden layer; got {len(found)}"
        )
    if any(found) and not hidden:
        raise ValueError(
            f"dropout={shown(given)} has nothing to drop: the network has no hidden layer"
        )
    return found if any(found) else ()


def with_dropout(
    activations: tuple[Activation | None, ...], given: tuple[float, ...], seed: int
) -> tuple[Activation | None, ...]:  # fmt: skip
    """Return the activations of layers 0 … L, with dropout at these rates in hidden layers."""
    dropped = list(activations)
    for l, rate in enumerate(given, 1):
        sigma = activations[l]
        assert sigma is not None
        if rate:
            dropped[l] = _dropped(sigma, rate, layer_key(seed, l))
    return tuple(dropped)


def undropped(sigma: Activation | None) -> Activation | None:
    """Return the activation without its dropout, if it has one."""
    if not isinstance(sigma, Dropped) or sigma.undropped is None:
        return sigma
    return sigma.undropped.bound(sigma.a, sigma.da) if sigma.learned else sigma.undropped


def _dropped(sigma: Activation, rate: float, key: int) -> Dropped:
    k = repr(1 / (1 - rate))
    threshold = min(round(rate * 2**BITS), 2**BITS - 1)
    value = f"{k} * ({sigma.value}) + 0"  # adding 0 turns -0 into +0
    slope = f"{k} * ({_slope(sigma, rate)}) * kept(z)"
    return Dropped(
        sigma.name,
        value,
        slope,
        sigma.parameter,
        sigma.init,
        sigma.default,
        sigma.learned,
        sigma,
        key,
        threshold,
    )


def _slope(sigma: Activation, rate: float) -> str:
    """Return σ' with z̃ in place of z: z is z̃ (1 - p) up to rounding, or σ(s) if S is kept.

    A slope that jumps at a z other than 0 (hard_tanh at 1) cannot tolerate the rounding, and is
    written in s.
    """
    # z̃ has the sign of z
    signs = formulas.substitute(sigma.slope, {"z": "z"}).replace("positive(z)", "positive(same)")
    jumps = re.search(r"\b(positive|sign)\((?!same\))", signs)
    if "s" in formulas.reads(sigma.slope) or jumps:
        return formulas.substitute(sigma.slope, {"z": sigma.value})
    return formulas.substitute(signs, {"z": f"z * {1 - rate!r}", "same": "z"})
