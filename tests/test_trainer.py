"""Whole runs: shuffled batches, validation, early stopping, callbacks, history, the same seed to
the bit.
"""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest

import mlpcore as mc


def blobs(rows=200, classes=3, seed=0, n_in=4):
    rng = np.random.default_rng(seed)
    Y = rng.integers(0, classes, rows)
    X = rng.standard_normal((rows, n_in)) + 3 * np.eye(n_in)[Y % n_in]
    return X.astype(np.float32), Y


def classifier(seed=0, dtype="float32", optimizer=None, **settings):
    net = mc.MLP([4, 8, 3], "tanh", "softmax", seed=seed, dtype=dtype)
    return mc.Trainer(net, optimizer=optimizer or mc.AdamW(1e-2), **settings)


def regressor(optimizer=None, **settings):
    return mc.Trainer(
        mc.MLP([4, 8, 2], "tanh", dtype="float64"),
        loss="squared_error",
        optimizer=optimizer or mc.Adam(1e-2),
        **settings,
    )


class Recorder(mc.Callback):
    """Writes down every call, with what it was given."""

    def __init__(self, calls, name="", stop_at=None):
        self.calls, self.name, self.stop_at = calls, name, stop_at

    def fit_begin(self, trainer):
        self.calls.append((self.name, "fit_begin"))

    def step_end(self, trainer, J):
        self.calls.append((self.name, "step_end", J))

    def epoch_end(self, trainer, entry):
        self.calls.append((self.name, "epoch_end", dict(entry)))
        return sum(call[:2] == (self.name, "epoch_end") for call in self.calls) == self.stop_at

    def fit_end(self, trainer, history):
        self.calls.append((self.name, "fit_end", history))


# -- the same, to the bit --------------------------------------------------------------------------

RUN = """
import numpy as np, mlpcore as mc, hashlib
rng = np.random.default_rng(0)
Y = rng.integers(0, 3, 200)
X = (rng.standard_normal((200, 4)) + 3 * np.eye(4)[Y]).astype(np.float32)
trainer = mc.Trainer(mc.MLP([4, 8, 3], "tanh", "softmax", seed=0), optimizer=mc.AdamW(1e-2), seed=5)
trainer.fit(X, Y, epochs=3, batch_size=32, validation=(X[:50], Y[:50]), progress=False)
print(hashlib.sha256(trainer.net.parameters.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_in_this_process_and_in_others():
    X, Y = blobs()
    digests = set()
    for _ in range(2):
        trainer = mc.Trainer(
            mc.MLP([4, 8, 3], "tanh", "softmax", seed=0), optimizer=mc.AdamW(1e-2), seed=5
        )
        trainer.fit(X, Y, epochs=3, batch_size=32, validation=(X[:50], Y[:50]), progress=False)
        digests.add(hashlib.sha256(trainer.net.parameters.tobytes()).hexdigest())
    for _ in range(2):
        digests.add(
            subprocess.run(
                [sys.executable, "-c", RUN], check=True, capture_output=True, text=True
            ).stdout.strip()
        )
    assert len(digests) == 1


def test_another_seed_of_the_trainer_or_the_network_gives_another_result():
    X, Y = blobs()

    def run(net_seed, seed, shuffle=True):
        trainer = mc.Trainer(mc.MLP([4, 8, 3], "tanh", "softmax", seed=net_seed), seed=seed)
        trainer.fit(X, Y, epochs=1, batch_size=32, progress=False, shuffle=shuffle)
        return trainer.net.parameters.tobytes()

    assert len({run(0, 0), run(0, 1), run(1, 0)}) == 3
    assert run(0, 0, shuffle=False) == run(0, 1, shuffle=False) != run(0, 0)


def test_two_fits_go_on_where_the_first_ended_and_shuffle_anew():
    X, Y = blobs()
    once, twice = classifier(), classifier()
    once.fit(X, Y, epochs=4, batch_size=32, progress=False)
    for _ in range(2):
        twice.fit(X, Y, epochs=2, batch_size=32, progress=False)
    assert once.progress.step == twice.progress.step == 4 * 7
    orders = []
    for _ in range(2):
        seen = []
        trainer = _weights_of_rows(seen)
        trainer.fit(
            np.eye(9), np.ones(9), epochs=2, batch_size=1, progress=False, callbacks=[_Watch(seen)]
        )
        orders.append(tuple(seen))
    assert orders[0] == orders[1]
    assert orders[0][:9] != orders[0][9:]


# -- batches ---------------------------------------------------------------------------------------


def _weights_of_rows(seen):
    """A net whose weight i moves by exactly the share of row i in a batch: it shows which rows a
    step has used.
    """
    net = mc.MLP([9, 1], bias=False, init="zeros", dtype="float64")
    seen.clear()
    return mc.Trainer(net, loss=mc.Loss("count", "-z", "0 * z - 1"), optimizer=mc.SGD(1.0))


class _Watch(mc.Callback):
    def __init__(self, seen):
        self.seen, self.last = seen, None

    def fit_begin(self, trainer):
        self.last = trainer.net.parameters.copy()

    def step_end(self, trainer, J):
        moved = trainer.net.parameters - self.last
        self.seen.append(tuple(np.flatnonzero(moved).tolist()))
        rows = len(self.seen[-1])
        np.testing.assert_allclose(moved[moved != 0], 1 / rows, rtol=1e-12)
        self.last = trainer.net.parameters.copy()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 9, 100])
def test_an_epoch_takes_every_row_once_the_last_batch_is_what_is_left(batch_size, shuffle):
    seen = []
    trainer = _weights_of_rows(seen)
    trainer.fit(
        np.eye(9),
        np.ones(9),
        epochs=3,
        batch_size=batch_size,
        shuffle=shuffle,
        progress=False,
        callbacks=[_Watch(seen)],
    )
    per_epoch = -(-9 // batch_size)
    assert len(seen) == trainer.progress.step == 3 * per_epoch
    epochs = [seen[i * per_epoch : (i + 1) * per_epoch] for i in range(3)]
    for epoch in epochs:
        assert sorted(row for rows in epoch for row in rows) == list(range(9))
        assert [len(rows) for rows in epoch] == [min(batch_size, 9)] * (9 // min(batch_size, 9)) + (
            [9 % batch_size] if batch_size < 9 and 9 % batch_size else []
        )
    if not shuffle:
        assert [row for rows in epochs[0] for row in rows] == list(range(9))
        assert epochs[0] == epochs[1] == epochs[2]
    elif batch_size < 5:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_an_epochs_loss_is_the_mean_over_its_rows_each_batch_by_its_weight():
    X, Y = blobs(50)
    w = np.random.default_rng(0).uniform(0, 2, 50)
    w[:12] = 0
    frozen = classifier(optimizer=mc.SGD(0.0), dtype="float64")
    for weights in (None, w):
        history = frozen.fit(X, Y, weights, epochs=1, batch_size=8, progress=False)
        J, _ = mc.loss("cross_entropy")(frozen.net.forward(X).output, Y, sample_weight=weights)
        assert history["loss"] == [pytest.approx(J, rel=1e-12)]


def test_a_batch_of_rows_that_weigh_nothing_is_passed_over():
    seen, calls = [], []
    trainer = _weights_of_rows(seen)
    w = np.array([0.0] * 6 + [1.0] * 3)
    trainer.fit(
        np.eye(9),
        np.ones(9),
        w,
        epochs=2,
        batch_size=3,
        shuffle=False,
        progress=False,
        callbacks=[_Watch(seen), Recorder(calls)],
    )
    assert seen == [(6, 7, 8)] * 2
    assert trainer.progress.step == 2


def test_fit_equals_steps_on_the_rows_of_its_order():
    X, Y = blobs(30)
    by_fit, by_step = classifier(dtype="float64"), classifier(dtype="float64")
    by_fit.fit(X, Y, epochs=2, batch_size=8, shuffle=False, progress=False)
    for _ in range(2):
        for start in range(0, 30, 8):
            by_step.step(X[start : start + 8], Y[start : start + 8])
    np.testing.assert_array_equal(by_fit.net.parameters, by_step.net.parameters)


@pytest.mark.parametrize(
    ("output", "loss"),
    [("identity", "squared_error"), ("softmax", "cross_entropy"),
        (("sigmoid", 2.0), "binary_cross_entropy"),
     ("exp", "poisson"), ("tanh", "squared_error"),
     (mc.Activation("own", "s * s", "2 * s"), "squared_error")],
)  # fmt: skip
def test_without_a_loss_a_trainer_takes_the_one_that_fits_the_output(output, loss, tmp_path):
    trainer = mc.Trainer(mc.MLP([4, 3], output=output))
    assert trainer.loss.name == loss
    trainer.step(np.eye(4), np.full((4, 3), 1 / 3))
    trainer.save(tmp_path / "run")
    assert mc.Trainer.load(tmp_path / "run").loss == trainer.loss


# -- figures ---------------------------------------------------------------------------------------


def test_evaluate_equals_the_loss_and_plain_accuracy_with_and_without_weights():
    X, Y = blobs(3000)
    trainer = classifier(l2=0.5, dtype="float64")
    trainer.fit(X[:200], Y[:200], epochs=2, progress=False)
    P = trainer.net.predict(X)
    w = np.random.default_rng(1).uniform(0, 1, 3000)
    for weights in (None, w):
        found = trainer.evaluate(X, Y, weights)
        assert list(found) == ["loss", "accuracy"]
        # without penalties
        assert found["loss"] == pytest.approx(mc.loss("cross_entropy")(P, Y, weights)[0], rel=1e-12)
        assert found["accuracy"] == pytest.approx(
            np.average(P.argmax(axis=1) == Y, weights=weights), rel=1e-12
        )
    hot = trainer.evaluate(X, np.eye(3)[Y])
    assert hot["accuracy"] == pytest.approx((P.argmax(axis=1) == Y).mean())
    assert hot["loss"] == pytest.approx(mc.loss("cross_entropy")(P, Y)[0])


def test_accuracy_of_soft_labels_is_the_share_of_rows_whose_likeliest_classes_agree():
    rng = np.random.default_rng(2)
    X, soft = rng.standard_normal((500, 4)), rng.dirichlet(np.ones(3), 500)
    trainer = classifier(dtype="float64")
    P = trainer.net.predict(X)
    for Y in (soft, soft.astype(np.float32)):
        assert trainer.evaluate(X, Y)["accuracy"] == pytest.approx(
            (P.argmax(axis=1) == soft.argmax(axis=1)).mean()
        )


@pytest.mark.parametrize("labels", ["any number of ones", "one a row"])
def test_accuracy_of_several_yes_or_no_outputs_is_the_share_of_right_outputs(labels):
    rng = np.random.default_rng(3)
    X, Y = rng.standard_normal((2500, 4)), rng.integers(0, 2, (2500, 3)).astype(float)
    if labels == "one a row":
        Y = np.eye(3)[rng.integers(0, 3, 2500)]
    net = mc.MLP([4, 3], output="sigmoid", dtype="float64")
    for loss in ("binary_cross_entropy",):
        trainer = mc.Trainer(net, loss=loss)
        assert trainer.evaluate(X, Y)["accuracy"] == pytest.approx(
            ((net.predict(X) > 0.5) == Y).mean()
        )


def test_accuracy_of_one_yes_or_no_output():
    rng = np.random.default_rng(4)
    X, Y = rng.standard_normal((500, 4)), rng.integers(0, 2, 500)
    net = mc.MLP([4, 1], output=("sigmoid", 2.0), dtype="float64")
    trainer = mc.Trainer(net, loss="binary_cross_entropy")
    for target in (Y, Y[:, None], Y.astype(bool), Y.astype(np.float32)):
        assert trainer.evaluate(X, target)["accuracy"] == pytest.approx(
            ((net.predict(X)[:, 0] > 0.5) == Y).mean()
        )


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_r2_is_averaged_over_outputs_and_stands_a_shift_of_y(shift):
    rng = np.random.default_rng(5)
    X = rng.standard_normal((2500, 4))
    Y = X @ rng.standard_normal((4, 2)) + rng.standard_normal((2500, 2)) * [0.5, 3.0] + shift
    trainer = regressor()
    trainer.net.b[2][...] = shift
    Z = trainer.net.predict(X)
    w = rng.uniform(0, 1, 2500)
    for weights in (None, w):
        share = np.ones(2500) if weights is None else weights
        mean = np.average(Y, axis=0, weights=share)
        r2 = 1 - (share @ (Y - Z) ** 2) / (share @ (Y - mean) ** 2)
        found = trainer.evaluate(X, Y, weights)
        assert list(found) == ["loss", "r2"]
        assert found["r2"] == pytest.approx(r2.mean(), rel=1e-6 if shift else 1e-9)


@pytest.mark.parametrize("rows", [50, 5000])
def test_validation_figures_in_fit_are_those_of_evaluate(rows):
    X, Y = blobs()
    Xv, Yv = blobs(rows, seed=1)
    found = []
    trainer = classifier()
    history = trainer.fit(
        X,
        Y,
        epochs=3,
        batch_size=32,
        validation=(Xv, Yv),
        progress=False,
        callbacks=[lambda t, entry: found.append(t.evaluate(Xv, Yv))],
    )
    assert history["validation_loss"] == [entry["loss"] for entry in found]
    assert history["validation_accuracy"] == [entry["accuracy"] for entry in found]


@pytest.mark.parametrize(
    "kind",
    [
        "other dtype of X",
        "other dtype of Y",
        "one-hot",
        "weights in training only",
        "weights in validation only",
        "few rows",
        "one row",
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_validation_data_may_be_of_another_kind_than_the_training_data(kind, workers):
    """Workspace made for the one must not be used for the other."""
    X, Y = blobs(300)
    Xv, Yv = blobs(70, seed=1)
    w = np.random.default_rng(0).uniform(0.5, 1, 300)
    weights, validation = None, (Xv, Yv)
    if kind == "other dtype of X":
        validation = (Xv.astype(np.float64), Yv)
    elif kind == "other dtype of Y":
        validation = (Xv, Yv.astype(np.int8))
    elif kind == "one-hot":
        validation = (Xv, np.eye(3)[Yv])
    elif kind == "weights in training only":
        weights = w
    elif kind == "weights in validation only":
        validation = (Xv, Yv, w[:70])
    elif kind == "few rows":
        validation = (Xv[:5].astype(np.float64), Yv[:5])
    else:
        validation = (Xv[:1], Yv[:1])
    plain, validated = (classifier(workers=workers, chunk_rows=16) for _ in range(2))
    plain.fit(X, Y, weights, epochs=3, batch_size=64, progress=False)
    history = validated.fit(
        X, Y, weights, epochs=3, batch_size=64, validation=validation, progress=False
    )
    np.testing.assert_array_equal(validated.net.parameters, plain.net.parameters)
    assert history["validation_loss"][-1] == pytest.approx(
        mc.loss("cross_entropy")(plain.net.predict(validation[0]), *validation[1:])[0], rel=1e-5
    )


def test_evaluating_ten_times_the_rows_between_epochs_changes_no_later_bit():
    X, Y = blobs(300)
    big, Ybig = blobs(3000, seed=2)
    plain, disturbed = classifier(), classifier()
    plain.fit(X, Y, epochs=3, batch_size=64, progress=False)
    disturbed.fit(
        X,
        Y,
        epochs=3,
        batch_size=64,
        progress=False,
        callbacks=[
            lambda trainer, entry: trainer.evaluate(big.astype(np.float64), Ybig, np.ones(3000))
        ],
    )
    np.testing.assert_array_equal(plain.net.parameters, disturbed.net.parameters)
    plain.step(X, Y)
    disturbed.evaluate(big, Ybig)
    disturbed.step(X, Y)
    np.testing.assert_array_equal(plain.net.parameters, disturbed.net.parameters)


def test_a_callback_may_take_steps_of_its_own():
    X, Y = blobs(100)
    trainer = classifier()
    trainer.fit(
        X,
        Y,
        epochs=2,
        batch_size=32,
        progress=False,
        callbacks=[lambda t, entry: t.step(X[:3].astype(np.float64), Y[:3], np.ones(3))],
    )
    assert trainer.progress.step == 2 * (4 + 1)


# -- early stopping --------------------------------------------------------------------------------


def overfitting():
    rng = np.random.default_rng(0)
    X, Xv = rng.standard_normal((20, 4)), rng.standard_normal((200, 4))
    return X, rng.integers(0, 3, 20), Xv, rng.integers(0, 3, 200)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("monitor", ["validation_loss", "validation_accuracy"])
def test_early_stopping_stops_after_patience_and_puts_the_best_weights_back(monitor, restore):
    X, Y, Xv, Yv = overfitting()
    trainer, kept = classifier(optimizer=mc.Adam(3e-2)), []
    stopping = mc.EarlyStopping(patience=4, monitor=monitor, restore_best=restore)
    history = trainer.fit(
        X,
        Y,
        epochs=200,
        batch_size=5,
        validation=(Xv, Yv),
        early_stopping=stopping,
        progress=False,
        callbacks=[lambda t, entry: kept.append(t.net.parameters.copy())],
    )
    figures = np.array(history[monitor]) * (1 if monitor.endswith("accuracy") else -1)
    best = int(np.argmax(figures))
    assert len(figures) == best + 1 + 4 < 200
    np.testing.assert_array_equal(trainer.net.parameters, kept[best if restore else -1])


def test_early_stopping_may_watch_the_training_loss_and_a_minimum_change():
    X, Y, _, _ = overfitting()
    trainer = classifier(optimizer=mc.SGD(1e-4))
    stopping = mc.EarlyStopping(patience=3, monitor="loss", minimum_change=0.5)
    assert len(trainer.fit(X, Y, epochs=50, early_stopping=stopping, progress=False)["loss"]) == 4


def test_the_best_weights_come_back_also_when_the_last_epoch_ends_the_run():
    X, Y, Xv, Yv = overfitting()
    trainer, kept = classifier(optimizer=mc.Adam(3e-2)), []
    history = trainer.fit(
        X,
        Y,
        epochs=40,
        batch_size=5,
        validation=(Xv, Yv),
        early_stopping=mc.EarlyStopping(patience=100),
        progress=False,
        callbacks=[lambda t, entry: kept.append(t.net.parameters.copy())],
    )
    best = int(np.argmin(history["validation_loss"]))
    assert best < 39 == len(history["loss"]) - 1
    np.testing.assert_array_equal(trainer.net.parameters, kept[best])


def test_a_figure_that_is_not_a_number_is_never_the_best():
    stopping = mc.EarlyStopping()
    assert not stopping.improves(math.nan, None)
    assert stopping.improves(1.0, None)
    assert stopping.improves(0.5, 1.0)
    assert not stopping.improves(1.0, 1.0)


@pytest.mark.parametrize(
    ("stopping", "validated", "message"),
    [
        (mc.EarlyStopping(), False, "validation_loss.*no validation="),
        (mc.EarlyStopping(monitor="validation_los"), True, "did you mean 'validation_loss'"),
        (mc.EarlyStopping(monitor="validation_r2"), True, "validation_accuracy"),
    ],
)
def test_a_figure_that_will_not_be_there_is_refused_before_training(stopping, validated, message):
    X, Y = blobs(20)
    trainer = classifier()
    with pytest.raises(ValueError, match=message):
        trainer.fit(
            X, Y, validation=(X, Y) if validated else None, early_stopping=stopping, progress=False
        )
    assert trainer.progress.step == 0


# -- callbacks, history, progress ------------------------------------------------------------------


def test_callbacks_are_called_in_order_with_what_happened():
    X, Y = blobs(20)
    calls = []
    history = classifier().fit(
        X,
        Y,
        epochs=2,
        batch_size=10,
        progress=False,
        callbacks=[Recorder(calls, "a"), Recorder(calls, "b")],
    )
    order = [call[:2] for call in calls]

    def both(what):
        return [("a", what), ("b", what)]

    epoch = [*both("step_end"), *both("step_end"), *both("epoch_end")]
    assert order == [*both("fit_begin"), *epoch, *epoch, *both("fit_end")]
    entries = [call[2] for call in calls if call[:2] == ("a", "epoch_end")]
    assert {key: [entry[key] for entry in entries] for key in entries[0]} == history
    losses = [call[2] for call in calls if call[:2] == ("a", "step_end")]
    assert history["loss"] == [
        pytest.approx(np.mean(losses[:2])),
        pytest.approx(np.mean(losses[2:])),
    ]
    assert calls[-1][2] is history


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_returns_true_stops_and_the_others_still_see_the_epoch(first):
    X, Y = blobs(20)
    calls = []
    callbacks = [Recorder(calls, "stops", stop_at=2), Recorder(calls, "sees")]
    history = classifier().fit(
        X, Y, epochs=9, callbacks=callbacks if first else callbacks[::-1], progress=False
    )
    assert len(history["loss"]) == 2
    assert sum(call[:2] == ("sees", "epoch_end") for call in calls) == 2
    assert sum(call[1] == "fit_end" for call in calls) == 2


def test_a_function_is_an_epoch_end_and_only_true_itself_stops():
    X, Y = blobs(20)
    seen = []
    history = classifier().fit(
        X,
        Y,
        epochs=3,
        progress=False,
        callbacks=[lambda trainer, entry: seen.append(entry["loss"]) or 1],
    )
    assert seen == history["loss"]
    assert len(seen) == 3
    assert (
        len(
            classifier().fit(
                X,
                Y,
                epochs=3,
                progress=False,
                callbacks=[lambda trainer, entry: entry["loss"] < 99],
            )["loss"]
        )
        == 1
    )


def test_what_is_no_callback_is_refused_before_training():
    X, Y = blobs(20)
    for bad, message in (
        ([3], r"callbacks\[0\]"),
        ([mc.Callback], r"callbacks\[0\]"),
        (mc.Callback(), "callbacks must be a list"),
    ):
        trainer = classifier()
        with pytest.raises(TypeError, match=message):
            trainer.fit(X, Y, callbacks=bad, progress=False)
        assert trainer.progress.step == 0


def test_history_has_a_list_a_figure_and_an_entry_an_epoch():
    X, Y = blobs(50)
    plain = classifier(optimizer=mc.SGD(mc.StepDecay(0.1, every=4, factor=0.5))).fit(
        X, Y, epochs=3, batch_size=20, progress=False
    )
    assert set(plain) == {"loss", "learning_rate", "seconds"}
    assert plain["learning_rate"] == [0.1, 0.05, 0.025]  # of the last of three steps each
    full = classifier().fit(X, Y, epochs=3, validation=(X, Y), progress=False)
    assert set(full) == {
        "loss",
        "learning_rate",
        "seconds",
        "validation_loss",
        "validation_accuracy",
    }
    assert {len(column) for column in full.values()} == {3}
    assert all(type(x) is float for column in full.values() for x in column)
    numbers = regressor().fit(
        X, np.eye(3)[Y][:, :2], epochs=1, validation=(X, np.eye(3)[Y][:, :2]), progress=False
    )
    assert set(numbers) == {"loss", "learning_rate", "seconds", "validation_loss", "validation_r2"}


def test_a_bar_is_written_only_on_request(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    X, Y = blobs(50)
    classifier().fit(X, Y, epochs=2, progress=False)
    quiet = capsys.readouterr()
    assert quiet.out == quiet.err == ""
    classifier().fit(X, Y, epochs=2, validation=(X, Y), progress=True)
    err = capsys.readouterr().err
    for part in ("epoch 2/2", "row/s", "loss=", "validation_accuracy="):
        assert part in err


def test_training_gets_better():
    X, Y = blobs(400)
    trainer = classifier()
    history = trainer.fit(X, Y, epochs=30, batch_size=32, validation=(X, Y), progress=False)
    assert history["loss"][-1] < 0.3 * history["loss"][0]
    assert history["validation_accuracy"][-1] > 0.9
    assert history["learning_rate"] == [1e-2] * 30


# -- what users bring ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_custom_activation_and_a_custom_loss_train(dtype):
    bent = mc.Activation(
        "bent", "(sqrt(s * s + 1) - 1) / 2 + a * s", "s / (2 * sqrt(s * s + 1)) + a", 1.0
    )
    quartic = mc.Loss(
        "quartic", "(z - y) * (z - y) * (z - y) * (z - y)", "4 * (z - y) * (z - y) * (z - y)"
    )
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 4))
    Y = np.tanh(X @ rng.standard_normal((4, 2)))
    net = mc.MLP([4, 8, 2], bent, dtype=dtype)
    trainer = mc.Trainer(net, loss=quartic, optimizer=mc.Adam(1e-2))
    history = trainer.fit(X, Y, epochs=40, batch_size=32, validation=(X, Y), progress=False)
    assert history["loss"][-1] < 0.1 * history["loss"][0]
    assert history["validation_loss"][-1] == pytest.approx(
        ((net.predict(X) - Y) ** 4).sum(axis=1).mean(), rel=1e-4
    )
    assert net.parameters.dtype == dtype


def test_a_float64_network_is_trained_in_float64():
    X, Y = blobs(100)
    narrow, wide = classifier(), classifier(dtype="float64")
    for trainer in (narrow, wide):
        trainer.fit(X, Y, epochs=2, batch_size=16, progress=False)
    assert wide.net.parameters.dtype == np.float64
    difference = abs(wide.net.parameters - narrow.net.parameters).max()
    assert 0 < difference < 1e-3
    assert (wide.net.parameters != wide.net.parameters.astype(np.float32)).any()


@pytest.mark.parametrize("output", ["softmax", "sigmoid", "identity"])
def test_every_loss_trains_on_an_output_that_does_not_match_it(output):
    rng = np.random.default_rng(1)
    X = rng.standard_normal((200, 4))
    Y = np.eye(3)[X[:, :3].argmax(axis=1)]
    net = mc.MLP([4, 16, 3], "tanh", output)
    trainer = mc.Trainer(net, loss=("huber", 0.5), optimizer=mc.Adam(1e-2))
    history = trainer.fit(X, Y, epochs=30, batch_size=32, validation=(X, Y), progress=False)
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["validation_r2"][-1] > 0.3


def test_a_loss_that_turns_non_finite_in_fit_says_so_and_training_can_go_on():
    X, Y = blobs(64)
    overflow = X.copy()
    overflow[60] = 3e30
    trainer = mc.Trainer(
        mc.MLP([4, 8, 1], "relu"), loss="squared_error", optimizer=mc.SGD(mc.Cosine(1e-3))
    )
    with pytest.raises(mc.NonFiniteLoss) as caught:
        trainer.fit(
            overflow, Y.astype(float), epochs=1, batch_size=8, shuffle=False, progress=False
        )
    assert caught.value.step == 8
    assert trainer.progress.step == 7
    assert np.isfinite(trainer.net.parameters).all()
    with pytest.raises(ValueError, match="outside fit"):  # the run that failed is over
        trainer.step(X, Y.astype(float))
    assert math.isfinite(trainer.fit(X, Y.astype(float), epochs=1, progress=False)["loss"][0])


def test_clipping_penalties_and_chunks_work_together_in_fit():
    X, Y = blobs(100)
    one, other = (
        classifier(clip_norm=0.1, l1=1e-3, l2=1e-2, dtype="float64", chunk_rows=rows)
        for rows in (7, 1000)
    )
    for trainer in (one, other):
        trainer.fit(X, Y, epochs=3, batch_size=32, progress=False)
    np.testing.assert_allclose(one.net.parameters, other.net.parameters, rtol=1e-6, atol=1e-9)


def test_precision_on_a_cpu_is_announced_and_changes_nothing(caplog):
    X, Y = blobs(50)
    with caplog.at_level("WARNING", "mlpcore"):
        asked = classifier(precision="bfloat16")
    assert "bfloat16" in caplog.text
    assert "float32" in caplog.text
    plain = classifier()
    for trainer in (asked, plain):
        trainer.step(X, Y)
    np.testing.assert_array_equal(asked.net.parameters, plain.net.parameters)


def test_a_trainer_says_what_it_is():
    text = repr(classifier(optimizer=mc.SGD(0.1)))
    for part in ("4-8-3", "cross_entropy", "SGD(learning_rate=0.1", "step 0"):
        assert part in text
