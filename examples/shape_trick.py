"""The limits of a trick: differentiate as with scalars, then make the shapes match.

With one row and one unit per layer all letters are numbers, and the chain rule gives, without
regard to order,

    dw = g σ' z          (and for the layer before  g_before = g σ' w)

For matrices G, σ' (m, n_l), Z[l-1] (m, n_{l-1}), W[l] (n_{l-1}, n_l) the trick says: put the
factors into any order, with transposes, that gives the right shape. Here all candidates are listed:
every expression that uses each of G, σ', W, Z at most once, transposed or not, with matrix products
· and elementwise products ⊙, in every order and with every placing of brackets. (Brackets within a
chain of equal products change nothing and are counted once; so are A ⊙ B and B ⊙ A, and
(A·B)ᵀ = Bᵀ·Aᵀ.) Those whose shape fits are compared with central differences of J. The right ones
are

    dW[l] = Zᵀ·(G ⊙ σ')          G[l-1] = (G ⊙ σ')·Wᵀ

The layers after l-1 form a net with input Z[l-1]. Therefore l = 1 stands for every layer, with
Z[l-1] = X.
"""

import argparse
from itertools import combinations, product

import numpy as np

import mlpcore as mc

STEP = 1e-5
RIGHT = 1e-7  # central differences resolve about 1e-10


def chain(sign, left, right):
    """Return `left sign right` as (sign, part, …), flat within equal signs; leaves are strings."""
    parts = [p for x in (left, right) for p in (x[1:] if x[0] == sign else (x,))]
    return (sign, *(sorted(parts, key=text) if sign == "⊙" else parts))


def text(expression):
    """Return an expression as text, such as `Zᵀ·(G ⊙ σ')`."""
    if isinstance(expression, str):
        return expression
    parts = [text(p) if isinstance(p, str) else f"({text(p)})" for p in expression[1:]]
    return {"·": "·", "⊙": " ⊙ "}[expression[0]].join(parts)


def products(factors):
    """Return {expression: value} of every product of two or more `factors`, {name: matrix}."""
    known = {}  # keyed by the set of names used
    for size in range(1, len(factors) + 1):
        for used in map(frozenset, combinations(factors, size)):
            found = known[used] = {
                x + t: A
                for x in used
                if size == 1
                for t, A in (("", factors[x]), ("ᵀ", factors[x].T))
            }
            for left in (frozenset(part) for k in range(1, size) for part in combinations(used, k)):
                for (x, A), (y, B) in product(known[left].items(), known[used - left].items()):
                    if A.shape[1] == B.shape[0]:
                        found[chain("·", x, y)] = A @ B
                    if A.shape == B.shape:
                        found[chain("⊙", x, y)] = A * B
    return {x: A for found in known.values() for x, A in found.items() if not isinstance(x, str)}


def problem(m, n_before, n, seed=0):
    """Return a tanh layer n_before -> n with an identity layer after it, X, Y and the factors."""
    rng = np.random.default_rng(seed)
    net = mc.MLP([n_before, n, 2], activations="tanh", dtype="float64", bias=False)
    net.parameters[...] = 0.7 * rng.standard_normal(net.parameters.size)
    X, Y = rng.standard_normal((m, n_before)), rng.standard_normal((m, 2))
    cache = net.forward(X)
    _, G_out = mc.loss("squared_error")(cache.output, Y)
    G = net.backward(cache, G_out, keep=True).G[1]
    return net, X, Y, {"G": G, "σ'": 1 - cache.Z[1] ** 2, "W": net.W[1].copy(), "Z": X}


def differences(net, X, Y):
    """Return ∂J/∂W[1] and ∂J/∂X by central differences, one entry at a time."""
    X, results = X.copy(), []
    for variable in (net.W[1], X):
        slope = np.empty_like(variable)
        for at in np.ndindex(variable.shape):
            here, J = variable[at], []
            for h in (STEP, -STEP):
                variable[at] = here + h
                J.append(mc.loss("squared_error")(net.forward(X).output, Y)[0])
            variable[at] = here
            slope[at] = (J[0] - J[1]) / (2 * STEP)
        results.append(slope)
    return results


def relative_error(A, B):
    """Return the largest difference over the largest entry of either matrix."""
    return np.abs(A - B).max() / max(np.abs(A).max(), np.abs(B).max())


def candidates(m, n_before, n):
    """Return {expression: relative error} of the fitting products for both goals, and a count.

    The goals are dW[l] and G[l-1]. The count is of all products.
    """
    net, X, Y, factors = problem(m, n_before, n)
    every = products(factors)
    true = differences(net, X, Y)
    return [
        {x: relative_error(A, T) for x, A in every.items() if A.shape == T.shape} for T in true
    ], len(every)


def verdict(error):
    """Return "right" if the error is within the accuracy of a central difference."""
    return "right" if error < RIGHT else "wrong"


def names(expression):
    """Return the factors that an expression uses, without transposes."""
    return (
        {expression.rstrip("ᵀ")}
        if isinstance(expression, str)
        else set().union(*map(names, expression[1:]))
    )


def same_form(errors, outer):
    """Return the expressions that equal the right one up to order and transposes."""
    forms = f"{outer}·(G ⊙ σ')", f"(G ⊙ σ')·{outer}"
    return {x: error for x, error in errors.items() if text(x).replace("ᵀ", "") in forms}


def print_table(errors):
    """Print one line per expression, the right ones first."""
    for x, error in sorted(errors.items(), key=lambda row: row[1] > RIGHT):
        print(f"   {text(x):<22} {verdict(error):<8} {error:.1e}")


def print_counts(goal, errors, outer):
    """Print the counts of products that fit, with any factors and the right ones, and are right."""
    three = [x for x in errors if names(x) == {"G", "σ'", outer}]
    right = [text(x) for x, error in errors.items() if error < RIGHT]
    nearest = min(error for error in errors.values() if error > RIGHT)
    print(
        f"   {goal}: {len(errors):,} fit, of which {len(three)} use exactly G, σ', {outer};",
        end=" ",
    )
    print(f"right: {len(right)}, {right[0]}; the nearest wrong one is off by {nearest:.0%}")


def main():
    """Print the tables and counts."""
    goals = ("dW[l]", "Z"), ("G[l-1]", "W")
    tables, count = candidates(7, 5, 4)
    print(
        f"A. All sizes different: m = 7 rows, n_{{l-1}} = 5, n_l = 4. {count} products of G, σ', "
        "W, Z exist."
    )
    for (goal, outer), errors in zip(goals, tables, strict=True):
        print(f"\n   {'fits ' + goal:<22} verdict  relative error")
        print_table(errors)
        print_counts(goal, errors, outer)
    tables, count = candidates(4, 4, 4)
    print(
        f"\nB. m = n_{{l-1}} = n_l = 4: all matrices are square. {count:,} products exist, and "
        "every one fits.\n"
    )
    for (goal, outer), errors in zip(goals, tables, strict=True):
        print_counts(goal, errors, outer)
    for (goal, outer), errors in zip(goals, tables, strict=True):
        print(
            f"\n   {'like ' + goal:<22} verdict  relative error (the right one up to order and "
            "transposes)"
        )
        print_table(same_form(errors, outer))
    print("""
If the sizes differ and the three factors are known, the shape leaves one way to combine them,
and it is right. Leave out or add a factor, and others fit as well. With equal sizes the shape
decides nothing: only numbers do.""")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=".", help="unused: this example draws no picture")
    parser.parse_args()
    main()
