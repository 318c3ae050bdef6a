"""examples/shape_trick.py: the list of products is complete, and only the recurrence is right."""

import runpy
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

example = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "examples" / "shape_trick.py"))
)
DW, G_BEFORE = "Zᵀ·(G ⊙ σ')", "(G ⊙ σ')·Wᵀ"


def every_value(sequence):
    """Return the values of a sequence of matrices, for all brackets and either product."""
    if len(sequence) == 1:
        yield sequence[0]
    for cut in range(1, len(sequence)):
        for A, B in product(list(every_value(sequence[:cut])), list(every_value(sequence[cut:]))):
            if A.shape[1] == B.shape[0]:
                yield A @ B
            if A.shape == B.shape:
                yield A * B


def as_keys(matrices):
    return [(A.shape, A.tobytes()) for A in map(np.ascontiguousarray, matrices)]


@pytest.mark.parametrize(("m", "n_before", "n"), [(7, 5, 4), (3, 2, 3), (2, 3, 3), (3, 3, 3)])
def test_the_list_holds_every_product_once(m, n_before, n):
    rng = np.random.default_rng(5)  # whole numbers: equal expressions are equal to the bit
    shapes = {"G": (m, n), "σ'": (m, n), "W": (n_before, n), "Z": (m, n_before)}
    factors = {name: rng.integers(2, 100, shape) for name, shape in shapes.items()}
    brute = set()
    for count in (2, 3, 4):
        for chosen in permutations(factors.values(), count):
            for matrices in product(*((A, A.T) for A in chosen)):
                brute.update(as_keys(every_value(list(matrices))))
    listed = as_keys(example.products(factors).values())
    assert set(listed) == brute
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(
    ("m", "n_before", "n"), [(7, 5, 4), (6, 3, 5), (5, 5, 5), (4, 5, 4), (1, 3, 2)]
)
def test_the_recurrence_is_right_and_nothing_else_is(m, n_before, n):
    tables, _ = example.candidates(m, n_before, n)
    for errors, right in zip(tables, (DW, G_BEFORE), strict=True):
        assert [example.text(x) for x, error in errors.items() if error < 1e-7] == [right]
        assert sorted(errors.values())[1] > 0.01  # no candidate is nearly right


def test_with_sizes_that_differ_several_products_fit_but_one_of_exactly_the_three_factors():
    tables, count = example.candidates(7, 5, 4)
    for errors, outer, right in zip(tables, "ZW", (DW, G_BEFORE), strict=True):
        assert 1 < len(errors) < count / 5
        assert [example.text(x) for x in errors if example.names(x) == {"G", "σ'", outer}] == [
            right
        ]


def test_with_equal_sizes_every_product_fits_and_order_and_transposes_are_free():
    tables, count = example.candidates(4, 4, 4)
    for errors, outer, right in zip(tables, "ZW", (DW, G_BEFORE), strict=True):
        assert len(errors) == count > 1000
        alike = {example.text(x) for x in example.same_form(errors, outer)}
        marks = list(product(("", "ᵀ"), repeat=3))
        expected = {f"{outer}{t}·(G{u} ⊙ σ'{v})" for t, u, v in marks} | {
            f"(G{u} ⊙ σ'{v})·{outer}{t}" for t, u, v in marks
        }
        assert alike == expected
        assert right in alike


def test_a_batch_as_large_as_the_layer_is_wide_lets_the_transposed_D_in():
    transposed = "Zᵀ·(Gᵀ ⊙ σ'ᵀ)"
    for m, fits in ((4, True), (7, False)):
        errors = {example.text(x): error for x, error in example.candidates(m, 5, 4)[0][0].items()}
        assert (transposed in errors) == fits
        assert errors.get(transposed, 1) > 0.1


def test_the_central_differences_are_the_derivatives_of_the_loss():
    net, X, Y, _ = example.problem(6, 3, 5, seed=9)
    W, V = net.W[1].copy(), net.W[2].copy()
    by_W, by_X = example.differences(net, X, Y)
    np.testing.assert_array_equal(net.W[1], W)

    def slope(at, variable, h=1e-30):  # complex step: no cancellation
        moved = {"W": W.astype(complex), "X": X.astype(complex)}
        moved[variable][at] += 1j * h
        return (((np.tanh(moved["X"] @ moved["W"]) @ V - Y) ** 2).sum() / (2 * len(X))).imag / h

    for variable, found in (("W", by_W), ("X", by_X)):
        exact = np.array([slope(at, variable) for at in np.ndindex(found.shape)]).reshape(
            found.shape
        )
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-9)
