"""The public door: what is wrong is refused, in words that name the argument and what came; nothing
is half-done.
"""

import math
import re

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.core.schedules import Schedule

X = np.random.default_rng(0).standard_normal((6, 4))
CLASSES = np.array([0, 1, 2, 0, 1, 2])
NUMBERS = np.ones((6, 3))


def with_(array, place, value):
    array = array.copy()
    array[place] = value
    return array


def classifier():
    return mc.Trainer(mc.MLP([4, 5, 3], output="softmax"))


def regressor(sizes=(4, 5, 3)):
    return mc.Trainer(mc.MLP(list(sizes)), loss="squared_error")


# what is given, the exception, the words that the message must have
DATA = {
    "columns": (np.ones((6, 7)), CLASSES, None, ValueError, ["X has 7 columns", "takes 4"]),
    "1-D X": (np.ones(4), CLASSES, None, ValueError, ["X must have 2 axes", "(4,)", "X[None, :]"]),
    "3-D X": (np.ones((6, 4, 1)), CLASSES, None, ValueError, ["X must have 2 axes", "(6, 4, 1)"]),
    "0-D X": (3.0, CLASSES, None, ValueError, ["X must have 2 axes", "()"]),
    "no rows": (np.ones((0, 4)), CLASSES[:0], None, ValueError, ["X is empty", "(0, 4)"]),
    "no columns": (np.ones((6, 0)), CLASSES, None, ValueError, ["X is empty", "(6, 0)"]),
    "object X": (X.astype(object), CLASSES, None, TypeError,
        ["X must hold real numbers", "object"]),
    "strings": (X.astype(str), CLASSES, None, TypeError, ["X must hold real numbers", "<U"]),
    "complex X": (X + 0j, CLASSES, None, TypeError, ["X must hold real numbers", "complex128"]),
    "dates": (X.astype("datetime64[s]"), CLASSES, None, TypeError,
        ["X must hold real numbers", "datetime64"]),
    "None": (None, CLASSES, None, TypeError, ["X must hold real numbers", "NoneType"]),
    "a ragged list": ([[1, 2, 3, 4], [1, 2]], CLASSES[:2], None, ValueError,
        ["X cannot be read as an array"]),
    "Y longer than X": (X, np.append(CLASSES, 0), None, ValueError, ["Y has 7 rows", "X has 6"]),
    "Y a number": (X, 1, None, ValueError, ["Y has 0 rows", "X has 6"]),
    "a label too large": (X, with_(CLASSES, 4, 3), None, ValueError,
        ["Y must hold classes 0 … 2", "row 4 holds 3"]),
    "a label below 0": (X, with_(CLASSES, 2, -1), None, ValueError,
        ["Y must hold classes 0 … 2", "row 2 holds -1"]),
    "labels not integers": (X, CLASSES.astype(float), None, ValueError,
        ["Y holds class indices", "integer", "float64"]),
    "labels true or false": (X, CLASSES > 0, None, ValueError,
        ["Y holds class indices", "integer", "bool"]),
    "labels as text": (X, CLASSES.astype(str), None, TypeError, ["Y must hold real numbers", "<U"]),
    "one-hot of other width": (X, np.eye(4)[CLASSES], None, ValueError,
        ["Y must have shape (6, 3)", "(6,) class indices", "(6, 4)"]),
    "weights of other length": (X, CLASSES, np.ones(5), ValueError,
        ["sample_weight", "(6,)", "(5,)"]),
    "weights 2-D": (X, CLASSES, np.ones((6, 1)), ValueError, ["sample_weight", "(6,)", "(6, 1)"]),
    "a weight below 0": (X, CLASSES, with_(np.ones(6), 3, -0.5), ValueError,
        ["sample_weight", "not negative", "row 3 holds -0.5"]),
    "a weight NaN": (X, CLASSES, with_(np.ones(6), 3, math.nan), ValueError,
        ["sample_weight", "finite", "row 3 holds nan"]),
    "a weight infinite": (X, CLASSES, with_(np.ones(6), 5, math.inf), ValueError,
        ["sample_weight", "finite", "row 5 holds inf"]),
    "weights all 0": (X, CLASSES, np.zeros(6), ValueError, ["sample_weight must not be all zero"]),
    "weights as text": (X, CLASSES, ["1"] * 6, TypeError, ["sample_weight must hold real numbers"]),
}  # fmt: skip


def refused(call, error, words, *networks):
    before = [network.parameters.copy() for network in networks]
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    for network, was in zip(networks, before, strict=True):
        np.testing.assert_array_equal(network.parameters, was)


@pytest.mark.parametrize("door", ["step", "fit", "evaluate", "validation", "check_gradients"])
@pytest.mark.parametrize("case", list(DATA))
def test_bad_data_is_refused_at_every_door(case, door):
    x, y, w, error, words = DATA[case]
    trainer = classifier()
    calls = {
        "step": lambda: trainer.step(x, y, w),
        "fit": lambda: trainer.fit(x, y, w, progress=False),
        "evaluate": lambda: trainer.evaluate(x, y, w),
        "validation": lambda: trainer.fit(X, CLASSES, validation=(x, y, w), progress=False),
        "check_gradients": lambda: mc.check_gradients(trainer.net, x, y, sample_weight=w),
    }
    refused(calls[door], error, words, trainer.net)
    assert trainer.progress.step == 0
    if door == "validation":
        refused(calls[door], error, ["validation: "], trainer.net)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("door", ["step", "fit", "evaluate", "validation", "check_gradients"])
@pytest.mark.parametrize("name", ["X", "Y"])
def test_a_number_that_is_not_finite_is_named_by_row_and_column(name, door, bad):
    x, y = (
        with_(X, (4, 2), bad) if name == "X" else X,
        with_(NUMBERS, (4, 2), bad) if name == "Y" else NUMBERS,
    )
    trainer = regressor()
    calls = {
        "step": lambda: trainer.step(x, y),
        "fit": lambda: trainer.fit(x, y, progress=False),
        "evaluate": lambda: trainer.evaluate(x, y),
        "validation": lambda: trainer.fit(X, NUMBERS, validation=(x, y), progress=False),
        "check_gradients": lambda: mc.check_gradients(trainer.net, x, y, loss="squared_error"),
    }
    refused(
        calls[door],
        ValueError,
        [f"{name} must be finite", "row 4, column 2", str(bad)],
        trainer.net,
    )
    assert trainer.progress.step == 0


def test_a_bad_number_far_down_a_large_array_is_found_where_it_is():
    big = np.zeros((300_000, 4), np.float32)
    big[299_998, 3] = np.nan
    trainer = regressor((4, 1))
    refused(
        lambda: trainer.fit(big, np.zeros(300_000), progress=False),
        ValueError,
        ["row 299998, column 3"],
        trainer.net,
    )
    y = np.zeros(300_000)
    y[299_999] = np.inf
    refused(
        lambda: trainer.fit(np.zeros((300_000, 4)), y, progress=False),
        ValueError,
        ["Y must be finite; row 299999"],
        trainer.net,
    )


@pytest.mark.parametrize("door", ["fit", "evaluate", "validation"])
@pytest.mark.parametrize(
    "Y", [np.full((6, 3), 5.0), np.zeros((6, 3)), with_(np.eye(3)[CLASSES], (2, 1), -1.0)]
)
def test_rows_of_y_that_are_no_distribution_over_classes_are_refused_in_a_scan(door, Y):
    trainer = classifier()
    calls = {
        "fit": lambda: trainer.fit(X, Y, progress=False),
        "evaluate": lambda: trainer.evaluate(X, Y),
        "validation": lambda: trainer.fit(X, CLASSES, validation=(X, Y), progress=False),
    }
    refused(calls[door], ValueError, ["Y must be one-hot", "row "], trainer.net)


def test_numbers_for_a_regression_of_another_shape():
    trainer = regressor()
    for y, got in (
        (np.ones(6), "(6,)"),
        (np.ones((6, 2)), "(6, 2)"),
        (np.ones((6, 3, 1)), "(6, 3, 1)"),
    ):
        refused(
            lambda y=y: trainer.step(X, y),
            ValueError,
            ["Y must have shape (6, 3)", f"got {got}"],
            trainer.net,
        )


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([0, 6], ValueError, ["rows must lie in 0 … 5", "entry 1 is 6"]),
        ([-1, 2], ValueError, ["rows must lie in 0 … 5", "entry 0 is -1"]),
        ([0.0, 1.0], TypeError, ["rows must hold integers", "float64"]),
        ([True, False, True, True, True, True], TypeError, ["rows must hold integers", "bool"]),
        (np.zeros((2, 2), int), ValueError, ["rows must be a non-empty list", "(2, 2)"]),
        (np.zeros(0, int), ValueError, ["rows", "non-empty", "(0,)"]),
        (3, ValueError, ["rows must be a non-empty list", "()"]),
        ("all", TypeError, ["rows"]),
    ],
)
def test_bad_row_numbers_are_refused(rows, error, words):
    trainer = classifier()
    refused(lambda: trainer.step(X, CLASSES, rows=rows), error, words, trainer.net)


def test_weights_that_are_zero_on_the_rows_of_the_batch_are_refused():
    trainer = classifier()
    w = np.array([0.0, 0, 0, 1, 1, 1])
    refused(
        lambda: trainer.step(X, CLASSES, w, rows=[0, 2]),
        ValueError,
        ["sample_weight must not be all zero on the rows"],
        trainer.net,
    )


# -- forward, backward, predict, loss --------------------------------------------------------------

NET = mc.MLP([4, 5, 3], "tanh")
CACHE = NET.forward(X)
CALLS = {
    "forward columns": (lambda: NET.forward(np.ones((2, 5))), ValueError,
        ["X has 5 columns", "takes 4"]),
    "predict 1-D": (lambda: NET.predict(np.ones(4)), ValueError, ["X must have 2 axes", "(4,)"]),
    "predict text": (lambda: NET.predict([["a"] * 4]), TypeError, ["X must hold real numbers"]),
    "predict empty": (lambda: NET.predict(np.ones((0, 4))), ValueError, ["X is empty", "(0, 4)"]),
    "chunk_rows 0": (lambda: NET.predict(X, chunk_rows=0), ValueError,
        ["chunk_rows must be at least 1", "0"]),
    "chunk_rows 1.5": (lambda: NET.predict(X, chunk_rows=1.5), TypeError,
        ["chunk_rows must be an integer", "1.5"]),
    "backward without cache": (lambda: NET.backward(X, NUMBERS), TypeError,
        ["cache must be the result of net.forward", "ndarray"]),
    "G of other rows": (lambda: NET.backward(CACHE, np.ones((5, 3))), ValueError,
        ["G must have", "(6, 3)", "(5, 3)"]),
    "G of other columns": (lambda: NET.backward(CACHE, np.ones((6, 2))), ValueError,
        ["G has 2 columns"]),
    "G 1-D": (lambda: NET.backward(CACHE, np.ones(6)), ValueError, ["G must have 2 axes", "(6,)"]),
    "G objects": (lambda: NET.backward(CACHE, NUMBERS.astype(object)), TypeError,
        ["G must hold real numbers", "object"]),
    "loss Z 3-D": (lambda: mc.loss("squared_error")(np.ones((3, 1, 1)), np.ones(3)), ValueError,
        ["Z must have 2 axes", "(3, 1, 1)"]),
    "loss Z 1-D, Y 2-D": (lambda: mc.loss("squared_error")(np.ones(3), np.ones((3, 2))), ValueError,
        ["(3, 1)", "(3, 2)"]),
    "loss lengths": (lambda: mc.loss("squared_error")(NUMBERS, np.ones((5, 3))), ValueError,
        ["Y has 5 rows", "6"]),
    "loss weights": (lambda: mc.loss("squared_error")(NUMBERS, NUMBERS, [1] * 5), ValueError,
        ["sample_weight", "(6,)", "(5,)"]),
    "loss labels": (lambda: mc.loss("cross_entropy")(NUMBERS / 3, [0, 1, 2, 3, 0, 0]), ValueError,
        ["0 … 2", "row 3 holds 3"]),
    "check loss": (lambda: mc.check_gradients(NET, X, CLASSES, "cross_entropy"), ValueError,
        ["'cross_entropy' needs output 'softmax'", "'identity'"]),
    "check net": (lambda: mc.check_gradients("net", X, CLASSES), TypeError,
        ["net must be an mc.MLP", "str"]),
    "check directions": (
        lambda: mc.check_gradients(NET, X, NUMBERS, "squared_error", directions=0), ValueError,
        ["directions must be at least 1", "0"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CALLS))
def test_bad_calls_on_a_network_are_refused(case):
    call, error, words = CALLS[case]
    refused(call, error, words, NET)


# -- constructors ----------------------------------------------------------------------------------

MAKES = {
    "size 0": (lambda: mc.MLP([4, 0, 3]), ValueError, ["sizes[1] must be at least 1", "0"]),
    "size -1": (lambda: mc.MLP([-1, 3]), ValueError, ["sizes[0] must be at least 1", "-1"]),
    "size 2.0": (lambda: mc.MLP([4, 2.0]), TypeError, ["sizes[1] must be an integer", "2.0"]),
    "size True": (lambda: mc.MLP([4, True]), TypeError, ["sizes[1] must be an integer", "True"]),
    "one size": (lambda: mc.MLP([4]), ValueError,
        ["sizes needs at least an input and an output", "[4]"]),
    "sizes a number": (lambda: mc.MLP(4), TypeError, ["sizes must be a list", "4"]),
    "sizes text": (lambda: mc.MLP("4-3"), TypeError, ["sizes must be a list", "'4-3'"]),
    "unknown activation": (lambda: mc.MLP([4, 5, 3], "rellu"), ValueError,
        ["activations[0]", "'rellu'", "did you mean 'relu'"]),
    "unknown output": (lambda: mc.MLP([4, 3], output="sofmax"), ValueError,
        ["output", "'sofmax'", "did you mean 'softmax'"]),
    "hidden softmax": (lambda: mc.MLP([4, 5, 3], "softmax"), ValueError,
        ["activations[0]", "softmax is for the output layer only"]),
    "too many activations": (lambda: mc.MLP([4, 5, 3], ["tanh", "tanh"]), ValueError,
        ["activations", "or 1: one per hidden layer", "got 2"]),
    "a slope that is infinite in float32": (lambda: mc.MLP([4, 5, 3], ("prelu", 1e39)), ValueError,
        ["activations[0]: the parameter of prelu must be a number that float32 holds", "1e+39"]),
    "an output's that is 0 there": (lambda: mc.MLP([4, 3], output=("sigmoid", 1e-50)), ValueError,
        ["output: the parameter of sigmoid must be a number that float32 holds", "1e-50"]),
    "a loss's": (lambda: mc.Trainer(mc.MLP([4, 3]), ("huber", 1e-50)), ValueError,
        ["parameter of huber", "float32", "1e-50"]),
    "a class weight": (lambda: mc.Trainer(mc.MLP([4, 3], output="softmax"),
            class_weight=[1e39, 1, 1]), ValueError,
        ["class_weight must be a number that float32 holds", "1e+39"]),
    "a weight of positives": (lambda: mc.Trainer(mc.MLP([4, 1], output="sigmoid"), pos_weight=1e39),
        ValueError,
        ["pos_weight must be a number that float32 holds", "1e+39"]),
    "smoothing over a class that weighs 0": (
        lambda: mc.Trainer(mc.MLP([4, 3], output="softmax"), class_weight=[1, 0, 1],
            label_smoothing=0.1), ValueError,
        ["class_weight must be positive if label_smoothing", "class 1"]),
    "activations a number": (lambda: mc.MLP([4, 5, 3], 3), TypeError, ["activations must be", "3"]),
    "an activation a number": (lambda: mc.MLP([4, 5, 3], [3]), TypeError,
        ["activations[0] must be a name", "3"]),
    "sigmoid 0": (lambda: mc.MLP([4, 5, 3], ("sigmoid", 0.0)), ValueError,
        ["activations[0]", "sigmoid must satisfy a > 0", "0.0"]),
    "sigmoid NaN": (lambda: mc.MLP([4, 5, 3], ("sigmoid", math.nan)), ValueError,
        ["activations[0]", "sigmoid must be finite"]),
    "sigmoid text": (lambda: mc.MLP([4, 5, 3], [("sigmoid", "2")]), TypeError,
        ["activations[0]", "sigmoid must be a number", "got '2'"]),
    "tanh 2": (lambda: mc.MLP([4, 5, 3], ("tanh", 2.0)), ValueError,
        ["activations[0]", "tanh takes no parameter", "2.0"]),
    "bias 1": (lambda: mc.MLP([4, 3], bias=1), TypeError, ["bias must be True or False", "1"]),
    "dtype int": (lambda: mc.MLP([4, 3], dtype="int32"), ValueError,
        ["dtype", "float32, float64", "int32"]),
    "dtype half": (lambda: mc.MLP([4, 3], dtype="float16"), ValueError,
        ["dtype", "float32, float64", "float16"]),
    "dtype unknown": (lambda: mc.MLP([4, 3], dtype="float31"), TypeError,
        ["dtype", "float32, float64", "float31"]),
    "init": (lambda: mc.MLP([4, 3], init="kaiming"), ValueError, ["init", "'kaiming'", "glorot"]),
    "seed": (lambda: mc.MLP([4, 3], seed=-1), ValueError, ["seed must be at least 0", "-1"]),
    "seed text": (lambda: mc.MLP([4, 3], seed="a"), TypeError, ["seed must be an integer", "'a'"]),
    "device": (lambda: mc.MLP([4, 3], device="gpu"), ValueError, ["device must be", "'gpu'"]),
    "device number": (lambda: mc.MLP([4, 3], device=0), TypeError, ["device must be", "0"]),
    "unknown loss": (lambda: mc.Trainer(NET, "squared_eror"), ValueError,
        ["loss", "'squared_eror'", "did you mean 'squared_error'"]),
    "loss a number": (lambda: mc.Trainer(NET, 3), TypeError, ["loss must be a name", "3"]),
    "huber 0": (lambda: mc.Trainer(NET, ("huber", 0)), ValueError,
        ["loss", "huber must satisfy q > 0", "0"]),
    "quantile 1": (lambda: mc.loss(("quantile", 1.0)), ValueError,
        ["loss", "quantile must satisfy 0 < q < 1", "1.0"]),
    "cross_entropy 1": (lambda: mc.loss(("cross_entropy", 1.0)), ValueError,
        ["cross_entropy takes no parameter", "1.0"]),
    "pair": (lambda: mc.Trainer(NET, "cross_entropy"), ValueError,
        ["'cross_entropy' needs output 'softmax'", "'identity'"]),
    "pair 2": (lambda: mc.Trainer(NET, "binary_cross_entropy"), ValueError,
        ["'binary_cross_entropy' needs output 'sigmoid'"]),
    "pair 3": (lambda: mc.Trainer(NET, "poisson"), ValueError,
        ["'poisson' needs output 'exp' or 'softplus'", "'identity'"]),
    "no net": (lambda: mc.Trainer([4, 3]), TypeError, ["net must be an mc.MLP", "list"]),
    "optimizer name": (lambda: mc.Trainer(NET, "squared_error", "adam"), TypeError,
        ["optimizer must be", "'adam'"]),
    "optimizer class": (lambda: mc.Trainer(NET, "squared_error", mc.Adam), TypeError,
        ["optimizer must be", "Adam"]),
    "l1": (lambda: mc.Trainer(NET, "squared_error", l1=-1.0), ValueError,
        ["l1 must be at least 0", "-1.0"]),
    "l2": (lambda: mc.Trainer(NET, "squared_error", l2=math.nan), ValueError,
        ["l2 must be finite", "nan"]),
    "l2 text": (lambda: mc.Trainer(NET, "squared_error", l2="0.1"), TypeError,
        ["l2 must be a number", "'0.1'"]),
    "clip 0": (lambda: mc.Trainer(NET, "squared_error", clip_norm=0), ValueError,
        ["clip_norm must be more than 0", "0"]),
    "clip -1": (lambda: mc.Trainer(NET, "squared_error", clip_norm=-1), ValueError,
        ["clip_norm", "-1"]),
    "precision": (lambda: mc.Trainer(NET, "squared_error", precision="bf16"), ValueError,
        ["precision", "'bf16'", "bfloat16"]),
    "chunk 0": (lambda: mc.Trainer(NET, "squared_error", chunk_rows=0), ValueError,
        ["chunk_rows must be at least 1", "0"]),
    "chunk text": (lambda: mc.Trainer(NET, "squared_error", chunk_rows="all"), ValueError,
        ["chunk_rows must be 'auto'", "'all'"]),
    "workers 0": (lambda: mc.Trainer(NET, "squared_error", workers=0), ValueError,
        ["workers must be at least 1", "0"]),
    "trainer seed": (lambda: mc.Trainer(NET, "squared_error", seed=1.5), TypeError,
        ["seed must be an integer", "1.5"]),
    "memory_limit": (lambda: mc.Trainer(NET, "squared_error", memory_limit="much"), ValueError,
        ["memory_limit", "'much'"]),
    "patience": (lambda: mc.EarlyStopping(patience=0), ValueError,
        ["patience must be at least 1", "0"]),
    "minimum_change": (lambda: mc.EarlyStopping(minimum_change=-1), ValueError,
        ["minimum_change", "at least 0", "-1"]),
    "activation init": (lambda: mc.Activation("mine", "s", "1", init="hee"), ValueError,
        ["init", "'hee'", "did you mean 'he'"]),
    "activation parameter": (lambda: mc.Activation("mine", "a * s", "a", math.inf), ValueError,
        ["parameter must be finite", "inf"]),
    "no such file": (lambda: mc.MLP.load("/nowhere/net.safetensors"), FileNotFoundError,
        ["/nowhere/net.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("case", list(MAKES))
def test_bad_settings_are_refused_where_they_are_given(case):
    call, error, words = MAKES[case]
    refused(call, error, words, NET)


FITS = {
    "epochs 0": ({"epochs": 0}, ValueError, ["epochs must be at least 1", "0"]),
    "epochs 2.0": ({"epochs": 2.0}, TypeError, ["epochs must be an integer", "2.0"]),
    "batch_size 0": ({"batch_size": 0}, ValueError, ["batch_size must be at least 1", "0"]),
    "batch_size -5": ({"batch_size": -5}, ValueError, ["batch_size must be at least 1", "-5"]),
    "batch_size None": ({"batch_size": None}, TypeError, ["batch_size must be an integer", "None"]),
    "validation an array": ({"validation": X}, TypeError, ["validation must be (X, Y)"]),
    "validation of one": ({"validation": (X,)}, TypeError, ["validation must be (X, Y)"]),
    "validation columns": (
        {"validation": (X[:, :3], CLASSES)},
        ValueError,
        ["validation: X has 3 columns", "takes 4"],
    ),
    "validation NaN": (
        {"validation": (with_(X, (1, 1), math.nan), CLASSES)},
        ValueError,
        ["validation: X", "row 1, column 1"],
    ),
    "stopping True": (
        {"early_stopping": True},
        TypeError,
        ["early_stopping must be mc.EarlyStopping", "True"],
    ),
    "callbacks": ({"callbacks": ["print"]}, TypeError, ["callbacks[0]", "'print'"]),
}


@pytest.mark.parametrize("case", list(FITS))
def test_bad_settings_of_fit_are_refused_before_anything_is_trained(case):
    settings, error, words = FITS[case]
    trainer = classifier()
    refused(lambda: trainer.fit(X, CLASSES, progress=False, **settings), error, words, trainer.net)
    assert trainer.progress.step == 0
    assert trainer.progress.total is None


def test_an_error_leaves_the_trainer_as_good_as_new():
    good, bothered = classifier(), classifier()
    for x, y, w, error, _ in DATA.values():
        with pytest.raises(error):
            bothered.step(x, y, w)
        with pytest.raises(error):
            bothered.fit(x, y, w, progress=False)
    for trainer in (good, bothered):
        trainer.fit(X, CLASSES, epochs=2, batch_size=4, progress=False)
    np.testing.assert_array_equal(good.net.parameters, bothered.net.parameters)


def test_messages_are_one_line_and_without_a_second_exception_in_front():
    for x, y, w, error, _ in DATA.values():
        with pytest.raises(error) as caught:
            classifier().step(x, y, w)
        assert not re.search(r"\n", str(caught.value))
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("value", ["s * (1 / (1 - 1))", "s * log(0 - 1)"])
def test_a_formula_whose_scalars_have_no_value_is_refused_where_it_is_given(value):
    with pytest.raises(ValueError, match="has no value"):
        mc.Activation("odd", value, "1")


def test_weights_too_small_for_the_dtype_and_a_schedule_without_a_shape_are_refused():
    trainer = mc.Trainer(mc.MLP([2, 1]), loss="squared_error")
    with pytest.raises(ValueError, match="sample_weight sums to"):
        trainer.step(np.ones((3, 2)), np.ones(3), np.full(3, 1e-44))
    with pytest.raises(TypeError, match="learning_rate must be a number or one of the schedules"):
        mc.SGD(Schedule(0.1))
    for dtype in (None, "float16"):
        with pytest.raises((TypeError, ValueError), match="dtype"):
            mc.MLP([2, 1], dtype=dtype)
    assert mc.MLP([2, 1], dtype=">f4").dtype == np.float32
