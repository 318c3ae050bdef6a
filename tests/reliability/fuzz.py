"""Random calls of the public door with wrong types, shapes and values: what may come out of them.

A call is a good one in which some arguments are replaced by objects of a pool. It may work; else it
must be refused by an error that a user can act on: a documented type, a message that names an
argument, and a network and trainer as they were before.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import inspect
import io
import itertools
import logging
import os
import re
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

import mlpcore as mc
from mlpcore import cli
from mlpcore.checks.errors import shown as _shown

SECONDS = 20  # that one call may take
LONGEST = 500  # characters of a message that repeats no path
ALLOWED = (ValueError, TypeError, MemoryError, OSError, mc.NonFiniteLoss, mc.DeviceUnavailable)
ALIASES = {"loss": ["loss"]}  # what messages call the argument `spec`
COUNTED = {"epochs", "directions"}  # a large number here is a long job, not a fault

rng_ = np.random.default_rng(0)
X, Y = rng_.standard_normal((7, 4)), rng_.standard_normal((7, 2))
LABELS = np.array([0, 1, 2, 0, 1, 2, 0])


class Hang(BaseException):
    """A call took too long."""


class Odd:
    """Says that it is an array of the right shape, and is none."""

    shape, dtype, ndim = (7, 4), np.dtype(np.float32), 2

    def __len__(self):
        return 7

    def __getitem__(self, rows):
        if isinstance(rows, int) and rows >= 7:
            raise IndexError(rows)
        return "no"


class Whole(enum.IntEnum):
    three = 3


class Worded(str):
    __slots__ = ()

    def __repr__(self):
        raise RuntimeError("this one cannot be shown")


class NoNumber:
    def __float__(self):
        raise ValueError("this one has no value")


def _nested(depth):
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _itself():
    value: list[Any] = []
    value.append(value)
    return value


def pool(folder: Path) -> list[Callable[[], Any]]:
    """Makers of what no caller should pass; some of it is right in some place."""
    structured = np.zeros(7, [("a", "f4"), ("b", "i4")])
    plain = [
        None, True, False, 0, 1, -1, 2, 3, 7, 1 << 40, 1 << 63, 1 << 64, -(1 << 63) - 1, 10**400,
        0.0, -0.0, 0.5, 1.0, 1.5,
        -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), 1j, "", " ", "relu",
        "softmax", "cross_entropy", "5%",
        "nan", "-1", "1e999 GiB", "é\u202e", "a\0b", "x" * 3000, "s + ", "__import__('os')",
        "1 step", "auto", "cuda:99",
        b"x", b"", [], (), {}, set(), [None], [[]], [1], [0, 0], [1.5, 2], ["a"], [[1, 2], [3]],
        [4, 5, 2], {4: 1}, {1: "1.T"},
        {"a": 1}, object(), object, int, len, Ellipsis, NotImplemented, slice(3), range(4),
        Path("no/such/file"), folder,
        np.float32(2), np.float64("nan"), np.int64(3), np.uint64(2**64 - 1), np.bool_(True),
        np.str_("tanh"), Fraction(1, 3),
        Decimal("0.1"), Decimal("nan"), np.datetime64("2020-01-01"), np.dtype("f4"), np.float32,
        NoNumber(), Odd(),
        _nested(40), _itself(), deque([1, 2]), memoryview(b"abcdefg"), bytearray(4), {1, 2},
        frozenset(), Exception("x"),
        np.array(3.0), np.zeros(0), np.zeros((0, 4)), np.zeros((7, 0)), np.zeros(7),
        np.ones((7, 1)), np.ones((7, 4)),
        np.ones((7, 2)), np.ones((7, 3)), np.ones((3, 4)), np.ones((7, 4, 1)),
        np.full((7, 4), np.nan), np.full((7, 2), np.inf),
        np.full((7, 4), 1e300), np.full((7, 4), 1e38, np.float32), np.full((7, 2), -1e308),
        np.full(7, -1.0), np.full(7, 1e308),
        np.full(7, 1e-320), np.full(7, np.nan), np.full((7, 4), np.uint64(2**64 - 1)), np.arange(7),
        -np.arange(7),
        np.arange(7) + 2**40, np.ones(7, bool), np.ones((7, 4), bool), np.ones((7, 4), complex),
        np.ones((7, 4), object),
        np.array([None] * 7), np.array(["a"] * 7), np.zeros(7, "datetime64[s]"),
        np.zeros((7, 4), "timedelta64[s]"), structured,
        structured.view(np.recarray), np.ones((7, 4), np.float16), np.ones((7, 4), np.longdouble),
        np.ones((7, 4), ">f8"),
        np.full((7, 4), np.longdouble("1e4000")), np.broadcast_to(np.float32(1), (7, 4)),
        np.broadcast_to(np.float32(1), (1 << 40, 4)), np.asfortranarray(np.ones((7, 4))),
        np.ones((14, 8))[::2, ::2],
        np.ones((7, 4))[::-1, ::-1], np.ma.masked_array(np.ones((7, 4)), np.eye(7, 4)),
        np.ma.masked_array(np.ones((7, 4))),
        np.ones((7, 4)).view(np.matrix) if hasattr(np, "matrix") else None,
        mc.Adam, mc.SGD(0.1), mc.Cosine(0.1), mc.Constant(0.1), mc.EarlyStopping(1, "loss"),
        mc.Loss("l", "z - y", "1"),
        mc.Activation("softmax", "s", "1"), mc.loss("squared_error"), mc.Callback, mc.Callback(),
        lambda *_: None, lambda: 3,
        lambda epoch: [(X, Y)], lambda needed: None, (X, Y), (X, Y, None), (X, Y, np.ones(7), 3),
        (X,), [(X, Y)], [(X,)],
        [X, Y], [(X, Y), (Y, X)], [(X, None)], ("sigmoid", 0.5), ("sigmoid", "x"), ("huber", None),
        ("a", "b", "c"),
        10**5000, [10**5000], {1: 10**5000}, ("sigmoid", 10**400), (10**400, 1), [4, 1 << 63],
        [1 << 40, 1 << 40, 3], [1] * 300_000, ["relu"] * 300_000, "x" * 300_000,
        {n: n for n in range(30_000)}, {1.5: 1, "b": 2}, {10**5000: "1.T"}, {2: "1" * 5000 + ".T"},
        {None: None}, {0: np.nan}, "(" * 900 + "s" + ")" * 900, "-" * 900 + "z", "s" + " + s" * 900,
        "tanh(" * 90 + "s" + ")" * 90, "9" * 400 + " * z", "\ud800", b"\xff" * 10_000,
        Worded("relu"), Worded("x" * 10_000), Whole.three, np.float32(0.3), np.float16(1e-7),
        np.longdouble("1e4000"), np.timedelta64(5, "ns"), np.array(0.3, np.float32), np.array(3),
        np.array("min"), np.array(1j), np.ma.masked, Decimal("1e-400"), Decimal("1e400"),
        Decimal("sNaN"), Fraction(1, 10**400), 1e39, 1e-46, 2**127, 2**128, "9" * 400 + " GiB",
        "∞%", "1e400 GiB", "9" * 400 + " steps", np.complex64, np.float16, "f2", ">f4", "object",
        [("a", "f4")], {"names": ["a"], "formats": ["f4"]}, [[0.1, 0.2]], [0.1, np.float32(0.3)],
        {1: mc.Layer(frozen=True)}, {10**400: mc.Layer()}, {1: mc.Layer}, (("z", "1"), "z"),
        ("z - y", "1"), ("z" * 5000, "1"), mc.Loss("cross_entropy", "", ""),
    ]  # fmt: skip
    made: list[Callable[[], Any]] = [
        lambda: iter([(X, Y)]), lambda: (n for n in range(3)), lambda: mc.MLP([4, 2]),
        lambda: mc.MLP([2, 4], dtype="float64"),
        lambda: itertools.count(1), lambda: itertools.repeat("relu"), lambda: map(int, "432"),
        lambda: {4, 3}, lambda: {4: 3}.keys(),
        lambda: mc.MLP([4, 2]).forward(X), lambda: mc.MLP([4, 3, 2]).forward(X[:3]),
        lambda: _frame(), lambda: _mapped(folder),
        lambda: mc.Trainer(mc.MLP([4, 2]), "squared_error"),
        lambda: mc.Trainer(mc.MLP([4, 2]), "squared_error").prepare(X, Y),
        lambda: mc.Trainer(mc.MLP([5, 3]), "squared_error").prepare(np.ones((4, 5)),
            np.ones((4, 3))),
    ]  # fmt: skip
    return [lambda value=value: value for value in plain] + made


def _frame() -> Any:
    import pandas as pd

    return pd.DataFrame({"a": ["x"] * 7, "b": range(7)})


def _mapped(folder: Path) -> Any:
    return np.memmap(folder / "mapped", np.float32, "w+", shape=(7, 4))


@dataclass
class Subject:
    """The objects of random calls, and the state that a refused call must not change."""

    net: mc.MLP
    trainer: mc.Trainer

    @classmethod
    def make(cls) -> Subject:
        net = mc.MLP([4, 3, 2], "tanh", device="cpu", seed=1)
        trainer = mc.Trainer(net, "squared_error", mc.AdamW(1e-3), seed=1)
        trainer.step(X, Y)
        return cls(net, trainer)

    def state(self) -> str:
        """A digest of all that the next step depends on."""
        vectors, _ = self.trainer._step.snapshot()
        arrays = [self.net.parameters, *(vectors[name] for name in sorted(vectors))]
        text = repr(
            [
                self.trainer.progress,
                self.trainer.optimizer,
                self.trainer._step.problem.settings,
                self.trainer.history,
            ]
        )
        return hashlib.sha256(
            b"".join([array.tobytes() for array in arrays] + [text.encode()])
        ).hexdigest()


def doors(subject: Subject, folder: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Return the methods that can be called, with arguments that work."""
    net, trainer = subject.net, subject.trainer
    cache, v = net.forward(X), np.ones(net.layout.size)
    batch = {"X": X, "Y": Y, "sample_weight": np.ones(7)}
    path = folder / "saved"
    trainer.save(path)
    classify = mc.loss("cross_entropy")

    def set_on(thing: Any) -> Callable[..., None]:
        def set_(**values: Any) -> None:
            for name, value in values.items():
                setattr(thing, name, value)

        return set_

    found = {
        "MLP": (mc.MLP,
            {"sizes": [4, 3, 3, 3], "activations": "tanh", "output": "identity", "bias": True,
                "tied": {3: 2},
                         "dtype": "float32", "init": "auto", "device": "cpu", "seed": 0}),
        "Trainer": (mc.Trainer,
            {"net": net, "loss": "squared_error", "optimizer": mc.SGD(0.1), "l1": 0.1, "l2": 0.1,
                                 "clip_norm": 1.0, "precision": None, "memory_limit": "1 MiB",
                                 "chunk_rows": 3,
                                 "deterministic": True, "workers": 2, "on_non_finite": "raise",
                                 "seed": 0, "dropout": 0.5}),
        "classifier": (mc.Trainer,
            {"net": mc.MLP([4, 3], output="softmax", device="cpu"), "loss": "cross_entropy",
                                    "class_weight": [1, 2, 3], "label_smoothing": 0.1,
                                    "pos_weight": None, "dropout": None}),
        "outputs": (mc.Trainer,
            {"net": mc.MLP([4, 3], output="sigmoid", device="cpu"), "pos_weight": [1, 2, 3]}),
        "step": (trainer.step, {**batch, "rows": [0, 1]}),
        "gradient": (trainer.gradient, {**batch, "rows": [0, 1]}),
        "apply": (trainer.apply, {"gradient": np.zeros(trainer.net.layout.size)}),
        "prepare": (trainer.prepare, batch),
        "evaluate": (trainer.evaluate, batch),
        "fit": (trainer.fit,
            {**batch, "epochs": 1, "batch_size": 3, "validation": (X, Y), "progress": False,
                              "early_stopping": mc.EarlyStopping(1), "callbacks": [],
                              "shuffle": True, "metrics": {},
                              "checkpoint": folder / "run", "every": "1 epoch", "keep": 1}),
        "plan": (trainer.plan, {"batch_size": 8, "rows": 10, "early_stopping": False}),
        "save": (trainer.save, {"path": folder / "trainer", "keep": 2}),
        "load": (mc.Trainer.load, {"path": path, "device": "cpu"}),
        "penalties": (set_on(trainer), {"l1": 0.0, "l2": 0.0}),
        "predicts_1d": (set_on(net), {"predicts_1d": False}),
        "metrics": (trainer.evaluate, {"X": X, "Y": Y, "metrics": {"own": lambda Y, Z: 0.5}}),
        "optimizer": (set_on(trainer.optimizer),
            {"learning_rate": 0.1, "weight_decay": 0.1, "beta1": 0.5, "epsilon": 1e-8}),
        "forward": (net.forward, {"X": X}),
        "backward": (net.backward, {"cache": cache, "G": Y, "input_gradient": True, "keep": False}),
        "predict": (net.predict, {"X": X, "chunk_rows": 3}),
        "jvp": (net.jvp,
            {"X": X, "dX": X, "dparameters": v, "chunk_rows": 3, "memory_limit": "1 MiB"}),
        "vjp": (net.vjp,
            {"X": X, "V": Y, "dX": X, "dV": Y, "chunk_rows": 3, "memory_limit": "1 MiB"}),
        "hvp": (net.hvp,
            {**batch, "v": v, "loss": "squared_error", "chunk_rows": 3, "memory_limit": "1 MiB"}),
        "gnvp": (net.gnvp,
            {**batch, "v": v, "loss": "squared_error", "chunk_rows": 3, "memory_limit": "1 MiB"}),
        "copy": (net.copy, {"dtype": "float64"}),
        "to": (net.to, {"device": "cpu"}),
        "net.save": (net.save, {"path": folder / "net", "tensors": {"mean": X}, "about": {"x": 1}}),
        "MLP.load": (mc.MLP.load_with, {"path": path, "device": "cpu"}),
        "loss": (mc.loss,
            {"spec": "binary_cross_entropy", "class_weight": [1, 2], "label_smoothing": 0.1,
                "pos_weight": 2.0}),
        "logits": (net.logits, {"X": X, "chunk_rows": 3}),
        "losses": (trainer.losses, {"X": X, "Y": Y}),
        "loss()": (mc.loss("squared_error"), {"Z": Y, "Y": Y, "sample_weight": np.ones(7)}),
        "classes()": (classify,
            {"Z": np.full((7, 3), 1 / 3), "Y": LABELS, "sample_weight": np.ones(7)}),
        "check_gradients": (mc.check_gradients,
            {"net": net, **batch, "loss": "squared_error", "directions": 1,
                                                 "tolerance": 1e-4, "gradient": None,
                                                 "entries": False, "seed": 0}),
        "Parquet": (mc.Parquet,
            {"path": folder / "table.parquet", "target": "y", "features": ["a"], "weight": "w"}),
        "EarlyStopping": (mc.EarlyStopping,
            {"patience": 1, "monitor": "loss", "minimum_change": 0.0,
                                             "restore_best": True, "mode": "min"}),
        "Activation": (mc.Activation,
            {"name": "bent", "value": "s * a", "slope": "a", "parameter": 1.0, "init": "he",
                                       "default": 1.0, "learned": "per layer"}),
        "Loss": (mc.Loss,
            {"name": "own", "value": "(z - y) * q", "slope": "q", "parameter": 1.0,
                "outputs": "any",
                           "matched": ("s - y", "1"), "most": 1.0, "class_weight": None,
                           "label_smoothing": 0.0}),
        "Loss, weighed": (mc.Loss, {"name": "cross_entropy", "value": "", "slope": "",
                                    "class_weight": [1, 2], "label_smoothing": 0.1}),
        "SGD": (mc.SGD,
            {"learning_rate": 0.1, "momentum": 0.5, "nesterov": True, "velocity": "steps"}),
        "AdamW": (mc.AdamW, {"learning_rate": 0.1, "weight_decay": 0.5, "layers": {1: mc.Layer()}}),
        "Constant": (mc.Constant, {"rate": 0.1}),
        "Adam": (mc.Adam, {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.5, "epsilon": 1e-8}),
        "RMSprop": (mc.RMSprop, {"learning_rate": 0.1, "alpha": 0.5, "epsilon": 1e-8}),
        "Layer": (mc.Layer, {"rate": 0.1, "weight_decay": 0.1, "frozen": False}),
        "layers": (set_on(trainer.optimizer), {"layers": {1: mc.Layer(rate=0.5)}}),
        "Lion": (mc.Lion, {"learning_rate": 0.1, "weight_decay": 0.1, "beta1": 0.5, "beta2": 0.5}),
        "StepDecay": (mc.StepDecay, {"rate": 0.1, "every": 3, "factor": 0.5}),
        "Cosine": (mc.Cosine, {"rate": 0.1, "steps": 3, "warmup": 1, "final": 0.0}),
        "InverseScaling": (mc.InverseScaling, {"rate": 0.1, "power": 0.5}),
        "Adaptive": (mc.Adaptive,
            {"rate": 0.1, "factor": 0.5, "patience": 1, "tolerance": 0.1, "minimum": 0.0,
                                   "monitor": "loss", "mode": "min"}),
        "FormulaSchedule": (mc.FormulaSchedule, {"rate": 0.1, "formula": "rate / step"}),
    }  # fmt: skip
    return found


COMMANDS: dict[str, dict[str, str]] = {
    "train": {"": "DATA", "--hidden": "4", "--activation": "tanh", "--epochs": "1", "--batch": "4",
        "--learning-rate": "0.1",
              "--weight-decay": "0.1", "--patience": "1", "--seed": "1", "--splits": "1",
              "--out": "OUT", "--device": "cpu",
              "--memory-limit": "9 MiB", "--every": "1 epoch", "--checkpoint": "RUN",
              "--target": "", "--task": "",
              "--groups": "", "--as": ""},
    "predict": {"": "MODEL", " ": "DATA", "--out": "FILE"},
    "export": {"": "MODEL", " ": "FILE"},
    "check": {"": "MODEL", " ": "DATA", "--rows": "3"},
    "plan": {"": "4,3,2", "--batch": "8", "--activation": "tanh", "--output": "softmax",
        "--loss": "cross_entropy",
             "--optimizer": "adam", "--dtype": "float32", "--chunk-rows": "3", "--workers": "2",
             "--memory-limit": "1 MiB"},
}  # fmt: skip
WORDS = [
    "", " ", "-1", "0", "1", "3", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 30, "é",
    "x" * 300, "none", "4,,3",
    "4,0", "4,-3", "relu", "softmax", "squared_error", "sgd", "float64", "cuda:9", "no/such",
    "FOLDER", "TEXT", "ZIP", "DATA",
    "MODEL", "TABLE", "PARQUET", "RUN", "y", "a", "s", "y=out", "a=category", "s=number", "=",
    "regression", "5%", "1 B",
    "9" * 30 + " GiB", "a\0b", "--", "--help", "--nonsense", "9223372036854775808", "9" * 5000, "-",
    "/dev/null", "/dev/full",
    "\udcff", "\x1b[31m",
]  # fmt: skip


class Fuzz:
    """Random calls and the faults that they found.

    Args:
        folder: where files go.
        seed: of the calls.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.faults: dict[str, str] = {}
        self.refused = self.worked = 0
        self.subject = Subject.make()
        self._files()
        self.pool, self.doors = pool(folder), doors(self.subject, folder)
        self.before = self.subject.state()

    def _files(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(
            pa.table({"a": np.ones(9), "y": np.ones(9), "w": np.ones(9), "s": ["x"] * 9}),
            self.folder / "table.parquet",
        )
        places = {
            name: self.folder / name
            for name in ("FOLDER", "TEXT", "ZIP", "DATA", "OUT", "MODEL", "FILE", "RUN")
        }
        places |= {"TABLE": self.folder / "table.csv", "PARQUET": self.folder / "table.parquet"}
        places["TABLE"].write_text(
            "a,y,s\n" + "".join(f"{n % 7},{n},{'uvw'[n % 3]}\n" for n in range(40))
        )
        places["DATA"], places["ZIP"] = (
            places["DATA"].with_suffix(".npz"),
            places["ZIP"].with_suffix(".npz"),
        )
        places["FOLDER"].mkdir()
        places["TEXT"].write_text("no model, no data")
        np.savez(places["ZIP"], Z=np.ones(3), X=np.array([None]))
        rng = np.random.default_rng(0)
        np.savez(places["DATA"], X=rng.standard_normal((40, 4)), Y=rng.standard_normal(40))
        tensors = {
            "mean": np.zeros(4),
            "scale": np.ones(4),
            "target mean": np.zeros(1),
            "target scale": np.ones(1),
        }
        about = {"classes": [], "features": list("abcd"), "loss": "squared_error"}
        mc.MLP([4, 3, 1], device="cpu").save(places["MODEL"], tensors=tensors, about=about)
        self.places = {name: str(path) for name, path in places.items()}

    def run(self, calls: int) -> None:
        """Make so many calls, one in twenty of the command line."""
        for _ in range(calls):
            if self.rng.random() < 0.05:
                self._command()
            else:
                self._call()

    def _call(self) -> None:
        rng = self.rng
        name = list(self.doors)[rng.integers(len(self.doors))]
        function, good = self.doors[name]
        changed = rng.choice(
            list(good), min(len(good), int(rng.choice([1, 1, 1, 2, 3]))), replace=False
        ).tolist()
        values = dict(good)
        for argument in changed:
            value = self.pool[rng.integers(len(self.pool))]()
            if argument in COUNTED and isinstance(value, int | np.integer) and value > 3:
                value = 3
            values[argument] = value
        shown = f"{name}({', '.join(f'{k}={_short(values[k])}' for k in changed)})"
        with _limited():
            try:
                function(**values)
                self.worked += 1
            except BaseException as error:
                self.refused += 1
                given = [
                    form
                    for value in values.values()
                    if isinstance(value, str | os.PathLike)
                    for form in (str(value), repr(str(value))[1:-1])
                    if form
                ]
                self._judge(
                    shown, error, [*good, *_parameters(function), *ALIASES.get(name, ())], given
                )
                if (
                    name not in ("fit", "penalties", "optimizer")
                    and self.subject.state() != self.before
                ):
                    self._fault(shown, "changed the trainer although it was refused", error)
        if self.subject.state() != self.before:  # a call that worked
            self.subject = Subject.make()
            self.doors = doors(self.subject, self.folder)
            self.before = self.subject.state()

    def _judge(self, shown: str, error: BaseException, names: list[str], given: list[str]) -> None:
        message = str(error)
        if not isinstance(error, ALLOWED) or isinstance(error, Warning):
            self._fault(shown, "an error of another kind", error)
            return
        if len(message) > LONGEST and not isinstance(error, OSError):
            self._fault(shown, f"a message of {len(message):,} characters", error)
        said = isinstance(error, MemoryError | mc.NonFiniteLoss | mc.DeviceUnavailable) or any(
            text in message for text in given
        )
        if not said and not any(
            re.search(rf"(?<![A-Za-z_]){re.escape(word)}(?![A-Za-z_])", message) for word in names
        ):
            self._fault(shown, "no argument is named", error)

    def _command(self) -> None:
        rng = self.rng
        command = list(COMMANDS)[rng.integers(len(COMMANDS))]
        options = dict(COMMANDS[command])
        if command == "train":
            options[""] = ["DATA", "TABLE", "PARQUET"][rng.integers(3)]
        for option in rng.choice(list(options), int(rng.choice([1, 1, 2])), replace=False).tolist():
            options[option] = WORDS[rng.integers(len(WORDS))]
        if len(options.get("--epochs", "")) > 3 or len(options.get("--splits", "")) > 3:
            return
        arguments = [command]
        if command == "train":
            arguments += [
                "--quiet",
                *rng.choice(["--stream", "--resume"], int(rng.integers(3)), replace=False).tolist(),
            ]
        # else most outputs are those of another call
        if command in ("train", "predict", "export") and rng.integers(4):
            arguments.append("--force")
        if options.get("") in ("TABLE", "PARQUET") and command == "train":
            options = {**options, "--target": options["--target"] or "y"}
        for option, value in options.items():
            if option in ("--target", "--task", "--groups", "--as") and not value:
                continue
            value = self.places.get(value, value)
            arguments += [value] if not option.strip() else [f"{option}={value}"]
        said = io.StringIO()
        with (
            _limited(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
        ):
            try:
                status = cli.main(arguments)
            except SystemExit as error:
                status = error.code
            except BaseException as error:
                self._fault(" ".join(arguments), "an error comes out of the command", error)
                return
        if status not in (0, 2) or (status == 2 and "mlpcore" not in said.getvalue()):
            self._fault(" ".join(arguments), f"status {status}: {said.getvalue()}", None)

    def _fault(self, shown: str, what: str, error: BaseException | None) -> None:
        where = "" if error is None else "".join(traceback.format_exception(error)[-4:])
        key = f"{what}: {type(error).__name__} {_where(error)}"
        self.faults.setdefault(key, f"{shown}\n{where}")


def _where(error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error else []
    inside = [
        frame for frame in frames if "mlpcore" in frame.filename and "tests" not in frame.filename
    ]
    return f"{os.path.basename(inside[-1].filename)}:{inside[-1].lineno}" if inside else "?"


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        first = value.reshape(-1)[:1] if value.size < 1000 else "…"
        return f"array({value.dtype}, {value.shape}, {first})"
    return _shown(value)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """A time limit, warnings as errors, no log lines."""

    def late(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", PendingDeprecationWarning)  # np.matrix
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        logging.disable(logging.NOTSET)
