"""The unfused reference on a GPU: the NumPy backend's code on CuPy's arrays, call by call.

The fused kernels are checked against it, and it runs if cuBLASLt cannot be loaded. CuPy has no
`reduce` for maxima, no `take` with a mode, and its `matmul` writes to `out=` but cannot accumulate:
the operations that need these are written out here.
"""

from __future__ import annotations

from typing import Any

from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.checks import arrays
from mlpcore.core.losses import Loss
from mlpcore.core.ops import Array
from mlpcore.core.targets import mixed


class CupyReference(NumpyOps):
    """`core.ops.Ops` on the arrays of `xp`, without custom kernels."""

    stages = False

    def __init__(self, xp: Any):
        super().__init__(xp)
        self._dot = self._matmul = self._matmul_now

    def _matmul_now(self, A: Array, B: Array, C: Array) -> None:
        self.xp.matmul(A, B, out=C)

    def gather(self, source: Array, rows: slice | Array, out: Array, stage: Array | None) -> None:
        """Set out = source[rows], cast to out's dtype."""
        here = isinstance(rows, slice) or arrays.on_host(source)
        picked = source[rows if here else self.xp.asarray(rows)]
        out[...] = self.xp.asarray(picked).astype(out.dtype, copy=False)

    def sum_squares(self, v: Array) -> float:
        """Return Σ v², summed in double in one call, since each piece would wait for the device."""
        return float(self.xp.sum(self.xp.square(v, dtype=self.xp.float64)))

    def sum_abs(self, v: Array) -> float:
        """Return Σ |v|, summed in double precision."""
        return float(self.xp.sum(self.xp.abs(v, dtype=self.xp.float64)))

    def _softmax(self, S: Array, Z: Array) -> None:
        self._do(_softmax, self.xp, S, Z)

    def _softmax_gradient(self, G: Array, Z: Array, D: Array) -> None:
        self._do(_softmax_gradient, G, Z, D)

    def _log_softmax(self, S: Array, Z: Array) -> None:
        self._do(_log_softmax, self.xp, S, Z)

    def _log_softmax_gradient(self, G: Array, Z: Array, D: Array) -> None:
        self._do(_log_softmax_gradient, self.xp, G, Z, D)

    def _cross_entropy(
        self, S: Array, Y: Array, k: Array, D: Array, J: Array, loss: Loss, weights: Array | None
    ) -> None:
        self._do(_cross_entropy, self.xp, S, Y, k, D, J, loss)

    def _add_sum(self, v: Array, J: Array) -> None:
        self._do(_add_sum, self.xp, v, J)


def _softmax(xp: Any, S: Array, Z: Array) -> None:
    powers = xp.exp(S - S.max(axis=1, keepdims=True))
    Z[...] = powers / powers.sum(axis=1, keepdims=True)


def _softmax_gradient(G: Array, Z: Array, D: Array) -> None:
    D[...] = Z * (G - (G * Z).sum(axis=1, keepdims=True))


def _log_softmax(xp: Any, S: Array, Z: Array) -> None:
    shifted = S - S.max(axis=1, keepdims=True)
    powers = xp.exp(shifted)
    powers[xp.arange(len(S)), S.argmax(axis=1)] = 0
    Z[...] = shifted - xp.log1p(powers.sum(axis=1, keepdims=True))


def _log_softmax_gradient(xp: Any, G: Array, Z: Array, D: Array) -> None:
    D[...] = G - xp.exp(Z) * G.sum(axis=1, keepdims=True)


def _cross_entropy(xp: Any, S: Array, Y: Array, k: Array, D: Array, J: Array, loss: Loss) -> None:
    rows, (classes, most) = xp.arange(len(S)), (S.shape[1], loss.most)
    # its exponential is kept out of the sum of the others
    apart = rows, S.argmax(axis=1) if Y.ndim == 2 else Y
    if loss.mixes(Y.ndim == 1):
        target = mixed(loss, Y, classes, S.dtype, xp)
    else:
        target = Y if Y.ndim == 2 else (Y[:, None] == xp.arange(classes)).astype(S.dtype)
    shifted = S - S.max(axis=1, keepdims=True)
    powers = xp.exp(shifted)
    own, y = powers[apart][:, None], target[apart][:, None]
    powers[apart] = 0
    rest, whole = powers.sum(axis=1, keepdims=True), target.sum(axis=1, keepdims=True)
    more = rest + (own - 1)
    value = whole * xp.log1p(more) - (target * shifted).sum(axis=1, keepdims=True)
    J += (k * (value if most is None else xp.minimum(value, most))).sum(dtype=xp.float64)
    D[...] = k * (whole * powers / (more + 1) - target)
    D[apart] = (k * ((whole - y) * own - y * rest) / (more + 1))[:, 0]


def _add_sum(xp: Any, v: Array, J: Array) -> None:
    J += v.sum(dtype=xp.float64)
