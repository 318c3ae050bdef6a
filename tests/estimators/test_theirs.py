"""scikit-learn's own tests of its MLPs, run on ours: a user's tests may look at the same things."""

import importlib.util
from unittest import mock

import pytest
from sklearn import neural_network

from mlpcore import estimators

INSIDE = {"test_gradient"}  # calls their gradient itself
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
]


def _theirs():
    spec = importlib.util.find_spec("sklearn.neural_network.tests.test_mlp")
    module = importlib.util.module_from_spec(spec)
    names = {name: getattr(estimators, name) for name in estimators.__all__}
    with mock.patch.multiple(neural_network, **names):
        spec.loader.exec_module(module)
    assert module.MLPClassifier is estimators.MLPClassifier
    return {
        name: test
        for name, test in vars(module).items()
        if name.startswith("test_") and name not in INSIDE
    }


@pytest.fixture
def global_random_seed():
    return 42


globals().update(_theirs())
