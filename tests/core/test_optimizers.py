"""Every update rule against the paper's formulas, entry by entry in Python floats; schedules,
clipping, penalties.
"""

import copy
import dataclasses
import math
import re
import tracemalloc

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core.schedules import Progress
from mlpcore.engine.lanes import Update

# A loss that is linear in the output has whatever gradient the targets say: dW = Xᵀ Y / m, db =
# the mean of Y.
LINEAR = mc.Loss("linear", "y * z", "y + 0 * z")
PULL = mc.Loss("pull", "0 * z", "y + 0 * z")  # the same without a loss that could overflow
FLAT = mc.Loss("flat", "0 * z + 1", "0 * z")
STEPS = 20


# -- the rules, from the papers --------------------------------------------------------------------


def sgd(w, g, state, t, rate, decay):
    return w - rate * g


def momentum(w, g, state, t, rate, decay, mu=0.9):
    state["v"] = mu * state.get("v", 0.0) - rate * g
    return w + state["v"]


def nesterov(w, g, state, t, rate, decay, mu=0.9):
    """Sutskever et al. 2013, 3 and 4: the gradient is taken at x + mu v, and w is that point."""
    v = state.get("v", 0.0)
    x = w - mu * v
    state["v"] = mu * v - rate * g
    return x + state["v"] + mu * state["v"]


def gradient_momentum(w, g, state, t, rate, decay, mu=0.9):
    """PyTorch's SGD, with dampening 0."""
    state["b"] = mu * state.get("b", 0.0) + g
    return w - rate * state["b"]


def gradient_nesterov(w, g, state, t, rate, decay, mu=0.9):
    state["b"] = mu * state.get("b", 0.0) + g
    return w - rate * (g + mu * state["b"])


def adam(w, g, state, t, rate, decay, beta1=0.8, beta2=0.95, epsilon=1e-2):
    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return w - rate * (m_hat / (math.sqrt(v_hat) + epsilon) + decay * w)


def adam_hat(w, g, state, t, rate, decay, beta1=0.8, beta2=0.95, epsilon=1e-2):
    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
    return w - rate * math.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (math.sqrt(v) + epsilon)


def rmsprop(w, g, state, t, rate, decay, alpha=0.9, epsilon=1e-2):
    state["v"] = alpha * state.get("v", 0.0) + (1 - alpha) * g * g
    return w - rate * g / (math.sqrt(state["v"]) + epsilon)


def lion(w, g, state, t, rate, decay, beta1=0.8, beta2=0.95):
    m = state.get("m", 0.0)
    c = beta1 * m + (1 - beta1) * g
    state["m"] = beta2 * m + (1 - beta2) * g
    return w - rate * (math.copysign(1.0, c) + decay * w)


RULES = [
    ("sgd", lambda rate: mc.SGD(rate), sgd, 0.0),
    ("sgd ignores nesterov without momentum", lambda rate: mc.SGD(rate, nesterov=True), sgd, 0.0),
    ("momentum", lambda rate: mc.SGD(rate, momentum=0.9), momentum, 0.0),
    ("nesterov", lambda rate: mc.SGD(rate, momentum=0.9, nesterov=True), nesterov, 0.0),
    (
        "gradients",
        lambda rate: mc.SGD(rate, momentum=0.9, velocity="gradients"),
        gradient_momentum,
        0.0,
    ),
    (
        "nesterov, gradients",
        lambda rate: mc.SGD(rate, 0.9, True, velocity="gradients"),
        gradient_nesterov,
        0.0,
    ),
    ("adam", lambda rate: mc.Adam(rate, beta1=0.8, beta2=0.95, epsilon=1e-2), adam, 0.0),
    (
        "adam hat",
        lambda rate: mc.Adam(rate, beta1=0.8, beta2=0.95, epsilon=1e-2, epsilon_hat=True),
        adam_hat,
        0.0,
    ),
    ("adamw", lambda rate: mc.AdamW(rate, 0.3, beta1=0.8, beta2=0.95, epsilon=1e-2), adam, 0.3),
    (
        "adamw without decay",
        lambda rate: mc.AdamW(rate, 0.0, beta1=0.8, beta2=0.95, epsilon=1e-2),
        adam,
        0.0,
    ),
    ("rmsprop", lambda rate: mc.RMSprop(rate, alpha=0.9, epsilon=1e-2), rmsprop, 0.0),
    ("lion", lambda rate: mc.Lion(rate, beta1=0.8, beta2=0.95), lion, 0.0),
    ("lion with decay", lambda rate: mc.Lion(rate, 0.3, beta1=0.8, beta2=0.95), lion, 0.3),
]
RATES = [0.05, mc.InverseScaling(0.05, 0.7)]


@pytest.mark.parametrize("rate", RATES, ids=["constant", "scheduled"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("make", "rule", "decay"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES]
)
def test_twenty_updates_are_those_of_the_paper_entry_by_entry(make, rule, decay, bias, rate):
    net = mc.MLP([3, 2], bias=bias, dtype="float64", seed=3)
    net.parameters[...] += 0.5
    trainer = mc.Trainer(net, loss=LINEAR, optimizer=make(rate))
    weights = net.layout.weights
    plain, states = net.parameters.tolist(), [{} for _ in range(net.layout.size)]
    rng = np.random.default_rng(7)
    for t in range(1, STEPS + 1):
        X, Y = (
            rng.standard_normal((5, 3)),
            rng.standard_normal((5, 2)) * rng.choice([1e-3, 1.0, 30.0]),
        )
        gradient = [*(X.T @ Y / 5).ravel(), *(Y.mean(axis=0) if bias else [])]
        now = rate if isinstance(rate, float) else 0.05 / t**0.7
        for i, g in enumerate(gradient):
            plain[i] = rule(plain[i], float(g), states[i], t, now, decay if i < weights else 0.0)
        trainer.step(X, Y)
        np.testing.assert_allclose(
            net.parameters, plain, rtol=1e-10, atol=1e-13, err_msg=f"update {t}"
        )
    assert trainer.progress.step == STEPS


@pytest.mark.parametrize(
    ("make", "rule"), [rule[1:3] for rule in RULES], ids=[rule[0] for rule in RULES]
)
def test_float32_updates_agree_with_float64_ones_over_vectors_longer_than_a_piece(make, rule):
    rng = np.random.default_rng(1)
    batches = [(rng.standard_normal((4, 200)).astype(np.float32),
            rng.standard_normal((4, 200)).astype(np.float32))
               for _ in range(3)]  # fmt: skip
    found = []
    for dtype in ("float32", "float64"):
        net = mc.MLP([200, 200], dtype=dtype, seed=2)  # 40,200 entries: two pieces of 32,768
        trainer = mc.Trainer(net, loss=LINEAR, optimizer=make(0.01))
        for X, Y in batches:
            trainer.step(X, Y)
        found.append(net.parameters.astype(np.float64))
    far = abs(found[0] - found[1]) > 1e-5 * (1 + abs(found[1]))
    # a sign may fall either way where rounding decides
    assert far.sum() <= (4 if rule is lion else 0)


@pytest.mark.parametrize(
    "optimizer", [mc.AdamW(0.1, weight_decay=0.2), mc.Lion(0.1, weight_decay=0.2)]
)
def test_decay_shrinks_weights_and_leaves_biases(optimizer):
    net = mc.MLP([3, 4, 2], "tanh", dtype="float64", seed=1)
    net.parameters[...] = np.arange(1.0, 1 + net.layout.size)
    before = net.parameters.copy()
    mc.Trainer(net, loss=FLAT, optimizer=optimizer).step(np.ones((3, 3)), np.ones((3, 2)))
    n = net.layout.weights
    np.testing.assert_allclose(net.parameters[:n], before[:n] * (1 - 0.1 * 0.2), rtol=1e-14)
    np.testing.assert_array_equal(net.parameters[n:], before[n:])


def test_optimizers_without_decay_do_not_move_on_a_flat_loss():
    for optimizer in (mc.SGD(0.1, momentum=0.5), mc.Adam(0.1), mc.RMSprop(0.1), mc.Lion(0.1)):
        net = mc.MLP([2, 2], dtype="float64")
        before = net.parameters.copy()
        mc.Trainer(net, loss=FLAT, optimizer=optimizer).step(np.ones((3, 2)), np.ones((3, 2)))
        np.testing.assert_array_equal(net.parameters, before)


# -- one table of problems -------------------------------------------------------------------------


def _least_squares(rng):
    X = rng.standard_normal((64, 3)) * [1.0, 2.0, 0.5]
    Y = X @ rng.standard_normal((3, 2)) + 0.3 * rng.standard_normal((64, 2))
    design = np.hstack([X, np.ones((64, 1))])
    theta = np.linalg.lstsq(design, Y)[0]
    return "identity", "squared_error", X, Y, np.concatenate([theta[:3].ravel(), theta[3]])


def _ridge(rng):
    X = rng.standard_normal((64, 3))
    Y = X @ [[1.0], [-2.0], [0.5]] + 0.1 * rng.standard_normal((64, 1))
    theta = np.linalg.solve(X.T @ X / 64 + 0.3 * np.eye(3), X.T @ Y / 64)
    return "identity", "squared_error", X, Y, theta.ravel()


def _logistic(rng):
    X, theta = rng.standard_normal((64, 3)), np.array([1.5, -0.7, 0.4, 0.2])
    return (
        "sigmoid",
        "binary_cross_entropy",
        X,
        1 / (1 + np.exp(-(X @ theta[:3] + theta[3])))[:, None],
        theta,
    )


def _poisson(rng):
    X, theta = rng.standard_normal((64, 3)), np.array([0.5, -0.7, 0.4, 0.2])
    return "exp", "poisson", X, np.exp(X @ theta[:3] + theta[3])[:, None], theta


def _median(rng):
    y = rng.standard_normal((63, 1))
    return "identity", "absolute_error", np.ones((63, 1)), y, np.median(y, axis=0)


PROBLEMS = {
    "least squares": _least_squares,
    "ridge": _ridge,
    "logistic": _logistic,
    "poisson": _poisson,
    "median": _median,
}
OPTIMIZERS = [
    lambda n: mc.SGD(mc.Cosine(0.2, steps=n)),
    lambda n: mc.SGD(mc.Cosine(0.03, steps=n), momentum=0.9),
    lambda n: mc.SGD(mc.Cosine(0.03, steps=n), momentum=0.9, nesterov=True),
    lambda n: mc.Adam(mc.Cosine(0.1, steps=n)),
    lambda n: mc.AdamW(mc.Cosine(0.1, steps=n), weight_decay=0.0),
    lambda n: mc.RMSprop(mc.Cosine(0.1, steps=n)),
    lambda n: mc.Lion(mc.Cosine(0.03, steps=n)),
]


@pytest.mark.parametrize("problem", list(PROBLEMS))
@pytest.mark.parametrize(
    "make", OPTIMIZERS, ids=["SGD", "momentum", "nesterov", "Adam", "AdamW", "RMSprop", "Lion"]
)
def test_every_optimizer_reaches_the_known_optimum(make, problem):
    output, loss, X, Y, optimum = PROBLEMS[problem](np.random.default_rng(5))
    bias = problem not in ("ridge", "median")
    net = mc.MLP([X.shape[1], Y.shape[1]], output=output, bias=bias, dtype="float64", init="zeros")
    trainer = mc.Trainer(
        net, loss=loss, optimizer=make(1500), l2=0.3 if problem == "ridge" else 0.0
    )
    for _ in range(1500):
        trainer.step(X, Y)
    np.testing.assert_allclose(net.parameters, optimum, atol=5e-3)


# -- schedules -------------------------------------------------------------------------------------


def at(schedule, step, total=None, reductions=0):
    return schedule.at(Progress(step, total, reductions))


def test_a_number_and_constant_mean_the_same():
    assert mc.SGD(0.3).rate(Progress(99)) == mc.SGD(mc.Constant(0.3)).rate(Progress(7)) == 0.3


def test_step_decay_multiplies_after_every_so_many_updates():
    schedule = mc.StepDecay(0.8, every=10, factor=0.5)
    assert [at(schedule, t) for t in (0, 9, 10, 19, 20, 30)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.1]


def test_cosine_warms_up_in_a_line_and_ends_at_its_final_rate():
    schedule = mc.Cosine(1.0, steps=110, warmup=10, final=0.2)
    np.testing.assert_allclose([at(schedule, t) for t in (0, 4, 9)], [0.1, 0.5, 1.0])
    np.testing.assert_allclose(
        [at(schedule, t) for t in (10, 35, 60, 85, 110, 500)],
        [
            1.0,
            0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2,
            0.6,
            0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2,
            0.2,
            0.2,
        ],
    )


def test_cosine_without_steps_takes_them_from_fit_and_says_so_outside():
    assert at(mc.Cosine(1.0), 50, total=100) == pytest.approx(0.5)
    net = mc.MLP([2, 1])
    trainer = mc.Trainer(net, loss="squared_error", optimizer=mc.SGD(mc.Cosine(0.1)))
    X, Y = np.ones((8, 2)), np.ones(8)
    before = net.parameters.copy()
    with pytest.raises(ValueError, match=r"Cosine needs steps=.* outside fit"):
        trainer.step(X, Y)
    np.testing.assert_array_equal(net.parameters, before)
    rates = trainer.fit(X, Y, epochs=5, batch_size=4, progress=False)["learning_rate"]
    np.testing.assert_allclose(
        rates, [0.1 * (1 + math.cos(math.pi * (2 * e - 1) / 10)) / 2 for e in range(1, 6)]
    )
    again = trainer.fit(X, Y, epochs=5, batch_size=4, progress=False)["learning_rate"]
    np.testing.assert_allclose(again, rates)  # each fit runs the whole curve


def test_inverse_scaling_divides_by_a_power_of_the_updates_number():
    schedule = mc.InverseScaling(0.6, power=0.5)
    np.testing.assert_allclose([at(schedule, t) for t in (0, 3, 99)], [0.6, 0.3, 0.06])


def test_adaptive_lowers_the_rate_each_time_the_loss_has_not_fallen_for_patience_epochs():
    def rates(loss, Y):
        schedule = mc.Adaptive(0.1, factor=0.5, patience=2, minimum=0.02)
        trainer = mc.Trainer(mc.MLP([2, 1], dtype="float64"), loss=loss, optimizer=mc.SGD(schedule))
        return trainer.fit(np.ones((4, 2)), Y, epochs=10, batch_size=4, progress=False)[
            "learning_rate"
        ]

    np.testing.assert_allclose(
        rates(FLAT, np.ones(4)), [0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.02, 0.02, 0.02]
    )
    np.testing.assert_allclose(rates(LINEAR, np.ones(4)), [0.1] * 10)  # falls without end


def test_adaptive_counts_a_fall_smaller_than_its_tolerance_as_none():
    def last(tolerance):
        schedule = mc.Adaptive(1e-3, factor=0.5, patience=1, tolerance=tolerance)
        trainer = mc.Trainer(
            mc.MLP([1, 1], dtype="float64"), loss=LINEAR, optimizer=mc.SGD(schedule)
        )
        return trainer.fit(np.ones((2, 1)), np.ones(2), epochs=4, batch_size=2, progress=False)[
            "learning_rate"
        ][-1]

    assert last(tolerance=1e-4) == 1e-3  # J falls by 2e-3 an epoch
    assert last(tolerance=1.0) == pytest.approx(1e-3 / 4)


@pytest.mark.parametrize(
    ("monitor", "falls"),
    [("loss", 0), ("validation_loss", 4), ("validation_r2", 4), ("validation_off", 4)],
)
def test_adaptive_follows_the_figure_that_it_is_told_to(monitor, falls):
    """The training loss falls without end; the validation's figures do not improve, as its targets
    go the other way.
    """
    mode = "min" if monitor == "validation_off" else None
    schedule = mc.Adaptive(0.1, factor=0.5, patience=1, tolerance=0.0, monitor=monitor, mode=mode)
    trainer = mc.Trainer(
        mc.MLP([1, 1], dtype="float64", init="zeros"), "squared_error", mc.SGD(schedule)
    )
    X, Y = np.ones((4, 1)), np.ones((4, 1))
    held = (np.array([[1.0], [2.0]]), np.array([[-1.0], [-2.0]]))
    metrics = {"off": lambda y, z: abs(y - z).max()}
    history = trainer.fit(
        X, Y, epochs=5, batch_size=4, validation=held, metrics=metrics, progress=False
    )
    assert trainer.progress.reductions == falls
    np.testing.assert_allclose(
        history["learning_rate"], [0.1 * 0.5 ** min(falls, max(0, e - 1)) for e in range(5)]
    )


def test_adaptive_goes_on_with_the_validations_figure_in_a_resumed_run(tmp_path):
    random = np.random.default_rng(9)
    X, Y = random.standard_normal((40, 3)), random.standard_normal((40, 1))
    how = {"epochs": 12, "batch_size": 8, "validation": (X[:9], -Y[:9]), "progress": False}

    def make():
        schedule = mc.Adaptive(
            0.1, factor=0.5, patience=2, tolerance=1e-3, monitor="validation_loss"
        )
        return mc.Trainer(mc.MLP([3, 1]), "squared_error", mc.SGD(schedule))

    whole, left = make(), make()
    history = whole.fit(X, Y, **how)
    assert whole.progress.reductions > 2

    def leave(trainer, entry):
        if trainer.progress.epochs == 5:
            trainer.save(tmp_path / "run")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        left.fit(X, Y, callbacks=[leave], **how)
    resumed = mc.Trainer.load(tmp_path / "run")
    assert resumed.optimizer == whole.optimizer
    assert resumed.fit(X, Y, **how)["learning_rate"] == history["learning_rate"]
    np.testing.assert_array_equal(resumed.net.parameters, whole.net.parameters)


@pytest.mark.parametrize(
    "where", ["between two fits", "in a callback", "after a copy", "after a file"]
)
def test_another_adaptive_schedule_begins_at_its_own_rate(where, tmp_path):
    """The reductions of a schedule do not apply to the next one."""
    first, second = (
        mc.Adaptive(rate, factor=0.5, patience=1, tolerance=1e9) for rate in (0.1, 0.07)
    )
    trainer = mc.Trainer(mc.MLP([1, 1]), FLAT, mc.SGD(first))
    how = {"batch_size": 2, "progress": False}

    def turn(trainer, entry):
        if trainer.progress.epochs == 4:
            trainer.optimizer.learning_rate = second

    if where == "in a callback":
        rates = trainer.fit(np.ones((2, 1)), np.ones(2), epochs=7, callbacks=[turn], **how)[
            "learning_rate"
        ]
    else:
        rates = trainer.fit(np.ones((2, 1)), np.ones(2), epochs=4, **how)["learning_rate"]
        if where == "after a copy":
            trainer = copy.deepcopy(trainer)
        elif where == "after a file":
            trainer.save(tmp_path / "run")
            trainer = mc.Trainer.load(tmp_path / "run")
        trainer.optimizer.learning_rate = second
        rates += trainer.fit(np.ones((2, 1)), np.ones(2), epochs=3, **how)["learning_rate"]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.05, 0.025, 0.07, 0.07, 0.035])


def test_a_figure_that_the_history_will_not_have_is_refused_before_and_in_the_middle_of_fit():
    X, Y = np.ones((4, 1)), np.ones(4)
    followed = mc.Adaptive(0.1, monitor="validation_loss")

    def turn(trainer, entry):
        trainer.optimizer.learning_rate = followed

    for rate, how, words in (
        (followed, {}, "Adaptive monitors 'validation_loss', but fit was given no validation"),
        (
            mc.Adaptive(0.1, monitor="validation_accuracy"),
            {"validation": (X, Y)},
            "Adaptive: monitor.*validation_r2",
        ),
        (mc.Adaptive(0.1, monitor="seconds"), {"validation": (X, Y)}, "Adaptive: monitor"),
        (
            mc.Adaptive(0.1, monitor="validation_mae"),
            {"validation": (X, Y), "metrics": {"mae": lambda y, z: 0.0}},
            "Adaptive monitors 'validation_mae': say which is better",
        ),
        (0.1, {"callbacks": [turn]}, "Adaptive monitors 'validation_loss'"),
    ):
        trainer = mc.Trainer(mc.MLP([1, 1]), "squared_error", mc.SGD(rate))
        with pytest.raises(ValueError, match=words):
            trainer.fit(X, Y, epochs=3, batch_size=4, progress=False, **how)
        assert trainer.progress.step == (1 if "callbacks" in how else 0)
    with pytest.raises(TypeError, match="Adaptive: monitor must be a key of the history"):
        mc.Adaptive(0.1, monitor=None)


# -- schedules by a formula ------------------------------------------------------------------------


def test_a_formula_gives_the_rate_of_each_update():
    schedule = mc.FormulaSchedule(0.5, "rate * minimum(1, step / 4)")
    assert [at(schedule, t) for t in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert at(mc.FormulaSchedule(0.6, "rate / pow(step, 0.5)"), 3) == at(
        mc.InverseScaling(0.6, 0.5), 3
    )
    fit = Progress(step=30, total=40, begun=20, epochs=7)
    assert (
        mc.FormulaSchedule(1.0, "rate * (1 - (step - begun) / total) + epoch").at(fit)
        == 1 - 11 / 40 + 7
    )


def test_a_formula_can_be_scikit_learns_invscaling():
    """SGDOptimizer.iteration_ends: learning_rate_init / (t + 1)^power_t with t rows seen, once at
    the end of an epoch.
    """
    from sklearn.neural_network._stochastic_optimizers import SGDOptimizer

    n, power = 20, 0.3
    theirs = SGDOptimizer(
        [np.zeros(1)], learning_rate_init=0.1, lr_schedule="invscaling", power_t=power
    )
    schedule = mc.FormulaSchedule(0.1, f"rate / pow({n} * (epoch - 1) + 1, {power})")
    trainer = mc.Trainer(mc.MLP([2, 1]), "squared_error", mc.SGD(schedule))
    found = trainer.fit(np.ones((n, 2)), np.ones(n), epochs=5, batch_size=6, progress=False)[
        "learning_rate"
    ]
    wanted = []
    for epoch in range(1, 6):
        wanted.append(theirs.learning_rate)
        theirs.iteration_ends(epoch * n)
    np.testing.assert_allclose(found, wanted, rtol=1e-14)


@pytest.mark.parametrize(
    ("formula", "error", "words"),
    [
        ("rate * steps", ValueError, "reads 'steps'; it may read rate, step, begun, total, epoch"),
        ("rate *", ValueError, "cannot be read"),
        ("__import__('os')", ValueError, "is not allowed in formulas"),
        ("rate if step else 1", ValueError, "is not allowed in formulas"),
        ("kept(rate)", ValueError, "kept is for arrays only"),
        (lambda step: 0.1, TypeError, "a formula is a string"),
        (None, TypeError, "a formula is a string"),
        (["rate"], TypeError, "a formula is a string such as 'maximum(s, 0)'; got list"),
        ({"rate": 1}, TypeError, "a formula is a string such as 'maximum(s, 0)'; got dict"),
    ],
)
def test_what_is_no_formula_of_a_rate_is_refused_at_once(formula, error, words):
    with pytest.raises(error, match=f"FormulaSchedule: formula: .*{re.escape(words)}"):
        mc.FormulaSchedule(0.1, formula)
    with pytest.raises(ValueError, match="FormulaSchedule: rate must"):
        mc.FormulaSchedule(0.0, "rate")


@pytest.mark.parametrize("schedule", [mc.FormulaSchedule(0.1, "rate / total"), mc.Cosine(0.1)])
def test_a_schedule_that_reads_the_length_of_a_stream_of_unknown_length_is_refused_before_anything_changes(  # noqa: E501
    schedule,
):
    X, Y = np.eye(4), np.ones((4, 1))

    def batches():
        yield X, Y

    trainer = mc.Trainer(mc.MLP([4, 1]), "squared_error", mc.SGD(schedule))
    before = dataclasses.replace(trainer.progress)
    with pytest.raises(
        ValueError,
        match=r"learning_rate: .*stream of unknown length",
    ):
        trainer.fit(batches, epochs=2, progress=False)
    assert trainer.progress == before
    trainer.optimizer.learning_rate = 0.1
    trainer.fit(batches, epochs=1, progress=False)
    assert trainer.progress.epochs == 1


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("rate / maximum(3 - step, 0)", "has no value for"),
        ("log(3 - step)", "has no value for"),
        ("rate * pow(10, 400 * positive(step - 2))", "has no value for"),
        ("rate * (2 - step)", "must be finite and not negative; it is -0.1"),
        ("rate * total", "reads total, which is known only inside fit"),
    ],
)
def test_a_formula_that_gives_no_rate_says_so_and_changes_nothing(formula, words):
    trainer = mc.Trainer(mc.MLP([1, 1]), "squared_error", mc.SGD(mc.FormulaSchedule(0.1, formula)))
    found = []

    def steps():
        for _ in range(4):
            found.append(trainer.net.parameters.copy())
            trainer.step([[1.0]], [[1.0]])

    with pytest.raises(ValueError, match=f"learning_rate: .*{re.escape(words)}"):
        steps()
    np.testing.assert_array_equal(trainer.net.parameters, found[-1])


def test_a_formula_is_saved_as_text_and_a_run_goes_on_with_it(tmp_path):
    X, Y = np.random.default_rng(2).standard_normal((20, 2)), np.ones(20)

    def make():
        schedule = mc.FormulaSchedule(0.1, "rate * (1 - (step - begun - 1) / total) / epoch")
        return mc.Trainer(mc.MLP([2, 1]), "squared_error", mc.Adam(schedule))

    def leave(trainer, entry):
        trainer.save(tmp_path / "run")
        raise KeyboardInterrupt

    how = {"epochs": 3, "batch_size": 6, "progress": False}
    whole, left = make(), make()
    history = whole.fit(X, Y, **how)
    np.testing.assert_allclose(
        history["learning_rate"], [0.1 * (1 - (4 * e - 1) / 12) / e for e in (1, 2, 3)]
    )
    with pytest.raises(KeyboardInterrupt):
        left.fit(X, Y, callbacks=[leave], **how)
    resumed = mc.Trainer.load(tmp_path / "run")
    assert resumed.optimizer.learning_rate == mc.FormulaSchedule(
        0.1, "rate * (1 - (step - begun - 1) / total) / epoch"
    )
    assert resumed.fit(X, Y, **how)["learning_rate"] == history["learning_rate"]
    np.testing.assert_array_equal(resumed.net.parameters, whole.net.parameters)


class OwnSchedule(mc.Constant):
    """A user's, which no file can hold."""


def test_what_cannot_be_saved_is_refused_before_the_run_that_is_to_be_saved(tmp_path):
    trainer = mc.Trainer(mc.MLP([1, 1]), "squared_error", mc.SGD(OwnSchedule(0.1)))
    for save in (
        lambda: trainer.save(tmp_path / "run"),
        lambda: trainer.fit([[1.0]], [1.0], epochs=1, checkpoint=tmp_path / "run", progress=False),
    ):
        with pytest.raises(
            TypeError, match=r"learning_rate: OwnSchedule .* cannot be saved; .*mc\.FormulaSchedule"
        ):
            save()
    assert trainer.progress.step == 0
    assert not [*tmp_path.iterdir()]
    trainer.fit([[1.0]], [1.0], epochs=1, progress=False)
    assert trainer.progress.step == 1


@pytest.mark.parametrize("schedule", [mc.Adaptive(1e-7), mc.Adaptive(1e-7, minimum=0.0)])
def test_a_minimum_above_the_rate_does_not_raise_the_rate(schedule):
    assert at(schedule, 0) == 1e-7


# -- settings --------------------------------------------------------------------------------------

BAD = [
    *[(cls, "learning_rate", bad) for cls in (mc.SGD, mc.Adam, mc.AdamW, mc.RMSprop,
            mc.Lion) for bad in (-0.1, math.nan,
        math.inf)],
    *[(mc.SGD, "momentum", bad) for bad in (-0.1, 1.1, 2, math.nan)],
    *[(cls, name, bad) for cls in (mc.Adam, mc.AdamW, mc.Lion) for name in ("beta1",
            "beta2") for bad in (-0.1, 1.0, math.nan)],
    *[(cls, "epsilon", bad) for cls in (mc.Adam, mc.AdamW, mc.RMSprop) for bad in (0.0, -1e-8)],
    *[(cls, "weight_decay", bad) for cls in (mc.AdamW, mc.Lion) for bad in (-0.1, math.inf)],
    *[(mc.RMSprop, "alpha", bad) for bad in (-0.1, 1.0)],
]  # fmt: skip
WRONG_TYPE = [(mc.SGD, "learning_rate", "0.1"), (mc.SGD, "momentum", None),
    (mc.Adam, "beta1", True),
    (mc.AdamW, "epsilon", [1]),
              (mc.SGD, "nesterov", "yes"), (mc.SGD, "velocity", True)]  # fmt: skip


@pytest.mark.parametrize(("cls", "name", "bad"), BAD)
def test_a_setting_out_of_range_is_refused_at_first_and_later(cls, name, bad):
    with pytest.raises(ValueError, match=f"{cls.__name__}: {name} must.*{bad}"):
        cls(**{"learning_rate": 0.1, name: bad})
    optimizer = cls(0.1)
    kept = dataclasses.asdict(optimizer)
    with pytest.raises(ValueError, match=f"{cls.__name__}: {name} must"):
        setattr(optimizer, name, bad)
    assert dataclasses.asdict(optimizer) == kept


@pytest.mark.parametrize(("cls", "name", "bad"), WRONG_TYPE)
def test_a_setting_of_another_type_is_refused_at_first_and_later(cls, name, bad):
    with pytest.raises(TypeError, match=f"{name} must"):
        cls(**{"learning_rate": 0.1, name: bad})
    with pytest.raises(TypeError, match=f"{name} must"):
        setattr(cls(0.1), name, bad)


def test_an_unknown_velocity_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"SGD: velocity.*pytorch.*steps, gradients"):
        mc.SGD(0.1, 0.9, velocity="pytorch")


def test_a_misspelt_setting_is_refused_with_those_there_are():
    with pytest.raises(
        AttributeError, match="no setting 'rate'; it has learning_rate, weight_decay"
    ):
        mc.AdamW().rate = 0.1


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: mc.Constant(0.0), "rate"),
        (lambda: mc.StepDecay(0.1, every=0), "every"),
        (lambda: mc.StepDecay(0.1, every=5, factor=1.5), "factor"),
        (lambda: mc.Cosine(-0.1), "rate"),
        (lambda: mc.Cosine(0.1, steps=0), "steps"),
        (lambda: mc.Cosine(0.1, warmup=-1), "warmup"),
        (lambda: mc.Cosine(0.1, final=-1.0), "final"),
        (lambda: mc.InverseScaling(0.1, power=-1), "power"),
        (lambda: mc.Adaptive(0.1, factor=0.0), "factor"),
        (lambda: mc.Adaptive(0.1, patience=0), "patience"),
        (lambda: mc.Adaptive(0.1, tolerance=-1.0), "tolerance"),
        (lambda: mc.Adaptive(0.1, minimum=math.nan), "minimum"),
    ],
)
def test_a_schedules_setting_out_of_range_is_refused_by_name_and_none_can_be_changed_later(
    make, name
):
    with pytest.raises(ValueError, match=rf"\w+: {name} must"):
        make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        mc.Constant(0.1).rate = -1.0


@pytest.mark.parametrize(
    ("first", "change", "second"),
    [
        (mc.SGD(0.1), {"learning_rate": 0.01}, mc.SGD(0.01)),
        (mc.SGD(0.1), {"learning_rate": mc.Constant(0.02)}, mc.SGD(0.02)),
        (mc.AdamW(0.1), {"weight_decay": 0.0, "epsilon": 0.1}, mc.AdamW(0.1, 0.0, epsilon=0.1)),
        (mc.SGD(0.1, momentum=0.9), {"momentum": 0.0}, mc.SGD(0.1)),
        (mc.SGD(0.1), {"momentum": 0.9}, mc.SGD(0.1, momentum=0.9)),
        (mc.SGD(0.1, momentum=0.9), {"nesterov": True}, mc.SGD(0.1, momentum=0.9, nesterov=True)),
    ],
)
def test_a_setting_changed_before_the_first_step_of_a_trainer_counts_from_then_on(
    first, change, second
):
    """`Trainer.optimizer`: what is set on it counts from the next step on."""
    X, Y, found = np.random.default_rng(0).standard_normal((6, 3)), np.ones((6, 2)), []
    for optimizer, later in ((dataclasses.replace(first), change), (second, {})):
        net = mc.MLP([3, 2], dtype="float64", seed=4)
        trainer = mc.Trainer(net, loss="squared_error", optimizer=optimizer)
        for name, value in later.items():
            setattr(trainer.optimizer, name, value)
        for _ in range(3):
            trainer.step(X, Y)
        found.append(net.parameters)
    np.testing.assert_array_equal(found[0], found[1])


# -- a setting changed in the middle of a run ------------------------------------------------------


def row(gradients, optimizer, changes, dtype="float64", **settings):
    """The parameters after each update by these gradients (steps, n); `changes`: number of the step
    → settings from then on.
    """
    net = mc.MLP([1, len(gradients[0])], bias=False, dtype=dtype)
    net.parameters[...] = 1
    trainer, found = mc.Trainer(net, loss=PULL, optimizer=optimizer, **settings), []
    for t, g in enumerate(gradients, 1):
        for name, value in changes.get(t, {}).items():
            setattr(trainer.optimizer, name, value)
        trainer.step([[1.0]], [g])
        found.append(net.parameters.copy())
    return np.array(found), trainer


def torch_sgd(w, g, state, t, learning_rate, momentum, nesterov, velocity):
    """PyTorch's, whose buffer begins at the first gradient that meets a momentum, and waits while
    there is none.
    """
    if momentum:
        b = state["b"] = momentum * state["b"] + g if "b" in state else g
        g = g + momentum * b if nesterov else b
    return w - learning_rate * g


def torch_adam(
    w, g, state, t, learning_rate, beta1, beta2, epsilon, epsilon_hat=False, weight_decay=0.0
):
    """PyTorch's Adam and AdamW: exp_avg, exp_avg_sq, and bias corrections by today's betas."""
    w = w - learning_rate * weight_decay * w
    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
    first, second = 1 - beta1**t, math.sqrt(1 - beta2**t)
    root = (math.sqrt(v) + epsilon) / second if epsilon_hat else math.sqrt(v) / second + epsilon
    return w - learning_rate * (m / first) / root


def torch_rmsprop(w, g, state, t, learning_rate, alpha, epsilon):
    v = state["v"] = alpha * state.get("v", 0.0) + (1 - alpha) * g * g
    return w - learning_rate * g / (math.sqrt(v) + epsilon)


def paper_lion(w, g, state, t, learning_rate, weight_decay, beta1, beta2):
    c = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    state["m"] = beta2 * state.get("m", 0.0) + (1 - beta2) * g
    return w - learning_rate * (math.copysign(1.0, c) + weight_decay * w)


TORCH = {"velocity": "gradients"}
CHANGES = [
    (mc.Adam(0.01), torch_adam, [{"beta1": 0.99}, {"beta1": 0.5}, {"beta1": 0.0}, {"beta1": 0.9}]),
    (mc.Adam(0.01), torch_adam,
        [{"beta2": 0.9}, {"beta2": 0.9999}, {"beta2": 0.0}, {"beta2": 0.99, "beta1": 0.7}]),
    (mc.Adam(0.01), torch_adam,
        [{"epsilon_hat": True}, {"epsilon": 1e-3}, {"epsilon_hat": False}, {"learning_rate": 0.1}]),
    (mc.Adam(0.01, epsilon_hat=True), torch_adam,
        [{"beta2": 0.5}, {"epsilon_hat": False}, {"beta1": 0.3}]),
    (mc.AdamW(0.01, 0.1), torch_adam,
        [{"beta1": 0.99}, {"beta2": 0.9}, {"weight_decay": 1.0}, {"learning_rate": 0.0}]),
    (mc.RMSprop(0.01), torch_rmsprop,
        [{"alpha": 0.5}, {"epsilon": 0.1}, {"alpha": 0.999}, {"learning_rate": 0.1}]),
    (mc.Lion(0.01, 0.1), paper_lion,
        [{"beta1": 0.5}, {"beta2": 0.5}, {"weight_decay": 0.5}, {"beta1": 0.99}]),
    (mc.SGD(0.1, 0.9, **TORCH), torch_sgd,
        [{"learning_rate": 1.0}, {"momentum": 0.5}, {"nesterov": True}, {"momentum": 0.99}]),
    (mc.SGD(0.1, 0.9, **TORCH), torch_sgd,
        [{"momentum": 0.0}, {"momentum": 0.9}, {"nesterov": True}, {"momentum": 0.0}]),
    (mc.SGD(0.1, **TORCH), torch_sgd,
        [{"nesterov": True}, {"momentum": 0.9}, {"learning_rate": 0.01}, {"nesterov": False}]),
    (mc.SGD(0.1, 0.9, True), torch_sgd,
        [{"momentum": 0.5}, {"nesterov": False}, {"momentum": 0.0}, {"momentum": 0.9}]),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-11), ("float32", 2e-5)])
@pytest.mark.parametrize(("optimizer", "rule", "turns"), CHANGES)
def test_a_setting_changed_in_the_middle_counts_as_in_the_textbook_from_there_on(
    optimizer, rule, turns, dtype, rtol
):
    random, changes = (
        np.random.default_rng(3),
        {40 * i + 1: turn for i, turn in enumerate(turns, 1)},
    )
    gradients = random.standard_normal((200, 5)) * 10.0 ** random.integers(-2, 3, (200, 1)) + 0.3
    found, trainer = row(gradients, dataclasses.replace(optimizer), changes, dtype)
    settings, w, states = vars(optimizer).copy(), np.ones(5), [{} for _ in range(5)]
    settings.pop("layers", None)
    for t, g in enumerate(gradients, 1):
        settings |= changes.get(t, {})
        w = np.array([rule(w[i], g[i], states[i], t, **settings) for i in range(5)])
        np.testing.assert_allclose(
            found[t - 1], w, rtol=rtol, atol=rtol * abs(w).max(), err_msg=f"update {t}"
        )
    assert trainer.progress.step == 200


THEIRS = {  # optimizer, PyTorch's, number of the step → settings from then on: ours, theirs
    "Adam": (mc.Adam(0.01), {"lr": 0.01}, {
        41: ({"beta1": 0.99}, {"betas": (0.99, 0.999)}),
        81: ({"beta2": 0.9, "epsilon": 1e-3}, {"betas": (0.99, 0.9), "eps": 1e-3}),
    }),
    "AdamW": (mc.AdamW(0.01, 0.1), {"lr": 0.01, "weight_decay": 0.1}, {
        41: ({"weight_decay": 0.5}, {"weight_decay": 0.5}),
        81: ({"learning_rate": 0.1}, {"lr": 0.1}),
    }),
    "RMSprop": (mc.RMSprop(0.01), {"lr": 0.01}, {41: ({"alpha": 0.5}, {"alpha": 0.5})}),
    "SGD": (mc.SGD(0.1, 0.9, **TORCH), {"lr": 0.1, "momentum": 0.9}, {
        31: ({"learning_rate": 0.01}, {"lr": 0.01}), 61: ({"momentum": 0.0}, {"momentum": 0.0}),
        71: ({"momentum": 0.9}, {"momentum": 0.9}), 91: ({"nesterov": True}, {"nesterov": True}),
    }),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 1e19, 1e20])
@pytest.mark.parametrize("name", THEIRS)
def test_pytorch_itself_takes_the_same_steps(name, size):
    torch = pytest.importorskip("torch")
    optimizer, settings, changes = THEIRS[name]
    gradients = np.random.default_rng(12).standard_normal((120, 4))
    if size > 1:
        gradients = size * np.array([[1.0, -0.5], [0.2, 0.1]])
    found, _ = row(
        gradients,
        dataclasses.replace(optimizer),
        {t: mine for t, (mine, _) in changes.items()},
        "float32",
    )
    w = torch.ones(gradients.shape[1], requires_grad=True)
    theirs = getattr(torch.optim, name)([w], **settings)
    for t, g in enumerate(gradients, 1):
        theirs.param_groups[0].update(changes.get(t, ({}, {}))[1])
        w.grad = torch.tensor(g, dtype=torch.float32)
        theirs.step()
        np.testing.assert_allclose(
            found[t - 1], w.detach().numpy(), rtol=2e-5, atol=1e-6, err_msg=f"update {t}"
        )


def test_after_200_equal_gradients_a_longer_memory_takes_a_step_of_1_153_rates():
    found, _ = row(np.ones((201, 1)), mc.Adam(0.01), {201: {"beta1": 0.99}})
    m = 0.99 * (1 - 0.9**200) + 0.01
    assert (found[199] - found[200])[0] / 0.01 == pytest.approx(m / (1 - 0.99**201), rel=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    "rates",
    [[0.1] * 60, [0.1] * 20 + [0.02] * 40, [0.0] * 20 + [0.1] * 40],
    ids=["one", "two", "none"],
)
def test_a_velocity_is_carried_over_into_the_other_convention_as_the_step_that_it_was(
    rates, nesterov
):
    """Nothing changes if the rate stays the same after the switch."""
    random, changes = (
        np.random.default_rng(4),
        {t: {"learning_rate": rate} for t, rate in enumerate(rates, 1)},
    )
    gradients = random.standard_normal((60, 4))
    for first, second in (("steps", "gradients"), ("gradients", "steps")):
        plain, _ = row(gradients, mc.SGD(0.1, 0.9, nesterov, first), changes)
        turned, _ = row(
            gradients,
            mc.SGD(0.1, 0.9, nesterov, first),
            {**changes, 41: {**changes[41], "velocity": second}},
        )
        np.testing.assert_allclose(turned, plain, rtol=1e-12)


def test_the_two_velocities_differ_where_the_rate_changes_and_only_there():
    changes = {3: {"learning_rate": 0.01}}
    steps, _ = row(np.ones((3, 1)), mc.SGD(0.1, 0.5), changes)
    gradients, _ = row(np.ones((3, 1)), mc.SGD(0.1, 0.5, velocity="gradients"), changes)
    np.testing.assert_allclose(steps[:2], gradients[:2], rtol=1e-15)
    # 0.15 was the last step
    np.testing.assert_allclose((steps[1] - steps[2]), 0.5 * 0.15 + 0.01, rtol=1e-12)
    np.testing.assert_allclose((gradients[1] - gradients[2]), 0.01 * (0.5 * 1.5 + 1), rtol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "change"),
    [
        (mc.Adam(0.01), {"epsilon_hat": True}),
        (mc.SGD(0.1, 0.9), {"nesterov": True}),
        (mc.SGD(0.1, 0.9), {"velocity": "gradients"}),
        (mc.SGD(0.1, 0.9), {"momentum": 0.0}),
    ],
)
def test_a_change_of_the_rule_survives_a_checkpoint_between_it_and_the_next_step(
    optimizer, change, tmp_path
):
    gradients = np.random.default_rng(5).standard_normal((9, 3))
    whole, _ = row(
        gradients,
        dataclasses.replace(optimizer),
        {5: change, 8: {"momentum": 0.9} if "momentum" in change else {}},
    )
    _, trainer = row(gradients[:4], dataclasses.replace(optimizer), {})
    for name, value in change.items():
        setattr(trainer.optimizer, name, value)
    for t, g in enumerate(gradients[4:], 5):
        trainer.save(tmp_path / "run")
        trainer = copy.deepcopy(mc.Trainer.load(tmp_path / "run"))
        if t == 8 and "momentum" in change:
            trainer.optimizer.momentum = 0.9
        trainer.step([[1.0]], [g])
        np.testing.assert_array_equal(trainer.net.parameters, whole[t - 1])


def test_the_plan_lists_a_velocity_that_waits(tmp_path):
    _, trainer = row(np.ones((3, 2)), mc.SGD(0.1, 0.9), {3: {"momentum": 0.0}})
    assert [x.name for x in trainer.plan(1).parts["state"]][:2] == ["gradient", "state v"]
    assert set(trainer._step.state.vectors) == {"state v"}


# -- numbers at the ends of the range --------------------------------------------------------------


@pytest.mark.parametrize("cls", [mc.Adam, mc.AdamW, mc.RMSprop])
@pytest.mark.parametrize(
    ("dtype", "epsilon"),
    [("float32", 1e-50), ("float32", 1e-39), ("float32", 1e39), ("float64", 1e-310)],
)
def test_an_epsilon_that_the_parameters_dtype_does_not_hold_is_refused_at_first_and_later(
    cls, dtype, epsilon
):
    net = mc.MLP([1, 1], dtype=dtype)
    with pytest.raises(ValueError, match=re.escape(f"got {epsilon}")):
        mc.Trainer(net, LINEAR, cls(0.1, epsilon=epsilon))
    trainer = mc.Trainer(net, LINEAR, cls(0.1))
    trainer.step([[1.0]], [[1.0]])
    before = net.parameters.copy()
    trainer.optimizer.epsilon = epsilon
    with pytest.raises(ValueError, match=f"{cls.__name__}: epsilon"):
        trainer.step([[1.0]], [[0.0]])
    with pytest.raises(ValueError, match=f"{cls.__name__}: epsilon"):
        trainer.fit([[1.0]], [[0.0]], epochs=1, progress=False)
    np.testing.assert_array_equal(net.parameters, before)


def test_the_smallest_epsilon_that_is_taken_survives_a_gradient_of_0():
    for optimizer in (
        mc.RMSprop(0.1, epsilon=1.2e-38),
        mc.Adam(0.1, epsilon=4e-37),
        mc.Adam(0.1, 0.9, 0.0, epsilon=1.2e-38),
    ):
        found, _ = row(np.zeros((3, 2)), optimizer, {}, "float32")
        np.testing.assert_array_equal(found, 1)


@pytest.mark.parametrize("cls", [mc.Adam, mc.AdamW])
def test_memories_that_round_to_1_in_float32_are_those_of_float64(cls):
    gradients = np.random.default_rng(6).standard_normal((50, 3))
    optimizer = cls(0.1, beta1=1 - 1e-9, beta2=1 - 1e-9)
    narrow, wide = (
        row(gradients, dataclasses.replace(optimizer), {}, dtype)[0]
        for dtype in ("float32", "float64")
    )
    np.testing.assert_allclose(narrow, wide, rtol=2e-5)


@pytest.mark.parametrize("size", [1e10, 1e18, 1e19, 1e20, 4e20])
@pytest.mark.parametrize(
    "optimizer",
    [mc.Adam(0.01), mc.AdamW(0.01), mc.Adam(0.01, epsilon_hat=True), mc.RMSprop(0.01, 0.999)],
)
def test_gradients_are_as_large_as_pytorch_takes_them(optimizer, size):
    """Its (1 - beta2) g g overflows float32 from g = 5.8e20 on, g g from 1.8e19 on."""
    gradients = size * np.array([[1.0, -0.5], [0.2, 0.5], [-0.3, 0.7]])
    narrow, _ = row(gradients, dataclasses.replace(optimizer), {}, "float32")
    wide, _ = row(gradients, dataclasses.replace(optimizer), {})
    np.testing.assert_allclose(narrow, wide, rtol=1e-5)
    assert (abs(narrow[0] - 1) > 0.009).all()


HUGE = [  # optimizer, a gradient with which it overflows float32
    (mc.Adam(0.01), 6e20),
    (mc.AdamW(0.01), 3e38),
    (mc.Adam(0.01, epsilon_hat=True), 1e37),
    (mc.RMSprop(0.01), 3e38),
    (mc.SGD(1e38), 5.0),
    (mc.SGD(1e39), 0.0),
    (mc.SGD(1e38, 0.9), 5.0),
    (mc.SGD(1e38, 0.9, True), 2.5),
    (mc.SGD(1e38, 0.9, velocity="gradients"), 4.0),
    (mc.SGD(10.0, 0.9, velocity="gradients"), 1e38),
    (mc.Adam(3e39), 1.0),
    (mc.AdamW(1e38, 100.0), 1.0),
    (mc.RMSprop(1e38), 1.0),
    (mc.Lion(1e39), 1.0),
    (mc.SGD(2.0), 3e38),
]


@pytest.mark.parametrize(
    "clip_norm", [None, 1e300], ids=["free", "clipped by a norm that nothing has"]
)
@pytest.mark.parametrize(("optimizer", "large"), HUGE)
def test_an_update_that_overflows_is_a_step_that_is_not_finite(optimizer, large, clip_norm):
    """Parameters and state stay as they were, with "skip" too, and training goes on as if the step
    had not been.
    """
    gentle = (
        {"learning_rate": 1e-3, "weight_decay": 0.0}
        if hasattr(optimizer, "weight_decay")
        else {"learning_rate": 1e-3}
    )
    wild = {name: getattr(optimizer, name) for name in gentle}
    gradients, changes = np.array([[1.0, 0.5], [0.5, 1.0], [0.3, 0.3]]), {1: gentle}
    plain, untouched = row(
        gradients, dataclasses.replace(optimizer), changes, "float32", clip_norm=clip_norm
    )
    hit = np.insert(gradients, 2, [[large, 0.0]], axis=0)
    changes = {1: gentle, 3: wild, 4: gentle}
    with pytest.raises(
        mc.NonFiniteLoss, match=r"step 3: the update is not finite at learning rate"
    ):
        row(hit, dataclasses.replace(optimizer), changes, "float32", clip_norm=clip_norm)
    found, trainer = row(
        hit,
        dataclasses.replace(optimizer),
        changes,
        "float32",
        on_non_finite="skip",
        clip_norm=clip_norm,
    )
    np.testing.assert_array_equal(found[[0, 1, 3]], plain)
    np.testing.assert_array_equal(found[2], found[1])
    assert (trainer.skipped, trainer.progress.step) == (1, 4)
    for name, vector in untouched._step.state.vectors.items():
        np.testing.assert_array_equal(trainer._step.state.vectors[name], vector)


@pytest.mark.parametrize("make", [mc.Adam, mc.AdamW, mc.RMSprop])
def test_rows_of_1e37_do_not_make_the_moments_infinite_for_good(make):
    """The issue's case: the loss is finite, the gradient too, but not its square."""
    one, plain = (
        mc.Trainer(mc.MLP([2, 1], seed=1), PULL, make(0.1), on_non_finite="skip") for _ in range(2)
    )
    X, Y = np.ones((4, 2), np.float32), np.ones((4, 1), np.float32)
    for trainer in (one, plain):
        trainer.step(X, Y)
    one.step(1e37 * X, Y)
    for trainer in (one, plain):
        trainer.step(X, Y)
    assert one.skipped == 1
    np.testing.assert_array_equal(one.net.parameters, plain.net.parameters)


def test_a_step_that_is_large_but_finite_takes_place():
    for optimizer, g, wanted in (
        (mc.SGD(1e38), 2.0, -2e38), (mc.SGD(1e-1), 3e38, -3e37), (mc.SGD(1e38, 0.9), -2.0, 2e38),
        (mc.Lion(3e38), 1.0, -3e38),
    ):  # fmt: skip
        np.testing.assert_allclose(row([[g]], optimizer, {}, "float32")[0], [[wanted]], rtol=1e-6)
    # whose square is more than float64 holds
    found, _ = row([[1e200]], mc.SGD(1e-199), {}, clip_norm=1e199)
    np.testing.assert_allclose(found, [[0.0]], atol=1e-12)
    found, _ = row([[1e200, 1e200]], mc.SGD(1e-200), {})
    np.testing.assert_allclose(found, [[0.0, 0.0]], atol=1e-12)


def test_a_velocity_that_grew_step_by_step_stops_at_the_largest_number():
    """No single step is large: the bound on the velocity is what notices."""
    found, trainer = row(
        np.full((8, 1), -1e37), mc.SGD(1.0, 1.0), {}, "float32", on_non_finite="skip"
    )
    np.testing.assert_allclose(found[6], 2.8e38, rtol=1e-6)  # (1 + 2 + … + 7) 1e37
    np.testing.assert_array_equal(found[7], found[6])
    assert trainer.skipped == 1


def test_ordinary_updates_are_not_tried_on_copies(monkeypatch):
    monkeypatch.setattr(Update, "overflows", lambda *_: pytest.fail("tried"))
    random = np.random.default_rng(8)
    gradients = random.standard_normal((30, 3)) * 10.0 ** random.integers(-30, 9, (30, 1))
    for _, make, _, _ in RULES:
        row(gradients, make(0.05), {}, "float32")
        row(gradients, make(5.0), {})


# -- clipping and penalties ------------------------------------------------------------------------


def _gradient(clip_norm=None, l1=0.0, l2=0.0, W=1.0):
    """Parameters' change by one step of rate 1, and J, where the gradient of the data is known."""
    net = mc.MLP([3, 2], dtype="float64", seed=1)
    net.parameters[...] = W * np.array([0.5, -1.0, 0.0, 2.0, -0.25, 1.5, 3.0, -4.0])
    before = net.parameters.copy()
    X, Y = (
        np.arange(12.0).reshape(4, 3) / 10,
        np.array([[1.0, -2.0], [0.5, 1.0], [2.0, 0.0], [-1.0, 3.0]]),
    )
    J = mc.Trainer(net, loss=LINEAR, optimizer=mc.SGD(1.0), clip_norm=clip_norm, l1=l1, l2=l2).step(
        X, Y
    )
    data = np.concatenate([(X.T @ Y / 4).ravel(), Y.mean(axis=0)])
    return before - net.parameters, data, J, before


def test_a_gradient_longer_than_the_clip_norm_is_scaled_to_it_over_all_parameters_together():
    found, g, _, before = _gradient(clip_norm=0.25)
    length = np.linalg.norm(g)
    assert length > 0.25
    np.testing.assert_allclose(found, g * 0.25 / length, rtol=1e-12, atol=4e-16 * abs(before).max())
    np.testing.assert_allclose(np.linalg.norm(found), 0.25, rtol=1e-14)


def test_a_gradient_no_longer_than_the_clip_norm_is_left_to_the_bit():
    free, g, _, _ = _gradient()
    clipped, *_ = _gradient(clip_norm=float(np.linalg.norm(g)) * 1.0001)
    np.testing.assert_array_equal(clipped, free)


def test_clipping_takes_the_penalties_gradient_in():
    g, *_ = _gradient(l1=0.5, l2=2.0)
    clipped, *_ = _gradient(l1=0.5, l2=2.0, clip_norm=0.1)
    np.testing.assert_allclose(clipped, g * 0.1 / np.linalg.norm(g), rtol=1e-12, atol=2e-15)


def test_clipping_survives_a_gradient_whose_squares_overflow_float32():
    net = mc.MLP([1, 1], bias=False)
    net.parameters[...] = 0
    mc.Trainer(net, loss=LINEAR, optimizer=mc.SGD(1.0), clip_norm=1.0).step([[1e15]], [[1e15]])
    np.testing.assert_allclose(net.parameters, [-1.0], rtol=1e-6)


def test_a_zero_gradient_is_clipped_to_zero_not_to_nan():
    net = mc.MLP([1, 1], bias=False, init="zeros")
    mc.Trainer(net, loss=FLAT, optimizer=mc.SGD(1.0), clip_norm=1.0).step([[1.0]], [[1.0]])
    assert net.parameters == [0.0]


@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_penalties_enter_j_and_the_gradient_of_the_weights_only(l1, l2):
    _, _, J0, _ = _gradient()
    found, g, J, theta = _gradient(l1=l1, l2=l2)
    W = theta[:6]
    np.testing.assert_allclose(J - J0, l1 * abs(W).sum() + 0.5 * l2 * (W**2).sum(), rtol=1e-14)
    np.testing.assert_allclose(found[:6], g[:6] + l1 * np.sign(W) + l2 * W, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(found[6:], g[6:], rtol=1e-14)


def test_the_penalties_sums_do_not_lose_digits_over_many_weights():
    net = mc.MLP([300, 300], bias=False)
    net.parameters[...] = np.float32(0.1)
    trainer = mc.Trainer(net, loss=FLAT, optimizer=mc.SGD(0.0), l1=1.0, l2=1.0)
    J = trainer.step(np.ones((1, 300)), np.ones((1, 300)))
    w = float(np.float32(0.1))
    assert pytest.approx(300 + 90000 * (w + 0.5 * w * w), rel=1e-7) == J


def test_clipping_measures_the_norm_of_many_equal_slopes_without_losing_digits():
    net = mc.MLP([300, 300], bias=False)
    net.parameters[...] = np.float32(0.1)
    trainer = mc.Trainer(net, loss=FLAT, optimizer=mc.SGD(1.0), l2=1.0, clip_norm=15.0)
    # each of 90,000 slopes is 0.1, and becomes 15 / 300
    trainer.step(np.ones((1, 300)), np.ones((1, 300)))
    np.testing.assert_allclose(net.parameters, 0.05, rtol=3e-7)


@pytest.mark.parametrize("value", [0.1, 1e-25, 1e25])
@pytest.mark.parametrize("count", [1, 2047, 90_000, 16_000_000])
def test_sums_over_equal_entries_are_right_to_the_last_digit_and_copy_no_vector(count, value):
    v, ops = np.full(count, -value, np.float32), NumpyOps()
    w = float(np.float32(value))
    tracemalloc.start()
    try:
        assert ops.sum_squares(v) == pytest.approx(count * w * w, rel=1.2e-7, abs=0)
        assert ops.sum_abs(v) == pytest.approx(count * w, rel=1e-12, abs=0)
        assert tracemalloc.get_traced_memory()[1] <= 48 << 10
    finally:
        tracemalloc.stop()
