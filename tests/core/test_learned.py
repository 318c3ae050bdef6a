"""Learned parameters of activations: prelu's slope, and those of a user's own."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.core import activations, losses
from mlpcore.io import model_file

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((40, 4)), RNG.standard_normal((40, 2))
PER_LAYER, PER_OUTPUT = ("prelu", 0.25), ("prelu", -0.3, "per output")


def swish(learned):
    """s / (1 + exp(-a s)), Ramachandran et al. 2017."""
    return mc.Activation("swish", "s / (1 + exp(-(a * s)))",
                         "(1 + a * s * exp(-(a * s)) / (1 + exp(-(a * s)))) / (1 + exp(-(a * s)))",
                         parameter=1.5, learned=learned)  # fmt: skip


SPECS = [PER_LAYER, PER_OUTPUT, swish("per layer"), swish("per output")]


@pytest.fixture(
    params=SPECS, ids=["prelu per layer", "prelu per output", "swish per layer", "swish per output"]
)
def spec(request):
    return request.param


def make(spec, output="identity", **settings):
    return mc.MLP([4, 6, 5, 2], spec, output, **{"dtype": "float64", "seed": 3, **settings})


# -- the gradient ----------------------------------------------------------------------------------


def test_the_gradient_of_a_net_of_one_unit_by_hand():
    """Z = w₂ σ(w₁ x + b₁) + b₂: below 0, ∂J/∂a = (Z - y) w₂ s; above, 0."""
    net = mc.MLP([1, 1, 1], ("prelu", 0.5), dtype="float64")
    net.W[1][...], net.b[1][...], net.W[2][...], net.b[2][...] = 2.0, 1.0, 3.0, -0.5
    cache = net.forward([[-3.0], [4.0]])  # s = -5 and 9
    np.testing.assert_array_equal(cache.output, [[3 * 0.5 * -5 - 0.5], [3 * 9 - 0.5]])
    grad = net.backward(cache, [[7.0], [11.0]], input_gradient=True)
    np.testing.assert_array_equal(grad.a[1], [7 * 3 * -5.0])
    np.testing.assert_array_equal(grad.W[1], [[7 * 3 * 0.5 * -3 + 11 * 3 * 4]])
    np.testing.assert_array_equal(grad.X, [[7 * 3 * 0.5 * 2], [11 * 3 * 2]])
    assert (grad.a[0], grad.a[2]) == (None, None)
    np.testing.assert_array_equal(
        grad.flat, [*grad.W[1].ravel(), *grad.W[2].ravel(), *grad.b[1], *grad.b[2], *grad.a[1]]
    )


@pytest.mark.parametrize("a", [-2.0, -0.3, 0.0, 1.0, 1.7])
def test_a_slope_of_any_sign_is_right(a):
    s, z = np.array([[-3.0, -0.5, 0.0, 2.0]]), np.array([[-3 * a, -0.5 * a, 0.0, 2.0]])
    net = mc.MLP([4, 4], output=("prelu", a), dtype="float64", init="zeros")
    net.W[1][...] = np.eye(4)
    cache = net.forward(s)
    np.testing.assert_array_equal(cache.output, z)
    np.testing.assert_array_equal(
        net.backward(cache, np.ones((1, 4)), keep=True).D[1], [[a, a, a, 1.0]]
    )


@pytest.mark.slow
@pytest.mark.parametrize("output", ["identity", "softmax", ("prelu", 0.1, "per output")], ids=str)
def test_the_gradient_is_that_of_central_differences(spec, output):
    target = RNG.integers(0, 2, len(X)) if output == "softmax" else Y
    loss = "cross_entropy" if output == "softmax" else "squared_error"
    for settings in ({}, {"bias": False}):
        found = mc.check_gradients(make(spec, output, **settings), X, target, loss, entries=True)
        assert found.ok, str(found)
        assert {"a[1]", "a[2]"} <= {*found.errors}


def test_an_output_that_learns_is_not_matched_with_its_loss():
    """A pair that goes from S[L] straight to D[L] would leave ∂J/∂a out."""
    sigmoid = activations.resolve("sigmoid")
    output = mc.Activation(
        "sigmoid", sigmoid.value, sigmoid.slope, parameter=1.0, learned="per output"
    )
    net = make("tanh", output)
    assert mc.check_gradients(
        net, X, RNG.random((len(X), 2)), "binary_cross_entropy", entries=True
    ).ok
    straight = mc.Loss("own", "(z - y) * (z - y)", "2 * (z - y)", outputs="swish",
                       matched=("(z - y) * (z - y)", "2 * (z - y)"))  # fmt: skip
    for fixed, matched in ((None, True), ("per layer", False)):
        assert (
            losses.pair(straight, dataclasses.replace(swish("per layer"), learned=fixed)).matched
            == matched
        )


@pytest.mark.slow
def test_the_gradient_check_finds_a_wrong_one(spec):
    net = make(spec)
    _, G = mc.loss("squared_error")(net.predict(X), Y)
    wrong = net.backward(net.forward(X), G)
    wrong.a[2][0] *= 1.01
    found = mc.check_gradients(net, X, Y, "squared_error", wrong, entries=True)
    assert not found.ok
    assert found.worst == "a[2][0]"


def test_per_layer_is_the_sum_of_per_output(spec):
    if spec in (PER_LAYER, PER_OUTPUT):
        one, each = (make(("prelu", 0.4, how)) for how in ("per layer", "per output"))
    else:
        one, each = (make(swish(how)) for how in ("per layer", "per output"))
    G = RNG.standard_normal((len(X), 2))
    np.testing.assert_array_equal(one.predict(X), each.predict(X))
    apart, together = (net.backward(net.forward(X), G) for net in (each, one))
    for l, n in ((1, 6), (2, 5)):
        assert (apart.a[l].shape, together.a[l].shape) == ((n,), (1,))
        np.testing.assert_allclose(together.a[l], apart.a[l].sum(), rtol=1e-13)


@pytest.mark.parametrize("settings",
    [{"chunk_rows": 1}, {"chunk_rows": 7}, {"workers": 2}, {"chunk_rows": 7, "workers": 2}],
                         ids=str)  # fmt: skip
def test_chunks_and_workers_change_nothing_but_the_order_of_sums(spec, settings):
    net, w = make(spec), RNG.uniform(0.5, 2, len(X))
    whole, cut = (
        mc.Trainer(net, "squared_error", **more).gradient(X, Y, w) for more in ({}, settings)
    )
    np.testing.assert_allclose(cut[1], whole[1], rtol=1e-12, atol=1e-15)
    again = mc.Trainer(net, "squared_error", **settings).gradient(X, Y, w)[1]
    np.testing.assert_array_equal(again, cut[1])


@pytest.mark.parametrize("columns", [1, 3, 40_000])
def test_layers_as_narrow_and_as_wide_as_a_piece_and_wider(columns):
    rows = 3 if columns > 100 else 30_000
    x, V = RNG.standard_normal((rows, 2)), RNG.standard_normal((rows, columns))
    for spec in (("prelu", 0.4), ("prelu", 0.4, "per output")):
        net = mc.MLP([2, columns], output=spec, dtype="float64")
        net.a[1][...] = RNG.standard_normal(net.a[1].shape)
        s = x @ net.W[1]
        cache = net.forward(x)
        np.testing.assert_allclose(
            cache.output, np.where(s > 0, s, net.a[1] * s), rtol=1e-13, atol=1e-13
        )
        grad = net.backward(cache, V, keep=True)
        np.testing.assert_allclose(
            grad.D[1], V * np.where(s > 0, 1, net.a[1]), rtol=1e-13, atol=1e-13
        )
        shares = (V * np.minimum(s, 0)).sum(axis=0)
        np.testing.assert_allclose(
            grad.a[1], shares if net.a[1].size == columns else [shares.sum()], rtol=1e-9
        )


# -- training --------------------------------------------------------------------------------------


def test_training_finds_the_slope_of_the_data():
    x = np.linspace(-2, 2, 200)[:, None]
    net = mc.MLP([1, 1], output="prelu", init="zeros", bias=False, dtype="float64")
    net.W[1][...] = 1.0
    mc.Trainer(net, "squared_error", mc.SGD(0.3)).fit(
        x, np.where(x > 0, x, -0.7 * x), epochs=60, batch_size=50, progress=False
    )
    assert net.a[1][0] == pytest.approx(-0.7, abs=1e-6)


def test_one_step_of_sgd_is_the_gradient_and_decay_and_penalties_leave_it_alone(spec):
    for optimizer, penalties in [(mc.SGD(0.1), {}), (mc.SGD(0.1), {"l1": 0.3, "l2": 0.5})]:
        net = make(spec)
        _, G = mc.loss("squared_error")(net.predict(X), Y)
        expected = net.a[1] - 0.1 * net.backward(net.forward(X), G).a[1]
        mc.Trainer(net, "squared_error", optimizer, **penalties).step(X, Y)
        np.testing.assert_allclose(net.a[1], expected, rtol=1e-12)
    strong, none = (make(spec) for _ in range(2))
    for net, decay in ((strong, 0.5), (none, 0.0)):
        mc.Trainer(net, "squared_error", mc.AdamW(0.1, weight_decay=decay)).step(X, Y)
    np.testing.assert_array_equal(strong.a[1], none.a[1])
    assert (strong.W[1] != none.W[1]).all()


def test_a_layer_with_a_rate_of_its_own_has_it_for_its_slopes_too(spec):
    net = make(spec)
    one = net.backward(net.forward(X), mc.loss("squared_error")(net.predict(X), Y)[1])
    before = net.parameters.copy()
    mc.Trainer(
        net, "squared_error", mc.SGD(0.1, layers={1: mc.Layer(rate=3.0), 2: mc.Layer(frozen=True)})
    ).step(X, Y)
    a = net.layout.slopes(before)
    np.testing.assert_allclose(net.a[1], a[1] - 0.3 * one.a[1], rtol=1e-12)
    np.testing.assert_array_equal(net.a[2], a[2])
    np.testing.assert_allclose(
        net.b[3], net.layout.views(before)[1][3] - 0.1 * one.b[3], rtol=1e-12, atol=1e-15
    )


def test_early_stopping_puts_the_best_slopes_back(spec):
    net = make(spec)
    seen = []

    def look(trainer, entry):
        seen.append((entry["validation_loss"], net.a[1].copy()))

    mc.Trainer(net, "squared_error", mc.SGD(0.1)).fit(
        X[:20], Y[:20], epochs=40, batch_size=5, validation=(X[20:], Y[20:]),
        early_stopping=mc.EarlyStopping(patience=40),
        callbacks=[look], progress=False,
    )  # fmt: skip
    best = min(range(len(seen)), key=lambda i: seen[i][0])
    assert best < len(seen) - 1
    np.testing.assert_array_equal(net.a[1], seen[best][1])


def test_dropout_leaves_what_is_kept(spec):
    """The gradient of one step's masks is the derivative of that step's loss."""
    net = make(spec)
    dropped = {"dropout": 0.4, "seed": 5}

    def J(t, v):
        moved = net.copy()
        moved.parameters[...] += t * v
        return mc.Trainer(moved, "squared_error", mc.SGD(0.0), **dropped).step(X, Y)

    after = net.copy()
    mc.Trainer(after, "squared_error", mc.SGD(1.0), **dropped).step(X, Y)
    g = net.parameters - after.parameters
    for i in range(net.layout.weights + 13, net.layout.size):
        v = np.eye(net.layout.size)[i]
        assert (J(1e-6, v) - J(-1e-6, v)) / 2e-6 == pytest.approx(g[i], rel=1e-6, abs=1e-9), (
            net.layout.name(i)
        )


@pytest.mark.parametrize("limit", [None, 12_000])
def test_the_plan_lists_the_parameters_and_a_limit_is_kept(spec, limit):
    trainer = mc.Trainer(make(spec), "squared_error", memory_limit=limit)
    plan = trainer.plan(40)
    assert f"{trainer.net.layout.size:,} float64" in " ".join(str(plan).split())
    assert "a[1] … a[L]" in str(plan)
    assert limit is None or plan.total_bytes <= limit
    trainer.step(X, Y)
    free = mc.Trainer(make(spec), "squared_error")
    free.step(X, Y)
    np.testing.assert_allclose(trainer.net.parameters, free.net.parameters, rtol=1e-9, atol=1e-12)


def test_a_run_is_taken_up_to_the_bit(spec, tmp_path):
    straight, first = (
        mc.Trainer(make(spec), "squared_error", mc.Adam(1e-2), seed=2, dropout=0.2)
        for _ in range(2)
    )
    straight.fit(X, Y, epochs=6, batch_size=7, progress=False)
    first.fit(X, Y, epochs=3, batch_size=7, progress=False)
    first.save(tmp_path / "run.safetensors")
    second = mc.Trainer.load(tmp_path / "run.safetensors")
    np.testing.assert_array_equal(second.net.parameters, first.net.parameters)
    second.fit(X, Y, epochs=3, batch_size=7, progress=False)
    np.testing.assert_array_equal(second.net.parameters, straight.net.parameters)
    assert (second.net.a[1] != first.net.a[1]).all()


# -- the network -----------------------------------------------------------------------------------


def test_what_a_begins_with_and_where_it_stands():
    net = mc.MLP([4, 8, 8, 1], activations="prelu")
    assert [None if a is None else a.tolist() for a in net.a] == [None, [0.25], [0.25], None]
    net = mc.MLP([4, 8, 3, 1], [("prelu", None, "per output"), ("prelu", 0.1)], init="zeros")
    assert [None if a is None else a.tolist() for a in net.a] == [
        None,
        [0.25] * 8,
        [pytest.approx(0.1)],
        None,
    ]
    assert net.layout.size == net.layout.weights + 12 + 9
    net.a[1][...] = np.arange(8)
    np.testing.assert_array_equal(net.parameters[-9:-1], np.arange(8))
    assert [net.layout.name(net.layout.size - i) for i in (9, 2, 1)] == [
        "a[1][0]",
        "a[1][7]",
        "a[2][0]",
    ]
    assert "activations=[('prelu', 0.25, 'per output'), ('prelu', 0.1)]" in repr(net)
    assert ", b, a;" in repr(net.backward(net.forward(X), np.ones((40, 1))))


def test_the_weights_are_those_of_a_net_without(spec):
    one, other = make(spec, init="he"), make("relu", init="he")
    np.testing.assert_array_equal(one.parameters[: other.layout.size], other.parameters)
    assert other.a == (None,) * 4


@pytest.mark.parametrize(
    "clone",
    [
        mc.MLP.copy,
        copy.deepcopy,
        lambda net: pickle.loads(pickle.dumps(net)),
        lambda net: net.copy("float32").copy("float64"),
    ],
)
def test_a_copy_has_slopes_of_its_own(spec, clone):
    net = make(spec)
    net.a[2][...] = 0.5
    other = clone(net)
    assert other.activations == net.activations
    np.testing.assert_allclose(other.predict(X), net.predict(X), rtol=1e-5)
    other.a[2][...] = -4
    assert (net.a[2] == 0.5).all()
    assert not np.allclose(other.predict(X), net.predict(X))


def test_a_file_holds_them(spec, tmp_path):
    net = make(spec, dtype="float32")
    net.a[1][...] = RNG.standard_normal(net.a[1].shape)
    net.save(tmp_path / "net.safetensors")
    other = mc.MLP.load(tmp_path / "net.safetensors")
    assert other.activations == net.activations
    np.testing.assert_array_equal(other.parameters, net.parameters)
    np.testing.assert_array_equal(other.predict(X), net.predict(X))


def test_files_of_other_networks_say_nothing_of_them(tmp_path):
    make(("sigmoid", 2.0)).save(tmp_path / "net.safetensors")
    header = model_file.read(tmp_path / "net.safetensors")[0]
    rows = [{"name", "value", "slope", "parameter", "init", "default"}] * 3
    assert [{*row} for row in json.loads(json.dumps(header["activations"]))] == rows


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: mc.MLP([2, 3, 1], ("prelu", 0.1, "per row")),
            "prelu is learned 'per layer' or 'per output'; got 'per row'",
        ),
        (
            lambda: mc.MLP([2, 3, 1], [("prelu", 0.1, True)]),
            "prelu is learned 'per layer' or 'per output'; got True",
        ),
        (lambda: mc.MLP([2, 3, 1], ("elu", 0.1, "per layer")), "elu has no learned parameter"),
        (
            lambda: mc.MLP([2, 3, 1], ("prelu", np.nan)),
            "the parameter of prelu must be finite; got nan",
        ),
        (lambda: mc.MLP([2, 3, 1], ("prelu", "0.1")), "activations"),
        (
            lambda: mc.MLP([2, 3, 1], output=("softmax", None, "per layer")),
            "softmax takes no parameter",
        ),
        (
            lambda: mc.Activation("mine", "a * s", "a", 1.0, learned="often"),
            "learned: unknown name 'often'. Known: per layer, per output",
        ),
        (
            lambda: mc.Activation("mine", "s", "1", 1.0, learned="per layer"),
            "needs a value that reads a",
        ),
        (lambda: mc.Activation("mine", "a * s", "a", learned="per layer"), "'a'"),
    ],
)
def test_what_cannot_be_learned_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
