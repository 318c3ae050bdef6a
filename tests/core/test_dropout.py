"""Masks are what dropout promises: of the right share, independent from entry to entry, a function
of their place alone.
"""

import numpy as np
import pytest

from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import activations, dropout
from mlpcore.core.activations import Activation

RATE, SHAPE = 0.25, (256, 512)
MANY = SHAPE[0] * SHAPE[1]


def masks(rate=RATE, seed=0, layer=1, step=1, first=0, shape=SHAPE, dtype="float32"):
    """1 where an entry is dropped."""
    hidden = (None, *[activations.resolve("identity")] * layer)
    sigma = dropout.with_dropout(hidden, (rate,) * layer, seed)[layer]
    ops, Z = NumpyOps(), np.ones(shape, dtype)
    ops.step, ops.first = step, first
    ops.bias_activation(Z, None, sigma, Z)
    return (np.signbit(Z) & (Z == 0)).astype(float)


def spelled_out(seed, layer, step, row, column, rate):
    """The draw of one entry by the formulas at the head of the module, in whole numbers."""
    base = dropout.mix(dropout.layer_key(seed, layer) + step)
    x = dropout.mix(base + row) ^ dropout.mix(dropout.mix(base + 0x9E3779B9) + column)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor % 2**32
    return x / 2**32 < rate


def correlated(a, b):
    """Their correlation in standard deviations of what chance gives."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.std() * b.std()) * np.sqrt(a.size))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("step", "first", "shape"),
    [(1, 0, (5, 9)), (2**32 + 3, 2**32 - 2, (4, 3)), (7, 40, (1, 40_000))],
)
def test_the_masks_are_those_that_the_formulas_say(step, first, shape, dtype):
    found = masks(0.3, 2**40 + 5, 2, step, first, shape, dtype)
    sample = [(i, j) for i in range(shape[0]) for j in range(0, shape[1], max(1, shape[1] // 50))]
    assert [found[i, j] for i, j in sample] == [
        spelled_out(2**40 + 5, 2, step, first + i, j, 0.3) for i, j in sample
    ]


def test_mixing_is_a_permutation_that_spreads_each_bit():
    x = np.random.default_rng(0).integers(0, 2**32, 2000)
    assert len({dropout.mix(int(i)) for i in range(100_000)}) == 100_000
    for bit in range(32):
        changed = [dropout.mix(int(i)) ^ dropout.mix(int(i) ^ 1 << bit) for i in x]
        share = np.mean([[(c >> out) & 1 for out in range(32)] for c in changed], axis=0)
        assert abs(share - 0.5).max() < 0.07, bit


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 0.9, 1 - 1e-12])
def test_as_many_are_dropped_as_the_rate_says_in_every_row_and_column(rate):
    dropped = masks(rate)
    bound = np.sqrt(rate * (1 - rate))
    assert abs(dropped.mean() - rate) <= 4 * bound / np.sqrt(MANY) + 1e-9
    for axis in (0, 1):
        share = dropped.mean(axis=axis)
        assert (
            abs(share - rate).max()
            <= 5.5 * bound / np.sqrt(SHAPE[axis]) + 6 / SHAPE[axis] * (rate < 0.01) + 1e-9
        )
        if 0.1 <= rate <= 0.9:  # and they spread as independent draws do
            spread = ((share - rate) ** 2).mean() / (bound**2 / SHAPE[axis])
            assert abs(spread - 1) < 5 * np.sqrt(2 / len(share))


def test_masks_of_neighbouring_rows_columns_steps_layers_and_seeds_are_independent():
    m = masks()
    for distance in (1, 2, 16, 128):
        assert abs(correlated(m[distance:], m[:-distance])) < 4.5
        assert abs(correlated(m[:, distance:], m[:, :-distance])) < 4.5
    for other in (
        {"step": 2},
        {"step": 2**16 + 1},
        {"layer": 2},
        {"seed": 1},
        {"seed": 2**32},
        {"first": 256},
    ):
        assert abs(correlated(m, masks(**other))) < 4.5, other


def test_the_four_corners_of_a_rectangle_are_independent():
    """Row and column enter as numbers of their own: what they share must not survive the draw."""
    sign = 1 - 2 * masks(0.5)
    for i, j in ((1, 1), (3, 64), (128, 5)):
        corners = sign[i:, j:] * sign[i:, :-j] * sign[:-i, j:] * sign[:-i, :-j]
        assert abs(corners.mean()) * np.sqrt(corners.size) < 4.5


def test_no_two_rows_and_no_two_columns_have_the_same_mask():
    m = masks()
    assert len({row.tobytes() for row in m}) == SHAPE[0]
    assert len({column.tobytes() for column in m.T.copy()}) == SHAPE[1]


def test_a_mask_does_not_depend_on_where_a_chunk_begins():
    whole = masks()
    np.testing.assert_array_equal(
        np.concatenate([masks(shape=(100, 512)), masks(first=100, shape=(156, 512))]), whole
    )


# -- the formulas ----------------------------------------------------------------------------------

USERS = [
    # jumps at z = 6
    Activation("clipped", "minimum(maximum(s, 0), 6)", "positive(z) * positive(6 - z)"),
    Activation("hyperbola", "sqrt(1 + s * s)", "s / z"),  # has no slope at z = 0
    Activation(
        "bent", "s / sqrt(1 + a * s * s)", "1 / ((1 + a * s * s) * sqrt(1 + a * s * s))", 2.0
    ),
]
EVERY = [*map(activations.resolve, activations.names()), *USERS]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("sigma", EVERY, ids=lambda sigma: sigma.name)
def test_value_and_slope_behind_dropout_are_those_without_it_up_to_a_few_roundings(
    sigma, rate, dtype
):
    """Against float64; σ' reads the undropped z, which is recovered from z̃, also where z is
    saturated, or 0.
    """
    (_, dropped), rng = dropout.with_dropout((None, sigma), (rate,), 3), np.random.default_rng(0)
    S = np.concatenate(
        [2 * rng.standard_normal(2000), 20 * [0.0, -0.0, 1.0, -1.0, 6.0, 30.0, -30.0]]
    )[None].astype(dtype)
    G, s = rng.standard_normal(S.shape).astype(dtype), S.astype(np.float64)
    ops, Z, z, D, d = (
        NumpyOps(),
        np.empty_like(S),
        np.empty_like(s),
        np.empty_like(S),
        np.empty_like(s),
    )
    # exp may overflow, in a denominator
    ops.quietly(ops.bias_activation, S.copy(), None, dropped, Z)
    ops.quietly(ops.bias_activation, s.copy(), None, sigma, z)
    ops.activation_gradient(G, S, Z, dropped, D, None)
    ops.activation_gradient(G.astype(np.float64), s, z, sigma, d, None)
    ops._drop(drawn := np.ones_like(S), dropped.key, dropped.threshold)
    gone = drawn == 0
    assert abs(gone.mean() - rate) < 0.1
    np.testing.assert_array_equal(np.signbit(Z) & (Z == 0), gone)  # so that the way back can tell
    epsilon, k = np.finfo(dtype).eps, np.where(gone, 0, 1 / (1 - rate))
    np.testing.assert_allclose(Z, k * z, rtol=12 * epsilon, atol=4 * epsilon * k.max())
    np.testing.assert_allclose(
        D, k * d, rtol=12 * epsilon, atol=24 * epsilon * abs(G).max() * k.max()
    )
    assert not D[gone].any()


@pytest.mark.parametrize("name", ["hard_tanh", "relu"])
def test_where_the_slope_jumps_it_is_exact(name):
    """tanh bears a rounding of z, hard_tanh at z = 1 and relu at 0 would not."""
    sigma = activations.resolve(name)
    for rate in np.linspace(0.01, 0.9, 60).tolist():
        (_, dropped), ops = dropout.with_dropout((None, sigma), (rate,), 3), NumpyOps()
        S = np.array([[1.0, -1.0, 1.5, -7.0, 0.0, -0.0, 0.25, -1e-30]] * 50, np.float32)
        Z, D = np.empty_like(S), np.empty_like(S)
        ops.bias_activation(S.copy(), None, dropped, Z)
        ops.activation_gradient(np.ones_like(S), S, Z, dropped, D, None)
        inside = (S > 0) if name == "relu" else abs(S) < 1
        np.testing.assert_array_equal(D != 0, inside & ~(np.signbit(Z) & (Z == 0)))


def test_only_slopes_that_read_s_or_jump_keep_s():
    behind = dropout.with_dropout((None, *EVERY), (0.2,) * len(EVERY), 0)[1:]
    more = {
        after.name
        for before, after in zip(EVERY, behind, strict=True)
        if after.slope_reads_s and not before.slope_reads_s
    }
    assert more == {"hard_tanh", "relu6", "clipped"}
    assert all(
        after.slope_reads_s
        for before, after in zip(EVERY, behind, strict=True)
        if before.slope_reads_s
    )


def test_what_dropout_writes_no_user_can():
    with pytest.raises(ValueError, match=r"'kept\(z\)' is not allowed in formulas"):
        Activation("mine", "s", "kept(z)")


# -- the public door -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "hidden", "expected"),
    [
        (None, 2, ()), (0, 2, ()), (0.0, 0, ()), ([0, 0], 2, ()), ([], 0, ()), (0.5, 2, (0.5, 0.5)),
        ([0, 0.5], 2, (0, 0.5)), ((np.float32(0.5),), 1, (0.5,)),
    ],
)  # fmt: skip
def test_one_rate_is_every_layers_and_none_or_0_is_no_dropout(given, hidden, expected):
    assert dropout.rates(given, hidden) == expected
