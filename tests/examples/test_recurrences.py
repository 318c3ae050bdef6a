"""examples/recurrences.py: the path sums are derivatives, and the engine's arrays are the path
sums.
"""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

example = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "examples" / "recurrences.py"))
)
SIZES, L = example.SIZES, example.L


def activation(l, s):
    """σ_l(s), written otherwise than in the example."""
    half = 0.5 + 0.5 * math.tanh(s / 2)
    return [
        None,
        (math.exp(2 * s) - 1) / (math.exp(2 * s) + 1),
        0.5 + 0.5 * math.tanh(s),
        s * half,
        math.exp(s),
    ][l]


def J_from(l, rows, y, w, before_activation=False):
    """J as a function of the outputs of layer l (or of its pre-activations), the later layers
    following.
    """
    total = 0.0
    for i, start in enumerate(rows):
        z = [activation(l, s) for s in start] if before_activation else start
        for k in range(l + 1, L + 1):
            s = [math.fsum(z[p] * w[k][p][q] for p in range(SIZES[k - 1])) for q in range(SIZES[k])]
            z = [activation(k, number) for number in s]
        total += math.fsum((z[r] - y[i][r]) ** 2 for r in range(SIZES[L]))
    return total / (2 * len(rows))


def differences(f, table, h=1e-5):
    """The central difference of f() by every number of a list of lists."""
    result = []
    for line in table:
        slopes = []
        for j, here in enumerate(line):
            line[j] = here + h
            above = f()
            line[j] = here - h
            below = f()
            line[j] = here
            slopes.append((above - below) / (2 * h))
        result.append(slopes)
    return np.array(result)


@pytest.fixture(scope="module")
def problem():
    net, X, Y = example.problem(rows=3, seed=11)
    w = [None] + [net.W[l].tolist() for l in range(1, L + 1)]
    return net, X, Y, w, example.scalar_derivation(X.tolist(), Y.tolist(), w)


@pytest.mark.parametrize("l", range(L + 1))
def test_the_path_sum_is_the_derivative_by_the_outputs_of_a_layer(problem, l):
    _, _, Y, w, (Z, G, _, _) = problem
    z, y = [list(row) for row in Z[l]], Y.tolist()
    np.testing.assert_allclose(
        G[l], differences(lambda: J_from(l, z, y, w), z), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("l", range(1, L + 1))
def test_D_is_the_derivative_by_the_pre_activations(problem, l):
    _, X, Y, w, (_, _, D, _) = problem
    y = Y.tolist()
    s = [example.forward_row(x, w)[0][l] for x in X.tolist()]
    by_s = differences(lambda: J_from(l, s, y, w, before_activation=True), s)
    np.testing.assert_allclose(D[l], by_s, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("l", range(1, L + 1))
def test_dW_is_the_derivative_by_the_weights(problem, l):
    _, X, Y, w, (_, _, _, dW) = problem
    x, y = X.tolist(), Y.tolist()
    np.testing.assert_allclose(
        dW[l], differences(lambda: J_from(0, x, y, w), w[l]), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_every_array_of_the_engine_equals_the_scalars(rows):
    table = example.table(*example.problem(rows, seed=12))
    expected = {f"{letter}[{l}]" for letter in ("Z", "G", "D", "dW") for l in range(1, L + 1)} | {
        "G[0]"
    }
    assert {name for name, *_ in table} == expected
    for _name, _, size, difference, _ in table:
        assert size > 1e-3
        assert difference < 1e-13 * max(1, size)


@pytest.mark.parametrize("l", [1, 2, 3, 4])
def test_a_slope_taken_at_the_output_instead_of_the_pre_activation_shows_from_its_layer_down(
    monkeypatch, l
):
    value, slope = example.VALUE[l], example.SLOPE[l]
    monkeypatch.setitem(example.SLOPE, l, lambda s: slope(value(s)))
    difference = {name: row for name, _, _, row, _ in example.table(*example.problem())}
    for k in range(1, L + 1):
        assert (difference[f"dW[{k}]"] > 1e-3) == (k <= l)
        assert difference[f"Z[{k}]"] < 1e-13


def test_the_printed_number_of_paths_is_the_number_of_paths():
    paths = {name: count for name, *_, count in example.table(*example.problem(rows=1)) if count}
    ones = [None] + [[[1.0] * SIZES[l]] * SIZES[l - 1] for l in range(1, L + 1)]
    z = [1.0] * SIZES[0]
    s = [None]
    for l in range(1, L + 1):  # pre-activations at which every slope can be divided out
        s.append([0.3] * SIZES[l])
    for l in range(L + 1):
        through = math.prod(example.SLOPE[k](0.3) for k in range(l + 1, L + 1))
        counted = example.by_paths(l, 0, ones, s, z) / through
        assert counted == pytest.approx(paths[f"G[{l}]"], rel=1e-12)
