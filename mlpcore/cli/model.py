"""The model file that `mlpcore train` writes, and that the other commands read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mlpcore as mc
from mlpcore import data, labels
from mlpcore.cli.messages import say, shown
from mlpcore.cli.sources import is_table, load, refuse_folder
from mlpcore.core import losses

Array = NDArray[Any]


def load_with(path: str) -> tuple[mc.MLP, dict[str, Array], dict[str, Any]]:
    """As `MLP.load_with`; ValueError where its notes are none, or name no loss that there is."""
    net, tensors, about = mc.MLP.load_with(path)
    if not isinstance(about, dict):
        raise ValueError(f"{path!r}: its notes must be names and values; got {about!r}")
    if about.get("loss") is not None:
        losses.resolve(about["loss"], f"{path!r}: loss")
    return net, tensors, about


def _require_fitting(path: str, net: mc.MLP, tensors: dict[str, Array], about: dict[str, Any]) -> None:
    """ValueError where a note or a scale is not of such a network: somebody has made up the file."""

    def texts(values: Any) -> bool:
        return isinstance(values, list) and all(isinstance(value, str) for value in values)

    classes, columns = about["classes"], about.get("columns")
    right = {
        "classes": texts(classes) and len(classes) in (0, net.sizes[-1]),
        "labels": about.get("labels") in (labels.KINDS if classes else ("", *labels.KINDS)),
        "loss": about.get("loss") is not None,
        "features": texts(about.get("features")),
        "target": isinstance(about.get("target", ""), str),
    }
    if "pipeline" in tensors:
        right["columns"] = isinstance(columns, dict) and bool(columns) and all(map(_tells, columns.values()))
        right["scikit-learn"] = isinstance(about.get("scikit-learn"), str)
        right["target"] = isinstance(about.get("target"), str)
    scales = ("mean", "scale", "rest")
    sizes = {} if "pipeline" in tensors else dict.fromkeys(scales, net.sizes[0])
    if not classes:
        sizes |= {f"target {name}": net.sizes[-1] for name in scales}
    right |= {name: name in tensors and tensors[name].shape == (size,) for name, size in sizes.items()}
    for name, fits in right.items():
        if not fits:
            raise ValueError(
                f"{path!r}: its {name!r} is missing or does not fit the network: the file is damaged, made up or of another "
                "version of mlpcore; train again"
            )


def _tells(told: Any) -> bool:
    """Return whether a note says what a column of a table is taken as."""
    if not isinstance(told, dict) or set(told) != {"kind", "labels", "origin"}:
        return False
    origin, kind = told["origin"], told["kind"]
    right = told["labels"] == "" if kind == "number" else kind in ("category", "boolean") and told["labels"] in labels.KINDS
    return right and isinstance(origin, int | float) and abs(origin) < 1e300


@dataclass(frozen=True)
class Model:
    """What `mlpcore train` saved."""

    net: mc.MLP
    tensors: dict[str, Array]
    about: dict[str, Any]
    preparation: Any

    @classmethod
    def load(cls, path: str) -> Model:
        """Read a model; raise a ValueError that names the file if it is not from `mlpcore train`."""
        net, tensors, about = load_with(path)
        if "classes" not in about or not ({"mean", "scale"} <= set(tensors) or "pipeline" in tensors):
            raise ValueError(f"{path!r} holds a network without its standardisation: it is not from 'mlpcore train'")
        _require_fitting(path, net, tensors, about)
        if "pipeline" not in tensors:
            return cls(net, tensors, about, data.Standardizer(tensors["mean"], tensors["scale"], tensors["rest"]))
        from mlpcore import tables

        try:
            transformer, remark = tables.Transformer.restore(tensors, about)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
        if transformer.width != net.sizes[0]:
            raise ValueError(f"{path!r}: the pipeline makes {transformer.width} columns; the network takes {net.sizes[0]}")
        if remark:
            say(f"note: {shown(remark)}")
        return cls(net, tensors, about, transformer)

    @property
    def scale(self) -> data.Standardizer | None:
        """Of the target; None for classes."""
        if self.about["classes"]:
            return None
        return data.Standardizer(*(self.tensors[f"target {name}"] for name in ("mean", "scale", "rest")))

    def rows(self, name: str, target: bool) -> tuple[Array, data.Truth | None]:
        """Return the network's input of every row, and its target if there is one; with `target` there must be one."""
        refuse_folder(name)
        classes, kind, column = self.about["classes"], self.about["labels"], self.about["target"]
        if "pipeline" not in self.tensors:
            dataset = load(name, target=False)
            if dataset.X.shape[1] != self.net.sizes[0]:
                raise ValueError(f"data {name!r} has {dataset.X.shape[1]} columns; the model takes {self.net.sizes[0]}")
            X = self.preparation.apply(dataset.X)
            if dataset.Y is None:
                truth = data.load_truth(name, len(X), classes, kind, self.net.sizes[-1])
            else:  # flights, digits
                truth = data.Truth.of_names(np.array(dataset.class_names, object)[dataset.Y], classes) if classes else None
            if target and truth is None:
                raise ValueError(f"data {name!r} has no target Y that the model could be checked on")
            return X, truth
        if not is_table(name):
            raise ValueError(f"data {name!r}: the model takes a table (.csv, .tsv, .parquet)")
        from mlpcore import tables

        frame, table, remarks = self.preparation.read(name, [column] if classes else [])
        for remark in remarks:
            say(f"note: {shown(remark)}")
        X = self.preparation.apply(frame)
        if column in table.column_names:
            return X, tables.truth(table.column(column), classes, kind)
        if target:
            raise ValueError(f"data {name!r} has no column {column!r}, the target")
        return X, None
