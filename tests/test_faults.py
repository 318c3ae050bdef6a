"""What goes wrong in a run, and what must not: overflow, memory that runs out, several threads and
processes, equal bits.
"""

import hashlib
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.engine.plan import part_bytes
from tests.backends.cuda.emulator.device import CpuDevice

RNG = np.random.default_rng(0)
X, Y = (
    RNG.standard_normal((60, 4)).astype(np.float32),
    RNG.standard_normal((60, 2)).astype(np.float32),
)


def make(device="cpu", activations="tanh", optimizer=None, **settings):
    net = mc.MLP([4, 6, 5, 2], activations, device=device, seed=3)
    return mc.Trainer(net, "squared_error", optimizer or mc.SGD(0.01), **settings)


# -- numbers that are not finite
# -------------------------------------------------------------------------------------------

CASES = {  # hidden activations, weights that overflow → the layer where it begins
    "the outputs of layer 2": ("relu", {1: 1e20, 2: 1e30}, 2),
    "the outputs of layer 3": ("relu", {1: 1e15, 2: 1e15, 3: 1e15}, 3),
    "the loss alone": ("relu", {}, None),
    "the first layer": ("exp", {1: 1e4}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_an_overflow_names_step_learning_rate_and_layer_and_changes_nothing(case, device):
    activations, scales, layer = CASES[case]
    trainer = make(device, activations)
    if (
        case == "the loss alone"
    ):  # outputs and gradient are finite, the squares of the outputs are not
        trainer.net.parameters[...] = 0
        trainer.net.b[3][...] = 1e20
    for l, scale in scales.items():
        trainer.net.W[l][...] = scale
    before = trainer.net.parameters.copy()
    with pytest.raises(
        mc.NonFiniteLoss, match=r"step 1: .*learning rate 0\.01; the parameters are as before it"
    ) as caught:
        float(trainer.fit(abs(X), Y, epochs=1, batch_size=60, progress=False)["loss"][0])
    assert (caught.value.step, caught.value.learning_rate, caught.value.layer) == (1, 0.01, layer)
    assert (f"; it began in layer {layer} of 3" in str(caught.value)) == (layer is not None)
    np.testing.assert_array_equal(trainer.net.parameters, before)
    assert trainer.progress.step == 0


def test_a_gradient_that_overflows_behind_a_finite_loss_names_its_layer(device):
    trainer = make(device, "identity")
    trainer.net.parameters[...] = 0
    trainer.net.W[3][...] = 1e30
    with pytest.raises(mc.NonFiniteLoss) as caught:
        trainer.fit(X, 1e16 * np.ones_like(Y), epochs=1, batch_size=60, progress=False)
    assert caught.value.layer == 2
    assert np.isfinite(trainer.net.parameters).all()


def batches():
    """Ten batches of rows, of which the third and seventh overflow."""
    rows = X.copy()
    rows[[13, 40]] = 1e30
    return [(rows[i : i + 6], Y[i : i + 6]) for i in range(0, 60, 6)]


@pytest.mark.parametrize(
    "optimizer", [mc.AdamW(1e-2), mc.SGD(0.01, momentum=0.9)], ids=["adamw", "momentum"]
)
def test_steps_that_overflow_are_skipped_and_counted_and_leave_no_trace(optimizer, device):
    one = make(device, "relu", optimizer, on_non_finite="skip")
    other = make(device, "relu", optimizer)
    for x, y in batches():
        one.step(x, y)
        if abs(x).max() < 1e20:
            other.step(x, y)
    assert one.skipped == 2
    assert one.progress.step == 10
    assert other.progress.step == 8
    np.testing.assert_array_equal(one.net.parameters, other.net.parameters)


def test_the_history_says_how_many_steps_were_skipped_and_its_loss_is_that_of_the_others(
    device, tmp_path
):
    rows = X.copy()
    rows[13] = 1e30
    trainer = make(device, "relu", on_non_finite="skip")
    history = trainer.fit(rows, Y, epochs=2, batch_size=6, shuffle=False, progress=False)
    assert history["skipped"] == [1, 2]
    assert np.isfinite(history["loss"]).all()
    trainer.save(tmp_path / "run")
    again = mc.Trainer.load(tmp_path / "run", device)
    assert again.skipped == 2
    assert again.on_non_finite == "skip"
    assert float(again.step(X, Y)) == float(trainer.step(X, Y))


def test_after_an_overflow_the_checkpoint_is_that_of_before_and_goes_on(device, tmp_path):
    class Spoil(mc.Callback):
        def step_end(self, trainer, J):
            if trainer.progress.step == 25:
                trainer.net.W[1][...] = 1e30
                trainer.net.W[2][...] = 1e30

    path, trainer = tmp_path / "run", make(device, "relu")
    with pytest.raises(mc.NonFiniteLoss):
        trainer.fit(
            X,
            Y,
            epochs=5,
            batch_size=6,
            progress=False,
            checkpoint=path,
            every="10 steps",
            callbacks=[Spoil()],
        )
    again = mc.Trainer.load(path, device)
    assert again.progress.step == 20
    whole = make(device, "relu")
    whole.fit(X, Y, epochs=5, batch_size=6, progress=False)
    again.fit(X, Y, epochs=5, batch_size=6, progress=False)
    np.testing.assert_array_equal(again.net.parameters, whole.net.parameters)


def test_a_setting_that_is_neither_raise_nor_skip_is_refused():
    with pytest.raises(ValueError, match="on_non_finite: unknown name 'ignore'"):
        make(on_non_finite="ignore")


# -- memory that runs out
# --------------------------------------------------------------------------------------------------


def test_when_memory_runs_out_the_chunk_is_halved_and_the_step_is_the_same(
    device, monkeypatch, caplog
):
    plain, short = make(device, chunk_rows=32, workers=1), make(device, chunk_rows=32, workers=1)
    allowed = part_bytes(make(device, chunk_rows=16, workers=1).plan(60).parts["workspace"])
    target = NumpyOps if device == "cpu" else CpuDevice
    empty = target.empty
    limit = {"on": False}

    def scarce(self, nbytes):
        if limit["on"] and allowed < nbytes != 65536:  # which are the losses of the steps
            raise MemoryError(f"{nbytes} bytes")
        return empty(self, nbytes)

    monkeypatch.setattr(target, "empty", scarce)
    J = float(plain.step(X, Y))
    limit["on"] = True
    with caplog.at_level(logging.WARNING):
        K = float(short.step(X, Y))
    assert "out of memory: chunks of 16 rows instead of 32 from here on" in caplog.text
    np.testing.assert_allclose(J, K, rtol=1e-6)
    np.testing.assert_allclose(plain.net.parameters, short.net.parameters, rtol=1e-5, atol=1e-7)
    caplog.clear()
    short.step(X, Y)
    assert not caplog.text, "it stays at the smaller chunk"


def test_when_not_even_one_row_fits_the_largest_arrays_are_named(monkeypatch):
    trainer = make(workers=1)
    trainer.step(X[:1], Y[:1])
    trainer._step._drop_workspace()

    def none(self, nbytes):
        raise MemoryError(f"{nbytes} bytes")

    monkeypatch.setattr(NumpyOps, "empty", none)
    with pytest.raises(
        MemoryError,
        match="not even one row at a time fits the memory that is left; the largest: parameters",
    ):
        trainer.step(X, Y)
    monkeypatch.undo()
    assert np.isfinite(trainer.step(X, Y))


# -- threads and processes
# -------------------------------------------------------------------------------------------------


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


def test_trainers_work_under_joblib():
    from joblib import Parallel, delayed
    from threadpoolctl import threadpool_limits

    there = Parallel(n_jobs=2)(delayed(trained)(seed, 1) for seed in (1, 2))
    with threadpool_limits(1, "blas"):  # as joblib's processes have it
        assert there == [trained(1, 1), trained(2, 1)]


# -- determinism
# -----------------------------------------------------------------------------------------------------------

HASH = """
import sys, hashlib, numpy as np, mlpcore as mc
from mlpcore.backends import devices
from tests.backends.cuda.emulator.device import CpuDevice
device = sys.argv[1]
if device != "cpu":
    devices._opened["cuda:0"] = CpuDevice()
rng = np.random.default_rng(1)
m = 2500 if device == "cpu" else 200
x, y = rng.standard_normal((m, 16)).astype(np.float32), rng.integers(0, 3, m)
net = mc.MLP([16, 24, 3], "gelu", "softmax", device=device, seed=2)
trainer = mc.Trainer(net, "cross_entropy", mc.AdamW(1e-3), clip_norm=1.0, deterministic=True, seed=3)
trainer.fit(x, y, epochs=100 * 50 // m, batch_size=50, progress=False)
assert trainer.progress.step == 100
print(hashlib.sha256(devices.to_host(device, net.parameters).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_parameters_after_100_steps_are_the_same_bits_in_two_processes(device):
    root = str(Path(__file__).parents[1])
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


# -- the memory limit, as the process sees it
# ------------------------------------------------------------------------------

PEAK = """
import sys, numpy as np, mlpcore as mc
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
limit = sys.argv[1] if len(sys.argv) > 1 else None
rng = np.random.default_rng(0)
X, Y = rng.standard_normal((4096, 256), np.float32), rng.standard_normal((4096, 8), np.float32)
net = mc.MLP([256, 2048, 2048, 8], "relu", device="cpu")
def make():
    return mc.Trainer(net, "squared_error", mc.AdamW(1e-3), memory_limit=limit)
make().step(X, Y)  # BLAS's own buffers
trainer = make()
plan = trainer.plan(len(X))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
trainer.step(X, Y)
trainer.step(X, Y)
print(plan.total_bytes, plan.total_bytes - net.parameters.nbytes, status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak"
)
@pytest.mark.parametrize("limit", ["", "100 MiB"])
def test_the_process_takes_what_the_plan_says_within_2_percent(limit):
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *([limit] if limit else [])],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    total, planned, peak = map(int, run.stdout.split())
    assert 0.97 * planned < peak < 1.02 * planned
    if limit:
        assert 90 << 20 < total <= 100 << 20


MAPPED = """
import sys, numpy as np, mlpcore as mc
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
X = np.memmap(sys.argv[1], np.float32, "w+", shape=(65536, 128))
X[:] = 1
Y = np.ones((65536, 1), np.float32)
X._mmap.madvise(4)  # its pages do not count to this process
net = mc.MLP([128, 32, 1], "relu", device="cpu")
trainer = mc.Trainer(net, "squared_error", mc.SGD(1e-9), memory_limit="6 MiB")
small, fit = np.ones((600, 128), np.float32), {"epochs": 1, "batch_size": 64, "progress": False}
trainer.fit(small, Y[:600], validation=(X[:999], Y[:999]), **fit)  # what Python and BLAS take at first
net.predict(small, memory_limit="6 MiB"), trainer.losses(X[:999], Y[:999])
for call in (
    lambda: trainer.evaluate(X, Y),
    lambda: trainer.losses(X, Y),
    lambda: trainer.fit(small, Y[:600], validation=(X, Y), **fit),
    lambda: net.predict(X, memory_limit="6 MiB"),
    lambda: net.predict(X[::-1], memory_limit="6 MiB"),
):
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = status("VmRSS")
    call()
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak"
)
def test_the_process_evaluates_and_predicts_a_mapped_file_within_the_limit(tmp_path):
    """32 MiB in a file, 6 MiB allowed: windows, and those pages of the file that are in use."""
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    command = [sys.executable, "-c", MAPPED, str(tmp_path / "X")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    peaks = [int(line) for line in run.stdout.split()]
    assert len(peaks) == 5
    assert max(peaks) < 8 << 20, peaks
