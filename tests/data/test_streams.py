"""Rows that are read block by block: each once an epoch, in an order that a seed fixes, with flat
memory and no thread left.
"""

import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.data import row_groups, windows
from mlpcore.data.iterables import BatchStream
from mlpcore.data.open import open_stream
from mlpcore.data.parquet import Parquet
from mlpcore.data.windows import RowStream
from mlpcore.engine import plan


class Sliced:
    """An array that is no NumPy array, and remembers what was read."""

    def __init__(self, array, chunks=None, before=None):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []
        self.before = before
        if chunks:
            self.chunks = (chunks, *array.shape[1:])

    def __getitem__(self, rows):
        if self.before:
            self.before(rows)
        self.read.append((rows.start, rows.stop))
        return self.array[rows]


def table(rows, columns=3):
    """X whose first column is the row number, and Y that repeats it."""
    X = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    X[:, 0] = np.arange(rows)
    return X, np.arange(rows)


def arrays(stream, batch_size, limit=None):
    return plan.allocate(NumpyOps(), stream.buffers(batch_size, limit))


def generator(seed=0):
    return None if seed is None else np.random.default_rng(seed)


def epoch(stream, batch_size, order=0, skip=0, limit=None):
    """The row numbers of each batch, by X; Y agrees."""
    order = generator(order) if order is None or isinstance(order, int) else order
    found = []
    for piece in stream.epoch(batch_size, order, skip, arrays(stream, batch_size, limit)):
        for rows in piece.batches:
            X, Y = (piece.X, piece.Y) if rows is None else (piece.X[rows], piece.Y[rows])
            np.testing.assert_array_equal(X[:, 0], Y)
            found.append(Y.tolist())
    assert not readers()
    return found


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def run(script):
    """Return the output of a script that runs in its own process."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mlpcore-reader")]


# -- the order

sizes = st.sampled_from([1, 2, 3, 7, 13, 64, 97, 1000])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=sizes,
    batch_size=sizes,
    chunks=st.sampled_from([None, 1, 5, 50, 2000]),
    limit=st.integers(1, 40_000),
    data=st.data(),
)
def test_each_row_comes_once_an_epoch_and_a_skipped_start_changes_nothing(
    rows, batch_size, chunks, limit, data
):
    X, Y = table(rows)
    stream = open_stream(Sliced(X, chunks), Y)
    order = data.draw(st.sampled_from([None, 0, 1]))
    batches = epoch(stream, batch_size, order, limit=limit)
    assert sorted(flat(batches)) == list(range(rows))
    assert len(batches) == stream.batches(batch_size)
    assert all(len(batch) == min(batch_size, rows) for batch in batches[:-1])
    if order is None:
        assert flat(batches) == list(range(rows))
    skip = data.draw(st.integers(0, len(batches)))
    assert epoch(stream, batch_size, order, skip, limit) == batches[skip:]


def test_the_generator_fixes_the_order_and_each_epoch_has_another():
    stream = open_stream(Sliced(table(500)[0]), table(500)[1])
    one, other = generator(3), generator(3)
    first = [epoch(stream, 32, one, limit=5000) for _ in range(3)]
    assert first == [epoch(stream, 32, other, limit=5000) for _ in range(3)]
    assert first[0] != first[1] != first[2] != first[0]
    assert epoch(stream, 32, 4, limit=5000) not in first


def test_the_generator_moves_on_by_the_same_amount_however_much_of_the_epoch_is_used():
    stream = open_stream(Sliced(table(500)[0]), table(500)[1])
    states = []
    for pieces in (0, 1, 100):
        order = generator(3)
        for _ in zip(
            range(pieces), stream.epoch(32, order, 0, arrays(stream, 32, 5000)), strict=False
        ):
            pass
        states.append(order.bit_generator.state)
    assert states[0] == states[1] == states[2]


def test_all_rows_in_one_window_are_shuffled_as_a_whole():
    stream = open_stream(Sliced(table(1000)[0]), table(1000)[1])
    assert [buffer.name for buffer in stream.buffers(10)] == [
        "X window 1",
        "Y window 1",
        "order window 1",
    ]
    firsts = [epoch(stream, 100, seed)[0] for seed in range(20)]
    assert len({tuple(rows) for rows in firsts}) == 20
    assert 480 < np.mean(firsts) < 520
    assert abs(np.corrcoef(np.arange(1000), flat(epoch(stream, 100)))[0, 1]) < 0.1


def test_a_sorted_file_comes_out_mixed():
    """Each batch of 100,000 rows sorted by class, in windows of 10,000, has all ten classes in
    about equal shares.
    """
    rows = 100_000
    X, Y = table(rows, 2)
    stream = open_stream(Sliced(X), Y)
    limit = 2 * 10_000 * (8 + 8 + 8)
    worst = 0.0
    for seed in range(3):
        batches = epoch(stream, 1000, seed, limit=limit)
        shares = (
            np.array([np.bincount(np.array(batch) // 10_000, minlength=10) for batch in batches])
            / 1000
        )
        worst = max(worst, shares.max())
        assert abs(np.corrcoef(np.arange(rows), flat(batches))[0, 1]) < 0.3
    # 16 blocks a window, ten classes: by chance one has three or four times its share
    assert worst < 0.6


def test_blocks_are_cut_elsewhere_in_each_epoch():
    """Else the same rows would always share a window."""
    source = Sliced(table(1000)[0])
    stream = open_stream(source, table(1000)[1])
    cuts = set()
    for seed in range(20):
        source.read.clear()
        # one window: read in blocks of 62 rows, but for the two ends of the file
        epoch(stream, 10, seed)
        cuts.add(frozenset(start % 62 for start, _ in source.read if start))
    assert len(cuts) > 10


def test_each_window_has_an_order_of_its_own():
    stream = open_stream(Sliced(table(1000)[0]), table(1000)[1])
    pieces = stream.epoch(10, generator(), 0, arrays(stream, 10, 8000))
    orders = [np.concatenate(piece.batches).tolist() for piece in pieces]
    assert [sorted(order) for order in orders[:-1]] == [list(range(len(orders[0])))] * (
        len(orders) - 1
    )
    assert len({tuple(order) for order in orders}) == len(orders) > 5


def test_what_only_skipped_batches_need_is_not_read():
    source = Sliced(table(1000)[0])
    stream = open_stream(source, table(1000)[1])
    for order in (0, None):
        source.read.clear()
        epoch(stream, 10, order, skip=97, limit=8000)
        window = stream.buffers(10, 8000)[0].shape[0]
        # shuffled: the rows of whole windows
        needed = 30 if order is None else 1000 - 970 // window * window
        assert sum(stop - start for start, stop in source.read) == needed


@pytest.mark.parametrize("chunks", [20, 60, 500])
def test_no_chunk_is_read_twice_but_where_a_window_ends(chunks):
    X, Y = table(1000)
    for order in (None, 0, 1):
        for limit, count in ((None, 1), (2 * 400 * 28, 3)):
            source = Sliced(X, chunks)
            epoch(open_stream(source, Y), 100, order, limit=limit)
            whole = -(-1000 // chunks)
            touched = sum(-(-stop // chunks) - start // chunks for start, stop in source.read)
            assert touched <= whole + count - 1


def test_the_windows_keep_to_the_limit_and_hold_a_batch_at_least():
    stream = open_stream(Sliced(np.zeros((10**6, 100), np.float32)), np.zeros(10**6, np.float32))
    for limit in (10**6, 10**7):
        buffers = stream.buffers(128, limit)
        assert (
            0.8 * limit
            < sum(plan.nbytes(buffer) for buffer in buffers)
            <= limit + 6 * plan.ALIGNMENT
        )
        assert buffers[0].shape[0] % 128 == 0
    assert [buffer.shape[0] for buffer in stream.buffers(128, 1)] == [128] * 6
    assert sum(plan.nbytes(buffer) for buffer in stream.buffers(128)) <= 2 * windows.WINDOW


# -- sources


def memmap(folder, array, name="X.npy"):
    np.save(folder / name, array)
    return np.load(folder / name, mmap_mode="r")


@pytest.mark.parametrize(
    "kind",
    ["memmap", "view", "fortran", "swapped", "written", "copied", "zarr", "h5py", "h5py chunks"],
)
def test_sources_are_read_as_they_are(kind, tmp_path):
    X, Y = table(1000, 5)
    if kind in ("memmap", "view", "fortran", "swapped", "written", "copied"):
        lies = {"fortran": np.asfortranarray(X), "swapped": X.astype(">f4")}.get(kind, X)
        source = memmap(tmp_path, lies)
        if kind == "view":
            X, source = X[::-1, 1:], np.asarray(source)[::-1, 1:]
        if kind in ("written", "copied"):
            source = np.load(tmp_path / "X.npy", mmap_mode="r+" if kind == "written" else "c")
            source[10, 1] = X[10, 1] = 77  # stands only in memory yet
    elif kind == "zarr":
        source = zarr.create_array(str(tmp_path / "X.zarr"), data=X, chunks=(64, 5))
    else:
        source = h5py.File(tmp_path / "X.h5", "w").create_dataset(
            "X", data=X, chunks=(64, 5) if "chunks" in kind else None
        )
    stream = open_stream(source, Y, np.arange(1000) / 1000)
    assert isinstance(stream, RowStream)
    assert (stream.rows, stream.columns) == X.shape
    for order in (None, 0, 1):
        seen = 0
        for piece in stream.epoch(30, generator(order), 0, arrays(stream, 30, 20_000)):
            np.testing.assert_array_equal(piece.X, X[piece.Y])
            np.testing.assert_array_equal(piece.weights, piece.Y / 1000)
            assert piece.X.dtype == np.float32
            seen += len(piece.X)
        assert seen == 1000


def test_targets_may_be_of_another_kind(tmp_path):
    X, Y = table(100)
    h5 = h5py.File(tmp_path / "Y.h5", "w")["Y"] = Y
    assert h5 is Y
    for targets in (Y.tolist(), memmap(tmp_path, Y), Sliced(Y), np.stack([Y, Y], 1)):
        stream = open_stream(Sliced(X), targets)
        for piece in stream.epoch(8, None, 0, arrays(stream, 8)):
            np.testing.assert_array_equal(piece.Y if piece.Y.ndim == 1 else piece.Y[:, 1], Y)


def flights(folder, rows=1000, files=3, group=70):
    """Files of row groups; the label is the row number."""
    rng = np.random.default_rng(0)
    columns = {
        "late": np.arange(rows),
        "a": rng.standard_normal(rows).astype(np.float32),
        "b": rng.integers(0, 9, rows).astype(np.int8),
        "even": np.arange(rows) % 2 == 0,
        "w": rng.random(rows),
    }
    for i, part in enumerate(np.array_split(np.arange(rows), files)):
        (folder / f"{i % 2}").mkdir(exist_ok=True)
        pq.write_table(
            pa.table({k: v[part] for k, v in columns.items()}),
            folder / f"{i % 2}/{i}.parquet",
            row_group_size=group,
        )
    order = np.concatenate(
        [
            np.array_split(np.arange(rows), files)[i]
            for i in sorted(range(files), key=lambda i: (i % 2, i))
        ]
    )
    return {k: v[order] for k, v in columns.items()}


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 70, 5000])
def test_parquet_files_are_one_table(tmp_path, group, monkeypatch):
    monkeypatch.setattr(windows, "BLOCK", 1000)
    columns = flights(tmp_path, 300, group=group)
    stream = open_stream(Parquet(tmp_path, "late", weight="w"))
    assert stream.rows == 300
    assert stream.columns == 3
    at = {label: row for row, label in enumerate(columns["late"].tolist())}
    X = np.stack([columns["a"], columns["b"], columns["even"]], 1)
    for order in (None, 0, 1):
        labels = []
        for piece in stream.epoch(7, generator(order), 0, arrays(stream, 7, 2000)):
            rows = [at[label] for label in piece.Y.tolist()]
            np.testing.assert_array_equal(piece.X, X[rows])
            np.testing.assert_array_equal(piece.weights, columns["w"][rows])
            labels += piece.Y.tolist()
        assert sorted(labels) == list(range(300))
        assert order is not None or labels == columns["late"].tolist()
    batches = [
        b for p in stream.epoch(7, generator(), 0, arrays(stream, 7, 2000)) for b in p.batches
    ]
    assert len(batches) == stream.batches(7) == 43


def test_a_footer_is_parsed_once_while_its_file_stays(tmp_path, monkeypatch):
    flights(tmp_path, 300, files=3, group=10)
    parsed, parse = [], row_groups.category_columns
    monkeypatch.setattr(
        row_groups, "category_columns", lambda metadata: parsed.append(1) or parse(metadata)
    )
    stream = open_stream(Parquet(tmp_path, "late", weight="w"))
    for order in (None, 0, 1):
        for _ in stream.epoch(7, generator(order), 0, arrays(stream, 7, 2000)):
            pass
    assert len(parsed) == 3
    file = next(tmp_path.rglob("*.parquet"))
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(1, 1))
    for _ in stream.epoch(7, None, 0, arrays(stream, 7, 2000)):
        pass
    assert len(parsed) == 4


def test_parquet_columns_are_chosen_by_name(tmp_path):
    columns = flights(tmp_path)
    files = sorted(tmp_path.rglob("*.parquet"))
    source = Parquet(files[:1], target=["even", "w"], features=["b", "a"])
    assert repr(source).endswith("2 features, target=['even', 'w'], weight=None)")
    (piece,) = open_stream(source).epoch(10**6, None, 0, arrays(open_stream(source), 10**6))
    np.testing.assert_array_equal(
        piece.X, np.stack([columns["b"], columns["a"]], 1)[: len(piece.X)]
    )
    np.testing.assert_array_equal(
        piece.Y, np.stack([columns["even"], columns["w"]], 1)[: len(piece.X)]
    )
    assert Parquet(files[0], target="even").like[1].dtype == np.uint8
    assert Parquet(str(files[0]), "late").features == ("a", "b", "even", "w")


def test_parquet_errors_name_file_column_and_row(tmp_path):
    def write(name, **columns):
        pq.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    good = write("1.parquet", late=[0, 1], a=[1.0, 2.0])
    with pytest.raises(FileNotFoundError):
        Parquet(tmp_path / "none.parquet", "late")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"path: there is no \*.parquet file in"):
        Parquet(tmp_path / "empty", "late")
    (tmp_path / "text.txt").write_text("late,a\n" * 10)
    with pytest.raises(ValueError, match=r"text\.txt' is not a Parquet file"):
        Parquet(tmp_path / "text.txt", "late")
    with pytest.raises(ValueError, match="must have one column 'delay'; its columns: late, a"):
        Parquet(good, "delay")
    with pytest.raises(ValueError, match="features: no column"):
        Parquet(good, "a", [])
    with pytest.raises(ValueError, match="target: no column"):
        Parquet(good, [])
    with pytest.raises(
        TypeError, match=r"column 'carrier' of .*must hold numbers; it holds (large_)?string"
    ):
        Parquet(write("2.parquet", late=[0], carrier=["UA"]), "late")
    other = {
        "date": pa.array([0], pa.date32()),
        "time": pa.array([0], pa.timestamp("ns", "UTC")),
        "list": [[1.0]],
        "category": pa.array(["x"]).dictionary_encode(),
        "money": pa.array([1]).cast(pa.decimal128(30, 2)),
    }
    for name, column in other.items():
        with pytest.raises(TypeError, match=rf"column '{name}' of .* must hold numbers"):
            Parquet(write("2.parquet", late=[0], **{name: column}), "late")
    for argument, arguments in (
        ("path", (3, "late")),
        ("path", ([3], "late")),
        ("target", (good, 3)),
        ("target", (good, [3])),
        ("features", (good, "late", 3)),
        ("weight", (good, "late", None, ["a"])),
    ):
        with pytest.raises(TypeError, match=f"{argument} must be .*; got"):
            Parquet(*arguments)
    with pytest.raises(
        ValueError, match=r"column 'a' is float64 in .*1\.parquet' and int64 in .*3\.parquet"
    ):
        Parquet([good, write("3.parquet", late=[0], a=[1])], "late")
    with pytest.raises(ValueError, match="path: no rows"):
        Parquet(write("4.parquet", late=np.zeros(0), a=np.zeros(0)), "late")
    for values, message in (
        ([1.0, None], "column 'a' must have a number in every row; row 3 holds null"),
        ([1.0, np.nan], "X must be finite; row 3, column 0 holds nan"),
    ):
        stream = open_stream(Parquet([good, write("5.parquet", late=[0, 0], a=values)], "late"))
        with pytest.raises(ValueError, match=message):
            epoch(stream, 2)
    stream = open_stream(Parquet([good, write("6.parquet", late=[0, 0], a=[1.0, 2.0])], "late"))
    write("6.parquet", late=[0], a=[1.0])
    with pytest.raises(ValueError, match=r"6\.parquet' has changed") as caught:
        epoch(stream, 2)
    assert caught.value.__notes__[0].startswith("X was asked for its rows ")


def test_a_folder_gives_its_data_files_and_no_others(tmp_path):
    def write(name, **columns):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    for name in ("1.parquet", "b/2.parquet", "c.parquet/part.parquet"):
        write(name, y=[0, 1], a=[1.0, 2.0])
    for name in (
        ".3.parquet",
        "_4.parquet",
        "_temporary/0/5.parquet",
        "b/.ipynb_checkpoints/2-checkpoint.parquet",
    ):
        write(name, y=[7] * 100, a=[1.0] * 100)
    assert Parquet(tmp_path, "y").rows == 6
    part = write("hive/year=2001/6.parquet", y=[0], a=[1.0])
    with pytest.raises(
        ValueError,
        match="the column that their folder name 'year=2001' stands for: write it into the files",
    ):
        Parquet(tmp_path, "y")
    assert Parquet([part], "y").rows == Parquet(part.parent, "y").rows == 1
    with pytest.raises(FileNotFoundError, match=r"^path: there is no file or folder 'nope'$"):
        Parquet("nope", "y")


def test_no_column_is_dropped_or_used_twice(tmp_path):
    def write(name, **columns):
        pq.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    one, other = (
        write("1.parquet", delay=[0], a=[1.0]),
        write("2.parquet", delay=[0], a=[1.0], extra=[2.0]),
    )
    with pytest.raises(
        ValueError, match=r"column 'extra' of .*2\.parquet' is not in .*1\.parquet'; pass features="
    ):
        Parquet([one, other], "delay")
    with pytest.raises(ValueError, match=r"1\.parquet' must have one column 'extra'"):
        Parquet([other, one], "delay")
    assert Parquet([one, other], "delay", ["a"]).features == ("a",)
    with pytest.raises(
        ValueError,
        match=r"must have one column 'dellay'; did you mean 'delay'\? Its columns: delay, a",
    ):
        Parquet(one, "dellay")
    for arguments in (
        ("a", ["a", "delay"]),
        (["a", "a"],),
        ("delay", ["a", "a"]),
        ("delay", ["a"], "a"),
        ("a", None, "a"),
    ):
        with pytest.raises(
            ValueError, match="column 'a' must be used once, in features, target or weight"
        ):
            Parquet(one, *arguments)


@pytest.mark.parametrize("kind", ["list", "lists", "function", "function of epoch", "loader"])
def test_batches_come_as_they_are(kind):
    X, Y = table(100)
    w = np.ones(100)
    ready = [(X[i : i + 30], Y[i : i + 30], w[i : i + 30]) for i in range(0, 100, 30)]
    numbers = []

    class Loader:
        def __iter__(self):
            return iter(ready)

    def of_epoch(epoch):
        numbers.append(epoch)
        return iter(ready)

    source = {
        "list": ready,
        "lists": [list(b[:2]) for b in ready],
        "function": lambda: iter(ready),
        "loader": Loader(),
    }
    stream = open_stream(source.get(kind, of_epoch))
    assert isinstance(stream, BatchStream)
    assert stream.buffers(30) == []
    for _ in range(2):
        assert epoch(stream, 7) == [rows.tolist() for _, rows, _ in ready]
    assert (stream.rows, stream.columns, stream.batches(7)) == (100, 3, 4)
    assert epoch(stream, 7, skip=3) == [list(range(90, 100))]
    assert numbers == ([0, 1, 2] if kind == "function of epoch" else [])


def test_what_a_list_of_batches_holds_is_known_before_and_of_others_nothing():
    X, Y = table(100)
    stream = open_stream([(X, Y), (X[:3], Y[:3])])
    assert (stream.rows, stream.columns, stream.batches(7)) == (103, 3, 2)
    assert [None if x is None else (x.shape, x.dtype) for x in stream.like] == [
        ((0, 3), X.dtype),
        ((0,), Y.dtype),
        None,
    ]
    stream = open_stream(lambda: iter([(X, Y)]))
    assert (stream.rows, stream.columns, stream.batches(7), stream.like) == (None, None, None, None)


def test_a_source_may_use_its_arrays_again():
    X, Y = np.zeros((4, 2), np.float32), np.zeros(4, int)

    def again():
        for i in range(20):
            X[...], Y[...] = i, i
            yield X[: 4 - i % 3], Y[: 4 - i % 3]

    assert [set(batch) for batch in epoch(open_stream(again), 4)] == [{i} for i in range(20)]


def test_a_torch_loader_is_a_stream_and_its_tensors_are_none():
    torch = pytest.importorskip("torch")
    X, Y = map(torch.from_numpy, table(100))
    assert open_stream(X, Y) is None
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, Y), batch_size=30, shuffle=True
    )
    batches = epoch(open_stream(loader), 30)
    assert sorted(flat(batches)) == list(range(100))
    assert [len(batch) for batch in batches] == [30, 30, 30, 10]


def test_arrays_in_memory_are_not_for_streams():
    import pandas as pd
    import polars as pl
    import scipy.sparse

    X, Y = table(10)
    frames = pd.DataFrame(X), pd.DataFrame(X)[0], pl.DataFrame(X), pl.DataFrame(X).to_arrow()
    for value in (
        *frames,
        X,
        X.tolist(),
        scipy.sparse.csr_array(X),
        np.ma.masked_array(X),
        memoryview(X),
        range(10),
        3,
        "X",
    ):
        assert open_stream(value, Y) is None
    assert open_stream(X) is None
    assert open_stream(None) is None


# -- the door


def test_the_door_names_the_argument():
    X, Y = table(10)
    batches = [(X, Y)]
    for arguments, error, message in (
        ((Sliced(X),), ValueError, "Y is missing: X (Sliced) holds no targets"),
        ((Sliced(Y), Y), ValueError, "X must have 2 axes; it has shape (10,)"),
        ((Sliced(X[:0]), Y[:0]), ValueError, "X is empty: shape (0, 3)"),
        ((Sliced(X.astype(str)), Y), TypeError, "X must hold real numbers; its dtype is <U"),
        ((Sliced(X), Y[:5]), ValueError, "Y has 5 rows; X has 10"),
        ((Sliced(X), X[None]), ValueError, "Y must have 1 or 2 axes; it has shape (1, 10, 3)"),
        ((Sliced(X), Y.astype(object)), TypeError, "Y must hold real numbers; its dtype is object"),
        (
            (Sliced(X), np.ma.masked_equal(Y, 3)),
            TypeError,
            "Y is a masked array with masked entries; fill them first",
        ),
        ((Sliced(X), Y, X), ValueError, "sample_weight must have 1 axes; it has shape (10, 3)"),
        ((Sliced(X), Y, Y[:3]), ValueError, "sample_weight has 3 rows; X has 10"),
        ((lambda: batches, Y), TypeError, "Y must be None: X (function) provides it"),
        ((batches, None, Y), TypeError, "sample_weight must be None: X (list) provides it"),
        (
            (iter(batches),),
            TypeError,
            "X is a list_iterator, which would be empty in the second epoch: pass a function",
        ),
        (
            (([X, Y] for _ in range(3)),),
            TypeError,
            "X is a generator, which would be empty in the second epoch",
        ),
        (
            (lambda n: batches,),
            TypeError,
            "X, a function that makes batches, must take no argument or `epoch`; its parameters "
            "are (n)",
        ),
        (([],), ValueError, "X is empty: a list of batches needs at least one"),
        (((X, Y),), TypeError, "batch 0: must be (X, Y) or (X, Y, sample_weight); got ndarray"),
        (([(X, Y), (X[:, 1:], Y)],), ValueError, "batch 1: X has 2 columns; earlier ones have 3"),
        (([(X, Y), (X, Y[:5])],), ValueError, "batch 1: Y has 5 rows; X has 10"),
        (([(X, None)],), TypeError, "batch 0: Y must hold real numbers; its dtype is object"),
    ):
        with pytest.raises(error) as caught:
            open_stream(*arguments)
        assert str(caught.value).startswith(message), str(caught.value)


def test_functions_that_give_no_batches_are_found_in_the_epoch():
    X, Y = table(10)
    for function, error, message in (
        (
            lambda: 3,
            TypeError,
            r"X\(\) must return an iterator of batches \(X, Y\); it returned int",
        ),
        (
            lambda: iter([]),
            ValueError,
            "X gave no batches in epoch 0; it must start over in each epoch",
        ),
        (lambda: iter([X]), TypeError, r"batch 0: must be \(X, Y\) or"),
        (lambda: iter([(X, Y), (X[:, 1:], Y)]), ValueError, "batch 1: X has 2 columns"),
    ):
        with pytest.raises(error, match=message):
            epoch(open_stream(function), 5)
    once = iter([(X, Y)])
    stream = open_stream(lambda: once)
    epoch(stream, 5)
    with pytest.raises(ValueError, match="X gave no batches in epoch 1"):
        epoch(stream, 5)


@pytest.mark.parametrize("order", [None, 0])
def test_numbers_that_are_not_finite_are_named_by_their_place_in_the_source(order):
    for bad in (np.nan, np.inf, -np.inf):
        X, Y = table(500)
        X[321, 1] = bad
        with pytest.raises(ValueError, match=rf"^X must be finite; row 321, column 1 holds {bad}$"):
            epoch(open_stream(Sliced(X), Y), 10, order, limit=2000)
        with pytest.raises(
            ValueError, match=rf"^batch 1: X must be finite; row 21, column 1 holds {bad}$"
        ):
            epoch(open_stream([(X[:300], Y[:300]), (X[300:], Y[300:])]), 10, order)
    X, Y = table(500)
    big = Y * 1e36
    assert open_stream(Sliced(X), big).epoch(500, None, 0, arrays(open_stream(Sliced(X), big), 500))
    with pytest.raises(
        ValueError,
        match=r"^Y must be finite; row 341 holds 3.41e\+38, out of the range of float32$",
    ):
        epoch(open_stream(Sliced(X), big, dtype=np.float32), 500, None)
    for weights, message in (
        (-Y, "row 1 holds -1"),
        (np.where(Y == 7, np.nan, 1.0), "row 7 holds nan"),
    ):
        with pytest.raises(ValueError, match=f"^sample_weight must be finite.*; {message}$"):
            epoch(open_stream(Sliced(X), Y, weights), 500, None)


def test_a_source_that_gives_another_shape_than_it_said_is_refused():
    X, Y = table(100)
    source = Sliced(X)
    source.array = X[:1]
    with pytest.raises(
        ValueError, match=r"X\[\d+:\d+\] must have shape \(\d+, 3\); it has \(\d+, 3\)"
    ):
        epoch(open_stream(source, Y), 10, limit=2000)


# -- the thread


def test_an_error_in_the_source_comes_with_its_traceback_and_ends_the_thread():
    X, Y = table(1000)

    reads = []

    def broken_disk(rows):
        reads.append(rows)
        if len(reads) == 3:
            raise OSError("the disk is gone")

    stream = open_stream(Sliced(X, before=broken_disk), Y)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        epoch(stream, 10, limit=4000)
    assert "broken_disk" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert not readers()


@pytest.mark.parametrize("end", ["close", "drop", "break", "error"])
def test_the_thread_ends_with_the_iterator(end):
    X, Y = table(1000)
    stream = open_stream(Sliced(X), Y)
    pieces = stream.epoch(10, generator(), 0, arrays(stream, 10, 4000))
    assert not readers()
    next(pieces)
    assert len(readers()) == 1
    if end == "close":
        pieces.close()
    elif end == "drop":
        del pieces
    elif end == "break":
        for _ in pieces:
            break
        pieces = None
    else:
        with pytest.raises(KeyboardInterrupt):
            interrupted(pieces)
        del pieces
    gc.collect()
    assert not readers()


def interrupted(pieces):
    for _ in pieces:
        raise KeyboardInterrupt


def test_closing_waits_for_one_block_at_most():
    """Not for the rest of the window."""
    X, Y = table(1000)
    begun, closed = threading.Event(), threading.Event()
    reads = []

    def slow(rows):
        reads.append(rows)
        if len(reads) > 20:
            begun.set()
            assert closed.wait(30)

    stream = open_stream(Sliced(X, before=slow), Y)
    # windows of 500 rows, 16 blocks each
    pieces = stream.epoch(10, None, 0, arrays(stream, 10, 2 * 500 * 28))
    next(pieces)
    assert begun.wait(30)
    at = len(reads)
    threading.Timer(0.1, closed.set).start()  # when close() waits already
    pieces.close()
    assert len(reads) <= at + 1
    assert not readers()


def test_the_next_window_is_read_while_one_is_in_use():
    """The source would wait for ever if it were asked only when the next piece is wanted."""
    X, Y = table(1000)
    in_use, read = threading.Event(), threading.Event()

    def source(rows):
        if rows.start == 500:  # the second window begins
            assert in_use.wait(30)
            read.set()

    stream = open_stream(Sliced(X, before=source), Y)
    pieces = stream.epoch(10, None, 0, arrays(stream, 10, 2 * 500 * 28))
    piece = next(pieces)
    before = piece.X.copy()
    in_use.set()
    assert read.wait(30)
    np.testing.assert_array_equal(piece.X, before)  # it went into the other window
    next(pieces)
    pieces.close()


def test_waiting_is_measured():
    X, Y = table(100)
    stream = open_stream(Sliced(X, before=lambda rows: time.sleep(0.01)), Y)
    assert stream.waited == 0
    epoch(stream, 100)
    assert stream.waited >= 0.1
    quick, begin = open_stream(lambda: iter([(X, Y)] * 3)), time.perf_counter()
    for _ in quick.epoch(1, None, 0, {}):
        time.sleep(0.05)
    # what its consumer does is no waiting
    assert time.perf_counter() - begin - quick.waited >= 0.15


def test_two_epochs_of_two_streams_of_one_source_do_not_disturb_each_other(tmp_path):
    columns = flights(tmp_path)
    source = Parquet(tmp_path, "late")
    one, other = open_stream(source), open_stream(source)
    pairs = zip(*(s.epoch(50, None, 0, arrays(s, 50, 10_000)) for s in (one, other)), strict=True)
    labels = [a.Y.tolist() for a, b in pairs if a.Y.tolist() == b.Y.tolist()]
    assert flat(labels) == columns["late"].tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_reads_for_itself():
    run("""
        import os
        import numpy as np
        from mlpcore.data.open import open_stream

        X = [(np.full((3, 2), i), np.arange(3)) for i in range(5)]
        stream = open_stream(X)
        assert sum(int(piece.X.sum()) for piece in stream.epoch(3, None, 0, {})) == 60
        child = os.fork()
        found = sum(int(piece.X.sum()) for piece in stream.epoch(3, None, 0, {}))
        if not child:
            os._exit(found)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == found == 60
    """)


# -- memory

FLAT = """
from pathlib import Path
import numpy as np
import mlpcore as mc
from mlpcore.data.open import open_stream
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.engine import plan

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) >> 10

X = {source}
stream = open_stream(*X)
arrays = plan.allocate(NumpyOps(), stream.buffers(256, 8 << 20))
for array in arrays.values():
    array[...] = 1
most = base = resident()
for order in (None, np.random.default_rng(0), np.random.default_rng(1)):
    for piece in stream.epoch(256, order, 0, arrays):
        most = max(most, resident())
print(base, most)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", ["memmap", "view", "parquet"])
def test_memory_is_flat_on_a_file_many_times_the_windows(tmp_path, kind):
    """Pages of the file included: 128 MiB, 8 MiB of windows. pyarrow takes 70 MiB for itself; with
    its own defaults 240 MiB.
    """
    rows = 1 << 18
    if kind == "parquet":  # one row group
        rows = 1 << 21
        X = np.random.default_rng(0).standard_normal((16, rows), np.float32)
        columns = {f"x{i}": column for i, column in enumerate(X)}
        pq.write_table(
            pa.table(columns),
            tmp_path / "X.parquet",
            row_group_size=rows,
            compression=None,
            use_dictionary=False,
        )
        source = f"(mc.Parquet({str(tmp_path / 'X.parquet')!r}, target='x0'),)"
    else:
        with open(tmp_path / "X.raw", "wb") as file:
            file.truncate(rows * 512)
            for i in range(0, rows, 1 << 13):
                file.write(np.full((1 << 13, 128), i, np.float32).tobytes())
        mapped = f"np.memmap({str(tmp_path / 'X.raw')!r}, np.float32, 'r', shape=({rows}, 128))"
        X = f"np.asarray({mapped})[:, :100]" if kind == "view" else mapped
        source = f"({X}, np.zeros({rows}, np.int8))"
    base, most = map(int, run(FLAT.format(source=source)).split())
    assert most - base <= (110 if kind == "parquet" else 16), (
        f"{base} MiB before, {most} MiB at most"
    )


def test_a_parquet_column_of_categories_that_are_numbers_is_no_feature(tmp_path):
    import pandas as pd

    codes = pd.Categorical([30, 10, 20, 10])
    pd.DataFrame({"a": codes, "b": [1.0, 2.0, 3.0, 4.0], "y": codes.codes}).to_parquet(
        tmp_path / "rows.parquet"
    )
    with pytest.raises(
        TypeError, match=r"column 'a' of .*rows.parquet.* must hold numbers; it holds categories"
    ):
        Parquet(tmp_path / "rows.parquet", "y")
    assert Parquet(tmp_path / "rows.parquet", "y", features=["b"]).features == ("b",)
    # as a target its numbers count
    assert Parquet(tmp_path / "rows.parquet", "a", features=["b"]).rows == 4
