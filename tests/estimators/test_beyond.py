"""The estimators' parameters beyond scikit-learn's."""

import math
import pickle
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from sklearn.datasets import load_diabetes, load_wine, make_multilabel_classification
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import scale
from sklearn.utils import compute_class_weight

import mlpcore as mc
from mlpcore.backends import devices
from mlpcore.estimators import MLPClassifier, MLPRegressor
from mlpcore.estimators.epochs import Objective

X, y = scale(load_wine().data), load_wine().target
NAMES = np.array(["barolo", "grignolino", "barbera"])[y]
DX, dy = scale(load_diabetes().data), scale(load_diabetes().target)
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.mark.parametrize(
    "activation",
    ["gelu", "silu", ("elu", 0.5), ["mish", ("leaky_relu", 0.1)], ["logistic", "selu"]],
)
def test_any_activation_of_the_engine_and_one_for_each_layer(activation):
    model = MLPClassifier(
        (12, 8), activation, max_iter=60, learning_rate_init=0.01, random_state=0
    ).fit(X, NAMES)
    assert model.score(X, NAMES) > 0.97
    net = model._network()
    specs = activation if isinstance(activation, list) else [activation] * 2
    assert [a.spec for a in net.activations[1:-1]] == [
        "sigmoid" if s == "logistic" else s for s in specs
    ][:2] or "logistic" in specs
    with pytest.raises(ValueError, match="hidden layer"):
        MLPClassifier((12, 8), ["gelu"]).fit(X, y)
    with pytest.raises(ValueError, match=r"activation.*must be"):
        MLPClassifier(activation="rleu").fit(X, y)


@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_learned_slopes_are_fitted_kept_and_taken_up(solver, dtype):
    settings = {"solver": solver, "max_iter": 20, "learning_rate_init": 0.01, "random_state": 0}
    data = DX.astype(dtype), dy.astype(dtype)
    make = partial(
        MLPRegressor, hidden_layer_sizes=(6, 5), activation=["prelu", ("prelu", 0.1, "per output")]
    )
    model = make(**settings).fit(*data)
    assert [a.shape for a in model.slopes_] == [(1,), (5,)]
    assert abs(model.slopes_[0] - 0.25).min() > 1e-4
    assert np.ptp(model.slopes_[1]) > 1e-4
    predicted = model.predict(data[0])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(data[0]), predicted)
    net = mc.MLP.from_sklearn(model, device="cpu")
    np.testing.assert_array_equal(net.a[2], model.slopes_[1])
    np.testing.assert_allclose(
        net.predict(data[0]).reshape(len(predicted)), predicted, rtol=1e-5, atol=1e-6
    )
    before = [a.copy() for a in model.slopes_]
    model.set_params(warm_start=True, max_iter=1).fit(*data)
    assert all(0 < abs(a - b).max() < 0.2 for a, b in zip(model.slopes_, before, strict=True))
    model.slopes_[1] = np.zeros(5, dtype)
    assert abs(model.predict(data[0]) - predicted).max() > 1e-3
    again = make(**settings).fit(*data)
    np.testing.assert_array_equal(again.fit(*data).predict(data[0]), predicted)
    assert MLPRegressor(hidden_layer_sizes=(6, 5), **settings).fit(*data).slopes_ == []


def test_an_own_activation_is_taken_and_pickled():
    cubic = mc.Activation("bent", "s / sqrt(1 + s * s)", "1 / ((1 + s * s) * sqrt(1 + s * s))")
    model = MLPRegressor(activation=cubic, max_iter=20, random_state=0).fit(DX, dy)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(DX), model.predict(DX))


@pytest.mark.parametrize(
    "loss", ["absolute_error", ("huber", 0.5), "log_cosh", ("quantile", 0.8), mc.loss("huber").loss]
)
def test_any_loss_of_the_engine_for_a_regressor(loss):
    model = MLPRegressor(loss, max_iter=80, learning_rate_init=0.01, random_state=0).fit(DX, dy)
    assert model.loss_curve_[-1] < 0.7 * model.loss_curve_[0]
    assert model.out_activation_ == "identity"


def test_the_quantile_loss_leaves_that_share_of_the_rows_below():
    model = MLPRegressor(
        ("quantile", 0.8), max_iter=300, learning_rate_init=0.01, random_state=0, alpha=1
    ).fit(DX, dy)
    assert 0.74 < np.mean(dy < model.predict(DX)) < 0.86


def test_a_regression_of_shares_stays_between_0_and_1():
    shares = 1 / (1 + np.exp(-dy))
    model = MLPRegressor("binary_cross_entropy", max_iter=60, random_state=0).fit(DX, shares)
    P = model.predict(DX)
    assert model.out_activation_ == "logistic"
    assert 0 < P.min() < P.max() < 1
    assert model.score(DX, shares) > 0.3


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_a_classifier_with_another_loss(loss):
    model = MLPClassifier(loss=loss, max_iter=60, learning_rate_init=0.01, random_state=0).fit(
        X, NAMES
    )
    assert model.score(X, NAMES) > 0.97
    J = model._network()
    assert J.activations[-1].name == "softmax"


def test_class_weight_is_a_row_weight():
    balanced = len(y) / (3 * np.bincount(y))
    expected = MLPClassifier(max_iter=10, random_state=0).fit(X, NAMES, balanced[y])
    found = MLPClassifier(max_iter=10, random_state=0, class_weight="balanced").fit(X, NAMES)
    np.testing.assert_allclose(found.loss_curve_, expected.loss_curve_, rtol=1e-12)
    by_name = {"barolo": 2.0, "barbera": 5.0}
    expected = MLPClassifier(max_iter=10, random_state=0).fit(
        X, NAMES, 3.0 * np.array([2.0, 1.0, 5.0])[y]
    )
    found = MLPClassifier(max_iter=10, random_state=0, class_weight=by_name).fit(
        X, NAMES, np.full(len(X), 3.0)
    )
    np.testing.assert_allclose(found.loss_curve_, expected.loss_curve_, rtol=1e-12)
    part = MLPClassifier(random_state=0, class_weight=by_name).partial_fit(
        X, NAMES, classes=np.unique(NAMES)
    )
    again = MLPClassifier(random_state=0).partial_fit(
        X, NAMES, np.array([2.0, 1.0, 5.0])[y], classes=np.unique(NAMES)
    )
    assert part.loss_ == pytest.approx(again.loss_, rel=1e-12)
    with pytest.raises(ValueError, match=r"balanced.*partial_fit"):
        MLPClassifier(class_weight="balanced").partial_fit(X, y, classes=[0, 1, 2])


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
@pytest.mark.parametrize(
    "class_weight", ["balanced", {"barolo": 2.0, "barbera": 5.0}], ids=["balanced", "by name"]
)
def test_a_row_that_weighs_2_is_the_row_twice_to_class_weight_too(class_weight, solver):
    w = np.random.default_rng(0).integers(0, 4, len(X))
    rows = np.repeat(np.arange(len(X)), w)
    model = MLPClassifier(
        (5,),
        class_weight=class_weight,
        solver=solver,
        alpha=0.1,
        batch_size=len(rows),
        max_iter=10,
        random_state=0,
    )
    repeated = model.fit(X[rows], NAMES[rows])
    expected, P = repeated.loss_, repeated.predict_proba(X)
    with warnings.catch_warnings(action="ignore"):  # a batch of fewer rows
        weighted = model.fit(X, NAMES, w)
    assert weighted.loss_ == pytest.approx(expected, rel=1e-7)
    np.testing.assert_allclose(weighted.predict_proba(X), P, rtol=1e-5)


def test_balanced_weights_are_scikit_learns_of_weighted_rows():
    w = np.random.default_rng(0).uniform(0, 3, len(X))
    shares = compute_class_weight("balanced", classes=np.unique(NAMES), y=NAMES, sample_weight=w)
    expected = MLPClassifier(max_iter=5, random_state=0).fit(
        X, NAMES, w * shares[np.unique(NAMES, return_inverse=True)[1]]
    )
    found = MLPClassifier(max_iter=5, random_state=0, class_weight="balanced").fit(X, NAMES, w)
    np.testing.assert_allclose(found.loss_curve_, expected.loss_curve_, rtol=1e-12)


def test_a_label_that_weighs_nothing_changes_no_balance():
    """Its rows stay in the batches and its output in the network, as in scikit-learn."""
    w = np.where(y == 2, 0.0, 1.0)
    two = len(y[y < 2]) / (2 * np.bincount(y[y < 2]))
    expected = MLPClassifier(max_iter=5, random_state=0).fit(X, NAMES, np.append(two, 0)[y])
    found = MLPClassifier(max_iter=5, random_state=0, class_weight="balanced").fit(X, NAMES, w)
    np.testing.assert_allclose(found.loss_curve_, expected.loss_curve_, rtol=1e-12)
    by_name = {"barbera": 2.0, "grignolino": 3.0}  # of which one weighs nothing
    expected = MLPClassifier(max_iter=5, random_state=0).fit(X, NAMES, np.array([1.0, 3.0, 0.0])[y])
    found = MLPClassifier(max_iter=5, random_state=0, class_weight=by_name).fit(X, NAMES, w)
    np.testing.assert_allclose(found.loss_curve_, expected.loss_curve_, rtol=1e-12)
    with pytest.raises(ValueError, match="not negative"):
        MLPClassifier(max_iter=5, class_weight="balanced").fit(X, NAMES, -np.ones(len(X)))


@pytest.mark.parametrize("class_weight", ["balanced", ["balanced", {0: 2, 1: 1}]], ids=str)
def test_many_labels_are_balanced_column_by_column_with_row_weights(class_weight):
    A, B = make_multilabel_classification(80, random_state=0, n_classes=2)
    w = np.random.default_rng(1).integers(0, 3, 80)
    rows = np.repeat(np.arange(80), w)
    model = MLPClassifier(
        (5,), solver="lbfgs", alpha=0.1, max_iter=3, random_state=0, class_weight=class_weight
    )
    expected = model.fit(A[rows], B[rows]).loss_
    assert model.fit(A, B, w).loss_ == pytest.approx(expected, rel=1e-9)
    assert model.fit(A, csr_matrix(B), w).loss_ == pytest.approx(expected, rel=1e-9)


def test_class_weight_of_many_labels_is_a_list():
    A, B = make_multilabel_classification(80, random_state=0, n_classes=2)
    weights = [{0: 1, 1: 3}, {0: 2, 1: 1}]
    rows = np.array([1, 3])[B[:, 0]] * np.array([2, 1])[B[:, 1]]
    found = MLPClassifier(max_iter=3, random_state=0, class_weight=weights).fit(A, B)
    assert found.loss_ == pytest.approx(
        MLPClassifier(max_iter=3, random_state=0).fit(A, B, rows).loss_, rel=1e-12
    )


def test_a_validation_set_is_scored_every_epoch_and_stops_if_asked_to():
    A, Av, b, bv = train_test_split(X, NAMES, random_state=0, test_size=0.3)
    seen = MLPClassifier(max_iter=12, random_state=0).fit(A, b, validation=(Av, bv))
    assert len(seen.validation_scores_) == 12
    assert seen.validation_scores_[-1] == seen.score(Av, bv)
    assert seen.best_validation_score_ == max(seen.validation_scores_)
    plain = MLPClassifier(max_iter=12, random_state=0).fit(A, b)
    assert seen.loss_curve_ == plain.loss_curve_  # looking changes nothing
    stopped = MLPClassifier(
        random_state=0, early_stopping=True, n_iter_no_change=3, learning_rate_init=0.01
    )
    stopped.fit(A, b, validation=(Av, bv))
    assert stopped.n_iter_ < 200
    assert stopped.score(Av, bv) == stopped.best_validation_score_
    with pytest.raises(TypeError, match="validation must be"):
        stopped.fit(A, b, validation=Av)
    with pytest.raises(ValueError, match="features"):
        stopped.fit(A, b, validation=(Av[:, :3], bv))


def auc(model, A, b):
    return roc_auc_score(b, model.predict_proba(A), multi_class="ovr")


@pytest.mark.parametrize("scoring", ["neg_log_loss", "roc_auc_ovr", auc])
def test_the_score_may_be_any_of_scikit_learns_or_a_function(scoring):
    # whose names the scorer's predict must see
    table = pd.DataFrame(X, columns=[f"c{i}" for i in range(X.shape[1])])
    model = MLPClassifier(random_state=0, early_stopping=True, scoring=scoring, max_iter=15).fit(
        table, NAMES
    )
    assert len(model.validation_scores_) == model.n_iter_
    assert model.validation_scores_[0] < model.validation_scores_[-1]
    given = MLPClassifier(random_state=0, scoring=scoring, max_iter=5).fit(
        table, NAMES, validation=(table, NAMES)
    )
    assert len(given.validation_scores_) == 5
    with pytest.raises(ValueError, match="scoring"):
        MLPClassifier(scoring="roundness").fit(X, y)


def test_callbacks_see_every_epoch_and_may_stop():
    seen, steps = [], []

    class Counter(mc.Callback):
        def step_end(self, trainer, J):
            steps.append(float(J))

        def fit_end(self, trainer, history):
            seen.append(history)

    def third(trainer, entry):
        seen.append((trainer.learning_rate, entry["loss"]))
        return len(seen) == 3

    model = MLPClassifier(callbacks=[third, Counter()], random_state=0, batch_size=60).fit(
        X, y, validation=(X, y)
    )
    assert model.n_iter_ == 3
    assert [loss for _, loss in seen[:3]] == model.loss_curve_
    assert seen[3]["validation_score"] == model.validation_scores_
    assert len(steps) == 9
    seen.clear()
    model = MLPRegressor(
        solver="lbfgs", callbacks=[lambda trainer, entry: entry["loss"] < 0.3]
    ).fit(DX, dy)
    assert model.loss_ < 0.3
    assert model.n_iter_ < 20
    with pytest.raises(ValueError, match="callbacks"):
        MLPClassifier(callbacks=print).fit(X, y)


def test_progress_shows_a_bar(capsys):
    MLPClassifier(progress=True, max_iter=3).fit(X, y)
    err = capsys.readouterr().err
    assert "3/3" in err
    assert "loss=" in err
    MLPClassifier(max_iter=3).fit(X, y)
    assert capsys.readouterr().err == ""


def test_memory_limit_and_device_reach_the_engine():
    small, free = (
        MLPClassifier(max_iter=3, random_state=0, memory_limit=limit, batch_size=178)
        for limit in ("99 KiB", None)
    )
    np.testing.assert_allclose(small.fit(X, y).loss_curve_, free.fit(X, y).loss_curve_, rtol=1e-12)
    with pytest.raises(MemoryError):  # the weights of the best epoch count as well
        small.set_params(early_stopping=True, memory_limit="90 KiB", batch_size=160).fit(X, y)
    with pytest.raises(MemoryError):
        MLPClassifier(memory_limit=1000).fit(X, y)
    with pytest.raises(ValueError, match="device must be"):
        MLPClassifier(device="gpu").fit(X, y)
    if devices.why_no_cuda():
        with pytest.raises(mc.DeviceUnavailable):
            MLPClassifier(device="cuda").fit(X, y)


def test_an_estimator_of_a_gpu_predicts_on_a_machine_without(monkeypatch):
    model = MLPClassifier(max_iter=3, random_state=0).fit(X, y)
    state = pickle.dumps(model.set_params(device="cuda"))
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "there is none")
    np.testing.assert_array_equal(pickle.loads(state).predict(X), model.predict(X))


def test_small_probabilities_keep_their_logarithm():
    model = MLPClassifier((), max_iter=1, random_state=0).fit(X, y > 0)
    model.coefs_[0][...] = 0
    for s in (-700.0, -80.0, -40.0, 0.0, 3.0):
        model.intercepts_[0][...] = s
        expected = s - math.log1p(math.exp(s)) if s < 0 else -math.log1p(math.exp(-s))
        assert model.predict_log_proba(X[:1])[0, 1] == pytest.approx(expected, rel=1e-12)


def test_nothing_that_was_given_is_changed():
    A, w = X.copy(), np.random.default_rng(0).random(len(X))
    before = A.copy(), w.copy()
    MLPClassifier(max_iter=2, class_weight="balanced", early_stopping=True).fit(A, y, w)
    np.testing.assert_array_equal(A, before[0])
    np.testing.assert_array_equal(w, before[1])


@pytest.mark.parametrize("dropout", [0.4, [0.2, 0.5]])
def test_dropout_is_drawn_from_random_state_and_never_when_predicting(dropout):
    def fitted(**more):
        more = {"random_state": 0, "learning_rate_init": 0.01, "max_iter": 60} | more
        return MLPClassifier((20, 20), dropout=dropout, **more).fit(X, y)

    one = fitted()
    assert one.score(X, y) > 0.95
    assert one.loss_curve_ == fitted().loss_curve_
    assert one.loss_curve_ != fitted(random_state=1).loss_curve_
    # in chunks
    np.testing.assert_allclose(
        fitted(memory_limit="200 KiB").loss_curve_, one.loss_curve_, rtol=1e-6
    )
    np.testing.assert_array_equal(one.predict_proba(X), one.predict_proba(X))
    plain = MLPClassifier((20, 20), max_iter=60, learning_rate_init=0.01, random_state=0).fit(X, y)
    assert one.loss_ > plain.loss_
    with pytest.raises(ValueError, match="dropout"):
        MLPClassifier(dropout=0.5, solver="lbfgs").fit(X, y)
    with pytest.raises(ValueError, match="dropout"):
        MLPClassifier(dropout=1.0).fit(X, y)


def test_the_penalty_that_is_reported_keeps_its_digits_over_many_equal_weights():
    net = mc.MLP([300, 300], bias=False)
    net.parameters[...] = np.float32(0.1)
    trainer = mc.Trainer(net, loss="squared_error", optimizer=mc.SGD(0.0))
    rows = Objective(
        trainer,
        np.zeros((1, 300), np.float32),
        np.zeros((1, 300), np.float32),
        None,
        1.0,
        0.25,
        None,
    )
    J, constant = rows.step(np.array([0]))
    penalty = 0.5 * 90_000 * float(np.float32(0.1)) ** 2
    assert float(J) == pytest.approx(penalty, rel=1e-7)
    assert 0.25 * float(J) + constant == pytest.approx(penalty, rel=1e-7)
