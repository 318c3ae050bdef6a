"""Tied weights: one matrix, every use of it in one gradient."""

import copy
import pickle

import numpy as np
import pytest

import mlpcore as mc

AUTOENCODER = {"sizes": [6, 4, 3, 4, 6], "tied": {4: "1.T", 3: "2.T"}}
SQUARE = {"sizes": [5, 5, 5, 5], "tied": {3: 1, 2: "1.T"}}
RNG = np.random.default_rng(0)


def make(settings, **more):
    sizes, tied = settings["sizes"], settings["tied"]
    return mc.MLP(sizes, "tanh", tied=tied, **{"dtype": "float64", "seed": 3, **more})


def free(net):
    """The same function with matrices of their own."""
    other = mc.MLP(net.sizes, "tanh", dtype="float64")
    for l in range(1, len(net.sizes)):
        other.W[l][...], other.b[l][...] = net.W[l], net.b[l]
    return other


@pytest.fixture(params=[AUTOENCODER, SQUARE], ids=["autoencoder", "square"])
def settings(request):
    return request.param


def test_the_matrix_is_there_once(settings):
    net = make(settings)
    distinct = {
        tuple(sorted((l, int(str(what).removesuffix(".T")))))
        for l, what in settings["tied"].items()
    }
    assert len(distinct) == len(settings["tied"])
    sizes = settings["sizes"]
    own = [l for l in range(1, len(sizes)) if l not in settings["tied"]]
    assert net.layout.weights == sum(sizes[l - 1] * sizes[l] for l in own)
    for l, what in settings["tied"].items():
        owner, transposed = int(str(what).removesuffix(".T")), isinstance(what, str)
        assert np.shares_memory(net.W[l], net.W[owner])
        np.testing.assert_array_equal(net.W[l], net.W[owner].T if transposed else net.W[owner])
    net.W[max(settings["tied"])][...] = 7
    assert (net.W[1] == 7).all()


def test_the_gradient_is_the_sum_over_the_uses(settings):
    net = make(settings)
    other = free(net)
    X, G = RNG.standard_normal((9, net.sizes[0])), RNG.standard_normal((9, net.sizes[-1]))
    tied, apart = (n.backward(n.forward(X), G) for n in (net, other))
    for l in net.layout.owners:
        total = apart.W[l].copy()
        for layer, owner, transposed in net.layout.ties:
            if owner == l:
                total += apart.W[layer].T if transposed else apart.W[layer]
        np.testing.assert_allclose(tied.W[l], total, rtol=1e-12)
    for l in range(1, len(net.sizes)):
        np.testing.assert_allclose(tied.b[l], apart.b[l], rtol=1e-12)
    top = max(settings["tied"])
    assert np.shares_memory(tied.W[top], tied.W[1])


@pytest.mark.parametrize("chunk_rows", [1, 4, "auto"])
def test_the_trainers_gradient_is_right(settings, chunk_rows):
    net = make(settings)
    X, Y = RNG.standard_normal((10, net.sizes[0])), RNG.standard_normal((10, net.sizes[-1]))
    w = RNG.uniform(0, 1, 10)
    assert mc.check_gradients(net, X, Y, sample_weight=w, entries=True).ok
    before = net.parameters.copy()
    mc.Trainer(net, "squared_error", mc.SGD(1.0), chunk_rows=chunk_rows, workers=2).step(X, Y, w)
    step = before - net.parameters
    assert mc.check_gradients(_at(settings, before), X, Y, gradient=step, sample_weight=w).ok


def _at(settings, parameters):
    net = make(settings)
    net.parameters[...] = parameters
    return net


def test_half_of_a_tied_gradient_is_found_out(settings):
    """The partial derivative by one use alone is not the derivative."""
    net = make(settings)
    X, Y = RNG.standard_normal((8, net.sizes[0])), RNG.standard_normal((8, net.sizes[-1]))
    G = mc.loss("squared_error")(net.predict(X), Y)[1]
    apart = free(net)
    wrong = net.backward(net.forward(X), G)
    wrong.W[1][...] = apart.backward(apart.forward(X), G).W[1]
    found = mc.check_gradients(net, X, Y, gradient=wrong)
    assert not found.ok
    assert found.worst == "W[1]"


def test_a_penalty_counts_the_matrix_once(settings):
    net = make(settings)
    X, Y = np.zeros((2, net.sizes[0])), np.zeros((2, net.sizes[-1]))
    J = mc.Trainer(net, "squared_error", mc.SGD(0.0), l2=2.0).step(X, Y)
    assert pytest.approx(sum(float(np.sum(net.W[l] ** 2)) for l in net.layout.owners)) == J


def test_training_an_autoencoder_keeps_the_tie(settings):
    net = make(settings, dtype="float32")
    X = RNG.standard_normal((500, 2)) @ RNG.standard_normal((2, net.sizes[0]))
    losses = mc.Trainer(net, "squared_error", mc.AdamW(1e-2)).fit(
        X, X, epochs=30, batch_size=50, progress=False
    )["loss"]
    assert losses[-1] < 0.5 * losses[0]
    for layer, owner, transposed in net.layout.ties:
        np.testing.assert_array_equal(net.W[layer], net.W[owner].T if transposed else net.W[owner])


@pytest.mark.parametrize(
    "clone", [mc.MLP.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))]
)
def test_a_copy_is_tied_likewise(settings, clone):
    net = make(settings)
    other = clone(net)
    assert other.tied == settings["tied"] == net.tied
    other.W[max(settings["tied"])][...] = 0
    assert not other.W[1].any()
    assert net.W[1].any()


def test_files_hold_the_tie(settings, tmp_path):
    net = make(settings)
    net.save(tmp_path / "net.safetensors")
    other = mc.MLP.load(tmp_path / "net.safetensors")
    assert other.tied == net.tied
    np.testing.assert_array_equal(other.parameters, net.parameters)
    X = RNG.standard_normal((3, net.sizes[0]))
    np.testing.assert_array_equal(other.predict(X), net.predict(X))


def test_names_plan_and_print_say_so(settings):
    net = make(settings)
    assert f"tied={dict(sorted(settings['tied'].items()))}" in repr(net)
    names = {net.layout.name(i).split("[")[1] for i in range(net.layout.weights)}
    assert names == {f"{l}]" for l in net.layout.owners}
    with pytest.raises(IndexError):
        net.layout.name(net.layout.size)
    plan = mc.Trainer(net, "squared_error").plan(8)
    assert f"{net.layout.size:,}" in str(plan)


@pytest.mark.parametrize(
    ("tied", "message"),
    [
        ([4, 1], "tied must be a dict"), ({4: "1"}, "expected layer: layer"),
        ({4: "x.T"}, "expected layer: layer"),
        ({"4": 1}, "expected layer: layer"), ({True: 1}, "expected layer: layer"),
        ({4: 1.0}, "expected layer: layer"),
        ({4: 1}, r"W\[1\] is \(6, 4\), but W\[4\] must be \(4, 6\)"),
        ({1: "4.T"}, "a lower one"), ({4: "0.T"}, "a lower one"),
        ({9: 1}, "a lower one"), ({4: "4.T"}, "a lower one"),
        ({4: "3.T", 3: "2.T"}, "itself tied"),
    ],
)  # fmt: skip
def test_a_tie_that_cannot_be_is_refused(tied, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mc.MLP([6, 4, 3, 4, 6], tied=tied)
