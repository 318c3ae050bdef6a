"""scikit-learn's MLPClassifier and MLPRegressor, computed by this engine: one import changes and
nothing else.

    from mlpcore.estimators import MLPClassifier, MLPRegressor

Initial weights and shuffles are drawn from `random_state` in scikit-learn's order; batches,
penalty, stopping rules and the reported loss are its own. In float64 the loss curves agree to
rounding. Rows, forward and backward passes and updates are the trainer's. See docs/estimators.md.
"""

from mlpcore.estimators.classifier import MLPClassifier
from mlpcore.estimators.regressor import MLPRegressor

__all__ = ["MLPClassifier", "MLPRegressor"]
