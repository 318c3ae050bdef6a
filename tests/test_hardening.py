"""What a reader who tried to break the library broke once."""

import _thread
import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import mlpcore as mc

RNG = np.random.default_rng(0)


def test_r2_behind_an_exponential_output_is_that_of_the_predictions():
    X = RNG.standard_normal((700, 3))
    Y = RNG.poisson(np.exp(X[:, :1])).astype(float)
    trainer = mc.Trainer(
        mc.MLP([3, 8, 1], "tanh", "exp", dtype="float64"), "poisson", mc.Adam(1e-2)
    )
    trainer.fit(X, Y, epochs=20, progress=False)
    Z = trainer.net.predict(X)
    assert trainer.evaluate(X, Y)["r2"] == pytest.approx(
        1 - np.sum((Y - Z) ** 2) / np.sum((Y - Y.mean()) ** 2)
    )


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), copy.copy]
)
def test_the_views_of_a_copied_network_are_of_its_own_parameters(clone):
    net = clone(mc.MLP([3, 4, 2]))
    assert np.shares_memory(net.W[1], net.parameters)
    net.parameters[...] = 0
    assert not net.predict(np.ones((2, 3))).any()


@pytest.mark.parametrize("name", ["W", "b", "parameters"])
def test_an_array_cannot_be_put_beside_the_one_that_is_trained(name):
    net = mc.MLP([3, 2])
    with pytest.raises(AttributeError):
        setattr(net, name, getattr(net, name))


def test_an_interrupt_waits_for_the_other_workers_so_that_none_writes_into_the_next_step(
    monkeypatch,
):
    X, Y = RNG.standard_normal((64, 3)), RNG.standard_normal((64, 2))
    losses, ended = [], []
    for interrupted in (False, True):
        trainer = mc.Trainer(
            mc.MLP([3, 8, 2], seed=1), "squared_error", mc.SGD(0.1), workers=2, chunk_rows=4
        )
        trainer.step(X, Y)
        before = trainer._step.crew.workers
        if interrupted:
            started, gradient = threading.Event(), before[1].gradient

            def interrupt(*_, started=started):
                assert started.wait(10)
                raise KeyboardInterrupt

            def slow(*arguments, started=started, gradient=gradient):
                started.set()
                time.sleep(0.2)
                gradient(*arguments)
                ended.append(True)

            monkeypatch.setattr(before[0], "gradient", interrupt)
            monkeypatch.setattr(before[1], "gradient", slow)
            with pytest.raises(KeyboardInterrupt):
                trainer.step(X, Y)
            assert ended
            assert trainer._step.crew.workers == []
        losses.append(trainer.step(X, Y))
        assert (trainer._step.crew.workers is before) != interrupted
    assert losses[0] == losses[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_worker_threads_of_its_own():
    code = """
import os, numpy as np, mlpcore as mc
X, Y = np.ones((64, 3)), np.ones((64, 2))
trainer = mc.Trainer(mc.MLP([3, 8, 2]), "squared_error", mc.SGD(0.1), workers=2, chunk_rows=8)
trainer.step(X, Y)
child = os.fork()
J = trainer.step(X, Y)
if child == 0:
    os.write(1, f"child {J}\\n".encode())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent", J)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60
    ).stdout.split()
    assert out[0] == "child"
    assert out[2] == "parent"
    assert out[1] == out[3]


def test_the_threads_of_a_step_end_with_its_trainer():
    before = _thread._count()
    trainer = mc.Trainer(mc.MLP([3, 8, 2]), "squared_error", workers=3, chunk_rows=8)
    trainer.step(np.ones((64, 3)), np.ones((64, 2)))
    assert _thread._count() > before
    step = weakref.ref(trainer._step)
    gc.disable()
    try:
        del trainer
        assert step() is None  # no circle that would keep its arrays until the collector comes
    finally:
        gc.enable()
    deadline = time.monotonic() + 10
    while _thread._count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_name_alone_does_not_make_a_softmax():
    own = mc.Activation("softmax", "s", "1")
    with pytest.raises(ValueError, match="needs output 'softmax'"):
        mc.Trainer(mc.MLP([3, 2], output=own), "cross_entropy")
    with pytest.raises(ValueError, match="needs output 'softmax'"):
        mc.Trainer(mc.MLP([3, 2]), mc.Loss("cross_entropy", "", ""))
    with pytest.raises(ValueError, match="output layer only"):
        mc.MLP([3, 4, 2], activations=mc.Activation("softmax", "", ""))


def test_the_gradient_checks_where_outputs_have_rounded_to_0_or_1():
    net = mc.MLP([1, 1], output="sigmoid", dtype="float64")
    net.W[1][...] = 1
    assert mc.check_gradients(net, [[50.0], [1.0]], [0, 1]).ok
    net = mc.MLP([1, 2], output="softmax", dtype="float64")
    net.W[1][...] = [[1, -1]]
    assert mc.check_gradients(net, [[500.0], [0.3]], [1, 0]).ok


@pytest.mark.parametrize(
    ("loss", "output", "Y"),
    [
        ("binary_cross_entropy", "sigmoid", [1, -1]),
        ("poisson", "exp", [2, -3]),
        ("poisson", "softplus", [2, -3]),
    ],
)
def test_targets_outside_the_range_of_a_loss_are_refused_by_row(loss, output, Y):
    trainer = mc.Trainer(mc.MLP([2, 1], output=output), loss)
    for call in (trainer.evaluate, lambda X, Y: trainer.fit(X, Y, progress=False)):
        with pytest.raises(ValueError, match=f"Y: {loss} takes 0 .*row 1"):
            call(np.ones((2, 2)), Y)


def test_masked_entries_and_numbers_beyond_the_dtype_are_refused():
    trainer = mc.Trainer(mc.MLP([2, 1]), "squared_error")
    with pytest.raises(TypeError, match="masked"):
        trainer.step(np.ma.array([[1, 2], [3, 1e9]], mask=[[0, 0], [0, 1]]), [0, 1])
    with pytest.raises(ValueError, match="row 1, column 0"):
        trainer.evaluate([[1.0, 2.0], [1e300, 0.0]], [0, 1])
    for weights in ([1e300, 1e300], [1e40, 1e40]):
        with pytest.raises(ValueError, match="sample_weight sums to"):
            trainer.step(np.ones((2, 2)), [0, 1], weights)


def test_fit_inside_fit_is_refused_and_the_outer_one_unharmed():
    X, Y, seen = np.ones((8, 2)), np.ones(8), []

    def again(trainer, entry):
        with pytest.raises(RuntimeError, match="fit is running"):
            trainer.fit(X, Y, epochs=1, progress=False)
        seen.append(entry)

    trainer = mc.Trainer(mc.MLP([2, 1]), "squared_error", mc.SGD(mc.Cosine(0.1)))
    trainer.fit(X, Y, epochs=3, callbacks=[again], progress=False)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("value", "slope"), [("s * s * s", "3 * s * s"), ("1 / s", "-1 / (s * s)"), ("log(s)", "1 / s")]
)
def test_an_activation_without_a_slope_at_zero_starts_as_plain_glorot(value, slope):
    own = mc.Activation("own", value, slope)
    expected = mc.MLP([4, 8, 1], "identity").parameters
    np.testing.assert_array_equal(mc.MLP([4, 8, 1], own, own).parameters, expected)


def test_r2_takes_no_notice_of_rows_that_weigh_nothing():
    X, Y, w = RNG.standard_normal((50, 2)), RNG.standard_normal(50), np.ones(50)
    trainer = mc.Trainer(mc.MLP([2, 1], dtype="float64"), "squared_error")
    without = trainer.evaluate(X[1:], Y[1:])["r2"]
    Y[0], w[0] = 1e12, 0
    assert trainer.evaluate(X, Y, w)["r2"] == pytest.approx(without)


def test_an_adaptive_schedule_set_during_fit_counts_from_then_on():
    trainer = mc.Trainer(mc.MLP([2, 1]), "squared_error", mc.SGD(1e-9))

    def change(trainer, entry):
        if trainer.progress.step == 2:
            trainer.optimizer.learning_rate = mc.Adaptive(
                1e-9, patience=1, tolerance=1.0, minimum=1e-12
            )

    trainer.fit(np.ones((4, 2)), np.ones(4), epochs=6, callbacks=[change], progress=False)
    assert trainer.progress.reductions >= 2
