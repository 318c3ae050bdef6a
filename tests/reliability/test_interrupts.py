"""Signals, interrupts and forks at any moment: a step is whole or refused, a run is saved, nobody
waits for ever.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends import devices
from mlpcore.engine import cpu_step
from tests.backends.cuda.emulator.device import CpuDevice
from tests.training.test_checkpoint import FIT, X, Y, make, state

ROOT = str(Path(mc.__file__).parents[1])
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def child(script, *arguments, timeout=120):
    """Run a script in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": ROOT},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def until(condition):
    """Wait for a condition, of which the test is."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# -- a step is whole -------------------------------------------------------------------------------

STEPS = """
import ctypes, hashlib, random, signal, sys, threading, time
import numpy as np, mlpcore as mc, tqdm.auto  # an import that is interrupted stays half done
sizes, rows, trials, how = eval(sys.argv[1])
rng = np.random.default_rng(0)
X, Y = (rng.standard_normal((rows, n)).astype("f") for n in (sizes[0], sizes[-1]))

def make():
    net = mc.MLP(list(sizes), "tanh", device="cpu", seed=1)
    trainer = mc.Trainer(net, "squared_error", mc.AdamW(1e-3), workers=2 if rows > 16 else 1)
    trainer.step(X, Y)
    return trainer

def state(trainer):
    vectors, facts = trainer._step.snapshot()
    parts = trainer.net.parameters, *vectors.values(), np.array(facts["updates"])
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

whole, known = make(), {}
def after(step):
    while whole.progress.step <= step:
        known[whole.progress.step] = state(whole)
        whole.step(X, Y)
    return known[step]

trainer, random = make(), random.Random(0)
data = trainer.prepare(X, Y)
begin = time.perf_counter()
for _ in range(3):
    trainer.step(data)
most = max(0.02 if how == "fit" else 0.001, time.perf_counter() - begin)

def go():
    if how == "apply":
        while True:
            trainer.gradient(data)
            trainer.apply(trainer._step.gradient)
    if how == "fit":
        trainer.fit(X, Y, epochs=10**6, batch_size=rows, shuffle=False, progress=False)
    while True:
        trainer.step(data)

def interrupted():
    try:
        go()
    except KeyboardInterrupt:
        return

signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(trials):
    if how == "thread":  # as PyThreadState_SetAsyncExc does it
        work = threading.Thread(target=interrupted)
        work.start()
        time.sleep(random.uniform(0, most))
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(work.ident), ctypes.py_object(KeyboardInterrupt)
        )
        work.join()
    else:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, most))
            go()
        except KeyboardInterrupt:
            pass
    step = trainer.progress.step
    assert state(trainer) == after(step), step
assert trainer.progress.step > 4
print(trainer.progress.step)
"""


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    "case",
    [((8, 16, 2), 16, 150, "step"), ((8, 16, 2), 16, 40, "fit"), ((8, 16, 2), 16, 100, "apply"),
     ((8, 16, 2), 16, 60, "thread"), ((16, 512, 512, 2), 32, 15, "step")],
    ids=lambda case: f"{case[-1]} of {case[0]}",
)  # fmt: skip
def test_interrupted_at_any_moment_a_trainer_has_made_whole_steps(case):
    child(STEPS, case)


LOCKS = """
import sys, threading
import numpy as np, mlpcore as mc
X, Y = np.ones((64, 3)), np.ones((64, 1))
trainer = mc.Trainer(mc.MLP([3, 1], device="cpu"), "squared_error", workers=2)

def interrupted(frame, event, _):  # with the lock held, before its block begins
    if event == "return" and frame.f_code is threading.Condition.__enter__.__code__:
        sys.settrace(None)
        raise KeyboardInterrupt
    return interrupted

for _ in range(3):
    sys.settrace(interrupted)
    try:
        trainer.step(X, Y)
    except KeyboardInterrupt:
        pass
    sys.settrace(None)
trainer.step(X, Y)
print(trainer.progress.step)
"""


def test_no_interrupt_leaves_a_lock_for_which_a_step_waits():
    assert child(LOCKS, timeout=20) == ["4"]


def test_an_update_that_broke_off_is_known_and_nothing_is_made_of_it(tmp_path, monkeypatch):
    # the calls of a step are made one by one
    monkeypatch.setattr(cpu_step.CpuStep, "_stretch", lambda *_: None)
    trainer = make()
    net, other = trainer.net, mc.Trainer(trainer.net)
    trainer.step(X, Y)
    trainer.save(tmp_path / "run")
    gradient = np.zeros(trainer.net.layout.size)

    def out_of_memory():
        raise MemoryError

    trainer._step.lanes.updates[0].lanes[0].calls.insert(4, (out_of_memory,))
    with pytest.raises(MemoryError):
        trainer.step(X, Y)
    for call in (
        lambda: trainer.step(X, Y), lambda: trainer.apply(gradient), lambda: trainer.evaluate(X, Y),
        lambda: trainer.gradient(X, Y), lambda: trainer.fit(X, Y, **FIT), trainer.__getstate__,
        lambda: trainer.save(tmp_path / "run"), lambda: net.save(tmp_path / "net"),
        lambda: net.predict(X),
        lambda: net.forward(X), net.copy, lambda: pickle.dumps(net), lambda: mc.Trainer(net),
        lambda: other.step(X, Y), lambda: net.hvp(X, Y, gradient),
        lambda: net.to_onnx(tmp_path / "net"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"step 2 was interrupted .* with mc\.Trainer\.load"):
            call()
    assert not (tmp_path / "net").exists()
    assert np.isfinite(net.parameters).all()  # they can be looked at
    again, whole = mc.Trainer.load(tmp_path / "run"), make()
    for _ in range(2):
        whole.step(X, Y)
    again.step(X, Y)
    assert state(again) == state(whole)


def test_other_threads_may_predict_while_an_update_is_made(monkeypatch):
    monkeypatch.setattr(cpu_step.CpuStep, "_stretch", lambda *_: None)
    trainer, found = make(), []
    trainer.step(X, Y)
    calls = trainer._step.lanes.updates[0].lanes[0].calls
    calls.insert(4, (lambda: found.append(trainer.net.predict(X)),))
    trainer.step(X, Y)
    assert found
    assert trainer.progress.step == 2


def test_a_change_of_the_optimizer_that_broke_off_is_known(monkeypatch):
    trainer = make(optimizer=mc.SGD(0.1))
    trainer.step(X, Y)
    trainer.optimizer.momentum = 0.5
    monkeypatch.setattr(trainer._step, "_bind", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.step(X, Y)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="was interrupted"):
        trainer.step(X, Y)


@pytest.mark.emulated
def test_a_launch_that_was_not_counted_is_counted_by_the_device(monkeypatch):
    monkeypatch.setitem(devices._opened, "cuda:0", CpuDevice())
    whole, one = make("cuda:0"), make("cuda:0")
    for trainer in (whole, one):
        trainer.step(X, Y)
        trainer.step(X, Y)
    whole.step(X, Y)
    capture, done = one._step.capture, one._step.capture.done

    def interrupted():
        done()
        raise KeyboardInterrupt

    capture.done = interrupted
    with pytest.raises(KeyboardInterrupt):
        one.step(X, Y)
    capture.done = done
    assert one.progress.step == 2
    assert state(one) == state(whole)
    assert one.progress.step == 3
    assert float(one.step(X, Y)) == float(whole.step(X, Y))


def test_an_interrupt_between_a_scale_and_its_note_does_not_outlast_the_step():
    one, other = make(), make()
    for trainer in (one, other):
        trainer.step(X, Y)

    class Scale:
        def __setitem__(self, key, value):
            scale[key] = value
            raise KeyboardInterrupt

    crew = one._step.crew
    scale, crew.scale = crew.scale, Scale()
    with pytest.raises(KeyboardInterrupt):
        one.step(X[:10], Y[:10])
    crew.scale = scale
    assert one.step(X, Y) == other.step(X, Y)
    assert state(one) == state(other)


# -- sources that do not answer --------------------------------------------------------------------


OPENED = []


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """Let the sources that block go on when a test is over."""
    yield
    while OPENED:
        OPENED.pop().set()
    until(lambda: not any(thread.name == "mlpcore-reader" for thread in threading.enumerate()))


def gate():
    """Return an event that is set at the end of the test at the latest."""
    OPENED.append(threading.Event())
    return OPENED[-1]


def blocking(trainer, at, then):
    """Make a source that blocks for a minute after so many steps; before that, `then` is called."""
    opened = gate()

    def batches():
        for i in range(8):
            if i == at and not opened.is_set():
                until(lambda: trainer.progress.step == at)
                then()
                opened.wait(60)
            yield X[10 * i : 10 * i + 10], Y[10 * i : 10 * i + 10]

    batches.open = opened.set
    return batches


@pytest.mark.parametrize(
    ("where", "number", "at"),
    [
        ("training", signal.SIGINT, 0),
        ("training", signal.SIGTERM, 3),
        ("validation", signal.SIGTERM, 8),
    ],
)
def test_a_signal_while_rows_are_waited_for_saves_at_once(where, number, at, tmp_path):
    whole, one, path = make(), make(), tmp_path / "run"
    fit = {"epochs": 2, "progress": False, "shuffle": False}
    calm = blocking(whole, -1, None)
    whole.fit(calm, validation=calm, **fit)
    stop = blocking(one, at, lambda: os.kill(os.getpid(), number))

    opened = gate()

    def held_out():
        until(lambda: one.progress.step == at)
        os.kill(os.getpid(), number)
        opened.wait(60)
        yield X, Y

    kind = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    sources = (calm, held_out) if where == "validation" else (stop, calm)
    with pytest.raises(kind):
        one.fit(sources[0], validation=sources[1], checkpoint=path, every="1 h", **fit)
    again = mc.Trainer.load(path)
    assert again.progress.step == at
    again.fit(calm, validation=calm, **fit)
    assert state(again) == state(whole)


def test_without_a_checkpoint_an_interrupt_reaches_a_source_that_blocks():
    trainer = make()
    source = blocking(trainer, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(source, epochs=1, progress=False)
    assert trainer.progress.step == 3
    source.open()
    trainer.fit(source, epochs=1, progress=False)
    assert trainer.progress.step == 11


@posix
def test_a_source_that_never_answers_does_not_keep_the_process_alive(tmp_path):
    script = """
import os, signal, sys, threading, time
import numpy as np, mlpcore as mc
def batches():
    yield np.ones((4, 3)), np.ones((4, 1))
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()
trainer = mc.Trainer(mc.MLP([3, 1], device="cpu"), "squared_error")
trainer.fit(batches, epochs=1, progress=False, checkpoint=sys.argv[1])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "run"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )  # fmt: skip
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "SIGTERM: stopped in epoch 1 of 1" in errors
    assert mc.Trainer.load(tmp_path / "run").unfinished


# -- signals ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def handled(number, handler):
    """A handler for the block."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(number, tmp_path):
    with handled(number, signal.SIG_IGN):
        trainer = make()
        ask = [lambda *_: signal.raise_signal(number)]
        trainer.fit(X, Y, checkpoint=tmp_path / "run", callbacks=ask, **FIT)
        assert trainer.progress.step == 44
        assert signal.getsignal(number) is signal.SIG_IGN


HOST = """
#include <signal.h>
#include <unistd.h>
static void handler(int) { (void)!write(1, "host ", 5); }
__attribute__((constructor)) static void begin() { signal(SIGTERM, handler); }
"""
GUEST = """
import os, signal, sys
from tests.training.test_checkpoint import FIT, X, Y, make
assert signal.getsignal(signal.SIGTERM) is None
ask = [lambda *_: os.kill(os.getpid(), signal.SIGTERM)]
make().fit(X, Y, checkpoint=sys.argv[1], callbacks=ask, **FIT)
assert signal.getsignal(signal.SIGTERM) is None
"""


@posix
def test_a_handler_of_a_host_that_python_does_not_know_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "host.cpp").write_text(HOST)
    library = tmp_path / "host.so"
    build = ["g++", "-shared", "-fPIC", "-o", library, tmp_path / "host.cpp"]
    subprocess.run(build, check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    assert child(GUEST, tmp_path / "run") == ["host"] * 4


class Broken(Exception):
    """An error that a callback raises."""


def asked_and_broken(number, error=Broken):
    def callback(trainer, entry):
        signal.raise_signal(number)
        raise error("the callback's")

    return [callback]


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_before_an_error_of_a_callback_is_not_forgotten(number, kind, tmp_path, caplog):
    trainer = make()
    with pytest.raises(kind) as caught:
        trainer.fit(X, Y, checkpoint=tmp_path / "run", callbacks=asked_and_broken(number), **FIT)
    assert isinstance(caught.value.__context__, Broken)
    assert f"{number.name}: not saved: Broken(" in caplog.text
    trainer.fit(X, Y, **FIT)  # it is at rest


def test_a_users_handler_gets_a_signal_that_came_before_an_error_which_goes_on(tmp_path):
    got, ask = [], asked_and_broken(signal.SIGTERM)
    with handled(signal.SIGTERM, lambda number, _: got.append(number)), pytest.raises(Broken):
        make().fit(X, Y, checkpoint=tmp_path / "run", callbacks=ask, **FIT)
    assert got == [signal.SIGTERM]


def test_a_signal_before_a_save_that_fails_leaves_a_run_that_goes_on(tmp_path):
    trainer, whole, folder = make(), make(), tmp_path / "gone"
    whole.fit(X, Y, **FIT)
    folder.mkdir()

    def ask(*_):
        signal.raise_signal(signal.SIGINT)
        folder.rmdir()

    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit(X, Y, checkpoint=folder / "run", callbacks=[ask], every="1 h", **FIT)
    assert isinstance(caught.value.__context__, OSError)
    trainer.fit(X, Y, **FIT)
    assert state(trainer) == state(whole)


def test_a_signal_at_the_end_is_obeyed_and_all_is_saved(tmp_path, monkeypatch):
    save = mc.Trainer.save

    def last(trainer, *arguments):
        save(trainer, *arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(mc.Trainer, "save", last)
    with pytest.raises(SystemExit):
        make().fit(X, Y, checkpoint=tmp_path / "run", every="1 h", **FIT)
    assert mc.Trainer.load(tmp_path / "run").progress.step == 44


def test_a_handler_that_a_callback_sets_stays(tmp_path):
    before, mine = signal.getsignal(signal.SIGINT), lambda *_: None
    with handled(signal.SIGINT, before):
        ask = [lambda *_: signal.signal(signal.SIGINT, mine) and None]
        make().fit(X, Y, checkpoint=tmp_path / "run", callbacks=ask, **FIT)
        assert signal.getsignal(signal.SIGINT) is mine


def test_a_fit_within_a_fit_gives_the_handlers_back_in_order(tmp_path):
    before, inner, outer = signal.getsignal(signal.SIGINT), make(), make()

    def ask(*_):
        signal.raise_signal(signal.SIGINT)

    def within(trainer, entry):
        during = signal.getsignal(signal.SIGINT)
        assert during not in (before, None)
        inner.fit(X, Y, checkpoint=tmp_path / "inner", **FIT)
        assert signal.getsignal(signal.SIGINT) == during
        inner.fit(X, Y, checkpoint=tmp_path / "inner", callbacks=[ask], **FIT)

    with pytest.raises(KeyboardInterrupt):
        outer.fit(X, Y, checkpoint=tmp_path / "outer", every="1 h", callbacks=[within], **FIT)
    assert signal.getsignal(signal.SIGINT) is before
    assert mc.Trainer.load(tmp_path / "inner").unfinished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_a_fit_within_a_fit_saves_both(number, tmp_path, caplog):
    got, inner, outer, whole = [], make(), make(), make()
    fit = {"every": "1 h", **FIT}

    def ask(*_):
        signal.raise_signal(number)

    def within(trainer, entry):
        inner.fit(X, Y, checkpoint=tmp_path / "inner", callbacks=[ask], **fit)

    users = handled(number, lambda *_: got.append(number))
    with users, pytest.raises((KeyboardInterrupt, SystemExit), match=r"143|saved in .*outer"):
        outer.fit(X, Y, checkpoint=tmp_path / "outer", callbacks=[within], **fit)
    assert got == [number]
    assert "not saved" not in caplog.text
    whole.fit(X, Y, **FIT)
    for name in ("inner", "outer"):
        other = mc.Trainer.load(tmp_path / name)
        assert other.unfinished.startswith("in epoch 2 of 4")
        other.fit(X, Y, **FIT)
        assert state(other) == state(whole)


def test_a_second_interrupt_leaves_a_metric_that_takes_long(tmp_path):
    def long(Y, output):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it was not left")

    with pytest.raises(KeyboardInterrupt):
        make().fit(X, Y, checkpoint=tmp_path / "run", metrics={"long": long}, **FIT)
    assert not (tmp_path / "run").exists()


# -- save from another thread ----------------------------------------------------------------------


def in_a_thread(call):
    """Begin a call in a thread of its own."""
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_a_save_from_another_thread_gets_its_turn_after_the_step(tmp_path, device):
    whole, one, path, savers = make(device), make(device), tmp_path / "run", []

    class Ask(mc.Callback):
        def step_end(self, trainer, J):
            if trainer.progress.step == 13:
                savers.append(in_a_thread(lambda: trainer.save(path)))
                until(lambda: trainer._turns.visitors)
            if trainer.progress.step == 14:
                until(lambda: not savers[0].is_alive())

    whole.fit(X, Y, **FIT)
    one.fit(X, Y, callbacks=[Ask()], **FIT)
    assert state(one) == state(whole)
    again = mc.Trainer.load(path, device)
    assert again.progress.step == 13
    again.fit(X, Y, **FIT)
    assert state(again) == state(whole)


def test_a_save_from_another_thread_does_not_wait_for_a_source(tmp_path):
    whole, one, path = make(), make(), tmp_path / "run"
    whole.fit(blocking(whole, -1, None), epochs=2, progress=False)
    asked = threading.Event()
    source = blocking(one, 5, asked.set)
    fit = in_a_thread(lambda: one.fit(source, epochs=2, progress=False))
    assert asked.wait(60)
    one.save(path)
    assert fit.is_alive()
    source.open()
    fit.join()
    again = mc.Trainer.load(path)
    assert again.progress.step == 5
    again.fit(source, epochs=2, progress=False)
    assert state(again) == state(one) == state(whole)


# -- forks -----------------------------------------------------------------------------------------

FORKS = """
import os, signal, sys, threading, time
import numpy as np, mlpcore as mc
folder, times, rng = sys.argv[1], int(sys.argv[2]), np.random.default_rng(0)
X, Y = rng.standard_normal((64, 8)), rng.standard_normal((64, 2))
trainer = mc.Trainer(mc.MLP([8, 16, 2], device="cpu", seed=1), "squared_error", mc.AdamW(1e-4))
ended = []

def fits():
    stop = lambda *_: bool(ended)
    fit = {"epochs": 2, "batch_size": 8, "validation": (X, Y), "callbacks": [stop]}
    while not ended:
        trainer.fit(X, Y, **fit)  # with a bar, whose lock is another one

def saves():
    while not ended:
        trainer.save(f"{folder}/parent")

def child():
    signal.alarm(30)
    assert np.isfinite(trainer.net.predict(X)).all()
    before = trainer.progress.step
    trainer.step(X, Y)
    trainer.save(f"{folder}/child")
    assert mc.Trainer.load(f"{folder}/child").progress.step == before + 1
    trainer.fit(X, Y, epochs=1, progress=True)

threads = [threading.Thread(target=work) for work in (fits, saves)]
for thread in threads:
    thread.start()
while trainer.progress.step < 5:
    time.sleep(0.001)
try:
    for _ in range(times):
        time.sleep(rng.uniform(0, 0.003))
        pid = os.fork()
        if not pid:
            try:
                child()
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, status
finally:
    ended.append(True)
for thread in threads:
    thread.join()
"""


@pytest.mark.slow
@posix
def test_a_fork_beside_a_fit_and_a_save_leaves_a_trainer_that_works(tmp_path):
    child(FORKS, tmp_path, 25)


@posix
def test_a_fork_in_the_middle_of_an_update_is_known_in_the_child():
    script = """
import os, sys, threading
import numpy as np, mlpcore as mc
from mlpcore.engine import cpu_step
from mlpcore.training import turns as module
module.FORK_WAITS, cpu_step.CpuStep._stretch = 0.05, lambda *_: None
X, Y = np.ones((4, 3)), np.ones((4, 1))
trainer = mc.Trainer(mc.MLP([3, 1], device="cpu"), "squared_error")
trainer.step(X, Y)
inside, go_on = threading.Event(), threading.Event()
calls = trainer._step.lanes.updates[0].lanes[0].calls
calls.insert(1, (lambda: (inside.set(), go_on.wait(60)),))
work = threading.Thread(target=trainer.step, args=(X, Y))
work.start()
inside.wait(60)
pid = os.fork()
if not pid:
    for call in (trainer.step, trainer.net.predict):
        try:
            call(*(X, Y)[: 1 + (call == trainer.step)])
        except RuntimeError as error:
            print(error, flush=True)
        else:
            os._exit(1)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
go_on.set()
work.join()
del calls[1]
trainer.step(X, Y)
print(trainer.progress.step)
"""
    found = child(script)
    assert found[:4] == ["step", "2", "was", "interrupted"]
    assert found[-1] == "3"


@posix
def test_a_fit_that_goes_on_in_a_forked_process_says_that_its_reader_is_not_there():
    script = """
import os
import numpy as np, mlpcore as mc
trainer = mc.Trainer(mc.MLP([3, 1], device="cpu"), "squared_error")
pids = []
def fork(trainer, J):
    if trainer.progress.step == 1:
        pids.append(os.fork())
class Fork(mc.Callback):
    step_end = lambda self, trainer, J: fork(trainer, J)
try:
    batches = lambda: iter([(np.ones((4, 3)), np.ones((4, 1)))] * 9)
    trainer.fit(batches, epochs=1, callbacks=[Fork()], progress=False)
except RuntimeError as error:
    print(error, flush=True)
    os._exit(0)
assert pids[0] and os.waitpid(pids[0], 0)[1] == 0
"""
    assert "does not exist in this process" in " ".join(child(script))


# -- a run counts what it has done -----------------------------------------------------------------

WATCHED = tuple(
    os.path.join(ROOT, "mlpcore", *name.split("/"))
    for name in (
        "trainer.py",
        "training/fit.py",
        "training/learner.py",
        "training/loop.py",
        "engine/cpu_step.py",
        "engine/lanes.py",
        "engine/state.py",
        "engine/graph_step.py",
        "engine/control.py",
    )
)


class Boom(BaseException):
    """An error that a user's handler raises."""


def interrupted(fit, at):
    """Call `fit` and raise before the line of this number that a run executes; the line, None if
    there are fewer.
    """
    count, line = 0, None

    def trace(frame, event, _):
        nonlocal count, line
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        count += event in ("line", "return")
        if count == at and line is None:
            line = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
            sys.settrace(None)
            raise Boom
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        fit()
    except Boom:
        pass
    finally:
        sys.settrace(before)
    return line


def told(trainer):
    """Return a trainer's history without the times."""
    return {name: values for name, values in trainer.history.items() if name != "seconds"}


@pytest.mark.slow
def test_interrupted_before_any_line_a_run_goes_on_as_if_it_had_not_been(tmp_path, device):
    path, stopping = tmp_path / "run", mc.EarlyStopping(1)
    fit = {
        "epochs": 2,
        "batch_size": 40,
        "progress": False,
        "validation": (X[:9], Y[:9]),
        "early_stopping": stopping,
    }
    fit |= {"checkpoint": path, "every": "1 h"}
    whole = make(device)
    whole.fit(X, Y, **fit)
    at, wrong = 1, []
    while True:
        path.unlink(missing_ok=True)
        trainer = make(device)
        line = interrupted(lambda trainer=trainer: trainer.fit(X, Y, **fit), at)
        if line is None:
            break
        if trainer.progress.step and trainer.progress.step < whole.progress.step:
            assert trainer.unfinished, line
        if trainer.unfinished or not trainer.progress.step:
            if trainer.unfinished:
                trainer.save(path)
                trainer = mc.Trainer.load(path, device) if at % 2 else trainer
            trainer.fit(X, Y, **fit)
        same = trainer.progress.step == whole.progress.step and told(trainer) == told(whole)
        if not same or state(trainer) != state(whole):
            wrong.append((at, line))
        at += 11 if device == "cpu" else 41  # not a multiple of a step's lines
    assert at > 500
    assert not wrong
