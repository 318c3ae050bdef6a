"""The flat vector: all W first, then all b, one contiguous run of numbers with shaped views.

    flat = [ W[1] | W[2] | … | W[L] | b[1] | … | b[L] ],   W[l] (n_{l-1}, n_l) row-major,  b[l] (n_l,)

Parameters, gradient and each optimizer state share this layout: one update pass, one all-reduce, one file entry. Penalties
and decay act on the prefix `flat[:weights]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Sizes and offsets of a network's parameters.

    Attributes:
        sizes: the widths n_0 … n_L.
        bias: whether layers have a bias.
    """

    sizes: tuple[int, ...]
    bias: bool = True

    @property
    def layers(self) -> int:
        """L, the number of layers; index 0 is the input."""
        return len(self.sizes) - 1

    @property
    def weights(self) -> int:
        """How many numbers all W hold together: the prefix on which penalties and decay act."""
        return sum(a * b for a, b in zip(self.sizes, self.sizes[1:], strict=False))

    @property
    def size(self) -> int:
        """How many numbers the flat vector holds."""
        return self.weights + (sum(self.sizes[1:]) if self.bias else 0)

    def views(self, flat: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """`W, b` as tuples of views of `flat`, index 0 None; every b[l] is None without bias."""
        W, b, offset = [None], [None], 0
        for rows, columns in zip(self.sizes, self.sizes[1:], strict=False):
            W.append(flat[offset : offset + rows * columns].reshape(rows, columns))
            offset += rows * columns
        for columns in self.sizes[1:]:
            b.append(flat[offset : offset + columns] if self.bias else None)
            offset += columns if self.bias else 0
        return tuple(W), tuple(b)

    def name(self, position: int) -> str:
        """The entry at a position of the flat vector, in the words of the derivation: `"W[2][0, 3]"`."""
        for l, (rows, columns) in enumerate(zip(self.sizes, self.sizes[1:], strict=False), 1):
            if position < rows * columns:
                return f"W[{l}][{position // columns}, {position % columns}]"
            position -= rows * columns
        for l, columns in enumerate(self.sizes[1:], 1):
            if position < columns:
                return f"b[{l}][{position}]"
            position -= columns
        raise IndexError(position)
