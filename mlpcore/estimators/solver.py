"""The parts of a fit that every solver needs (targets, loss, row weights), and L-BFGS."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import scipy.optimize
import threadpoolctl
from sklearn.utils.optimize import _check_optimize_result

from mlpcore.backends import devices
from mlpcore.core import losses as loss_sheet
from mlpcore.core.losses import Loss
from mlpcore.core.optimizers import SGD
from mlpcore.estimators.epochs import Objective, Reporter
from mlpcore.estimators.fitted import Array, FittedNetwork
from mlpcore.mlp import MLP
from mlpcore.trainer import Trainer


class Solver(FittedNetwork):
    """The trainer and the objective of a fit, and scikit-learn's L-BFGS on them."""

    # a subclass overrides these for its targets Y (m, n_outputs_)

    def _trainer_targets(self, Y: Array) -> Array:
        """Return Y in the trainer's form: (m, n_L), or (m,) class indices."""
        return Y

    def _trainer_loss(self, dtype: Any) -> Loss:
        """Return the trainer's loss for a network of this dtype."""
        return loss_sheet.resolve(self.loss)

    def _report_terms(self, Y: Array) -> tuple[float, Array | None]:
        """Return `share` and `offsets` for `Objective`."""
        return 1.0, None

    def _row_weights(self, Y: Array, weights: Array | None, incremental: bool) -> Array | None:
        """Return the weights (m,) of the rows in the loss."""
        return weights

    # -- solving --

    def _make_trainer(self, net: MLP, optimizer: Any) -> Trainer:
        if net.sizes[-1] != self.n_outputs_:  # a warm start keeps the fitted layers
            raise ValueError(
                f"y needs {self.n_outputs_} output(s), but the fitted network has {net.sizes[-1]}"
            )
        dropout = self._dropout_rates()
        return Trainer(
            net,
            self._trainer_loss(net.dtype),
            optimizer,
            dropout=dropout,
            # without dropout, scikit-learn makes all draws
            seed=int(self._random_state.randint(1 << 31)) if dropout else 0,
            precision=self.precision,
            memory_limit=self.memory_limit,
        )

    def _make_objective(self, trainer: Trainer, X: Any, Y: Array, weights: Any) -> Objective:
        targets, (share, offsets) = self._trainer_targets(Y), self._report_terms(Y)
        return Objective(trainer, X, targets, weights, self.alpha, share, offsets)

    def _fit_lbfgs(self, X: Any, Y: Array, sample_weight: Any, *_: Any) -> None:
        """Run SciPy's L-BFGS-B on the trainer's gradient, in float64 as in scikit-learn."""
        if self._dropout_rates():
            raise ValueError(
                "dropout is for solver='sgd' or 'adam': L-BFGS needs the same loss at every call"
            )
        self.coefs_: list[Array] = [w.astype(np.float64, copy=False) for w in self.coefs_]
        net = self._network(self._fit_device(X))
        trainer = self._make_trainer(net, SGD(0.0))
        weights = self._row_weights(Y, sample_weight, incremental=False)
        objective = self._make_objective(trainer, X, Y, weights)

        def value_and_gradient(parameters: Array) -> tuple[float, Array]:
            net.store.write(devices.find(net.device).to_device(parameters))
            J, gradient = objective.gradient()
            return J, gradient.copy()

        with Reporter(trainer, self.callbacks, self.max_iter, self.progress) as reporter:

            def end_iteration(intermediate_result: Any) -> None:
                if reporter.end_epoch({"loss": float(intermediate_result.fun)}):
                    raise StopIteration

            with _limit_scipy_threads():
                result = scipy.optimize.minimize(
                    value_and_gradient,
                    devices.find(net.device).to_host(net.store.flat).copy(),
                    method="L-BFGS-B",
                    jac=True,
                    options={"maxfun": self.max_fun, "maxiter": self.max_iter, "gtol": self.tol},
                    callback=end_iteration,
                )
            net.store.write(devices.find(net.device).to_device(result.x))
        if reporter.stopped:
            result.status = 0  # no warning: the user asked to stop
        self.n_iter_ = _check_optimize_result("lbfgs", result, self.max_iter)
        self.loss_ = np.float64(result.fun)
        self._expose(net)


def _limit_scipy_threads() -> AbstractContextManager[object]:
    """Return a context in which SciPy's own BLAS has one thread.

    Its idle threads would spin against those of NumPy's BLAS and make a fit several times as slow.
    """
    pools = threadpoolctl.ThreadpoolController()
    own = [pool.filepath for pool in pools.lib_controllers if "scipy.libs" in pool.filepath]
    limits: AbstractContextManager[object] = pools.select(filepath=own).limit(limits=1)
    return limits
