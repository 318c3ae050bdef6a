"""Parameters that change after a fit, mistakes in them, and the types of fitted attributes."""

import pickle

import numpy as np
import pytest
from sklearn import neural_network
from sklearn.datasets import load_wine
from sklearn.preprocessing import scale
from sklearn.utils._param_validation import InvalidParameterError

from mlpcore import estimators
from mlpcore.estimators import MLPClassifier, MLPRegressor

X, y = scale(load_wine().data), load_wine().target
MODULES = (neural_network, estimators)
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def pair(name="MLPClassifier", **parameters):
    return [
        getattr(module, name)(**{"max_iter": 5, "random_state": 0, **parameters})
        for module in MODULES
    ]


def test_an_activation_that_changes_after_the_fit_counts_in_predictions_and_pickles():
    found = []
    for model in pair(hidden_layer_sizes=(6,)):
        before = model.fit(X, y).predict_proba(X)
        model.set_params(activation="tanh")
        found.append(model.predict_proba(X))
        assert abs(found[-1] - before).max() > 1e-3
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), found[-1])
    np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("again", ["fit", "partial_fit"])
@pytest.mark.parametrize("change", [{"activation": "tanh"}, {"hidden_layer_sizes": (7,)}])
def test_training_goes_on_with_the_new_activation_and_the_old_layers(again, change):
    found = []
    for model in pair(hidden_layer_sizes=(6,), warm_start=True):
        model.fit(X, y).partial_fit(X, y)
        getattr(model.set_params(**change), again)(X, y)
        getattr(model, again)(X, y)
        assert [w.shape for w in model.coefs_] == [(13, 6), (6, 3)]
        found.append([*model.loss_curve_, *model.predict_proba(X).ravel()])
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_partial_fit_goes_on_with_the_new_loss():
    model = MLPRegressor(alpha=0, random_state=0).partial_fit(X, y)
    far = abs(model.predict(X) - y)
    model.set_params(loss=("huber", 0.5)).partial_fit(X, y)
    assert model.loss_ == pytest.approx(np.where(far < 0.5, far**2 / 2, 0.5 * (far - 0.25)).mean())


@pytest.mark.parametrize("name", ["MLPClassifier", "MLPRegressor"])
@pytest.mark.parametrize(
    "more",
    [{}, {"solver": "sgd"}, {"solver": "lbfgs"}, {"early_stopping": True}, {"batch_size": 40}],
)
def test_every_attribute_is_of_the_type_that_scikit_learns_has(name, more):
    theirs, ours = (vars(model.fit(X, y)) for model in pair(name, **more))
    for key in [key for key in theirs if key.endswith("_")] + [
        "_random_state",
        "_no_improvement_count",
        "_label_binarizer",
    ]:
        if key in theirs and not (more.get("solver") == "lbfgs" and key == "_no_improvement_count"):
            assert type(ours[key]) is type(theirs[key]), key
            if isinstance(theirs[key], list):
                assert {type(entry) for entry in ours[key]} == {
                    type(entry) for entry in theirs[key]
                }, key


def test_layer_sizes_in_the_place_of_the_loss_are_named_as_such():
    with pytest.raises(
        InvalidParameterError, match=r"loss.*did you mean hidden_layer_sizes=\(64,\)\?"
    ):
        MLPRegressor((64,)).fit(X, y)
    with pytest.raises(
        InvalidParameterError, match=r"activation.*did you mean hidden_layer_sizes=\[64, 32\]\?"
    ):
        MLPClassifier(activation=[64, 32]).fit(X, y)
    for wrong in [[], ("elu", "x"), ["relu", "rleu"], 3]:
        with pytest.raises(InvalidParameterError, match="activation"):
            MLPClassifier((4, 4), activation=wrong).fit(X, y)
    for wrong in [("huber", -1.0), ("hubr", 1.0), (), 3]:
        with pytest.raises(InvalidParameterError, match="loss"):
            MLPRegressor(wrong).fit(X, y)


@pytest.mark.parametrize("weights", [{0: -1}, {0: 0, 1: 0, 2: 0}, {0: np.nan}, {1: np.inf}])
def test_class_weights_that_cannot_be_are_named(weights):
    with pytest.raises(ValueError, match="class_weight"):
        MLPClassifier(class_weight=weights).fit(X, y)


def test_dropout_may_be_an_array():
    curves = [
        MLPClassifier((8, 6), dropout=dropout, max_iter=3, random_state=0).fit(X, y).loss_curve_
        for dropout in ([0.5, 0.2], np.array([0.5, 0.2]), (0.5, 0.0))
    ]
    assert curves[0] == curves[1] != curves[2]


def test_validation_rows_that_nothing_can_come_of_are_an_error():
    with pytest.raises(ValueError, match=r"validation needs solver='adam' or 'sgd'.*'lbfgs'"):
        MLPRegressor(solver="lbfgs").fit(X, y, validation=(X, y))
    names = np.array(["barolo", "grignolino", "barbera"])[y]
    with pytest.raises(ValueError, match=r"validation: y has labels.*'merlot'"):
        MLPClassifier(early_stopping=True).fit(
            X, names, validation=(X[:3], ["merlot", "barolo", "barolo"])
        )
    with pytest.raises(ValueError, match="validation: y has labels"):
        MLPClassifier(early_stopping=True).fit(X, names, validation=(X, y))
    MLPClassifier(max_iter=1).fit(X, names, validation=(X[:3], ["barolo"] * 3))
