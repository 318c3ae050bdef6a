"""A variable that enters twice contributes twice: the total derivative, by hand and in a network.

V = (4π/3) t x y is the volume of an ellipsoid with half-axes t, x, y. Let t be tied to x, by t = x.
How fast does V change when x changes? Three answers:

    the partial derivative by x                  (4π/3) t y
        right if t is held fixed, but it is not
    substitution after the differentiation       (4π/3) x y
        the same number: too small by the factor 2
    substitution before the differentiation      (8π/3) x y
        right

The differential has both terms, dV = (4π/3) (x y dt + t y dx + t x dy), and with dt = dx and dy = 0
it gives the third answer.

In the engine: two layers of one number each, Z = W[2] W[1] x, with W[2] tied to W[1]. Then Z = w²
x, whose derivative by w is 2 w x. The gradient that a trainer uses is the total one, because both
uses add to one gradient. The same holds for the matrix of an autoencoder that encodes by W and
decodes by Wᵀ, where the incomplete gradient looks right: its shape is.
"""

import argparse
import math

import numpy as np

import mlpcore as mc


def volume(t, x, y):
    """Return the volume of an ellipsoid."""
    return 4 * math.pi / 3 * t * x * y


def difference(f, x, h=1e-6):
    """Return the central difference of f at x."""
    return (f(x + h) - f(x - h)) / (2 * h)


def three_answers(x, y):
    """Return the rates of V in x if t = x, by name, and the tied function's central difference."""
    t = x
    rates = {
        "partial derivative by x": 4 * math.pi / 3 * t * y,
        "substituted afterwards": 4 * math.pi / 3 * x * y,
        "substituted before": 8 * math.pi / 3 * x * y,
    }
    return rates, difference(lambda moved: volume(moved, moved, y), x)


def two_uses(tied, w):
    """Return d(w² c)/dw, c = 4π/3 · 0.7, by a net of two layers, as (dW[1], dW[2]), each (1, 1)."""
    net = mc.MLP([1, 1, 1], "identity", bias=False, dtype="float64", tied={2: 1} if tied else None)
    net.W[1][...] = net.W[2][...] = w
    parameters = net.vjp([[4 * math.pi / 3 * 0.7]], [[1.0]]).parameters
    W, _ = net.layout.views(parameters)
    return float(W[1][0, 0]), float(W[2][0, 0])


def autoencoder(seed=0):
    """Return dJ along a random change of W[1] of a tied autoencoder, computed in three ways.

    The ways are one use alone, the engine, and a central difference.
    """
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 8))
    net = mc.MLP([8, 3, 8], "tanh", tied={2: "1.T"}, dtype="float64", seed=seed)
    apart = mc.MLP([8, 3, 8], "tanh", dtype="float64")  # the same function, with two matrices
    for l in (1, 2):
        apart.W[l][...] = net.W[l]
    loss, V = mc.loss("squared_error"), rng.standard_normal((8, 3))
    one_use = apart.backward(apart.forward(X), loss(apart.predict(X), X)[1]).W[1]
    total = net.backward(net.forward(X), loss(net.predict(X), X)[1]).W[1]
    W = net.W[1].copy()

    def J(step):
        net.W[1][...] = W + step * V  # W[2] is a view of it and changes too
        return loss(net.predict(X), X)[0]

    return float((one_use * V).sum()), float((total * V).sum()), difference(J, 0.0, 1e-5)


def main():
    """Print the three answers and those of the networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="unused: this example draws no picture")
    parser.parse_args()
    x, y = 1.5, 0.7
    rates, measured = three_answers(x, y)
    print(f"dV/dx of V = (4π/3) t x y at t = x = {x}, y = {y}")
    for name, rate in rates.items():
        print(f"  {name:<26} {rate:8.4f}   {rate / measured:.3f} of the measured {measured:.4f}")
    first, second = two_uses(False, x)
    print(f"\nZ = W[2] W[1] c with W[1] = W[2] = {x}, c = (4π/3) {y}")
    print(f"  untied: dW[1] {first:.4f}, dW[2] {second:.4f}, each a partial derivative")
    print(f"  tied={{2: 1}}: {two_uses(True, x)[0]:.4f}, their sum: the third answer above")
    one_use, total, numeric = autoencoder()
    print("\nAn autoencoder 8-3-8 with W[2] = W[1].T: dJ along a change of W[1]")
    for name, value in (
        ("one use of W alone", one_use),
        ("tied={2: '1.T'}", total),
        ("central difference", numeric),
    ):
        print(f"  {name:<26} {value:8.4f}")
    print("One use alone has the right shape, but not even the right sign.")


if __name__ == "__main__":
    main()
