"""Figures of predictions, the models to compare with, and printed tables."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.cli.messages import say
from mlpcore.cli.outputs import KEY
from mlpcore.io.atomic import replacing
from mlpcore.tables.standardizer import Standardizer

Array = NDArray[Any]


def class_figures(p: Array, Y: Array) -> dict[str, float]:
    """Return AUC (two classes), accuracy and log loss of class probabilities (m, classes)."""
    from sklearn.metrics import log_loss, roc_auc_score

    scores = (
        {"AUC": float(roc_auc_score(Y, p[:, 1]))}
        if p.shape[1] == 2 and len(np.unique(Y)) == 2
        else {}
    )
    p = p.astype(np.float64)
    p /= p.sum(axis=1, keepdims=True)
    return {
        **scores,
        "accuracy": float(np.mean(p.argmax(1) == Y)),
        "log loss": log_loss(Y, p, labels=range(p.shape[1])),
    }


def quantity_figures(Z: Array, Y: Array, scale: Standardizer) -> dict[str, float]:
    """Return R2, averaged over the outputs, and RMSE of standardised predictions (m, k)."""
    largest = scale.scale.max()
    with np.errstate(all="ignore"):
        truth = scale.exactly(Y)  # in units of the deviation, to keep the most digits
        squares, spread = np.mean(np.square(truth - Z), axis=0), truth.var(axis=0)
        r2 = np.mean(np.where(spread > 0, 1 - squares / spread, np.nan))
        rmse = largest * np.sqrt(np.mean(squares * np.square(scale.scale / largest)))
    return {"R2": float(r2), "RMSE": float(rmse)}


def figure(name: str, value: float) -> str:
    """Return a figure as text; an RMSE is on the scale of its target."""
    short = (name == "RMSE" and 0 < value < 0.1) or abs(value) >= 1e5
    return f"{value:.4g}" if short else f"{value:.4f}"


def baseline_models(validation: tuple[Array, Array]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Return name, model and extra `fit` arguments of each model to compare with."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    boosting = HistGradientBoostingClassifier(
        learning_rate=0.15,
        max_iter=80,
        min_samples_leaf=200,
        l2_regularization=10,
        max_features=0.3,
        max_bins=63,
        early_stopping=True,
        random_state=0,
    )
    return [
        ("logistic regression", LogisticRegression(C=0.01, max_iter=300), {}),
        ("hist gradient boosting", boosting, {"X_val": validation[0], "y_val": validation[1]}),
    ]


def print_table(title: str, results: dict[str, dict[str, float]]) -> None:
    """Print figures, one line per model."""
    columns = list(dict.fromkeys(key for figures in results.values() for key in figures))
    say(f"\n{title:<24}" + "".join(f"{column:>11}" for column in columns))
    for name, figures in results.items():
        texts = {
            c: f"{value:.1f}" if c == "seconds" else figure(c, value)
            for c, value in figures.items()
        }
        cells = [f"{texts.get(c, ''):>11}" for c in columns]
        say(f"{name:<24}" + "".join(cells).rstrip())


def draw(
    path: Path,
    title: str,
    history: dict[str, list[float]],
    loss: str,
    score: str,
    call: Mapping[str, Any],
) -> None:
    """Draw a learning curve as a PNG file, atomically, with the call in a text chunk.

    The user's matplotlib backend, windows and fonts play no part.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    backend = os.environ.pop("MPLBACKEND", None)  # matplotlib may refuse it
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('it needs matplotlib: pip install "mlpcore[cli]"') from None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    picture = io.BytesIO()
    with matplotlib.rc_context({"text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the font may lack letters of the title
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2)
        epochs = np.arange(1, len(history["loss"]) + 1)
        best = int(np.argmin(history["validation_loss"]))
        axes[0].plot(epochs, history["loss"], "o-", ms=3, label="training rows")
        axes[0].plot(
            epochs, history["validation_loss"], "o-", ms=3, label="held-out validation rows"
        )
        axes[0].set_ylabel(loss)
        axes[1].plot(
            epochs,
            history[f"validation_{score}"],
            "o-",
            ms=3,
            color="C1",
            label="held-out validation rows",
        )
        axes[1].set_ylabel(score)
        for axis in axes:
            axis.axvline(epochs[best], color="grey", lw=0.8, ls="--", label="weights kept")
            axis.set_xlabel("epoch")
            axis.grid(alpha=0.3)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend()
        figure.suptitle(title, parse_math=False, usetex=False)
        figure.savefig(picture, format="png", dpi=120, metadata={KEY: json.dumps(call)})
    with replacing(path) as file:
        file.write(picture.getvalue())


def count_rows(count: int) -> str:
    """Return "1 row", "2 rows" and so on."""
    return f"{count:,} row" + ("s" if count != 1 else "")


def have(count: int) -> str:
    """Return the verb that fits a count."""
    return "has" if count == 1 else "have"
