"""A scikit-learn program with one import changed: digits in a pipeline, a search, a report.

Only the import of MLPClassifier differs from a scikit-learn program. The last part also runs
scikit-learn's class and compares: the same initial weights, the same shuffles, the same loss after
every epoch, up to rounding.
"""

import argparse

import numpy as np
from sklearn import neural_network
from sklearn.datasets import load_digits
from sklearn.metrics import classification_report, confusion_matrix
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

# was: from sklearn.neural_network import MLPClassifier
from mlpcore.estimators import MLPClassifier


def data():
    """Return 8 x 8 images as rows of 64 numbers, and their digits, half of them held out."""
    X, y = load_digits(return_X_y=True)
    return train_test_split(X, y, test_size=0.5, random_state=0, stratify=y)


def model(MLP=MLPClassifier, **parameters):
    """Return a pipeline: pixels scaled to 0 … 1, then one hidden layer with early stopping."""
    parameters = {
        "hidden_layer_sizes": (32,),
        "early_stopping": True,
        "random_state": 0,
    } | parameters
    return make_pipeline(MinMaxScaler(), MLP(learning_rate_init=0.01, **parameters))


def main():
    """Fit, report, search, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="unused: this example draws no picture")
    parser.parse_args()
    X, X_test, y, y_test = data()

    digits = model().fit(X, y)
    print(classification_report(y_test, digits.predict(X_test), digits=3))
    print(confusion_matrix(y_test, digits.predict(X_test)), "\n")

    search = GridSearchCV(
        model(),
        {"mlpclassifier__alpha": [1e-4, 1.0], "mlpclassifier__activation": ["relu", "gelu"]},
        cv=3,
    )
    search.fit(X, y)  # gelu is not in scikit-learn
    for parameters, score in zip(
        search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True
    ):
        print(f"{score:.3f}  {parameters}")

    ours, theirs = (
        model(MLP).fit(X, y)[-1] for MLP in (MLPClassifier, neural_network.MLPClassifier)
    )
    off = np.abs(np.divide(ours.loss_curve_, theirs.loss_curve_) - 1).max()
    print(
        f"\nloss by epoch, ours: {np.round(ours.loss_curve_[:4], 4)} … after {ours.n_iter_} epochs"
    )
    print(
        f"scikit-learn's:      {np.round(theirs.loss_curve_[:4], 4)} … after {theirs.n_iter_} "
        "epochs"
    )
    print(f"largest relative difference of any epoch: {off:.0e}")


if __name__ == "__main__":
    main()
