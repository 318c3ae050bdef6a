"""Use of an estimator: search, pipelines, calibration, frames, pickles, mistakes."""

import copy
import inspect
import pickle
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy import sparse
from sklearn import clone, neural_network
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_diabetes, load_wine
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlpcore import estimators
from mlpcore.estimators import MLPClassifier, MLPRegressor
from mlpcore.trainer import Trainer

MODULES = (neural_network, estimators)
WINE, DIABETES = load_wine(return_X_y=True), load_diabetes(return_X_y=True)
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.mark.parametrize("name", ["MLPClassifier", "MLPRegressor"])
def test_the_signature_begins_with_scikit_learns_in_its_order(name):
    theirs, ours = (
        list(inspect.signature(getattr(module, name)).parameters.values()) for module in MODULES
    )
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert [(p.name, p.kind) for p in ours[:2]] == [(p.name, p.kind) for p in theirs[:2]]
    for method in ("fit", "partial_fit", "predict", "score"):
        theirs, ours = (
            list(inspect.signature(getattr(getattr(module, name), method)).parameters)
            for module in MODULES
        )
        assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("name", ["MLPClassifier", "MLPRegressor"])
def test_a_model_is_an_instance_of_scikit_learns_class(name):
    assert isinstance(getattr(estimators, name)(), getattr(neural_network, name))


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_a_fit_leaves_neither_its_rows_nor_copies_of_its_weights_behind(solver):
    model = MLPRegressor(solver=solver, max_iter=2).fit(*DIABETES)
    assert {"_passed", "_best_coefs", "_best_intercepts"}.isdisjoint(vars(model))


def test_a_scorer_gets_a_single_target_as_one_column():
    shapes = []

    def scoring(model, X, y):
        shapes.append((len(X), y.shape))
        return 0.0

    MLPRegressor(scoring=scoring, early_stopping=True, max_iter=2).fit(*DIABETES)
    assert shapes == [(45, (45,))] * 2


@pytest.mark.parametrize("name", ["MLPClassifier", "MLPRegressor"])
def test_every_public_attribute_is_there(name):
    X, y = WINE
    for more in ({}, {"solver": "lbfgs"}, {"early_stopping": True}):
        theirs, ours = (getattr(module, name)(max_iter=3, **more).fit(X, y) for module in MODULES)
        public = {key for key in vars(theirs) if not key.startswith("_")}
        assert public <= set(vars(ours))
        methods = {key for key in dir(theirs) if not key.startswith("_")}
        assert methods <= set(dir(ours))


def test_grid_search_pipeline_and_cross_validation_score_as_scikit_learns():
    scores = []
    for module in MODULES:
        model = make_pipeline(StandardScaler(), module.MLPClassifier(max_iter=20, random_state=0))
        search = GridSearchCV(model, {"mlpclassifier__alpha": [1e-3, 1.0]}, n_jobs=2, cv=3).fit(
            *WINE
        )
        scores.append(
            [*search.cv_results_["mean_test_score"], *cross_val_score(model, *WINE, cv=3)]
        )
    np.testing.assert_allclose(*scores)


@pytest.mark.slow
def test_calibration_and_permutation_importance():
    X, y = WINE
    found = []
    for module in MODULES:
        model = make_pipeline(StandardScaler(), module.MLPClassifier(max_iter=30, random_state=0))
        calibrated = CalibratedClassifierCV(model, cv=2).fit(X, y)
        importance = permutation_importance(model.fit(X, y), X, y, n_repeats=2, random_state=0)
        found.append(
            np.concatenate([calibrated.predict_proba(X).ravel(), importance.importances_mean])
        )
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-7)


def test_a_clone_has_the_parameters_and_nothing_of_the_fit():
    model = MLPRegressor(
        hidden_layer_sizes=(3, 4), activation=["gelu", ("elu", 0.5)], device="cpu", max_iter=2
    ).fit(*DIABETES)
    other = clone(model)
    assert other.get_params() == model.get_params()
    assert not hasattr(other, "coefs_")
    assert repr(other) == repr(model)


@pytest.mark.parametrize("way", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
def test_a_pickle_predicts_alike_and_trains_on_as_the_original(way, solver):
    X, y = WINE
    model = MLPClassifier(solver=solver, max_iter=3, random_state=0).fit(X, y)
    if solver != "lbfgs":
        model.partial_fit(X, y)
    assert not any(isinstance(value, Trainer) for value in model.__getstate__().values())
    other = way(model)
    np.testing.assert_array_equal(other.predict_proba(X), model.predict_proba(X))
    if solver != "lbfgs":
        for estimator in (model, other):
            for _ in range(3):
                estimator.partial_fit(X, y)
        np.testing.assert_array_equal(other.coefs_[0], model.coefs_[0])
        assert other.loss_curve_ == model.loss_curve_
    assert not np.shares_memory(other.coefs_[0], model.coefs_[0])


def test_what_is_written_into_coefs_counts_and_so_do_arrays_put_in_their_place():
    X, y = DIABETES
    found = []
    for module in MODULES:
        model = module.MLPRegressor(hidden_layer_sizes=4, max_iter=3, random_state=0).fit(X, y)
        model.coefs_[0][...] *= 2
        first = model.predict(X)
        model.intercepts_ = [b + 1 for b in model.intercepts_]
        second = model.predict(X)
        model.coefs_[1] = np.ones((4, 1))
        model.partial_fit(X, y)
        found.append([first, second, model.predict(X)])
    np.testing.assert_allclose(*found, rtol=1e-9)


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame], ids=["pandas", "polars"])
def test_frames_bring_their_names_and_other_names_are_an_error(frame):
    X, y = WINE
    names = [f"column {i}" for i in range(X.shape[1])]
    table = frame(dict(zip(names, X.T, strict=True)))
    model = MLPClassifier(max_iter=3, random_state=0, early_stopping=True).fit(table, y)
    assert model.feature_names_in_.tolist() == names
    plain = MLPClassifier(max_iter=3, random_state=0, early_stopping=True).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(table), plain.predict_proba(X))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame(dict(zip(names[::-1], X.T, strict=True))))
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        model.predict(X)


def wrong(*, fit=(), call=None, X=WINE[0], y=WINE[1], **parameters):
    return parameters, fit, call, X, y


WRONG = [
    wrong(solver="newton"),
    wrong(alpha=-1),
    wrong(max_iter=0),
    wrong(learning_rate_init=0),
    wrong(momentum=2),
    wrong(validation_fraction=1.0, early_stopping=True),
    wrong(beta_1=1),
    wrong(n_iter_no_change=0),
    wrong(batch_size="all"),
    wrong(hidden_layer_sizes=-1),
    wrong(hidden_layer_sizes=(4, 0)),
    wrong(random_state="x"),
    wrong(warm_start=3),
    wrong(power_t=-1),
    wrong(max_fun=0),
    wrong(epsilon=0),
    wrong(tol=-1),
    wrong(shuffle="yes"),
    wrong(X=WINE[0][:0]),
    wrong(X=WINE[0][:9]),
    wrong(X=WINE[0] * np.nan),
    wrong(X=WINE[0][0]),
    wrong(X=[["a", "b"]] * 178),
    wrong(early_stopping=True, validation_fraction=0.001),
    wrong(fit=([1.0, 2.0],)),
    wrong(fit=(np.full(178, np.nan),)),
    wrong(call=lambda m: m.partial_fit(*WINE), early_stopping=True),
    wrong(call=lambda m: m.fit(*WINE).predict(WINE[0][:, :4])),
    wrong(call=lambda m: m.predict(WINE[0])),
]
OF_A_CLASSIFIER = [
    wrong(y=WINE[0][:, 0]),
    wrong(call=lambda m: m.partial_fit(*WINE)),
    wrong(
        call=lambda m: m.partial_fit(*WINE, classes=[0, 1, 2]).partial_fit(*WINE, classes=[1, 2])
    ),
    wrong(call=lambda m: m.partial_fit(*WINE, classes=[0, 1])),
    wrong(call=lambda m: m.fit(*WINE).fit(WINE[0][:80], WINE[1][:80]), warm_start=True),
    wrong(call=lambda m: m.partial_fit(*WINE, classes=[0, 1, 2]), solver="lbfgs"),
    wrong(y=np.stack([WINE[1], WINE[1]], axis=1)),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        *(("MLPClassifier", case) for case in (*WRONG, *OF_A_CLASSIFIER)),
        *(("MLPRegressor", case) for case in WRONG),
    ],
)
def test_a_mistake_is_the_same_error(name, mistake):
    parameters, fit, call, X, y = mistake
    call = call or (lambda model: model.fit(X, y, *fit))
    errors = []
    for module in MODULES:
        model = getattr(module, name)(**{"max_iter": 2, "random_state": 0, **parameters})
        with pytest.raises((ValueError, TypeError, AttributeError)) as caught:
            call(model)
        errors.append(caught.value)
    assert type(errors[0]) is type(errors[1])
    assert str(errors[0]) == str(errors[1])


def test_warnings_are_the_same():
    X, y = WINE
    cases = [
        {"max_iter": 2},
        {"max_iter": 2, "solver": "lbfgs"},
        {"max_iter": 2, "batch_size": 1000},
        {"max_iter": 2, "y": y[:, None]},
    ]
    for case in cases:
        said = []
        for module in MODULES:
            parameters = dict(case)
            target = parameters.pop("y", y)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                module.MLPClassifier(random_state=0, **parameters).fit(X, target)
            said.append([(w.category, str(w.message)) for w in caught])
        assert said[0] == said[1]
        assert said[0]


def test_weights_that_are_zero_on_a_whole_batch_are_scikit_learns_error():
    X, y = DIABETES
    w = np.r_[np.zeros(100), np.ones(len(X) - 100)]
    for module in MODULES:
        with pytest.raises(ZeroDivisionError, match="can't be normalized"):
            module.MLPRegressor(shuffle=False, batch_size=50).fit(X, y, w)


def test_an_interrupt_ends_the_training_with_a_warning_and_what_was_learned():
    def stop(trainer, entry):
        if entry["loss"] < 1e9:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted by user"):
        model = MLPRegressor(callbacks=[stop], random_state=0).fit(*DIABETES)
    assert model.n_iter_ == 1
    assert model.predict(DIABETES[0]).shape == (442,)


@pytest.mark.parametrize("y", [[0, 0, 0, 0], ["a", "a", "a", "a"]])
def test_one_class_alone(y):
    X = np.eye(4)
    found = [module.MLPClassifier(max_iter=2, random_state=0).fit(X, y) for module in MODULES]
    np.testing.assert_array_equal(found[0].predict(X), found[1].predict(X))
    np.testing.assert_allclose(found[0].predict_proba(X), found[1].predict_proba(X))


def test_multilabel_targets_may_be_sparse_and_predictions_are_then():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 5)), sparse.csr_array(rng.integers(0, 2, (60, 3)))
    found = [
        module.MLPClassifier(max_iter=5, random_state=0).fit(X, y).predict(X) for module in MODULES
    ]
    assert type(found[0]) is type(found[1])
    np.testing.assert_array_equal(found[0].toarray(), found[1].toarray())


def test_the_probability_of_either_class_keeps_its_digits():
    X = np.linspace(-1, 1, 60)[:, None]
    model = MLPClassifier((), max_iter=20, random_state=0).fit(X, X[:, 0] > 0)
    steep = X * 50 / (np.abs(X) * np.abs(model.coefs_[0]).sum())
    P, s = model.predict_proba(steep), steep @ model.coefs_[0] + model.intercepts_[0]
    np.testing.assert_allclose(
        P, np.exp(-np.maximum(np.hstack([s, -s]), 0)) / (1 + np.exp(-np.abs(s))), rtol=1e-12
    )
    assert 0 < P.min() < 1e-18
