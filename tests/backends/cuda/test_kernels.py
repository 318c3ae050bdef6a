"""Every kernel, thread by thread on the CPU, against the NumPy backend in double: awkward shapes,
all types, all formulas.

Each launch runs in three thread orders, whose results must be equal to the bit, and is stopped if
it leaves its arrays.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil

import numpy as np
import pytest

from mlpcore.backends import formula_text
from mlpcore.backends.cuda import grids as launches
from mlpcore.backends.cuda import slot as cuda_slot
from mlpcore.backends.cuda import source as cuda_source
from mlpcore.backends.cuda.device import Launch
from mlpcore.backends.cuda.slot import CONTROL, Scalar, Status
from mlpcore.backends.cuda.step_kernels import SET_SLOT
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import activations, dropout, losses, sheet, targets
from mlpcore.core.program import program
from tests.backends.cuda import instances
from tests.backends.cuda.emulator import compiler
from tests.backends.cuda.instances import (
    SETTINGS,
    STORAGE,
    dropped_activations,
    elementwise_loss,
    every_activation,
    every_instance,
    every_objective,
    learned_activations,
    update_source,
)
from tests.backends.cuda.trial import (
    COMPUTE,
    EPSILON,
    NAMES,
    close,
    computed,
    fresh,
    launch,
    read,
    stored,
    try_out,
)

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CI" not in os.environ, reason="needs g++"
)

TYPES = list(STORAGE)
ONE, ONE_WARP = Launch((1, 1), (1, 1)), Launch((1, 1), (32, 1))
SHAPES = [(1, 1), (1, 16), (13, 7), (13, 8), (13, 9), (67, 40), (300, 5), (2, 264), (0, 8)]
EXACT = [
    sigma for sigma in every_activation()
    if not re.search(r"tanh\(|exp|log|norm|sigmoid|softplus", sigma.value + sigma.slope)
]  # fmt: skip
ops = NumpyOps()

for source, name in every_instance():  # one run of g++ for all of them, when the first is launched
    if not re.search(r", 1(,|>)", name) or "<float" in name or name.startswith("update<"):
        compiler.kernel(source, name)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def vector(T: str, n: int) -> int:
    return launches.vector_width(n, STORAGE[T])


def grids(m: int, n: int, V: int) -> list[Launch]:
    """The grids of the backend, and ones that are larger and smaller than the matrix."""
    planned = [launches.tiles(m, n, V, multiprocessors).launch for multiprocessors in (1, 3)]
    return [
        *planned,
        Launch((-(-n // (2 * V)) + 2, 3), (2, 32)),
        Launch((-(-n // (32 * V)), 2), (32, 4)),
    ]


# -- Z = σ(S + b) ----------------------------------------------------------------------------------


def bias_activation(sigma, T, S, b, Z, keep, grid):
    source = cuda_source.text("bias_activation.cu", formula_text.activation(sigma))
    name = f"bias_activation<{T}, Formula, {vector(T, S.shape[1])}, {str(keep).lower()}>"
    return launch(source, name, grid, S, b, Z, *S.shape)[:3]


def value(sigma, s):
    z = np.empty_like(s)
    with np.errstate(all="ignore"):
        ops.bias_activation(s.copy(), None, sigma, z)
    return z


@pytest.mark.parametrize("T", TYPES)
@pytest.mark.parametrize("sigma", every_activation(), ids=lambda sigma: sigma.name)
def test_bias_activation_is_the_activation_of_s_plus_b(sigma, T):
    m, n, random = 37, 16, rng(1)
    S, b = stored(3 * random.standard_normal((m, n)), T), computed(random.standard_normal(n), T)
    S[0, :4] = stored(np.array([np.nan, 40, -40, 0]), T)
    grid = launches.tiles(m, n, vector(T, n), 2).launch
    for keep in {False, sigma.slope_reads_s}:
        kept, _, Z = bias_activation(sigma, T, S, b, fresh((m, n), T), keep, grid)
        s = read(S, T) + b
        close(Z, value(sigma, s), T, 8, 1 + abs(s))
        if keep:
            close(kept, s, T, 1)
        else:
            assert kept.tobytes() == S.tobytes()
    in_place, _, _ = bias_activation(sigma, T, S, b, S, False, grid)
    assert in_place.tobytes() == Z.tobytes()


@pytest.mark.parametrize("sigma", EXACT, ids=lambda sigma: sigma.name)
def test_formulas_of_arithmetic_alone_give_the_bits_that_numpy_gives(sigma):
    m, n, random = 29, 8, rng(2)
    S, G, b = (random.standard_normal(shape).astype(np.float32) for shape in ((m, n), (m, n), n))
    _, _, Z = bias_activation(
        sigma, "float", S, b, fresh((m, n), "float"), False, launches.tiles(m, n, 4, 2).launch
    )
    want = value(sigma, S + b)
    np.testing.assert_array_equal(Z, want)
    D = gradient(
        sigma,
        "float",
        G,
        S + b,
        Z,
        fresh((m, n), "float"),
        None,
        False,
        launches.tiles(m, n, 4, 2).launch,
    )[3]
    ops.activation_gradient(G.copy(), S + b, want.copy(), sigma, G, None)
    np.testing.assert_array_equal(D, G)


def test_at_least_four_activations_are_arithmetic_alone():
    assert {sigma.name for sigma in EXACT} >= {
        "identity",
        "relu",
        "relu6",
        "leaky_relu",
        "hard_tanh",
    }


@pytest.mark.parametrize("T", ["float", "double"])
@pytest.mark.parametrize("name", ["erf", "erfc", "normcdf", "normpdf", "sin", "cos"])
def test_the_functions_of_users_formulas_are_numpys_in_the_tails_too(name, T):
    S = np.linspace(-14, 14, 1200).reshape(60, 20).astype(NAMES[T])
    sigma = activations.Activation("own", f"{name}(s) + s ** 3 * 0")
    Z = bias_activation(
        sigma, T, S, None, fresh(S.shape, T), False, launches.tiles(60, 20, vector(T, 20), 2).launch
    )[2]
    want = value(sigma, S.astype(np.float64))
    tail = abs(want) if name not in ("sin", "cos") else 1.0  # relative
    bound = 8 * EPSILON[T] * tail + np.finfo(S.dtype).tiny
    assert (abs(Z - want) <= bound).all()


@pytest.mark.parametrize("T", ["float", "half_t"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_bias_activation_on_awkward_shapes_and_grids_without_bias(m, n, T):
    sigma = activations.resolve("tanh")
    S = stored(rng(3, m, n).standard_normal((m, n)), T)
    for grid in grids(m, n, vector(T, n)):
        _, _, Z = bias_activation(sigma, T, S, None, fresh((m, n), T), False, grid)
        close(Z, np.tanh(read(S, T)), T)


# -- dropout ---------------------------------------------------------------------------------------


# half types store some of it as -0
FAINT = activations.Activation("faint", "0.000000001 * s", "0.000000001")


def dropped(sigma, rate=0.4):
    return dropout.with_dropout((None, activations.resolve(sigma)), (rate,), seed=7)[1]


def reference(step, first):
    there = NumpyOps()
    there.step, there.first = step, first
    return there


def bias_activation_dropout(sigma, T, S, b, Z, step, batch_row, first, grid):
    keep = sigma.slope_reads_s and Z is not S
    name = f"bias_activation_dropout<{T}, Formula, {vector(T, S.shape[1])}, {str(keep).lower()}>"
    source = cuda_source.text("bias_activation.cu", formula_text.activation(sigma))

    def work(device, S, b, Z, control, scalars):
        slot = set_slot(device, control, scalars, S, batch_row=batch_row, step=step)
        masks = slot, first, np.uint32(sigma.key), np.uint32(sigma.threshold)
        device.launch(device.kernel(source, name), grid, [S, b, Z, *S.shape, *masks])

    return try_out(work, S, b, Z, new_control(), np.zeros(8, np.float32))[:3]


@pytest.mark.parametrize("T", TYPES)
@pytest.mark.parametrize("sigma", ["relu", "tanh", "gelu", "hard_tanh", FAINT], ids=str)
def test_dropout_draws_numpys_masks_and_leaves_no_other_entry_at_minus_0(sigma, T):
    m, n, random, sigma = 37, 16, rng(8), dropped(sigma)
    S, b = stored(random.standard_normal((m, n)), T), computed(np.zeros(n), T)
    S[0, :8] = stored(np.array([0.0, -0.0, 1e-30, -1e-30, 1e-41, -1e-41, 9.0, -9.0]), T)
    grid, big = launches.tiles(m, n, vector(T, n), 2).launch, 2**32 - 20
    # past 32 bits
    for step, batch_row, first in [(1, 0, 0), (2, 0, 0), (3, 100, 7), (2**33 + 5, big, 5)]:
        Z = bias_activation_dropout(sigma, T, S, b, fresh((m, n), T), step, batch_row, first, grid)[
            2
        ]
        s, want = read(S, T), np.empty((m, n))
        reference(step, batch_row + first).bias_activation(s.copy(), None, sigma, want)
        gone = (want == 0) & np.signbit(want)
        assert 0.3 < gone.mean() < 0.5
        got = read(Z, T)
        np.testing.assert_array_equal((got == 0) & np.signbit(got), gone)
        close(Z, want, T, 8, 2 * (1 + abs(s)))
        if not sigma.slope_reads_s:
            assert (
                bias_activation_dropout(sigma, T, S, b, S, step, batch_row, first, grid)[
                    0
                ].tobytes()
                == Z.tobytes()
            )


@pytest.mark.parametrize("T", ["float", "half_t"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_dropout_on_awkward_shapes_and_grids(m, n, T):
    sigma, S = dropped("relu", 0.5), stored(rng(9, m, n).standard_normal((m, n)), T)
    want = np.empty((m, n))
    reference(4, 11).bias_activation(read(S, T), None, sigma, want)
    for grid in grids(m, n, vector(T, n)):
        Z = bias_activation_dropout(sigma, T, S, None, fresh((m, n), T), 4, 11, 0, grid)[2]
        close(Z, want, T)
        np.testing.assert_array_equal(np.signbit(read(Z, T)), np.signbit(want))


# -- D = G ⊙ σ', db = Σ_rows D ---------------------------------------------------------------------


def gradient(sigma, T, G, S, Z, D, db, accumulate, grid):
    m, n = Z.shape
    across, down = grid.grid
    source = cuda_source.text("activation_gradient.cu", formula_text.activation(sigma))
    scratch = (
        (None, None) if db is None else (fresh(down * n, COMPUTE[T]), np.zeros(across, np.uint32))
    )
    name = f"activation_gradient<{T}, Formula, {vector(T, n)}, 256>"
    return launch(source, name, grid, G, S, Z, D, db, *scratch, m, n, np.int32(accumulate))[:5]


def gradient_of(sigma, g, s, z):
    d = np.empty_like(g)
    with np.errstate(all="ignore"):
        ops.activation_gradient(g.copy(), s.copy(), z.copy(), sigma, d, None)
    return d


@pytest.mark.parametrize("T", TYPES)
@pytest.mark.parametrize(
    "sigma",
    [*every_activation(), *dropped_activations()],
    ids=lambda sigma: f"{type(sigma).__name__} {sigma.name}",
)
def test_activation_gradient_is_g_times_the_slope_and_db_its_sum_over_rows(sigma, T):
    m, n, random = 603, 16, rng(4)
    G, S = stored(random.standard_normal((m, n)), T), stored(2 * random.standard_normal((m, n)), T)
    Z = value(sigma, read(S, T))
    if isinstance(sigma, dropout.Dropped):
        Z[random.random((m, n)) < 0.4] = -0.0
        Z[random.random((m, n)) < 0.1] = 0.0
    Z, before = stored(Z, T), computed(random.standard_normal(n), T)
    g, s, z = (read(x, T) for x in (G, S, Z))
    d, grid = gradient_of(sigma, g, s, z), launches.tiles(m, n, vector(T, n), 2).launch
    assert grid.grid[1] > 1
    G1, S1, Z1, D, db = gradient(
        sigma, T, G, S, Z, fresh((m, n), T), fresh(n, COMPUTE[T]), False, grid
    )
    assert (G1.tobytes(), S1.tobytes(), Z1.tobytes()) == (G.tobytes(), S.tobytes(), Z.tobytes())
    close(D, d, T, 4, 8 * abs(g))
    close(db, d.sum(axis=0), COMPUTE[T], 4, 8 * abs(g).sum(axis=0))
    added = gradient(sigma, T, G, S, Z, None, before, True, grid)[4]
    close(added, before + d.sum(axis=0), COMPUTE[T], 4, 8 * abs(g).sum(axis=0))
    assert gradient(sigma, T, G, S, Z, G, None, False, grid)[3].tobytes() == D.tobytes()
    assert gradient(sigma, T, G, S, Z, Z, None, False, grid)[3].tobytes() == D.tobytes()


@pytest.mark.parametrize("T", ["float", "half_t"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_activation_gradient_on_awkward_shapes_and_grids(m, n, T):
    sigma, random = activations.resolve("tanh"), rng(5, m, n)
    G, Z = (stored(random.uniform(-1, 1, (m, n)), T) for _ in range(2))
    d = read(G, T) * (1 - read(Z, T) ** 2)
    for grid in grids(m, n, vector(T, n)):
        D, db = gradient(sigma, T, G, None, Z, fresh((m, n), T), fresh(n, COMPUTE[T]), False, grid)[
            3:
        ]
        close(D, d, T)
        close(db, d.sum(axis=0), COMPUTE[T], 4, abs(d).sum(axis=0))
        kept = gradient(sigma, T, G, None, Z, None, np.ones(n, np.float32), True, grid)[4]
        close(kept, 1 + d.sum(axis=0), COMPUTE[T], 4, 1 + abs(d).sum(axis=0))


# -- learned parameters ----------------------------------------------------------------------------


def learned_gradient(sigma, T, G, S, Z, D, db, da, accumulate, grid):
    m, n = Z.shape
    across, down = grid.grid
    each = sigma.a.size > 1
    source = cuda_source.text("activation_gradient.cu", formula_text.activation(sigma))
    scratch = fresh(down * n + (down * n if each else across * down), COMPUTE[T])
    counters = np.zeros(across + (across if each else 1), np.uint32)
    name = f"activation_gradient_learned<{T}, Formula, {vector(T, n)}, 256>"
    given = (
        G,
        S,
        Z,
        D,
        db,
        scratch,
        counters,
        m,
        n,
        np.int32(accumulate),
        computed(sigma.a, T),
        da,
        np.int32(each),
    )
    after = launch(source, name, grid, *given)
    return after[3], after[4], after[11]


def by_parameter(sigma, s):
    """∂z/∂a, by hand."""
    if sigma.name == "prelu":
        return np.minimum(s, 0)
    return s * (1 - np.tanh(sigma.a * s) ** 2) + 2 * sigma.a * s


def of_columns(sigma, n, each, random):
    return sigma.bound(
        random.uniform(-1.5, 1.5, n if each else 1).astype(np.float32).astype(np.float64)
    )


@pytest.mark.parametrize("T", TYPES)
@pytest.mark.parametrize("each", [False, True], ids=["per layer", "per output"])
@pytest.mark.parametrize("sigma", learned_activations()[:2], ids=lambda sigma: sigma.name)
def test_a_learned_parameter_is_read_from_memory_and_da_is_the_sum_over_what_shares_it(
    sigma, each, T
):
    m, n, random = 603, 16, rng(11)
    sigma = of_columns(sigma, n, each, random)
    S, G = (stored(random.standard_normal((m, n)), T) for _ in range(2))
    b, grid = computed(random.standard_normal(n), T), launches.tiles(m, n, vector(T, n), 2).launch
    assert grid.grid[1] > 1
    source = cuda_source.text("bias_activation.cu", formula_text.activation(sigma))
    name = f"bias_activation_learned<{T}, Formula, {vector(T, n)}, true>"
    kept, _, Z = launch(
        source, name, grid, S, b, fresh((m, n), T), m, n, computed(sigma.a, T), np.int32(each)
    )[:3]
    s = read(S, T) + b
    close(kept, s, T, 1)
    close(Z, value(sigma, s), T, 8, 1 + abs(s))
    g, s, z = (read(x, T) for x in (G, kept, Z))
    d, share = gradient_of(sigma, g, s, z), g * by_parameter(sigma, s)
    da, size = (
        f(share).sum(axis=0) if each else f(share).sum(keepdims=True).ravel()
        for f in (np.asarray, abs)
    )
    D, db, found = learned_gradient(
        sigma,
        T,
        G,
        kept,
        Z,
        fresh((m, n), T),
        fresh(n, COMPUTE[T]),
        fresh(da.shape, COMPUTE[T]),
        False,
        grid,
    )
    close(D, d, T, 8, 8 * abs(g))
    close(db, d.sum(axis=0), COMPUTE[T], 8, 8 * abs(g).sum(axis=0))
    close(found, da, COMPUTE[T], 8, 8 * size)
    before = computed(random.standard_normal(da.shape), T)
    _, none, added = learned_gradient(sigma, T, G, kept, Z, G, None, before, True, grid)
    assert none is None
    close(added, before + da, COMPUTE[T], 8, 8 * size + 1)
    assert (
        learned_gradient(sigma, T, G, kept, Z, Z, None, None, False, grid)[0].tobytes()
        == D.tobytes()
    )


@pytest.mark.parametrize("T", ["float", "half_t"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_learned_parameters_on_awkward_shapes_and_grids(m, n, T):
    random = rng(12, m, n)
    S, G = (stored(random.standard_normal((m, n)), T) for _ in range(2))
    for each in (False, n > 1):
        sigma = of_columns(learned_activations()[0], n, each, random)
        share = read(G, T) * np.minimum(read(S, T), 0)
        da, size = (
            f(share).sum(axis=0) if each else f(share).sum(keepdims=True).ravel()
            for f in (np.asarray, abs)
        )
        for grid in grids(m, n, vector(T, n)):
            D, db, found = learned_gradient(
                sigma,
                T,
                G,
                S,
                S,
                fresh((m, n), T),
                fresh(n, COMPUTE[T]),
                fresh(da.shape, COMPUTE[T]),
                False,
                grid,
            )
            d = read(G, T) * np.where(read(S, T) > 0, 1, sigma.a)
            close(D, d, T, 8, 1)
            close(db, d.sum(axis=0), COMPUTE[T], 8, abs(d).sum(axis=0) + 1)
            close(found, da, COMPUTE[T], 8, size)


@pytest.mark.parametrize("T", ["float", "half_t"])
def test_dropout_behind_a_learned_parameter_draws_numpys_masks(T):
    m, n, random = 37, 16, rng(13)
    S = stored(random.standard_normal((m, n)), T)
    for each in (False, True):
        sigma = of_columns(learned_activations()[2], n, each, random)
        name = f"bias_activation_learned_dropout<{T}, Formula, {vector(T, n)}, true>"
        source = cuda_source.text("bias_activation.cu", formula_text.activation(sigma))
        grid = launches.tiles(m, n, vector(T, n), 2).launch

        def work(
            device,
            S,
            Z,
            a,
            control,
            scalars,
            sigma=sigma,
            name=name,
            source=source,
            grid=grid,
            each=each,
        ):
            slot = set_slot(device, control, scalars, S, batch_row=5, step=3)
            masks = slot, 2, np.uint32(sigma.key), np.uint32(sigma.threshold)
            device.launch(
                device.kernel(source, name), grid, [S, None, Z, m, n, a, np.int32(each), *masks]
            )

        Z = try_out(
            work, S, fresh((m, n), T), computed(sigma.a, T), new_control(), np.zeros(8, np.float32)
        )[1]
        want = np.empty((m, n))
        reference(3, 7).bias_activation(read(S, T), None, sigma, want)
        close(Z, want, T, 8, 1)
        np.testing.assert_array_equal(
            np.signbit(read(Z, T)) & (read(Z, T) == 0), np.signbit(want) & (want == 0)
        )


# -- softmax ---------------------------------------------------------------------------------------


def softmax_of(s):
    e = np.exp(s - s.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("T", TYPES)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (9, 2), (30, 33), (3, 1030)])
def test_softmax_and_its_gradient(m, n, T):
    random, source = rng(6, m, n), cuda_source.text("softmax.cu")
    S, G = (stored(5 * random.standard_normal((m, n)), T) for _ in range(2))
    # exp of it overflows in float, that of the next row underflows
    S[0, :1] = stored(np.array([300.0]), T)
    S[1:2] = stored(read(S[1:2], T) - 300, T)
    b = computed(random.standard_normal(n), T)
    for grid in (launches.row_warps(m, 1), Launch((1, 1), (32, 2)), Launch((7, 1), (32, 4))):
        for bias in (b, None):
            want = softmax_of(read(S, T) + (0 if bias is None else bias))
            Z = launch(source, f"softmax<{T}>", grid, S, bias, fresh((m, n), T), m, n)[2]
            close(Z, want, T, 40)
            assert (
                launch(source, f"softmax<{T}>", grid, S, bias, S, m, n)[0].tobytes() == Z.tobytes()
            )
        g, z = read(G, T), read(Z, T)
        D = launch(source, f"softmax_gradient<{T}>", grid, G, Z, fresh((m, n), T), m, n)[2]
        close(
            D,
            z * (g - (g * z).sum(axis=1, keepdims=True)),
            T,
            8,
            z * abs(g).max(axis=1, keepdims=True),
        )
        for target in (G, Z):
            inside = launch(source, f"softmax_gradient<{T}>", grid, G, Z, target, m, n)[2]
            assert inside.tobytes() == D.tobytes()


@pytest.mark.parametrize("T", TYPES)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (9, 2), (30, 33), (3, 1030)])
def test_log_softmax_and_its_gradient(m, n, T):
    random, source = rng(16, m, n), cuda_source.text("softmax.cu")
    S, G = (stored(5 * random.standard_normal((m, n)), T) for _ in range(2))
    S[0, :1] = stored(np.array([300.0]), T)
    S[1:2] = stored(read(S[1:2], T) - 300, T)
    S[2:3] = stored(np.zeros(n), T)  # the largest entry many times
    b = computed(random.standard_normal(n), T)
    for grid in (launches.row_warps(m, 1), Launch((1, 1), (32, 2)), Launch((7, 1), (32, 4))):
        for bias in (b, None):
            s = read(S, T) + (0 if bias is None else bias)
            want = np.empty_like(s)
            ops.bias_activation(
                s.copy(), None, activations.resolve("log_softmax", output=True), want
            )
            Z = launch(source, f"log_softmax<{T}>", grid, S, bias, fresh((m, n), T), m, n)[2]
            close(
                Z,
                want,
                T,
                8,
                abs(s).max(axis=1, keepdims=True) if bias is not None else abs(want) + 1e-3,
            )
            assert (
                launch(source, f"log_softmax<{T}>", grid, S, bias, S, m, n)[0].tobytes()
                == Z.tobytes()
            )
        g, z = read(G, T), read(Z, T)
        D = launch(source, f"log_softmax_gradient<{T}>", grid, G, Z, fresh((m, n), T), m, n)[2]
        close(
            D, g - np.exp(z) * g.sum(axis=1, keepdims=True), T, 8, abs(g).sum(axis=1, keepdims=True)
        )
        for target in (G, Z):
            inside = launch(source, f"log_softmax_gradient<{T}>", grid, G, Z, target, m, n)[2]
            assert inside.tobytes() == D.tobytes()


def test_log_softmax_keeps_the_digits_of_a_probability_near_1():
    S = np.array([[0, -20, -30], [-90, 0, -100], [5, 5, -60]], np.float32)
    Z = launch(
        cuda_source.text("softmax.cu"),
        "log_softmax<float>",
        ONE_WARP,
        S,
        None,
        fresh((3, 3), "float"),
        3,
        3,
    )[2]
    others = np.log1p([np.exp(-20) + np.exp(-30), np.exp(-90) + np.exp(-100), 1 + np.exp(-65)])
    np.testing.assert_allclose(Z, S - S.max(axis=1, keepdims=True) - others[:, None], rtol=1e-6)


# -- losses ----------------------------------------------------------------------------------------


def loss_of(objective, x, Y, k, db=None, J=0.0, accumulate=False):
    """J, D and db of the NumPy backend in double."""
    if not len(x):
        return J, x, np.zeros(x.shape[1])
    D, total = np.empty_like(x), np.array(J)
    db = np.zeros(x.shape[1]) if db is None else db.astype(np.float64)
    ops.quietly(ops.loss, x.copy(), Y, k, objective, D, db, total, accumulate)
    return float(total), D, db


def sums(n: int, blocks: int, T: str, counters: int) -> tuple[np.ndarray, np.ndarray]:
    return fresh(blocks * (1 + n), COMPUTE[T]), np.zeros(counters, np.uint32)


def weighing(k):
    """Row weights, whether there are any, and the scale, that make k."""
    return (k, np.int32(1), None) if k.ndim else (None, np.int32(0), k)


def columns_of(objective, T):
    """The loss's number for each column, or None."""
    return computed(objective.loss.columns, T) if objective.loss.columns else None


def elementwise(objective, T, x, Y, k, gain, D, db, J, accumulate, grid):
    """x, D, db and J after the loss of arrays that lie in order."""
    source = cuda_source.text("losses.cu", formula_text.loss(objective))
    (m, n), name = x.shape, elementwise_loss(T, vector(T, x.shape[1]))
    scratch, rest = (
        sums(n, grid.grid[0] * grid.grid[1], T, 1 + grid.grid[0]),
        (0, m, n, np.int32(accumulate)),
    )
    after = launch(
        source, name, grid, x, None, None, Y, *weighing(k), gain, D, db, J, *scratch, *rest,
        columns_of(objective, T)
    )  # fmt: skip
    return after[0], after[8], after[9], after[10]


@pytest.mark.parametrize("T", TYPES)
@pytest.mark.parametrize(
    "objective", every_objective(), ids=lambda o: f"{o.loss.name}-{o.output.name}"
)
def test_elementwise_losses_give_j_d_and_db_in_one_pass(objective, T):
    m, n, random = 203, 16, rng(7)
    x = stored(
        value(objective.output, random.uniform(0.2, 1, (m, n)))
        if not objective.matched
        else random.standard_normal((m, n)),
        T,
    )
    Y = computed(random.uniform(0, 1, (m, n)), T)
    grid = launches.tiles(m, n, vector(T, n), 2).launch
    for k, gain, accumulate in (
        (computed(1 / m, T), None, False),
        (computed(random.uniform(0, 1 / m, (m, 1)), T), computed(64.0, T), True),
    ):
        before, J = computed(random.standard_normal(n), T), computed(3.0, T)
        want_J, d, _ = loss_of(
            objective, read(x, T), Y.astype(np.float64), k.astype(np.float64), J=3.0
        )
        d *= 1 if gain is None else gain
        db = d.sum(axis=0) + (before if accumulate else 0)
        after = elementwise(
            objective, T, x, Y, k, gain, fresh((m, n), T), before, J, accumulate, grid
        )
        assert after[0].tobytes() == x.tobytes()
        close(after[3], want_J, COMPUTE[T], 20, 10)
        close(after[1], d, T, 8, abs(d).max())
        close(after[2], db, COMPUTE[T], 8, 4 * abs(d).sum(axis=0) + abs(before))
        alone = elementwise(objective, T, x, Y, k, gain, x, None, J, accumulate, grid)
        assert (alone[1].tobytes(), alone[3].tobytes()) == (after[1].tobytes(), after[3].tobytes())


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_elementwise_losses_on_awkward_shapes_and_grids(m, n):
    objective, random = losses.pair(losses.resolve("squared_error"), None), rng(8, m, n)
    x, Y = (random.standard_normal((m, n)).astype(np.float32) for _ in range(2))
    d, k = 0.25 * (x.astype(np.float64) - Y), np.array(0.25, np.float32)
    for grid in grids(m, n, vector("float", n)):
        after = elementwise(
            objective,
            "float",
            x,
            Y,
            k,
            None,
            fresh((m, n), "float"),
            fresh(n, "float"),
            computed(2, "float"),
            False,
            grid,
        )
        close(after[1], d, "float", 4, abs(x) + abs(Y))
        close(after[2], d.sum(axis=0), "float", 4, abs(d).sum(axis=0) + 1)
        close(after[3], 2 + 2 * (d * d).sum(), "float", 8, 2)


ANY_LOSS = cuda_source.text("losses.cu", formula_text.loss(every_objective()[0]))


CROSS_ENTROPY = losses.pair(losses.resolve("cross_entropy"), activations.SOFTMAX)


def cross_entropy(
    T, S, Y, k, gain, D, db, J, accumulate, grid, control=None, most=np.inf, objective=CROSS_ENTROPY
):
    """D, db, J and the control block after the loss of arrays that lie in order, Y class numbers
    where it is 1-D.
    """
    (m, n), labels, smoothing = S.shape, Y.ndim == 1, objective.loss.label_smoothing
    name = instances.cross_entropy(
        T, "long long" if labels else COMPUTE[T], mixes=objective.loss.mixes(labels)
    )
    grid = grid._replace(shared=0 if db is None else grid.block[1] * n * computed(0, T).itemsize)
    weights, weighted, scale = weighing(k)
    after = launch(
        ANY_LOSS, name, grid, S, None, control, Y, weights, weighted, np.int32(labels), scale, gain,
        D, db, J,
        *sums(n, grid.grid[0], T, 2), 0, m, n, np.int32(accumulate), computed(most, T)[()],
        computed(1 - smoothing, T)[()], computed(smoothing / n, T)[()], columns_of(objective, T),
    )  # fmt: skip
    return after[9], after[10], after[11], after[2]


@pytest.mark.parametrize("T", TYPES)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (50, 2), (30, 10), (21, 33), (5, 1030), (0, 3)])
def test_softmax_with_cross_entropy_is_evaluated_from_s_in_one_pass(m, n, T):
    random = rng(9, m, n)
    S = stored(4 * random.standard_normal((m, n)), T)
    S[:1, :1] = stored(np.array([[300.0]]), T)
    S[1:2] = stored(read(S[1:2], T) - 300, T)
    labels, Y = random.integers(0, n, m), computed(random.uniform(0, 1, (m, n)), T)
    objective = losses.pair(losses.resolve("cross_entropy"), activations.SOFTMAX)
    planned = launches.cross_entropy(m, n, computed(0, T).itemsize, 2)[0]._replace(shared=0)
    for grid in (planned, Launch((1, 1), (32, 1)), Launch((5, 1), (32, 2))):
        for target, k, gain, accumulate in (
            (labels, computed(0.25, T), None, False),
            (labels, computed(random.uniform(0, 1, (m, 1)), T), computed(64.0, T), True),
            (Y, computed(random.uniform(0, 1, (m, 1)), T), None, True),
        ):
            before, J, s = computed(random.standard_normal(n), T), computed(3.0, T), read(S, T)
            Y_or_labels = target if target is labels else target.astype(np.float64)
            want_J, d, _ = loss_of(objective, s, Y_or_labels, k.astype(np.float64), J=3.0)
            d *= 1 if gain is None else gain
            after = cross_entropy(
                T, S, target, k, gain, fresh((m, n), T), before, J, accumulate, grid
            )
            size = abs(d).max(initial=1)
            close(after[2], want_J, COMPUTE[T], 40, 100 * n)
            close(after[0], d, T, 20, size * n**0.5)
            close(
                after[1],
                d.sum(axis=0) + (before if accumulate else 0),
                COMPUTE[T],
                20,
                size * n**0.5 * (1 + m),
            )
            alone = cross_entropy(T, S, target, k, gain, S, None, J, accumulate, grid)
            assert (alone[0].tobytes(), alone[2].tobytes()) == (
                after[0].tobytes(),
                after[2].tobytes(),
            )


@pytest.mark.parametrize("T", TYPES)
@pytest.mark.parametrize("options", ["smoothed", "weighed", "smoothed and weighed"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (50, 2), (21, 33), (5, 1030), (0, 3)])
def test_softmax_with_cross_entropy_smooths_targets_and_weighs_them_by_class(m, n, options, T):
    random = rng(17, m, n)
    by_class = random.uniform(0.2, 3, n) if "weighed" in options else None
    if options == "weighed":
        by_class[1:2] = 0
    loss = losses.with_options(
        losses.resolve("cross_entropy"), by_class, 0.3 if "smoothed" in options else 0.0
    )
    objective = losses.pair(loss, activations.SOFTMAX)
    S = stored(4 * random.standard_normal((m, n)), T)
    labels, Y = random.integers(0, n, m), computed(random.uniform(0, 1, (m, n)), T)
    planned = launches.cross_entropy(m, n, computed(0, T).itemsize, 2)[0]._replace(shared=0)
    for target, k in ((labels, computed(0.25, T)), (Y, computed(random.uniform(0, 1, (m, 1)), T))):
        if not objective.loss.mixes(target is labels):
            continue
        s, (before, J) = read(S, T), (computed(random.standard_normal(n), T), computed(3.0, T))
        t = targets.mixed(objective.loss, target, n, np.float64)
        log_p = s - s.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        want_J = 3 - (k.astype(np.float64) * t * log_p).sum()
        d = k.astype(np.float64) * (t.sum(axis=1, keepdims=True) * np.exp(log_p) - t)
        for grid in (planned, Launch((5, 1), (32, 2))):
            after = cross_entropy(
                T, S, target, k, None, fresh((m, n), T), before, J, True, grid, objective=objective
            )
            size = abs(d).max(initial=1)
            close(after[2], want_J, COMPUTE[T], 40, 100 * n)
            close(after[0], d, T, 20, size * n**0.5)
            close(after[1], d.sum(axis=0) + before, COMPUTE[T], 20, size * n**0.5 * (1 + m))
            in_place = cross_entropy(
                T, S, target, k, None, S, None, J, True, grid, objective=objective
            )
            assert (in_place[0].tobytes(), in_place[2].tobytes()) == (
                after[0].tobytes(),
                after[2].tobytes(),
            )


@pytest.mark.parametrize("T", ["float", "double"])
@pytest.mark.parametrize("n", [2, 10, 70])
def test_cross_entropy_keeps_its_digits_where_the_label_is_sure(n, T):
    sure, labels = rng(13, n).integers(-8, 8, (12, n)) / 8, rng(14, n).integers(0, n, 12)
    sure[np.arange(12), labels] = np.linspace(5, 80, 12).round()
    S, hot = stored(sure, T), computed(np.eye(n)[labels], T)
    objective = losses.pair(losses.resolve("cross_entropy"), activations.SOFTMAX)
    for i in range(12):
        row, one = S[i : i + 1], computed(1.0, T)
        want_J, d, _ = loss_of(objective, read(row, T), labels[i : i + 1], 1.0)
        for target in (labels[i : i + 1], hot[i : i + 1]):
            D, _, J, _ = cross_entropy(
                T, row, target, one, None, fresh((1, n), T), None, computed(0, T), False, ONE_WARP
            )
            np.testing.assert_allclose(
                D, d, rtol=8 * EPSILON[T], atol=float(np.finfo(D.dtype).tiny)
            )
            np.testing.assert_allclose(J, want_J, rtol=8 * EPSILON[T])


def test_a_row_adds_no_more_to_the_loss_than_its_most_and_has_the_same_gradient():
    S, labels, k = (
        rng(11).standard_normal((50, 3)) * 9,
        rng(11).integers(0, 3, 50),
        computed(1.0, "double"),
    )
    full = cross_entropy(
        "double",
        S,
        labels,
        k,
        None,
        fresh((50, 3), "double"),
        None,
        computed(0, "double"),
        False,
        ONE_WARP,
    )
    capped = cross_entropy("double", S, labels, k, None, fresh((50, 3), "double"), None,
        computed(0, "double"), False,
                           ONE_WARP, most=4.0)  # fmt: skip
    objective = losses.pair(
        dataclasses.replace(losses.resolve("cross_entropy"), most=4.0), activations.SOFTMAX
    )
    close(capped[2], loss_of(objective, S, labels, k)[0], "double", 40, 50)
    assert capped[2] < 0.9 * full[2]
    assert capped[0].tobytes() == full[0].tobytes()


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_a_label_that_is_no_class_is_reported_and_reads_nothing(bad):
    m, n, labels = 70, 4, rng(10).integers(0, 4, 70)
    S, k = np.zeros((m, n), np.float32), computed(1.0, "float")
    for label, status in ((labels[33], 0), (bad, Status.BAD_LABEL)):
        labels[33] = label
        after = cross_entropy("float", S, labels, k, None, fresh((m, n), "float"), None,
            computed(0, "float"), False,
                              Launch((3, 1), (32, 2)), new_control())  # fmt: skip
        assert after[3].view(CONTROL)["status"] == status


# -- the slot, gathering, weights ------------------------------------------------------------------


def new_control(**values):
    control = np.zeros(1, CONTROL)
    control["loss_scale"] = 1
    for name, entry in values.items():
        control[name] = entry
    return control.view(np.uint8)


def strides(array):
    if array is None:
        return (0, 0)
    return array.strides[0] // array.itemsize, array.strides[
        1
    ] // array.itemsize if array.ndim > 1 else 1


def set_slot(
    device, control, scalars, X=None, Y=None, w=None, rows=None, answer=None, settings=(), **values
):
    """A slot, filled by the kernel; `values` are fields."""
    C = {"float32": "float", "float64": "double"}[scalars.dtype.name]
    record, slot = cuda_slot.SlotRecord().array, device.empty(cuda_slot.SLOT.itemsize)
    for i, array in enumerate((X, Y, w)):
        if array is not None:
            record["source"][i] = device.address(array)
            record["row_stride"][i], record["column_stride"][i] = strides(array)
    record["rows"], record["answer"] = (
        0 if x is None else device.address(x) for x in (rows, answer)
    )
    record["source_rows"], record["step"] = 0 if X is None else len(X), 1
    record["settings"][: len(settings)] = settings
    for name, value in values.items():
        record[name] = value
    device.launch(
        device.kernel(update_source("sgd"), f"set_slot<{C}>"),
        SET_SLOT,
        [record, slot, control, scalars],
    )
    return slot


@pytest.mark.parametrize("C", ["float", "double"])
def test_the_slot_holds_what_the_host_says_and_the_sums_begin_at_0(C):
    X, Y, w = np.zeros((6, 5), np.float32)[:, ::2], np.zeros((6, 1)), np.zeros(12)[::2]
    rows, answer, scalars = np.arange(3), np.zeros(4), computed(np.full(7, 9.0), C)
    fields = {
        "first": 2,
        "batch_row": 5,
        "batch_rows": 4,
        "step": 77,
        "turn": 0,
        "weight": 8.0,
        "rates": np.arange(64),
    }

    def work(device, control, scalars, X, Y, w, rows, answer, seen, second):
        slot = set_slot(
            device, control, scalars, X, Y, w, rows, answer, range_of_settings, **fields
        )
        found = slot.view(cuda_slot.SLOT)[0]
        at = device.address
        assert list(found["source"]) == [at(X), at(Y), at(w)]
        assert (found["rows"], found["answer"], found["source_rows"]) == (at(rows), at(answer), 6)
        for i, name in enumerate(("row_stride", "column_stride")):
            assert list(found[name]) == [strides(X)[i], strides(Y)[i], strides(w)[i]]
        assert all((found[name] == value).all() for name, value in fields.items())
        assert list(found["settings"]) == range_of_settings
        seen[...] = scalars
        scalars[...] = 9
        set_slot(device, control, scalars, X, Y, w, weight=8.0, resume=1)
        second[...] = scalars

    range_of_settings = [float(i) for i in range(1, 13)]
    found = try_out(
        work, new_control(loss_scale=32.0), scalars, X, Y, w, rows, answer, fresh(7, C), fresh(7, C)
    )
    np.testing.assert_array_equal(found[-2], [0.125, 32, 0, 2, 3, 9, 9])
    np.testing.assert_array_equal(found[-1], np.full(7, 9))


def gather(source, target, X, rows, first, m, grid=None):
    """Rows of X (a NumPy array of C++ type `source`) gathered as `target`, and the status
    afterwards.
    """
    n = X.shape[1]
    V = launches.vector_width(n, max(X.itemsize, STORAGE[target]))

    def work(device, X, rows, out, control, scalars):
        slot = set_slot(device, control, scalars, X, rows=rows, first=first)
        kernel = device.kernel(cuda_source.text("gather.cu"), f"gather<{source}, {target}, {V}>")
        device.launch(
            kernel, grid or launches.tiles(m, n, V, 3).launch, [slot, out, control, 1, m, n]
        )

    found = try_out(
        work,
        X,
        rows,
        fresh((m, n), target),
        new_control(),
        np.zeros(Scalar.FIRST_OF_UPDATE, np.float32),
    )
    return found[2], int(found[3].view(CONTROL)["status"][0])


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("dtype", list(cuda_source.TYPES))
def test_gather_casts_rows_of_any_type(dtype, target):
    random, source = rng(11), cuda_source.TYPES[dtype]
    numbers = random.integers(0, 2 if dtype == "bool" else 100, (20, 8))
    X = stored(numbers, source) if source in TYPES else numbers.astype(dtype)
    rows = random.permutation(20)
    got, status = gather(source, target, X, rows, 3, 9)
    assert status == 0
    np.testing.assert_array_equal(read(got, target), numbers[rows[4:13]])


def test_gather_keeps_every_bit_of_doubles():
    X = np.array([[1 / 3, 1e300]] * 3)
    assert gather("double", "double", X, None, 0, 1)[0].tobytes() == X[:1].tobytes()


LAYOUTS = {
    "row-major": lambda X: X,
    "column-major": lambda X: np.asfortranarray(X),
    "every second column": lambda X: np.repeat(X, 2, axis=1)[:, ::2],
    "backwards": lambda X: X[::-1],
    "rows that are not aligned": lambda X: np.concatenate([X, X[:, :1]], axis=1)[:, 1:],
    "one row for all": lambda X: np.broadcast_to(X[:1], X.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (13, 7), (13, 8), (60, 3), (2, 264)])
def test_gather_reads_arrays_of_any_strides(m, n, layout):
    X = LAYOUTS[layout](rng(12, m, n).standard_normal((m + 5, n)).astype(np.float32))
    for grid in (None, Launch((1, 1), (4, 2)) if n < 4 else Launch((n, 2), (4, 8))):
        for rows in (None, rng(13).integers(0, m + 5, m + 3)):
            got, status = gather(
                "float", "float", X, rows, 2, m - 1 if rows is None else m, grid=grid
            )
            want = X[3 : m + 2] if rows is None else X[rows[3 : m + 3]]
            np.testing.assert_array_equal(got, want)
            assert status == 0


@pytest.mark.parametrize("bad", [-1, 20, 2**50])
def test_a_row_number_beyond_the_source_is_reported_and_reads_nothing_there(bad):
    X, rows = np.ones((20, 4), np.float32), np.arange(12)
    rows[6] = bad
    got, status = gather("float", "float", X, rows, 0, 9)
    assert status == Status.BAD_ROW
    assert np.isfinite(got).all()


def loss_through_the_slot(launch_loss, shape, Y, w, rows):
    """D, J and status of a loss whose targets and weights are read through a slot;
    `launch_loss(device, given, D, J)`.
    """

    def work(device, Y, w, rows, scale, D, J, control, scalars):
        slot = set_slot(
            device, control, scalars, None, Y, w, rows=rows, first=3, source_rows=len(Y)
        )
        launch_loss(device, [slot, control, None, None, np.int32(w is not None)], scale, D, J)

    found = try_out(
        work, Y, w, rows, computed(0.25, "float"), fresh(shape, "float"), computed(0, "float"),
        new_control(),
        np.zeros(Scalar.FIRST_OF_UPDATE, np.float32),
    )  # fmt: skip
    return found[4], found[5], int(found[6].view(CONTROL)["status"][0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(cuda_source.TYPES))
def test_an_elementwise_loss_reads_targets_and_weights_of_any_type_and_strides_through_the_slot(
    dtype, layout
):
    random, source = rng(21), cuda_source.TYPES[dtype]
    numbers = random.integers(0, 2 if dtype == "bool" else 100, (20, 8))
    Y = LAYOUTS[layout](stored(numbers, source) if source in TYPES else numbers.astype(dtype))
    numbers, x = (
        LAYOUTS[layout](numbers).astype(np.float64),
        random.standard_normal((9, 8)).astype(np.float32),
    )
    w, rows = random.uniform(0, 2, 40).astype(np.float32)[::2], random.permutation(20)
    objective = every_objective()[0]
    for weights in (None, w):

        def launch_loss(device, given, scale, D, J, weights=weights):
            scratch = [device.to_device(part) for part in sums(8, 9, "float", 9)]
            kernel = device.kernel(ANY_LOSS, elementwise_loss("float", 4, source))
            arguments = [
                device.to_device(x),
                *given,
                scale,
                None,
                D,
                None,
                J,
                *scratch,
                1,
                9,
                8,
                np.int32(0),
                None,
            ]
            device.launch(kernel, launches.tiles(9, 8, 4, 3).launch, arguments)

        D, J, status = loss_through_the_slot(launch_loss, (9, 8), Y, weights, rows)
        picked = rows[4:13]
        k = (
            np.full((9, 1), 0.25)
            if weights is None
            else 0.25 * w[picked].astype(np.float64)[:, None]
        )
        want_J, want, _ = loss_of(objective, x.astype(np.float64), numbers[picked], k)
        close(D, want, "float", 8, abs(want).max())
        close(J, want_J, "float", 40, want_J)
        assert status == 0


@pytest.mark.parametrize("dtype", list(cuda_source.TYPES))
def test_cross_entropy_reads_classes_of_any_type_through_the_slot(dtype):
    random, source = rng(22), cuda_source.TYPES[dtype]
    labels = random.integers(0, 2, 20)
    Y = np.repeat(stored(labels, source) if source in TYPES else labels.astype(dtype), 2)[::2]
    S, rows = random.standard_normal((9, 3)).astype(np.float32), random.permutation(20)
    objective = losses.pair(losses.resolve("cross_entropy"), activations.SOFTMAX)

    def launch_loss(device, given, scale, D, J):
        scratch = [device.to_device(part) for part in sums(3, 9, "float", 2)]
        kernel = device.kernel(ANY_LOSS, instances.cross_entropy("float", source))
        rest = [
            scale,
            None,
            D,
            None,
            J,
            *scratch,
            1,
            9,
            3,
            np.int32(0),
            *map(np.float32, (np.inf, 1, 0)),
            None,
        ]
        device.launch(
            kernel, Launch((2, 1), (32, 2)), [device.to_device(S), *given, np.int32(1), *rest]
        )

    for bad, fault in ((0, 0), (1, Status.BAD_ROW)):
        chosen = np.where(np.arange(20) == 5, 20, rows) if bad else rows
        D, J, status = loss_through_the_slot(launch_loss, (9, 3), Y, None, chosen)
        assert status == fault
        if not bad:
            want_J, want, _ = loss_of(
                objective, S.astype(np.float64), labels[rows[4:13]], np.array(0.25)
            )
            close(D, want, "float", 20, 1)
            close(J, want_J, "float", 40, 10)


def sum_weights(w, rows, first, m, C, blocks):
    source = {np.dtype(np.float32): "float", np.dtype(np.int32): "int"}[w.dtype]

    def work(device, w, rows, scale, control, scalars, partials, counters):
        slot = set_slot(
            device,
            control,
            scalars,
            w=w,
            rows=rows,
            first=first,
            source_rows=len(w) if rows is None else 100,
        )
        kernel = device.kernel(cuda_source.text("gather.cu"), f"sum_weights<{source}, {C}>")
        device.launch(
            kernel, Launch((blocks, 1), (256, 1)), [slot, scale, partials, counters, control, m]
        )

    found = try_out(
        work,
        w,
        rows,
        fresh(1, C),
        new_control(),
        computed(np.zeros(Scalar.FIRST_OF_UPDATE), C),
        fresh(blocks, C),
        np.zeros(1, np.uint32),
    )
    assert not found[6].any()
    return float(found[2][0]), int(found[3].view(CONTROL)["status"][0])


@pytest.mark.parametrize("C", ["float", "double"])
@pytest.mark.parametrize("blocks", [1, 4])
def test_sum_weights_gives_one_over_the_sum_over_the_batchs_rows(C, blocks):
    random = rng(14)
    numbers = random.uniform(0, 2, 6000).astype(np.float32)
    for w in (numbers, numbers[::3], random.integers(0, 5, 2000, np.int32)):
        for m in (1, 700):
            got, status = sum_weights(w, None, 5, m, C, blocks)
            assert status == 0
            assert got == pytest.approx(
                1 / w[5 : 5 + m].sum(dtype=np.float64), rel=100 * EPSILON[C]
            )
        rows = random.integers(0, 100, 700)
        got, status = sum_weights(w, rows, 7, 600, C, blocks)
        assert (status, got) == (
            0,
            pytest.approx(1 / w[rows[7:607]].sum(dtype=np.float64), rel=100 * EPSILON[C]),
        )


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, -np.inf])
def test_weights_that_are_negative_or_not_finite_are_reported(bad):
    w = np.ones(600, np.float32)
    w[555] = bad
    assert sum_weights(w, None, 0, 500, "float", 2)[1] == 0
    assert sum_weights(w, None, 0, 600, "float", 2)[1] == Status.BAD_WEIGHT


def test_weights_that_are_all_zero_give_scale_0_and_weights_too_small_to_divide_by_are_reported():
    assert sum_weights(np.zeros(600, np.float32), None, 0, 600, "float", 2) == (0, 0)
    assert (
        sum_weights(np.full(1, 1e-40, np.float32), None, 0, 1, "float", 2)[1] == Status.BAD_WEIGHT
    )


# -- the end of a step -----------------------------------------------------------------------------


ALL = "g = unscale * g + l2 * w + l1 * sign(w); g = clip * g; "
VALUES = {
    "rate": 0.01, "l1": 0.02, "l2": 0.03, "decay": 0.1, "momentum": 0.9, "beta1": 0.8,
    "beta2": 0.95, "alpha": 0.9,
    "epsilon": 1e-3,
}  # fmt: skip


def program_of(name, before=""):
    row = sheet.UPDATES[name]
    compiled = program(
        before + row.statements, frozenset((*SETTINGS, "t", "clip", "unscale", "l1", "l2"))
    )
    return compiled, ["w", "g", *row.states]


def penalised(name):
    """The source of updates.cu for an optimizer behind unscaling, penalties and clipping."""
    bounds = sheet.UPDATES[name].bounds
    formula = formula_text.update(
        *program_of(name, ALL), list(VALUES), ("decay", "l1", "l2"), "g", bounds
    )
    return cuda_source.text("updates.cu", formula)


for name in sheet.UPDATES:
    for C in ("float", "double"):
        compiler.kernel(penalised(name), f"prepare_update<{C}, Formula>")
        compiler.kernel(penalised(name), f"update<{C}, half_t, Formula, {16 // STORAGE[C]}>")


def update(source, compiled, vectors, C, V, arrays, k, weights, size, low=None, Low="half_t"):
    four = [*arrays, *[None] * (4 - len(arrays))]
    return launch(
        source,
        f"update<{C}, {Low}, Formula, {V}>",
        launches.each(size, V),
        *four,
        low,
        k,
        None,
        None,
        weights,
        size,
    )


def expected(compiled, vectors, arrays, k, weights):
    """The vectors after NumPy's run of the statements, with one set of scalars for the weights and
    another for the rest.
    """
    found = [array.copy() for array in arrays]
    for part, values in zip(
        (slice(0, weights), slice(weights, None)), k.reshape(2, -1), strict=True
    ):
        if found[0][part].size:
            views = dict(zip(vectors, (array[part] for array in found), strict=True))
            ops.map(
                compiled, views, dict(zip(compiled.folded, map(np.asarray, values), strict=True))
            )
    return found


@pytest.mark.parametrize("C", ["float", "double"])
@pytest.mark.parametrize("name", list(sheet.UPDATES))
def test_update_gives_the_bits_that_numpy_gives(name, C):
    compiled, vectors = program_of(name)
    random, dtype = rng(16), NAMES[C]
    for size, weights in ((1, 1), (7, 4), (8, 0), (2049, 1030)):
        arrays = [random.uniform(0.1, 1, size).astype(dtype) for _ in vectors]
        k = random.uniform(0.1, 0.9, 2 * len(compiled.folded)).astype(dtype)
        want = expected(compiled, vectors, arrays, k, weights)
        for V in (16 // STORAGE[C], 1):
            after = update(update_source(name), compiled, vectors, C, V, arrays, k, weights, size)
            for got, wanted in zip(after, want, strict=False):
                np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("Low", ["half_t", "bfloat16_t"])
def test_update_casts_the_new_parameters_and_recast_those_there_are(Low):
    compiled, vectors = program_of("sgd")
    for size in (1, 6, 1030):
        w, g = (rng(17).standard_normal(size).astype(np.float32) for _ in range(2))
        k = np.full(2, 0.5, np.float32)
        for V in (4, 1):
            after = update(
                update_source("sgd"),
                compiled,
                vectors,
                "float",
                V,
                [w, g],
                k,
                size,
                size,
                fresh(size, Low),
                Low,
            )
            assert after[4].tobytes() == stored(after[0], Low).tobytes()
        alone = launch(
            update_source("sgd"),
            f"recast<float, {Low}>",
            launches.flat(size, 1),
            w,
            fresh(size, Low),
            size,
        )
        assert alone[1].tobytes() == stored(w, Low).tobytes()


def prepare_update(device, source, C, slot, control, scalars, vectors, weights, blocks=1, **how):
    """The launch, with scratch of its own."""
    four = [*vectors, None, None][:4]
    partials, counter = (
        device.to_device(fresh(2 * blocks, C)),
        device.to_device(np.zeros(1, np.uint32)),
    )
    flags = [float(how.get("clip_norm", 0)), np.int32(how.get("scaled", 0)), how.get("growth", 100)]
    device.launch(
        device.kernel(source, f"prepare_update<{C}, Formula>"), Launch((blocks, 1), (256, 1)),
        [slot, control, scalars, *four, partials, counter, *flags, np.int32(how.get("tolerant", 0)),
            None, np.int32(0),
         weights, four[0].size],
    )  # fmt: skip
    assert counter == 0


@pytest.mark.parametrize("C", ["float", "double"])
@pytest.mark.parametrize(
    ("size", "weights", "blocks"), [(1, 1, 1), (5000, 4000, 3), (5000, 0, 1), (300, 300, 9)]
)
def test_the_end_of_a_step_takes_norm_and_penalties_answers_and_moves_on(size, weights, blocks, C):
    random, dtype = rng(15, size), np.dtype(NAMES[C]).type
    w, g = (random.standard_normal(size).astype(dtype) for _ in range(2))
    w[2::5] = 0
    compiled = program_of("sgd", ALL)[0]
    for l1, l2, gain, more in ((0, 0, 1, 7), (0.5, 0, 1, 0), (0, 0.25, 64, 0), (0.5, 0.25, 64, 7)):
        scalars = computed(np.full(Scalar.FIRST_OF_UPDATE + 2 * len(compiled.folded), 0.5), C)

        def work(device, control, scalars, w, g, answer, moved, l1=l1, l2=l2, gain=gain, more=more):
            rates = np.arange(64) / 100
            fields = {"first": 3, "batch_rows": more, "step": 9, "rates": rates, "turn": 4}
            slot = set_slot(
                device, control, scalars, w, answer=answer, settings=[0.5, l1, l2], **fields
            )
            scalars[: Scalar.L1] = [0.25, gain, 10]
            prepare_update(
                device,
                penalised("sgd"),
                C,
                slot,
                control,
                scalars,
                [w, g],
                weights,
                blocks,
                clip_norm=1e-3,
            )
            found = slot.view(cuda_slot.SLOT)[0]
            moved[...] = [found["first"], found["step"], found["turn"], found["settings"][0]]
            assert found["answer"] == device.address(answer) + (32 if more else 0)

        after = try_out(work, new_control(loss_scale=gain), scalars, w, g, np.zeros(4), np.zeros(4))
        W, slope = w[:weights].astype(np.float64), g.astype(np.float64) / gain
        slope[:weights] += l1 * np.sign(W) + l2 * W
        J = 10 + l1 * abs(W).sum() + 0.5 * l2 * (W * W).sum()
        values = {
            "rate": 0.5,
            "l1": l1,
            "l2": l2,
            "clip": 1e-3 / np.sqrt((slope * slope).sum()),
            "unscale": 1 / gain,
        }
        close(after[1][: Scalar.L1], [0.25, gain, 0], C)
        close(
            after[1][Scalar.FIRST_OF_UPDATE :][: len(compiled.folded)],
            list(compiled.fold(values).values()),
            C,
            20,
        )
        np.testing.assert_allclose(after[4], [J, 0, 0, 4], rtol=20 * EPSILON[C])
        np.testing.assert_array_equal(after[5], [10, 10, 5, 0.05] if more else [3, 9, 4, 0.5])
        assert after[0].view(CONTROL)[0]["updates"] == 1


def end_of_step(C, name, control, arrays, scale=1.0, gain=1.0, J=1.0, **how):
    """set_slot, prepare_update, update: the vectors, control block and answer afterwards."""
    source, size, compiled = penalised(name), arrays[0].size, program_of(name, ALL)[0]
    scalars = computed(np.full(Scalar.FIRST_OF_UPDATE + 2 * len(compiled.folded), 0.5), C)

    def work(device, control, scalars, answer, *vectors):
        settings = list({**VALUES, "rate": how.get("rate", VALUES["rate"])}.values())
        slot = set_slot(
            device,
            control,
            scalars,
            vectors[0],
            answer=answer,
            settings=settings,
            step=how.get("step", 1),
        )
        scalars[: Scalar.L1] = [scale, gain, J]
        prepare_update(device, source, C, slot, control, scalars, vectors, size // 2, **how)
        V = 16 // STORAGE[C]
        four = [*vectors, *[None] * (4 - len(vectors))]
        kernel = device.kernel(source, f"update<{C}, half_t, Formula, {V}>")
        k = scalars[Scalar.FIRST_OF_UPDATE :]
        device.launch(
            kernel, launches.each(size, V), [*four, None, k, control, None, size // 2, size]
        )

    found = try_out(work, control, scalars, np.zeros(4), *arrays)
    return found[3:], found[0].view(CONTROL)[0], found[2]


def penalised_squares(w, g, gain):
    """Σ g² behind unscaling and the penalties of VALUES, on the first half of the entries."""
    w, g = w.astype(np.float64), g.astype(np.float64) / gain
    half = w.size // 2
    g[:half] += VALUES["l2"] * w[:half] + VALUES["l1"] * np.sign(w[:half])
    return float((g * g).sum())


@pytest.mark.parametrize("C", ["float", "double"])
@pytest.mark.parametrize("name", list(sheet.UPDATES))
def test_scalars_are_evaluated_on_the_device_and_biases_neither_decay_nor_are_penalised(name, C):
    size, random = 10, rng(19)
    compiled, vectors = program_of(name, ALL)
    arrays = [random.uniform(0.1, 1, size).astype(NAMES[C]) for _ in vectors]
    norm = np.sqrt(penalised_squares(*arrays[:2], 8))
    for clip_norm, clip in ((norm / 4, 0.25), (0.0, 1.0), (1.5 * norm, 1.0)):
        values = {**VALUES, "t": 4.0, "clip": clip, "unscale": 1 / 8}
        parts = [compiled.fold(values), compiled.fold({**values, "decay": 0, "l1": 0, "l2": 0})]
        k = computed([list(part.values()) for part in parts], C)
        want = expected(compiled, vectors, arrays, k.ravel(), size // 2)
        got, control, answer = end_of_step(
            C,
            name,
            new_control(updates=3, loss_scale=8.0),
            arrays,
            gain=8.0,
            scale=0.125,
            J=0.5,
            step=9,
            clip_norm=clip_norm,
        )
        assert (control["updates"], control["status"], control["skip"], control["fault_step"]) == (
            4,
            0,
            0,
            0,
        )
        w = arrays[0][: size // 2].astype(np.float64)
        J = 0.5 + VALUES["l1"] * abs(w).sum() + 0.5 * VALUES["l2"] * (w * w).sum()
        np.testing.assert_allclose(answer, [J, 0, 0, 8], rtol=8 * EPSILON[C])
        assert got[1].tobytes() == arrays[1].tobytes(), "the gradient is only read"
        for after, wanted in zip([got[0], *got[2:]], [want[0], *want[2:]], strict=True):
            np.testing.assert_allclose(after, wanted, rtol=16 * EPSILON[C])


INF = float("inf")
FAULT = {"status": int(Status.NOT_FINITE), "fault_step": 5}
STEPS = {  # control before, arguments → control after, whether the update took place
    "a step": ({}, {}, {"updates": 1}, True),
    "a loss that is not finite": ({}, {"J": INF}, FAULT, False),
    "a gradient that is not finite": ({}, {"g": np.nan}, FAULT, False),
    "after a fault": (
        {"status": 2, "fault_step": 3, "updates": 7},
        {},
        {"status": 2, "fault_step": 3, "updates": 7},
        False,
    ),
    "a fault in this step": ({"status": 8}, {}, {"status": 8, "fault_step": 5}, False),
    "a batch of weight 0": ({}, {"scale": 0.0}, {}, False),
    "an overflow of a scaled gradient": (
        {"loss_scale": 64, "good_steps": 9},
        {"g": INF},
        {"loss_scale": 32},
        False,
    ),
    "an overflow at scale 1": ({"loss_scale": 1}, {"g": INF}, FAULT, False),
    "a scaled loss that is not finite": (
        {"loss_scale": 64},
        {"J": np.nan},
        {"loss_scale": 64, **FAULT},
        False,
    ),
    "a rate at which parameters overflow": ({}, {"rate": 1e39}, FAULT, False),
    "the same, left out": ({}, {"rate": 1e39, "tolerant": 1}, {"skipped": 1}, False),
    "an overflow that is not the scale's": (
        {"loss_scale": 64},
        {"rate": 1e39},
        {"loss_scale": 64, **FAULT},
        False,
    ),
    "squares that overflow, not their root": ({}, {"g": 1e25}, {"updates": 1}, True),
    "a good step": (
        {"loss_scale": 64, "good_steps": 9},
        {},
        {"loss_scale": 64, "good_steps": 10, "updates": 1},
        True,
    ),
    "enough good steps": (
        {"loss_scale": 64, "good_steps": 99},
        {},
        {"loss_scale": 128, "updates": 1},
        True,
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_what_becomes_of_a_step(case):
    before, arguments, after, updated = STEPS[case]
    arrays, rest = (
        [np.ones(6, np.float32), np.ones(6, np.float32)],
        {k: v for k, v in arguments.items() if k != "g"},
    )
    arrays[1][3] = arguments.get("g", 1)
    (w, _), control, answer = end_of_step(
        "float", "sgd", new_control(**before), arrays, **rest, step=5, scaled="loss_scale" in before
    )
    assert (w != 1).all() if updated else (w == 1).all()
    wanted = {
        "updates": 0,
        "fault_step": 0,
        "good_steps": 0,
        "loss_scale": 1,
        "status": 0,
        **after,
        "skip": int(not updated),
    }
    assert {name: control[name] for name in wanted} == wanted
    assert (answer[1], answer[2]) == (wanted["status"], wanted["fault_step"])
    assert answer[3] == (0 if "scale" in arguments else 1)


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", TYPES)
def test_randomize_fills_memory_with_numbers_between_minus_1_and_1(T):
    source, name, grid = update_source("sgd"), f"randomize<{T}>", Launch((3, 1), (256, 1))
    found = [
        read(launch(source, name, grid, fresh(4000, T), 4000, np.uint32(seed))[0], T)
        for seed in (1, 2)
    ]
    for numbers in found:
        assert abs(numbers).max() <= 1
        assert abs(numbers.mean()) < 0.05
        assert numbers.std() == pytest.approx(1 / 3**0.5, rel=0.05)
    assert abs(np.corrcoef(*found)[0, 1]) < 0.1


@pytest.mark.parametrize("Low", ["half_t", "bfloat16_t"])
def test_narrowing_rounds_to_nearest_ties_to_even_and_keeps_nan(Low):
    bits = rng(20).integers(0, 2**32, 20000, dtype=np.uint32)
    bits[np.isnan(bits.view(np.float32))] |= 1 << 22  # a quiet one: NumPy warns of others
    shift = 13 if Low == "half_t" else 16
    ties = (bits[:8000] >> shift << shift | 1 << shift - 1).astype(np.uint32)
    special = [
        0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        -np.nan,
        65504,
        65519.996,
        65520,
        6e-8,
        3e-8,
        2.9e-8,
        3.4e38,
        1e-40,
    ]
    x = np.concatenate(
        [bits.view(np.float32), ties.view(np.float32), np.array(special, np.float32)]
    )
    low = launch(
        update_source("sgd"),
        f"recast<float, {Low}>",
        Launch((2, 1), (256, 1)),
        x,
        fresh(x.size, Low),
        x.size,
    )[1]
    with np.errstate(invalid="ignore"):
        every = read(np.arange(2**16, dtype=np.uint16).view(low.dtype), Low)
    grid = np.unique(every[np.isfinite(every)])
    wide = x.astype(np.float64)
    above = np.clip(np.searchsorted(grid, wide), 1, grid.size - 1)
    got = read(low, Low)
    finite = np.isfinite(x) & (abs(wide) <= grid[-1])
    lower, upper = grid[above - 1], grid[above]
    nearer = np.where(wide - lower < upper - wide, lower, upper)
    tie = wide - lower == upper - wide
    assert tie[finite].sum() > 100
    np.testing.assert_array_equal(got[finite & ~tie], nearer[finite & ~tie])
    assert (low.view(np.uint16)[finite & tie] % 2 == 0).all()
    assert ((got == lower) | (got == upper))[finite].all()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
    step = grid[-1] - grid[-2]
    np.testing.assert_array_equal(np.isinf(got), abs(wide) >= grid[-1] + step / 2)


def test_a_nan_in_s_or_g_or_x_is_not_lost_on_the_way():
    nan, one, grid = (
        np.full((1, 16), np.nan, np.float32),
        np.ones((1, 16), np.float32),
        launches.tiles(1, 16, 4, 1).launch,
    )
    for sigma in every_activation():
        Z = bias_activation(sigma, "float", nan, None, fresh((1, 16), "float"), False, grid)[2]
        D, db = gradient(
            sigma, "float", nan, one, one, fresh((1, 16), "float"), fresh(16, "float"), False, grid
        )[3:]
        assert np.isnan([Z, D, db[None]]).all(), sigma.name
    for objective in every_objective():
        k, Y = computed(0.5, "float"), one
        after = elementwise(
            objective,
            "float",
            nan,
            Y,
            k,
            None,
            fresh((1, 16), "float"),
            None,
            computed(0, "float"),
            False,
            grid,
        )
        J, D, _ = loss_of(objective, nan, Y, k)
        assert np.isnan([J, after[3]]).all(), objective.loss.name
        np.testing.assert_array_equal(np.isnan(after[1]), np.isnan(D), objective.loss.name)
