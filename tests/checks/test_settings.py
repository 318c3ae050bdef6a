"""Settings: whatever kind of number is given, Python's own is stored, and saved to the bit."""

import copy
import dataclasses
import enum
import inspect
import itertools
import json
import math
import pickle
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.schedules import Schedule
from mlpcore.estimators import MLPClassifier as Classifier
from mlpcore.training import saving

rng = np.random.default_rng(0)
X, Y, LABELS = (
    rng.standard_normal((6, 2)),
    rng.standard_normal((6, 1)),
    np.array([0, 1, 1, 0, 1, 0]),
)
PLAIN = (int, float, bool, str, type(None))


class Number(enum.IntEnum):
    two = 2


class Text(str):
    __slots__ = ()


NUMBERS = [
    np.int64(3), np.int8(1), np.uint64(2), np.float16(0.3), np.float32(0.3), np.float64(0.3),
    np.longdouble(0.25),
    np.array(0.3), np.array(0.3, np.float32), np.array(2), Decimal("0.3"), Fraction(1, 3),
    Fraction(2), Number.two,
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
    mc.FormulaSchedule: (
        {"rate": 0.1, "formula": "rate / step"},
        lambda made: trainer(optimizer=mc.SGD(made)),
    ),
    mc.Layer: ({}, lambda made: trainer(optimizer=mc.AdamW(layers={1: made}))),
    mc.EarlyStopping: ({"monitor": "loss"}, None),
    mc.Loss: ({"name": "own", "value": "q * (z - y) ** 2", "parameter": 1.0}, trainer),
    mc.Activation: (
        {"name": "own", "value": "a * s", "parameter": 1.0},
        lambda made: trainer(activation=made),
    ),
    mc.loss: ({"spec": "binary_cross_entropy"}, classifier),
    mc.MLP: (
        {"sizes": [2, 1], "device": "cpu"},
        lambda made: mc.Trainer(made, "squared_error", mc.SGD(0.1)),
    ),
    mc.Trainer: (
        {"net": mc.MLP([2, 3, 1], device="cpu"), "loss": "squared_error", "optimizer": mc.SGD(0.1)},
        copy.deepcopy,
    ),
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
TEXTS = {
    "monitor": "loss",
    "mode": "min",
    "velocity": "gradients",
    "learned": "per layer",
    "device": "cpu",
}
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
        value = saving.describe_trainer(value._learner)
    if isinstance(value, mc.MLP):
        value = value.header()
    if hasattr(value, "loss"):
        value = value.loss
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return (
        [leaf for part in value for leaf in leaves(part)]
        if isinstance(value, list | tuple)
        else [value]
    )


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
    assert (loaded.optimizer, loaded.loss, loaded._step.problem.settings) == (
        one.optimizer,
        one.loss,
        one._step.problem.settings,
    )
    assert loaded.net.activations == one.net.activations
    assert steps(loaded) == steps(one) == steps(other)


def require_resumed(made, twin, path):
    """A `fit` that is left goes on with the settings that the file holds."""
    arguments = {"epochs": 2, "batch_size": 3, "progress": False}
    one, other = trainer(), trainer()
    path.unlink(missing_ok=True)
    one.fit(X, Y, early_stopping=made, callbacks=[lambda one, _: one.save(path)], **arguments)
    other.fit(X, Y, early_stopping=twin, **arguments)
    loaded = mc.Trainer.load(path, device="cpu")
    if loaded.unfinished:
        loaded.fit(X, Y, early_stopping=made, **arguments)
    np.testing.assert_array_equal(one.net.parameters, other.net.parameters)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name"), CASES, ids=[f"{make.__name__} {name}" for make, name in CASES]
)
def test_every_kind_of_number_is_refused_by_name_or_stored_as_pythons_own_and_saved(
    make, name, tmp_path
):
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
        if isinstance(
            made, Schedule | Optimizer | mc.Layer | mc.EarlyStopping | mc.Loss | mc.Activation
        ):
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
            require_resumed(made, twin, path) if use is None else require_saved(
                use, used, twin, path
            )
    assert accepted or name not in good or name in ("loss", "spec")


def test_every_public_constructor_of_settings_is_tried():
    public = {getattr(mc, name) for name in mc.__all__}
    settings = {
        kind for kind in public if isinstance(kind, type) and issubclass(kind, Optimizer | Schedule)
    }
    assert settings <= {*MADE}
    assert {kind for kind in public if dataclasses.is_dataclass(kind)} - {*MADE} == {
        mc.Cache, mc.Gradient, mc.GradientCheck,
    }  # fmt: skip


# -- what is set on a live optimizer or trainer ---------------------------------------------------


@pytest.mark.parametrize(
    "value", [np.float32(0.3), Decimal("0.25"), Fraction(1, 3), np.array(0.3)], ids=str
)
def test_what_is_set_later_is_converted_as_what_is_given_to_the_constructor(value, tmp_path):
    one, other = trainer(optimizer=mc.AdamW(0.01)), trainer(optimizer=mc.AdamW(0.01))
    for made, given in ((one, value), (other, float(value))):
        made.l1 = made.l2 = given
        made.optimizer.learning_rate = made.optimizer.weight_decay = made.optimizer.beta1 = given
        made.optimizer.layers = {np.int64(1): mc.Layer(given)}
    for made in (one, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert {type(leaf) for leaf in leaves(made)} <= {*PLAIN}
        assert steps(made) == steps(copy.deepcopy(other))


ODD = [None, "0.1", True, np.bool_(1), 1j, np.ones(1), -1, math.nan, 10**400, Decimal("1e-400")]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
def test_what_is_set_later_is_refused_as_by_the_constructor(value):
    one = trainer(optimizer=mc.AdamW(0.01))
    before = repr(one.optimizer), one.l1
    for thing, name in (
        (one.optimizer, "learning_rate"),
        (one.optimizer, "weight_decay"),
        (one, "l1"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be"):
            setattr(thing, name, value)
    assert (repr(one.optimizer), one.l1) == before


def test_a_penalty_that_the_networks_numbers_do_not_hold_is_refused():
    for value in (1e39, 1e-46):
        for name in ("l1", "l2"):
            with pytest.raises(
                ValueError,
                match=f"{name} must be a number that float32 holds; got {re.escape(str(value))}",
            ):
                trainer(**{name: value})
            with pytest.raises(ValueError, match=f"{name} must be a number that float32 holds"):
                setattr(trainer(), name, value)
    assert mc.Trainer(mc.MLP([2, 1], dtype="float64", device="cpu"), l1=1e39).l1 == 1e39


@pytest.mark.parametrize("name", [*inspect.signature(mc.Trainer).parameters])
def test_a_setting_of_a_trainer_that_no_step_would_read_cannot_be_set(name):
    trainer = mc.Trainer(mc.MLP([2, 1]), "squared_error")
    if name in ("l1", "l2"):
        setattr(trainer, name, 0.5)
        assert getattr(trainer, name) == 0.5
    else:
        with pytest.raises(AttributeError, match=name):
            setattr(trainer, name, 0.5)


def test_a_trainer_whose_settings_could_not_be_loaded_is_not_saved(tmp_path):
    one = trainer()
    one.optimizer.layers = {7: mc.Layer()}
    with pytest.raises(ValueError, match="layers: the network has layers 1 … 2; got 7"):
        one.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_rate_that_shrinks_step_by_step_may_become_as_small_as_a_float_can():
    optimizer = mc.SGD(1e-300)
    for _ in range(30):
        optimizer.learning_rate /= 10
    assert optimizer.learning_rate == 0


# -- what came is shown, however large or odd it is -----------------------------------------------


class Unshown:
    def __repr__(self):
        raise RuntimeError("no")


HUGE, LONG = 10**5000, [1] * 300_000
REFUSED = {
    "width": (lambda: mc.MLP([4, 2**63]), "sizes[1] must be at most 9223372036854775807"),
    "weights": (lambda: mc.MLP([2**40, 2**40]), "sizes must make at most 2**58 parameters"),
    "memory": (lambda: mc.MLP([2**20, 2**30]),
        "sizes: there is no memory for 1,125,900,980,584,448 parameters"),
    "many layers": (lambda: mc.MLP(LONG), "sizes must describe at most 10,000 layers"),
    "endless": (lambda: mc.MLP(itertools.count(1)),
        "sizes must describe at most 10,000 layers"),
    "a set": (lambda: mc.MLP({4, 3}), "sizes must be a list of widths"),
    "a dict": (lambda: mc.MLP({4: 3}), "sizes must be a list of widths"),
    "2-d": (lambda: mc.MLP(np.ones((2, 2), int)), "sizes[0] must be an integer; got array([1, 1])"),
    "tied": (lambda: mc.MLP([4, 4, 4], tied={2: HUGE}),
        "layers 1 … 2; got 2: an integer of 16,610 bits"),
    "tied to text": (lambda: mc.MLP([4, 4, 4], tied={2: "1" * 5000 + ".T"}),
        "tied: expected layer: layer"),
    "seed": (lambda: mc.MLP([4, 3], seed=2**200),
        "seed must be at most 340282366920938463463374607431768211455"),
    "dtype": (lambda: mc.MLP([4, 3], dtype=np.complex64),
        "dtype must be one of float32, float64; got 'complex64'"),
    "device": (lambda: mc.MLP([4, 3], device="x" * 48_000), "device must be 'auto', 'cpu'"),
    "name": (lambda: mc.Activation("a\0b", "s"), "name must be text, printable"),
    "surrogate": (lambda: mc.Loss("\ud800", "z"), "name must be text, printable"),
    "long formula": (lambda: mc.Loss("l", "z" * 48_000), "value: formula 'zzzz"),
    "deep formula": (lambda: mc.Loss("l", "-" * 3900 + "z"), "is nested too deep"),
    "unknown in a formula": (lambda: mc.FormulaSchedule(0.1, "s" + " + s" * 900),
        "formula: 's + s"),
    "no formula": (lambda: mc.Activation("x", "s", "\ud800"),
        "slope: formula '\\ud800' cannot be read"),
    "no schedule": (lambda: mc.FormulaSchedule(0.1, "\ud800"),
        "formula: formula '\\ud800' cannot be read"),
    "matched": (lambda: mc.Loss("l", "z - y", matched=("w", "1")),
        "matched: formula 'w' reads 'w'"),
    "most": (lambda: mc.Loss("l", "z", most=10**400),
        "most must be finite; got an integer of 1,329 bits"),
    "every": (lambda: mc.StepDecay(0.1, None), "StepDecay: every must be a number; got None"),
    "power": (lambda: mc.InverseScaling(0.1, 1e10),
        "InverseScaling: power must be at least 0 and at most 16"),
    "patience": (lambda: mc.Adaptive(0.1, patience=2.5),
        "Adaptive: patience must be an integer; got 2.5"),
    "a list": (lambda: mc.SGD(LONG), "SGD: learning_rate must be a number; got [1, 1,"),
    "nothing to show": (lambda: mc.SGD(Unshown()),
        "SGD: learning_rate must be a number; got <Unshown"),
    "times": (lambda: mc.SGD(np.timedelta64(5, "ns")), "SGD: learning_rate must be a number"),
    "masked": (lambda: mc.SGD(np.ma.masked), "SGD: learning_rate must be a number; got masked"),
    "workers": (lambda: trainer(workers=10**9), "workers must be at most 1024"),
    "chunk_rows": (lambda: trainer(chunk_rows=2**70), "chunk_rows must be at most"),
    "memory_limit": (lambda: trainer(memory_limit=HUGE), "memory_limit must be at most"),
    "dropout": (lambda: trainer(dropout=[[0.1]]), "dropout[0] must be a number; got [0.1]"),
    "optimizer": (lambda: trainer(optimizer=LONG), "optimizer must be e.g. mc.SGD(0.1)"),
    "layers": (lambda: trainer(optimizer=mc.SGD(0.1, layers={HUGE: mc.Layer()})),
        "the network has layers 1 … 2; got"),
    "class_weight": (lambda: mc.loss("cross_entropy", class_weight=[HUGE]),
        "class_weight[0] must be finite"),
    "a class": (lambda: mc.Trainer(mc.MLP([2, 2], output="softmax"), class_weight={HUGE: 1}),
        "names the class an int"),
    "pos_weight": (lambda: mc.loss("binary_cross_entropy", pos_weight=np.float32),
        "pos_weight must be a number"),
    "epochs": (lambda: trainer().fit(X, Y, epochs=1e3), "epochs must be an integer; got 1000.0"),
    "batch_size": (lambda: trainer().fit(X, Y, batch_size=10**30), "batch_size must be at most"),
    "metrics": (lambda: trainer().evaluate(X, Y, metrics={"\ud800": len}),
        "metrics: a name must be text, printable"),
    "path": (lambda: trainer().save("x" * 48_000), "path must be the path of a file"),
    "no text": (lambda: trainer().save("\ud800"), "path must be the path of a file"),
    "tolerance": (lambda: mc.check_gradients(trainer().net, X, Y, tolerance=0),
        "tolerance must be more than 0"),
    "estimator": (lambda: Classifier(loss="x" * 48_000).fit(X, LABELS), "'loss' parameter"),
    "its widths": (lambda: Classifier([2**63]).fit(X, LABELS),
        "hidden_layer_sizes[0] must be at most"),
    "its weights": (lambda: Classifier(class_weight={0: HUGE}).fit(X, LABELS),
        "class_weight must be finite"),
    "notes": (lambda: trainer().net.to_onnx("x", about={"a": HUGE}),
        "about must be what JSON can hold"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_too_large_or_odd_is_refused_by_name_in_a_short_message(case):
    call, words = REFUSED[case]
    with pytest.raises((TypeError, ValueError, MemoryError), match=re.escape(words)) as caught:
        call()
    assert len(str(caught.value)) <= 500


def test_limits_are_values_that_still_work():
    assert mc.MLP([2, 1], seed=2**128 - 1, device="cpu").parameters.shape == (3,)
    assert trainer(workers=1024, chunk_rows=2**63 - 1, seed=2**128 - 1).step(X, Y) > 0
    assert mc.Loss("a" * 200, "z").name == "a" * 200
    assert mc.InverseScaling(0.1, 16).at(mc.core.optimizers.Progress(step=2**63)) > 0
    assert trainer().net.predict(X, chunk_rows=2**63 - 1).shape == (6, 1)


def test_a_loss_of_outputs_that_are_infinite_says_so_without_a_warning():
    J, _ = mc.loss("cross_entropy")(np.full((2, 3), np.inf), np.array([0, 1]))
    assert not math.isfinite(J)
