"""Data sets in memory, and their split into training, validation and test rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlpcore.checks.errors import shown
from mlpcore.tables.standardizer import Standardizer


@dataclass(frozen=True)
class Dataset:
    """A table of `m` rows in memory: `X` (m, n) numbers of any dtype, not standardised.

    `Y` is (m,) int64 class indices into `class_names`; or (m, k) targets of any dtype, with
    `class_names` (); or None if the source has no target. `groups` (m,) int64, or None: the rows of
    a group (for flights the day) must not be split. `alike` is True if the columns are of one kind
    (pixels) and share one scale. `unit` is the word for groups in messages, `target` the name of Y.
    `labels` is the kind of the class names (`mlpcore.tables.labels`), and `note` explains how the
    task was inferred if it was not given.
    """

    X: Any
    Y: np.ndarray | None
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None
    alike: bool = False
    unit: str = "groups"
    target: str = ""
    labels: str = "text"
    note: str = ""

    def prepare(self, rows: np.ndarray) -> Preparation:
        """Return the map of X to the network's input, fitted on these rows."""
        return Standardizer.fit(self.X, rows, self.alike, self.feature_names)

    def split(self, seed: int) -> Split:
        """Return the split by `split_rows`, in the form that a network reads.

        Raises:
            ValueError: there are too few rows to hold any out, or only one class.
        """
        assert self.Y is not None
        rows = split_rows(self, seed)
        groups = self.groups
        for name, part in (("validation", rows[1]), ("test", rows[2])):
            if not len(part):
                many = f"{len(self.X)} rows"
                if groups is not None:
                    many = f"{len(np.unique(groups))} {self.unit}"
                raise ValueError(f"{many} are too few to hold out any for the {name}")
        if len(self.class_names) == 1:
            raise ValueError(
                f"every row has the class {shown(self.class_names[0])}; nothing to tell apart"
            )
        preparation = self.prepare(rows[0])
        scale = None
        if not self.class_names:
            names = [self.target or "Y"] * self.Y.shape[1]
            scale = Standardizer.fit(self.Y, rows[0], names=names)
        X, Y = preparation.apply(self.X), scale.apply(self.Y) if scale else self.Y
        training, validation, test = ((X[part], Y[part]) for part in rows)
        description = ""
        if groups is not None:
            units = " + ".join(str(len(np.unique(groups[part]))) for part in rows)
            description = f" of {units} {self.unit}"
        return Split(
            training=training,
            validation=validation,
            test=test,
            answers=self.Y[rows[2]],
            sample=training[1],
            counts=(len(rows[0]), len(rows[1]), len(rows[2])),
            description=description,
            preparation=preparation,
            scale=scale,
            digest=self.digest(preparation, scale, X, Y, *rows),
        )

    def digest(
        self, preparation: Preparation, scale: Standardizer | None, *arrays: np.ndarray
    ) -> str:
        """Return a digest of arrays, of their columns and classes, and of everything fitted."""
        told = [self.feature_names, self.class_names, self.labels, self.target, preparation.about]
        fitted = [*preparation.tensors.values(), *(scale.tensors.values() if scale else ())]
        return digest(told, *fitted, *arrays)


@dataclass(frozen=True)
class Split:
    """The rows for training, validating and testing a network.

    Attributes:
        training: arguments of `Trainer.fit`: X and Y, or a source of rows of both.
        validation, test: X (m, n_0) float32 and Y, standardised if it is a quantity.
        answers: Y of the test rows, in its own units.
        sample: Y of the training rows, or of a sample of them.
        counts: numbers of training, validation and test rows.
        description: the units by which rows are held out, in words; may be "".
        preparation: the map that made X.
        scale: the standardisation of a quantity's Y; None for classes.
        digest: digest of the rows, their names and everything fitted; equal for equal splits.
    """

    training: tuple[Any, ...]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    answers: np.ndarray
    sample: np.ndarray
    counts: tuple[int, int, int]
    description: str
    preparation: Preparation
    scale: Standardizer | None
    digest: str


def digest(told: Any, *arrays: np.ndarray) -> str:
    """Return the SHA-256 of JSON values and of arrays with their types and shapes."""
    whole = hashlib.sha256(json.dumps(told).encode())
    for array in arrays:
        whole.update(f"{array.dtype} {array.shape}".encode())
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()


class Preparation(Protocol):
    """The map of a data set's X to the network's float32 input, which a model file can hold."""

    def apply(self, X: Any) -> np.ndarray:
        """Return the input (m, n_0) of these rows."""

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Tensors to store in a model file."""

    @property
    def about(self) -> dict[str, Any]:
        """Notes to store in a model file."""


def split_rows(
    dataset: Dataset, seed: int, test: float = 0.2, validation: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row indices (train, validation, test): ascending int64, disjoint, together all rows.

    Whole groups if the data set has them (`test` is then a share of the groups); else rows,
    stratified by class if `Y` holds classes. The same seed gives the same split. Raises a
    ValueError if the shares leave nothing to train on.
    """
    if test < 0 or validation < 0 or test + validation >= 1:
        raise ValueError(
            f"test and validation must be >= 0 and sum to < 1; got {test} and {validation}"
        )
    rng = np.random.default_rng(seed)
    if dataset.groups is not None:
        units, unit_of_row = np.unique(dataset.groups, return_inverse=True)
        strata = np.zeros(len(units))
    else:
        unit_of_row = np.arange(len(dataset.X))
        strata = (
            dataset.Y if dataset.class_names and dataset.Y is not None else np.zeros(len(dataset.X))
        )
    order = np.lexsort((rng.random(len(strata)), strata))
    part = np.zeros(len(strata), dtype=np.int64)
    # evenly spaced in the order, so each class gives its share
    for name, share in ((2, test), (1, validation)):
        left = order[part[order] == 0]
        cuts = np.arange(len(left) + 1) * round(share * len(strata)) // max(len(left), 1)
        part[left[np.diff(cuts) > 0]] = name
    train, valid, tested = (np.flatnonzero(part[unit_of_row] == k) for k in range(3))
    if len(train) == 0:
        raise ValueError(
            f"{len(strata)} rows or groups leave nothing to train on (test={test}, {validation=})"
        )
    return train, valid, tested
