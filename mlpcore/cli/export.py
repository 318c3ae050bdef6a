"""Conversion of a model file of `mlpcore train` to ONNX, with the standardisation included."""

from __future__ import annotations

import os

from mlpcore.mlp import MLP

STORED = {
    "mean": "mean",
    "scale": "scale",
    "target_mean": "target mean",
    "target_scale": "target scale",
}


def export(model_path: str | os.PathLike[str], onnx_path: str | os.PathLike[str]) -> MLP:
    """Write a model file's network as ONNX, with the standardisation of columns and target.

    Returns:
        The network.

    Raises:
        ImportError, OSError, ValueError: as `MLP.load` and `MLP.to_onnx`.
    """
    net, tensors, about = MLP.load_with(model_path, device="cpu")
    net.to_onnx(onnx_path, about=about, **{key: tensors.get(name) for key, name in STORED.items()})
    return net
