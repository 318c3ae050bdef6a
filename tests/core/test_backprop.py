"""The recurrences through whole networks in float64, against derivatives of an independent forward
pass.
"""

import dataclasses

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.core import activations, formulas, losses, sheet
from tests.core.formula_text import NOT_ANALYTIC, value

HIDDEN = activations.names()
LOSSES = losses.names()
OUTPUTS = activations.names(output=True)
ROWS = 7


def _defined(output, loss):
    if loss == "cross_entropy":
        return output in ("softmax", "log_softmax")
    if loss == "poisson":
        return output in ("exp", "softplus")
    return loss != "binary_cross_entropy" or output == "sigmoid"


PAIRS = [(output, loss) for loss in LOSSES for output in OUTPUTS if _defined(output, loss)]
FIRST_OUTPUT = {loss: next(o for o, other in PAIRS if other == loss) for loss in LOSSES}

# -- an independent forward pass: the sheets' text, on real or complex numbers ---------------------


def through(activation, s):
    if activation.rowwise:
        s = s - s.real.max(axis=1, keepdims=True)
        e = np.exp(s)
        total = e.sum(axis=1, keepdims=True)
        return s - np.log(total) if activation.name == "log_softmax" else e / total
    learned = {} if activation.a is None else {"a": activation.a}
    return value(activation.value, s=s, **activation.scalars, **learned)


def forward(net, theta, X):
    """Z[L], and every pre-activation."""
    W, b = net.layout.views(theta)
    bound = activations.bind(net.activations, net.layout.slopes(theta))
    Z, S = X, []
    for l in range(1, len(W)):
        S.append(Z @ W[l] + (0 if b[l] is None else b[l]))
        Z = through(bound[l], S[-1])
    return Z, S


def row_losses(loss, Z, Y):
    if loss.name == "cross_entropy":
        log_p = Z if (Z.real < 0).all() else np.log(Z)  # of log_softmax, of softmax
        return -log_p[np.arange(len(Y)), Y] if Y.ndim == 1 else -(Y * log_p).sum(axis=1)
    own = {} if loss.parameter is None else {"q": loss.parameter}
    return (value(loss.value, z=Z, y=Y.reshape(Z.shape), **own) + 0 * Z).sum(axis=1)


def plain_J(net, theta, X, Y, loss, w):
    return (w * row_losses(losses.resolve(loss), forward(net, theta, X)[0], Y)).sum() / w.sum()


def derivative(f, x, v, analytic):
    """Return the derivative of f at x along v, by a complex step or a fourth-order difference."""
    if analytic:
        return f(x + 1e-30j * v).imag / 1e-30
    h = 3e-4
    return (8 * (f(x + h * v) - f(x - h * v)) - (f(x + 2 * h * v) - f(x - 2 * h * v))) / (12 * h)


def texts(net, loss=None):
    found = [a.value for a in net.activations[1:]]
    return found if loss is None else [*found, losses.resolve(loss).value]


def analytic(net, loss=None):
    return not any(word in text for text in texts(net, loss) for word in NOT_ANALYTIC)


def targets(loss, rows, outputs, rng):
    if loss == "cross_entropy":
        return rng.integers(0, outputs, rows)
    if loss == "poisson":
        return rng.integers(0, 5, (rows, outputs)).astype(float)
    if loss == "binary_cross_entropy":
        return rng.choice([0.0, 0.25, 1.0], (rows, outputs))
    return rng.standard_normal((rows, outputs))


def far_from_kinks(net, X, Y, loss):
    """Return True if no row is so near a kink that a difference could step over it."""
    Z, S = forward(net, net.parameters, X)
    near = [np.min(abs(value(kink, s=s, **a.scalars))) for a,
        s in zip(net.activations[1:], S, strict=True)
            if a.value for kink in formulas.kinks(a.value)]  # fmt: skip
    loss = losses.resolve(loss)
    own = {} if loss.parameter is None else {"q": loss.parameter}
    near += [
        np.min(abs(value(k, z=Z, y=Y.reshape(Z.shape), **own)))
        for k in (formulas.kinks(loss.value) if loss.value else [])
    ]
    return min(near, default=1.0) > 4e-3


def case(sizes, hidden, output, loss, bias=True, rows=ROWS):
    """A network with data on which it has a derivative; two of its rows weigh nothing."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        net = mc.MLP(sizes, hidden, output, bias=bias, dtype="float64", init="glorot", seed=seed)
        net.parameters[...] += 0.1 * rng.standard_normal(net.layout.size)
        X, Y = rng.standard_normal((rows, sizes[0])), targets(loss, rows, sizes[-1], rng)
        if far_from_kinks(net, X, Y, loss):
            w = rng.uniform(0.5, 2, rows)
            w[[0, -2]] = 0
            return net, X, Y, w, rng
    raise AssertionError("no such data")


def engine(net, X, Y, loss, w=None, **settings):
    """J and the gradient that a training step computes: a step of rate 1 subtracts it."""
    copy = net.copy()
    J = mc.Trainer(copy, loss=loss, optimizer=mc.SGD(1.0), **settings).step(X, Y, w)
    return J, net.parameters.astype(np.float64) - copy.parameters


def assert_gradient(net, X, Y, loss, w, g):
    exact = analytic(net, loss)
    directions = (
        np.eye(net.layout.size)
        if net.layout.size <= 60
        else np.random.default_rng(1).standard_normal((20, net.layout.size))
    )
    numeric = [
        derivative(lambda t: plain_J(net, t, X, Y, loss, w), net.parameters, v, exact)
        for v in directions
    ]
    np.testing.assert_allclose(
        directions @ g,
        numeric,
        rtol=1e-9 if exact else 1e-7,
        atol=(1e-12 if exact else 1e-9) * (1 + abs(g).max()),
    )


# -- every pair ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_j_and_gradient_are_right_for_every_hidden_activation_under_every_loss(hidden, loss):
    net, X, Y, w, _ = case([3, 4, 3], hidden, FIRST_OUTPUT[loss], loss)
    J, g = engine(net, X, Y, loss, w, chunk_rows=3)
    np.testing.assert_allclose(J, plain_J(net, net.parameters, X, Y, loss, w), rtol=1e-12)
    assert_gradient(net, X, Y, loss, w, g)


@pytest.mark.parametrize(("output", "loss"), PAIRS)
def test_j_and_gradient_are_right_for_every_output_activation_under_every_loss_defined_on_it(
    output, loss
):
    net, X, Y, w, _ = case([3, 4, 2], ["tanh"], output, loss)
    J, g = engine(net, X, Y, loss, w)
    np.testing.assert_allclose(J, plain_J(net, net.parameters, X, Y, loss, w), rtol=1e-12)
    assert_gradient(net, X, Y, loss, w, g)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_gradient_check_agrees_on_every_hidden_activation_under_every_loss(hidden, loss):
    net, X, Y, w, _ = case([3, 4, 3], hidden, FIRST_OUTPUT[loss], loss)
    check = mc.check_gradients(net, X, Y, loss, sample_weight=w)
    assert check.ok, str(check)
    assert check.rows_left_out <= 1


@pytest.mark.parametrize("parameter", [0.3, 2.5])
@pytest.mark.parametrize("name", ["sigmoid", "leaky_relu", "elu"])
def test_a_parameter_of_an_activation_counts_in_value_and_slope(name, parameter):
    loss = "squared_error"
    net, X, Y, w, _ = case([3, 4, 4, 2], [(name, parameter), name], (name, parameter), loss)
    assert_gradient(net, X, Y, loss, w, engine(net, X, Y, loss, w)[1])


@pytest.mark.parametrize("a", [0.5, 3.0])
def test_the_sigmoids_slope_counts_where_the_loss_matches_it(a):
    net, X, Y, w, _ = case([3, 4, 2], "tanh", ("sigmoid", a), "binary_cross_entropy")
    assert_gradient(
        net, X, Y, "binary_cross_entropy", w, engine(net, X, Y, "binary_cross_entropy", w)[1]
    )


@pytest.mark.parametrize(
    "loss", [("huber", 0.3), ("huber", 2.0), ("quantile", 0.1), ("quantile", 0.9)]
)
def test_a_parameter_of_a_loss_counts_in_value_and_slope(loss):
    net, X, Y, w, _ = case([3, 4, 2], "tanh", "identity", loss)
    J, g = engine(net, X, Y, loss, w)
    np.testing.assert_allclose(J, plain_J(net, net.parameters, X, Y, loss, w), rtol=1e-12)
    assert_gradient(net, X, Y, loss, w, g)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("L", [1, 2, 3, 4, 5])
def test_layers_with_activations_of_their_own_with_and_without_bias(L, bias):
    hidden = ["tanh", "gelu", ("sigmoid", 2.0), "leaky_relu"][: L - 1]
    for output, loss in (
        ("identity", "squared_error"),
        ("softmax", "cross_entropy"),
        ("mish", "squared_error"),
    ):
        net, X, Y, w, _ = case([*[3, 4, 5, 3, 4, 2][:L], 2], hidden, output, loss, bias)
        assert_gradient(net, X, Y, loss, w, engine(net, X, Y, loss, w, chunk_rows=4)[1])


def test_soft_and_one_hot_targets_of_cross_entropy():
    net, X, Y, w, rng = case([3, 4, 3], "tanh", "softmax", "cross_entropy")
    hot = np.eye(3)[Y]
    for one, other in zip(
        engine(net, X, Y, "cross_entropy", w), engine(net, X, hot, "cross_entropy", w), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-15)
    soft = rng.dirichlet(np.ones(3), ROWS)
    for Y_ in (soft, soft * rng.uniform(0.5, 2, (ROWS, 1))):  # the formula needs no sum of 1
        J, g = engine(net, X, Y_, "cross_entropy", w)
        np.testing.assert_allclose(
            J, plain_J(net, net.parameters, X, Y_, "cross_entropy", w), rtol=1e-12
        )
        assert_gradient(net, X, Y_, "cross_entropy", w, g)


@pytest.mark.parametrize("classes", [2, 64, 65, 200])
def test_cross_entropy_over_few_and_many_classes(classes):
    """Up to 64 classes work on the transpose."""
    rng = np.random.default_rng(classes)
    net = mc.MLP([3, classes], output="softmax", dtype="float64")
    X, Y, w = rng.standard_normal((9, 3)), rng.integers(0, classes, 9), rng.uniform(0, 1, 9)
    Y[:2] = 0, classes - 1
    Z = forward(net, net.parameters, X)[0]
    D = w[:, None] / w.sum() * (Z - np.eye(classes)[Y])
    for targets_ in (Y, np.eye(classes)[Y]):
        J, g = engine(net, X, targets_, "cross_entropy", w, chunk_rows=4)
        np.testing.assert_allclose(
            J, plain_J(net, net.parameters, X, Y, "cross_entropy", w), rtol=1e-12
        )
        np.testing.assert_allclose(
            g, np.concatenate([(X.T @ D).ravel(), D.sum(axis=0)]), rtol=1e-10, atol=1e-14
        )


def test_a_user_s_activation_and_loss_have_right_gradients_too():
    cubic = mc.Activation("cubic", "a * s * s * s + s", "3 * a * s * s + 1", 0.2)
    quartic = mc.Loss(
        "quartic",
        "q * (z - y) * (z - y) * (z - y) * (z - y)",
        "4 * q * (z - y) * (z - y) * (z - y)",
        0.7,
    )
    net, X, Y, w, _ = case([3, 4, 4, 2], [cubic, "tanh"], cubic, quartic)
    assert_gradient(net, X, Y, quartic, w, engine(net, X, Y, quartic, w)[1])


@pytest.mark.parametrize(("output", "loss"), PAIRS)
def test_float32_agrees_with_float64(output, loss):
    net, X, Y, w, _ = case([5, 8, 8, 3], ["gelu", "relu"], output, loss, rows=40)
    X = X.astype(np.float32).astype(np.float64)
    J, g = engine(net, X, Y, loss, w)
    narrow = mc.MLP([5, 8, 8, 3], ["gelu", "relu"], output, init="zeros")
    narrow.parameters[...] = net.parameters
    J32, g32 = engine(narrow, X.astype(np.float32), Y, loss, w)
    np.testing.assert_allclose(J32, J, rtol=2e-6)
    np.testing.assert_allclose(
        g32, g, rtol=0, atol=1e-5 * abs(g).max() + 2e-7 * abs(net.parameters).max()
    )


# -- backward with any G ---------------------------------------------------------------------------


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("hidden", ["tanh", "relu", "mish"])
def test_backward_is_the_transpose_of_the_derivative_for_any_g(hidden, output):
    """⟨V, dZ(θ) v⟩ = ⟨backward(V), v⟩, and likewise for X."""
    net, X, _, _, rng = case([3, 4, 4, 3], [hidden, "sigmoid"], output, "squared_error")
    V, v, u = (
        rng.standard_normal((ROWS, 3)),
        rng.standard_normal(net.layout.size),
        rng.standard_normal(X.shape),
    )
    grad = net.backward(net.forward(X), V, input_gradient=True)
    along = derivative(
        lambda t: (V * forward(net, t, X)[0]).sum(), net.parameters, v, analytic(net)
    )
    np.testing.assert_allclose(grad.flat @ v, along, rtol=1e-8)
    along = derivative(
        lambda x: (V * forward(net, net.parameters, x)[0]).sum(), X, u, analytic(net)
    )
    np.testing.assert_allclose((grad.X * u).sum(), along, rtol=1e-8)


def test_the_input_gradient_entry_by_entry():
    net, X, _, _, rng = case([3, 5, 2], "gelu", "softmax", "squared_error")
    V = rng.standard_normal((ROWS, 2))
    G0 = net.backward(net.forward(X), V, input_gradient=True).X
    for i, j in np.ndindex(*X.shape):
        unit = np.zeros(X.shape)
        unit[i, j] = 1
        numeric = derivative(
            lambda x: (V * forward(net, net.parameters, x)[0]).sum(), X, unit, True
        )
        assert G0[i, j] == pytest.approx(numeric, rel=1e-10, abs=1e-14)


def test_behind_a_softmax_output_its_jacobian_is_applied():
    net = mc.MLP([3, 3], output="softmax", bias=False, dtype="float64")
    net.W[1][...] = np.eye(3)
    X, V = np.random.default_rng(0).standard_normal((2, 5, 3))
    Z = net.forward(X).output
    expected = [(np.diag(z) - np.outer(z, z)) @ g for z, g in zip(Z, V, strict=True)]
    np.testing.assert_allclose(
        net.backward(net.forward(X), V, input_gradient=True).X, expected, rtol=1e-12, atol=1e-16
    )


@pytest.mark.parametrize("output", ["identity", "sigmoid", "gelu", "softmax"])
@pytest.mark.parametrize("bias", [True, False])
def test_kept_d_and_g_satisfy_the_recurrences(output, bias):
    net, X, _, _, rng = case([3, 4, 5, 2], ["tanh", "silu"], output, "squared_error", bias)
    V, cache = rng.standard_normal((ROWS, 2)), net.forward(X)
    grad = net.backward(cache, V, keep=True)
    _, S = forward(net, net.parameters, X)
    assert len(grad.D) == len(grad.G) == 4
    assert grad.D[0] is None
    np.testing.assert_array_equal(grad.G[3], V)
    for l in (3, 2, 1):
        Z, activation = cache.Z[l], net.activations[l]
        if activation.name == "softmax":
            D = Z * (grad.G[l] - (grad.G[l] * Z).sum(axis=1, keepdims=True))
        else:
            D = grad.G[l] * value(activation.slope, s=S[l - 1], z=Z, **activation.scalars)
        np.testing.assert_allclose(grad.D[l], D, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(grad.G[l - 1], grad.D[l] @ net.W[l].T, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(grad.W[l], cache.Z[l - 1].T @ grad.D[l], rtol=1e-12, atol=1e-15)
        if bias:
            np.testing.assert_allclose(grad.b[l], grad.D[l].sum(axis=0), rtol=1e-12, atol=1e-15)
        else:
            assert grad.b[l] is None
        assert np.shares_memory(grad.W[l], grad.flat)


def test_what_is_not_asked_for_is_not_handed_out_and_what_is_does_not_depend_on_it():
    net, X, _, _, rng = case([3, 4, 2], "gelu", "softmax", "squared_error")
    V, cache = rng.standard_normal((ROWS, 2)), net.forward(X)
    plain, kept = net.backward(cache, V), net.backward(cache, V, keep=True, input_gradient=True)
    assert plain.X is plain.D is plain.G is None
    assert net.backward(cache, V, keep=True).X is None
    np.testing.assert_array_equal(plain.flat, kept.flat)
    np.testing.assert_array_equal(kept.X, kept.G[0])


@pytest.mark.parametrize("output", ["identity", "exp", "gelu", "softmax"])
@pytest.mark.parametrize("keep", [True, False])
def test_backward_changes_neither_g_nor_the_cache_nor_the_network(output, keep):
    net, X, _, _, rng = case([3, 4, 4, 2], ["gelu", "identity"], output, "squared_error")
    V, cache = rng.standard_normal((ROWS, 2)), net.forward(X)
    arrays = [V, X, net.parameters, *cache.Z, *(s for s in cache.S if s is not None)]
    before = [array.copy() for array in arrays]
    first = net.backward(cache, V, keep=keep, input_gradient=True).flat
    for array, was in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, was)
    np.testing.assert_array_equal(
        net.backward(cache, V, keep=keep, input_gradient=True).flat, first
    )


def test_g_may_be_of_another_type_order_or_a_list():
    net, X, _, _, rng = case([3, 4, 2], "tanh", "identity", "squared_error")
    V, cache = rng.integers(-3, 4, (ROWS, 2)).astype(np.float64), net.forward(X)
    expected = net.backward(cache, V).flat
    for G in (
        V.astype(np.float32),
        V.astype(np.int8),
        V.tolist(),
        np.asfortranarray(V),
        np.repeat(V, 2, axis=0)[::2],
    ):
        np.testing.assert_array_equal(net.backward(cache, G).flat, expected)


def test_the_cache_holds_s_only_where_a_slope_reads_it_and_counts_its_bytes():
    net = mc.MLP([3, 4, 5, 2], ["gelu", "tanh"], dtype="float64")
    cache = net.forward(np.ones((6, 3)))
    assert [s is not None for s in cache.S] == [False, True, False, False]
    assert cache.nbytes == 6 * (4 + 4 + 5 + 2) * 8
    assert cache.output is cache.Z[3]
    _, S = forward(net, net.parameters, np.ones((6, 3)))
    np.testing.assert_allclose(cache.S[1], S[0], rtol=1e-14)


# -- matched pairs ---------------------------------------------------------------------------------

MATCHED = [*sheet.MATCHED, ("cross_entropy", "softmax")]


@pytest.mark.parametrize("a", [1.0, 2.0])
@pytest.mark.parametrize(("loss", "output"), MATCHED)
def test_a_matched_pair_equals_the_way_through_g(loss, output, a):
    spec = (output, a) if output == "sigmoid" else output
    net, X, Y, w, _ = case([3, 4, 3], "tanh", spec, loss)
    J, g = engine(net, X, Y, loss, w)
    cache = net.forward(X)
    J_by_G, G = mc.loss(loss)(cache.output, Y, sample_weight=w)
    np.testing.assert_allclose(J, J_by_G, rtol=1e-12)
    np.testing.assert_allclose(g, net.backward(cache, G).flat, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("loss", "output", "s", "Y", "J", "D"),
    [
        ("binary_cross_entropy", "sigmoid", [-1e4], [[1.0]], 1e4, [-1.0]),
        ("binary_cross_entropy", "sigmoid", [1e4], [[0.0]], 1e4, [1.0]),
        ("binary_cross_entropy", ("sigmoid", 2.0), [1e4], [[0.0]], 2e4, [2.0]),
        ("cross_entropy", "softmax", [1e4, -1e4, 0.0], [1], 2e4, [1.0, -1.0, 0.0]),
        ("cross_entropy", "softmax", [-1e4, -1e4, -1e4], [0], np.log(3), [-2 / 3, 1 / 3, 1 / 3]),
        ("poisson", "exp", [-1e4], [[3.0]], 3e4, [-3.0]),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_matched_pair_is_right_and_finite_at_pre_activations_of_ten_thousand(
    loss, output, s, Y, J, D, dtype
):
    n = len(s)
    net = mc.MLP([1, n], output=output, dtype=dtype)
    net.parameters[...] = [*s, *[0.0] * n]
    with np.errstate(all="raise", under="ignore"):
        found, g = engine(net, np.ones((1, 1)), np.array(Y), loss)
    tolerance = 1e-6 if dtype == "float32" else 1e-12
    assert found == pytest.approx(J, rel=tolerance)
    np.testing.assert_allclose(g[n:], D, atol=tolerance)


@pytest.mark.parametrize(("loss", "output", "s", "Y"), [
    ("binary_cross_entropy", "sigmoid", [-1e4], [[1.0]]),
    ("cross_entropy", "softmax", [1e4, -1e4], [1]),
])  # fmt: skip
def test_where_a_matched_pair_is_right_the_way_through_g_is_not(loss, output, s, Y):
    """Why the pairs exist: from a saturated output neither the loss nor its slope can be had."""
    net = mc.MLP([1, len(s)], output=output, dtype="float64")
    net.parameters[...] = [*s, *[0.0] * len(s)]
    cache = net.forward(np.ones((1, 1)))
    J, G = mc.loss(loss)(cache.output, np.array(Y))
    assert not J > 5e3
    assert not abs(net.backward(cache, G).flat).max() > 0.5


@pytest.mark.parametrize(
    ("loss", "output"),
    [("cross_entropy", "softmax"), ("binary_cross_entropy", "sigmoid"), ("huber", "tanh")],
)
@pytest.mark.parametrize("one_hot", [False, True])
def test_a_loss_of_limited_value_has_the_gradient_of_the_loss_without_a_limit(
    loss, output, one_hot
):
    rng = np.random.default_rng(5)
    X, labels = 9 * rng.standard_normal((40, 3)), rng.integers(0, 3, 40)
    Y = labels if loss == "cross_entropy" and not one_hot else np.eye(3)[labels]
    found = []
    for most in (None, 0.7):
        net = mc.MLP([3, 3], output=output, dtype="float64", seed=1, device="cpu")
        limited = dataclasses.replace(mc.loss(loss).loss, most=most)
        J, gradient = mc.Trainer(net, limited).gradient(X, Y)
        rows = [mc.Trainer(net, limited).gradient(X[i : i + 1], Y[i : i + 1])[0] for i in range(40)]
        found.append((J, gradient.copy(), rows))
    (_, free, rows), (J, limited, limited_rows) = found
    np.testing.assert_array_equal(free, limited)
    if loss == "cross_entropy":
        np.testing.assert_allclose(limited_rows, np.minimum(rows, 0.7), rtol=1e-12)
    assert max(limited_rows) <= 2.1
    np.testing.assert_allclose(J, np.mean(limited_rows), rtol=1e-12)
    assert 0.9 * found[0][0] > J
