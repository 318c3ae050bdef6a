"""The effect of the slope a of the sigmoid φ(s) = 1 / (1 + exp(-a s)) on learning.

The net has three layers (two hidden ones and the output), all φ with the same a, and squared error;
it learns from one data point at a time. From φ' = a φ (1 - φ), the update of the last hidden layer,
layer 2, is by hand

    δ3_r = (z3_r - y_r) · a z3_r (1 - z3_r)                 W2_kj loses  η z1_k δ2_j
    δ2_j = (Σ_r δ3_r W3_jr) · a z2_j (1 - z2_j)             b2_j  loses  η δ2_j

The effect of a. It occurs only in a s = (Z aW + ab): a net with slope a and parameters θ is the net
with slope 1 and parameters aθ, J_a(θ) = J_1(aθ), and its gradient is a times that of J_1 at aθ. A
step θ - η a ∇J_1(aθ) therefore takes u = aθ to

    u - a² η ∇J_1(u)

One factor a comes from the chain rule, one from the scale of W. So slope a at rate η *is* slope 1
at rate a² η, started at aθ.

The start of learning. Near 0 the sigmoid is 1/2 + (a/4) s. With weights drawn regardless of a
(init="glorot"), each layer scales the differences between points by about a/4: with a small a all
points get nearly the same output, and learning starts on a plateau. init="auto" divides hidden
weights by a/4 and output weights by a. Then aθ at the start is the same for every a: the same net,
and only the factor a² in the rate is left. (At a = 4 both draw the same hidden weights, as a/4 is
1.)
"""

import argparse
import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

import mlpcore as mc

SLOPES = (0.5, 1.0, 2.0, 4.0)
RATE = 0.3
INITS = {"glorot": "regardless of a", "auto": "takes a into account"}


def network(sizes, a, init="auto", seed=1):
    """Return a net of three layers, each a sigmoid with slope a."""
    return mc.MLP(
        sizes,
        activations=("sigmoid", a),
        output=("sigmoid", a),
        dtype="float64",
        init=init,
        seed=seed,
    )


def by_hand(W, b, x, y, a, rate):
    """Return the change of W[2] and b[2] by one step on the point (x, y), one index at a time.

    W and b are nested lists.
    """

    def layer(z, l):
        s = [sum(z[k] * W[l][k][j] for k in range(len(z))) + b[l][j] for j in range(len(b[l]))]
        return [1 / (1 + math.exp(-a * number)) for number in s]

    z1 = layer(x, 1)
    z2 = layer(z1, 2)
    z3 = layer(z2, 3)
    delta3 = [(z3[r] - y[r]) * a * z3[r] * (1 - z3[r]) for r in range(len(y))]
    delta2 = []
    for j in range(len(z2)):
        back = sum(delta3[r] * W[3][j][r] for r in range(len(y)))
        delta2.append(back * a * z2[j] * (1 - z2[j]))
    change_W = [[rate * z1[k] * delta2[j] for j in range(len(z2))] for k in range(len(z1))]
    return change_W, [rate * d for d in delta2]


def as_lists(views):
    """Return net.W or net.b as nested lists of floats."""
    return [None if view is None else view.tolist() for view in views]


def by_trainer(net, x, y, rate):
    """Return the change of W[2] and b[2] by one `trainer.step`."""
    W, b = net.W[2].copy(), net.b[2].copy()
    mc.Trainer(net, "squared_error", mc.SGD(rate)).step([x], [y])
    return W - net.W[2], b - net.b[2]


def quadrants(rows=200, seed=0):
    """Return points of a square (m, 2) and targets (m, 1): 0.9 if the signs agree, else 0.1."""
    X = np.random.default_rng(seed).uniform(-1, 1, (rows, 2))
    return X, np.where(X[:, :1] * X[:, 1:] > 0, 0.9, 0.1)


def learning_curve(a, init, rate, epochs, seed=1):
    """Return the mean loss of each epoch, and the trained net; one data point per step."""
    X, Y = quadrants()
    net = network([2, 8, 8, 1], a, init, seed)
    trainer = mc.Trainer(net, "squared_error", mc.SGD(rate), seed=0)
    return trainer.fit(X, Y, epochs=epochs, batch_size=1, progress=False)["loss"], net


def spread_at_start(a, init):
    """Return the standard deviation of the output over the points, before training."""
    return network([2, 8, 8, 1], a, init).predict(quadrants()[0]).std()


def epochs_to(curve, level):
    """Return the first epoch whose loss is below the level, as text."""
    below = np.flatnonzero(np.array(curve) < level)
    return str(below[0] + 1) if len(below) else f"> {len(curve)}"


def draw(curves, path):
    """Draw both panels: initial weights regardless of a, and adapted to a."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (init, meaning) in zip(panels, INITS.items(), strict=True):
        for a, shade in zip(SLOPES, (0.85, 0.6, 0.3, 0.0), strict=True):
            curve = curves[init, a]
            axes.plot(
                range(1, len(curve) + 1),
                curve,
                color=colormaps["viridis"](shade),
                linewidth=1.8,
                label=f"a = {a:g}",
            )
        axes.set(title=f'init="{init}": {meaning}', xlabel="epoch (200 steps)", yscale="log")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    rescaled = curves["auto", "rescaled"]
    panels[1].plot(
        range(1, len(rescaled) + 1), rescaled, "k:", linewidth=1.8, label="a = 4, rate / 16"
    )
    panels[0].set_ylabel("mean loss of the epoch")
    panels[1].set_xlim(0, len(rescaled) + 1)
    panels[1].legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=150)


def main(out, quick=False):
    """Print both parts and save the picture."""
    a, rate = 2.0, 0.5
    net = network([3, 4, 3, 2], a)
    x, y = [0.3, -1.2, 0.8], [0.9, 0.2]
    hand_W, hand_b = by_hand(as_lists(net.W), as_lists(net.b), x, y, a, rate)
    step_W, step_b = by_trainer(net, x, y, rate)
    print(f"1. One step on one data point, 3-4-3-2 net, a = {a:g}: decrease of W[2] and b[2]\n")
    print("   entry         by hand            trainer.step       difference")
    for name, hand, step in (
        ("W[2]", np.array(hand_W), step_W),
        ("b[2]", np.array(hand_b), step_b),
    ):
        for at in np.ndindex(step.shape):
            place = name + str(list(at))
            print(
                f"   {place:<12} {hand[at]:18.15f} {step[at]:18.15f} "
                f"{abs(hand[at] - step[at]):10.0e}"
            )

    epochs = 15 if quick else 80
    curves = {(init, a): learning_curve(a, init, RATE, epochs)[0] for init in INITS for a in SLOPES}
    level = curves["auto", 1.0][0] / 2
    print(f"\n2. Learning: 2-8-8-1 net, 200 points, one per step, rate {RATE:g}, {epochs} epochs\n")
    print(
        "              spread of the output at the start    epochs until the loss is below "
        f"{level:.3f}"
    )
    print("   a             glorot            auto              glorot            auto")
    for a in SLOPES:
        spread = "".join(f"{spread_at_start(a, init):16.5f}" for init in INITS)
        print(
            f"   {a:<4g} {spread}    "
            + "".join(f"{epochs_to(curves[init, a], level):>16}" for init in INITS)
        )
    print("""
   Regardless of a, a net with small a hardly distinguishes the points at first: it starts on a
   plateau. Adapted to a, all four start as the same net; only the steps differ, a² times as long.
   At a = 4 a step is 16 times that of a = 1: fast at first, then too long to converge.""")

    short = 2 if quick else 5
    reference, net_1 = learning_curve(1.0, "auto", RATE, short)
    print(
        f'\n3. init="auto" and rate {RATE:g}/a²: '
        f"the first {short * 200:,} steps against those of a = 1\n"
    )
    print("   a       largest difference of losses    of a·θ")
    for a in (0.5, 2.0, 3.0, 4.0):
        curve, net = learning_curve(a, "auto", RATE / a**2, short)
        loss_difference = np.abs(np.array(curve) - reference).max()
        print(
            f"   {a:<7g} {loss_difference:28.1e} "
            f"{np.abs(a * net.parameters - net_1.parameters).max():9.1e}"
        )
    print("\n   The runs are the same. (Powers of two scale without rounding.)")
    curves["auto", "rescaled"] = learning_curve(4.0, "auto", RATE / 16, epochs)[0]
    draw(curves, Path(out) / "sigmoid_slope.png")
    print(f"\nsaved {Path(out) / 'sigmoid_slope.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=".", help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
