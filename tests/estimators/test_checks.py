"""All of scikit-learn's checks of estimators, none expected to fail."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from mlpcore.estimators import MLPClassifier, MLPRegressor

EVERY = [
    MLPClassifier(),
    MLPRegressor(),
    MLPClassifier(solver="lbfgs", activation=["gelu"], max_iter=50),
    MLPRegressor(loss="huber", learning_rate_init=0.01),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(EVERY)
def test_scikit_learns_check(estimator, check):
    check(estimator)
