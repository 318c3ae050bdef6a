"""The recurrences of the forward and backward pass.

    Z[0] = X                                        D[l]   = G[l] ⊙ σ_l'(S[l], Z[l])
    S[l] = Z[l-1] W[l] + b[l]                       db[l]  = Σ_rows D[l]
    Z[l] = σ_l(S[l])                                dW[l]  = Z[l-1]ᵀ D[l]
                                                    G[l-1] = D[l] W[l]ᵀ
        l = 1 … L                                       l = L … 1

Rows are samples: Z[l], S[l], G[l], D[l] are (m, n_l), W[l] is (n_{l-1}, n_l), b[l] is (n_l,),
activations[l] is σ_l. Index 0 belongs to the input (None if there is nothing for it). The caller
decides which arrays share memory: S[l] may be Z[l], D[l] may be Z[l] or G[l].

An activation bound to a learned parameter a[l] holds the array da[l] of its gradient: da[l] =
Σ G[l] ⊙ ∂σ_l/∂a over the rows and, if the outputs share a[l], over the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlpcore.core.ops import Array, Ops

Arrays = Sequence[Array]


def forward(
    ops: Ops, W: Arrays, b: Arrays, activations: Sequence[Any], S: Arrays, Z: Arrays
) -> None:
    """Fill S and Z from Z[0] = X."""
    for l in range(1, len(W)):
        ops.layer(Z[l - 1], W[l], b[l], activations[l], S[l], Z[l])


def backward(
    ops: Ops, W: Arrays, activations: Sequence[Any], S: Arrays, Z: Arrays, G: Arrays, D: Arrays,
    dW: Arrays, db: Arrays, repeats: Sequence[bool], accumulate: bool = False,
) -> None:  # fmt: skip
    """Fill D, dW, db, da (or add to dW, db, da) and G[l] for l < L from G[L] = ∂J/∂Z[L].

    If G[L] is None, the loss has already set D[L] and db[L]; if G[0] is None, the input gradient
    is skipped. A layer that `repeats` a tied matrix adds to its dW: the total derivative is the
    sum over the uses.
    """
    for l in range(len(W) - 1, 0, -1):
        if G[l] is not None:
            ops.activation_gradient(G[l], S[l], Z[l], activations[l], D[l], db[l], accumulate)
        ops.gemm(Z[l - 1].T, D[l], dW[l], accumulate or repeats[l])
        if G[l - 1] is not None:
            ops.gemm(D[l], W[l].T, G[l - 1])
