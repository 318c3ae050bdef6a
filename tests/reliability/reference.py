"""Training steps as docs/derivation.md writes them down, in NumPy and float64, without chunks,
plans or formula sheets.
"""

from __future__ import annotations

import numpy as np

from mlpcore.core.dropout import GOLDEN, layer_key, mix

SIGMA = {  # σ(s), and σ' from s and z
    "identity": (lambda s: s, lambda s, z: np.ones_like(s)),
    "sigmoid": (lambda s: 1 / (1 + np.exp(-s)), lambda s, z: z * (1 - z)),
    "tanh": (np.tanh, lambda s, z: 1 - z**2),
    "relu": (lambda s: np.where(s > 0, s, 0.0), lambda s, z: (s > 0) * 1.0),
    "leaky_relu": (lambda s: np.where(s > 0, s, 0.01 * s), lambda s, z: np.where(s > 0, 1, 0.01)),
    "softplus": (lambda s: np.logaddexp(s, 0), lambda s, z: 1 / (1 + np.exp(-s))),
    "silu": (lambda s: s / (1 + np.exp(-s)), lambda s, z: (1 + z * np.exp(-s)) / (1 + np.exp(-s))),
    "exp": (np.exp, lambda s, z: z),
    "softmax": (lambda s: np.exp(s) / np.exp(s).sum(axis=1, keepdims=True), None),
}
LOSS = {  # ℓ of a row, and ∂ℓ/∂z
    "squared_error": (lambda z, y: 0.5 * (z - y) ** 2, lambda z, y: z - y),
    "log_cosh": (lambda z, y: np.log(np.cosh(z - y)), lambda z, y: np.tanh(z - y)),
    "huber": (
        lambda z, y: np.where(abs(z - y) < 1, 0.5 * (z - y) ** 2, abs(z - y) - 0.5), lambda z,
        y: np.clip(z - y, -1, 1)
    ),
    "binary_cross_entropy": (
        lambda z, y: -y * np.log(z) - (1 - y) * np.log(1 - z), lambda z, y: (z - y) / (z * (1 - z))
    ),
    "poisson": (lambda z, y: z - y * np.log(z), lambda z, y: 1 - y / z),
    "cross_entropy": (lambda z, y: -y * np.log(z), None),
}  # fmt: skip


def forward(W, b, names, X, kept):
    """S and Z of every layer, index 0 the input; `kept[l]` masks Z[l] (dropout), or is None."""
    S, Z = [None], [np.asarray(X, np.float64)]
    for l in range(1, len(W)):
        S.append(Z[-1] @ W[l] + (0 if b[l] is None else b[l]))
        z = SIGMA[names[l]][0](S[l])
        Z.append(z if kept[l] is None else z * kept[l])
    return S, Z


def gradient(W, b, names, loss, X, Y, w, kept):
    """J, and ∂J/∂W[l], ∂J/∂b[l] of every layer."""
    S, Z = forward(W, b, names, X, kept)
    k = (w / w.sum())[:, None]
    J = float((k * LOSS[loss][0](Z[-1], Y)).sum())
    L = len(W) - 1
    dW, db = [None] * (L + 1), [None] * (L + 1)
    D = (
        k * (Z[L] - Y)
        if names[L] == "softmax"
        else k * LOSS[loss][1](Z[L], Y) * SIGMA[names[L]][1](S[L], Z[L])
    )
    for l in range(L, 0, -1):
        dW[l], db[l] = Z[l - 1].T @ D, None if b[l] is None else D.sum(axis=0)
        if l > 1:
            G = D @ W[l].T
            G = G if kept[l - 1] is None else G * kept[l - 1]
            D = G * SIGMA[names[l - 1]][1](S[l - 1], SIGMA[names[l - 1]][0](S[l - 1]))
    return J, dW, db


def masks(rate, seed, step, rows, sizes):
    """Return the factors of dropout in a step: 0 or 1 / (1 - rate), for each hidden layer."""
    kept = [None] * len(sizes)
    for l in range(1, len(sizes) - 1) if rate else ():
        base = mix(layer_key(seed, l) + step)
        x = [
            [mix(base + i) ^ mix(mix(base + GOLDEN) + j) for j in range(sizes[l])]
            for i in range(rows)
        ]
        kept[l] = (np.array([[_draw(n) for n in row] for row in x]) >= rate) / (1 - rate)
    return kept


def _draw(x):
    """The number in [0, 1) of 32 mixed bits, without the last shift of `mix`."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor % 2**32
    return x / 2**32


def update(rule, settings, rate, t, p, g, state, decayed):
    """One update of the flat vector p in place; `decayed` is 1 where weights decay, else 0."""
    m, v = state.setdefault("m", np.zeros_like(p)), state.setdefault("v", np.zeros_like(p))
    decay = rate * settings.get("weight_decay", 0) * decayed
    if rule == "SGD":
        mu = settings.get("momentum", 0)
        v[...] = mu * v - rate * g
        p += mu * v - rate * g if settings.get("nesterov") else v
    elif rule == "RMSprop":
        v[...] = 0.99 * v + 0.01 * g**2
        p -= rate * g / (np.sqrt(v) + 1e-8)
    elif rule == "Lion":
        c = 0.9 * m + 0.1 * g
        m[...] = 0.99 * m + 0.01 * g
        p -= rate * np.sign(c) + decay * p
    else:
        m[...], v[...] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p -= rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * p
