"""Every compiled pass against NumPy: all rows of the sheet, awkward shapes, both dtypes.

float32 is compared with NumPy in float64, and float64 with NumPy itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends.compiled import compiler
from mlpcore.backends.compiled.ops import CompiledOps
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import dropout, losses, sheet
from mlpcore.core.activations import Activation
from mlpcore.core.program import program
from tests.backends.cuda.instances import (
    dropped_activations,
    every_activation,
    every_objective,
    learned_activations,
)

pytestmark = pytest.mark.skipif(bool(compiler.why_not()), reason=compiler.why_not() or "-")

DTYPES = ["float32", "float64"]
EVERY = every_activation()
ROWWISE = [sheet.ACTIVATIONS["softmax"], sheet.ACTIVATIONS["log_softmax"]]
of_name = sheet.ACTIVATIONS.__getitem__
# 4096 entries of whole rows, but at least 4 rows, are worked on at a time; sums in tiles of 512
# columns, masks in tiles of 1024
SHAPES = [
    (1, 1), (1, 9), (11, 1), (5, 3), (7, 17), (33, 64), (3, 515), (4, 1030), (130, 33),
    (4095, 1), (4096, 1), (4097, 1), (64, 64), (65, 64), (9, 512), (5, 1024), (5, 511), (2, 1025),
]  # fmt: skip
EXACT = [
    sigma for sigma in EVERY
    if not re.search(r"tanh\(|exp|log|norm|sigmoid|softplus", sigma.value + sigma.slope)
]  # fmt: skip
INF, NAN = np.inf, np.nan
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
numpy_ops = NumpyOps()


class Compiled(CompiledOps):
    """The operations, which fail if NumPy would have to compute a pass."""

    def _pass(self, template, *arguments, **keywords):
        assert super()._pass(template, *arguments, **keywords), template
        return True


compiled_ops = Compiled()


def named(x):
    return getattr(x, "name", str(x))


def rng(*seed):
    return np.random.default_rng(seed)


def do(ops, name, *arguments):
    """Call an operation on copies of its arrays, one of an array given twice; return the copies."""
    copies = {id(x): x.copy() if isinstance(x, np.ndarray) else x for x in arguments}
    ops.quietly(getattr(ops, name), *(copies[id(x)] for x in arguments))
    return [copies[id(x)] for x in arguments]


def wide(x):
    """An array in the dtype of the reference; integers and all else as they are."""
    real = isinstance(x, np.ndarray) and x.dtype.kind == "f"
    return x.astype(np.float64) if real else x


def both(name, *arguments):
    """The arrays after a compiled operation, and after NumPy's in the reference's dtype."""
    copies = {id(x): wide(x) for x in arguments}
    if isinstance(arguments[2], Activation) and arguments[2].a is not None:
        sigma = arguments[2]
        copies[id(sigma)] = sigma.bound(wide(sigma.a), sigma.da)
    return (
        do(compiled_ops, name, *arguments),
        do(numpy_ops, name, *(copies[id(x)] for x in arguments)),
    )


def close(got, want, ulps, scale=0.0):
    """`got` is `want` up to half a unit for its own rounding, and `ulps` of |want| + scale."""
    eps = np.finfo(got.dtype).eps
    with np.errstate(all="ignore"):
        rounded = want.astype(got.dtype)
        bound = eps * (abs(want) * (ulps + 0.5) + ulps * scale) + np.finfo(got.dtype).tiny
        far = ~(abs(got - want) <= bound) & (got != rounded)
    far &= ~(np.isnan(got) & np.isnan(want))
    places = np.argwhere(far)
    assert not far.any(), f"{places[0]} of {len(places)}: {got[far][0]} for {want[far][0]}"


def same_bits(*pairs):
    for got, want in pairs:
        assert got.dtype == want.dtype
        assert got.tobytes() == want.tobytes()


def nothing(shape, dtype):
    """An array whose old entries would show up in every result."""
    return np.full(shape, NAN, dtype)


def normal(random, shape, dtype, scale=1.0):
    return (scale * random.standard_normal(shape)).astype(dtype)


# -- Z = σ(S + b) ----------------------------------------------------------------------------------


def specials(dtype):
    info = np.finfo(dtype)
    some = [0, info.smallest_subnormal, info.tiny, 1e-30, 0.5, 1, 6, 20, 40, 88, 104, 710, 746, 1e8]
    some += [1e30, info.max, INF]
    return np.array([*some, *(-x for x in some), -0.0, NAN, -NAN], dtype)


@by_dtype
@pytest.mark.parametrize("sigma", [*EVERY, *ROWWISE], ids=named)
def test_every_activation_is_numpys_up_to_rounding(sigma, dtype):
    random = rng(1)
    S, b = normal(random, (37, 19), dtype, 3), normal(random, 19, dtype)
    (kept, _, _, Z), (s, _, _, z) = both("bias_activation", S, b, sigma, nothing(S.shape, dtype))
    close(kept, s, 0)
    close(Z, z, 8, 1 + abs(s))


@by_dtype
@pytest.mark.parametrize("sigma", EVERY, ids=named)
def test_infinities_nan_and_zeros_pass_as_in_numpy(sigma, dtype):
    S = specials(dtype)[None]
    no_bias = np.zeros(S.shape[1], dtype)
    got, want = (
        do(ops, "bias_activation", S, no_bias, sigma, nothing(S.shape, dtype))[3]
        for ops in (compiled_ops, numpy_ops)
    )
    number = np.isfinite(want)
    np.testing.assert_array_equal(got[~number], want[~number])
    close(got[number], want[number].astype(np.float64), 40, np.finfo(dtype).tiny)
    # NumPy's own maximum(-0, 0) has either sign
    signed = number & ~((S == 0) | np.isin(sigma.name, ["relu", "relu6"]))
    np.testing.assert_array_equal(np.signbit(got[signed]), np.signbit(want[signed]))
    assert np.isnan(got[np.isnan(S)]).all()


@pytest.mark.parametrize("name", ["identity", "tanh", "softplus", "elu", "gelu", "silu", "mish"])
def test_zero_keeps_its_sign_where_the_function_is_odd_and_is_0_else(name):
    S, b = np.array([[0.0, -0.0]], np.float32), np.full(2, -0.0, np.float32)
    sigma = of_name(name)
    Z = do(compiled_ops, "bias_activation", S, b, sigma, nothing(S.shape, "float32"))[3]
    if name == "softplus":
        np.testing.assert_array_equal(Z, np.float32(np.log(2)))
    else:
        assert (Z == 0).all()
        assert not np.signbit(Z[0, 0])
        assert np.signbit(Z[0, 1]) == (name != "elu")


@by_dtype
@pytest.mark.parametrize("sigma", EXACT, ids=named)
def test_formulas_of_arithmetic_alone_give_the_bits_that_numpy_gives(sigma, dtype):
    random = rng(2)
    S, G, b = (
        normal(random, (29, 11), dtype),
        normal(random, (29, 11), dtype),
        normal(random, 11, dtype),
    )
    empty = nothing(S.shape, dtype)
    got, want = (
        do(ops, "bias_activation", S, b, sigma, empty) for ops in (compiled_ops, numpy_ops)
    )
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[3], want[3])
    got, want = (
        do(ops, "activation_gradient", G, want[0], want[3], sigma, empty, None, False)[4]
        for ops in (compiled_ops, numpy_ops)
    )
    np.testing.assert_array_equal(got, want)


def test_at_least_five_activations_are_arithmetic_alone():
    assert {s.name for s in EXACT} >= {"identity", "relu", "relu6", "leaky_relu", "hard_tanh"}


@by_shape
@by_dtype
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", ["tanh", "softmax", "log_softmax"])
def test_awkward_shapes_with_and_without_bias_in_place_and_not(name, biased, dtype, shape):
    sigma, random = of_name(name), rng(3, *shape)
    S = normal(random, shape, dtype, 2)
    b = normal(random, shape[1], dtype) if biased else None
    (kept, _, _, Z), (s, _, _, z) = both("bias_activation", S, b, sigma, nothing(shape, dtype))
    close(kept, s, 0)
    # a row's sum has n / 16 additions in a lane, and each term the error of exp of a rounded s
    close(Z, z, 8 + shape[1] / 16, 1 + abs(s) if name != "softmax" else abs(z * s))
    same_bits((do(compiled_ops, "bias_activation", S, b, sigma, S)[0], Z))


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_of_rows_with_infinities_and_nan_is_numpys(name):
    S = np.array(
        [[1e30, -1e30, 0], [INF, 0, 0], [-INF, 0, 1], [-INF] * 3, [NAN, 0, 1], [0, NAN, 1],
         [0, 1, NAN], [3e38, 3e38, -3e38]], np.float32
    )  # fmt: skip
    for n in (3, 40):  # all in one vector, and in several
        wider = np.concatenate([S[:, :2], np.full((8, n - 3), -1e3, np.float32), S[:, 2:]], axis=1)
        sigma, empty = of_name(name), nothing(wider.shape, "float32")
        got, want = (
            do(ops, "bias_activation", wider, None, sigma, empty)[3]
            for ops in (compiled_ops, numpy_ops)
        )
        np.testing.assert_allclose(got, want, rtol=1e-6)


# -- learned parameters ----------------------------------------------------------------------------


def learned(sigma, n, each, dtype):
    a = rng(11).uniform(-1.5, 1.5, n if each else 1).astype(dtype)
    return sigma.bound(a)


@by_dtype
@pytest.mark.parametrize("each", [False, True], ids=["per layer", "per output"])
@pytest.mark.parametrize(
    "sigma", learned_activations(), ids=lambda x: f"{type(x).__name__}-{x.name}"
)
@pytest.mark.parametrize("shape", [(7, 1), (5, 3), (130, 33), (3, 515)], ids=str)
def test_a_learned_parameter_is_read_from_memory_and_da_is_numpys(shape, sigma, each, dtype):
    random, (m, n) = rng(12, *shape), shape
    sigma = learned(sigma, n, each, dtype)
    S, G, b = normal(random, shape, dtype), normal(random, shape, dtype), normal(random, n, dtype)
    (kept, _, _, Z), (s, _, _, z) = both("bias_activation", S, b, sigma, nothing(shape, dtype))
    close(Z, z, 8, 1 + abs(s))
    for da in (None, nothing(sigma.a.shape, dtype)):
        with_da = sigma.bound(sigma.a, da)
        ops = compiled_ops if da is None else CompiledOps()  # NumPy sums da
        D, db = do(ops, "activation_gradient", G, kept, Z, with_da, nothing(shape, dtype),
                   nothing(n, dtype), False)[4:6]  # fmt: skip
        wide_da = None if da is None else nothing(da.shape, "float64")
        of_wide = sigma.bound(wide(sigma.a), wide_da)
        given = (*map(wide, (G, kept, Z)), of_wide, nothing(shape, "float64"), None, False)
        d = do(numpy_ops, "activation_gradient", *given)[4]
        close(D, d, 8, 8 * abs(G))
        close(db, d.sum(0), 8 + m / 4, 8 * abs(wide(G)).sum(0))
        if da is not None:
            close(da, wide_da, 8 + m * n / 4, 8 * abs(wide(G * S)).sum())


# -- dropout ---------------------------------------------------------------------------------------


def at(ops, step, first):
    ops.step, ops.first = step, first
    return ops


@by_shape
@by_dtype
def test_masks_are_numpys_to_the_bit_on_awkward_shapes(dtype, shape):
    sigma = dropout.with_dropout((None, of_name("relu")), (0.4,), 7)[1]
    S = normal(rng(8, *shape), shape, dtype)
    for biased in (False, True):
        b = np.zeros(shape[1], dtype) if biased else None
        Z, z = (
            do(at(ops, 4, 11), "bias_activation", S, b, sigma, nothing(shape, dtype))[3]
            for ops in (Compiled(), NumpyOps())
        )
        same_bits((Z, z))
        assert S.size < 60 or 0.2 < (np.signbit(Z)).mean() < 0.6


@by_dtype
@pytest.mark.parametrize("sigma", dropped_activations(), ids=named)
def test_dropout_draws_numpys_masks_at_every_step_and_row(sigma, dtype):
    random, sigma = rng(9), sigma
    S, b = normal(random, (37, 19), dtype, 2), np.zeros(19, dtype)
    S[0, :10] = [0.0, -0.0, 1e-30, -1e-30, 1e-44, -1e-44, 9.0, -9.0, NAN, -INF]
    for step, first in [(1, 0), (2, 0), (3, 107), (2**33 + 5, 2**32 - 17), (2**31, 2**40)]:
        (Z,), (z,) = (
            do(at(ops, step, first), "bias_activation", S, b, sigma, nothing(S.shape, dtype))[3:]
            for ops in (Compiled(), NumpyOps())
        )
        gone = (z == 0) & np.signbit(z)
        assert 0.3 < gone.mean() < 0.5
        np.testing.assert_array_equal((Z == 0) & np.signbit(Z), gone)
        close(Z, z, 8, 2 * (1 + abs(S)))


@pytest.mark.parametrize("rows", [1, 2, 36])
def test_chunks_draw_the_masks_of_their_rows_in_the_batch_also_when_replayed(rows):
    sigma = dropped_activations()[0]
    S = normal(rng(10), (37, 1030), "float32")
    ops, whole, Z = Compiled(), nothing(S.shape, "float32"), nothing(S.shape, "float32")
    chunks = [slice(i, min(37, i + rows)) for i in range(0, 37, rows)]
    tapes = [ops.record(lambda c=c: ops.bias_activation(S[c], None, sigma, Z[c])) for c in chunks]
    for step in (1, 2):
        for chunk, tape in zip(chunks, tapes, strict=True):
            at(ops, step, chunk.start)
            tape.replay()
        at(numpy_ops, step, 0).bias_activation(S.copy(), None, sigma, whole)
        same_bits((Z, whole))
    at(numpy_ops, 0, 0)


# -- D = G ⊙ σ', db = Σ_rows D ---------------------------------------------------------------------


def of_layer(sigma, shape, dtype, *seed):
    random = rng(4, *seed)
    S, G, before = (normal(random, x, dtype, 2) for x in (shape, shape, shape[1]))
    Z = do(numpy_ops, "bias_activation", S, None, sigma, S.copy())[3]
    if isinstance(sigma, dropout.Dropped):
        Z[random.random(shape) < 0.2] = 0.0
    return G, S, Z, before


@by_dtype
@pytest.mark.parametrize(
    "sigma",
    [*EVERY, *dropped_activations()],
    ids=lambda s: f"{type(s).__name__}-{s.name}",
)
def test_every_gradient_is_numpys_and_db_its_sum_over_rows(sigma, dtype):
    shape = (257, 19)
    G, S, Z, before = of_layer(sigma, shape, dtype)
    empty, g_sum = nothing(shape, dtype), abs(wide(G)).sum(0)
    got, want = both("activation_gradient", G, S, Z, sigma, empty, nothing(19, dtype), False)
    same_bits(*zip(got[:3], (G, S, Z), strict=True))
    D, db, d = got[4], got[5], want[4]
    close(D, d, 4, 2 * abs(G))
    close(db, wide(D).sum(0), 257 / 4, g_sum)
    added = do(compiled_ops, "activation_gradient", G, S, Z, sigma, empty, before, True)[5]
    close(added, wide(before) + wide(D).sum(0), 257 / 4, g_sum + abs(before))
    for aliased in (G, Z):
        *_, D1, db1, _ = do(
            compiled_ops, "activation_gradient", G, S, Z, sigma, aliased, nothing(19, dtype), False
        )
        same_bits((D1, D), (db1, db))
    assert do(compiled_ops, "activation_gradient", G, S, Z, sigma, empty, None, False)[5] is None


@by_shape
@by_dtype
def test_gradients_on_awkward_shapes(dtype, shape):
    sigma = of_name("tanh")
    G, S, Z, before = of_layer(sigma, shape, dtype, *shape)
    (m, n), empty = shape, nothing(shape, dtype)
    d = wide(G) * (1 - wide(Z) ** 2)
    rounds = 4 + m / 4  # a sum adds four rows at a time
    D, db = do(
        compiled_ops, "activation_gradient", G, S, Z, sigma, empty, nothing(n, dtype), False
    )[4:6]
    close(D, d, 4, abs(G))
    close(db, d.sum(0), rounds, abs(wide(G)).sum(0))
    D, db = do(compiled_ops, "activation_gradient", G, S, Z, sigma, Z, before, True)[4:6]
    close(D, d, 4, abs(G))
    close(db, before + d.sum(0), rounds, abs(wide(G)).sum(0) + abs(before))


@by_dtype
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmaxs_gradient_is_numpys(name, dtype):
    sigma = of_name(name)
    G, S, Z, _ = of_layer(sigma, (9, 7), dtype)
    got, want = (
        do(ops, "activation_gradient", G, S, Z, sigma, G, nothing(7, dtype), False)
        for ops in (compiled_ops, numpy_ops)
    )
    same_bits((got[0], want[0]), (got[5], want[5]))


# -- losses ----------------------------------------------------------------------------------------


def described(objective):
    options = "-".join(objective.loss.options)
    return f"{objective.loss.name}-of-{objective.output.name}-{options}"


def of_loss(objective, shape, dtype, weighted, *seed):
    """x, Y, k, J and db that an elementwise loss is defined on."""
    random, (m, n) = rng(5, *seed), shape
    unit = objective.loss.name in ("binary_cross_entropy", "poisson")
    x = normal(random, shape, dtype, 2)
    if unit and not objective.matched:
        x = random.uniform(0.01, 0.99, shape).astype(dtype)
    Y = (random.uniform(0, 1, shape) if unit else random.standard_normal(shape)).astype(dtype)
    Y[0, 0], Y[-1, -1] = 0, 1
    k = random.uniform(0.5, 2, (m, 1) if weighted else ()).astype(dtype)
    return x, Y, np.asarray(k), np.array(0.25), normal(random, n, dtype)


def fitting(objective, n):
    """The objective with one positive weight per column, if it has them."""
    loss = objective.loss
    if not loss.columns:
        return objective
    columns = tuple(0.5 * (j % 7) + 0.25 for j in range(n))
    return losses.pair(dataclasses.replace(loss, pos_weight=columns), objective.output)


def check_loss(objective, x, Y, k, J, before, ulps=8.0, ops=compiled_ops):
    """J, D and db of a loss, set and added to, D separate and in x; return D."""
    (m, n), empty, dtype = x.shape, nothing(x.shape, x.dtype), x.dtype
    got, want = both("loss", x, Y, k, objective, empty, nothing(n, dtype), J, False)
    same_bits((got[0], x))
    D, db, found = got[4:7]
    d, each = want[4], np.zeros(())
    scale = abs(wide(k)) * (1 + abs(wide(x)) + abs(Y if Y.ndim > 1 else 0))
    assert np.isfinite(D).all()
    close(D, d, ulps, scale)
    close(db, wide(D).sum(0), m / 4 + 2, abs(wide(D)).sum(0))
    do(numpy_ops, "loss", *map(wide, (x, Y, k)), objective, wide(empty), None, each, False)
    # J is a sum in double of numbers rounded like those of D
    bound = ulps * np.finfo(dtype).eps * (abs(want[6]) + (scale + 0 * wide(x)).sum())
    assert abs(found - want[6]) <= bound
    again = do(ops, "loss", x, Y, k, objective, x, before, J, True)
    same_bits((again[0], D), (again[6], found))
    close(again[5], wide(before) + wide(D).sum(0), m / 4 + 2, abs(wide(D)).sum(0) + abs(before))
    none = do(ops, "loss", x, Y, k, objective, x, None, J, False)
    same_bits((none[0], D), (none[6], found))
    return D


@by_dtype
@pytest.mark.parametrize("weighted", [False, True], ids=["0-d k", "weighted rows"])
@pytest.mark.parametrize("objective", every_objective(), ids=described)
def test_every_elementwise_loss_is_numpys_up_to_rounding(objective, weighted, dtype):
    for shape in [(61, 19), (5, 1030)]:
        own = fitting(objective, shape[1])
        check_loss(own, *of_loss(own, shape, dtype, weighted))


def squared():
    return losses.pair(losses.resolve("squared_error"), of_name("identity"))


@by_shape
@by_dtype
def test_losses_on_awkward_shapes(dtype, shape):
    weights = next(o for o in every_objective() if o.loss.columns and o.matched)
    for objective, weighted in itertools.product((squared(), fitting(weights, shape[1])), (0, 1)):
        check_loss(objective, *of_loss(objective, shape, dtype, weighted, *shape))


@by_dtype
@pytest.mark.parametrize("objective", every_objective()[:4], ids=described)
def test_infinite_losses_and_nan_are_numpys(objective, dtype):
    x = np.array([[INF, -INF, NAN, 1e38, -1e38, 0, -0.0, 1]], dtype)
    Y = np.array([[0.5, 0.5, 0.5, 1, 0, 0, 1, NAN]], dtype)
    k, empty = np.array(0.5, dtype), nothing(x.shape, dtype)
    (D, J), (d, j) = (
        do(ops, "loss", x, Y, k, objective, empty, None, np.zeros(()), False)[4::2]
        for ops in (compiled_ops, numpy_ops)
    )
    np.testing.assert_allclose(D, d, rtol=20 * np.finfo(dtype).eps)
    for i in range(8):
        J, j = (
            do(ops, "loss", x[:, i : i + 1].copy(), Y[:, i : i + 1].copy(), k, objective,
               empty[:, :1].copy(), None, np.zeros(()), False)[6]
            for ops in (compiled_ops, numpy_ops)
        )  # fmt: skip
        np.testing.assert_allclose(J, j, rtol=20 * np.finfo(dtype).eps)


# -- cross-entropy ---------------------------------------------------------------------------------

KINDS = {
    "labels": {},
    "distributions": {},
    "smoothed": {"label_smoothing": 0.2},
    "weighed": {"class_weight": True},
    "smoothed and weighed": {"class_weight": True, "label_smoothing": 0.2},
}


def entropy(kind, n, most=None):
    options = dict(KINDS[kind])
    if "class_weight" in options:
        options["class_weight"] = tuple(0.5 + (j % 5) for j in range(n))
    loss = losses.with_options(dataclasses.replace(losses.CROSS_ENTROPY, most=most), **options)
    return losses.pair(loss, ROWWISE[0])


def of_entropy(m, n, dtype, labels, weighted, scale):
    random = rng(6, m, n)
    x = normal(random, (m, n), dtype, scale)
    Y = random.integers(0, n, m) if labels else random.dirichlet(np.full(n, 0.3), m).astype(dtype)
    k = np.asarray(random.uniform(0.5, 2, (m, 1) if weighted else ()).astype(dtype))
    return x, Y, k, np.array(0.25), normal(random, n, dtype)


@by_dtype
@pytest.mark.parametrize("labels", [True, False], ids=["classes", "shares"])
@pytest.mark.parametrize("kind", KINDS)
def test_cross_entropy_is_numpys_up_to_rounding(kind, labels, dtype):
    if labels == (kind == "distributions"):
        return
    for (m, n), weighted in itertools.product(
        [(1, 1), (5, 1), (7, 2), (33, 10), (130, 33), (4, 64), (6, 65), (5, 1000), (3, 1030)],
        (0, 1),
    ):
        for scale in (1, 30):
            given = of_entropy(m, n, dtype, labels, weighted, scale)
            check_loss(entropy(kind, n), *given, ulps=8 + n / 16)


@by_dtype
@pytest.mark.parametrize("labels", [True, False], ids=["classes", "shares"])
@pytest.mark.parametrize("most", [0.0, 0.5, 3.0, 1e30])
def test_a_limit_bounds_each_rows_loss_and_not_its_slope(most, labels, dtype):
    given = of_entropy(33, 10, dtype, labels, True, 5)
    for kind in ("labels", "smoothed") if labels else ("distributions", "weighed"):
        limited = check_loss(entropy(kind, 10, most), *given)
        same_bits((limited, check_loss(entropy(kind, 10), *given)))
    x, Y, k, *_ = given
    found = do(
        compiled_ops, "loss", x, Y, k, entropy("labels", 10, most), x, None, np.zeros(()), False
    )
    assert found[6] <= most * k.sum() * (1 + 1e-6)


@by_dtype
@pytest.mark.parametrize("labels", [True, False], ids=["classes", "shares"])
@pytest.mark.parametrize("kind", ["labels", "smoothed"])
def test_extreme_logits_give_what_numpy_gives(kind, labels, dtype):
    rows = [
        [1e30, -1e30, 0], [-1e30, 1e30, 0], [0, 1e30, 1e30], [INF, 0, 0], [0, INF, 0],
        [0, -INF, 1], [-INF, 0, 1], [-INF] * 3, [NAN, 0, 1], [0, NAN, 1], [0, 1, NAN], [200, 0, 1],
        [0, 200, 1],
    ]  # fmt: skip
    for row, n in itertools.product(rows, (3, 40)):
        x = np.full((1, n), -2.0, dtype)
        x[0, [0, 1, n - 1]] = row
        Y = (
            np.array([1])
            if labels
            else np.eye(n, dtype=dtype)[[1]] * 0.5 + np.array(0.5 / n, dtype)
        )
        for weight in (np.array(0.5, dtype), np.full((1, 1), 0.5, dtype)):
            got, want = (
                do(
                    ops,
                    "loss",
                    x,
                    Y,
                    weight,
                    entropy(kind, n),
                    x,
                    nothing(n, dtype),
                    np.zeros(()),
                    False,
                )
                for ops in (compiled_ops, numpy_ops)
            )
            assert np.isnan(got[0]).any() == np.isnan(want[0]).any()
            eps = np.finfo(dtype).eps
            np.testing.assert_allclose(
                got[0], want[0], rtol=99 * eps, atol=9 * eps, err_msg=str(row)
            )
            np.testing.assert_allclose(got[6], want[6], rtol=99 * eps, err_msg=str(row))


@by_dtype
@pytest.mark.parametrize("n", [3, 40])
def test_the_largest_logit_is_found_wherever_it_is(n, dtype):
    x, k, empty = 1000 * np.eye(n, dtype=dtype), np.array(1 / n, dtype), nothing((n, n), dtype)
    shares = np.full((n, n), 1 / n, dtype)
    for sigma, right in zip(ROWWISE, (np.eye(n), 1000 * np.eye(n) - 1000), strict=True):
        Z = do(compiled_ops, "bias_activation", x, None, sigma, empty)[3]
        np.testing.assert_array_equal(Z, right)
    for objective, Y, loss in [
        (entropy("labels", n), np.arange(n), 0),
        (entropy("labels", n), (np.arange(n) + 1) % n, 1000),
        (entropy("distributions", n), shares, 1000 * (n - 1) / n),
    ]:
        D, _, J = do(compiled_ops, "loss", x, Y, k, objective, x, None, np.zeros(()), False)[4:7]
        target = shares if Y.ndim > 1 else np.eye(n)[Y]
        np.testing.assert_allclose(D, (np.eye(n) - target) / n, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(J, loss, rtol=1e-5)


@by_dtype
def test_a_row_whose_class_weighs_nothing_adds_nothing(dtype):
    loss = losses.with_options(losses.CROSS_ENTROPY, class_weight=(0.0, 1.0, 3.0))
    objective = losses.pair(loss, ROWWISE[0])
    x, Y = np.array([[1, 2, 3], [3, 1, 0.5]], dtype), np.array([[1, 0, 0], [0, 0.5, 0.5]], dtype)
    k = np.array([[0], [2]], dtype)
    check_loss(objective, x, Y, k, np.array(0.0), np.zeros(3, dtype))


# -- updates ---------------------------------------------------------------------------------------

SCALARS = {
    "rate": 0.1, "momentum": 0.9, "beta1": 0.9, "beta2": 0.99, "alpha": 0.9, "epsilon": 1e-8,
    "decay": 0.01, "t": 3.0, "l1": 0.01, "l2": 0.1, "clip": 0.25,
}  # fmt: skip
PENALTIES = [
    "g = " + " + ".join(["g", *(penalty.slope for penalty in some)])
    for some in (list(sheet.PENALTIES.values()), *([p] for p in sheet.PENALTIES.values()))
]
STATEMENTS = [
    *(row.statements for row in sheet.UPDATES.values()),
    f"g = clip * g; {sheet.UPDATES['adamw'].statements}",
    *PENALTIES,
]


def of_update(statements, size, dtype):
    compiled = program(statements, frozenset(SCALARS))
    random = rng(7, size)
    # u, m and v are the states; v of adam is a mean of squares
    vectors = {name: normal(random, size, dtype) for name in ("w", "g", "u", "m", "v")}
    vectors["v"] = abs(vectors["v"])
    names = {x for i in compiled.instructions for x in (*i.operands, i.out)}
    arrays = {name: vector for name, vector in vectors.items() if name in names}
    return compiled, arrays, {k: np.array(v, dtype) for k, v in compiled.fold(SCALARS).items()}


@pytest.mark.parametrize(
    ("statements", "dtype"),
    [(x, dtype) for x in STATEMENTS for dtype in DTYPES if dtype == "float32" or "decay" in x],
)
def test_every_update_has_numpys_bits(statements, dtype):
    sizes = (0, 1, 2, 7, 16, 17, 1030) if dtype == "float32" else (0, 3, 1030)
    for size in sizes:
        compiled, arrays, scalars = of_update(statements, size, dtype)
        if size > 7:
            arrays["g"][:7] = [NAN, INF, -INF, 0, -0.0, 1e30, -1e30]
        got, want = ({name: x.copy() for name, x in arrays.items()} for _ in range(2))
        compiled_ops.quietly(compiled_ops.map, compiled, got, scalars)
        numpy_ops.quietly(numpy_ops.map, compiled, want, scalars)
        for name in arrays:
            np.testing.assert_array_equal(got[name], want[name])
            assert size < 8 or (got[name][7:] != arrays[name][7:]).any() or name in ("g", "w")


def test_scalars_are_read_at_each_replay():
    compiled, arrays, scalars = of_update(sheet.UPDATES["sgd"].statements, 5, "float32")
    ops, w = Compiled(), arrays["w"].copy()
    tape = ops.record(lambda: ops.map(compiled, arrays, scalars))
    same_bits((arrays["w"], w))
    for rate in (0.5, 0.25):
        scalars["k0"][...] = rate
        tape.replay()
        w -= np.float32(rate) * arrays["g"]
        same_bits((arrays["w"], w))


# -- where arrays lie, and how rows are cut --------------------------------------------------------


def shifted(array, offset):
    """A copy of an array that begins `offset` bytes after a cache line."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    begin = -memory.ctypes.data % 64 + offset
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def calls(dtype, shape=(7, 35)):
    """(name, arguments) of a call of each template."""
    random, (m, n) = rng(13), shape
    S, G, b, empty = (*(normal(random, x, dtype) for x in (shape, shape, n)), nothing(shape, dtype))
    Z, db = np.tanh(S), nothing(n, dtype)
    per_output = learned(learned_activations()[0], n, True, dtype)
    for sigma in (of_name("tanh"), of_name("gelu"), per_output,
                  ROWWISE[0], of_name("log_softmax"),
                  dropped_activations()[0]):  # fmt: skip
        yield "bias_activation", (S, b, sigma, empty)
        if not sigma.rowwise:
            yield "activation_gradient", (G, S, Z, sigma, empty, db, False)
    for weighted in (False, True):
        for objective in (squared(), fitting(every_objective()[-2], n)):
            x, Y, k, J, _ = of_loss(objective, shape, dtype, weighted)
            yield "loss", (x, Y, k, objective, empty, db, J, False)
        for kind, labels in (("labels", True), ("distributions", False), ("smoothed", True)):
            x, Y, k, J, _ = of_entropy(m, n, dtype, labels, weighted, 3)
            yield "loss", (x, Y, k, entropy(kind, n), empty, db, J, False)


@by_dtype
def test_results_have_the_same_bits_wherever_arrays_lie(dtype):
    size = np.dtype(dtype).itemsize
    for name, arguments in calls(dtype):
        right = do(compiled_ops, name, *arguments)
        for place in range(64 // size):
            moved = [
                shifted(x, (place * (3 * i + 1)) % (64 // size) * size)
                if isinstance(x, np.ndarray) and x.dtype == dtype
                else x.copy() if isinstance(x, np.ndarray) else x
                for i, x in enumerate(arguments)
            ]  # fmt: skip
            compiled_ops.quietly(getattr(compiled_ops, name), *moved)
            same_bits(
                *((a, b) for a, b in zip(moved, right, strict=True) if isinstance(a, np.ndarray))
            )
    compiled, arrays, scalars = of_update(sheet.UPDATES["adamw"].statements, 103, dtype)
    right = {name: x.copy() for name, x in arrays.items()}
    compiled_ops.map(compiled, right, scalars)
    for place in range(64 // size):
        moved = {name: shifted(x, place * size) for name, x in arrays.items()}
        compiled_ops.map(compiled, moved, scalars)
        same_bits(*((moved[name], right[name]) for name in arrays))


@by_dtype
def test_rows_cut_anywhere_give_the_same_bits(dtype):
    for name, arguments in calls(dtype):
        right = do(compiled_ops, name, *arguments)
        for cut in range(1, 7):
            parts = []
            for rows in (slice(0, cut), slice(cut, 7)):
                compiled_ops.first = rows.start
                parts.append(
                    do(compiled_ops, name, *(
                        x[rows] if isinstance(x, np.ndarray) and x.shape[:1] == (7,) else x
                        for x in arguments
                    ))
                )  # fmt: skip
            compiled_ops.first = 0
            for whole, *both_parts in zip(right, *parts, strict=True):
                if isinstance(whole, np.ndarray) and whole.shape[:1] == (7,):
                    same_bits((np.concatenate(both_parts), whole))


# -- what NumPy computes ---------------------------------------------------------------------------


class Counted(CompiledOps):
    """The operations, and whether the last one was compiled."""

    compiled = False

    def _pass(self, *arguments, **keywords):
        self.compiled = super()._pass(*arguments, **keywords)
        return self.compiled


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", ">f8"])
def test_arrays_that_are_not_contiguous_or_of_another_type_are_left_to_numpy(dtype):
    ops, random, native = Counted(), rng(14), np.dtype(dtype).isnative
    sigma, (m, n) = of_name("tanh"), (6, 5)
    S, G = (normal(random, (m, 2 * n), dtype)[:, ::2] for _ in range(2))
    if dtype != "float32":
        S, G = S.copy(), G.copy()
    b, Z = normal(random, n, dtype), np.zeros((m, n), dtype)
    rtol = 1e-2 if dtype == "float16" else 1e-5
    s = S + b
    ops.bias_activation(S, b, sigma, Z)
    assert not ops.compiled
    np.testing.assert_array_equal(S, s)
    np.testing.assert_allclose(Z, np.tanh(s), rtol=rtol)
    D, db = np.zeros((m, n), dtype), np.zeros(n, dtype) if native else None
    ops.activation_gradient(G, S, Z, sigma, D, db)
    assert not ops.compiled
    np.testing.assert_allclose(D, G * (1 - Z * Z), rtol=rtol)
    if native:
        np.testing.assert_allclose(db, D.sum(0), rtol=2 * rtol, atol=1e-3)
    program_, arrays, scalars = of_update(sheet.UPDATES["sgd"].statements, 5, dtype)
    w = arrays["w"] - np.array(0.1, dtype) * arrays["g"]
    if native:
        arrays = {name: np.repeat(x, 2)[::2] for name, x in arrays.items()}
    ops.map(program_, arrays, scalars)
    assert not ops.compiled
    np.testing.assert_allclose(arrays["w"], w, rtol=rtol)


@pytest.mark.parametrize("name", ["squared_error", "cross_entropy"])
def test_a_loss_of_arrays_in_the_other_byte_order_is_that_of_their_numbers(name):
    Z, Y = rng(16).uniform(0.1, 0.9, (2, 5, 3)).astype(np.float32)
    J, G = mc.loss(name)(Z, Y)
    j, g = mc.loss(name)(Z.astype(">f4"), Y.astype(">f4"))
    assert pytest.approx(J, rel=1e-6) == j
    np.testing.assert_allclose(g, G, rtol=1e-6)


@pytest.mark.parametrize("labels", ["int32", "uint8", "int64"])
def test_labels_of_every_integer_type_are_read_right(labels):
    x, Y, k, J, before = of_entropy(9, 10, "float32", True, False, 2)
    ops = Counted()
    got = do(ops, "loss", x, Y.astype(labels), k, entropy("labels", 10), x, before, J, True)
    assert ops.compiled == (labels == "int64")
    want = do(numpy_ops, "loss", x, Y, k, entropy("labels", 10), x, before, J, True)
    for i in (0, 5, 6):
        np.testing.assert_allclose(got[i], want[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", [squared(), entropy("distributions", 10)], ids=described)
@pytest.mark.parametrize("other", ["Y", "k"])
def test_targets_and_weights_of_another_type_are_read_right(other, objective):
    x, Y, k, J, before = of_entropy(9, 10, "float32", False, True, 2)
    given = {"Y": Y, "k": k}
    given[other] = given[other].astype(np.float64)
    ops = Counted()
    got = do(ops, "loss", x, given["Y"], given["k"], objective, x, before, J, True)
    assert not ops.compiled
    want = do(compiled_ops, "loss", x, Y, k, objective, x, before, J, True)
    for i in (0, 5, 6):
        np.testing.assert_allclose(got[i], want[i], rtol=1e-5, atol=1e-6)


def test_no_rows_leave_sums_at_0_as_in_numpy():
    none, db = np.empty((0, 4), np.float32), nothing(4, "float32")
    sigma = of_name("tanh")
    ops = CompiledOps()
    ops.bias_activation(none, db.copy(), sigma, none)
    ops.activation_gradient(none, none, none, sigma, none, db)
    np.testing.assert_array_equal(db, 0)
    J = np.array(0.25)
    db[...] = NAN
    ops.loss(none, none, np.array(1, np.float32), squared(), none, db, J, False)
    np.testing.assert_array_equal(db, 0)
    assert J == 0.25


# -- whole runs ------------------------------------------------------------------------------------

RUNS = {
    "relu": {"loss": "cross_entropy", "output": "softmax", "optimizer": mc.SGD(0.1)},
    "tanh": {
        "loss": "squared_error",
        "output": "identity",
        "optimizer": mc.SGD(0.05, momentum=0.9),
    },
    "gelu": {"loss": "binary_cross_entropy", "output": "sigmoid", "optimizer": mc.AdamW(1e-2)},
}
EXTRAS = {
    "plain": {},
    "dropout and clipping": {"dropout": 0.3, "clip_norm": 0.5},
    "penalties and small chunks": {"l1": 1e-3, "l2": 1e-2, "chunk_rows": 7, "workers": 1},
    "two workers": {"chunk_rows": 16, "workers": 2, "dropout": 0.2},
}


def run(hidden, extras, dtype, nudge=0.0):
    """The losses of 10 steps, and the parameters after them."""
    given, random = RUNS[hidden], rng(15)
    net = mc.MLP([11, 23, 9, 5], hidden, given["output"], dtype=dtype, seed=3)
    net.parameters[...] *= (1 + nudge * random.choice([-1, 1], net.parameters.size)).astype(dtype)
    trainer = mc.Trainer(net, given["loss"], given["optimizer"], seed=4, **EXTRAS[extras])
    X = normal(random, (97, 11), dtype)
    Y = (X @ random.standard_normal((11, 5))).astype(dtype)
    if given["output"] == "softmax":
        Y = Y.argmax(axis=1)
    elif given["output"] == "sigmoid":
        Y = (Y > 0).astype(dtype)
    found = [float(trainer.step(X, Y)) for _ in range(10)]
    return np.array(found), net.parameters.copy()


@by_dtype
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("hidden", RUNS)
def test_ten_steps_are_numpys_up_to_rounding_and_the_same_bits_again(
    hidden, extras, dtype, monkeypatch
):
    """The bound: each step rounds each result by a few units, like parameters that are a few units
    off; so a run of NumPy's from parameters that are 16 units off shows how far rounding may lead.
    """
    compiled, again = run(hidden, extras, dtype), run(hidden, extras, dtype)
    same_bits(*zip(compiled, again, strict=True))
    monkeypatch.setenv(compiler.SWITCH, "0")
    right, nudged = (run(hidden, extras, dtype, e) for e in (0.0, 16 * np.finfo(dtype).eps))
    assert compiled[1].tobytes() != right[1].tobytes()  # NumPy's is another computation
    for found, want, moved in zip(compiled, right, nudged, strict=True):
        assert np.linalg.norm(found - want) <= np.linalg.norm(moved - want)
