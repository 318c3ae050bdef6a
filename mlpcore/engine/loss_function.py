"""A loss as a function of an output: `J, G = mc.loss("cross_entropy")(Z, Y)`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import arrays
from mlpcore.core import losses as loss_sheet
from mlpcore.core.architecture import DTYPES
from mlpcore.core.device import Device
from mlpcore.core.targets import mixed, weighed

Array = NDArray[Any]


class LossFunction:
    """A loss on an output, without a network: `J, G = mc.loss("cross_entropy")(Z, Y)`.

    Attributes:
        loss: the `mc.Loss`.
    """

    def __init__(self, loss: loss_sheet.Loss):
        self.loss = loss

    def __repr__(self) -> str:
        return f"loss({self.loss})"

    def __call__(
        self, Z: ArrayLike, Y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> tuple[float, Array]:
        """Return J = Σ w ℓ / Σ w and G = ∂J/∂Z, in Z's dtype and shape: (m, n_L), or (m,).

        Args:
            Z: the output, (m, n_L), or (m,) for one output.
            Y, sample_weight: as in `Trainer.step`.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what was passed.
        """
        device = devices.find(devices.of(Z, "Z"))
        adopt, xp = device.adopt, device.xp
        with device.active(), np.errstate(all="ignore"):
            given = arrays.numeric(Z, "Z", adopt)
            raw = arrays.matrix(given[:, None] if given.ndim == 1 else given, None, "Z", adopt)
            dtype = raw.dtype if raw.dtype.name in DTYPES else np.float64
            output = xp.ascontiguousarray(raw, dtype)
            rows, columns = output.shape
            target, classes = arrays.target(Y, rows, columns, self.loss, adopt=adopt)
            target = device.to_device(target)
            w = arrays.weights(sample_weight, rows, adopt=adopt)
            k = self._shares(device, target, w).astype(output.dtype)[:, None]
            if self.loss.rowwise:
                _require_probabilities(output, target, classes)
                target = mixed(self.loss, target, columns, output.dtype, xp)
            J, G = self._evaluate(device, output, xp.ascontiguousarray(target, dtype), k)
            return J, arrays.in_library_of(Z, G.reshape(given.shape))

    def _shares(self, device: Device, target: Array, w: Array | None) -> Array:
        """Return each row's weight times its class weight, over the sum of all."""
        xp = device.xp
        if self.loss.class_weight is not None:
            own = None if w is None else device.to_device(w)
            w = weighed(self.loss, target, own, np.float64, xp)
        if w is None:
            equal: Array = xp.full(len(target), 1 / len(target))
            return equal
        total = w.sum(dtype=np.float64)
        if arrays.on_host(w) and not np.isfinite(total):
            beyond = "out of the range of float64: rescale the weights"
            raise ValueError(f"sample_weight sums to {total:g}, {beyond}")
        share: Array = device.to_device(w / total)
        return share

    def _evaluate(self, device: Device, x: Array, Y: Array, k: Array) -> tuple[float, Array]:
        xp, loss, dtype = device.xp, self.loss, x.dtype
        if loss.rowwise:  # logarithms of float32 probabilities are summed in float64
            loss = loss_sheet.of_probabilities(dtype.name)
            x, Y, k = (array.astype(np.float64, copy=False) for array in (x, Y, k))
        G, J = xp.empty_like(x), xp.zeros((), np.float64 if xp is np else x.dtype)
        objective = loss_sheet.pair(loss, None)
        device.operations()().loss(x, Y, k, objective, G, None, J, accumulate=False)
        return float(J), G.astype(dtype, copy=False)


def _require_probabilities(Z: Array, Y: Array, classes: bool) -> None:
    """Raise a ValueError if an output has a negative entry, or Y has a class without a column."""
    if arrays.on_host(Z) and (Z < 0).any():
        least = f"got {Z.min():g} (for log_softmax pass np.exp of the output)"
        raise ValueError(f"Z must hold probabilities for cross_entropy, at least 0; {least}")
    if classes:
        arrays.require_classes(Y, Z.shape[1])


def loss(
    spec: Any,
    *,
    class_weight: Any = None,
    label_smoothing: float | None = None,
    pos_weight: Any = None,
) -> LossFunction:
    """Return the loss of this name, `(name, parameter)` or `mc.Loss`, as a function.

    Call it as `(Z, Y, sample_weight=None)`; it returns J, G. Its attribute `loss` is an
    `mc.Loss` that `mc.Trainer`, `mc.check_gradients` and `net.hvp` take.

    Args:
        spec: the loss.
        class_weight, label_smoothing, pos_weight: as in `mc.Trainer`; class weights as a list.

    Raises:
        TypeError, ValueError: there is no such loss (names the nearest match), or it does not take
            a parameter or an option.
    """
    return LossFunction(
        loss_sheet.with_options(loss_sheet.resolve(spec), class_weight, label_smoothing, pos_weight)
    )
