"""examples/linear_regression.py: the one-layer net is least squares."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

example = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "examples" / "linear_regression.py"))
)


def residual_gradient(X, y, theta):
    """(1/m) Σ_i x_ik (Σ_j x_ij θ_j - y_i), a number at a time."""
    m, n = X.shape
    residual = [math.fsum(X[i, j] * theta[j] for j in range(n)) - y[i] for i in range(m)]
    return np.array([math.fsum(X[i, k] * residual[i] for i in range(m)) / m for k in range(n)])


def some_data(m=37, n=5, seed=3):
    rng = np.random.default_rng(seed)
    X = np.column_stack([np.ones(m), rng.standard_normal((m, n - 1))])
    return X, rng.standard_normal(m), rng.standard_normal(n)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m", [1, 2, 37])
def test_backward_of_one_identity_layer_is_Xt_times_residual_over_m(m, bias):
    X, y, theta = some_data(m)
    np.testing.assert_allclose(
        example.gradient(X, y, theta, bias), residual_gradient(X, y, theta), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("bias", [False, True])
def test_a_step_at_rate_1_subtracts_that_gradient(bias):
    X, y, theta = some_data()
    np.testing.assert_allclose(
        example.step_change(X, y, theta, bias), residual_gradient(X, y, theta), rtol=1e-11
    )


def test_the_gradient_is_zero_at_the_solution_of_the_normal_equations_and_nowhere_near():
    X, y, _ = some_data()
    solution = np.linalg.solve(X.T @ X, X.T @ y)
    assert np.abs(example.gradient(X, y, solution, bias=True)).max() < 1e-14
    assert np.abs(example.gradient(X, y, solution + 0.01, bias=True)).max() > 1e-3


def test_whole_batches_close_in_on_the_solution_at_the_rate_that_the_eigenvalues_promise():
    X, y = example.data(noise=0.5, seed=7)
    solution = np.linalg.solve(X.T @ X, X.T @ y)
    condition = np.linalg.cond(X.T @ X)
    shrinks = (condition - 1) / (condition + 1)
    for bias in (False, True):
        for steps in (10, 100, 300):
            distance = np.linalg.norm(
                example.trained(X, y, example.best_rate(X), len(X), steps, bias) - solution
            )
            assert distance <= shrinks**steps * np.linalg.norm(solution) * (1 + 1e-9)
        found = example.trained(X, y, example.best_rate(X), len(X), 1500, bias)
        np.testing.assert_allclose(found, solution, rtol=1e-12)


def test_a_rate_beyond_2_over_the_largest_eigenvalue_leads_away_and_one_below_it_does_not():
    X, y = example.data(noise=0.5, seed=7)
    solution = np.linalg.solve(X.T @ X, X.T @ y)
    limit = 2 / np.linalg.eigvalsh(X.T @ X / len(X))[-1]
    far, near = (
        np.linalg.norm(example.trained(X, y, f * limit, len(X), 200) - solution)
        for f in (1.05, 0.95)
    )
    assert far > np.linalg.norm(solution) > near


def test_mini_batches_hover_at_a_constant_rate_close_in_at_a_falling_one_and_arrive_where_a_line_fits_exactly():  # noqa: E501
    def distance(noise, rate):
        X, y = example.data(noise, seed=7)
        return np.abs(
            example.trained(X, y, rate, 20, 400) - np.linalg.solve(X.T @ X, X.T @ y)
        ).max()

    hovering, closing, arriving = (
        distance(0.3, 0.1),
        distance(0.3, example.mc.Cosine(0.1)),
        distance(0.0, 0.1),
    )
    assert hovering > 3e-3
    assert closing < hovering / 5
    assert arriving < 1e-10
