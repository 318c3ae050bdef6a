"""Every value, slope and curvature of the sheets against mpmath, from ±1e-38 to ±1e38, in both
dtypes: docs/accuracy.md.
"""

import re

import mpmath
import numpy as np
import pytest
from mpmath import mpf

import mlpcore as mc
from bench import accuracy
from bench.accuracy import BOUND, CASES, DTYPES, QUANTITIES
from mlpcore.backends.compiled import compiler
from mlpcore.backends.compiled.ops import CompiledOps
from mlpcore.backends.cuda.eager import CupyReference
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import activations, losses, sheet

CROSS_ENTROPY = losses.pair(losses.CROSS_ENTROPY, activations.SOFTMAX)


def label(case):
    return "-".join(str(x) for x in (case.name, case.parameter, case.y) if x is not None)


def test_the_sweep_leaves_no_row_of_the_sheets_out():
    pairs = [f"{loss} of {output}" for loss, output in sheet.MATCHED]
    assert {case.name for case in CASES} == {
        *activations.names(),
        *losses.names(rowwise=False),
        *pairs,
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_formula_is_right_to_a_few_units_in_the_last_place(case):
    found = {
        (quantity, dtype): accuracy.worst(case, quantity, dtype, accuracy.numpy_door, thin=7)
        for quantity in QUANTITIES
        for dtype in DTYPES
    }
    assert all(ulp <= BOUND for ulp, _ in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.y is None], ids=label)
def test_onnxruntime_computes_the_same_from_an_onnx_file(case):
    pytest.importorskip("onnxruntime")
    ulp, where = accuracy.worst(case, "value", "float32", accuracy.onnx_door, thin=3)
    # its Tanh loses the last 6 bits at 1e-38
    assert ulp <= (64 if case.name == "tanh" else BOUND), where


def test_the_sweep_sees_what_is_wrong():
    """The formulas of 1.0, which lost their digits in the tails."""
    case = accuracy.Case("sigmoid", 1.0)
    by_tanh = mc.Activation("by tanh", "0.5 * tanh(0.5 * s) + 0.5", "1")

    def door(case, quantity, x):
        ops, out = NumpyOps(), np.empty((1, len(x)), x.dtype)
        ops.quietly(ops.bias_activation, x[None].copy(), None, by_tanh, out)
        return out[0]

    for dtype in DTYPES:
        assert accuracy.worst(case, "value", dtype, door, thin=7)[0] > 1000


# -- what users see: numbers worked out by hand ----------------------------------------------------


def one_unit(activation, dtype="float32"):
    """z = σ(x), as a network."""
    net = mc.MLP([1, 1], [], activation, dtype=dtype, init="zeros")
    net.parameters[0] = 1
    return net


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1e-5, 1e-7, 3e-8, 1e-14, 1e-30, 2e-38])
def test_small_probabilities_keep_their_digits(p, dtype):
    net = one_unit("sigmoid", dtype)
    s = np.array([[np.log(p)]], dtype)
    assert net.predict(s)[0, 0] == pytest.approx(
        np.exp(float(s[0, 0])) / (1 + np.exp(float(s[0, 0]))), rel=1e-6
    )


@pytest.mark.parametrize("name", ["silu", "gelu", "mish", "softplus"])
def test_slopes_far_out_are_1_and_0(name):
    net = one_unit(name)
    far = np.array([[1e8], [2e38], [-1e8], [-2e38]], np.float32)
    slopes = net.vjp(far, np.ones((4, 1), np.float32)).X
    np.testing.assert_allclose(slopes[:, 0], [1, 1, 0, 0], rtol=1e-6, atol=1e-37)


def gradient_of_bias(net, loss, s, y):
    """∂J/∂s of one row with s, by a trainer."""
    _, gradient = mc.Trainer(net, loss).gradient(
        np.array([[s]], net.dtype), np.array([[y]], net.dtype)
    )
    return float(gradient[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("loss", "output", "s", "y", "d"),
    [
        ("binary_cross_entropy", "sigmoid", -20.0, 0.0, 2.0611536181902037e-09),
        ("binary_cross_entropy", "sigmoid", 20.0, 1.0, -2.0611536181902037e-09),
        ("binary_cross_entropy", "sigmoid", 60.0, 1.0, -8.75651076269652e-27),
        ("poisson", "softplus", -80.0, 3.0, -3.0),
        ("poisson", "softplus", -500.0, 3.0, -3.0),
        ("poisson", "softplus", -80.0, 0.0, 1.8048513878454153e-35),
    ],
)
def test_gradients_in_the_tails_are_what_they_are_by_hand(loss, output, s, y, d, dtype):
    assert gradient_of_bias(one_unit(output, dtype), loss, s, y) == pytest.approx(d, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("loss", "output", "s", "y", "value", "bend"),
    [
        ("binary_cross_entropy", "sigmoid", 40.0, 1 - 2.0**-10, 40 * 2.0**-10, None),
        ("poisson", "softplus", -80.0, 3.0, 240.0, 1.8048513878454153e-35 * 2.5),
        ("poisson", "softplus", -60.0, 2.0, 120.0, 8.75651076269652e-27 * 2),
        ("log_cosh", "identity", 1e-4, 0.0, 5e-9, 1.0),
        ("log_cosh", "identity", 30.0, 0.0, 29.306852819440055, 4 * np.exp(-60.0)),
    ],
)
def test_losses_and_their_second_derivatives_in_the_tails(loss, output, s, y, value, bend, dtype):
    net = one_unit(output, dtype)
    X, Y = np.array([[s]], dtype), np.array([[y]], dtype)
    figures = mc.Trainer(net, loss).evaluate(X, Y)
    assert figures["loss"] == pytest.approx(value, rel=3e-6 if dtype == "float32" else 1e-7)
    if bend is not None:
        assert net.hvp(X, Y, np.array([0, 1], dtype), loss)[1] == pytest.approx(bend, rel=1e-5)


@pytest.mark.parametrize("q", [0.001, 0.999])
def test_the_quantile_losses_slopes_have_the_digits_of_1_minus_q(q):
    J, G = mc.loss(("quantile", q))(np.array([[1.0]], np.float32), np.array([[0.0]], np.float32))
    assert G[0, 0] == np.float32(1 - q)
    assert pytest.approx(1 - q) == J


# -- softmax with cross-entropy --------------------------------------------------------------------


def by_hand(s, y):
    """ℓ and ∂ℓ/∂s of a row with targets y, to 130 digits."""
    top = int(np.argmax(s))
    e = [mpmath.exp(mpf(float(x)) - mpf(float(s[top]))) for x in s]
    y, total = [mpf(float(x)) for x in y], mpmath.fsum(e)
    logarithm = mpmath.log1p(mpmath.fsum(e[:top] + e[top + 1 :]))
    value = mpmath.fsum(y) * logarithm - mpmath.fsum(
        b * (mpf(float(x)) - mpf(float(s[top]))) for x, b in zip(s, y, strict=True)
    )
    others = [[j for j in range(len(s)) if j != c] for c in range(len(s))]
    return value, [
        mpmath.fsum(e[c] * y[j] - y[c] * e[j] for j in others[c]) / total for c in range(len(s))
    ]


def rows_of_logits(n, dtype, rng):
    """Logits whose differences are exact, so that nothing but the formulas rounds: unsure, sure,
    and far apart.
    """
    near, far, farther = (rng.integers(-reach, reach, (5, n)) / 8 for reach in (8, 300, 3000))
    return np.concatenate(
        [near, far, farther, np.eye(n)[:2] * [[20.0], [60.0]], rng.integers(-1, 2, (2, n)) * 1e38]
    ).astype(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ops",
    [NumpyOps(), CompiledOps(), CupyReference(np)],
    ids=["numpy", "compiled", "reference"],
)
@pytest.mark.parametrize("kind", ["labels", "one-hot", "smoothed"])
@pytest.mark.parametrize("n", [2, 10, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_is_right_where_the_label_is_sure(dtype, n, kind, ops):
    rng = np.random.default_rng(n)
    S = rows_of_logits(n, dtype, rng)
    labels = np.where(np.arange(len(S)) % 2, S.argmax(axis=1), rng.integers(0, n, len(S)))
    hot = np.eye(n, dtype=dtype)[labels]
    targets = {
        "labels": labels,
        "one-hot": hot,
        "smoothed": (hot * 0.875 + 0.125 / n).astype(dtype),
    }[kind]
    # Σ y s overflows in between at 1e38
    for i, s in enumerate(S[: -2 if kind == "smoothed" else None]):
        D, J = np.empty((1, n), dtype), np.zeros(())
        ops.quietly(
            ops.loss,
            s[None].copy(),
            targets[i : i + 1],
            np.asarray(1, dtype),
            CROSS_ENTROPY,
            D,
            None,
            J,
            False,
        )
        y = hot[i] if kind == "labels" else targets[i]
        value, slope = by_hand(s, y)
        eps = np.finfo(dtype).eps
        for found, f, target in zip(
            [dtype_of(J, dtype), *D[0]], [value, *slope], [0, *y], strict=True
        ):
            allowance = (
                2 * float(target) * eps
                if 0 < target < 1
                else 2 * eps * float(abs(value))
                if kind == "smoothed"
                else 0
            )
            assert accuracy.error(found, f, mpf(float(allowance))) <= BOUND, (i, found, f)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sure", [2.0, 20.0, 60.0])
def test_cross_entropys_hessian_is_right_where_the_label_is_sure(sure, dtype):
    net = mc.MLP([1, 3], output="softmax", dtype=dtype, init="zeros")
    net.b[1][...] = [sure, 0, -1]
    v = np.zeros(net.layout.size, dtype)
    v[3:] = [1, 3, -2]
    found = net.hvp(np.zeros((1, 1), dtype), np.array([0]), v, "cross_entropy")[3:]
    e = np.exp([0.0, -sure, -1 - sure])
    p = e / e.sum()
    expected = [
        p[c] * sum(p[j] * (float(v[3 + c]) - float(v[3 + j])) for j in range(3)) for c in range(3)
    ]
    np.testing.assert_allclose(found, expected, rtol=16 * np.finfo(dtype).eps)


def dtype_of(J, dtype):
    return np.dtype(dtype).type(J)


# -- the page --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(bool(compiler.why_not()), reason=compiler.why_not() or "-")
def test_the_page_holds_the_tables_that_the_command_writes():
    text = accuracy.PAGE.read_text()
    found = {"machine": accuracy.machine(), **accuracy.tables(thin=101)}
    renewed = accuracy.written(text, found)

    def structure(page):  # figures, machine and places aside, and widths
        page = re.sub(r"NumPy [^\n]*", "", page)
        return re.sub(r"(?<=\| )[\d.]+( at [-+\de.]+)?(?= \|)", "#", page)

    assert structure(renewed) == structure(text)
    figures = [
        int(figure)
        for part in ("activations", "losses", "compiled activations", "compiled losses")
        for figure in re.findall(r"\| (\d+)\b", _part(text, part))
    ]
    assert len(figures) == 2 * 6 * (
        len(activations.names()) + len(losses.names(rowwise=False)) + len(sheet.MATCHED)
    )
    assert max(figures) <= BOUND


def _part(text, name):
    return text.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]
