"""Trainers in several threads and processes: equal bits, and no thread left behind."""

import _thread
import gc
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.engine import cpu_step

RNG = np.random.default_rng(0)

X, Y = (
    RNG.standard_normal((60, 4)).astype(np.float32),
    RNG.standard_normal((60, 2)).astype(np.float32),
)


def make():
    return mc.Trainer(
        mc.MLP([4, 6, 5, 2], "tanh", device="cpu", seed=3), "squared_error", mc.SGD(0.01)
    )


def test_an_interrupt_waits_for_the_other_workers_so_that_none_writes_into_the_next_step(
    monkeypatch,
):
    # the calls of a step are made one by one
    monkeypatch.setattr(cpu_step.CpuStep, "_stretch", lambda *_: None)
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
from mlpcore.engine import cpu_step
cpu_step.CpuStep._stretch = lambda *_: None
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


def test_the_threads_of_a_step_end_with_its_trainer(monkeypatch):
    monkeypatch.setattr(cpu_step.CpuStep, "_stretch", lambda *_: None)
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


def digest(parameters):
    return hashlib.sha256(np.asarray(parameters).tobytes()).hexdigest()


def trained(seed, workers=None):
    rng = np.random.default_rng(seed)
    x, y = (
        rng.standard_normal((3000, 16)).astype(np.float32),
        rng.standard_normal((3000, 1)).astype(np.float32),
    )
    trainer = mc.Trainer(
        mc.MLP([16, 64, 64, 1], "tanh", seed=seed, device="cpu"),
        "squared_error",
        seed=seed,
        workers=workers,
    )
    trainer.fit(x, y, epochs=2, batch_size=1024, progress=False)
    return digest(trainer.net.parameters)


@pytest.mark.slow
def test_two_trainers_in_two_threads_train_as_one_after_the_other():
    alone = [trained(seed) for seed in (1, 2)]
    together = {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: trained(s)})) for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[1], together[2]] == alone


def test_one_trainer_used_from_several_threads_takes_one_step_at_a_time():
    trainer = make()
    faults = []

    def work():
        try:
            for _ in range(50):
                trainer.step(X, Y)
                trainer.evaluate(X, Y)
        except Exception as error:  # into the main thread
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert trainer.progress.step == 200
    alone = make()
    for _ in range(200):
        alone.step(X, Y)
    np.testing.assert_array_equal(trainer.net.parameters, alone.net.parameters)


def go_on(trainer, queue):
    trainer.step(X, Y)
    queue.put(digest(trainer.net.parameters))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_trainer_goes_on_in_another_process(method):
    context = multiprocessing.get_context(method)
    trainer = mc.Trainer(mc.MLP([4, 600, 600, 2], device="cpu"), "squared_error", workers=2)
    trainer.step(X, Y)
    queue = context.Queue()
    process = context.Process(target=go_on, args=(trainer, queue))
    process.start()
    there = queue.get(timeout=120)
    process.join(timeout=60)
    trainer.step(X, Y)
    assert there == digest(trainer.net.parameters)


@pytest.mark.slow
def test_trainers_work_under_joblib():
    from joblib import Parallel, delayed
    from threadpoolctl import threadpool_limits

    there = Parallel(n_jobs=2)(delayed(trained)(seed, 1) for seed in (1, 2))
    with threadpool_limits(1, "blas"):  # as joblib's processes have it
        assert there == [trained(1, 1), trained(2, 1)]


HASH = """
import sys, hashlib, numpy as np, mlpcore as mc
from mlpcore.backends import devices
from mlpcore.engine import cpu_step
from tests.backends.cuda.emulator.device import CpuDevice
device = sys.argv[1]
if device != "cpu":
    devices._opened["cuda:0"] = CpuDevice()
rng = np.random.default_rng(1)
m = 2500 if device == "cpu" else 200
x, y = rng.standard_normal((m, 16)).astype(np.float32), rng.integers(0, 3, m)
net = mc.MLP([16, 24, 3], "gelu", "softmax", device=device, seed=2)
settings = {"clip_norm": 1.0, "deterministic": True, "seed": 3}
trainer = mc.Trainer(net, "cross_entropy", mc.AdamW(1e-3), **settings)
trainer.fit(x, y, epochs=100 * 50 // m, batch_size=50, progress=False)
assert trainer.progress.step == 100
print(hashlib.sha256(devices.find(device).to_host(net.parameters).tobytes()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_parameters_after_100_steps_are_the_same_bits_in_two_processes(device):
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{Path(mc.__file__).parents[1]}{os.pathsep}{root}"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", HASH, device],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) == 65
