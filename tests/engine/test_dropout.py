"""Training with dropout: its gradient, its masks whatever the chunks and threads, and that nothing
but a step drops.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mlpcore as mc
from mlpcore.core import activations

SIZES = [5, 9, 6, 3]
PAIRS = [
    ("squared_error", "identity"), ("cross_entropy", "softmax"),
    ("binary_cross_entropy", "sigmoid"), (("huber", 0.5), "tanh"),
    ("squared_error", "softmax"),
]  # fmt: skip


def problem(rows, loss="squared_error", dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, SIZES[0])).astype(dtype)
    if loss == "cross_entropy":
        return X, rng.integers(0, SIZES[-1], rows)
    return X, rng.integers(0, 2, (rows, SIZES[-1])).astype(dtype)


def network(hidden="tanh", output="identity", dtype="float64", sizes=SIZES, **settings):
    net = mc.MLP(sizes, hidden, output, dtype=dtype, seed=1, **settings)
    for b in net.b[1:]:
        # away from the kinks: a row may lose all its inputs
        b[...] = np.random.default_rng(2).uniform(0.05, 0.3, b.shape)
    return net


def trainer(net, loss="squared_error", **settings):
    return mc.Trainer(
        net, loss, mc.SGD(0.1, momentum=0.9), **{"dropout": [0.3, 0.5], "seed": 4, **settings}
    )


def masks(one, rows, step=None):
    """The factors of Z[1] … Z[L-1] in a step of this trainer, by its own activations on Z = 1."""
    ops, found = one._step.problem.new_ops(), []
    ops.step = one.progress.step + 1 if step is None else step
    for l, n in enumerate(one.net.sizes[1:-1], 1):
        sigma = one._step.problem.activations[l]
        Z = np.ones((rows, n))
        if sigma is not one.net.activations[l]:
            ops._drop(Z, sigma.key, sigma.threshold)
        found.append(Z / (1 - one._step.problem.settings.dropout[l - 1]))
    return found


# -- the gradient ----------------------------------------------------------------------------------


def directional(one, X, Y):
    """The derivative of J along a random direction, the masks held fixed: by central differences,
    and by the gradient.
    """
    net, rng = one.net, np.random.default_rng(3)
    _, gradient = one.gradient(X, Y)
    v, w, step = rng.standard_normal(gradient.size), net.parameters.copy(), 1e-6
    along = float(gradient @ v)
    J = []
    for sign in (1, -1):
        net.parameters[...] = w + sign * step * v
        J.append(one.gradient(X, Y)[0])
    net.parameters[...] = w
    return (J[0] - J[1]) / (2 * step), along


@pytest.mark.parametrize("hidden", activations.names())
@pytest.mark.parametrize(("loss", "output"), PAIRS, ids=str)
def test_the_gradient_is_that_of_the_loss_with_the_masks_held_fixed(loss, output, hidden):
    one = trainer(network(hidden, output), loss, l2=0.1, chunk_rows=7)
    one.net.parameters[...] *= 0.5
    numeric, analytic = directional(one, *problem(20, loss))
    assert analytic == pytest.approx(numeric, rel=2e-6, abs=1e-9)


def test_the_gradient_of_tied_weights_and_of_a_step_is_the_same():
    net = network("sigmoid", sizes=[5, 4, 4, 5], tied={3: "1.T"})
    X = problem(30)[0]
    one = trainer(net, l1=0.01)
    numeric, analytic = directional(one, X, X)
    assert analytic == pytest.approx(numeric, rel=2e-6)
    J, gradient = one.gradient(X, X)
    before, gradient = net.parameters.copy(), gradient.copy()
    assert one.step(X, X) == J
    np.testing.assert_allclose(net.parameters, before - 0.1 * gradient, rtol=1e-12, atol=1e-15)


def test_a_step_is_that_of_the_recurrences_with_z_times_m_over_1_minus_p():
    """Written out in NumPy, two layers deep, with the masks of the step."""
    net, (X, Y) = network("tanh"), problem(13)
    one = trainer(net)
    for _ in range(2):
        m1, m2 = masks(one, len(X))
        assert (m1 == 0).any()
        assert not (m1 == masks(one, len(X), step=99)[0]).all()
        W, b = [None, *(w.copy() for w in net.W[1:])], [None, *(x.copy() for x in net.b[1:])]
        z1 = np.tanh(X @ W[1] + b[1])
        z2 = np.tanh(z1 * m1 @ W[2] + b[2])
        D3 = (z2 * m2 @ W[3] + b[3] - Y) / len(X)
        D2 = D3 @ W[3].T * m2 * (1 - z2**2)
        D1 = D2 @ W[2].T * m1 * (1 - z1**2)
        expected = [x.T @ D for x, D in zip((X, z1 * m1, z2 * m2), (D1, D2, D3), strict=True)]
        expected += [D.sum(axis=0) for D in (D1, D2, D3)]
        J = one.step(X, Y)
        assert pytest.approx(0.5 * len(X) * (D3**2).sum(), rel=1e-13) == J
        np.testing.assert_allclose(
            one._step.gradient,
            np.concatenate([x.ravel() for x in expected]),
            rtol=1e-11,
            atol=1e-15,
        )


# -- the same masks --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 45), st.integers(1, 3),
    st.lists(st.sampled_from(activations.names()), max_size=3),
    st.sampled_from(["float32", "float64"]), st.booleans(), st.integers(0, 2**40),
)  # fmt: skip
def test_chunks_and_threads_change_nothing_but_summation_order(
    rows, chunk_rows, workers, hidden, dtype, indexed, seed
):
    assume(hidden.count("exp") < 2)  # exp(exp(s)) overflows
    rng = np.random.default_rng(seed)
    sizes = [5, *[int(rng.integers(1, 7)) for _ in hidden], 3]
    X, Y = problem(rows + 5, dtype=dtype, seed=seed)
    index = rng.integers(0, rows + 5, rows) if indexed else np.arange(rows)
    rates = [float(p) for p in rng.choice([0, 0.2, 0.5], len(hidden))]
    found = []
    for cut in ({"chunk_rows": rows, "workers": 1}, {"chunk_rows": chunk_rows, "workers": workers}):
        net = mc.MLP(sizes, hidden, dtype=dtype, seed=seed)
        net.parameters[...] *= 0.5
        one = mc.Trainer(net, "squared_error", mc.SGD(1e-3), dropout=rates, seed=seed, **cut)
        J = [one.step(X, Y, rows=index) for _ in range(3)]
        found.append(np.array([*J, *one._step.gradient]))
    epsilon = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(
        found[1], found[0], rtol=0, atol=1000 * epsilon * (1 + abs(found[0]).max())
    )


def test_steps_seeds_and_layers_have_masks_of_their_own_and_a_row_has_its_place_in_the_batch():
    one = trainer(network(sizes=[5, 16, 16, 3]))
    first, second = masks(one, 50)
    assert not (first > 0).all()
    assert ((first > 0) != (second > 0)).mean() > 0.3
    assert ((first > 0) != (masks(one, 50, step=2)[0] > 0)).mean() > 0.3
    assert ((first > 0) != (masks(trainer(one.net, seed=5), 50)[0] > 0)).mean() > 0.3
    np.testing.assert_array_equal(masks(one, 80)[0][:50], first)  # whatever comes behind
    assert {*np.unique(first)} == {0, 1 / 0.7}
    assert {*np.unique(second)} == {0, 2}


def test_a_run_that_goes_on_has_the_masks_of_one_that_was_never_interrupted(tmp_path):
    X, Y = problem(200)
    whole, first = trainer(network("relu")), trainer(network("relu"))
    losses = [whole.step(X, Y) for _ in range(6)]
    again = [first.step(X, Y) for _ in range(3)]
    first.save(tmp_path / "run.safetensors")
    second = mc.Trainer.load(tmp_path / "run.safetensors", "cpu")
    again += [second.step(X, Y) for _ in range(3)]
    assert again == losses
    assert second._step.problem.settings == first._step.problem.settings


def test_no_dropout_is_a_rate_of_0_to_the_bit():
    X, Y = problem(100, dtype="float32")
    found = []
    for rate in (None, 0, 0.0, [0, 0.0]):
        one = trainer(network("gelu", dtype="float32"), dropout=rate)
        found.append(
            ([one.step(X, Y) for _ in range(3)], one.net.parameters.tobytes(), str(one.plan(100)))
        )
    assert found[1:] == found[:1] * 3


def test_a_layer_with_rate_0_is_left_alone():
    one = trainer(network(), dropout=[0, 0.5])
    assert [
        sigma is one.net.activations[l] for l, sigma in enumerate(one._step.problem.activations)
    ] == [
        True,
        True,
        False,
        True,
    ]


# -- everything else drops nothing -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("hidden", activations.names())
def test_evaluation_and_prediction_drop_nothing_and_leave_the_masks_of_the_next_step(hidden):
    X, Y = problem(300)
    one, other = trainer(network(hidden), chunk_rows=64), trainer(network(hidden), chunk_rows=64)
    plain = trainer(network(hidden), dropout=None)
    for each in (one, other, plain):
        each.net.parameters[...] *= 0.3
    assert one.evaluate(X, Y)["loss"] == pytest.approx(plain.evaluate(X, Y)["loss"], rel=1e-12)
    np.testing.assert_array_equal(one.net.predict(X), plain.net.predict(X))
    assert mc.check_gradients(one.net, X, Y, "squared_error").ok
    assert one.step(X, Y) == other.step(X, Y) != plain.step(X, Y)
    one.evaluate(X, Y)
    assert one.step(X, Y) == other.step(X, Y)


def test_the_expected_output_is_that_without_dropout_and_noise_makes_the_loss_larger():
    """For a net that is linear behind what is dropped."""
    X, Y = problem(2000)
    net = network("tanh", sizes=[5, 9, 3])
    noisy, plain = trainer(net, dropout=0.4), trainer(net, dropout=None)
    J, J0 = [], plain.gradient(X, Y)[0]
    noise = 0.5 * 0.4 / 0.6 * ((net.forward(X).Z[1] ** 2) @ (net.W[2] ** 2)).sum() / len(X)
    for step in range(40):
        noisy.progress.step = step
        J.append(noisy.gradient(X, Y)[0])
    assert np.mean(J) == pytest.approx(J0 + noise, rel=0.01)


def test_fit_with_dropout_learns():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((600, 8))
    Y = (X @ rng.standard_normal((8, 3))).argmax(axis=1)
    one = mc.Trainer(
        mc.MLP([8, 64, 64, 3], "relu", "softmax", seed=0),
        "cross_entropy",
        mc.AdamW(3e-3),
        dropout=0.2,
        seed=1,
    )
    one.fit(X[:500], Y[:500], epochs=15, batch_size=32, progress=False)
    assert one.evaluate(X[500:], Y[500:])["accuracy"] > 0.85


def test_dropout_takes_no_memory_that_the_plan_does_not_list_nor_grows_with_the_batch():
    one, other = (
        trainer(mc.MLP([20, 64, 64, 3], "relu"), chunk_rows=256, workers=1, dropout=rate)
        for rate in ([0.3, 0.5], None)
    )
    more = [one.plan(rows).total_bytes - other.plan(rows).total_bytes for rows in (256, 100_000)]
    assert more[0] == more[1] < 256 << 10


# -- arguments -------------------------------------------------------------------------------------

BAD = {
    "1": (1, ValueError, "dropout must be at least 0 and less than 1; got 1.0"),
    "negative": (-0.1, ValueError, "dropout must be at least 0 and less than 1; got -0.1"),
    "nan": (float("nan"), ValueError, "dropout must be finite"),
    "text": ("0.2", TypeError, "dropout must be a number; got '0.2'"),
    "bool": (True, TypeError, "dropout must be a number; got True"),
    "too few": (
        [0.2],
        ValueError,
        "dropout must be a rate, or 2: one per hidden layer; got 1",
    ),
    "too many": ((0.1, 0.2, 0.3), ValueError, "one per hidden layer; got 3"),
    "one of them": (
        [0.1, 1.5],
        ValueError,
        r"dropout\[1\] must be at least 0 and less than 1; got 1.5",
    ),
    "text in a list": ([0.1, "a"], TypeError, r"dropout\[1\] must be a number; got 'a'"),
    "none in a list": ([None, 0.1], TypeError, r"dropout\[0\] must be a number; got None"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_rate_is_refused_with_what_was_expected_and_what_came(case):
    rate, error, words = BAD[case]
    with pytest.raises(error, match=words):
        trainer(network(), dropout=rate)


def test_a_network_without_hidden_layers_has_nothing_to_drop():
    with pytest.raises(
        ValueError, match=r"dropout=0.2 has nothing to drop: the network has no hidden layer"
    ):
        trainer(network([], sizes=[5, 3]), dropout=0.2)
    trainer(network([], sizes=[5, 3]), dropout=0)
