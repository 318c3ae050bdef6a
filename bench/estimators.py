"""Compare the estimators with scikit-learn's: score on held-out rows, and time of a fit.

    python bench/estimators.py [--seeds 10] [--out DIR]

The data sets are small ones from scikit-learn, standardised, with a quarter held out. Each seed
draws a new split, weights and shuffles. The two take turns, and a ratio of times compares the two
fits of a seed: medians with 95% bounds. Both stop by scikit-learn's rules, after the same number of
epochs unless rounding decides otherwise. BLAS uses the threads of the process.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

from sklearn import datasets, neural_network
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from bench import machine, stats
from mlpcore import estimators

SETS = {
    "digits": "MLPClassifier",
    "breast_cancer": "MLPClassifier",
    "wine": "MLPClassifier",
    "diabetes": "MLPRegressor",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adam 256-256": {"hidden_layer_sizes": (256, 256)},
    "adam, early stopping": {"early_stopping": True},
    "sgd": {"solver": "sgd", "learning_rate_init": 0.01},
    "lbfgs": {"solver": "lbfgs", "alpha": 1.0},
}
MODULES = {"ours": estimators, "theirs": neural_network}


def rows(name: str, dtype: str, seed: int) -> list[np.ndarray]:
    """Return X, X held out, y, y held out; X, and y in regression, are standardised."""
    X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    classes = y if SETS[name] == "MLPClassifier" else None
    X, Xv, y, yv = train_test_split(X, y, test_size=0.25, random_state=seed, stratify=classes)
    if classes is None:
        y, yv = (y - y.mean()) / y.std(), (yv - y.mean()) / y.std()
    scaler = StandardScaler().fit(X)
    return [scaler.transform(X).astype(dtype), scaler.transform(Xv).astype(dtype), y, yv]


def fit(
    module: Any, name: str, settings: dict[str, Any], seed: int, data: list[np.ndarray], device: str
) -> tuple[Any, float]:
    """Return a fitted estimator, and the seconds that the fit took."""
    own = {"device": device} if module is estimators else {}
    model = getattr(module, SETS[name])(random_state=seed, **settings, **own)
    begin = time.perf_counter()
    model.fit(data[0], data[2])
    return model, time.perf_counter() - begin


def measure(name: str, setting: str, dtype: str, seeds: int, device: str) -> dict[str, Any]:
    """Return one line of the table."""
    scores: dict[str, list[float]] = {who: [] for who in MODULES}
    seconds: dict[str, list[float]] = {who: [] for who in MODULES}
    epochs: dict[str, list[int]] = {who: [] for who in MODULES}
    for seed in range(seeds):
        data = rows(name, dtype, seed)
        for who in list(MODULES)[:: 1 if seed % 2 else -1]:
            if seed == 0:  # not timed: imports and caches
                fit(MODULES[who], name, {**SETTINGS[setting], "max_iter": 2}, seed, data, device)
            model, took = fit(MODULES[who], name, SETTINGS[setting], seed, data, device)
            scores[who].append(float(model.score(data[1], data[3])))
            seconds[who].append(took)
            epochs[who].append(int(model.n_iter_))
    figures = {
        who: {"mean": float(np.mean(found)), "spread": float(np.std(found))}
        for who, found in scores.items()
    }
    return {
        "data": name,
        "setting": setting,
        "dtype": dtype,
        "device": device,
        "scores": scores,
        "score": figures,
        "epochs": epochs,
        "seconds": {who: stats.bounded(found) for who, found in seconds.items()},
        "theirs over ours": stats.paired(seconds["theirs"], seconds["ours"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder of estimators.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    found = []
    print(
        f"{options.device}, {options.seeds} seeds; accuracy or R² on a quarter held out, mean ± "
        "deviation; time of a fit"
    )
    for dtype in ("float64", "float32"):
        for setting in SETTINGS:
            for name in SETS:
                row = measure(name, setting, dtype, options.seeds, options.device)
                found.append(row)
                mine, other = row["score"]["ours"], row["score"]["theirs"]
                ratio, took = row["theirs over ours"], row["seconds"]["ours"].median
                print(
                    f"{dtype} {setting:<20} {name:<13} ours {mine['mean']:.4f} ± "
                    f"{mine['spread']:.4f}  scikit-learn's"
                    f" {other['mean']:.4f} ± {other['spread']:.4f}  {1e3 * took:7.1f} ms, theirs"
                    f" {ratio.median:5.2f} times ({ratio.low:.2f} … {ratio.high:.2f})",
                    flush=True,
                )
    machine.save(options.out, "estimators", options.device, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
