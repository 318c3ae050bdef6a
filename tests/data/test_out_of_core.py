"""`fit` and `evaluate` on rows that lie in files, or come in batches."""

import re
import threading

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zarr

import mlpcore as mc
from mlpcore.backends import devices
from mlpcore.data import windows
from mlpcore.training import evaluation
from tests.backends.cuda.emulator.device import CpuDevice

RNG = np.random.default_rng(0)
X, Y = (
    RNG.standard_normal((330, 4)).astype(np.float32),
    RNG.standard_normal((330, 2)).astype(np.float32),
)
LABELS, W = RNG.integers(0, 3, 330), RNG.uniform(0, 1, 330).astype(np.float32)
KINDS = ["memmap", "h5py", "zarr", "parquet", "function"]


def in_file(kind, folder, labels=False):
    """X and Y as arguments of `fit`."""
    y = LABELS if labels else Y
    if kind == "memmap":
        X.tofile(folder / "X")
        y.tofile(folder / "Y")
        return np.memmap(folder / "X", X.dtype, "r", shape=X.shape), np.memmap(
            folder / "Y", y.dtype, "r", shape=y.shape
        )
    if kind == "h5py":
        file = h5py.File(folder / "data.h5", "w")
        return file.create_dataset("X", data=X), file.create_dataset("Y", data=y)
    if kind == "zarr":
        group = zarr.open_group(folder / "data.zarr", mode="w")
        return group.create_array("X", data=X, chunks=(50, 4)), group.create_array(
            "Y", data=y, chunks=(50, *y.shape[1:])
        )
    if kind == "parquet":
        columns = {f"x{i}": X[:, i] for i in range(4)} | (
            {"y": y} if labels else {f"y{i}": y[:, i] for i in range(2)}
        )
        pyarrow.parquet.write_table(
            pyarrow.table(columns), folder / "data.parquet", row_group_size=47
        )
        return (mc.Parquet(folder / "data.parquet", target="y" if labels else ["y0", "y1"]),)
    return (lambda: ((X[i : i + 20], y[i : i + 20]) for i in range(0, 330, 20)),)


def make(device="cpu", labels=False, **settings):
    net = mc.MLP(
        [4, 6, 3 if labels else 2],
        "tanh",
        "softmax" if labels else "identity",
        device=device,
        seed=1,
    )
    return mc.Trainer(
        net, "cross_entropy" if labels else "squared_error", mc.AdamW(1e-2), **settings
    )


def times_out(history):
    return {key: value for key, value in history.items() if key != "seconds"}


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_file_train_as_rows_in_memory_do(kind, device, labels, tmp_path, monkeypatch):
    if device != "cpu":
        emulated = CpuDevice()
        emulated.host_inputs = True
        monkeypatch.setitem(devices._opened, "cuda:0", emulated)
    one, other = make(device, labels), make(device, labels)
    y = LABELS if labels else Y
    fit = {"epochs": 2, "batch_size": 20, "shuffle": False, "progress": False}
    history = one.fit(X, y, validation=(X[:60], y[:60]), **fit)
    assert times_out(
        other.fit(*in_file(kind, tmp_path, labels), validation=(X[:60], y[:60]), **fit)
    ) == times_out(history)
    np.testing.assert_array_equal(one.net.parameters, other.net.parameters)
    want, got = one.evaluate(X, y), other.evaluate(*in_file(kind, tmp_path, labels))
    assert list(want) == list(got)
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-6)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "function"])
def test_validation_may_lie_in_a_file_too(kind, tmp_path):
    one, other = make(), make()
    there = in_file(kind, tmp_path)
    want = one.fit(X, Y, validation=(X, Y), epochs=1, progress=False)
    got = other.fit(
        X, Y, validation=there[0] if kind == "parquet" else there, epochs=1, progress=False
    )
    for key in ("validation_loss", "validation_r2"):
        np.testing.assert_allclose(got[key], want[key], rtol=1e-6)


def small_windows(monkeypatch):
    monkeypatch.setattr(windows, "WINDOW", 2000)
    monkeypatch.setattr(windows, "BLOCK", 200)


@pytest.mark.parametrize("stop", [1, 16, 17, 18, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_file_goes_on_from_any_batch_to_the_bit(kind, stop, tmp_path, monkeypatch):
    class Stop(mc.Callback):
        def step_end(self, trainer, J):
            if trainer.progress.step == stop:
                trainer.save(tmp_path / "run")
                raise KeyboardInterrupt

    small_windows(monkeypatch)
    table, fit = (
        in_file(kind, tmp_path),
        {"epochs": 3, "batch_size": 20, "progress": False, "validation": (X[:50], Y[:50])},
    )
    whole = make()
    history = whole.fit(*table, **fit)
    with pytest.raises(KeyboardInterrupt):
        make().fit(*table, callbacks=[Stop()], **fit)
    other = mc.Trainer.load(tmp_path / "run")
    assert times_out(other.fit(*table, **fit)) == times_out(history)
    np.testing.assert_array_equal(other.net.parameters, whole.net.parameters)
    assert not [t for t in threading.enumerate() if "reader" in t.name]


def test_the_windows_are_in_the_plan_and_under_the_memory_limit(tmp_path, monkeypatch):
    small_windows(monkeypatch)
    trainer, plans = make(memory_limit="40 KiB"), []
    trainer.fit(
        *in_file("memmap", tmp_path), epochs=1, batch_size=20, progress=False,
        callbacks=[lambda t,
            _: plans.append(t._step.workspace.make_plan(20, t._step.workspace.inputs,
                    t._step.workspace.reserved))],
    )  # fmt: skip
    assert plans[0].total_bytes <= 40 << 10
    assert {"X window 1", "Y window 2", "order window 1"} <= {x.name for x in plans[0].parts["fit"]}


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("kind", ["memmap", "parquet"])
def test_evaluation_of_a_file_keeps_the_limit_and_lists_its_windows(
    kind, weights, tmp_path, monkeypatch
):
    """330 rows are read through windows of some of them, in `evaluate`, `losses` and `fit`."""
    table, seen = in_file(kind, tmp_path, labels=True), []
    more = {"class_weight": weights} if weights else {}
    free = make(labels=True, chunk_rows=20, **more)
    limited = make(
        labels=True, chunk_rows=20, memory_limit=free.plan(20).total_bytes + 6000, **more
    )
    evaluate = type(limited._step).evaluate

    def look(step, batch, plan, see):
        seen.append((plan, batch.size))
        return evaluate(step, batch, plan, see)

    monkeypatch.setattr(type(limited._step), "evaluate", look)
    want, losses = free.evaluate(X, LABELS), free.losses(X, LABELS)
    seen.clear()
    got = limited.evaluate(*table)
    for key in want:
        assert got[key] == pytest.approx(want[key], rel=1e-6)
    np.testing.assert_allclose(limited.losses(*table), losses, rtol=1e-6)
    before = limited.plan(20)
    limited.fit(
        X,
        LABELS,
        epochs=2,
        batch_size=20,
        validation=table if kind == "memmap" else table[0],
        progress=False,
    )
    assert len(seen) > 8, "windows"
    for plan, rows in seen:
        assert plan.total_bytes <= limited._step.problem.settings.memory_limit
        shapes = {x.name: x.shape for x in plan.parts["fit"]}
        assert shapes["X window 1"][0] >= rows
        assert not {"order window 1", "order window 2"} & set(shapes)
        assert ("row weights" in shapes) == (weights is not None)
    assert str(limited.plan(20)) == str(before), "they are given back"
    with pytest.raises(MemoryError, match=r"memory_limit .* is needed; the largest: .*parameters"):
        make(labels=True, memory_limit=free.net.parameters.nbytes, **more).evaluate(*table)


def test_an_evaluation_that_fails_gives_its_windows_back(tmp_path):
    trainer = make(memory_limit="40 KiB")
    before = str(trainer.plan(20))

    def metric(Y, output):
        raise RuntimeError("no")

    bad = X.copy()
    bad[-1] = np.nan
    bad.tofile(tmp_path / "bad")
    with pytest.raises(ValueError, match="row 329") as kept:
        trainer.evaluate(np.memmap(tmp_path / "bad", X.dtype, "r", shape=X.shape), Y)
    with pytest.raises(RuntimeError) as also:
        trainer.evaluate(*in_file("memmap", tmp_path), metrics={"m": metric})
    assert trainer._step.workspace.reserved == () or not trainer._step.workspace.reserved
    assert str(trainer.plan(20)) == before
    assert kept.traceback
    assert also.traceback
    assert not [t for t in threading.enumerate() if "reader" in t.name]


def test_faults_of_a_file_are_named_and_leave_no_thread(tmp_path):
    table = in_file("memmap", tmp_path)
    narrow = mc.Trainer(mc.MLP([3, 2]), "squared_error")
    with pytest.raises(ValueError, match="X has 4 columns; the network takes 3"):
        narrow.fit(*table, progress=False)
    with pytest.raises(ValueError, match="validation: X has 4 columns"):
        narrow.fit(X[:, :3], Y, validation=table, progress=False)
    with pytest.raises(ValueError, match="Y is missing"):
        make().fit(table[0], progress=False)
    with pytest.raises(TypeError, match="empty in the second epoch: pass a function"):
        make().fit(iter([(X, Y)]), progress=False)
    labels = LABELS.copy()
    labels[200] = 7
    labels.tofile(tmp_path / "Y")
    trainer = make(labels=True)
    with pytest.raises(ValueError, match=r"^Y must hold classes 0 … 2; row 200 holds 7$"):
        trainer.fit(
            table[0], np.memmap(tmp_path / "Y", labels.dtype, "r"), batch_size=400, progress=False
        )
    assert trainer.progress.step == 0
    assert not [t for t in threading.enumerate() if "reader" in t.name]


def test_a_function_is_told_the_epoch_and_batches_may_differ_in_size(tmp_path):
    seen = []

    def batches(epoch):
        seen.append(epoch)
        yield X[:7], Y[:7], W[:7]
        yield X[7:100], Y[7:100], W[7:100]

    trainer, other = make(), make()
    trainer.fit(batches, epochs=3, progress=False)
    assert seen == [0, 1, 2]
    for _ in range(3):
        other.step(X[:7], Y[:7], W[:7])
        other.step(X[7:100], Y[7:100], W[7:100])
    np.testing.assert_array_equal(trainer.net.parameters, other.net.parameters)


@pytest.mark.parametrize("window", [400, 2000, 1 << 20])
@pytest.mark.parametrize("kind", ["memmap", "function"])
def test_batches_that_weigh_nothing_are_passed_over_as_in_memory(
    kind, window, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "WINDOW", window)
    w = W.copy()
    w[60:240] = 0
    table = (*in_file("memmap", tmp_path), w)
    if kind == "function":
        table = (
            lambda: ((X[i : i + 20], Y[i : i + 20], w[i : i + 20]) for i in range(0, 330, 20)),
        )
    one, other = make(), make()
    fit = {"epochs": 2, "batch_size": 20, "shuffle": False, "progress": False}
    assert times_out(other.fit(*table, **fit)) == times_out(one.fit(X, Y, w, **fit))
    np.testing.assert_array_equal(other.net.parameters, one.net.parameters)
    monkeypatch.setattr(evaluation, "EVALUATED", window)
    monkeypatch.setattr(evaluation.planning, "WIDEST", 20)
    want, got = one.evaluate(X, Y, w), other.evaluate(*table)
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)


def test_an_epoch_that_weighs_nothing_is_refused(tmp_path):
    table = (*in_file("memmap", tmp_path), np.zeros(330))
    for call in (make().evaluate, lambda *t: make().fit(*t, progress=False)):
        with pytest.raises(ValueError, match=r"^sample_weight must not be all zero$"):
            call(*table)


@pytest.mark.parametrize("first", [True, False])
def test_either_all_batches_have_weights_or_none_has(first):
    weighted, plain = (X[:20], Y[:20], W[:20]), (X[:20], Y[:20])
    batches = [weighted, weighted, plain] if first else [plain, plain, weighted]
    match = "batch 2: has " + (
        "no sample_weight; earlier ones have one"
        if first
        else "a sample_weight; earlier ones have none"
    )
    for source in (batches, lambda: iter(batches)):
        with pytest.raises(TypeError, match=match):
            make().fit(source, progress=False)


@pytest.mark.parametrize("kind", ["memmap", "parquet", "h5py"])
def test_a_bad_label_is_named_by_its_row_in_the_file_whatever_the_window(
    kind, tmp_path, monkeypatch
):
    small_windows(monkeypatch)
    monkeypatch.setitem(globals(), "LABELS", np.where(np.arange(330) == 321, 9, LABELS))
    table = in_file(kind, tmp_path, labels=True)
    for call in (
        make(labels=True).evaluate,
        lambda *t: make(labels=True).fit(*t, batch_size=20, progress=False),
    ):
        with pytest.raises(ValueError, match=r"^Y must hold classes 0 … 2; row 321 holds 9$"):
            call(*table)
    share = np.full((330, 3), 1 / 3)
    share[300] = 1
    with pytest.raises(
        ValueError, match=r"^Y must be one-hot, or each row a distribution over classes; row 300 is"
    ):
        make(labels=True).fit(in_file("memmap", tmp_path)[0], share, batch_size=20, progress=False)
    net = mc.MLP([4, 2], output="sigmoid")
    y = np.where(np.arange(330)[:, None] == 320, 2.0, abs(Y) / 9)
    with pytest.raises(ValueError, match=r"^Y: binary_cross_entropy takes 0 … 1; row 320 holds"):
        mc.Trainer(net, "binary_cross_entropy").fit(
            in_file("memmap", tmp_path)[0], y, batch_size=20, progress=False
        )


def test_a_bad_label_of_a_batch_is_named_with_the_batch():
    bad = (X[:20], np.where(np.arange(20) == 5, 9, LABELS[:20]))
    with pytest.raises(ValueError, match=r"^batch 1: Y must hold classes 0 … 2; row 5 holds 9$"):
        make(labels=True).fit(lambda: iter([(X[:20], LABELS[:20]), bad]), progress=False)
    with pytest.raises(
        ValueError,
        match=r"^batch 0: Y must have shape \(20, 3\) or \(20,\) class indices; got \(20, 2\)$",
    ):
        make(labels=True).fit(lambda: iter([(X[:20], Y[:20])]), progress=False)


def test_the_form_of_targets_is_refused_before_a_row_is_read(tmp_path):
    class Unreadable:
        shape, dtype = X.shape, X.dtype

        def __getitem__(self, rows):
            raise AssertionError("read")

    for trainer, y, message in (
        (make(), Y[:, :1], r"Y must have shape \(330, 2\); got \(330, 1\)"),
        (make(), LABELS, r"Y must have shape \(330, 2\); got \(330,\)"),
        (
            make(labels=True),
            LABELS.astype(float),
            "Y holds class indices and must have an integer dtype; got float64",
        ),
    ):
        for call in (trainer.evaluate, lambda *t, trainer=trainer: trainer.fit(*t, progress=False)):
            with pytest.raises(ValueError, match=f"^{message}$") as caught:
                call(Unreadable(), y)
            assert not hasattr(caught.value, "__notes__")
        with pytest.raises(ValueError, match=f"^validation: {message}$"):
            trainer.fit(
                X,
                LABELS if trainer.loss.takes_classes else Y,
                validation=(Unreadable(), y),
                progress=False,
            )


def test_what_is_no_array_is_called_by_its_name(tmp_path):
    (table,) = in_file("parquet", tmp_path)
    for call in (make().net.predict, make().step, make().prepare):
        with pytest.raises(
            TypeError,
            match=r"^X must hold real numbers; got Parquet; only fit and evaluate take it$",
        ):
            call(*((table,) if call.__name__ == "predict" else (table, Y)))
    with pytest.raises(TypeError, match=r"^X must hold real numbers; got dict$"):
        make().fit({"a": 1}, Y, progress=False)


def test_a_file_that_is_closed_meanwhile_says_which_rows_were_asked_for(tmp_path, monkeypatch):
    small_windows(monkeypatch)
    table = in_file("h5py", tmp_path)
    file = table[0].file

    class Close(mc.Callback):
        def step_end(self, trainer, J):
            file.close()

    with pytest.raises((ValueError, RuntimeError, OSError)) as caught:
        make().fit(*table, epochs=2, batch_size=20, callbacks=[Close()], progress=False)
    assert re.fullmatch(r"X was asked for its rows \d+ … \d+", caught.value.__notes__[0])


# -- the same rows, the same order


def fitted(*table, **settings):
    trainer = make(**settings)
    trainer.fit(*table, epochs=2, batch_size=20, progress=False)
    return trainer.net.parameters


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize(
    "kind", ["memmap", "view", "slice", "read-only", "h5py", "zarr", "parquet"]
)
def test_rows_that_fit_one_window_are_shuffled_as_in_memory_wherever_they_lie(
    kind, device, tmp_path, monkeypatch
):
    if device != "cpu":
        emulated = CpuDevice()
        emulated.host_inputs = True
        monkeypatch.setitem(devices._opened, "cuda:0", emulated)
    if kind == "view":
        table = [np.asarray(array) for array in in_file("memmap", tmp_path)]
    elif kind == "slice":
        np.repeat(X, 2, axis=0).tofile(tmp_path / "twice")
        table = [np.memmap(tmp_path / "twice", X.dtype, "r", shape=(660, 4))[::2], Y]
    elif kind == "read-only":
        table = [X.copy(), Y.copy()]
        for array in table:
            array.flags.writeable = False
    else:
        table = in_file(kind, tmp_path)
    np.testing.assert_array_equal(fitted(*table, device=device), fitted(X, Y, device=device))


def test_a_run_on_a_memmap_that_was_stopped_goes_on_in_the_order_of_the_rows_in_memory(tmp_path):
    class Stop(mc.Callback):
        def step_end(self, trainer, J):
            if trainer.progress.step == 21:
                trainer.save(tmp_path / "run")
                raise KeyboardInterrupt

    table = in_file("memmap", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        make().fit(*table, epochs=2, batch_size=20, callbacks=[Stop()], progress=False)
    other = mc.Trainer.load(tmp_path / "run")
    other.fit(*table, epochs=2, batch_size=20, progress=False)
    np.testing.assert_array_equal(other.net.parameters, fitted(X, Y))


def test_joblibs_workers_which_get_memmaps_train_as_the_process_that_sent_them():
    joblib = pytest.importorskip("joblib")
    with joblib.Parallel(n_jobs=2, max_nbytes=100) as parallel:
        (found,) = parallel([joblib.delayed(_fitted_and_mapped)(X, Y)])
    parameters, mapped = found
    assert mapped
    np.testing.assert_array_equal(parameters, fitted(X, Y))


def _fitted_and_mapped(x, y):
    return fitted(x, y), isinstance(x, np.memmap)


# -- loaders that do not know their length


class Loader:
    """Batches, and a length that says what it likes."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter([(X[i : i + 20], Y[i : i + 20]) for i in range(0, 330, 20)])

    def __len__(self):
        if isinstance(self.length, Exception):
            raise self.length
        return self.length


@pytest.mark.parametrize(
    "length",
    [TypeError("object of type 'IterableDataset' has no len()"), NotImplementedError(), 17, 3],
)
def test_a_loader_that_does_not_know_its_length_is_read_until_it_ends(length):
    want, got = make(), make()
    history = want.fit(X, Y, epochs=2, batch_size=20, shuffle=False, progress=False)
    assert times_out(got.fit(Loader(length), epochs=2, progress=False)) == times_out(history)
    np.testing.assert_array_equal(got.net.parameters, want.net.parameters)


def test_other_errors_of_a_loaders_length_come_through():
    with pytest.raises(ConnectionError, match="the store is gone"):
        make().fit(Loader(ConnectionError("the store is gone")), epochs=1, progress=False)


def test_a_loader_of_an_iterable_dataset_of_pytorch_is_read_until_it_ends():
    torch = pytest.importorskip("torch")

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(torch.from_numpy(X), torch.from_numpy(Y), strict=True)

    loader = torch.utils.data.DataLoader(Rows(), batch_size=20)
    with pytest.raises(TypeError):
        len(loader)
    want, got = make(), make()
    want.fit(X, Y, epochs=2, batch_size=20, shuffle=False, progress=False)
    got.fit(loader, epochs=2, progress=False)
    np.testing.assert_array_equal(got.net.parameters, want.net.parameters)


@pytest.mark.parametrize(
    "described", [{"shape": None, "dtype": None}, {"shape": (330, 4), "dtype": None}]
)
def test_batches_with_a_shape_of_none_are_batches(described):
    class Described(Loader):
        def __getitem__(self, index):
            raise AssertionError("no array")

    source = Described(17)
    vars(source).update(described)
    want, got = make(), make()
    want.fit(X, Y, epochs=1, batch_size=20, shuffle=False, progress=False)
    got.fit(source, epochs=1, progress=False)
    np.testing.assert_array_equal(got.net.parameters, want.net.parameters)


def test_an_array_that_does_not_know_its_rows_is_refused_by_name():
    class Unknown:
        shape, dtype = (float("nan"), 4), X.dtype

        def __getitem__(self, rows):
            return X[rows]

    with pytest.raises(ValueError, match=r"^X must have a known shape; it has \(nan, 4\)$"):
        make().fit(Unknown(), Y, progress=False)
