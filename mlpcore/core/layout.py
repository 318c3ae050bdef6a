"""The flat vector: one contiguous array of numbers, with shaped views.

    flat = [ W[1] | … | W[L] | b[1] | … | b[L] | a[1] | … | a[L] ]

W[l] is (n_{l-1}, n_l), row-major; b[l] is (n_l,). a[l] is the learned parameter of an activation,
(1,) or (n_l,); most layers have none. Parameters, gradient and each optimizer state share this
layout: one update pass, one all-reduce, one file entry. Penalties and decay act on the prefix
`flat[:weights]`. A tied matrix is stored once: its other uses are views of it, so that their
gradients add up in one place.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

from mlpcore.checks.errors import shown
from mlpcore.core.ops import Call, make


class Tie(NamedTuple):
    """A layer that shares the W of a lower layer: `Tie(4, 1, True)` makes W[4] the view W[1].T."""

    layer: int
    owner: int
    transposed: bool


@dataclass(frozen=True)
class Layout:
    """Sizes and offsets of a network's parameters.

    Attributes:
        sizes: the widths n_0 … n_L.
        bias: True if layers have a bias.
        ties: the layers without a matrix of their own.
        learned: the lengths of a[1] … a[L]; empty if no activation has a learned parameter.
    """

    sizes: tuple[int, ...]
    bias: bool = True
    ties: tuple[Tie, ...] = ()
    learned: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        """Number of layers L; index 0 is the input."""
        return len(self.sizes) - 1

    @property
    def owners(self) -> list[int]:
        """Layers that have a matrix of their own, in order."""
        tied = {tie.layer for tie in self.ties}
        return [l for l in range(1, self.layers + 1) if l not in tied]

    @property
    def weights(self) -> int:
        """Total length of all W, each counted once: penalties and decay act on this prefix."""
        return sum(self.sizes[l - 1] * self.sizes[l] for l in self.owners)

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return self.weights + (sum(self.sizes[1:]) if self.bias else 0) + sum(self.learned)

    @property
    def repeats(self) -> tuple[bool, ...]:
        """True for each layer l whose dW[l] the backward pass has already set when it reaches l."""
        owner = {tie.layer: tie.owner for tie in self.ties}
        slots = [owner.get(l, l) for l in range(self.layers + 1)]
        return tuple(slot in slots[l + 1 :] for l, slot in enumerate(slots))

    def views(self, flat: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return W and b, tuples of views of `flat`; index 0 is None, b[l] is None without bias."""
        W: list[Any] = [None] * (self.layers + 1)
        b: list[Any] = [None]
        offset = 0
        for l in self.owners:
            rows, columns = self.sizes[l - 1 : l + 1]
            W[l] = flat[offset : offset + rows * columns].reshape(rows, columns)
            offset += rows * columns
        for layer, owner, transposed in self.ties:
            W[layer] = W[owner].T if transposed else W[owner]
        for columns in self.sizes[1:]:
            b.append(flat[offset : offset + columns] if self.bias else None)
            offset += columns if self.bias else 0
        return tuple(W), tuple(b)

    def slopes(self, flat: Any) -> tuple[Any, ...]:
        """Return a, views of `flat`; None at index 0 and for layers that learn no parameter."""
        edges = [0, *itertools.accumulate(self.learned or (0,) * self.layers)]
        parts = [
            slice(self.size - edges[-1] + i, self.size - edges[-1] + j)
            for i, j in itertools.pairwise(edges)
        ]
        return (None, *(flat[part] if part.start < part.stop else None for part in parts))

    def name(self, position: int) -> str:
        """Return the name of the entry at a position of the flat vector: `"W[2][0, 3]"`."""
        for l in self.owners:
            rows, columns = self.sizes[l - 1 : l + 1]
            if position < rows * columns:
                return f"W[{l}][{position // columns}, {position % columns}]"
            position -= rows * columns
        for letter, lengths in (("b", self.sizes[1:] if self.bias else ()), ("a", self.learned)):
            for l, length in enumerate(lengths, 1):
                if position < length:
                    return f"{letter}[{l}][{position}]"
                position -= length
        raise IndexError(position)


class Parameters:
    """The flat vector of a network on its device, its views, and a record of its last writer.

    Attributes:
        flat: all W, then all b, then all a.
        W, b, a: views; index 0 is None.
        exposed: True once a user holds a view and may write the parameters at any time.
        writer: the step that last wrote or copied them; None if others have written them since.
        torn: number of the step that was interrupted in the middle of its update; 0 if none was.
    """

    def __init__(self, layout: Layout, flat: Any):
        self.flat = flat
        self.W, self.b = layout.views(flat)
        self.a = layout.slopes(flat)
        self.exposed = False
        self.writer: object = None
        self.torn = 0

    def write(self, flat: Any) -> None:
        """Overwrite all parameters with those of another flat vector on the same device."""
        make(self.writes(flat))

    def writes(self, flat: Any) -> list[Call]:
        """Return the calls that `write` makes."""
        return [
            (operator.setitem, self.flat, ..., flat),
            (vars(self).update, {"writer": None, "torn": 0}),
        ]

    def require_whole(self, torn: int = 0) -> None:
        """Raise a RuntimeError if an update, of step `torn` or the last one, was interrupted."""
        if torn := torn or self.torn:
            raise RuntimeError(
                f"step {torn} was interrupted in the middle of its update: parameters and "
                "optimizer state are inconsistent. Load the last checkpoint with "
                "mc.Trainer.load"
            )


def parse_ties(tied: object, sizes: tuple[int, ...]) -> tuple[Tie, ...]:
    """Return the ties that a user's `{4: 1, 5: "2.T"}` describes.

    Raises:
        TypeError, ValueError: names `tied`, what was expected and what was passed.
    """
    if not isinstance(tied, Mapping):
        raise TypeError(f"tied must be a dict such as {{4: 1}} or {{4: '1.T'}}; got {shown(tied)}")
    ties = []
    for layer, what in tied.items():
        transposed = isinstance(what, str)
        named = re.fullmatch(r"([0-9]{1,9})\.T", what) if isinstance(what, str) else None
        owner = int(named[1]) if named else what
        for given in (layer, owner):
            if isinstance(given, bool) or not isinstance(given, Integral):
                raise TypeError(
                    f"tied: expected layer: layer, or layer: 'layer.T', such as {{4: '1.T'}}; got "
                    f"{shown({layer: what})}"
                )
        ties.append(Tie(int(layer), int(owner), transposed))
    for tie in ties:
        owned, own = sizes[tie.owner - 1 : tie.owner + 1], sizes[tie.layer - 1 : tie.layer + 1]
        if not 1 <= tie.owner < tie.layer < len(sizes):
            raise ValueError(
                f"tied: a layer takes the matrix of a lower one, of layers 1 … {len(sizes) - 1}; "
                f"got {shown(tie.layer)}: {shown(tie.owner)}"
            )
        if tie.owner in (other.layer for other in ties):
            raise ValueError(
                f"tied: layer {tie.layer} is tied to layer {tie.owner}, which is itself tied: name "
                "its owner"
            )
        if (owned[::-1] if tie.transposed else owned) != own:
            name = f"W[{tie.owner}]{'.T' if tie.transposed else ''}"
            shape = owned[::-1] if tie.transposed else owned
            raise ValueError(f"tied: {name} is {shape}, but W[{tie.layer}] must be {own}")
    return tuple(sorted(ties))
