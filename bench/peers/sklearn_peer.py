"""scikit-learn's MLPClassifier and MLPRegressor, one `partial_fit` per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier, MLPRegressor

from bench.cases import BETAS, EPSILON, POOL
from bench.peers import Unsupported
from bench.work import Work

ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "sigmoid": "logistic"}


class Sklearn:
    """`partial_fit` on the batch.

    Its Adam has no decoupled decay: less work than AdamW, and a difference below the tolerance.
    """

    def __init__(self, work: Work) -> None:
        self.work, case = work, work.case
        if work.device != "cpu":
            raise Unsupported("scikit-learn's MLP runs on CPUs")
        if case.activation not in ACTIVATIONS:
            raise Unsupported(f"scikit-learn's MLP has no {case.activation}")
        if case.sizes[-1] == 2 and case.loss == "cross_entropy":
            raise Unsupported(
                "scikit-learn's MLP has one output for two classes: a different network"
            )
        self.classifier = case.loss == "cross_entropy"
        self.X, self.Y = work.XY
        if self.Y.ndim == 2 and self.Y.shape[1] == 1:
            self.Y = self.Y[:, 0]
        self.note = "Adam, without decay" if work.optimizer == "AdamW" else ""
        kind = MLPClassifier if self.classifier else MLPRegressor
        self.model: Any = kind(
            hidden_layer_sizes=case.sizes[1:-1], activation=ACTIVATIONS[case.activation], alpha=0.0,
            batch_size=work.batch,
            solver="sgd" if work.optimizer == "SGD" else "adam", learning_rate_init=case.rate,
            momentum=0.0, shuffle=False,
            nesterovs_momentum=False, beta_1=BETAS[0], beta_2=BETAS[1], epsilon=EPSILON,
        )  # fmt: skip
        # creates its arrays and its optimizer, which then get our values
        self._fit(slice(0, work.batch))
        for mine, given in zip(
            self.model.coefs_ + self.model.intercepts_, work.W + work.b, strict=True
        ):
            mine[...] = given
        del self.model._optimizer  # partial_fit makes a new one, with zero state

    def _fit(self, part: slice) -> None:
        if self.classifier:
            self.model.partial_fit(
                self.X[part], self.Y[part], classes=np.arange(self.work.case.sizes[-1])
            )
        else:
            self.model.partial_fit(self.X[part], self.Y[part])

    def losses(self, count: int) -> list[float]:
        m, values = self.work.batch, []
        for i in range(count):
            self._fit(slice(i * m % len(self.X), i * m % len(self.X) + m))
            # scikit-learn averages over outputs
            values.append(self.model.loss_ * (1 if self.classifier else self.work.case.sizes[-1]))
        return values

    def set_rate(self, rate: float) -> None:
        self.model._optimizer.learning_rate_init = self.model._optimizer.learning_rate = rate

    def run(self, count: int) -> None:
        if self.work.case.online:
            for start in range(0, count, POOL):
                self._fit(slice(0, min(POOL, count - start)))
        else:
            for _ in range(count):
                self._fit(slice(0, self.work.batch))

    @property
    def gemms(self) -> Callable[[int], float | None] | None:
        """Run its products in NumPy: Z W, Zᵀ D, D Wᵀ, newly allocated."""
        if self.work.case.online:
            return None
        rng, W = np.random.default_rng(1), self.model.coefs_
        Z = [rng.standard_normal((self.work.batch, n), np.float32) for n in self.work.case.sizes]

        def run(count: int) -> None:
            for _ in range(count):
                for l, w in enumerate(W):
                    Z[l] @ w
                    Z[l].T @ Z[l + 1]
                    if l:
                        Z[l + 1] @ w.T

        return run

    def peak(self) -> None:
        return None


def build(work: Work, way: str) -> Sklearn:
    return Sklearn(work)
