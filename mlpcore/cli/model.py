"""The model file that `mlpcore train` writes and the other commands read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mlpcore as mc
from mlpcore.backends import devices
from mlpcore.checks.errors import cut, shown
from mlpcore.cli.messages import printable, say
from mlpcore.cli.sources import is_table, load, naming, refuse_folder
from mlpcore.core import losses
from mlpcore.tables import labels
from mlpcore.tables.datasets import Truth, load_truth
from mlpcore.tables.standardizer import Standardizer, is_unicode, require, require_format

Array = NDArray[Any]


def load_with(path: str) -> tuple[mc.MLP, dict[str, Array], dict[str, Any]]:
    """Return the network, tensors and notes of a model file, as `MLP.load_with`, and check them.

    Raises:
        ValueError: the parameters are not finite, the notes are malformed, or the loss is unknown.
    """
    net, tensors, about = mc.MLP.load_with(path)
    if not np.isfinite(devices.find(net.device).to_host(net.store.flat)).all():
        advice = "The file is damaged or was altered; train again"
        raise ValueError(f"{path!r}: its parameters are not all finite. {advice}")
    if not isinstance(about, dict):
        raise ValueError(f"{path!r}: its notes must be names and values; got {shown(about)}")
    if not is_unicode(json.dumps(about, ensure_ascii=False)):
        raise ValueError(f"{path!r}: its notes hold text that UTF-8 cannot")
    if about.get("loss") is not None:
        try:
            losses.resolve(about["loss"], f"{path!r}: loss")
        except (TypeError, ValueError) as error:
            raise ValueError(cut(error, 500)) from None
    return net, tensors, about


def _require_fitting(
    path: str, net: mc.MLP, tensors: dict[str, Array], about: dict[str, Any]
) -> Any:
    """Return the map to the network's input; ValueError if a note or a tensor does not fit."""

    def texts(values: Any) -> bool:
        return isinstance(values, list) and all(map(is_unicode, values))

    classes: Any = about["classes"]
    features: Any = about.get("features")
    kinds = labels.KINDS
    try:
        require_format(about)
        fits = texts(classes) and len(set(classes)) == len(classes) in (0, net.sizes[-1])
        require(fits, "classes", f"{net.sizes[-1]:,} different names, or none")
        require(
            about.get("labels") in (kinds if classes else ("", *kinds)),
            "labels",
            f"one of {', '.join(kinds)}",
        )
        require(about.get("loss") is not None, "loss", "the name of a loss")
        require(
            texts(features) and len(features) == net.sizes[0], "features", f"{net.sizes[0]:,} names"
        )
        require(is_unicode(about.get("target")), "target", "the name of a column")
        if not classes:
            Standardizer.restore(tensors, net.sizes[-1], "target ")
        if "pipeline" not in tensors:
            return Standardizer.restore(tensors, net.sizes[0])
        from mlpcore.tables.table import Transformer

        return Transformer.restore(tensors, about, net.sizes[0])
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


@dataclass(frozen=True)
class Model:
    """A model that `mlpcore train` saved, with the preparation of its input."""

    net: mc.MLP
    tensors: dict[str, Array]
    about: dict[str, Any]
    preparation: Any

    @classmethod
    def load(cls, path: str) -> Model:
        """Read a model; raise a ValueError if the file is not from `mlpcore train`."""
        net, tensors, about = load_with(path)
        if "classes" not in about or not (
            {"mean", "scale"} <= set(tensors) or "pipeline" in tensors
        ):
            source = "was not saved by 'mlpcore train'"
            if "call" in about:  # a checkpoint
                source = (
                    "is a checkpoint of 'mlpcore train', which saves its model at the end of the "
                    "training"
                )
            raise ValueError(f"{path!r} holds a network without its standardisation: it {source}")
        return cls(net, tensors, about, _require_fitting(path, net, tensors, about))

    @property
    def scale(self) -> Standardizer | None:
        """Standardisation of the target; None for classes."""
        if self.about["classes"]:
            return None
        return Standardizer(*(self.tensors[f"target {name}"] for name in ("mean", "scale", "rest")))

    def rows(self, name: str, target: bool) -> tuple[Array, Truth | None]:
        """Return the network's input for every row and, if there is one, the target.

        Raises:
            ValueError: the data do not fit the model, or lack a target although `target` is True.
        """
        refuse_folder(name)
        classes, kind, column = self.about["classes"], self.about["labels"], self.about["target"]
        if "pipeline" not in self.tensors:
            dataset = load(name, target=False)
            if dataset.X.shape[1] != self.net.sizes[0]:
                raise ValueError(
                    f"data {name!r} has {dataset.X.shape[1]} columns; the model takes "
                    f"{self.net.sizes[0]}"
                )
            with naming(name):
                X = self.preparation.apply(dataset.X)
            if dataset.Y is None:
                truth = load_truth(name, len(X), classes, kind, self.net.sizes[-1])
            else:  # flights, digits
                truth = (
                    Truth.of_names(np.array(dataset.class_names, object)[dataset.Y], classes)
                    if classes
                    else None
                )
            if target and truth is None:
                raise ValueError(f"data {name!r} has no target Y to check the model on")
            return X, truth
        if not is_table(name):
            raise ValueError(f"data {name!r}: the model takes a table (.csv, .tsv, .parquet)")
        from mlpcore.tables.targets import find_truth

        frame, table, remarks = self.preparation.read(name, [column] if classes else [])
        for remark in remarks:
            say(f"note: {printable(remark)}")
        with naming(name):
            X = self.preparation.apply(frame)
        if column in table.column_names:
            return X, find_truth(table.column(column), classes, kind)
        if target:
            raise ValueError(f"data {name!r} has no column {shown(column)}, the target")
        return X, None
