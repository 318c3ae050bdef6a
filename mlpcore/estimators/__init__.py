"""scikit-learn's MLPClassifier and MLPRegressor on this engine: change only the import.

    from mlpcore.estimators import MLPClassifier, MLPRegressor

Both are subclasses of scikit-learn's. Checks, labels and initial weights are scikit-learn's code;
batches, penalty, stopping rules and the reported loss follow it; forward and backward passes and
updates are the trainer's. In float64 the loss curves agree up to rounding. See docs/estimators.md.
"""

from mlpcore.estimators.classifier import MLPClassifier
from mlpcore.estimators.regressor import MLPRegressor

__all__ = ["MLPClassifier", "MLPRegressor"]
