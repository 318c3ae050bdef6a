"""Stretches: many steps in one call give what steps one by one give, and are counted alike."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends.compiled import compiler
from mlpcore.engine import stretch
from mlpcore.engine.cpu_step import CpuStep

pytestmark = pytest.mark.skipif(bool(compiler.why_not()), reason=compiler.why_not())
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((203, 5)), RNG.standard_normal((203, 3))
LABELS, SHARES = RNG.integers(0, 3, 203), RNG.random((203, 3))
FIT = {"epochs": 3, "batch_size": 8, "progress": False}
CASES = {
    "plain": {},
    "momentum": {"optimizer": mc.SGD(0.01, momentum=0.9, nesterov=True)},
    "adamw": {"optimizer": mc.AdamW(0.01, weight_decay=0.1)},
    "layers": {"optimizer": mc.AdamW(0.01, layers={1: mc.Layer(rate=0.1, weight_decay=0.3)})},
    "lion": {"optimizer": mc.Lion(0.001)},
    "cosine": {"optimizer": mc.Adam(mc.Cosine(0.01, warmup=7))},
    "clipped": {"clip_norm": 0.2},
    "penalised": {"l1": 0.01, "l2": 0.1},
    "dropout": {"dropout": 0.3, "seed": 5},
    "chunks": {"chunk_rows": 3, "dropout": 0.2},
    "workers": {"workers": 3, "chunk_rows": 2, "dropout": 0.2, "l1": 0.01},
    "all": {"optimizer": mc.AdamW(0.01), "clip_norm": 0.5, "l2": 0.01, "dropout": 0.2},
}


def make(dtype="float64", sizes=(5, 7, 6, 3), hidden="tanh", loss="squared_error", **settings):
    name = getattr(loss, "name", loss)
    output = {"cross_entropy": "softmax", "binary_cross_entropy": "sigmoid"}.get(name, "identity")
    net = mc.MLP(sizes, hidden, output, dtype=dtype, device="cpu", seed=1)
    optimizer = settings.pop("optimizer", None) or mc.SGD(0.01)
    return mc.Trainer(net, loss, optimizer, **settings)


@pytest.fixture
def lengths(monkeypatch):
    """The number of steps of each call; `one_by_one` makes them run without stretches."""
    found, real = [], stretch.Stretch.run

    def run(self, batch, first, rates, *rest):
        found.append(len(rates))
        return real(self, batch, first, rates, *rest)

    monkeypatch.setattr(stretch.Stretch, "run", run)
    return found


def one_by_one(monkeypatch):
    monkeypatch.setattr(CpuStep, "_stretch", lambda *_: None)


def results(trainer, X, Y, **fit):
    history = trainer.fit(X, Y, **{**FIT, **fit})
    vectors, facts = trainer._step.snapshot()
    state = {name: vector.copy() for name, vector in vectors.items()}
    return history["loss"], trainer.net.parameters.copy(), state, facts["updates"]


def agree(found, expected, dtype="float64"):
    rtol = 1e-9 if dtype == "float64" else 2e-3
    np.testing.assert_allclose(found[0], expected[0], rtol=rtol)
    scale = abs(expected[1]).max()
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=rtol * scale)
    assert found[2].keys() == expected[2].keys()
    for name, vector in expected[2].items():
        np.testing.assert_allclose(found[2][name], vector, rtol=0, atol=rtol * abs(vector).max())
    assert found[3] == expected[3]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_a_stretch_gives_what_single_steps_give(name, dtype, lengths, monkeypatch):
    found = results(make(dtype, **CASES[name]), X, Y)
    assert max(lengths) == 25
    one_by_one(monkeypatch)
    agree(found, results(make(dtype, **CASES[name]), X, Y), dtype)


@pytest.mark.parametrize(
    ("hidden", "loss", "targets"),
    [
        ("relu", "cross_entropy", LABELS),
        ("gelu", "cross_entropy", SHARES / SHARES.sum(1, keepdims=True)),
        ("elu", "binary_cross_entropy", (SHARES > 0.5).astype(np.float64)),
        ("softplus", "huber", Y),
    ],
)
def test_a_stretch_takes_every_kind_of_loss(hidden, loss, targets, lengths, monkeypatch):
    settings = {"hidden": hidden, "loss": loss, "optimizer": mc.Adam(0.01)}
    found = results(make(**settings), X, targets)
    assert max(lengths) == 25
    one_by_one(monkeypatch)
    agree(found, results(make(**settings), X, targets))


@pytest.mark.parametrize(
    ("rows", "targets"),
    [
        (X.astype(np.float32), Y.astype(np.float32)),
        ((X * 9).astype(np.int8), (Y * 9).astype(np.int64)),
        (np.asfortranarray(X), Y[:, ::-1]),
        (X[:, ::-1], np.asfortranarray(Y)),
        (np.repeat(X, 2, 0)[::2], Y),
        (X > 0, Y),
    ],
    ids=["float32", "integers", "by columns", "reversed", "every other row", "booleans"],
)
def test_a_stretch_reads_arrays_of_any_layout(rows, targets, monkeypatch, lengths):
    found = results(make(), rows, targets)
    assert max(lengths) == 25
    one_by_one(monkeypatch)
    agree(found, results(make(), rows, targets))


@pytest.mark.parametrize("sizes", [(5, 3), (5, 1, 3), (5, 2, 2, 2, 2, 2, 3), (5, 65, 3)])
@pytest.mark.parametrize("batch", [1, 2, 7, 203, 1000])
def test_nets_and_batches_of_any_size(sizes, batch, monkeypatch):
    fit = {"batch_size": batch, "epochs": 2, "shuffle": False}
    found = results(make(sizes=sizes), X, Y, **fit)
    one_by_one(monkeypatch)
    agree(found, results(make(sizes=sizes), X, Y, **fit))


def test_a_step_has_the_same_bits_in_a_stretch_of_any_length(monkeypatch):
    settings = CASES["all"] | {"dtype": "float32"}
    expected = results(make(**settings), X, Y)[1]
    for length in (1, 2, 3, 8):
        monkeypatch.setattr(stretch, "choose_length", lambda *_, n=length: max(n, 2))
        monkeypatch.setattr(stretch, "SECONDS", 1.0)
        if length == 1:
            monkeypatch.setattr(CpuStep, "together", lambda *_: 1)
        np.testing.assert_array_equal(results(make(**settings), X, Y)[1], expected)
        monkeypatch.undo()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_a_step_has_the_same_bits_on_any_number_of_threads(loss, workers, monkeypatch):
    monkeypatch.setattr(stretch, "choose_threads", lambda *_: 5)
    settings = CASES["all"] | {"dtype": "float32", "loss": loss, "sizes": (5, 70, 40, 3)}
    settings |= {"workers": workers, "chunk_rows": 40}
    rows, targets = np.tile(X, (8, 1)), np.tile(LABELS if loss == "cross_entropy" else Y.T, 8).T
    fit = {"batch_size": 211, "epochs": 5}
    found = []
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr(stretch.Stretch, "_choose_threads", lambda self, n=threads: n)
        found.append(results(make(**settings), rows, targets, **fit))
        assert found[-1][0] == found[0][0]
        np.testing.assert_array_equal(found[-1][1], found[0][1])


def on_threads(monkeypatch, count):
    monkeypatch.setattr(stretch, "choose_threads", lambda *_: count)
    monkeypatch.setattr(stretch.Stretch, "_choose_threads", lambda self: count)


def test_calls_of_several_threads_at_once_do_not_disturb_each_other(monkeypatch):
    on_threads(monkeypatch, 3)
    expected = results(make(workers=3), X, Y, epochs=40)[1]
    found = {}

    def train(number):
        found[number] = results(make(workers=3), X, Y, epochs=40)[1]

    threads = [threading.Thread(target=train, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for parameters in found.values():
        np.testing.assert_array_equal(parameters, expected)
    assert len(found) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_helpers_of_its_own():
    code = """
import os, zlib, numpy as np, mlpcore as mc
from mlpcore.engine import stretch
stretch.choose_threads = lambda *_: 3
stretch.Stretch._choose_threads = lambda self: 3
X, Y = np.ones((64, 3)), np.ones((64, 2))
trainer = mc.Trainer(mc.MLP([3, 8, 2], seed=0), "squared_error", mc.SGD(0.1), workers=3)
trainer.fit(X, Y, epochs=3, batch_size=8, progress=False)
child = os.fork()
threads = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
trainer.fit(X, Y, epochs=3, batch_size=8, progress=False)
more = len(os.listdir("/proc/self/task")) - threads if threads else 2 * (child == 0)
print(more, zlib.crc32(trainer.net.parameters.tobytes()), flush=True)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    (more, ours), (none, theirs) = sorted(
        (line.split() for line in done.stdout.splitlines()), reverse=True
    )
    assert int(more) - int(none) == 2  # BLAS starts threads of its own again in both
    assert ours == theirs


def test_what_cannot_be_in_a_stretch_runs_alone(lengths):
    class Own(mc.SGD):
        def scalars(self, progress):
            return super().scalars(progress)

    for settings in (
        {"on_non_finite": "skip"},
        {"optimizer": Own(0.01)},
        {"optimizer": mc.SGD(0.01, layers={1: mc.Layer(frozen=True)})},
    ):
        make(**settings).fit(X[:200], Y[:200], **FIT)
    make().fit(X, Y, sample_weight=np.ones(len(X)), **FIT)
    weighted = mc.loss("cross_entropy", class_weight=[1, 2, 3])
    make(hidden="prelu").fit(X, Y, **FIT)
    mc.Trainer(mc.MLP([5, 3], output="softmax", device="cpu"), weighted).fit(X, LABELS, **FIT)
    make().fit(X.astype(">f8"), Y, **FIT)
    make().fit(X.astype(np.float16), Y, **FIT)
    assert not lengths


def test_the_step_that_is_not_finite_is_named_and_changes_nothing(lengths):
    rows = X.copy()
    trainer, expected = make(hidden="relu"), make(hidden="relu")
    rows[100] = 1e200
    with pytest.raises(mc.NonFiniteLoss, match=r"step 13: the loss is inf.*it began in layer"):
        trainer.fit(rows, Y, shuffle=False, **FIT)
    assert lengths
    for start in range(0, 96, 8):
        expected.step(X[start : start + 8], Y[start : start + 8])
    np.testing.assert_allclose(trainer.net.parameters, expected.net.parameters, rtol=1e-12)
    assert trainer.progress.step == 12


def test_an_update_that_may_overflow_is_tried_alone(lengths, monkeypatch):
    settings = {"dtype": "float32", "optimizer": mc.Adam(0.01, epsilon=1e-34)}
    found = results(make(**settings), X, Y)
    assert len(lengths) > 60
    one_by_one(monkeypatch)
    agree(found, results(make(**settings), X, Y), "float32")


def test_settings_may_change_between_fits_and_steps(lengths, monkeypatch):
    def train():
        trainer = make(optimizer=mc.Adam(0.01))
        trainer.fit(X, Y, **FIT)
        trainer._step.problem.optimizer.learning_rate = 0.1
        trainer.fit(X, Y, **FIT)
        trainer.l2 = 0.5
        trainer.fit(X, Y, **FIT)
        trainer.step(X[:8], Y[:8])
        trainer.l2 = 0.0
        return results(trainer, X, Y)

    found = train()
    assert max(lengths) == 25
    one_by_one(monkeypatch)
    agree(found, train())


def test_a_new_learning_rate_makes_no_new_stretch(monkeypatch):
    trainer, made = make(), []
    real = stretch.Stretch._make_loop
    monkeypatch.setattr(
        stretch.Stretch, "_make_loop", lambda self, *a: made.append(1) or real(self, *a)
    )
    expected = make()
    for rate in (0.1, 0.2, 0.3):
        for each in (trainer, expected):
            each.optimizer.learning_rate = rate
        trainer.step(X[:8], Y[:8])
        with monkeypatch.context() as patch:
            one_by_one(patch)
            expected.step(X[:8], Y[:8])
    assert made == [1]
    np.testing.assert_allclose(trainer.net.parameters, expected.net.parameters, rtol=1e-12)


@pytest.mark.parametrize("offset", [1, 4])
def test_rows_that_are_not_aligned_are_read(offset, monkeypatch):
    raw = np.zeros(X.nbytes + offset, np.uint8)
    rows = raw[offset:].view(X.dtype).reshape(X.shape)
    rows[...] = X
    assert not rows.flags.aligned
    found = results(make(), rows, Y)
    one_by_one(monkeypatch)
    agree(found, results(make(), X, Y))


def test_an_interrupt_in_a_stretch_loses_no_step(tmp_path, monkeypatch):
    trainer, twin = make(), make()
    fit = {**FIT, "checkpoint": tmp_path / "run.safetensors"}
    run, calls = stretch.Stretch.run, []

    def interrupted(self, *arguments):
        calls.append(run(self, *arguments))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(stretch.Stretch, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(X, Y, **fit)
    assert trainer.progress.step > 4
    history, expected = trainer.fit(X, Y, **fit), twin.fit(X, Y, **FIT)
    np.testing.assert_array_equal(trainer.net.parameters, twin.net.parameters)
    assert history["loss"] == expected["loss"]


def test_arrays_are_read_where_they_are_now_and_not_kept():
    import gc
    import weakref

    trainer, twin = make(), make()
    rows, targets = X.copy(), Y.copy()
    trainer.step(rows, targets, rows=np.arange(8))
    twin.step(X, Y, rows=np.arange(8))
    rows.resize((4000, 5), refcheck=False)
    targets.resize((4000, 3), refcheck=False)
    rows[-8:], targets[-8:] = X[8:16], Y[8:16]
    trainer.step(rows, targets, rows=np.arange(3992, 4000))
    twin.step(X, Y, rows=np.arange(8, 16))
    np.testing.assert_array_equal(trainer.net.parameters, twin.net.parameters)
    kept = weakref.ref(rows)
    del rows
    gc.collect()
    assert kept() is None


def test_calls_are_as_long_as_they_take(monkeypatch, lengths):
    seconds, make_calls = [0.0], stretch.make

    def make_slowly(calls):
        make_calls(calls)
        seconds[0] += 0.005 * lengths[-1]

    monkeypatch.setattr(stretch, "make", make_slowly)
    monkeypatch.setattr(stretch.time, "perf_counter", lambda: seconds[0])
    make().fit(X, Y, **FIT)
    assert lengths[0] == 4
    assert max(lengths) == 10  # 50 ms


def test_rates_are_computed_once_and_a_fault_of_a_schedule_is_raised_in_its_turn():
    calls = []

    class Own(mc.Constant):
        def at(self, progress):
            calls.append(progress.step)
            return super().at(progress)

    make(optimizer=mc.Adam(Own(0.01), epsilon=1e-150)).fit(X, Y, **FIT)
    assert len(calls) < 4 * 78  # each is asked again by the step that runs alone
    trainer = make(optimizer=mc.SGD(mc.FormulaSchedule(0.01, "rate * log(14 - step)")))
    with pytest.raises(ValueError, match="has no value"):
        trainer.fit(X, Y, **FIT)
    assert trainer.progress.step == 13


def test_an_interrupt_comes_soon():
    many = np.tile(X, (200, 1)), np.tile(Y, (200, 1))
    trainer = make(dtype="float32")
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(*many, **{**FIT, "epochs": 100_000, "batch_size": 1})
    timer.join()
    assert 0 < trainer.progress.step < 100_000 * len(many[0])


def test_callbacks_after_each_step_see_each_step():
    class Each(mc.Callback):
        steps = 0

        def step_end(self, trainer, J):
            assert isinstance(J, float)
            self.steps += 1

    each = Each()
    with_it, without = make(), make()
    with_it.fit(X, Y, callbacks=[each], **FIT)
    without.fit(X, Y, **FIT)
    assert each.steps == 78
    np.testing.assert_array_equal(with_it.net.parameters, without.net.parameters)


def test_arrays_are_freed_with_the_worker():
    import gc
    import weakref

    trainer = make()
    trainer.fit(X, Y, **FIT)
    worker = weakref.ref(trainer._step.crew.workers[0])
    gc.disable()
    try:
        trainer._step.workspace.drop()
        assert worker() is None
    finally:
        gc.enable()
