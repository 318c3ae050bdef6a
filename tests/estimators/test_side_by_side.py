"""Ours against scikit-learn's: the same seed, data and solver give the same run in float64."""

import itertools
import warnings

import numpy as np
import pytest
from scipy import sparse
from sklearn import datasets, neural_network
from sklearn.preprocessing import StandardScaler

from mlpcore import estimators

CURVES = ("loss_curve_", "validation_scores_", "best_loss_", "best_validation_score_", "loss_")
EXACT = (
    "n_iter_",
    "t_",
    "n_layers_",
    "n_outputs_",
    "out_activation_",
    "n_features_in_",
    "_no_improvement_count",
)
RAW = {
    name: getattr(datasets, f"load_{name}")(return_X_y=True)
    for name in ("digits", "wine", "breast_cancer", "diabetes")
}


def data(kind, rows=220, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, 7))
    S = X @ rng.standard_normal((7, 3)) + 0.3 * rng.standard_normal((rows, 3))
    y = {
        "multiclass": np.array(["c", "a", "b"])[S.argmax(axis=1)],
        "binary": np.where(S[:, 0] > 0, "yes", "no"),
        "multilabel": (S > 0).astype(int),
        "one": S[:, 0],
        "many": S,
        "counts": rng.poisson(np.exp(0.5 * S[:, :2])).astype(float),
    }[kind]
    return X, y


def pair(kind, **parameters):
    name = (
        "MLPClassifier"
        if kind in ("multiclass", "binary", "multilabel", "digits", "wine", "breast_cancer")
        else "MLPRegressor"
    )
    return [
        getattr(module, name)(**{"random_state": 3, "max_iter": 25, **parameters})
        for module in (neural_network, estimators)
    ]


def both(call, *fitted):
    """Call on each; assert that both give the same warnings."""
    said = []
    for estimator in fitted:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # theirs divides by zero where ours does not
            warnings.simplefilter("ignore", RuntimeWarning)
            call(estimator)
        said.append([(w.category, str(w.message)) for w in caught])
    assert said[0] == said[1]


def same(theirs, ours, X=None, rtol=1e-6):
    for name in EXACT:
        assert getattr(theirs, name, None) == getattr(ours, name, None), name
    for name in CURVES:
        expected, found = getattr(theirs, name, None), getattr(ours, name, None)
        assert (expected is None) == (found is None), name
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12, err_msg=name)
    for expected, found in zip(
        theirs.coefs_ + theirs.intercepts_, ours.coefs_ + ours.intercepts_, strict=True
    ):
        assert expected.dtype == found.dtype
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)
    if X is not None:
        for method in ("predict_proba", "predict_log_proba", "predict"):
            if hasattr(theirs, method):
                expected, found = getattr(theirs, method)(X), getattr(ours, method)(X)
                assert expected.dtype == found.dtype
                assert expected.shape == found.shape
                # theirs takes 1 - P, which has lost the digits of a small probability
                if method == "predict_log_proba":
                    lost = (
                        4
                        * np.finfo(expected.dtype).eps
                        / np.maximum(np.exp(found), np.finfo(expected.dtype).tiny)
                    )
                    assert (abs(found - expected) <= 1e-5 * abs(expected) + 1e-9 + lost).all()
                elif expected.dtype.kind == "f":
                    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
                else:
                    assert (found == expected).mean() > 0.995  # a tie may round either way


SOLVERS = [
    {"solver": "adam"},
    {"solver": "adam", "beta_1": 0.0, "beta_2": 0.9, "epsilon": 1e-3, "learning_rate_init": 0.01},
    {"solver": "sgd"},
    {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.1, "power_t": 0.3},
    {
        "solver": "sgd",
        "learning_rate": "adaptive",
        "learning_rate_init": 0.2,
        "tol": 0.02,
        "n_iter_no_change": 2,
    },
    {"solver": "sgd", "momentum": 0.0, "learning_rate_init": 0.1},
    {"solver": "sgd", "nesterovs_momentum": False, "momentum": 0.5},
    {"solver": "sgd", "momentum": 1.0, "max_iter": 4},
]
KINDS = ("multiclass", "binary", "multilabel", "one", "many")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "solver", SOLVERS, ids=lambda solver: "-".join(str(value) for value in solver.values())
)
def test_every_solver_goes_the_same_way_epoch_by_epoch(kind, solver):
    X, y = data(kind)
    theirs, ours = pair(kind, batch_size=32, **solver)  # 220 rows: the last batch has 28
    both(lambda estimator: estimator.fit(X, y), theirs, ours)
    same(theirs, ours, X)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
def test_every_activation_with_row_weights_and_a_large_penalty(kind, activation):
    X, y = data(kind)
    w = np.random.default_rng(1).random(len(X)) * 3
    theirs, ours = pair(
        kind, activation=activation, hidden_layer_sizes=(9, 5), alpha=2.0, batch_size=50
    )
    both(lambda estimator: estimator.fit(X, y, sample_weight=w), theirs, ours)
    same(theirs, ours, X)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "many", "multiclass", "binary"])
@pytest.mark.parametrize("activation", ["logistic", "tanh"])
@pytest.mark.parametrize("weighted", [False, True])
def test_lbfgs_ends_at_the_same_place(kind, activation, weighted):
    X, y = data(kind, rows=60)
    w = np.random.default_rng(1).random(len(X)) if weighted else None
    theirs, ours = pair(
        kind, solver="lbfgs", activation=activation, hidden_layer_sizes=(4,), alpha=0.1, max_iter=15
    )
    both(lambda estimator: estimator.fit(X, y, sample_weight=w), theirs, ours)
    same(theirs, ours, X)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *itertools.product(
            KINDS, [{"solver": "adam", "learning_rate_init": 0.02}, {"solver": "sgd"}]
        )
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_early_stopping_holds_out_the_same_rows_and_returns_to_the_same_epoch(kind, more, weighted):
    X, y = data(kind)
    w = np.random.default_rng(1).random(len(X)) + 0.1 if weighted else None
    theirs, ours = pair(
        kind, early_stopping=True, n_iter_no_change=3, validation_fraction=0.2, **more
    )
    both(lambda estimator: estimator.fit(X, y, sample_weight=w), theirs, ours)
    same(theirs, ours, X)
    assert len(ours.validation_scores_) == ours.n_iter_


@pytest.mark.parametrize("kind", ["counts"])
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
def test_poisson_deviance_is_reported_with_its_constant(kind, solver):
    X, y = data(kind)
    theirs, ours = pair(
        kind,
        loss="poisson",
        solver=solver,
        learning_rate_init=1e-3,
        activation="tanh",
        hidden_layer_sizes=4,
    )
    w = np.random.default_rng(1).random(len(X))
    both(lambda estimator: estimator.fit(X, y, sample_weight=w), theirs, ours)
    same(theirs, ours, X, rtol=1e-6 if solver != "lbfgs" else 1e-4)
    both(lambda estimator: estimator.fit(X, y[:, 0]), theirs, ours)
    np.testing.assert_allclose(theirs.loss_, ours.loss_, rtol=1e-6 if solver != "lbfgs" else 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize(
    "more", [{}, {"solver": "sgd"}, {"early_stopping": True}], ids=["adam", "sgd", "early stopping"]
)
def test_data_sets_as_they_come_unscaled(name, more):
    """The loss depends on rounding and clipping if probabilities round to 0 and 1."""
    X, y = RAW[name]
    theirs, ours = pair(name, max_iter=30, **more)
    same(theirs.fit(X, y), ours.fit(X, y), rtol=1e-6)
    assert theirs.score(X, y) == pytest.approx(ours.score(X, y), abs=1e-9)


@pytest.mark.parametrize("kind", ["multiclass", "binary", "one"])
@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_partial_fit_goes_on_from_fit_and_from_itself(kind, solver):
    X, y = data(kind)
    theirs, ours = pair(kind, solver=solver, learning_rate="invscaling", max_iter=5)
    for first in (True, False):
        if first:
            both(lambda estimator: estimator.fit(X, y), theirs, ours)
        for part in (slice(0, 100), slice(100, 220), slice(30, 90)):
            both(lambda estimator, part=part: estimator.partial_fit(X[part], y[part]), theirs, ours)
            same(theirs, ours, X)
    classes = {"classes": np.unique(y)} if kind != "one" else {}
    theirs, ours = pair(kind, solver=solver, batch_size=16)
    for _ in range(4):
        both(lambda estimator: estimator.partial_fit(X[:50], y[:50], **classes), theirs, ours)
        same(theirs, ours, X)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("kind", ["multiclass", "many"])
def test_a_warm_start_goes_on(kind, early_stopping):
    X, y = data(kind)
    random = [np.random.RandomState(7) for _ in range(2)]  # whose stream goes on as well
    theirs, ours = pair(kind, warm_start=True, max_iter=4, early_stopping=early_stopping)
    for estimator, state in zip((theirs, ours), random, strict=True):
        estimator.set_params(random_state=state)
    for _ in range(3):
        both(lambda estimator: estimator.fit(X, y), theirs, ours)
        same(theirs, ours, X)
    assert random[0].randint(1 << 30) == random[1].randint(1 << 30)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_array])
@pytest.mark.parametrize("kind", ["multiclass", "many"])
@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_sparse_rows(kind, form, solver, monkeypatch):
    X, y = data(kind)
    X[abs(X) < 0.5] = 0
    monkeypatch.setattr(estimators.epochs, "SPARSE_BYTES", 7 * 8 * 50)  # five chunks
    w = np.random.default_rng(1).random(len(X))
    theirs, ours = pair(kind, solver=solver, max_iter=8, activation="tanh", hidden_layer_sizes=5)
    both(lambda estimator: estimator.fit(form(X), y, sample_weight=w), theirs, ours)
    same(theirs, ours, form(X))


@pytest.mark.parametrize(
    "more",
    [{"shuffle": False}, {"batch_size": 1000}, {"batch_size": 1}, {"hidden_layer_sizes": ()}],
)
def test_batches_of_all_sizes_in_the_given_order_and_no_hidden_layer(more):
    X, y = data("multiclass")
    theirs, ours = pair("multiclass", max_iter=3, **more)
    both(lambda estimator: estimator.fit(X, y), theirs, ours)
    same(theirs, ours, X)


def test_what_verbose_prints_is_the_same(capsys):
    X, y = data("multiclass")
    printed = []
    for more in (
        {"early_stopping": True, "learning_rate_init": 0.1},
        {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.5},
    ):
        for estimator in pair("multiclass", verbose=True, max_iter=60, n_iter_no_change=2, **more):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                estimator.fit(X, y)
            printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[2] == printed[3]
    assert "Setting learning rate to" in printed[3]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", ["wine", "diabetes"])
def test_float32_stays_float32_and_ends_near(name):
    X, y = RAW[name]
    X = StandardScaler().fit_transform(X).astype(np.float32)
    theirs, ours = pair(name, max_iter=20)
    same(theirs.fit(X, y), ours.fit(X, y), rtol=2e-3)
    assert ours.coefs_[0].dtype == np.float32
    theirs, ours = pair(name, solver="lbfgs", max_iter=5)
    same(theirs.fit(X, y), ours.fit(X, y), rtol=1e-5)
    assert ours.coefs_[0].dtype == np.float64  # as scikit-learn's


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_run_that_diverges_ends_alike(early_stopping):
    X, y = data("one")
    X = X * 1e3
    found = []
    for estimator in pair(
        "one", solver="sgd", learning_rate_init=10.0, early_stopping=early_stopping, max_iter=30
    ):
        try:
            estimator.fit(X, y)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append(
                (
                    estimator.n_iter_,
                    np.isnan(estimator.validation_scores_[-1]),
                    estimator.best_validation_score_,
                )
            )
    assert found[0] == pytest.approx(found[1]) if early_stopping else found[0] == found[1]
