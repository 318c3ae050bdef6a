"""The recurrences of a 5-4-4-3-2 net without biases, entry by entry against plain scalar calculus.

    Z[0] = X                          D[l]   = G[l] ⊙ σ_l'(S[l])
    S[l] = Z[l-1] W[l]                dW[l]  = Z[l-1]ᵀ D[l]
    Z[l] = σ_l(S[l])                  G[l-1] = D[l] W[l]ᵀ

The other side uses no matrix and no recurrence, only the chain rule by paths. A unit's output z
affects J along every path of units j → p → … → r from it to the output layer, and each path
contributes the product of its factors:

    ∂J/∂z[l]_j = Σ_paths  (w[l+1]_jp σ'(s[l+1]_p)) (w[l+2]_pq σ'(s[l+2]_q)) …  ∂J/∂z[L]_r

A weight w[l]_kj occurs once in every row: ∂J/∂w = Σ_rows z[l-1]_k σ'(s[l]_j) ∂J/∂z[l]_j. All of
this uses single Python floats; the slopes are the textbook ones in s (the library writes them in z
if possible). The number of paths multiplies from layer to layer; the recurrence gets the same sums
by adding up each layer once. That is the saving of backpropagation.
"""

import argparse
import itertools
import math

import numpy as np

import mlpcore as mc

SIZES = [5, 4, 4, 3, 2]
ACTIVATIONS = ["tanh", ("sigmoid", 2.0), "silu", "exp"]
L = len(ACTIVATIONS)


def logistic(s):
    """Return 1 / (1 + exp(-s)) of one number."""
    return 1 / (1 + math.exp(-s))


# σ_l and σ_l' of one number s, by layer
VALUE = {1: math.tanh, 2: lambda s: logistic(2 * s), 3: lambda s: s * logistic(s), 4: math.exp}
SLOPE = {
    1: lambda s: 1 / math.cosh(s) ** 2,
    2: lambda s: 2 * math.exp(-2 * s) / (1 + math.exp(-2 * s)) ** 2,
    3: lambda s: logistic(s) + s * math.exp(-s) / (1 + math.exp(-s)) ** 2,
    4: math.exp,
}


def forward_row(x, w):
    """Return s[l][j] and z[l][j] of one row x."""
    s, z = [None], [x]
    for l in range(1, L + 1):
        s.append(
            [sum(z[l - 1][k] * w[l][k][j] for k in range(SIZES[l - 1])) for j in range(SIZES[l])]
        )
        z.append([VALUE[l](number) for number in s[l]])
    return s, z


def by_paths(l, j, w, s, dJ_dz):
    """Return ∂J/∂z[l]_j of one row: the sum over all paths from unit j of layer l to an output."""
    total = 0.0
    for units in itertools.product(*(range(n) for n in SIZES[l + 1 :])):
        path = (j, *units)
        contribution = dJ_dz[path[-1]]
        for i, k in enumerate(range(l + 1, L + 1)):
            contribution *= w[k][path[i]][path[i + 1]] * SLOPE[k](s[k][path[i + 1]])
        total += contribution
    return total


def scalar_derivation(x, y, w):
    """Return Z, G, D (index: layer, row, unit) and dW (layer, input unit, unit) as nested lists."""
    m = len(x)
    Z = [[] for _ in range(L + 1)]
    G, D = [[] for _ in range(L + 1)], [[] for _ in range(L + 1)]
    dW = [None] + [[[0.0] * SIZES[l] for _ in range(SIZES[l - 1])] for l in range(1, L + 1)]
    for i in range(m):
        s, z = forward_row(x[i], w)
        # J = 1/(2m) Σ_rows Σ_r (z_r - y_r)²
        dJ_dz = [(z[L][r] - y[i][r]) / m for r in range(SIZES[L])]
        for l in range(L + 1):
            Z[l].append(z[l])
            G[l].append([by_paths(l, j, w, s, dJ_dz) for j in range(SIZES[l])])
            if l > 0:
                D[l].append([SLOPE[l](s[l][j]) * G[l][i][j] for j in range(SIZES[l])])
                for k in range(SIZES[l - 1]):
                    for j in range(SIZES[l]):
                        dW[l][k][j] += z[l - 1][k] * D[l][i][j]
    return Z, G, D, dW


def problem(rows=6, seed=0):
    """Return the net with weights of moderate size, X (m, 5) and Y (m, 2)."""
    rng = np.random.default_rng(seed)
    net = mc.MLP(SIZES, ACTIVATIONS[:-1], ACTIVATIONS[-1], bias=False, dtype="float64")
    net.parameters[...] = 0.7 * rng.standard_normal(net.parameters.size)
    return net, rng.standard_normal((rows, SIZES[0])), rng.standard_normal((rows, SIZES[-1]))


def table(net, X, Y):
    """Return (name, shape, largest entry, largest difference, paths per unit or None) per array."""
    cache = net.forward(X)
    _, G = mc.loss("squared_error")(cache.output, Y)
    grad = net.backward(cache, G, input_gradient=True, keep=True)
    w = [None] + [net.W[l].tolist() for l in range(1, L + 1)]
    z, g, d, dw = scalar_derivation(X.tolist(), Y.tolist(), w)
    pairs = [(f"Z[{l}]", cache.Z[l], z[l], None) for l in range(1, L + 1)]
    for l in range(L, 0, -1):
        pairs.append((f"G[{l}]", grad.G[l], g[l], math.prod(SIZES[l + 1 :])))
        pairs += [(f"D[{l}]", grad.D[l], d[l], None), (f"dW[{l}]", grad.W[l], dw[l], None)]
    pairs.append(("G[0]", grad.X, g[0], math.prod(SIZES[1:])))
    return [
        (name, A.shape, np.abs(A).max(), np.abs(A - np.array(B)).max(), paths)
        for name, A, B, paths in pairs
    ]


def main():
    """Print the table."""
    net, X, Y = problem()
    print(
        f"{'-'.join(map(str, SIZES))} net, no biases; {', '.join(map(str, ACTIVATIONS))}; {len(X)} "
        "rows\n"
    )
    print("        shape    largest entry   engine - scalars   paths from each unit")
    rows = table(net, X, Y)
    for name, shape, size, difference, paths in rows:
        print(
            f"{name:<6} {shape[0]:>3} x {shape[1]:<3} {size:12.6f} {difference:16.1e} "
            f"{paths or '':>16}"
        )
    print(f"\nlargest difference of all: {max(row[3] for row in rows):.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=".", help="unused: this example draws no picture")
    parser.parse_args()
    main()
