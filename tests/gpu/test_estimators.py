"""The estimators on the device: scikit-learn's curve, arrays of the device's in and out, pickles
that go home.
"""

import pickle
from functools import partial

import numpy as np
import pytest
from sklearn import neural_network
from sklearn.datasets import load_diabetes, load_wine
from sklearn.preprocessing import scale

from mlpcore import estimators
from mlpcore.backends import devices

WINE, DIABETES = (
    (scale(load_wine().data), load_wine().target),
    (scale(load_diabetes().data), load_diabetes().target),
)
BOTH = [(name, data) for name, data in (("MLPClassifier", WINE), ("MLPRegressor", DIABETES))]
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def pair(name, **parameters):
    parameters = {
        "hidden_layer_sizes": (5,),
        "max_iter": 3,
        "random_state": 0,
        "batch_size": 70,
    } | parameters
    theirs, ours = (getattr(module, name) for module in (neural_network, estimators))
    return theirs(**parameters), partial(ours, device="cuda", **parameters)()


@pytest.mark.parametrize(("name", "data"), BOTH)
@pytest.mark.parametrize(
    "more", [{}, {"solver": "sgd"}, {"early_stopping": True}, {"solver": "lbfgs"}], ids=str
)
def test_the_curve_on_the_device_is_scikit_learns(device, name, data, more):
    X, y = data
    w = np.random.default_rng(0).random(len(X))
    theirs, ours = pair(name, **more)
    theirs.fit(X, y, w)
    ours.fit(X, y, w)
    for attribute in ("loss_curve_", "validation_scores_", "loss_"):
        if getattr(theirs, attribute, None) is not None:
            np.testing.assert_allclose(
                getattr(ours, attribute), getattr(theirs, attribute), rtol=1e-6
            )
    assert isinstance(ours.coefs_[0], np.ndarray)
    np.testing.assert_allclose(ours.coefs_[0], theirs.coefs_[0], rtol=1e-5, atol=1e-7)
    assert isinstance(ours.predict(X), np.ndarray)
    ours.coefs_[0][...] *= 3  # counts, though it lies on the host
    theirs.coefs_[0] *= 3
    method = "predict_proba" if name == "MLPClassifier" else "predict"
    np.testing.assert_allclose(
        getattr(ours, method)(X), getattr(theirs, method)(X), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(("name", "data"), BOTH)
def test_arrays_of_the_device_go_in_and_predictions_come_back_there(device, put, name, data):
    X, y = data
    there, there_y, w = put(X, y, np.ones(len(X)))
    theirs, ours = pair(name, early_stopping=True)
    theirs.fit(X, y, np.ones(len(X)))
    ours.set_params(device="auto").fit(there, there_y, w)
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-6)
    predicted = ours.predict(there)
    assert device.holds(predicted)
    np.testing.assert_allclose(device.to_host(predicted), theirs.predict(X), rtol=1e-5)
    assert ours.score(there, there_y) == pytest.approx(theirs.score(X, y), rel=1e-6)
    if name == "MLPClassifier":
        P = ours.predict_proba(there)
        assert device.holds(P)
        np.testing.assert_allclose(device.to_host(P), theirs.predict_proba(X), rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match=r"13 features|10 features"):
        ours.predict(put(X[:, :4]))


@pytest.mark.parametrize("kind", ["binary", "one class", "multilabel", "names"])
def test_labels_of_every_kind_from_rows_on_the_device(device, put, kind):
    X, y = WINE
    labels = {
        "binary": y == 1,
        "one class": y * 0 + 7,
        "multilabel": np.eye(3, dtype=int)[y],
        "names": np.array(["a", "b", "c"])[y],
    }
    theirs, ours = pair("MLPClassifier", max_iter=10)
    theirs.fit(X, labels[kind])
    ours.fit(put(X), labels[kind])
    predicted = ours.predict(put(X))
    assert device.holds(predicted) == (kind != "names")
    np.testing.assert_array_equal(
        devices.find("cpu" if kind == "names" else "cuda:0").to_host(predicted), theirs.predict(X)
    )
    P = ours.predict_proba(put(X))
    np.testing.assert_allclose(device.to_host(P), theirs.predict_proba(X), rtol=1e-5, atol=1e-9)


def test_a_pickle_goes_to_a_machine_without_a_gpu_and_trains_on_here(device, monkeypatch):
    X, y = WINE
    theirs, ours = pair("MLPClassifier")
    theirs.fit(X, y).partial_fit(X, y)
    ours.fit(X, y).partial_fit(X, y)
    state = pickle.dumps(ours)
    pickle.loads(state).partial_fit(X, y)
    theirs.partial_fit(X, y)
    ours.partial_fit(X, y)
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-6)
    expected = ours.predict_proba(X)
    state = pickle.dumps(ours)
    monkeypatch.setattr(devices, "_opened", {})
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "there is none")
    np.testing.assert_allclose(pickle.loads(state).predict_proba(X), expected, rtol=1e-9)
