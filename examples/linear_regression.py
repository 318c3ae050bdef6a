"""Linear regression as a network of one layer.

One identity layer without bias, Z = Xθ, and squared error, J = 1/(2m) Σ_i (x_i θ - y_i)². The
recurrence has a single step:

    G = ∂J/∂Z = (Xθ - y) / m          D = G ⊙ 1          dθ = Xᵀ D = (1/m) Xᵀ (Xθ - y)

The intercept is the weight of a column of ones: X = [1 | features] and `bias=False`. Or it is `b`,
whose gradient Σ_rows D is the same, since 1ᵀ D is the sum over rows. J is convex; its gradient is
zero where XᵀX θ = Xᵀy, and that θ* is what np.linalg.lstsq computes.

Whole batches at a constant rate converge to θ*: with rate 2 / (λ_min + λ_max), λ the eigenvalues of
XᵀX/m, every step shrinks the distance by at least (κ - 1) / (κ + 1), κ = λ_max / λ_min. Each
mini-batch has its own θ*. So at a constant rate the weights keep moving around θ*; with a falling
rate they converge; and if a line fits all rows exactly, all mini-batches share θ* and a constant
rate converges, too.
"""

import argparse

import numpy as np

import mlpcore as mc

ROWS, FEATURES = 200, 3


def data(noise, seed=0):
    """Return X (m, 1 + features) with a column of ones, and y (m,)."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((ROWS, FEATURES)) * [1.0, 0.5, 2.0] + [0.0, 1.0, -1.0]
    X = np.column_stack([np.ones(ROWS), features])
    return X, X @ [1.0, -2.0, 3.0, 0.5] + noise * rng.standard_normal(ROWS)


def one_layer(theta, bias):
    """Return the network Z = Xθ; with `bias`, θ begins with `b` and X has no column of ones."""
    net = mc.MLP(
        [len(theta) - bias, 1], output="identity", bias=bias, dtype="float64", init="zeros"
    )
    net.W[1][:, 0] = theta[bias:]
    if bias:
        net.b[1][0] = theta[0]
    return net


def theta_of(net):
    """Return the network's parameters as θ, the intercept first."""
    return net.W[1][:, 0].copy() if net.b[1] is None else np.concatenate([net.b[1], net.W[1][:, 0]])


def gradient(X, y, theta, bias):
    """Return ∂J/∂θ (1 + features,) from `backward`."""
    net = one_layer(theta, bias)
    cache = net.forward(X[:, bias:])
    _, G = mc.loss("squared_error")(cache.output, y)
    grad = net.backward(cache, G)
    return grad.W[1][:, 0] if not bias else np.concatenate([grad.b[1], grad.W[1][:, 0]])


def step_change(X, y, theta, bias):
    """Return the change of θ by one `trainer.step` at rate 1: again the gradient."""
    net = one_layer(theta, bias)
    mc.Trainer(net, "squared_error", mc.SGD(1.0)).step(X[:, bias:], y)
    return theta - theta_of(net)


def best_rate(X):
    """Return 2 / (λ_min + λ_max) of XᵀX/m."""
    eigenvalues = np.linalg.eigvalsh(X.T @ X / len(X))
    return 2 / (eigenvalues[0] + eigenvalues[-1])


def trained(X, y, rate, batch_size, epochs, bias=False):
    """Return θ after training from zero."""
    net = one_layer(np.zeros(X.shape[1]), bias)
    trainer = mc.Trainer(net, "squared_error", mc.SGD(rate))
    trainer.fit(X[:, bias:], y, epochs=epochs, batch_size=batch_size, progress=False)
    return theta_of(net)


def main(quick=False):
    """Print the three comparisons."""
    X, y = data(noise=0.3)
    theta = np.random.default_rng(1).standard_normal(X.shape[1])
    formula = X.T @ (X @ theta - y) / len(X)
    print(f"1. The gradient at a random θ, {ROWS} rows\n")
    print(f"   (1/m) Xᵀ(Xθ - y) = {np.array2string(formula, precision=6)}\n")
    print("   largest difference from it       backward    one step at rate 1")
    for bias, text in ((False, "intercept as column of ones"), (True, "intercept as b")):
        differences = [
            np.abs(f(X, y, theta, bias) - formula).max() for f in (gradient, step_change)
        ]
        print(f"   {text:<30} {differences[0]:10.1e} {differences[1]:14.1e}")

    solution, epochs, rate = np.linalg.lstsq(X, y)[0], 200 if quick else 1000, best_rate(X)
    print("\n2. Training with whole batches against least squares\n")
    names = "".join(
        f"{name:>12}" for name in ("intercept", *(f"θ{k}" for k in range(1, FEATURES + 1)))
    )
    print(f"   {'':<30}{names}   largest difference")
    print(f"   {'np.linalg.lstsq':<30}" + "".join(f"{t:12.6f}" for t in solution))
    for bias, text in ((False, f"{epochs} steps, column of ones"), (True, f"{epochs} steps, b")):
        found = trained(X, y, rate, len(X), epochs, bias)
        print(
            f"   {text:<30}"
            + "".join(f"{t:12.6f}" for t in found)
            + f"   {np.abs(found - solution).max():.1e}"
        )

    print(f"\n3. Mini-batches of 20 rows, {epochs} epochs\n")
    exact_X, exact_y = data(noise=0.0)
    exact = np.linalg.lstsq(exact_X, exact_y)[0]
    print(f"   {'targets':<20} {'rate':<20} largest difference from least squares")
    for targets, name, schedule, (A, t, goal) in (
        ("with noise", "0.1, constant", 0.1, (X, y, solution)),
        ("with noise", "0.1, falling to 0", mc.Cosine(0.1), (X, y, solution)),
        ("exactly linear", "0.1, constant", 0.1, (exact_X, exact_y, exact)),
    ):
        print(
            f"   {targets:<20} {name:<20} "
            f"{np.abs(trained(A, t, schedule, 20, epochs) - goal).max():.1e}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=".", help="unused: this example draws no picture")
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    main(parser.parse_args().quick)
