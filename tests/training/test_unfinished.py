"""Runs that stopped before their end: what leaves one, which call goes on with it, by what it knows
its data again.
"""

import contextlib
import copy
import pickle

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.data import epochs as sources

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((103, 4)), RNG.standard_normal((103, 1))
W = RNG.uniform(1, 2, 103)
FIT = {"epochs": 4, "batch_size": 10, "progress": False}


def make(device="cpu", optimizer=None, **settings):
    net = mc.MLP([4, 6, 1], "tanh", device=device, seed=3)
    optimizer = optimizer or mc.AdamW(mc.InverseScaling(1e-2))
    return mc.Trainer(net, "squared_error", optimizer, dropout=0.1, seed=5, **settings)


class Stop(mc.Callback):
    """Raises after so many steps, or at the end of so many epochs."""

    def __init__(self, steps=None, epochs=None, error=KeyboardInterrupt):
        self.steps, self.epochs, self.error = steps, epochs, error

    def step_end(self, trainer, J):
        if trainer.progress.step == self.steps:
            raise self.error

    def epoch_end(self, trainer, entry):
        if trainer.progress.epochs == self.epochs:
            raise self.error


def left(tmp_path, table=(X, Y), steps=15, **fit):
    """The path of a run that was left after so many steps."""
    trainer, path = make(), tmp_path / "run.safetensors"
    path.unlink(missing_ok=True)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(*table, **{**FIT, **fit}, callbacks=[Stop(steps)], checkpoint=path)
    trainer.save(path)
    return path


def same(one, other):
    """Return whether two trainers have come to the same parameters and histories, to the bit."""
    kept = [
        {k: v for k, v in trainer.history.items() if k != "seconds"} for trainer in (one, other)
    ]
    return kept[0] == kept[1] and one.net.parameters.tobytes() == other.net.parameters.tobytes()


# -- what leaves an unfinished run -----------------------------------------------------------------


class Faulty:
    """Batches, of which one cannot be read for the first time that it is asked for."""

    def __init__(self, at, error):
        self.at, self.error = at, error

    def __call__(self, epoch):
        for i in range(5):
            if (epoch, i) == self.at:
                self.at = None
                raise self.error
            yield X[20 * i : 20 * i + 20], Y[20 * i : 20 * i + 20]


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError, MemoryError])
@pytest.mark.parametrize("at", [(1, 0), (1, 3)], ids=["the first of an epoch", "a later one"])
def test_a_batch_that_cannot_be_read_is_read_again_by_the_same_call(at, error, device, tmp_path):
    if device != "cpu" and error is not OSError:
        return  # the same code; the emulated device is slow
    schedule = mc.FormulaSchedule(1e-2, "rate / epoch")
    whole, one = (make(device, mc.AdamW(schedule)) for _ in range(2))
    whole.fit(Faulty(None, error), epochs=3, progress=False)
    source = Faulty(at, error)
    with pytest.raises(error):
        one.fit(source, epochs=3, progress=False, checkpoint=tmp_path / "run")
    assert one.unfinished == f"in epoch 2 of 3, after {at[1]} of its batches"
    one.fit(source, epochs=3, progress=False)
    assert same(one, whole)


@pytest.mark.parametrize(
    "stop", [Stop(17, error=ValueError), Stop(epochs=2, error=RuntimeError), Stop(1)]
)
def test_a_callback_that_raises_leaves_a_run_with_a_checkpoint_where_it_was(stop, device, tmp_path):
    if device != "cpu" and stop.epochs is None:
        return
    whole, one = make(device), make(device)
    fit = {**FIT, "validation": (X[:9], Y[:9]), "early_stopping": mc.EarlyStopping(3)}
    whole.fit(X, Y, **fit)
    with pytest.raises(stop.error):
        one.fit(X, Y, callbacks=[stop], checkpoint=tmp_path / "run", **fit)
    copies = [copy.deepcopy(one), pickle.loads(pickle.dumps(one))] if device == "cpu" else []
    for other in (one, *copies):
        assert other.unfinished
        other.fit(X, Y, **fit)
        assert same(other, whole)
        assert other.unfinished is None


@pytest.mark.parametrize("between", ["evaluate", "gradient", "losses"])
def test_what_is_evaluated_between_an_error_and_the_same_call_leaves_the_history_as_it_is(
    between, device, tmp_path
):
    whole, one = make(device), make(device)
    rows = [np.concatenate([table] * 4) for table in (X, Y)]
    fit = {**FIT, "validation": rows}
    whole.fit(X, Y, **fit)
    with pytest.raises(KeyboardInterrupt):
        one.fit(X, Y, callbacks=[Stop(15)], checkpoint=tmp_path / "run", **fit)
    one.save(tmp_path / "run")
    for other in (one, mc.Trainer.load(tmp_path / "run", device)):
        getattr(other, between)(*rows)
        other.fit(X, Y, **fit)
        assert same(other, whole)


def test_a_metric_that_raises_is_measured_again(tmp_path):
    def mae(Y, output):
        if mae.faults:
            raise mae.faults.pop()
        return float(abs(Y - output).mean())

    fit = {**FIT, "validation": (X[:9], Y[:9]), "metrics": {"mae": mae}}
    whole, one = make(), make()
    mae.faults = []
    whole.fit(X, Y, **fit)
    mae.faults = [RuntimeError("not now")]
    with pytest.raises(RuntimeError, match="not now"):
        one.fit(X, Y, checkpoint=tmp_path / "run", **fit)
    assert one.unfinished == "in epoch 1 of 4, after 11 of its batches"
    one.fit(X, Y, **fit)
    assert same(one, whole)


def test_without_a_checkpoint_a_run_that_stops_is_over_and_fit_trains_on():
    one, other = make(), make()
    with pytest.raises(KeyboardInterrupt):
        one.fit(X, Y, callbacks=[Stop(15)], **FIT)
    assert one.unfinished is None
    assert one.progress.total is None
    one.fit(X, Y, **{**FIT, "epochs": 1})
    assert one.progress.step == 15 + 11
    with contextlib.suppress(KeyboardInterrupt):
        other.fit(X, Y, callbacks=[Stop(15)], **FIT)
    other.fit(X[:50], Y[:50], **FIT)  # whatever it is called with


def test_what_would_end_as_before_is_not_unfinished(tmp_path):
    one = make(optimizer=mc.SGD(1e30))
    with pytest.raises(mc.NonFiniteLoss):
        one.fit(X, Y, checkpoint=tmp_path / "run", **FIT)
    assert one.unfinished is None


def test_a_run_of_which_nothing_is_done_is_begun_by_any_call(tmp_path):
    class Save(mc.Callback):
        def fit_begin(self, trainer):
            trainer.save(tmp_path / "run")

    one, whole = make(), make()
    with pytest.raises(ZeroDivisionError):
        one.fit(
            Faulty((0, 0), ZeroDivisionError),
            epochs=3,
            checkpoint=tmp_path / "run",
            callbacks=[Save()],
            progress=False,
        )
    loaded = mc.Trainer.load(tmp_path / "run")
    whole.fit(X, Y, **FIT)
    for other in (one, loaded):
        assert other.unfinished == "in epoch 1 of 3, after 0 of its batches"
        other.fit(X, Y, checkpoint=tmp_path / "run", **FIT)
        assert same(other, whole)


# -- more epochs, and fewer ------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [2, 3, 7])
def test_a_run_goes_on_to_more_epochs_or_fewer_as_if_it_had_been_called_so(epochs, tmp_path):
    whole = make()
    whole.fit(X, Y, **{**FIT, "epochs": epochs})
    for form in ("loaded", "left"):
        one, path = make(), tmp_path / form
        with pytest.raises(KeyboardInterrupt):
            one.fit(X, Y, callbacks=[Stop(15)], checkpoint=path, **FIT)
        one.save(path)
        one = mc.Trainer.load(path, "cpu") if form == "loaded" else one
        assert len(one.fit(X, Y, **{**FIT, "epochs": epochs})["loss"]) == epochs
        assert same(one, whole)


def test_a_schedule_over_the_whole_run_follows_the_new_number_of_epochs(tmp_path):
    one = make(optimizer=mc.SGD(mc.Cosine(0.1)))
    with pytest.raises(KeyboardInterrupt):
        one.fit(X, Y, callbacks=[Stop(15)], checkpoint=tmp_path / "run", **FIT)
    totals = []
    history = one.fit(
        X,
        Y,
        callbacks=[lambda trainer, _: totals.append(trainer.progress.total)],
        **{**FIT, "epochs": 6},
    )
    assert totals == [66] * 5
    expected = [
        0.05 * (1 + np.cos(np.pi * (11 * n - 1) / (44 if n == 1 else 66))) for n in range(1, 7)
    ]
    np.testing.assert_allclose(history["learning_rate"], expected, rtol=1e-12)


def test_fewer_epochs_than_are_done_or_begun_are_refused(tmp_path):
    for steps, most in ((15, 1), (22, 1), (34, 3)):
        trainer = mc.Trainer.load(left(tmp_path, steps=steps), "cpu")
        where = trainer.unfinished
        with pytest.raises(
            ValueError,
            match=rf"epochs: the unfinished run is {where}; got {most}\. Pass at least {most + 1}",
        ):
            trainer.fit(X, Y, **{**FIT, "epochs": most})
        assert trainer.unfinished == where


def test_a_run_that_was_given_up_is_replaced_by_the_next_one_of_its_trainer_and_no_other(tmp_path):
    path = left(tmp_path)
    trainer = mc.Trainer.load(path, "cpu")
    trainer.abandon()
    for attempt in (lambda: make().fit(X, Y, **FIT, checkpoint=path), lambda: make().save(path)):
        with pytest.raises(FileExistsError, match=r"unfinished run .*Trainer\.load resumes it"):
            attempt()
    assert mc.Trainer.load(path, "cpu").unfinished
    pickle.loads(pickle.dumps(trainer)).fit(X, Y, **FIT, checkpoint=path)
    assert mc.Trainer.load(path, "cpu").unfinished is None


# -- the data --------------------------------------------------------------------------------------

ORDER = np.random.default_rng(1).permutation(103)
OTHERS = {
    "X": ((X[ORDER], Y, W), {}), "X scaled": ((X * 1.01, Y, W), {}),
    "X one": ((np.where(X[50, 2] == X, 0, X), Y, W), {}),
    "Y": ((X, Y[ORDER], W), {}), "sample_weight": ((X, Y, W[ORDER]), {}),
    "sample_weight none": ((X, Y), {}),
    "validation: X": ((X, Y, W), {"validation": (X[1:31], Y[:30], W[:30])}),
    "validation: X rows": ((X, Y, W), {"validation": (X[:29], Y[:29], W[:29])}),
    "validation: Y": ((X, Y, W), {"validation": (X[:30], Y[1:31], W[:30])}),
    "validation: sample_weight": ((X, Y, W), {"validation": (X[:30], Y[:30], W[1:31])}),
    "validation: sample_weight none": ((X, Y, W), {"validation": (X[:30], Y[:30])}),
}  # fmt: skip


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    """The path of a run with row weights and validation, and the trainer of a whole run."""
    whole, more = make(), {"validation": (X[:30], Y[:30], W[:30])}
    whole.fit(X, Y, W, **FIT, **more)
    return left(tmp_path_factory.mktemp("left"), (X, Y, W), **more), whole, {**FIT, **more}


@pytest.mark.parametrize("name", OTHERS)
def test_other_rows_are_refused_by_the_argument(name, weighted):
    path, whole, fit = weighted
    trainer = mc.Trainer.load(path, "cpu")
    table, changed = OTHERS[name]
    argument = (
        name.removesuffix(" scaled")
        .removesuffix(" one")
        .removesuffix(" none")
        .removesuffix(" rows")
    )
    with pytest.raises(
        ValueError, match=rf"^{argument}: the unfinished run had .*trainer\.abandon\(\)"
    ):
        trainer.fit(*table, **{**fit, **changed})
    assert trainer.unfinished == "in epoch 2 of 4, after 4 of its batches"
    trainer.fit(X, Y, W, **fit)
    assert same(trainer, whole)
    trainer.fit(*table, **{**fit, **changed})  # a new run


def test_weights_that_the_run_did_not_have_are_refused(tmp_path):
    trainer = mc.Trainer.load(left(tmp_path), "cpu")
    with pytest.raises(ValueError, match="sample_weight: the unfinished run had none"):
        trainer.fit(X, Y, W, **FIT)


def memmap(array, path):
    array.tofile(path)
    return np.memmap(path, array.dtype, "r").reshape(array.shape)


CONTAINERS = {
    "lists": lambda *arrays: [array.tolist() for array in arrays],
    "Fortran order": lambda *arrays: [np.asfortranarray(array) for array in arrays],
    "the other byte order": lambda *arrays: [array.astype(">f8") for array in arrays],
    "float32": lambda *arrays: [array.astype(np.float32) for array in arrays],
    "a step": lambda *arrays: [np.repeat(array, 2, axis=0)[::2] for array in arrays],
    "one axis": lambda x, y, w: (x, y[:, 0], w),
    "prepared": lambda *arrays: (make().prepare(*arrays),),
}


@pytest.mark.parametrize("name", [*CONTAINERS, "memmap"])
def test_the_same_numbers_in_another_container_go_on(name, weighted, tmp_path):
    path, whole, fit = weighted
    if name == "memmap":
        table = [memmap(array, tmp_path / str(i)) for i, array in enumerate((X, Y, W))]
    else:
        table = CONTAINERS[name](X, Y, W)
    trainer = mc.Trainer.load(path, "cpu")
    trainer.fit(*table, **fit)
    np.testing.assert_allclose(trainer.net.parameters, whole.net.parameters, rtol=1e-5)


def test_a_run_goes_on_with_the_same_rows_on_another_device(weighted, device):
    path, whole, fit = weighted
    trainer = mc.Trainer.load(path, device)
    with pytest.raises(ValueError, match=r"^X: the unfinished run had other values"):
        trainer.fit(X[ORDER], Y, W, **fit)
    trainer.fit(X, Y, W, **fit)
    np.testing.assert_allclose(trainer.net.parameters, whole.net.parameters, rtol=1e-3, atol=1e-5)


class Counted:
    """Rows that are read from somewhere, and how many of them."""

    def __init__(self, array, chunk=None):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []
        self.chunks = chunk and (chunk, *array.shape[1:])

    def __getitem__(self, rows):
        self.read.append((rows.start, rows.stop))
        return self.array[rows]


@pytest.mark.parametrize("chunk", [None, 1000, 7000])
def test_a_large_table_is_known_by_some_blocks_of_its_rows(chunk, tmp_path):
    rows = np.random.default_rng(0).standard_normal((60_000, 4)).astype(np.float32)
    targets = rows.sum(axis=1, keepdims=True)
    path = left(
        tmp_path,
        (rows, targets) if chunk is None else (Counted(rows, chunk), targets),
        3,
        batch_size=20_000,
    )
    state, _ = mc.Trainer.load(path, "cpu")._learner.left
    table = Counted(rows, chunk or 1)
    trainer = mc.Trainer.load(path, "cpu")
    held = trainer._intake.open_rows(table, targets)
    found = sources.Sample.of(held, trainer.loss, "f4", "cpu", state.data)
    assert found == state.data
    assert len(table.read) <= sources.PLACES
    assert sum(stop - start for start, stop in table.read) * 20 <= 1 << 20
    starts = [start for start, _ in table.read]
    assert starts[0] == 0
    assert table.read[-1][1] == 60_000 or chunk
    assert max(np.diff(starts)) <= 60_000 / 15 + (chunk or 1)
    for other in (
        rows[::-1].copy(),
        np.random.default_rng(1).permutation(rows),
        np.roll(rows, 1, axis=0),
    ):
        with pytest.raises(ValueError, match=r"^X: the unfinished run had other values"):
            mc.Trainer.load(path, "cpu").fit(other, targets, **{**FIT, "batch_size": 20_000})


def test_parquet_is_known_by_the_first_rows_of_some_of_its_groups(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = np.random.default_rng(0).standard_normal((40_000, 5))

    def write(name, values):
        table = pa.table({name: values[:, i] for i, name in enumerate("abcdy")})
        parquet.write_table(table, tmp_path / name, row_group_size=1000)
        return mc.Parquet(tmp_path / name, "y")

    table, fit = write("one", values), {**FIT, "batch_size": 20_000, "epochs": 3}
    path = left(tmp_path, (table,), 3, **fit)
    state, _ = mc.Trainer.load(path, "cpu")._learner.left
    assert len(state.data.places) == 16
    assert all(start % 1000 == 0 for start, _ in state.data.places[:-1])
    with pytest.raises(ValueError, match=r"^X: the unfinished run had other values"):
        mc.Trainer.load(path, "cpu").fit(
            write("other", np.random.default_rng(1).permutation(values)), **fit
        )
    trainer = mc.Trainer.load(path, "cpu")
    trainer.fit(values[:, :4], values[:, 4], **fit)  # the same rows in memory
    assert trainer.unfinished is None


def test_of_batches_as_they_come_nothing_is_compared(tmp_path):
    path = left(tmp_path, (Faulty(None, None),), 7)
    trainer = mc.Trainer.load(path, "cpu")
    assert trainer._learner.left.state.data is None
    trainer.fit(lambda: iter([(X[ORDER][:20], Y[:20])] * 5), **FIT)
    assert trainer.unfinished is None
