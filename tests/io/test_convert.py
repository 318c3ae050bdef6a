"""Networks from fitted scikit-learn models predict what those predict."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import LinearRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor

import mlpcore as mc
from mlpcore import estimators

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 4))
Y = {
    "one target": X @ [1.0, -2, 3, 0.5],
    "two targets": X @ RNG.standard_normal((4, 2)),
    "counts": RNG.poisson(np.exp(X[:, 0])).astype(float),
    "two classes": np.array(["no", "yes"])[(X[:, 0] > 0).astype(int)],
    "three classes": RNG.integers(0, 3, 60),
    "labels": (X[:, :2] > 0).astype(int),
}


def fitted(model, X, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few iterations do not converge
        return model.fit(X, y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
@pytest.mark.parametrize("kind", list(Y))
def test_predictions_are_the_models_own(kind, activation, dtype):
    settings = {
        "activation": activation,
        "hidden_layer_sizes": (7, 5),
        "max_iter": 5,
        "random_state": 0,
    }
    regression = kind in ("one target", "two targets", "counts")
    settings |= {"loss": "poisson"} if kind == "counts" else {}
    model = fitted(
        (MLPRegressor if regression else MLPClassifier)(**settings), X.astype(dtype), Y[kind]
    )
    net = mc.MLP.from_sklearn(model)
    assert net.dtype == dtype
    assert net.sizes[1:3] == (7, 5)
    wanted = model.predict(X.astype(dtype)) if regression else model.predict_proba(X.astype(dtype))
    wanted = wanted[:, 1:] if kind == "two classes" else wanted
    np.testing.assert_allclose(
        net.predict(X.astype(dtype)), wanted, rtol=1e-12 if dtype == "float64" else 2e-5, atol=1e-6
    )
    assert not np.shares_memory(net.parameters, model.coefs_[0])


def test_classes_of_real_data_are_told_apart_as_before():
    for load in (load_breast_cancer, load_iris):
        data, classes = load(return_X_y=True)
        data = (data - data.mean(axis=0)) / data.std(axis=0)
        model = fitted(MLPClassifier(max_iter=20, random_state=0), data, classes)
        P = mc.MLP.from_sklearn(model).predict(data)
        found = P.argmax(axis=1) if P.shape[1] > 1 else (P[:, 0] > 0.5).astype(int)
        np.testing.assert_array_equal(model.classes_[found], model.predict(data))


def test_without_hidden_layers_too():
    model = fitted(MLPRegressor(hidden_layer_sizes=(), max_iter=3), X, Y["one target"])
    np.testing.assert_allclose(mc.MLP.from_sklearn(model).predict(X), model.predict(X), rtol=1e-12)


@pytest.mark.parametrize("activation",
    [["tanh", "logistic"], [("leaky_relu", 0.2), "relu"], ("elu", 2.0), ["tanh", "prelu"],
                                        ("prelu", 0.4, "per output")], ids=str)  # fmt: skip
def test_estimators_of_our_own_with_activations_of_their_own_kind_come_over(activation):
    model = fitted(
        estimators.MLPRegressor(
            hidden_layer_sizes=(5, 3), activation=activation, max_iter=3, random_state=0
        ),
        X,
        Y["one target"],
    )
    net = mc.MLP.from_sklearn(model, device="cpu")
    wanted = [
        "sigmoid" if x == "logistic" else x
        for x in (activation if isinstance(activation, list) else [activation] * 2)
    ]
    assert net.activations[1:3] == mc.MLP([4, 5, 3, 1], wanted).activations[1:3]
    np.testing.assert_allclose(net.predict(X), model.predict(X), rtol=1e-12)


def test_what_is_no_fitted_network_is_refused():
    with pytest.raises(
        TypeError,
        match="model must be a fitted MLPClassifier or MLPRegressor; got LinearRegression",
    ):
        mc.MLP.from_sklearn(LinearRegression())
    with pytest.raises(ValueError, match="this MLPRegressor is not fitted yet"):
        mc.MLP.from_sklearn(MLPRegressor())


def test_training_goes_on_from_there():
    model = fitted(
        MLPRegressor(hidden_layer_sizes=(8,), max_iter=20, random_state=0), X, Y["one target"]
    )
    net = mc.MLP.from_sklearn(model, device="cpu")
    trainer = mc.Trainer(net, "squared_error", mc.Adam(1e-2))
    before = trainer.evaluate(X, Y["one target"])["loss"]
    trainer.fit(X, Y["one target"], epochs=100, progress=False)
    assert trainer.evaluate(X, Y["one target"])["loss"] < 0.5 * before
