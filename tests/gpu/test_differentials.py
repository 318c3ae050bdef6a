"""Tied weights and products with Jacobian and Hessian on the device, against NumPy's."""

import numpy as np
import pytest

import mlpcore as mc

ROWS = 37
NETS = {
    "softmax": ([7, 17, 12, 5], ["gelu", "tanh"], "softmax", "cross_entropy", None),
    "sigmoid": ([6, 9, 4], ["silu"], "sigmoid", "binary_cross_entropy", None),
    "not matched": ([5, 8, 5], ["mish"], "softmax", "squared_error", None),
    "straight": ([6, 8, 3], ["relu"], "identity", ("huber", 0.3), None),
    "autoencoder": (
        [8, 5, 3, 5, 8],
        ["tanh", "elu", "gelu"],
        "identity",
        "squared_error",
        {4: "1.T", 3: "2.T"},
    ),
    "square": ([6, 6, 6], ["tanh"], "tanh", "squared_error", {2: 1}),
}
BOUNDS = {"float64": 1e-12, "float32": 2e-4}


def near(device, here, there, bound):
    there = device.to_host(there) if not isinstance(there, np.ndarray) else there
    assert np.isfinite(here).all()
    assert np.abs(here - there).max() <= bound * np.abs(here).max() + 1e-30


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", NETS)
def test_every_product_is_numpys(device, put, name, dtype):
    sizes, hidden, output, loss, tied = NETS[name]
    here, there = (
        mc.MLP(sizes, hidden, output, tied=tied, dtype=dtype, seed=4, device=d)
        for d in ("cpu", "cuda")
    )
    rng = np.random.default_rng(1)
    X, dX = rng.standard_normal((2, ROWS, sizes[0])).astype(dtype)
    V, dV = rng.standard_normal((2, ROWS, sizes[-1])).astype(dtype)
    v, w = rng.standard_normal(here.layout.size).astype(dtype), rng.random(ROWS).astype(dtype)
    Y = (
        rng.integers(0, sizes[-1], ROWS)
        if loss == "cross_entropy"
        else rng.random((ROWS, sizes[-1])).astype(dtype)
    )
    calls = (
        lambda net, move, rows: net.jvp(move(X), move(dX), move(v), chunk_rows=rows),
        lambda net, move, rows: net.vjp(move(X), move(V), chunk_rows=rows),
        lambda net, move, rows: net.vjp(
            move(X), move(V), dX=move(dX), dV=move(dV), chunk_rows=rows
        ),
        lambda net, move, rows: [
            net.hvp(move(X), move(Y), move(v), loss, sample_weight=move(w), chunk_rows=rows)
        ],
        lambda net, move, rows: [net.gnvp(move(X), move(Y), move(v), loss, chunk_rows=rows)],
    )
    for chunk_rows in (None, 16):
        for call in calls:
            for move in (put, np.asarray):  # on the device, and from the host
                for one, other in zip(
                    call(here, np.asarray, chunk_rows), call(there, move, chunk_rows), strict=True
                ):
                    near(device, one, other, BOUNDS[dtype])


@pytest.mark.parametrize("name", ["autoencoder", "square"])
def test_tied_networks_train_as_on_the_cpu(device, put, name):
    sizes, hidden, output, loss, tied = NETS[name]
    X = np.random.default_rng(2).standard_normal((ROWS, sizes[0]))
    found = []
    for where, move in (("cpu", lambda array: array), ("cuda", put)):
        net = mc.MLP(sizes, hidden, output, tied=tied, dtype="float64", seed=4, device=where)
        trainer = mc.Trainer(net, loss, mc.AdamW(1e-2), chunk_rows=16)
        found.append(
            ([float(trainer.step(move(X), move(X[:, : sizes[-1]]))) for _ in range(4)], net)
        )
    (losses, here), (there_losses, there) = found
    np.testing.assert_allclose(losses, there_losses, rtol=1e-12)
    near(device, here.parameters, there.parameters, 1e-12)
    layer, owner, transposed = there.layout.ties[-1]
    W = [device.to_host(np_like) for np_like in (there.W[layer], there.W[owner])]
    np.testing.assert_array_equal(W[0], W[1].T if transposed else W[1])


def test_in_low_precision_a_tied_network_learns(device, put):
    X = np.random.default_rng(3).standard_normal((ROWS, 8)).astype(np.float32)
    for precision in ("bfloat16", "float16"):
        net = mc.MLP([8, 5, 8], "tanh", tied={2: "1.T"}, device="cuda")
        trainer = mc.Trainer(net, "squared_error", mc.AdamW(1e-2), precision=precision)
        losses = [float(trainer.step(put(X), put(X))) for _ in range(30)]
        assert losses[-1] < losses[0]
