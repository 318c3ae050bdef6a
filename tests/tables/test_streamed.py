"""Tables that are read in pieces: the rows and the numbers of a table in memory, and never more
than a window of them.
"""

import re

import numpy as np
import pandas as pd
import pytest

from mlpcore.backends import devices
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.data import windows
from mlpcore.data.open import open_stream
from mlpcore.engine import plan
from mlpcore.tables import streamed as big_tables
from mlpcore.tables.arrow import as_frame
from mlpcore.tables.files import read_table

ROWS, GROUP = 5_300, 100


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "row": np.arange(ROWS),
            "size": np.where(rng.random(ROWS) < 0.1, np.nan, rng.normal(50, 10, ROWS)),
            "kind": rng.choice(["flat", "house", None], ROWS),
            "price": rng.normal(size=ROWS),
            "name": rng.choice(["b", "a"], ROWS),
        }
    )
    frame.loc[ROWS - 7, "name"] = "seldom"  # in one row group only
    frame.loc[50:69, ["price", "name"]] = None
    return frame


@pytest.fixture(scope="module")
def path(frame, tmp_path_factory):
    path = tmp_path_factory.mktemp("big") / "big.parquet"
    frame.to_parquet(path, row_group_size=GROUP)
    return path


def taken(split, epoch, skip=0):
    """The batches of an epoch, of 64 rows, from number `skip` on."""
    stream = open_stream(*split.training)
    arrays = plan.allocate(NumpyOps(), stream.buffers(64))
    pieces = stream.epoch(64, np.random.default_rng(epoch), skip, arrays)
    return [(piece.X[rows], piece.Y[rows]) for piece in pieces for rows in piece.batches]


def as_rows(X, Y):
    """Rows as a sorted array, so that sets of rows can be compared."""
    whole = np.column_stack([X, Y])
    return whole[np.lexsort(whole.T)]


@pytest.mark.parametrize("target", ["price", "name"])
def test_the_parts_of_a_cut_hold_each_row_once_as_the_pipeline_makes_it(path, frame, target):
    table = big_tables.stream_table(
        path, target, wishes={"name": "out"} if target == "price" else {"price": "out"}
    )
    split = table.split(0)
    X, Y = (
        np.concatenate(parts)
        for parts in zip(*taken(split, 0), split.validation, split.test, strict=True)
    )
    known = frame[frame[target].notna()]
    made = split.preparation.apply(
        as_frame(read_table(path), split.preparation.columns).loc[known.index]
    )
    if target == "name":
        assert table.class_names == ("a", "b", "seldom")
        wanted = known["name"].map({"a": 0, "b": 1, "seldom": 2}).to_numpy()
    else:
        wanted = split.scale.apply(known[["price"]].to_numpy())
    np.testing.assert_array_equal(as_rows(X, Y), as_rows(made, wanted))
    assert {column.name: column.kind for column in table.columns}["row"] == ""  # it row numbers
    assert (table.rows, table.dropped, table.total) == (ROWS - 20, 20, ROWS)
    assert split.counts == (
        sum(len(y) for _, y in taken(split, 0)),
        len(split.validation[1]),
        len(split.test[1]),
    )
    assert np.array_equal(
        split.answers if target == "name" else split.scale.apply(split.answers), split.test[1]
    )


def rows_of(split, path):
    """The numbers of the training, validation and test rows, read off the column `row`."""
    at = split.preparation.names.index("row")
    parts = [np.concatenate([X for X, _ in taken(split, 0)]), split.validation[0], split.test[0]]
    numbers = split.preparation.apply(as_frame(read_table(path), split.preparation.columns))[:, at]
    return [set(np.searchsorted(numbers, np.unique(part[:, at]))) for part in parts]


def splitmix(seed, number):
    """SplitMix64 twice, in Python's integers."""
    z, most = number, 2**64
    for start in (seed, 0):
        z = ((z ^ start) + 0x9E3779B97F4A7C15) % most
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % most
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % most
        z ^= z >> 31
    return (z >> 11) / 2**53


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 12345678901234567890])
def test_rows_are_held_out_by_a_hash_of_seed_and_number_however_the_file_is_cut(
    seed, path, frame, tmp_path
):
    frame.to_parquet(tmp_path / "other.parquet", row_group_size=977)
    wishes = {"row": "number", "name": "out"}
    found = [
        rows_of(big_tables.stream_table(file, "price", wishes=wishes).split(seed), file)
        for file in (path, tmp_path / "other.parquet")
    ]
    assert found[0] == found[1]
    place = [splitmix(seed, row) for row in range(ROWS)]
    known = set(np.flatnonzero(frame["price"].notna()))
    test = {row for row in known if place[row] < 0.2}
    validation = {
        row for row in known if 0.2 <= place[row] < big_tables.SHARES[0] + big_tables.SHARES[1]
    }
    assert found[0] == [known - test - validation, validation, test]
    assert abs(len(test) / ROWS - 0.2) < 0.02
    assert abs(len(validation) / ROWS - 0.1) < 0.02


def test_what_is_held_out_and_the_sample_come_from_the_whole_of_a_sorted_file(
    tmp_path, monkeypatch
):
    """Each row group is sorted, so that its first rows would be easier, and of other means, than
    the group.
    """
    monkeypatch.setattr(big_tables, "HELD_OUT", 900)
    monkeypatch.setattr(big_tables, "SAMPLE", 1_000)
    monkeypatch.setattr(windows, "WINDOW", 60_000)  # bytes: 3,000 rows
    rows, groups = 30_000, 6
    place = np.tile(np.arange(rows // groups), groups) / (rows // groups)
    frame = pd.DataFrame(
        {"place": place, "y": 100 * place + np.random.default_rng(0).normal(size=rows)}
    )
    frame.to_parquet(tmp_path / "t.parquet", row_group_size=rows // groups)
    table = big_tables.stream_table(tmp_path / "t.parquet", "y")
    assert abs(len(table.X) - 1_000) < 120
    assert abs(table.X["place"].mean() - 0.5) < 0.05
    split = table.split(0)
    assert abs(len(split.test[1]) - 900) < 120
    assert abs(len(split.validation[1]) - 900) < 120
    assert abs(len(split.sample) - 1_000) < 120
    assert abs(split.counts[0] - 21_000) < 400
    held = [
        int(number.replace(",", "")) for number in re.findall(r"[0-9,]*[0-9]", split.description)
    ]
    assert sum(held) + split.counts[0] == rows  # nothing is left out without a word
    assert sum(len(y) for _, y in taken(split, 0)) == split.counts[0]
    for Y in (split.test[1], split.validation[1]):
        assert abs(Y.mean()) < 0.2
        assert abs(Y.std() - 1) < 0.1
    X, _ = map(np.concatenate, zip(*taken(split, 0), strict=True))
    assert abs(X[:, 0].mean()) < 0.1
    assert abs(X[:, 0].std() - 1) < 0.1


@pytest.mark.slow
def test_groups_of_a_streamed_table_stay_whole(path, frame, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW", 30_000)  # bytes: 700 rows or so
    frame = frame.assign(who=[f"p{i * 7 % 100}" for i in range(ROWS)]).drop(columns="name")
    frame.to_parquet(tmp_path / "who.parquet", row_group_size=GROUP)
    table = big_tables.stream_table(
        tmp_path / "who.parquet", "price", groups="who", wishes={"row": "number"}
    )
    split = table.split(0)
    assert split.description == " of 70 + 10 + 20 groups of who"
    held = [
        set(frame["who"].iloc[sorted(part)]) for part in rows_of(split, tmp_path / "who.parquet")
    ]
    assert [len(part) for part in held] == [70, 10, 20]
    assert len(set.union(*held)) == 100
    again = big_tables.stream_table(
        tmp_path / "who.parquet", "price", groups="who", wishes={"row": "number"}
    )
    assert again.split(0).digest == split.digest != table.split(1).digest
    frame.assign(who=frame["who"].where(frame.index != 3000)).to_parquet(
        tmp_path / "gap.parquet", row_group_size=GROUP
    )
    with pytest.raises(ValueError, match="--groups 'who' has no value in 1 row"):
        big_tables.stream_table(tmp_path / "gap.parquet", "price", groups="who")
    frame.assign(who=frame["row"] % 2).to_parquet(tmp_path / "two.parquet", row_group_size=GROUP)
    with pytest.raises(ValueError, match=r"--groups 'who' has 2 value\(s\)"):
        big_tables.stream_table(tmp_path / "two.parquet", "price", groups="who").split(0)


def test_what_the_sample_does_not_hold_is_found_all_the_same(frame, tmp_path, monkeypatch):
    monkeypatch.setattr(big_tables, "SAMPLE", 500)
    codes = frame.assign(name=np.where(frame["row"] % 2 == 0, "1", "2")).drop(columns="price")
    codes.loc[4001, "name"] = (
        "01"  # which is not 1, though no other value says that these are codes
    )
    codes.loc[[17, 18], "name"] = None
    codes.to_parquet(tmp_path / "codes.parquet", row_group_size=GROUP)
    table = big_tables.stream_table(tmp_path / "codes.parquet", "name")
    assert table.class_names == ("01", "1", "2")
    assert table.labels == "text"
    assert table.dropped == 2
    assert {column.name: column.note for column in table.columns}["row"].startswith("row numbers")
    rare = frame.assign(name=np.where(frame["row"] == 4321, "fraud", "usual")).drop(columns="price")
    rare.to_parquet(tmp_path / "rare.parquet", row_group_size=GROUP)
    table = big_tables.stream_table(tmp_path / "rare.parquet", "name")
    assert table.class_names == ("fraud", "usual")
    assert np.bincount(table.Y)[0] == 1
    gaps = frame.assign(
        price=frame["price"].where(frame["row"] % 3 > 0).where(frame["row"] != 4001, np.inf)
    )
    gaps.to_parquet(tmp_path / "gaps.parquet", row_group_size=GROUP)
    table = big_tables.stream_table(tmp_path / "gaps.parquet", "price")
    known = np.isfinite(gaps["price"])
    assert (table.rows, table.infinite) == (known.sum(), 1)
    split = table.split(0)
    assert split.counts[0] + len(split.validation[1]) + len(split.test[1]) == known.sum()
    texts = frame.assign(price=frame["price"].astype(str).where(frame["row"] != 4001, "n/k"))
    texts.to_parquet(tmp_path / "texts.parquet", row_group_size=GROUP)
    with pytest.raises(ValueError, match="regression must be numbers; row 4002 has 'n/k'"):
        big_tables.stream_table(tmp_path / "texts.parquet", "price", "regression")


def test_batches_are_full_and_in_an_order_of_their_own_each_epoch(path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW", 30_000)  # bytes: 700 rows or so
    monkeypatch.setattr(big_tables, "_READ", 30)
    split = big_tables.stream_table(path, "price").split(0)
    first, again, second = taken(split, 0), taken(split, 0), taken(split, 1)
    assert {len(Y) for _, Y in first[:-1]} == {64}
    assert 0 < len(first[-1][1]) <= 64
    for (X, Y), (X_again, Y_again) in zip(first, again, strict=True):
        np.testing.assert_array_equal(X, X_again)
        np.testing.assert_array_equal(Y, Y_again)
    assert not np.array_equal(first[0][0], second[0][0])
    whole = [
        as_rows(*(np.concatenate(parts) for parts in zip(*epoch, strict=True)))
        for epoch in (first, second)
    ]
    np.testing.assert_array_equal(*whole)


@pytest.mark.parametrize("skip", [1, 11, 12, 40])
def test_an_epoch_goes_on_from_any_batch_to_the_bit(skip, path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW", 30_000)  # bytes: 700 rows or so
    monkeypatch.setattr(big_tables, "_READ", 30)
    split = big_tables.stream_table(path, "price").split(0)
    rest = taken(split, 0, skip)
    assert len(rest) == -(-split.counts[0] // 64) - skip
    for (X, Y), (X_again, Y_again) in zip(taken(split, 0)[skip:], rest, strict=True):
        np.testing.assert_array_equal(X, X_again)
        np.testing.assert_array_equal(Y, Y_again)


def test_a_window_mixes_rows_of_several_row_groups(path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW", 17_000)  # bytes: 400 rows or so
    split = big_tables.stream_table(path, "price", wishes={"row": "number"}).split(0)
    at = split.preparation.names.index("row")
    X, _ = taken(split, 0)[0]
    assert len(np.unique((X[:, at] * 1000).round(-2))) > 4


def test_cuts_differ_by_seed_and_their_digests_with_them(path):
    table = big_tables.stream_table(path, "price")
    one, again, other = table.split(0), table.split(0), table.split(1)
    assert one.digest == again.digest != other.digest


@pytest.mark.slow
def test_the_digest_of_a_cut_tells_every_training_row_and_the_row_groups(path, frame, tmp_path):
    training = np.flatnonzero(big_tables._uniform(0, np.arange(ROWS)) >= 0.3)
    flat, house = (training[frame["kind"][training] == kind][-1] for kind in ("flat", "house"))
    swapped = frame.copy()
    swapped.loc[[flat, house], "kind"] = ["house", "flat"]  # what is fitted stays as it is
    renamed = frame.rename(columns={"kind": "sort"})
    digests = [big_tables.stream_table(path, "price").split(0).digest]
    for changed, group in ((swapped, GROUP), (renamed, GROUP), (frame, GROUP // 2), (frame, GROUP)):
        changed.to_parquet(tmp_path / "other.parquet", row_group_size=group)
        digests.append(big_tables.stream_table(tmp_path / "other.parquet", "price").split(0).digest)
    assert len(set(digests[:-1])) == 4
    assert digests[-1] == digests[0]


def test_a_table_is_too_big_from_a_quarter_of_the_free_memory_on(path, tmp_path, monkeypatch):
    monkeypatch.setattr(devices.HOST, "free_bytes", lambda: 4 * 5 * ROWS * 32 - 1)
    assert big_tables.is_too_big(path)
    monkeypatch.setattr(devices.HOST, "free_bytes", lambda: 4 * 5 * ROWS * 32)
    assert not big_tables.is_too_big(path)
    assert not big_tables.is_too_big(tmp_path / "absent.parquet")
    assert not big_tables.is_too_big(tmp_path / "text.csv")


def test_what_cannot_be_streamed_is_refused(path, frame, tmp_path):
    (tmp_path / "t.csv").write_text("a,y\n1,2\n")
    (tmp_path / "broken.parquet").write_bytes(path.read_bytes()[:1000])
    frame.to_parquet(tmp_path / "few.parquet", row_group_size=2000)
    for name, word in (
        ("t.csv", "only Parquet"),
        ("broken.parquet", "cannot be read"),
        ("few.parquet", "3 row group"),
    ):
        with pytest.raises(ValueError, match=word):
            big_tables.stream_table(tmp_path / name, "price")
    with pytest.raises(FileNotFoundError):
        big_tables.stream_table(tmp_path / "absent.parquet", "price")
    with pytest.raises(ValueError, match="no column 'cost'"):
        big_tables.stream_table(path, "cost")
    for column, word in (
        ([[1]] * ROWS, "list"),
        (pd.to_timedelta(np.arange(ROWS), "s"), "duration"),
    ):
        frame.assign(price=column).to_parquet(tmp_path / "odd.parquet", row_group_size=GROUP)
        with pytest.raises(ValueError, match=f"--target 'price' holds {word}"):
            big_tables.stream_table(tmp_path / "odd.parquet", "price")


def test_categories_of_a_streamed_table_are_taken_as_such(frame, tmp_path):
    k = pd.Categorical(np.arange(ROWS) % 3 * 7)
    pd.DataFrame({"k": k, "size": frame["size"], "kind": pd.Categorical(frame["kind"])}).to_parquet(
        tmp_path / "t.parquet", row_group_size=GROUP
    )
    table = big_tables.stream_table(tmp_path / "t.parquet", "kind")
    assert {column.name: column.kind for column in table.columns} == {
        "k": "category",
        "size": "number",
    }
    assert table.class_names == ("flat", "house")
    assert big_tables.stream_table(tmp_path / "t.parquet", "k").class_names == ("0", "7", "14")
