"""The recurrences of `backprop.py`, differentiated: along a direction, and once more in reverse.

The differential of the forward pass (Pearlmutter 1994 calls it R-propagation), where dZ[0] is a
change of X and dW, db of the parameters:

    dS[l] = dZ[l-1] W[l] + Z[l-1] dW[l] + db[l]          dZ[l] = σ_l' ⊙ dS[l]
        l = 1 … L

In reverse, for a scalar that depends on Z[L] and dZ[L], with its derivatives G[L] and H[L] by these
two:

    E[l] = ∂/∂dS[l] = H[l] ⊙ σ_l'
    D[l] = ∂/∂S[l] = G[l] ⊙ σ_l' + H[l] ⊙ dS[l] ⊙ σ_l''
    gradient by W[l]: Z[l-1]ᵀ D[l] + dZ[l-1]ᵀ E[l]        gradient by b[l]: Σ_rows D[l]
    G[l-1] = D[l] W[l]ᵀ + E[l] dW[l]ᵀ                     H[l-1] = E[l] W[l]ᵀ
        l = L … 1

A learned parameter a of σ_l that changes by da adds ∂σ/∂a da to dZ and H ⊙ ∂²σ/∂s∂a da to D; its
gradient is Σ G ⊙ ∂σ/∂a + H ⊙ (∂²σ/∂s∂a dS + ∂²σ/∂a² da).

The second block is also the differential of the backward pass: there H is ∂J/∂Z, E is ∂J/∂S, G and
D are the changes of these two along (dW, db), and the gradient is the product of the Hessian and
that direction. Letters as in `backprop.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mlpcore.core import formulas
from mlpcore.core.activation import Activation
from mlpcore.core.activations import resolve
from mlpcore.core.backprop import Arrays
from mlpcore.core.ops import Array, Ops

IDENTITY = resolve("identity")


def forward(
    ops: Ops, W: Arrays, b: Arrays, activations: Sequence[Any], S: Arrays, Z: Arrays,
    dW: Arrays | None, db: Arrays | None, dS: Arrays, dZ: Arrays, da: Arrays | None = None,
) -> None:  # fmt: skip
    """Fill S, Z from Z[0], and dS, dZ from dZ[0], dW, db, da.

    If dZ[0] is None, X does not change; if dW is None, the parameters do not.
    """
    for l in range(1, len(W)):
        ops.layer(Z[l - 1], W[l], b[l], activations[l], S[l], Z[l])
        moved = dZ[l - 1] is not None
        if moved:
            ops.gemm(dZ[l - 1], W[l], dS[l])
        if dW is not None and db is not None:
            ops.gemm(Z[l - 1], dW[l], dS[l], moved)
            ops.bias_activation(dS[l], db[l], IDENTITY, dS[l])
        if activations[l].logarithmic:  # the Jacobian is not its own transpose
            dZ[l][...] = dS[l] - (ops.xp.exp(Z[l]) * dS[l]).sum(axis=1, keepdims=True)
        else:
            ops.activation_gradient(dS[l], S[l], Z[l], activations[l], dZ[l], None)
        if da is not None and da[l] is not None:
            dZ[l][...] += _product(
                ops, da[l], S[l], Z[l], activations[l], activations[l].by_parameter
            )


def backward(
    ops: Ops, W: Arrays, activations: Sequence[Any], S: Arrays, Z: Arrays, dS: Arrays, dZ: Arrays,
    G: Arrays, H: Arrays, D: Arrays, E: Arrays, gW: Arrays, gb: Arrays, repeats: Sequence[bool],
    dW: Arrays | None = None, accumulate: bool = False,
    ga: Arrays | None = None, da: Arrays | None = None,
) -> None:  # fmt: skip
    """Fill D, E, the gradient gW, gb, ga (or add to it) and G[l], H[l] for l < L.

    They come from G[L] and H[L]; dS is overwritten. If G[L] is None, D[L] and E[L] are already
    set; if G[0] is None, it is skipped, and H[0] always is.
    """
    for l in range(len(W) - 1, 0, -1):
        more, bend = accumulate or repeats[l], None
        if ga is not None and ga[l] is not None:
            along = None if da is None else da[l]
            bend = _by_parameter(
                ops, activations[l], S[l], Z[l], dS[l], G[l], H[l], along, ga[l], accumulate
            )
        if G[l] is None:
            ops.activation_gradient(D[l], D[l], D[l], IDENTITY, D[l], gb[l], accumulate)
        else:
            ops.activation_gradient(H[l], S[l], Z[l], activations[l], E[l], None)
            if activations[l].curvature == "0" and not activations[l].rowwise:
                ops.activation_gradient(G[l], S[l], Z[l], activations[l], D[l], gb[l], accumulate)
            else:
                ops.curvature(
                    G[l], H[l], dS[l], S[l], Z[l], activations[l], D[l], gb[l], accumulate
                )
        if bend is not None:
            D[l][...] += bend
            if gb[l] is not None:
                gb[l][...] += bend.sum(axis=0)
        ops.gemm(Z[l - 1].T, D[l], gW[l], more)
        if dZ[l - 1] is not None:
            ops.gemm(dZ[l - 1].T, E[l], gW[l], True)
        if G[l - 1] is not None:
            ops.gemm(D[l], W[l].T, G[l - 1])
            if dW is not None:
                ops.gemm(E[l], dW[l].T, G[l - 1], True)
        if l > 1:
            ops.gemm(E[l], W[l].T, H[l - 1])


def _by_parameter(
    ops: Ops, sigma: Activation, S: Array, Z: Array, dS: Array, G: Array, H: Array,
    da: Array | None, ga: Array, accumulate: bool,
) -> Array | None:  # fmt: skip
    """Fill the gradient ga of a learned parameter, or add to it.

    Returns the term that a change da of the parameter adds to D, or None.
    """
    mixed, twice = _second_slopes(sigma)
    total = _product(ops, G, S, Z, sigma, sigma.by_parameter)
    across = _product(ops, H, S, Z, sigma, mixed)
    total += across * dS
    if da is not None:
        total += _product(ops, H, S, Z, sigma, twice) * da
    ga[...] = (total.sum(axis=0) if ga.size == Z.shape[1] else total.sum()) + (
        ga if accumulate else 0
    )
    return None if da is None else across * da


def _product(ops: Ops, x: Array, S: Array, Z: Array, sigma: Activation, formula: str) -> Array:
    """Return x ⊙ a formula of an activation, (m, n_l), in newly allocated memory."""
    product = ops.xp.empty_like(Z)
    product[...] = x
    ops.activation_gradient(product, S, Z, sigma.sloped(formula), product, None)
    return product


@functools.cache
def _second_slopes(sigma: Activation) -> tuple[str, str]:
    """Return ∂²σ/∂s∂a and ∂²σ/∂a², formulas in s and a."""
    mixed, twice = (formulas.differentiate(sigma.by_parameter, {by: "1"}) for by in "sa")
    return mixed, twice


def softmax_curvature(G: Array, H: Array, T: Array, P: Array, logarithmic: bool) -> None:
    """Set T to the vector whose product with the slope of a softmax is the curvature.

    That is D = ∂/∂S of ⟨H, the output's differential along T⟩ + ⟨G, Z⟩; P are probabilities.

    softmax: T = G + H ⊙ (T - Σ P T) - T Σ H P, from ⟨H, P ⊙ (T - Σ P T)⟩.
    log_softmax: T = G - P ⊙ (T - Σ P T) Σ H, from ⟨H, T - Σ P T⟩.
    """
    centred = T - (P * T).sum(axis=1, keepdims=True)
    if logarithmic:
        T[...] = G - P * centred * H.sum(axis=1, keepdims=True)
    else:
        T[...] = G + H * centred - T * (H * P).sum(axis=1, keepdims=True)
