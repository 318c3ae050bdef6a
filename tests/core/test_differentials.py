"""Products with Jacobian and Hessian in float64, against derivatives of an independent forward
pass.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.core import activations, formulas

plain = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "test_backprop.py")))
ROWS = plain.ROWS


def learned(how):
    """An activation whose derivatives by s, by a and by both differ from one another and from 0."""
    return mc.Activation(
        "bent",
        "tanh(a * s) + a * a * s",
        "a * (1 - tanh(a * s) * tanh(a * s)) + a * a",
        0.7,
        learned=how,
    )


NETS = [
    ([3, 5, 4, 3], ["tanh", "gelu"], "identity", {}),
    ([3, 4, 3, 2], ["sigmoid", "elu"], "softmax", {}),
    ([3, 4, 4, 2], ["mish", "softplus"], "sigmoid", {"bias": False}),
    ([4, 3, 3, 4], ["tanh", "silu"], "identity", {"tied": {3: "1.T"}}),
    ([3, 3, 3, 3], ["tanh", ("sigmoid", 2.0)], "softmax", {"tied": {3: 1, 2: "1.T"}}),
    ([2, 3], [], "tanh", {}),
    ([3, 4, 3], ["softplus"], "log_softmax", {}),
    ([3, 4, 3, 2], [learned("per output"), learned("per layer")], "identity", {}),
    ([3, 4, 4, 3], ["tanh", learned("per output")], "softmax", {"bias": False}),
    ([4, 3, 4], [learned("per layer")], learned("per output"), {"tied": {2: "1.T"}}),
]


def net_of(sizes, hidden, output, settings, seed=0):
    net = mc.MLP(sizes, hidden, output, dtype="float64", seed=seed, **settings)
    net.parameters[...] += 0.2 * np.random.default_rng(seed).standard_normal(net.layout.size)
    return net


@pytest.fixture(
    params=range(len(NETS)), ids=[f"{sizes}-{output}-{more}" for sizes, _, output, more in NETS]
)
def net(request):
    return net_of(*NETS[request.param])


def smooth(name):
    return not any(
        word in activations.resolve(name, output=True).value
        for word in ("maximum", "minimum", "abs")
    )


# -- forward mode ----------------------------------------------------------------------------------


def test_jvp_is_the_derivative_along_a_direction(net):
    rng = np.random.default_rng(1)
    X, dX = rng.standard_normal((2, ROWS, net.sizes[0]))
    v = rng.standard_normal(net.layout.size)

    for by_X, by_parameters in ((1, 0), (0, 1), (1, 1)):

        def moved(t, by_X=by_X, by_parameters=by_parameters):
            return plain.forward(net, net.parameters + t * by_parameters * v, X + t * by_X * dX)[0]

        output, tangent = net.jvp(X, dX if by_X else None, v if by_parameters else None)
        np.testing.assert_allclose(output, net.predict(X), rtol=1e-14)
        exact = plain.derivative(moved, np.zeros(()), 1.0, plain.analytic(net))
        np.testing.assert_allclose(tangent, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 3, None])
def test_the_dot_product_test(net, chunk_rows):
    """⟨V, J u⟩ = ⟨Jᵀ V, u⟩ to rounding: no step size is involved."""
    rng = np.random.default_rng(2)
    X, dX, V = (rng.standard_normal((ROWS, n)) for n in (net.sizes[0], net.sizes[0], net.sizes[-1]))
    v = rng.standard_normal(net.layout.size)
    tangent = net.jvp(X, dX, v, chunk_rows=chunk_rows).tangent
    parameters, by_X = net.vjp(X, V, chunk_rows=chunk_rows)
    np.testing.assert_allclose(np.sum(V * tangent), parameters @ v + np.sum(by_X * dX), rtol=1e-12)


def test_vjp_is_backward(net):
    rng = np.random.default_rng(3)
    X, V = rng.standard_normal((ROWS, net.sizes[0])), rng.standard_normal((ROWS, net.sizes[-1]))
    parameters, by_X = net.vjp(X, V, chunk_rows=2)
    grad = net.backward(net.forward(X), V, input_gradient=True)
    np.testing.assert_allclose(parameters, grad.flat, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(by_X, grad.X, rtol=1e-12, atol=1e-14)


# -- the gradient of a loss that contains a jvp ----------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [2, None])
def test_the_gradient_of_a_function_of_output_and_tangent(net, chunk_rows):
    rng = np.random.default_rng(4)
    X, dX, V, dV = (
        rng.standard_normal((ROWS, n))
        for n in (net.sizes[0], net.sizes[0], net.sizes[-1], net.sizes[-1])
    )
    v, u = rng.standard_normal(net.layout.size), rng.standard_normal(X.shape)
    copy = net.copy()

    def value(t):
        copy.parameters[...] = net.parameters + t * v
        output, tangent = copy.jvp(X + t * u, dX)
        return np.sum(V * output) + np.sum(dV * tangent)

    parameters, by_X = net.vjp(X, V, dX=dX, dV=dV, chunk_rows=chunk_rows)
    numeric = plain.derivative(value, 0.0, 1.0, False)
    np.testing.assert_allclose(parameters @ v + np.sum(by_X * u), numeric, rtol=1e-8)


# -- second order ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("output", "loss"), plain.PAIRS)
def test_hvp_is_the_derivative_of_the_gradient(output, loss):
    hidden = ["tanh", "gelu"]
    net, X, Y, w, rng = plain.case([3, 4, 4, 3], hidden, output, loss)
    v, copy = rng.standard_normal(net.layout.size), net.copy()

    def gradient(t):
        copy.parameters[...] = net.parameters + t * v
        return plain.engine(copy, X, Y, loss, w)[1]

    numeric = plain.derivative(gradient, 0.0, 1.0, False)
    product = net.hvp(X, Y, v, loss, sample_weight=w, chunk_rows=3)
    np.testing.assert_allclose(
        product, numeric, rtol=1e-6, atol=1e-7 * max(1e-3, abs(numeric).max())
    )


@pytest.mark.parametrize("hidden", plain.HIDDEN)
def test_hvp_through_every_activation(hidden):
    net, X, Y, w, rng = plain.case([3, 5, 4, 2], [hidden, hidden], "identity", "squared_error")
    v, copy = rng.standard_normal(net.layout.size), net.copy()

    def gradient(t):
        copy.parameters[...] = net.parameters + t * v
        return plain.engine(copy, X, Y, "squared_error", w)[1]

    numeric = plain.derivative(gradient, 0.0, 1.0, False)
    product = net.hvp(X, Y, v, sample_weight=w)
    np.testing.assert_allclose(product, numeric, rtol=1e-6, atol=1e-7 * abs(numeric).max())


def test_the_hessian_is_symmetric_whatever_the_chunks(net):
    rng = np.random.default_rng(5)
    X, Y = rng.standard_normal((ROWS, net.sizes[0])), rng.standard_normal((ROWS, net.sizes[-1]))
    u, v = rng.standard_normal((2, net.layout.size))
    Hv, Hu = (net.hvp(X, Y, direction, "squared_error") for direction in (v, u))
    np.testing.assert_allclose(u @ Hv, v @ Hu, rtol=1e-11)
    np.testing.assert_allclose(
        net.hvp(X, Y, v, chunk_rows=2), Hv, rtol=1e-11, atol=1e-13 * abs(Hv).max()
    )


def test_gnvp_is_the_jacobian_twice_with_the_losss_curvature_between(net):
    rng = np.random.default_rng(6)
    X, Y = rng.standard_normal((ROWS, net.sizes[0])), rng.standard_normal((ROWS, net.sizes[-1]))
    w, v = rng.uniform(0, 1, ROWS), rng.standard_normal(net.layout.size)
    tangent = net.jvp(X, None, v).tangent
    _, G = mc.loss("squared_error")(np.zeros((1, net.sizes[-1])), np.ones((1, net.sizes[-1])))
    curvature = -G[0, 0]  # of one row is the loss's second derivative
    expected = net.vjp(X, curvature * tangent * (w / w.sum())[:, None]).parameters
    np.testing.assert_allclose(
        net.gnvp(X, Y, v, "squared_error", sample_weight=w), expected, rtol=1e-11, atol=1e-14
    )


@pytest.mark.parametrize(
    ("output", "loss"),
    [
        ("softmax", "cross_entropy"),
        ("log_softmax", "cross_entropy"),
        ("sigmoid", "binary_cross_entropy"),
        ("exp", "poisson"),
    ],
)
def test_of_one_layer_under_a_matched_loss_gauss_newton_is_the_hessian(output, loss):
    net, X, Y, w, rng = plain.case([4, 3], [], output, loss)
    v = rng.standard_normal(net.layout.size)
    np.testing.assert_allclose(
        net.gnvp(X, Y, v, loss, sample_weight=w, chunk_rows=2),
        net.hvp(X, Y, v, loss, sample_weight=w),
        rtol=1e-11,
        atol=1e-15,
    )
    assert v @ net.gnvp(X, Y, v, loss) > 0


def test_soft_targets_and_labels_have_one_hessian():
    net, X, Y, _, rng = plain.case([4, 5, 3], ["tanh"], "softmax", "cross_entropy")
    v = rng.standard_normal(net.layout.size)
    hot = np.eye(3)[Y]
    for product in (net.hvp, net.gnvp):
        np.testing.assert_allclose(
            product(X, hot, v, "cross_entropy"),
            product(X, Y, v, "cross_entropy"),
            rtol=1e-11,
            atol=1e-15,
        )


def test_float32_agrees_with_float64_and_other_dtypes_go_in(net):
    rng = np.random.default_rng(7)
    X, Y = rng.standard_normal((ROWS, net.sizes[0])), rng.standard_normal((ROWS, net.sizes[-1]))
    v = rng.standard_normal(net.layout.size)
    narrow = net.copy("float32")
    product = narrow.hvp(X.astype(">f4"), Y, v)
    assert product.dtype == np.float32
    exact = net.hvp(X, Y, v)
    np.testing.assert_allclose(product, exact, atol=3e-5 * abs(exact).max())


def test_the_network_and_the_arguments_stay_as_they_are(net):
    rng = np.random.default_rng(8)
    X, Y = rng.standard_normal((ROWS, net.sizes[0])), rng.standard_normal((ROWS, net.sizes[-1]))
    v = rng.standard_normal(net.layout.size)
    kept = [array.copy() for array in (X, Y, v, net.parameters)]
    net.jvp(X, X, v)
    net.vjp(X, Y, dX=X, dV=Y)
    net.hvp(X, Y, v)
    net.gnvp(X, Y, v)
    for array, before in zip((X, Y, v, net.parameters), kept, strict=True):
        np.testing.assert_array_equal(array, before)


# -- σ'' -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", plain.HIDDEN)
def test_the_curvature_of_a_row_is_the_slope_of_its_slope(name):
    activation = activations.resolve(name)
    own = activation.scalars
    for s in (-2.3, -0.7, 0.4, 1.9):

        def slope(x):
            return formulas.evaluate_scalar(
                activation.slope,
                s=x,
                z=formulas.evaluate_scalar(activation.value, s=x, **own),
                **own,
            )

        z = formulas.evaluate_scalar(activation.value, s=s, **own)
        numeric = plain.derivative(slope, s, 1.0, False)
        assert formulas.evaluate_scalar(activation.curvature, s=s, z=z, **own) == pytest.approx(
            numeric, rel=1e-8, abs=1e-9
        )


@pytest.mark.parametrize(
    "text",
    ["s * s * s", "1 / (1 + s * s)", "exp(-s) * log(s)", "log1p(s) / sqrt(s)",
        "abs(s - 2) * expm1(s)", "-(3 - s) * 0.5",
     "maximum(s * s, 1) * minimum(s, 3 - s)", "tanh(s) - s", "sign(s) * positive(s) * s", "7",
     "sin(s) * cos(2 * s)", "erf(s) - erfc(s / 2) ** 2", "normcdf(s) * normpdf(2 * s)",
     "s ** 5 + s ** -3 - s ** 1 * s ** 0",
     "(3 - s) ** -8 + s ** 16", "-s ** 2"],
)  # fmt: skip
def test_formulas_are_differentiated_symbolically(text):
    slope = formulas.differentiate(text, {"s": "1"})
    for s in (0.3, 0.8, 1.7, 2.6):
        numeric = plain.derivative(lambda x: formulas.evaluate_scalar(text, s=x), s, 1.0, False)
        assert formulas.evaluate_scalar(slope, s=s) == pytest.approx(numeric, rel=1e-8, abs=1e-10)


def test_what_is_made_of_straight_lines_has_no_curvature():
    assert [name for name in plain.HIDDEN if activations.resolve(name).curvature == "0"] == [
        "identity", "relu", "relu6", "leaky_relu", "prelu", "hard_tanh",
    ]  # fmt: skip
    assert formulas.differentiate("1 - z * z", {"z": "a"}) == "-(a * z + z * a)"


# -- where pieces of a formula meet ----------------------------------------------------------------

SMOOTH = {  # σ''(0) by hand
    "sigmoid": 0.0, "tanh": 0.0, "softplus": 0.25, "gelu": 2 / np.sqrt(2 * np.pi), "silu": 0.5,
    "mish": 0.64, "exp": 1.0,
}  # fmt: skip
SAME = {  # formulas of a user's that are smooth, their slope, and σ''(0)
    "mish": (
        "s * tanh(maximum(s, 0) + log1p(exp(-abs(s))))",
        "tanh(maximum(s, 0) + log1p(exp(-abs(s)))) + s * (1 - tanh(maximum(s, 0) + "
        "log1p(exp(-abs(s)))) "
        "* tanh(maximum(s, 0) + log1p(exp(-abs(s))))) * (0.5 * tanh(0.5 * s) + 0.5)",
        0.64,
    ),
    "softplus of -s": ("maximum(0, -s) + log1p(exp(-abs(s)))", "-sigmoid(-s)", 0.25),
    "softplus squared": ("softplus(s) * softplus(s)",
        "2 * (maximum(0, s) + log1p(exp(-abs(s)))) * sigmoid(s)",
                         2 * (0.25 + 0.25 * np.log(2))),
    "pieces": ("smooth(abs(s) * s * s * s) + s * s", "smooth(4 * abs(s) * s * s) + 2 * s", 2.0),
}  # fmt: skip


@pytest.mark.parametrize(("name", "bend"), SMOOTH.items())
def test_second_derivatives_of_smooth_rows_are_right_where_pre_activations_are_0(name, bend):
    _check_at_zero(name, bend)


@pytest.mark.parametrize(("value", "slope", "bend"), SAME.values(), ids=SAME)
def test_second_derivatives_of_smooth_formulas_of_a_users_are_right_at_0(value, slope, bend):
    _check_at_zero(mc.Activation("mine", value, slope), bend)


def _check_at_zero(sigma, bend):
    net = mc.MLP([2, 3], [], sigma, dtype="float64", init="zeros")
    net.parameters[:6] = 1.0  # so that dX moves S, whose value is 0
    found = net.vjp(np.zeros((4, 2)), np.zeros((4, 3)), dX=np.full((4, 2), 0.5), dV=np.ones((4, 3)))
    # Σ_rows dV σ'' dS, dS = 1
    np.testing.assert_allclose(found.parameters[6:], 4 * bend, rtol=1e-13, atol=1e-15)
    two = mc.MLP([2, 3, 1], sigma, dtype="float64", init="zeros")
    two.W[2][...], two.b[2][...] = 1.0, 0.0
    Z0 = two.predict(np.zeros((1, 2)))
    v = np.zeros(two.layout.size)
    v[two.layout.size - 4 : two.layout.size - 1] = 1.0  # of b[1]
    product = two.hvp(np.zeros((1, 2)), Z0 - 1.0, v)  # residual 1: H v = J'J v + σ''
    slope = two.vjp(np.zeros((1, 2)), np.ones((1, 1))).parameters[-4:-1]
    np.testing.assert_allclose(product[-4:-1], slope * slope.sum() + bend, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "text", ["maximum(s, 0)", "maximum(0, s)", "abs(s)", "maximum(s, -s)", "minimum(s, 2 * s)"]
)
def test_a_kink_keeps_a_slope_between_those_of_its_sides(text):
    slope = formulas.differentiate(text, {"s": "1"})
    low, high = sorted(formulas.evaluate_scalar(slope, s=s) for s in (-1.0, 1.0))
    assert low <= formulas.evaluate_scalar(slope, s=0.0) <= high
    assert formulas.kinks(text)


def test_smooth_formulas_have_no_kinks():
    for name in SMOOTH:
        assert formulas.kinks(activations.resolve(name).value) == [], name
    assert formulas.kinks("smooth(abs(s) * s)") == []
    assert formulas.kinks("smooth(abs(s)) + positive(s)") == ["(s)"]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, X, Y, v: n.jvp(X), "jvp needs a direction"),
        (lambda n, X, Y, v: n.jvp(X, X[:2]), "dX has 2 rows; X has 4"),
        (lambda n, X, Y, v: n.jvp(X, Y), "dX has 2 columns"),
        (lambda n, X, Y, v: n.jvp(X, None, v[:3]), "dparameters must be flat, shape"),
        (lambda n, X, Y, v: n.vjp(X, X), "V has 3 columns"),
        (lambda n, X, Y, v: n.vjp(X, Y, dX=X), "dV is missing"),
        (lambda n, X, Y, v: n.vjp(X, Y, dV=Y), "dX is missing"),
        (lambda n, X, Y, v: n.hvp(X, Y, v[None]), "v must be flat, shape"),
        (lambda n, X, Y, v: n.hvp(X, Y, v.astype(complex)), "v must hold real numbers"),
        (lambda n, X, Y, v: n.hvp(X, Y, v, "cross_entropy"), "needs output 'softmax'"),
        (lambda n, X, Y, v: n.gnvp(X, Y[:3], v), "Y has 3 rows"),
        (lambda n, X, Y, v: n.gnvp(X, Y, v, chunk_rows=0), "chunk_rows"),
    ],
)
def test_bad_input_is_named(call, message):
    net = mc.MLP([3, 4, 2])
    with pytest.raises((TypeError, ValueError), match=message):
        call(net, np.ones((4, 3)), np.ones((4, 2)), np.ones(net.layout.size))
