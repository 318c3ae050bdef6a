"""Fit a function together with its derivative: an energy and its forces, from few points.

When an energy is computed, its gradient often costs little more. A network that is fitted to both
(Czarnecki et al. 2017 call it Sobolev training) needs far fewer points. The loss contains a
derivative of the network by its *input*,

    J(θ) = 1/m Σ_rows [ (Z - E)² + λ Σ_i (∂Z/∂x_i - F_i)² ]

so its gradient by θ contains derivatives of derivatives. In the engine these are one jvp and one
vjp for each direction x_i:

    output, tangent = net.jvp(X, dX=e_i)                            Z and ∂Z/∂x_i, forward
    net.vjp(X, ∂J/∂Z, dX=e_i, dV=∂J/∂(∂Z/∂x_i)).parameters          back through both

Here E is the Müller-Brown potential (1979), a surface with three valleys on which chemists test
methods, on a scale of 100. Both networks get the same points and the same number of L-BFGS
iterations (SciPy's); only one also gets the forces.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import minimize

import mlpcore as mc

A = np.array([-200.0, -100.0, -170.0, 15.0])
a, b, c = np.array([[-1, 0, -10], [-1, 0, -10], [-6.5, 11, -6.5], [0.7, 0.6, 0.7]]).T
X0, Y0 = np.array([1, 0, -0.5, -1]), np.array([0, 0.5, 1.5, 1])
BOX = np.array([[-1.4, 1.1], [-0.3, 1.9]])  # the sampled region


def potential(points):
    """Return E (m, 1) and its gradient (m, 2) at points (m, 2), divided by 100."""
    dx, dy = points[:, :1] - X0, points[:, 1:] - Y0
    terms = A * np.exp(a * dx**2 + b * dx * dy + c * dy**2) / 100
    slopes = [terms * (2 * a * dx + b * dy), terms * (b * dx + 2 * c * dy)]
    return terms.sum(axis=1, keepdims=True), np.stack(
        [slope.sum(axis=1) for slope in slopes], axis=1
    )


def J_and_gradient(net, X, E, F, weight):
    """Return J and its gradient by the parameters; weight 0 leaves the forces out."""
    m = len(X)
    if not weight:
        residual = net.predict(X) - E
        return float(np.sum(residual**2)) / m, net.vjp(X, 2 / m * residual).parameters
    J, gradient = 0.0, 0.0
    for i in range(X.shape[1]):
        direction = np.zeros_like(X)
        direction[:, i] = 1
        output, tangent = net.jvp(X, direction)
        # add the energies only once
        residual, slip = (output - E) * (i == 0), tangent - F[:, i : i + 1]
        J += float(np.sum(residual**2) + weight * np.sum(slip**2)) / m
        gradient = (
            gradient
            + net.vjp(X, 2 / m * residual, dX=direction, dV=2 * weight / m * slip).parameters
        )
    return J, gradient


def fit(X, E, F, weight, iterations, seed=0):
    """Return a network fitted by L-BFGS, starting from the seed's weights."""
    net = mc.MLP([2, 32, 32, 1], "tanh", dtype="float64", seed=seed)

    def objective(parameters):
        net.parameters[...] = parameters
        return J_and_gradient(net, X, E, F, weight)

    net.parameters[...] = minimize(
        objective,
        net.parameters.copy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations},
    ).x
    return net


def errors(net, count=4000):
    """Return root mean square errors of energy and force on new points with E < 1."""
    X = np.random.default_rng(99).uniform(*BOX.T, (count, 2))
    E, F = potential(X)
    low = E[:, 0] < 1
    X, E, F = X[low], E[low], F[low]
    units = np.eye(2)
    slopes = np.concatenate(
        [net.jvp(X, np.tile(unit, (len(X), 1))).tangent for unit in units], axis=1
    )
    return float(np.sqrt(np.mean((net.predict(X) - E) ** 2))), float(
        np.sqrt(np.mean((slopes - F) ** 2))
    )


def draw(nets, X, path):
    """Draw contours of the potential and of each network, with the points they were fitted to."""
    x, y = (np.linspace(low, high, 160) for low, high in BOX)
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    surfaces = {"Müller-Brown potential": potential(grid)[0]} | {
        name: net.predict(grid) for name, net in nets.items()
    }
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, len(surfaces), sharey=True)
    for panel, (name, surface) in zip(panels, surfaces.items(), strict=True):
        levels = np.linspace(-1.5, 1, 16)
        drawn = panel.contourf(
            x, y, np.clip(surface, -1.5, 1).reshape(len(y), len(x)), levels, cmap="viridis"
        )
        panel.contour(x, y, surface.reshape(len(y), len(x)), levels, colors="white", linewidths=0.4)
        panel.plot(*X.T, ".", color="black", markersize=4)
        panel.set(title=name, xlabel="$x_1$")
    panels[0].set_ylabel("$x_2$")
    figure.colorbar(drawn, ax=panels, label="energy / 100")
    figure.savefig(path, dpi=110)


def main():
    """Fit both networks, print their errors and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="fewer iterations")
    options = parser.parse_args()
    candidates = np.random.default_rng(1).uniform(*BOX.T, (10 * options.points, 2))
    X = candidates[potential(candidates)[0][:, 0] < 1][: options.points]
    E, F = potential(X)
    iterations = 60 if options.quick else 800
    print(
        f"{len(X)} points of the Müller-Brown potential, {iterations} iterations of L-BFGS, net "
        "2-32-32-1 tanh"
    )
    net = mc.MLP([2, 32, 32, 1], "tanh", dtype="float64")
    v = np.random.default_rng(2).standard_normal(net.layout.size)
    theta, h = net.parameters.copy(), 1e-6
    _, gradient = J_and_gradient(net, X, E, F, 0.1)
    around = []
    for sign in (1, -1):
        net.parameters[...] = theta + sign * h * v
        around.append(J_and_gradient(net, X, E, F, 0.1)[0])
    numeric = (around[0] - around[1]) / (2 * h)
    print(
        f"the gradient of J along a random direction: {gradient @ v:.8f}, by a central difference "
        f"{numeric:.8f}\n"
    )
    print(
        "fitted to              energy error   force error   (root mean square over new points, "
        "units of 100)"
    )
    nets = {}
    for name, weight in (("energies alone", 0.0), ("energies and forces", 0.1)):
        nets[name] = fit(X, E, F, weight, iterations)
        energy, force = errors(nets[name])
        print(f"  {name:<20} {energy:12.4f} {force:13.4f}")
    path = options.out / "sobolev.png"
    draw(nets, X, path)
    print(f"\nsaved {path}")


if __name__ == "__main__":
    main()
