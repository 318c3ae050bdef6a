"""Runs that go on from a file to the bit, signals, and trainers that are copied."""

import copy
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends import devices
from mlpcore.engine.cpu_step import CpuStep
from mlpcore.io import model_file
from mlpcore.training import checkpoints
from mlpcore.training import saving as checkpoint
from tests.backends.cuda.emulator.device import CpuDevice

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((103, 4)), RNG.standard_normal((103, 2))
W = RNG.uniform(0, 1, 103) * (RNG.random(103) > 0.2)
FIT = {"epochs": 4, "batch_size": 10, "progress": False, "validation": (X[:20], Y[:20])}


def make(device="cpu", optimizer=None, **settings):
    net = mc.MLP([4, 6, 2], "tanh", dtype="float32", device=device, seed=3)
    return mc.Trainer(net, "squared_error", optimizer or mc.AdamW(1e-2), **{"seed": 5, **settings})


class StopAfter(mc.Callback):
    """Saves after so many steps, as a kill would leave it, and ends the process's part."""

    def __init__(self, steps, path):
        self.steps, self.path = steps, path

    def step_end(self, trainer, J):
        self.steps -= 1
        if self.steps == 0:
            trainer.save(self.path)
            raise KeyboardInterrupt


def without_times(history):
    return {key: values for key, values in history.items() if key != "seconds"}


OPTIMIZERS = {
    "sgd": mc.SGD(mc.StepDecay(0.1, 7)),
    "momentum": mc.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": mc.Adam(mc.InverseScaling(1e-2)),
    "adamw": mc.AdamW(mc.Cosine(1e-2, warmup=5)),
    "rmsprop": mc.RMSprop(1e-3),
    "lion": mc.Lion(mc.Adaptive(1e-3, patience=1, tolerance=10)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 11, 13, 33])
def test_a_run_goes_on_from_any_batch_as_if_it_had_never_stopped(name, stop, device, tmp_path):
    if device != "cpu" and (name not in ("adamw", "lion") or stop == 33):
        return  # the same code; the emulated device is slow
    more = {"sample_weight": W, "early_stopping": mc.EarlyStopping(2), **FIT}
    whole = make(device, OPTIMIZERS[name], l2=1e-3, clip_norm=0.5)
    history = whole.fit(X, Y, **more)
    path, first = (
        tmp_path / "run.safetensors",
        make(device, OPTIMIZERS[name], l2=1e-3, clip_norm=0.5),
    )
    with pytest.raises(KeyboardInterrupt):
        first.fit(X, Y, callbacks=[StopAfter(stop, path)], **more)
    second = mc.Trainer.load(path, device)
    assert (
        second.unfinished
        == f"in epoch {1 + (stop - 1) // 11} of 4, after {(stop - 1) % 11 + 1} of its batches"
    )
    assert second.optimizer == OPTIMIZERS[name]
    assert without_times(second.fit(X, Y, **more)) == without_times(history)
    assert second.unfinished is None
    for one, other in zip(state(whole), state(second), strict=True):
        assert one == other


def state(trainer):
    """Everything that the next step depends on."""
    vectors, facts = trainer._step.snapshot()
    facts = {key: value for key, value in facts.items() if key != "plans"}
    progress = dataclasses.asdict(trainer.progress)
    return [
        trainer.net.parameters.tobytes(),
        {k: v.tobytes() for k, v in vectors.items()},
        facts,
        progress,
    ]


def test_a_run_after_larger_steps_goes_on_with_their_validation(tmp_path):
    for rows in range(21, 40):
        whole, first = make(), make()
        for one in (whole, first):
            one.step(X[:rows], Y[:rows])
        history = whole.fit(X, Y, **FIT)
        with pytest.raises(KeyboardInterrupt):
            first.fit(X, Y, callbacks=[StopAfter(3, tmp_path / "run")], **FIT)
        again = mc.Trainer.load(tmp_path / "run").fit(X, Y, **FIT)
        assert without_times(again) == without_times(history)
        (tmp_path / "run").unlink()


def test_a_run_is_saved_between_two_steps_of_ones_own_too(device, tmp_path):
    one = make(device)
    for i in range(3):
        one.step(X, Y, rows=[i, i + 1])
    one.save(tmp_path / "run")
    other = mc.Trainer.load(tmp_path / "run", device)
    assert float(one.step(X, Y)) == float(other.step(X, Y))
    assert state(one) == state(other)
    fresh = make(device)
    fresh.save(tmp_path / "fresh")
    assert float(mc.Trainer.load(tmp_path / "fresh", device).step(X, Y, rows=[1])) == float(
        fresh.step(X, Y, rows=[1])
    )


def test_checkpoints_come_as_often_as_asked_and_so_many_are_kept(tmp_path, monkeypatch):
    path, written = tmp_path / "run.safetensors", []
    save = mc.Trainer.save
    monkeypatch.setattr(
        mc.Trainer,
        "save",
        lambda self, *a, **k: written.append(self.progress.step) or save(self, *a, **k),
    )
    make().fit(X, Y, checkpoint=path, every="15 steps", keep=3, **FIT)
    assert written == [15, 30, 44]
    assert sorted(os.listdir(tmp_path)) == [
        "run.1.safetensors",
        "run.2.safetensors",
        "run.safetensors",
    ]
    steps = [
        model_file.read(tmp_path / name)[0]["trainer"]["progress"]["step"]
        for name in sorted(os.listdir(tmp_path))
    ]
    assert steps == [30, 15, 44]
    written.clear()
    make().fit(X, Y, checkpoint=path, **FIT)
    assert written == [11, 22, 33, 44]
    written.clear()
    monkeypatch.setattr(CpuStep, "together", lambda *_: 1)
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: next(clock))
    make().fit(X, Y, checkpoint=path, every="1 min", **FIT)
    assert 3 < len(written) < 12


def test_a_finished_run_says_so_and_the_next_fit_is_a_new_one(tmp_path):
    path, one = tmp_path / "run.safetensors", make()
    history = one.fit(X, Y, checkpoint=path, early_stopping=mc.EarlyStopping(1), **FIT)
    other = mc.Trainer.load(path)
    assert other.unfinished is None
    assert other.history == history == one.history
    np.testing.assert_array_equal(other.net.parameters, one.net.parameters)
    assert without_times(one.fit(X, Y, **FIT)) == without_times(other.fit(X, Y, **FIT))
    np.testing.assert_array_equal(
        mc.MLP.load(path).parameters, mc.Trainer.load(path).net.parameters
    )


def test_the_file_of_a_finished_run_has_no_schedule_of_that_run(tmp_path):
    make(optimizer=mc.SGD(mc.Cosine(0.1))).fit(X, Y, checkpoint=tmp_path / "run", **FIT)
    other = mc.Trainer.load(tmp_path / "run")
    with pytest.raises(ValueError, match="outside fit"):
        other.step(X, Y)


def test_another_call_than_the_one_that_was_interrupted_is_refused_by_the_argument(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        make().fit(X, Y, callbacks=[StopAfter(13, path)], **FIT)
    for change, name in (
        ({"epochs": 1}, "epochs"), ({"batch_size": 11}, "batch_size"),
        ({"shuffle": False}, "shuffle"),
        ({"validation": None}, "validation"),
        ({"early_stopping": mc.EarlyStopping(3)}, "early_stopping"),
    ):  # fmt: skip
        trainer = mc.Trainer.load(path)
        with pytest.raises(
            ValueError, match=rf"{name}: the unfinished run .*; got .*trainer\.abandon\(\)"
        ):
            trainer.fit(X, Y, **{**FIT, **change})
        assert trainer.unfinished
    with pytest.raises(ValueError, match=r"X: the unfinished run had 103 rows; got 50 rows"):
        trainer.fit(X[:50], Y[:50], **FIT)
    trainer.abandon()
    assert len(trainer.fit(X, Y, epochs=2, progress=False)["loss"]) == 2


@pytest.mark.parametrize(
    "text",
    ["", "5", "min", "5 parsecs", "0 steps", "1.5 steps", "-1 min", "5 min 3 s", "1e3 steps"],
)
def test_an_interval_that_is_none_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="every must be text such as '1000 steps'"):
        make().fit(X, Y, checkpoint=tmp_path / "run", every=text, **FIT)
    assert not os.listdir(tmp_path)


def test_intervals_are_read():
    assert checkpoints.interval("1000 steps") == (1000, "steps")
    assert checkpoints.interval("1 step") == (1, "steps")
    assert checkpoints.interval("5 min") == (300, "seconds")
    assert checkpoints.interval("0.5 h") == (1800, "seconds")
    assert (
        checkpoints.interval("30 s")
        == checkpoints.interval("30 seconds")
        == checkpoints.interval("30s")
        == (30, "seconds")
    )
    assert checkpoints.interval("2 epochs") == (2, "epochs")


def test_a_path_that_cannot_be_written_is_noticed_before_the_training(tmp_path):
    trainer = make()
    for path, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "gone" / "run", FileNotFoundError),
        (3, TypeError),
    ):
        with pytest.raises(error, match="checkpoint"):
            trainer.fit(X, Y, checkpoint=path, **FIT)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        trainer.fit(X, Y, checkpoint=tmp_path / "run", keep=0, **FIT)
    assert trainer.progress.step == 0


def test_files_that_hold_no_trainer_are_refused(tmp_path):
    make().net.save(tmp_path / "net")
    with pytest.raises(
        ValueError, match=r"holds a network without a trainer: load it with mc\.MLP\.load"
    ):
        mc.Trainer.load(tmp_path / "net")
    trainer = make()
    trainer.step(X, Y)
    trainer.save(tmp_path / "run")
    header, tensors = model_file.read(tmp_path / "run")
    described = header["trainer"]
    for change in (
        {"optimizer": {"name": "Magic"}}, {"optimizer": {"name": "AdamW", "learning_rate": -1}},
        {"settings": {"x": 1}},
        {"loss": None}, {"loss": {**described["loss"], "value": "import os"}},
        {"progress": {"steps": 3}}, {"step": {}},
        {"run": {"epoch": 1}},
        {"step": {**described["step"], "plans": [[1]]}},
    ):  # fmt: skip
        model_file.write(tmp_path / "bad", {**header, "trainer": {**described, **change}}, tensors)
        with pytest.raises(ValueError, match="bad' does not hold a trainer"):
            mc.Trainer.load(tmp_path / "bad")
    for wrong in (
        {**tensors, "state m": tensors["state m"][1:]},
        {k: v for k, v in tensors.items() if k != "state v"},
    ):
        model_file.write(tmp_path / "bad", header, wrong)
        with pytest.raises(ValueError, match="state vectors"):
            mc.Trainer.load(tmp_path / "bad")


def test_an_optimizer_of_the_users_own_is_said_not_to_be_saved(tmp_path):
    class Mine(mc.SGD):
        @property
        def row(self):
            return "sgd"

    with pytest.raises(TypeError, match="Mine is not one of mlpcore's own and cannot be saved"):
        make(optimizer=Mine(0.1)).save(tmp_path / "run")
    assert not os.listdir(tmp_path)


def test_a_users_own_loss_and_activation_come_back(tmp_path):
    net = mc.MLP([4, 5, 2], mc.Activation("cubic", "s * s * s", "3 * s * s"))
    fourth = mc.Loss(
        "fourth", "(z - y) * (z - y) * (z - y) * (z - y)", "4 * (z - y) * (z - y) * (z - y)"
    )
    one = mc.Trainer(net, fourth, mc.SGD(1e-4))
    one.save(tmp_path / "run")
    other = mc.Trainer.load(tmp_path / "run")
    assert other.loss == fourth
    assert one.step(X, Y) == other.step(X, Y)


@pytest.mark.emulated
def test_what_goes_on_elsewhere_says_that_the_bits_may_differ(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(devices._opened, "cuda:0", CpuDevice())
    one = make("cuda:0")
    for _ in range(3):
        one.step(X, Y, rows=[1, 2])
    one.save(tmp_path / "run")
    other = mc.Trainer.load(tmp_path / "run", "cpu")
    assert "written on cuda:0, resuming on cpu" in caplog.text
    np.testing.assert_allclose(float(one.step(X, Y)), other.step(X, Y), rtol=1e-5)
    np.testing.assert_allclose(one.net.parameters, other.net.parameters, rtol=1e-4, atol=1e-6)
    other.save(tmp_path / "back")
    back = mc.Trainer.load(tmp_path / "back", "cuda:0")
    np.testing.assert_allclose(float(back.step(X, Y)), other.step(X, Y), rtol=1e-5)
    np.testing.assert_allclose(back.net.parameters, other.net.parameters, rtol=1e-4, atol=1e-6)


# -- signals ---------------------------------------------------------------------------------------

SCRIPT = """
import sys, numpy as np, mlpcore as mc
rng = np.random.default_rng(0)
X, Y = rng.standard_normal((500, 8)), rng.standard_normal((500, 2))
path = sys.argv[1]
import os
if os.path.exists(path):
    trainer = mc.Trainer.load(path)
    print("resumed", trainer.unfinished, flush=True)
else:
    net, optimizer = mc.MLP([8, 16, 2], seed=1, device="cpu"), mc.AdamW(mc.Cosine(1e-2))
    trainer = mc.Trainer(net, "squared_error", optimizer, seed=2)
class Say(mc.Callback):
    def step_end(self, trainer, J):
        if trainer.progress.step == 30:
            print("running", flush=True)
if trainer.unfinished or not trainer.progress.step:
    trainer.fit(X, Y, epochs=int(sys.argv[2]), batch_size=20, progress=False, checkpoint=path,
                every=sys.argv[3], keep=2, callbacks=[Say()])
import hashlib
print("parameters", hashlib.sha256(trainer.net.parameters.tobytes()).hexdigest(), flush=True)
"""


def start(path, epochs, every="10 steps"):
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), str(epochs), every],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)]
)
def test_a_signal_finishes_the_step_saves_and_leaves_with_a_message(number, status, tmp_path):
    path = tmp_path / "run.safetensors"
    process = start(path, 100_000, "1 h")
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"{number.name}: stopped in epoch" in errors
    assert f"saved in {path}, Trainer.load resumes from there" in errors
    trainer = mc.Trainer.load(path)
    assert trainer.unfinished
    assert trainer.progress.step >= 30


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_parameters(tmp_path):
    whole, _ = start(tmp_path / "whole", 30).communicate(timeout=120)
    delays = np.random.default_rng(0).uniform(0, 0.3, 5)
    path = tmp_path / "run.safetensors"
    resumed = 0
    for delay in delays:
        process = start(path, 30)
        process.stdout.readline()  # running, or resumed
        threading.Timer(delay, process.kill).start()
        process.wait(timeout=60)
        process.stdout.close()
        process.stderr.close()
        if path.exists():
            mc.Trainer.load(path)
            resumed += 1
        for name in os.listdir(tmp_path):
            if name.endswith(".1.safetensors"):
                model_file.read(tmp_path / name)
    assert resumed
    out, errors = start(path, 30).communicate(timeout=120)
    assert out.splitlines()[-1] == whole.splitlines()[-1], errors


def test_a_users_handler_gets_the_signal_after_the_save(tmp_path):
    path, got = tmp_path / "run", []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append(path.exists()))
    try:
        with pytest.raises(SystemExit):
            make().fit(
                X,
                Y,
                checkpoint=path,
                callbacks=[lambda *_: signal.raise_signal(signal.SIGTERM)],
                **FIT,
            )
        assert got == [True]
        assert mc.Trainer.load(path).unfinished
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_fit_leaves_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    seen = []
    work = threading.Thread(
        target=lambda: seen.append(make().fit(X, Y, checkpoint=tmp_path / "run", **FIT)),
    )
    work.start()
    work.join()
    assert len(seen) == 1
    assert signal.getsignal(signal.SIGINT) is before


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_of_a_trainer_goes_its_own_way_from_the_same_point(how, device):
    one = make(device)
    one.fit(X, Y, **{**FIT, "epochs": 1})
    other = pickle.loads(pickle.dumps(one)) if how == "pickle" else copy.deepcopy(one)
    assert not np.shares_memory(one.net.parameters, other.net.parameters)
    assert other.net.device == device
    assert without_times(one.fit(X, Y, **FIT)) == without_times(other.fit(X, Y, **FIT))
    assert state(one) == state(other)
    other.step(X, Y)
    assert one.net.parameters.tobytes() != other.net.parameters.tobytes()


@pytest.mark.parametrize("replaced_by", ["schedule", "number"])
@pytest.mark.parametrize("how", ["save", "pickle", "deepcopy"])
def test_an_adaptive_schedule_that_was_replaced_lends_its_reductions_to_none_after_it(
    how, replaced_by, tmp_path
):
    first, second = (
        mc.Adaptive(rate, factor=0.5, patience=1, tolerance=1e9) for rate in (0.1, 0.01)
    )
    one = make(optimizer=mc.SGD(first))
    one.fit(X, Y, epochs=5, progress=False)
    assert one.learning_rate == 0.1 / 2**4
    one.optimizer.learning_rate = second if replaced_by == "schedule" else 0.05
    if how == "save":
        one.save(tmp_path / "one.safetensors")
        other = mc.Trainer.load(tmp_path / "one.safetensors")
    else:
        other = pickle.loads(pickle.dumps(one)) if how == "pickle" else copy.deepcopy(one)
    for trainer in (one, other):
        trainer.optimizer.learning_rate = first
        assert trainer.learning_rate == 0.1 / 2**4  # which has them still
        trainer.optimizer.learning_rate = second
        assert trainer.learning_rate == 0.01  # before a fit as well
        assert trainer.fit(X, Y, epochs=3, progress=False)["learning_rate"] == [0.01, 0.01, 0.005]
    assert state(one) == state(other)


def test_a_schedule_of_ones_own_that_was_replaced_does_not_keep_a_trainer_from_being_saved(
    tmp_path,
):
    class Own(mc.Adaptive):
        pass

    one = make(optimizer=mc.SGD(Own(0.1, factor=0.5, patience=1, tolerance=1e9)))
    one.fit(X, Y, epochs=5, progress=False)
    one.optimizer.learning_rate = schedule = mc.Adaptive(0.01, factor=0.5, patience=1)
    one.save(tmp_path / "one.safetensors")
    other = mc.Trainer.load(tmp_path / "one.safetensors")
    assert other.optimizer.learning_rate == schedule
    assert one.learning_rate == other.learning_rate == 0.01


def test_a_trainer_is_not_copied_while_fit_runs():
    with pytest.raises(RuntimeError, match="cannot be copied or pickled while fit is running"):
        make().fit(X, Y, callbacks=[lambda trainer, _: copy.deepcopy(trainer)], **FIT)


def test_the_header_is_json_that_people_can_read(tmp_path):
    trainer = make(optimizer=mc.AdamW(mc.Cosine(1e-2)))
    trainer.save(tmp_path / "run")
    from safetensors import safe_open

    with safe_open(tmp_path / "run", "numpy") as file:
        header = json.loads(file.metadata()["mlpcore"])
    assert header["trainer"]["optimizer"]["learning_rate"] == {
        "name": "Cosine", "rate": 0.01, "steps": None, "warmup": 0, "final": 0.0
    }  # fmt: skip
    assert header["trainer"]["versions"] == {"mlpcore": mc.__version__, "numpy": np.__version__}


# -- what the file holds ---------------------------------------------------------------------------


def head_of(path):
    """The length of a file's header, in bytes: the library refuses one of 100 MB."""
    return int.from_bytes(path.read_bytes()[:8], "little")


def test_a_checkpoint_of_version_1_goes_on():
    path = Path(__file__).parents[1] / "stored" / "trainer-1.safetensors"
    assert model_file.read(path)[0]["version"] == 1
    rows = np.sin(np.arange(90.0)).reshape(30, 3)
    labels = (rows.sum(axis=1) > 0).astype(int)
    trainer = mc.Trainer.load(path, "cpu")
    assert trainer.unfinished == "in epoch 2 of 4, after 2 of its batches"
    assert trainer.history["loss"] == [0.4382106567626981, 0.3109884023562642]
    assert trainer.loss.class_weight == (1.0, 2.0)
    history = trainer.fit(
        rows, labels, epochs=4, batch_size=10, progress=False, validation=(rows[:9], labels[:9]),
        early_stopping=mc.EarlyStopping(3),
    )  # fmt: skip
    found = [0.24737667452392959, 0.1512599598478784, 0.11089657483370877, 0.09909277272930947]
    np.testing.assert_allclose(history["loss"], found, rtol=1e-9)
    np.testing.assert_allclose(trainer.net.parameters[:2], [0.41220971, 0.60213126], atol=1e-8)


def test_histories_come_back_to_the_bit_and_their_keys_may_begin_later(tmp_path):
    trainer = make()
    odd = np.array([0x7FF8_0000_0000_0ABC, 0xFFF0_0000_0000_0000, 1 << 63, 1], np.uint64)
    trainer.history = {
        "loss": [*odd.view(np.float64).tolist(), 0.1],
        "\ud800": [],
        "skipped": [1.0, 3.0],
    }
    trainer.save(tmp_path / "run")
    found = mc.Trainer.load(tmp_path / "run").history
    assert list(found) == list(trainer.history)
    for name, values in trainer.history.items():
        assert np.array(found[name]).tobytes() == np.array(values).tobytes()


def test_many_epochs_leave_the_header_short(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        make().fit(X, Y, **{**FIT, "epochs": 400_000}, callbacks=[StopAfter(3, path)])
    trainer = mc.Trainer.load(path)
    history = {"loss": np.random.default_rng(1).random(200_000).tolist()}
    state, _ = trainer._learner.left
    trainer.history, state.history, state.epoch = history, history, 200_000
    trainer.save(path)
    assert head_of(path) < 10_000
    again = mc.Trainer.load(path)
    assert again.history == again._learner.left.state.history == history
    assert again.unfinished == "in epoch 200001 of 400000, after 3 of its batches"


@pytest.mark.parametrize("option", ["class_weight", "pos_weight"])
def test_a_weight_for_each_of_many_classes_leaves_the_header_short(option, tmp_path):
    output = {"class_weight": "softmax", "pos_weight": "sigmoid"}[option]
    net = mc.MLP([1, 20_000], "tanh", output, device="cpu", init="zeros")
    weights = np.random.default_rng(0).uniform(1, 2, 20_000)
    mc.Trainer(net, optimizer=mc.SGD(0.1), **{option: weights}).save(tmp_path / "run")
    assert head_of(tmp_path / "run") < 10_000
    assert getattr(mc.Trainer.load(tmp_path / "run").loss, option) == tuple(weights)


def test_lists_that_are_not_as_long_as_the_header_says_are_refused(tmp_path):
    trainer = make()
    trainer.fit(X, Y, **FIT)
    trainer.save(tmp_path / "run")
    header, tensors = model_file.read(tmp_path / "run")
    numbers = tensors["history"]
    for wrong in (numbers[1:], numbers[:, None], numbers.astype(np.float32), None):
        changed = {k: v for k, v in {**tensors, "history": wrong}.items() if v is not None}
        model_file.write(tmp_path / "bad", header, changed)
        with pytest.raises(ValueError, match=r"bad' does not hold a trainer: .*lists of"):
            mc.Trainer.load(tmp_path / "bad")


# -- what is saved can be loaded -------------------------------------------------------------------

EXTREMES = [
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**128,
    10**400,
    5e-324,
    1.7976931348623157e308,
    1 - 2**-53,
]
SCHEDULED = {
    mc.Constant: {}, mc.StepDecay: {"every": 3}, mc.Cosine: {"steps": 9}, mc.InverseScaling: {},
    mc.Adaptive: {},
    mc.FormulaSchedule: {"formula": "rate"},
}  # fmt: skip


def small(optimizer=None, **settings):
    net = mc.MLP([4, 2, 1], "tanh", "sigmoid", device="cpu", seed=1)
    return mc.Trainer(net, optimizer=optimizer, **settings)


def doors():
    """Functions by name that make a trainer with an extreme value of one setting."""
    numbers = (
        "l1",
        "l2",
        "clip_norm",
        "dropout",
        "chunk_rows",
        "workers",
        "seed",
        "label_smoothing",
        "pos_weight",
    )
    made = {name: lambda x, name=name: small(**{name: x}) for name in numbers}
    made["class_weight"] = lambda x: small(class_weight=[1, x])
    for rule in (mc.SGD, mc.Adam, mc.AdamW, mc.RMSprop, mc.Lion):
        for field in {f.name for f in dataclasses.fields(rule)} - {"layers"}:
            made[f"{rule.__name__} {field}"] = lambda x, rule=rule, field=field: small(
                rule(**{"learning_rate": 0.1, field: x})
            )
    for schedule, given in SCHEDULED.items():
        for field in (f.name for f in dataclasses.fields(schedule)):
            made[f"{schedule.__name__} {field}"] = (
                lambda x, make=schedule, given=given, field=field: small(
                    mc.SGD(make(**{"rate": 0.1, **given, field: x}))
                )
            )
    for field in (f.name for f in dataclasses.fields(mc.Layer)):
        made[f"Layer {field}"] = lambda x, field=field: small(
            mc.AdamW(0.1, layers={1: mc.Layer(**{field: x})})
        )
    return made


def refusal(function, *arguments, **named):
    """The message with which a call is refused; None if it is not."""
    try:
        function(*arguments, **named)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.slow
def test_a_setting_of_any_size_comes_back_as_it_was_or_is_refused_by_its_name(tmp_path):
    came_back = 0
    for name, door in doors().items():
        for value in EXTREMES:
            found = []
            message = refusal(lambda door=door, value=value, found=found: found.append(door(value)))
            if message is not None:
                assert name.split()[-1] in message, (name, value)
                continue
            found[0].save(tmp_path / "run")
            other = mc.Trainer.load(tmp_path / "run", "cpu")
            assert checkpoint.describe_trainer(other._learner) == checkpoint.describe_trainer(
                found[0]._learner
            ), (name, value)
            came_back += 1
    assert came_back > 150


@pytest.mark.parametrize(
    "argument", ["epochs", "batch_size", "keep", "every", "patience", "minimum_change"]
)
@pytest.mark.parametrize("streamed", [False, True], ids=["arrays", "batches"])
def test_an_argument_of_fit_of_any_size_goes_on_or_is_refused_before_a_step(
    argument, streamed, tmp_path
):
    rows = (
        ((lambda: iter([(X[:4], Y[:4, :1] > 0), (X, Y[:, :1] > 0)])),)
        if streamed
        else (X, Y[:, :1] > 0)
    )
    went_on = 0
    for value in EXTREMES:
        fit, trainer = (
            {"epochs": 3, "batch_size": 40, "progress": False},
            small(mc.SGD(mc.Constant(0.1))),
        )
        saved = tmp_path / f"{value}"[:40]
        (tmp_path / "run").unlink(missing_ok=True)

        def call(one, value=value, fit=fit, **more):
            if argument in ("patience", "minimum_change"):
                fit["early_stopping"] = mc.EarlyStopping(monitor="loss", **{argument: value})
            else:
                fit[argument] = f"{value} steps" if argument == "every" else value
            return one.fit(*rows, **{**fit, **more}, checkpoint=tmp_path / "run")

        try:
            message = refusal(call, trainer, callbacks=[StopAfter(2, saved)])
        except KeyboardInterrupt:
            message = None
        if message is not None:
            assert argument in message
            assert trainer.progress.step == 0
            continue
        other = mc.Trainer.load(saved, "cpu")
        assert other.unfinished
        mine, theirs = (
            dataclasses.replace(one._learner.left.state, seconds=0) for one in (trainer, other)
        )
        assert mine == theirs
        with pytest.raises(KeyboardInterrupt):
            call(other, callbacks=[StopAfter(1, saved)])
        went_on += 1
    assert went_on >= 1


def test_epochs_beyond_what_a_checkpoint_counts_are_refused_with_the_limit():
    for epochs, limit in (
        (sys.maxsize, sys.maxsize // 11),
        (sys.maxsize // 11 + 1, sys.maxsize // 11),
        (1 << 63, sys.maxsize),
    ):
        trainer = make()
        with pytest.raises(ValueError, match=f"epochs must be at most {limit}"):
            trainer.fit(X, Y, **{**FIT, "epochs": epochs})
        assert trainer.progress.step == 0


def test_a_run_on_batches_of_fewer_rows_than_batch_size_can_be_loaded(tmp_path):
    batches = [(X[i : i + 3], Y[i : i + 3]) for i in range(0, 60, 3)]
    whole, first = make(), make()
    history = whole.fit(batches, epochs=2, progress=False)
    with pytest.raises(KeyboardInterrupt):
        first.fit(batches, epochs=2, progress=False, callbacks=[StopAfter(27, tmp_path / "run")])
    other = mc.Trainer.load(tmp_path / "run")
    assert other.fit(batches, epochs=2, progress=False)["loss"] == history["loss"]


def test_a_run_whose_losses_add_up_to_infinity_can_be_loaded(tmp_path):
    trainer = mc.Trainer(mc.MLP([4, 1], dtype="float64", device="cpu"), optimizer=mc.SGD(1e-300))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(X, 1e153 + X[:, :1], np.full(103, 1e10), batch_size=5, progress=False,
                    callbacks=[StopAfter(9, tmp_path / "run")])  # fmt: skip
    assert mc.Trainer.load(tmp_path / "run")._learner.left.state.loss == np.inf
