"""Class weights, label smoothing, the weight of positives: PyTorch's formulas by hand, every door
that takes them.
"""

import itertools
import pickle

import mpmath
import numpy as np
import pytest

import mlpcore as mc
from mlpcore.core import losses
from mlpcore.core.losses import Loss
from mlpcore.core.targets import PIECE

RNG = np.random.default_rng(0)
ROWS, CLASSES = 60, 4
X = RNG.standard_normal((ROWS, 3))
LABELS, SOFT = RNG.integers(0, CLASSES, ROWS), RNG.dirichlet(np.ones(CLASSES), ROWS)
ONE_HOT, BY_CLASS = np.eye(CLASSES)[LABELS], [0.5, 3.0, 0.25, 1.0]
BINARY, W = RNG.integers(0, 2, (ROWS, CLASSES)), RNG.uniform(0, 2, ROWS)
PROBABLE = RNG.random((ROWS, CLASSES))
FIT = {"epochs": 2, "batch_size": 16, "progress": False}


def network(output="softmax", outputs=CLASSES, dtype="float64"):
    return mc.MLP([3, 6, outputs], "tanh", output, dtype=dtype, device="cpu", seed=1)


def trainer(**settings):
    return mc.Trainer(network(), "cross_entropy", mc.SGD(0.1), **settings)


def log_softmax(net):
    S = np.tanh(X @ net.W[1] + net.b[1]) @ net.W[2] + net.b[2]
    S -= S.max(axis=1, keepdims=True)
    return S - np.log(np.exp(S).sum(axis=1, keepdims=True))


# -- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("by_class", [None, BY_CLASS])
@pytest.mark.parametrize("weights", [None, W])
def test_cross_entropy_of_class_numbers_is_pytorchs(weights, by_class, smoothing):
    one = trainer(class_weight=by_class, label_smoothing=smoothing)
    log_p, c = log_softmax(one.net), np.ones(CLASSES) if by_class is None else np.array(by_class)
    w = np.ones(ROWS) if weights is None else weights
    rows = np.arange(ROWS)
    # torch.nn.CrossEntropyLoss(weight=c, label_smoothing=ε): the smoothed share of each class
    # counts with that class's weight
    loss = -(1 - smoothing) * c[LABELS] * log_p[rows, LABELS] - smoothing / CLASSES * (
        c * log_p
    ).sum(axis=1)
    want = (w * loss).sum() / (w * c[LABELS]).sum()
    for Y in (LABELS, ONE_HOT, LABELS.astype(np.uint8), ONE_HOT.astype(bool)):
        J, _ = one.gradient(X, Y, weights)
        assert pytest.approx(want, rel=1e-13) == J
        assert one.evaluate(X, Y, weights)["loss"] == pytest.approx(want, rel=1e-13)
        assert mc.loss(one.loss)(one.net.predict(X), Y, weights)[0] == pytest.approx(
            want, rel=1e-12
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_distribution_is_weighed_class_by_class_and_its_row_by_the_mean_of_its_classes(smoothing):
    one, c = trainer(class_weight=BY_CLASS, label_smoothing=smoothing), np.array(BY_CLASS)
    smoothed = (1 - smoothing) * SOFT + smoothing / CLASSES
    want = -(c * smoothed * log_softmax(one.net)).sum() / (SOFT @ c).sum()
    assert one.gradient(X, SOFT)[0] == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize("outputs", [1, CLASSES])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("positive", [None, 2.5, [0.5, 3.0, 0.0, 1.0]])
def test_binary_cross_entropy_is_pytorchs(positive, smoothing, outputs):
    positive = positive[:outputs] if isinstance(positive, list) else positive
    net = network(("sigmoid", 1.5), outputs)
    one = mc.Trainer(net, "binary_cross_entropy", label_smoothing=smoothing, pos_weight=positive)
    x = 1.5 * (np.tanh(X @ net.W[1] + net.b[1]) @ net.W[2] + net.b[2])
    for Y in (BINARY[:, :outputs], PROBABLE[:, :outputs]):
        y = (1 - smoothing) * Y + smoothing / 2
        p = np.ones(outputs) if positive is None else np.array(positive)
        # torch.nn.BCEWithLogitsLoss(pos_weight=p), summed over the outputs
        want = (p * y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)).sum() / ROWS
        assert one.gradient(X, Y)[0] == pytest.approx(want, rel=1e-13)
        assert one.evaluate(X, Y)["loss"] == pytest.approx(want, rel=1e-13)
        assert mc.loss(one.loss)(net.predict(X), Y)[0] == pytest.approx(want, rel=1e-12)


def test_numbers_worked_by_hand():
    log_p = np.log([0.7, 0.2, 0.1])
    J, _ = mc.loss("cross_entropy", class_weight=[1, 2, 4], label_smoothing=0.3)(
        [[0.7, 0.2, 0.1]], [1]
    )
    assert pytest.approx(-(0.1 * 1 * log_p[0] + 0.8 * 2 * log_p[1] + 0.1 * 4 * log_p[2]) / 2) == J
    J, _ = mc.loss("binary_cross_entropy", pos_weight=3)([[0.2], [0.2]], [1, 0])
    assert pytest.approx((-3 * np.log(0.2) - np.log(0.8)) / 2) == J
    J, _ = mc.loss("binary_cross_entropy", class_weight=[1, 3])([[0.2], [0.2]], [1, 0])
    assert pytest.approx((-3 * np.log(0.2) - np.log(0.8)) / 4) == J


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("by_class", [[0.5, 3.0], {1: 4.0}])
def test_two_classes_weigh_the_same_behind_a_sigmoid_as_behind_a_softmax(by_class, smoothing):
    binary, multi = network("sigmoid", 1), network("softmax", 2)
    multi.W[1][...], multi.b[1][...] = binary.W[1], binary.b[1]
    multi.W[2][...], multi.b[2][...] = binary.W[2] * [[-0.5, 0.5]], binary.b[2] * [-0.5, 0.5]
    options = {"class_weight": by_class, "label_smoothing": smoothing}
    one, other = (
        mc.Trainer(net, losses.matching(net.activations[-1]), **options) for net in (binary, multi)
    )
    for y in (BINARY[:, 0], PROBABLE[:, 0]):
        J, g = one.gradient(X, y, W)
        K, h = other.gradient(X, np.stack([1 - y, y], axis=1), W)
        assert pytest.approx(K, rel=1e-13) == J
        np.testing.assert_allclose(g[:18], h[:18], rtol=1e-11)


EVERY = [
    ("softmax", "cross_entropy", options, Y)
    for options in (
        {"label_smoothing": 0.1},
        {"class_weight": BY_CLASS},
        {"class_weight": BY_CLASS, "label_smoothing": 0.4},
    )
    for Y in (LABELS, ONE_HOT, SOFT)
]
EVERY += [
    (output, "binary_cross_entropy", options, Y)
    for output in (("sigmoid", 1.3), mc.Activation("own", "1 / (1 + exp(-s))", "z * (1 - z)"))
    for options in (
        {"label_smoothing": 0.1},
        {"pos_weight": 3.0},
        {"pos_weight": [2.0, 0.0, 0.5, 2.0], "label_smoothing": 0.2},
    )
    for Y in (BINARY, PROBABLE)
]
EVERY += [
    (
        "sigmoid",
        "binary_cross_entropy",
        {"class_weight": [2.0, 0.3], "label_smoothing": 0.1},
        BINARY[:, :1],
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "loss", "options", "Y"), EVERY, ids=[str(i) for i in range(len(EVERY))]
)
def test_gradient_and_curvature_agree_with_differences(output, loss, options, Y):
    net = network(output, 1 if Y.shape[1:] == (1,) else CLASSES)
    for weights in (None, W):
        found = mc.check_gradients(
            net, X, Y, mc.Trainer(net, loss, **options).loss, sample_weight=weights, entries=True
        )
        assert found.ok, found


@pytest.mark.parametrize(
    ("output", "loss", "options", "Y"), EVERY, ids=[str(i) for i in range(len(EVERY))]
)
def test_chunks_threads_rows_and_precision_change_rounding_alone(output, loss, options, Y):
    outputs = 1 if Y.shape[1:] == (1,) else CLASSES

    def make(dtype="float64", **settings):
        return mc.Trainer(network(output, outputs, dtype), loss, mc.SGD(0.1), **options, **settings)

    J, g = make().gradient(X, Y, W)
    for other in (make(chunk_rows=7), make(chunk_rows=9, workers=2)):
        K, h = other.gradient(X, Y, W)
        assert pytest.approx(K, rel=1e-13) == J
        np.testing.assert_allclose(g, h, rtol=1e-11, atol=1e-14)
    order = RNG.permutation(ROWS)
    one, two = make(), make()
    for rows in (order[:20], order[20:]):
        assert one.step(X, Y, W, rows=rows) == two.step(X[rows], Y[rows], W[rows])
        assert one.step(one.prepare(X, Y, W), rows=rows) == two.step(X[rows], Y[rows], W[rows])
    K, h = make("float32").gradient(X, Y, W)
    assert pytest.approx(K, rel=1e-5) == J
    np.testing.assert_allclose(g, h, atol=1e-5 * abs(g).max())


@pytest.mark.parametrize("classes", [3, 70])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_smoothed_cross_entropy_is_finite_and_right_at_pre_activations_of_ten_thousand(
    dtype, classes
):
    net = mc.MLP([classes, classes], [], "softmax", dtype=dtype, device="cpu")
    net.W[1][...] = np.eye(classes)
    S = np.zeros((2, classes))
    S[0, 0], S[1, 1] = 1e4, -1e4
    for by_class in (None, 1 + np.arange(classes)):
        c = np.ones(classes) if by_class is None else by_class
        one = mc.Trainer(net, "cross_entropy", class_weight=by_class, label_smoothing=0.3)
        for Y in (np.array([0, 1]), np.eye(classes)[:2]):
            J, g = one.gradient(S, Y)
            log_p = np.array([S[0] - 1e4, S[1] - np.log(classes - 1)])
            t = c * (0.7 * np.eye(classes)[:2] + 0.3 / classes)
            assert pytest.approx(-(t * log_p).sum() / c[:2].sum(), rel=1e-6) == J
            D = (t.sum(axis=1, keepdims=True) * np.exp(log_p) - t) / c[:2].sum()
            np.testing.assert_allclose(g[-classes:], D.sum(axis=0), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [
        {"pos_weight": 3.0},
        {"pos_weight": [3.0]},
        {"class_weight": [0.5, 2.0]},
        {"label_smoothing": 0.25},
    ],
    ids=str,
)
def test_value_and_gradient_behind_a_sigmoid_keep_their_digits_on_both_sides(options, dtype):
    net = mc.MLP([1, 1], [], "sigmoid", bias=False, dtype=dtype, device="cpu")
    net.W[1][...] = 1
    one, tolerance = mc.Trainer(net, "binary_cross_entropy", **options), 8 * np.finfo(dtype).eps
    smoothing, p = options.get("label_smoothing", 0.0), 3.0 if "pos_weight" in options else 1.0
    for s, y in itertools.product(
        (-80.0, -40.0, -20.0, -5.0, -0.5, 0.0, 0.5, 5.0, 20.0, 40.0, 80.0), (0.0, 0.125, 1.0)
    ):
        J, g = one.gradient(np.array([[s]], dtype), np.array([[y]], dtype))
        with mpmath.workdps(60):
            e, share = mpmath.exp(-mpmath.mpf(s)), (1 - smoothing) * y + smoothing / 2
            c0, c1 = (
                mpmath.mpf(c) / (0.5 * (1 - y) + 2 * y)
                for c in options.get("class_weight", (0.5 * (1 - y) + 2 * y,) * 2)
            )
            u, v = p * c1 * share, c0 * (1 - mpmath.mpf(share))
            value = u * mpmath.log1p(e) + v * mpmath.log1p(1 / e)
            slope = v / (1 + e) - u / (1 + 1 / e)
            size = v / (1 + e) + u / (1 + 1 / e)
        assert abs(J - value) <= tolerance * value, (s, y)
        assert abs(g[0] - s * slope) <= tolerance * abs(s) * size, (s, y)


def test_the_curvature_behind_a_sigmoid_is_one_formula_at_0():
    net = mc.MLP([3, 2], [], "sigmoid", init="zeros", dtype="float64", device="cpu")
    loss, v = (
        mc.loss("binary_cross_entropy", pos_weight=[3.0, 0.5], label_smoothing=0.2).loss,
        RNG.standard_normal(8),
    )
    y = 0.8 * BINARY[:, :2] + 0.1
    dS = X @ v[:6].reshape(3, 2) + v[6:]
    D = (np.array([3.0, 0.5]) * y + 1 - y) * 0.25 * dS / ROWS
    np.testing.assert_allclose(
        net.hvp(X, BINARY[:, :2], v, loss), [*(X.T @ D).ravel(), *D.sum(axis=0)], rtol=1e-12
    )


def test_it_is_pytorchs_own_loss():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    one = trainer(class_weight=BY_CLASS, label_smoothing=0.1)
    S = torch.tensor(log_softmax(one.net))
    theirs = torch.nn.CrossEntropyLoss(
        weight=torch.tensor(BY_CLASS, dtype=S.dtype), label_smoothing=0.1
    )
    assert one.gradient(X, LABELS)[0] == pytest.approx(
        float(theirs(S, torch.tensor(LABELS))), rel=1e-13
    )
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    assert trainer(label_smoothing=0.1).gradient(X, SOFT)[0] == pytest.approx(
        float(theirs(S, torch.tensor(SOFT))), rel=1e-13
    )
    weights = torch.tensor(BY_CLASS)  # taken as it is
    assert trainer(class_weight=weights).loss.class_weight == tuple(BY_CLASS)


# -- runs ------------------------------------------------------------------------------------------


def test_class_weights_train_as_row_weights_do_and_accuracy_does_not_count_them():
    one, other = trainer(class_weight=dict(enumerate(BY_CLASS))), trainer()
    by_row = np.array(BY_CLASS)[LABELS]
    history = one.fit(X, LABELS, W, validation=(X[:30], LABELS[:30], W[:30]), **FIT)
    expected = other.fit(
        X, LABELS, W * by_row, validation=(X[:30], LABELS[:30], (W * by_row)[:30]), **FIT
    )
    for name in ("loss", "validation_loss"):
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-13)
    np.testing.assert_allclose(one.net.parameters, other.net.parameters, rtol=1e-12)
    right = one.net.predict(X).argmax(axis=1) == LABELS
    assert one.evaluate(X, LABELS, W)["accuracy"] == pytest.approx(np.average(right, weights=W))
    assert one.evaluate(X, LABELS)["accuracy"] == pytest.approx(right.mean())
    assert history["validation_accuracy"][-1] == pytest.approx(
        np.average(right[:30], weights=W[:30])
    )


def batches(weighted):
    def function():
        for i in range(0, ROWS, 16):
            part = slice(i, i + 16)
            yield (X[part], LABELS[part], W[part]) if weighted else (X[part], LABELS[part])

    return function


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["memmap", "function"])
def test_a_stream_trains_as_rows_in_memory_do(kind, weighted, tmp_path):
    table = (batches(weighted),)
    if kind == "memmap":
        X.tofile(tmp_path / "X")
        table = (
            np.memmap(tmp_path / "X", X.dtype, "r", shape=X.shape),
            LABELS,
            W if weighted else None,
        )
    options = {"class_weight": [0.5, 0.0, 0.25, 1.0]}
    one, other = trainer(**options), trainer(**options)
    stopping = {"early_stopping": mc.EarlyStopping(patience=1, monitor="validation_loss")}
    validation = table if kind == "memmap" else table[0]
    history = one.fit(*table, shuffle=False, validation=validation, **stopping, **FIT)
    memory = X, LABELS, W if weighted else None
    expected = other.fit(*memory, shuffle=False, validation=memory, **stopping, **FIT)
    for name in ("loss", "validation_loss", "validation_accuracy"):
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-12)
    np.testing.assert_array_equal(one.net.parameters, other.net.parameters)


def test_accuracy_counts_rows_whose_class_weighs_nothing_wherever_they_lie():
    one, order = trainer(class_weight={1: 0.0}), np.argsort(LABELS == 1, kind="stable")
    sorted_rows = [(X[part], LABELS[part]) for part in np.split(order, [np.sum(LABELS != 1)])]
    want, got = one.evaluate(X, LABELS), one.evaluate(sorted_rows)
    assert got["accuracy"] == pytest.approx(want["accuracy"])
    assert got["loss"] == pytest.approx(want["loss"])


OPTIONS = [
    ("softmax", "cross_entropy", {"class_weight": BY_CLASS, "label_smoothing": 0.1}, LABELS),
    ("sigmoid", "binary_cross_entropy", {"pos_weight": [2.0, 0.0, 0.5, 2.0]}, BINARY),
    ("sigmoid", "binary_cross_entropy", {"pos_weight": 2.0, "label_smoothing": 0.1}, BINARY),
]


@pytest.mark.parametrize(
    ("output", "loss", "options", "Y"), OPTIONS, ids=["classes", "outputs", "positives"]
)
def test_they_are_in_checkpoints_copies_and_repr(output, loss, options, Y, tmp_path):
    class Stop(mc.Callback):
        def step_end(self, trainer, J):
            if trainer.progress.step == 5:
                trainer.save(tmp_path / "run")
                raise KeyboardInterrupt

    def make():
        return mc.Trainer(network(output), loss, **options)

    one, another = make(), make()
    history = one.fit(X, Y, W, **FIT)
    with pytest.raises(KeyboardInterrupt):
        another.fit(X, Y, W, callbacks=[Stop()], **FIT)
    there = mc.Trainer.load(tmp_path / "run")
    assert there.loss == one.loss
    assert there.fit(X, Y, W, **FIT)["loss"] == history["loss"]
    np.testing.assert_array_equal(there.net.parameters, one.net.parameters)
    copy = pickle.loads(pickle.dumps(one))
    assert copy.step(X, Y) == one.step(X, Y)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(one)
        assert name not in repr(mc.Trainer(network(output), loss))
    assert "class_weight=(70 numbers)" in repr(
        mc.Trainer(network("softmax", 70), class_weight=np.ones(70))
    )


def test_a_trainer_keeps_the_options_of_the_loss_it_is_given():
    loss = mc.loss("cross_entropy", class_weight=BY_CLASS, label_smoothing=0.1).loss
    assert isinstance(loss, Loss)
    one = mc.Trainer(network(), loss, label_smoothing=0.2)
    assert one.loss.class_weight == tuple(BY_CLASS)
    assert one.loss.label_smoothing == 0.2
    assert (
        one.gradient(X, LABELS)[0]
        == trainer(class_weight=BY_CLASS, label_smoothing=0.2).gradient(X, LABELS)[0]
    )


def test_rows_that_another_trainer_prepared_have_that_ones_class_weights():
    one, data = trainer(class_weight=BY_CLASS), trainer().prepare(X, LABELS)
    for call in (one.step, one.gradient, one.evaluate, one.fit):
        with pytest.raises(
            ValueError,
            match=r"X was prepared by a trainer with class_weight=None; this one has \(0.5, 3.0",
        ):
            call(data)
    same = trainer(class_weight=BY_CLASS).prepare(X, LABELS)
    assert one.step(same) == trainer(class_weight=BY_CLASS).step(X, LABELS)


@pytest.mark.parametrize(
    ("sizes", "output", "loss"),
    [
        ([3, 2], "softmax", "cross_entropy"),
        ([3, 2], "identity", "squared_error"),
        ([4, 1], "identity", "squared_error"),
        ([3, 1], "identity", "absolute_error"),
    ],
)
def test_rows_that_were_prepared_for_another_network_or_loss_are_refused(sizes, output, loss):
    data = mc.Trainer(mc.MLP([3, 1]), "squared_error").prepare(np.eye(3), np.arange(3.0))
    other = mc.Trainer(mc.MLP(sizes, output=output), loss)
    message = rf"1 output.*squared_error; this one has {sizes[0]} input.*{sizes[1]} output.*{loss}$"
    for call in (other.step, other.gradient, other.evaluate, other.losses, other.fit):
        with pytest.raises(ValueError, match=message):
            call(data)


def test_no_option_is_no_change():
    plain, zero = trainer(), trainer(label_smoothing=0.0)
    assert plain.loss == zero.loss == losses.CROSS_ENTROPY
    assert not plain.loss.mixes(classes=False)
    (J, g), (K, h) = plain.gradient(X, SOFT), zero.gradient(X, SOFT)
    assert (J, g.tobytes()) == (K, h.tobytes())
    assert (
        plain.plan(64, rows=ROWS).total_bytes
        == trainer(label_smoothing=0.1).plan(64, rows=ROWS).total_bytes
    )


def test_the_weights_of_the_rows_are_in_the_plan_of_a_run_and_under_its_limit():
    rows = 3 * PIECE + 5
    X = RNG.standard_normal((rows, 3)).astype(np.float32)
    Y, plans = RNG.integers(0, CLASSES, rows), []

    def make(**limit):
        return mc.Trainer(network(dtype="float32"), "cross_entropy", class_weight=BY_CLASS, **limit)

    named = {x.name: x for buffers in make().plan(100, rows=rows).parts.values() for x in buffers}
    assert (named["row weights"].shape, named["row weights"].dtype) == ((rows,), "float32")
    assert (named["column weights"].shape, named["w"].dtype) == ((CLASSES,), "float32")

    def note(trainer, _):
        return plans.append(
            trainer._step.workspace.make_plan(
                100, trainer._step.workspace.inputs, trainer._step.workspace.reserved
            )
        )

    limit = make().plan(1, rows=rows).total_bytes + 4096
    make(memory_limit=limit).fit(X, Y, epochs=1, batch_size=100, callbacks=[note], progress=False)
    assert "row weights" in {x.name for x in plans[0].parts["fit"]}
    assert plans[0].total_bytes <= limit


# -- errors ----------------------------------------------------------------------------------------

REFUSED = [
    (
        {"class_weight": "balanced"},
        ValueError,
        r"class_weight must be a list .* got 'balanced'.*compute_class_weight",
    ),
    (
        {"class_weight": [1, 2]},
        ValueError,
        "class_weight must have one number per class, 4 in all; got 2",
    ),
    ({"class_weight": [1, 2, 3, -1]}, ValueError, r"class_weight\[3\] must be at least 0; got -1"),
    ({"class_weight": [1, 2, 3, np.nan]}, ValueError, r"class_weight\[3\] must be finite; got nan"),
    ({"class_weight": [1, 2, 3, "a"]}, TypeError, r"class_weight\[3\] must be a number; got 'a'"),
    ({"class_weight": np.zeros(4)}, ValueError, "class_weight must not be all zero"),
    (
        {"class_weight": 2.0},
        TypeError,
        "class_weight must be a list of one number per class; got 2.0",
    ),
    (
        {"class_weight": {4: 2.0}},
        ValueError,
        r"class_weight names the class 4; the classes are 0 … 3",
    ),
    ({"class_weight": {"a": 2.0}}, ValueError, r"class_weight names the class 'a'"),
    ({"class_weight": {0: -1}}, ValueError, r"class_weight\[0\] must be at least 0; got -1"),
    (
        {"label_smoothing": 1.0},
        ValueError,
        "label_smoothing must be at least 0 and less than 1; got 1",
    ),
    (
        {"label_smoothing": -0.1},
        ValueError,
        "label_smoothing must be at least 0 and less than 1; got -0.1",
    ),
    ({"label_smoothing": np.nan}, ValueError, "label_smoothing must be finite"),
    ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number; got '0.1'"),
    (
        {"pos_weight": 2.0},
        ValueError,
        "pos_weight is for the loss binary_cross_entropy; got loss 'cross_entropy'",
    ),
]
REFUSED_BINARY = [
    (
        {"pos_weight": [1.0, 2.0]},
        ValueError,
        r"pos_weight must be a number, or 4 numbers, one per output; got 2 numbers",
    ),
    ({"pos_weight": -1.0}, ValueError, "pos_weight must be at least 0; got -1"),
    ({"pos_weight": np.inf}, ValueError, "pos_weight must be finite; got inf"),
    ({"pos_weight": [1, 2, -3, 4]}, ValueError, r"pos_weight\[2\] must be at least 0; got -3"),
    (
        {"class_weight": [1.0, 2.0]},
        ValueError,
        "class_weight is for binary_cross_entropy of one output; the network has 4",
    ),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_what_cannot_be_is_refused_by_name(options, kind, message):
    with pytest.raises(kind, match=message):
        trainer(**options)


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED_BINARY)
def test_what_cannot_be_behind_a_sigmoid_is_refused_by_name(options, kind, message):
    with pytest.raises(kind, match=message):
        mc.Trainer(network("sigmoid"), "binary_cross_entropy", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"class_weight": [1, 2]},
        {"class_weight": {0: 1}},
        {"label_smoothing": 0.1},
        {"pos_weight": 2},
    ],
    ids=str,
)
def test_other_losses_have_no_such_options(options):
    with pytest.raises(
        ValueError, match=rf"{next(iter(options))} is for the loss .*; got loss 'squared_error'"
    ):
        mc.Trainer(network("identity"), "squared_error", **options)
    with pytest.raises(ValueError, match=rf"{next(iter(options))} is for the loss"):
        mc.loss("huber", **options)


def test_rows_that_weigh_nothing_by_their_class_are_no_batch():
    one, none = trainer(class_weight={2: 0.0}), LABELS == 2
    message = "sample_weight, times class_weight, must not be all zero"
    for call in (
        lambda: one.step(X[none], LABELS[none]),
        lambda: one.step(X, LABELS, rows=np.flatnonzero(none)),
        lambda: one.evaluate(X[none], LABELS[none]), lambda: one.fit(X[none], LABELS[none], **FIT),
        lambda: one.fit([(X[none], LABELS[none])], **FIT),
        lambda: one.evaluate([(X[none], LABELS[none])]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert np.isfinite(one.fit(X, LABELS, epochs=1, batch_size=1, progress=False)["loss"]).all()


def test_a_loss_for_another_number_of_classes_is_refused_at_every_door():
    net, loss, message = (
        network(outputs=3),
        trainer(class_weight=BY_CLASS).loss,
        "one number per class, 3 in all; got 4",
    )
    Y, v = LABELS % 3, np.zeros(network(outputs=3).parameters.size)
    for call in (
        lambda: mc.Trainer(net, loss), lambda: mc.check_gradients(net, X, Y, loss),
        lambda: net.hvp(X, Y, v, loss),
        lambda: mc.loss(loss)(net.predict(X), Y),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(
        TypeError, match=r"class_weight must be a list.*if there is no network; got a dict"
    ):
        mc.loss("cross_entropy", class_weight={0: 1})


@pytest.mark.parametrize(
    "call",
    [
        lambda net, X, Y, loss: net.hvp(X, Y, np.ones(net.layout.size), loss.loss),
        lambda net, X, Y, loss: net.gnvp(X, Y, np.ones(net.layout.size), loss.loss),
        lambda net, X, Y, loss: mc.check_gradients(net, X, Y, loss),
        lambda net, X, Y, loss: mc.Trainer(net, loss).gradient(X, Y),
        lambda net, X, Y, loss: loss(net.predict(X), Y),
    ],
    ids=["hvp", "gnvp", "check_gradients", "gradient", "mc.loss"],
)
def test_rows_whose_classes_all_weigh_nothing_are_refused_everywhere(call):
    loss = mc.loss("cross_entropy", class_weight=[0, 1])
    with pytest.raises(ValueError, match="sample_weight, times class_weight, must not be all zero"):
        call(mc.MLP([2, 2], output="softmax"), np.ones((5, 2)), np.zeros(5, int), loss)
