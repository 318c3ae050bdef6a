"""Figures of evaluations: R², accuracy, losses of rows, metrics; weights count as rows."""

import math

import numpy as np
import pytest
from mpmath import mp
from sklearn import metrics as theirs

import mlpcore as mc
from mlpcore.core.losses import pair, resolve
from mlpcore.training import scores

RNG = np.random.default_rng(0)


def figure(Y, Z, w=None, chunk=97, loss="squared_error", output="identity"):
    """Return R², or the accuracy, of outputs Z (S[L] where they match) that come chunk by chunk."""
    net = mc.MLP([1, Z.shape[1]], output=output)
    found = scores.Scores(pair(resolve(loss), net.activations[-1]), Z.shape[1])
    for i in range(0, len(Z), chunk):
        part = slice(i, i + chunk)
        found.add(Z[part], Y[part], None if w is None else w[part])
    return found.result()


def exact_r2(Y, Z, w):
    """Return R² in 60 digits; outputs whose target is constant count 1 or 0."""
    with mp.workdps(60):
        figures = []
        weights = [mp.mpf(float(x)) for x in w]
        for column in range(Y.shape[1]):
            y, z = ([mp.mpf(float(x)) for x in array[:, column]] for array in (Y, Z))
            mean = mp.fdot(weights, y) / mp.fsum(weights)
            residual = mp.fsum(a * (b - c) ** 2 for a, b, c in zip(weights, y, z, strict=True))
            spread = mp.fsum(a * (b - mean) ** 2 for a, b in zip(weights, y, strict=True))
            figures.append(1 - residual / spread if spread else mp.mpf(residual == 0))
        return float(mp.fsum(figures) / len(figures))


def targets(kind):
    """Return Y (700, 2), predictions and weights that a naive sum gets wrong."""
    Y = RNG.standard_normal((700, 2)) * [1.0, 3.0]
    Z, w = Y + RNG.standard_normal(Y.shape), RNG.uniform(0.5, 2, 700)
    if kind == "far first row of tiny weight":
        Y[0] += 1e9
        w[0] = 1e-20
    elif kind == "far rows of tiny weight everywhere":
        Y[::50] -= 1e8
        w[::50] = 1e-18
    elif kind == "huge offset":
        Y, Z = Y + 1.7e9, Z + 1.7e9
    elif kind == "first half elsewhere":
        Y[:350] += 1e6
        Z[:350] += 1e6
    elif kind == "light first half elsewhere":
        Y[:350] += 1e10
        w[:350] *= 1e-24
    elif kind == "float32":
        Y, Z = (100 + Y).astype(np.float32), (100 + Z).astype(np.float32)
    elif kind == "nearly all weight on a row":
        w[300] = 1e20
    elif kind == "weights from 1e-300 to 1e300":
        w = 10.0 ** RNG.uniform(-300, 300, 700)
    elif kind == "weights below 1e-300":
        w *= 1e-305
    elif kind == "weights that add up to 1e308":
        w *= 1e305
    elif kind == "half of the weights 0":
        w[::2] = 0
        Z[::2] = np.inf  # of rows that do not count
    elif kind == "one constant output":
        Y[:, 1] = 0.1
    elif kind == "one constant output, met":
        Y[:, 1] = Z[:, 1] = 0.1
    elif kind == "one row of weight":
        w[:] = 0
        w[400] = 3.0
    return Y, Z, w


KINDS = (
    "plain", "far first row of tiny weight", "far rows of tiny weight everywhere", "huge offset",
    "first half elsewhere",
    "light first half elsewhere", "float32", "nearly all weight on a row",
    "weights from 1e-300 to 1e300",
    "weights below 1e-300", "weights that add up to 1e308", "half of the weights 0",
    "one constant output",
    "one constant output, met", "one row of weight",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 97, 700])
@pytest.mark.parametrize("kind", KINDS)
def test_r2_is_right_to_ten_digits_whatever_weights_offsets_and_chunks(kind, chunk):
    Y, Z, w = targets(kind)
    counted = w > 0
    expected = exact_r2(Y[counted], Z[counted], w[counted])
    assert figure(Y, Z, w, chunk) == pytest.approx(expected, rel=1e-10, abs=1e-10)


# scikit-learn's means of these
ROUNDED = ("one constant output", "one row of weight", "weights that add up to 1e308")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ROUNDED])
def test_r2_is_that_of_scikit_learn(kind):
    Y, Z, w = targets(kind)
    counted = w > 0
    found = theirs.r2_score(Y[counted], Z[counted], sample_weight=w[counted])
    assert figure(Y, Z, w) == pytest.approx(found, rel=1e-6, abs=1e-6)


def test_a_weight_of_2_is_the_row_twice_and_0_is_none():
    Y, Z = RNG.standard_normal((2, 600, 2))
    w = RNG.integers(0, 4, 600)
    repeated = np.repeat(np.arange(600), w)
    assert figure(Y, Z, w) == pytest.approx(figure(Y[repeated], Z[repeated]), rel=1e-13)
    labels, one_hot = RNG.integers(0, 2, 600), RNG.integers(0, 2, (600, 2))
    for target, loss, output in (
        (labels, "cross_entropy", "softmax"),
        (one_hot, "binary_cross_entropy", "sigmoid"),
    ):
        once = figure(target[repeated], Z[repeated], None, 97, loss, output)
        assert figure(target, Z, w, 97, loss, output) == pytest.approx(once, rel=1e-13)


def test_accuracy_of_rows_that_are_all_right_is_1_to_the_bit():
    w, labels = RNG.uniform(0, 1, 5000), RNG.integers(0, 3, 5000)
    assert figure(labels, np.eye(3)[labels], w, 1000, "cross_entropy", "softmax") == 1


@pytest.mark.parametrize("chunk", [1, 50, 700])
@pytest.mark.parametrize(
    ("prediction", "expected"), [(np.inf, -math.inf), (-np.inf, -math.inf), (np.nan, math.nan)]
)
def test_predictions_that_are_not_finite_show_however_little_they_weigh(
    prediction, expected, chunk
):
    Y = RNG.standard_normal((700, 1))
    for row in (0, 300, 699):
        w, Z = np.ones(700), Y + 0.1
        w[row], Z[row] = 1e-300, prediction
        np.testing.assert_equal(figure(Y, Z, w, chunk), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_evaluate_of_a_constant_target_is_0_and_1_where_it_is_met(dtype):
    net = mc.MLP([3, 2], dtype=dtype)
    trainer = mc.Trainer(net)
    X, Y = RNG.standard_normal((300, 3)), np.full((300, 2), 0.5)
    assert trainer.evaluate(X, Y)["r2"] == 0
    net.W[1][...], net.b[1][...] = 0, 0.5
    assert trainer.evaluate(X, Y)["r2"] == 1
    assert trainer.evaluate(X[:1], Y[:1])["r2"] == 1


# -- the loss of each row --


PAIRS = (
    ("squared_error", "identity"), ("squared_error", "tanh"), ("absolute_error", "identity"),
    ("huber", "relu"),
    ("quantile", "softplus"), ("log_cosh", "identity"), ("poisson", "exp"), ("poisson", "softplus"),
    ("binary_cross_entropy", "sigmoid"), ("binary_cross_entropy", ("sigmoid", 2.0)),
    ("cross_entropy", "softmax"),
)  # fmt: skip


def problem(loss, output, dtype="float64", outputs=3, rows=700):
    """Return a trainer, X, Y and row weights."""
    net = mc.MLP([4, 8, outputs], "tanh", output, dtype=dtype, seed=1)
    X, w = RNG.standard_normal((rows, 4)), RNG.uniform(0, 2, rows)
    Y = (
        RNG.integers(0, outputs, rows)
        if loss == "cross_entropy"
        else RNG.uniform(0, 1, (rows, outputs))
    )
    return mc.Trainer(net, loss, chunk_rows=64), X, Y, w


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("loss", "output"), PAIRS)
def test_losses_are_those_of_the_rows_one_by_one_and_their_mean_is_that_of_evaluate(
    loss, output, dtype
):
    trainer, X, Y, w = problem(loss, output, dtype)
    bound = 1e-12 if dtype == "float64" else 2e-6
    found = trainer.losses(X, Y)
    assert (found.shape, found.dtype) == ((700,), np.float64)
    for i in range(0, 700, 100):
        alone = trainer.evaluate(X[i : i + 1], Y[i : i + 1])["loss"]
        np.testing.assert_allclose(found[i], alone, rtol=5 * bound, atol=bound)
    for weights in (None, w):
        mean = np.average(found, weights=weights)
        np.testing.assert_allclose(mean, trainer.evaluate(X, Y, weights)["loss"], rtol=bound)
    # weights do not count
    np.testing.assert_array_equal(trainer.losses(trainer.prepare(X, Y, w)), found)


def test_losses_of_soft_labels_and_of_a_loss_of_ones_own():
    trainer, X, Y, _ = problem("cross_entropy", "softmax")
    soft = RNG.dirichlet(np.ones(3), 700)
    expected = -(soft * np.log(trainer.net.predict(X))).sum(axis=1)
    np.testing.assert_allclose(trainer.losses(X, soft), expected, rtol=1e-12)
    np.testing.assert_array_equal(trainer.losses(X, np.eye(3)[Y]), trainer.losses(X, Y))
    fourth = mc.Loss(
        "fourth",
        "q * (z - y) * (z - y) * (z - y) * (z - y)",
        "4 * q * (z - y) * (z - y) * (z - y)",
        0.5,
    )
    trainer, X, Y, _ = problem(fourth, "tanh")
    np.testing.assert_allclose(
        trainer.losses(X, Y), (0.5 * (trainer.net.predict(X) - Y) ** 4).sum(axis=1), rtol=1e-12
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_of_sure_rows_neither_overflow_nor_round_to_0(dtype):
    """Against 60 digits, from logits that float32 holds exactly."""
    net = mc.MLP([2, 2], [], "softmax", dtype=dtype, init="zeros")
    net.W[1][...] = np.eye(2)
    X = np.array(
        [[0.0, 40.0], [40.0, 0.0], [1e4, -1e4], [-1e4, 1e4], [60.5, 0.25], [3e38, 0.0], [0.0, 3e38]]
    )
    found = mc.Trainer(net).losses(X, np.zeros(7, int))
    sure = X.astype(dtype).astype(np.float64)
    with mp.workdps(60):
        margins = [mp.mpf(float(right)) - mp.mpf(float(wrong)) for right, wrong in sure]
        expected = [
            float(mp.log1p(mp.exp(-margin)) if margin > -1e6 else -margin) for margin in margins
        ]
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=0)
    one = mc.MLP([1, 1], [], "sigmoid", dtype=dtype, init="zeros")
    one.W[1][...] = 1
    S = np.array([[-90.0], [-30.0], [30.0], [1e30]], dtype)
    np.testing.assert_allclose(
        mc.Trainer(one).losses(S, np.zeros(4)), np.logaddexp(0, S[:, 0].astype(float)), rtol=1e-14
    )


def batches_of(X, Y, w=None, size=150):
    """Return a function that yields batches, as a stream of rows."""
    parts = [slice(i, i + size) for i in range(0, len(X), size)]
    return lambda: (
        (X[part], Y[part]) if w is None else (X[part], Y[part], w[part]) for part in parts
    )


@pytest.mark.parametrize(
    ("loss", "output"), [("squared_error", "identity"), ("cross_entropy", "softmax")]
)
def test_streams_give_the_figures_of_arrays(loss, output):
    trainer, X, Y, w = problem(loss, output)
    w[:300] = 0  # whole batches that weigh nothing
    np.testing.assert_allclose(trainer.losses(batches_of(X, Y)), trainer.losses(X, Y), rtol=1e-14)
    np.testing.assert_allclose(
        trainer.losses(batches_of(X, Y, w)), trainer.losses(X, Y), rtol=1e-14
    )
    metrics = {
        "first": lambda y, z, sample_weight=None: float(np.average(z[:, 0], weights=sample_weight))
    }
    for weights in (None, w):
        there = trainer.evaluate(X, Y, weights, metrics=metrics)
        for name, value in trainer.evaluate(batches_of(X, Y, weights), metrics=metrics).items():
            assert value == pytest.approx(there[name], rel=1e-12), name


# -- metrics --


def test_metrics_are_scikit_learns_functions_with_weights_if_there_are_any():
    trainer, X, Y, w = problem("squared_error", "identity")
    Z = trainer.net.predict(X)
    own = {
        "mae": theirs.mean_absolute_error,
        "r2 of theirs": theirs.r2_score,
        "max": lambda y, z, **_: abs(y - z).max(),
    }
    for weights in (None, w):
        found = trainer.evaluate(X, Y, weights, metrics=own)
        assert list(found) == ["loss", "r2", *own]
        assert found["mae"] == pytest.approx(
            theirs.mean_absolute_error(Y, Z, sample_weight=weights), rel=1e-13
        )
        assert found["r2 of theirs"] == pytest.approx(found["r2"], rel=1e-12)
        assert found["max"] == abs(Y - Z).max()
    assert all(type(value) is float for value in found.values())


def test_metrics_of_classes_get_labels_and_probabilities():
    trainer, X, Y, w = problem("cross_entropy", "softmax")

    def auc(y, p, sample_weight=None):
        return theirs.roc_auc_score(y, p, sample_weight=sample_weight, multi_class="ovr")

    found = trainer.evaluate(X, Y, w, metrics={"auc": auc, "log loss": theirs.log_loss})
    P = trainer.net.predict(X)
    assert found["auc"] == pytest.approx(auc(Y, P, w))
    assert found["log loss"] == pytest.approx(found["loss"], rel=1e-10)
    net = mc.MLP([4, 8, 1], "tanh", "sigmoid", seed=1)
    labels = RNG.integers(0, 2, 700)
    for target in (labels, labels[:, None]):
        found = mc.Trainer(net).evaluate(
            X, target, metrics={"auc": theirs.roc_auc_score, "brier": theirs.brier_score_loss}
        )
        assert found["auc"] == pytest.approx(
            theirs.roc_auc_score(labels, net.predict(X)[:, 0]), abs=1e-4
        )


@pytest.mark.parametrize("flat", [True, False])
def test_a_metric_sees_targets_and_outputs_in_one_shape_so_that_nothing_broadcasts(flat):
    trainer, X, Y, _ = problem("squared_error", "identity", outputs=1)
    shapes = []
    target = Y[:, 0] if flat else Y
    for rows in ((X, target), (batches_of(X, target),)):
        trainer.evaluate(
            *rows, metrics={"seen": lambda y, z: shapes.append((y.shape, z.shape)) or 0.0}
        )
    assert shapes == [((700,), (700,)) if flat else ((700, 1), (700, 1))] * 2


def test_metrics_in_fit_stand_in_the_history_and_stop_it(tmp_path):
    X, Y = RNG.standard_normal((200, 4)), RNG.standard_normal(200)

    def train(monitor, mode, path=None, **more):
        trainer = mc.Trainer(mc.MLP([4, 16, 1], "tanh", seed=0), optimizer=mc.Adam(1e-2))
        stopping = mc.EarlyStopping(3, monitor, mode=mode)
        history = trainer.fit(
            X[:50], Y[:50], epochs=60, batch_size=10, validation=(X[50:], Y[50:]),
            early_stopping=stopping, progress=False,
            metrics={"mae": theirs.mean_absolute_error, "minus mae": lambda y,
                z: -theirs.mean_absolute_error(y, z)}, **more,
        )  # fmt: skip
        return trainer, history

    trainer, history = train("validation_mae", "min")
    assert np.array_equal(history["validation_mae"], -np.array(history["validation_minus mae"]))
    assert len(history["loss"]) < 60
    assert np.argmin(history["validation_mae"]) == len(history["validation_mae"]) - 4
    best = theirs.mean_absolute_error(Y[50:], trainer.net.predict(X[50:]))
    assert best == pytest.approx(min(history["validation_mae"]), rel=1e-6)
    other, mirrored = train("validation_minus mae", "max")
    assert mirrored["validation_mae"] == history["validation_mae"]
    np.testing.assert_array_equal(other.net.parameters, trainer.net.parameters)


def test_a_run_with_metrics_goes_on_with_the_same_metrics_only(tmp_path):
    X, Y = RNG.standard_normal((60, 4)), RNG.standard_normal(60)
    call = {"epochs": 4, "batch_size": 16, "validation": (X, Y), "progress": False}
    mae = {"mae": theirs.mean_absolute_error}

    def new():
        return mc.Trainer(mc.MLP([4, 8, 1], "tanh", seed=0))

    def save_once(trainer, entry):
        if not (tmp_path / "run").exists():
            trainer.save(tmp_path / "run")

    whole = new().fit(X, Y, **call, metrics=mae, callbacks=[save_once])
    resumed = mc.Trainer.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"metrics: the unfinished run had \['mae'\]; got \[\]"):
        resumed.fit(X, Y, **call)
    history = resumed.fit(X, Y, **call, metrics=mae)
    assert history["validation_mae"] == whole["validation_mae"]


@pytest.mark.parametrize(
    ("metrics", "kind", "message"),
    [
        ([theirs.mean_absolute_error], TypeError, "metrics must be a dict"),
        ({3: theirs.mean_absolute_error}, TypeError, "metrics: a name must be text; got 3"),
        ({"r2": theirs.r2_score}, ValueError, "metrics: 'r2' is reported anyway"),
        ({"mae": 3}, TypeError, r"metrics\['mae'\] must be a function"),
        ({"one": lambda y: 0.0}, TypeError, r"metrics\['one'\] must be a function \(Y, output\)"),
        (
            {"rows": lambda y, z: abs(y - z)},
            TypeError,
            r"metrics\['rows'\] must return a number; it returned an array of shape",
        ),
        (
            {"text": lambda y, z: "0.5"},
            TypeError,
            r"metrics\['text'\] must return a number; it returned '0.5'",
        ),
        (
            {"flag": lambda y, z: np.True_},
            TypeError,
            r"metrics\['flag'\] must return a number; it returned True",
        ),
        (
            {"none": lambda y, z: None},
            TypeError,
            r"metrics\['none'\] must return a number; it returned None",
        ),
        ({"complex": lambda y, z: 1j}, TypeError, r"metrics\['complex'\] must return a number"),
    ],
)
def test_metrics_that_cannot_be_are_refused_by_name(metrics, kind, message):
    trainer, X, Y, _ = problem("squared_error", "identity")
    with pytest.raises(kind, match=message):
        trainer.evaluate(X, Y, metrics=metrics)


def test_what_is_wrong_with_metrics_in_fit_is_said_before_the_first_step():
    trainer, X, Y, w = problem("squared_error", "identity")

    def fit(metrics, monitor="validation_loss", mode=None, validation=(X, Y)):
        stopping = mc.EarlyStopping(2, monitor, mode=mode)
        trainer.fit(
            X,
            Y,
            validation=validation,
            metrics=metrics,
            early_stopping=stopping,
            epochs=1,
            progress=False,
        )

    mae = {"mae": lambda y, z: 0.0}
    with pytest.raises(ValueError, match="metrics are measured on the validation rows"):
        fit(mae, validation=None)
    with pytest.raises(
        TypeError, match=r"metrics\['mae'\] must be a function .* as the rows have weights"
    ):
        fit(mae, validation=(X, Y, w))
    with pytest.raises(ValueError, match="'validation_mae': say which is better"):
        fit(mae, "validation_mae")
    with pytest.raises(ValueError, match="did you mean 'validation_mae'"):
        fit(mae, "validation_mea", "min")
    with pytest.raises(ValueError, match=r"EarlyStopping: mode: .*min, max"):
        fit(mae, "validation_mae", "most")
    assert trainer.progress.step == 0


def test_an_error_inside_a_metric_names_it():
    trainer, X, Y, _ = problem("squared_error", "identity")
    with pytest.raises(ZeroDivisionError) as raised:
        trainer.evaluate(X, Y, metrics={"broken": lambda y, z: 1 / 0})
    assert raised.value.__notes__ == ["raised by metrics['broken']"]
