"""Settings: whatever kind of number is given, what is stored is Python's own, and a file gives it back to the bit."""

import copy
import dataclasses
import enum
import inspect
import json
import pickle
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.core.optimizers import Optimizer, Schedule

rng = np.random.default_rng(0)
X, Y, LABELS = rng.standard_normal((6, 2)), rng.standard_normal((6, 1)), np.array([0, 1, 1, 0, 1, 0])
PLAIN = (int, float, bool, str, type(None))


class Number(enum.IntEnum):
    two = 2


class Text(str):
    __slots__ = ()


NUMBERS = [
    np.int64(3), np.int8(1), np.uint64(2), np.float16(0.3), np.float32(0.3), np.float64(0.3), np.longdouble(0.25),
    np.array(0.3), np.array(0.3, np.float32), np.array(2), Decimal("0.3"), Fraction(1, 3), Fraction(2), Number.two,
    np.bool_(True), True, np.array(False),
]  # fmt: skip


def trainer(loss="squared_error", optimizer=None, output="identity", activation="tanh", **settings):
    net = mc.MLP([2, 3, 1], activation, output, device="cpu", seed=1)
    return mc.Trainer(net, loss, optimizer or mc.SGD(0.1), **settings)


def classifier(loss):
    return trainer(loss, output="sigmoid")


# a constructor: arguments with which it works, and how a trainer comes to use what it makes
MADE = {
    mc.SGD: ({"learning_rate": 0.1, "momentum": 0.5}, lambda made: trainer(optimizer=made)),
    mc.Adam: ({}, lambda made: trainer(optimizer=made)),
    mc.AdamW: ({}, lambda made: trainer(optimizer=made)),
    mc.RMSprop: ({}, lambda made: trainer(optimizer=made)),
    mc.Lion: ({}, lambda made: trainer(optimizer=made)),
    mc.Constant: ({"rate": 0.1}, lambda made: trainer(optimizer=mc.SGD(made))),
    mc.StepDecay: ({"rate": 0.1, "every": 1}, lambda made: trainer(optimizer=mc.SGD(made))),
    mc.Cosine: ({"rate": 0.1, "steps": 9}, lambda made: trainer(optimizer=mc.SGD(made))),
    mc.InverseScaling: ({"rate": 0.1}, lambda made: trainer(optimizer=mc.SGD(made))),
    mc.Adaptive: ({"rate": 0.1}, lambda made: trainer(optimizer=mc.SGD(made))),
    mc.FormulaSchedule: ({"rate": 0.1, "formula": "rate / step"}, lambda made: trainer(optimizer=mc.SGD(made))),
    mc.Layer: ({}, lambda made: trainer(optimizer=mc.AdamW(layers={1: made}))),
    mc.EarlyStopping: ({"monitor": "loss"}, None),
    mc.Loss: ({"name": "own", "value": "q * (z - y) ** 2", "parameter": 1.0}, trainer),
    mc.Activation: ({"name": "own", "value": "a * s", "parameter": 1.0}, lambda made: trainer(activation=made)),
    mc.loss: ({"spec": "binary_cross_entropy"}, classifier),
    mc.MLP: ({"sizes": [2, 1], "device": "cpu"}, lambda made: mc.Trainer(made, "squared_error", mc.SGD(0.1))),
    mc.Trainer: ({"net": mc.MLP([2, 3, 1], device="cpu"), "loss": "squared_error", "optimizer": mc.SGD(0.1)}, copy.deepcopy),
}
INSIDE = {  # arguments that hold a number inside
    "sizes": lambda value: [2, value, 1],
    "activations": lambda value: ("sigmoid", value),
    "output": lambda value: ("sigmoid", value),
    "tied": lambda value: {2: value},
    "layers": lambda value: value if isinstance(value, np.ndarray) else {value: mc.Layer()},
    "spec": lambda value: ("huber", value),
    "loss": lambda value: ("huber", value),
    "class_weight": lambda value: [1, value],
    "matched": lambda value: (value, value),
}
TEXTS = {"monitor": "loss", "mode": "min", "velocity": "gradients", "learned": "per layer", "device": "cpu"}
NO_SETTINGS = {"net", "optimizer", "dtype"}
CASES = [
    (make, name)
    for make in MADE
    for name in inspect.signature(make).parameters
    if name not in NO_SETTINGS
]  # fmt: skip


def ordinary(value):
    """The Python number, bool or text that a value of the pool is."""
    if isinstance(value, str):
        return str.__str__(value)
    kind = value.dtype.kind if isinstance(value, np.generic | np.ndarray) else ""
    if kind in ("b", "U"):
        return value.item()
    whole = kind in ("i", "u") or isinstance(value, int)
    return value if isinstance(value, bool) else int(value) if whole else float(value)


def leaves(value):
    """All numbers and texts in what an object stores."""
    if isinstance(value, mc.Trainer):
        value = value._description()
    if isinstance(value, mc.MLP):
        value = value.header()
    if hasattr(value, "loss"):
        value = value.loss
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list | tuple) else [value]


def steps(one):
    try:
        for _ in range(2):
            one.step(X, LABELS if one.loss.classifies else Y)
    except MemoryError as error:
        return str(error)
    return one.net.parameters.tobytes(), one.learning_rate


def require_saved(use, made, twin, path):
    """A file gives back what was set; training goes on as that of the plain twin."""
    one, other = made, use(twin)
    one.save(path)
    loaded = mc.Trainer.load(path, device="cpu")
    assert (loaded.optimizer, loaded.loss, loaded._settings) == (one.optimizer, one.loss, one._settings)
    assert loaded.net.activations == one.net.activations
    assert steps(loaded) == steps(one) == steps(other)


def require_resumed(made, twin, path):
    """A `fit` that is left goes on with the settings that the file holds."""
    arguments = {"epochs": 2, "batch_size": 3, "progress": False}
    one, other = trainer(), trainer()
    one.fit(X, Y, early_stopping=made, callbacks=[lambda one, _: one.save(path)], **arguments)
    other.fit(X, Y, early_stopping=twin, **arguments)
    loaded = mc.Trainer.load(path, device="cpu")
    if loaded.unfinished:
        loaded.fit(X, Y, early_stopping=made, **arguments)
    np.testing.assert_array_equal(one.net.parameters, other.net.parameters)


@pytest.mark.parametrize(("make", "name"), CASES, ids=[f"{make.__name__} {name}" for make, name in CASES])
def test_every_kind_of_number_is_refused_by_name_or_stored_as_pythons_own_and_saved(make, name, tmp_path):
    good, use = MADE[make]
    text = {**TEXTS, **good}.get(name)
    words = [kind(text) for kind in (np.str_, Text, np.array)] if isinstance(text, str) else []
    done, accepted = set(), 0
    if name == "spec":
        use = trainer
    for value in [*NUMBERS, *words]:
        inside = INSIDE.get(name, lambda value: value)
        given, same = inside(value), inside(ordinary(value))
        try:
            made = make(**{**good, name: given})
            used = None if use is None else use(made)
        except (TypeError, ValueError) as error:
            if not re.search(rf"\b{'loss' if name == 'spec' else name}\b", str(error)):
                raise AssertionError(f"{name} is not named, of {value!r}") from error
            continue
        accepted += 1
        if isinstance(made, Schedule | Optimizer | mc.Layer | mc.EarlyStopping | mc.Loss | mc.Activation):
            twin = make(**{**good, name: getattr(made, name)})
            assert made == twin == copy.deepcopy(made) == pickle.loads(pickle.dumps(made))
            assert made == dataclasses.replace(made, **({} if name == "layers" else {name: given}))
            assert repr(made) == repr(twin)
        else:
            twin = make(**{**good, name: same})
        kept = leaves(made)
        assert {*map(type, kept)} <= {*PLAIN}, (value, kept)
        key = json.dumps([repr(leaf) for leaf in kept])
        if key not in done:
            done.add(key)
            path = tmp_path / "saved"
            require_resumed(made, twin, path) if use is None else require_saved(use, used, twin, path)
    assert accepted or name not in good or name in ("loss", "spec")


def test_every_public_constructor_of_settings_is_tried():
    public = {getattr(mc, name) for name in mc.__all__}
    settings = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Optimizer | Schedule)}
    assert settings <= {*MADE}
    assert {kind for kind in public if dataclasses.is_dataclass(kind)} - {*MADE} == {
        mc.Cache, mc.Gradient, mc.GradientCheck,
    }  # fmt: skip
