"""Tables that are read in pieces: the rows and the numbers of a table in memory, and never more than a window of them."""

import numpy as np
import pandas as pd
import pytest

from mlpcore import big_tables, tables
from mlpcore.backends import device as devices

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


def taken(split, epoch):
    return list(split.training[0](epoch))


def as_rows(X, Y):
    """Rows as a sorted array, so that sets of rows can be compared."""
    whole = np.column_stack([X, Y])
    return whole[np.lexsort(whole.T)]


@pytest.mark.parametrize("target", ["price", "name"])
def test_the_parts_of_a_cut_hold_each_row_once_as_the_pipeline_makes_it(path, frame, target):
    table = big_tables.load(path, target, wishes={"name": "out"} if target == "price" else {"price": "out"})
    split = table.cut(0, 64)
    X, Y = (np.concatenate(parts) for parts in zip(*taken(split, 0), split.validation, split.test, strict=True))
    known = frame[frame[target].notna()]
    made = split.preparation.apply(tables.as_frame(tables.read(path), split.preparation.columns).loc[known.index])
    if target == "name":
        assert table.class_names == ("a", "b", "seldom")
        wanted = known["name"].map({"a": 0, "b": 1, "seldom": 2}).to_numpy()
    else:
        wanted = split.scale.apply(known[["price"]].to_numpy())
    np.testing.assert_array_equal(as_rows(X, Y), as_rows(made, wanted))
    assert {column.name: column.kind for column in table.columns}["row"] == ""  # it counts the rows
    assert table.rows == ROWS
    assert split.counts[0] >= sum(len(y) for _, y in taken(split, 0))


def test_row_groups_are_held_out_whole(path, frame):
    split = big_tables.load(path, "price", wishes={"row": "number", "name": "out"}).cut(0, 64)
    at = split.preparation.names.index("row")
    parts = [np.concatenate([X for X, _ in taken(split, 0)]), split.validation[0], split.test[0]]
    values = np.unique(np.concatenate(parts)[:, at])  # one for each row, ascending as they are
    assert len(values) == frame["price"].notna().sum()
    numbers = np.flatnonzero(frame["price"].notna())
    groups = [set(numbers[np.searchsorted(values, part[:, at])] // GROUP) for part in parts]
    assert len(set.union(*groups)) == sum(len(g) for g in groups) == 53
    assert [len(g) for g in groups] == [37, 5, 11]
    assert "37 + 5 + 11 row groups" in split.said


def test_batches_are_full_and_in_an_order_of_their_own_each_epoch(path, monkeypatch):
    monkeypatch.setattr(big_tables, "WINDOW", 700)
    monkeypatch.setattr(big_tables, "_PIECE", 30)
    split = big_tables.load(path, "price").cut(0, 64)
    first, again, second = taken(split, 0), taken(split, 0), taken(split, 1)
    assert {len(Y) for _, Y in first[:-1]} == {64}
    assert 0 < len(first[-1][1]) <= 64
    for (X, Y), (X_again, Y_again) in zip(first, again, strict=True):
        np.testing.assert_array_equal(X, X_again)
        np.testing.assert_array_equal(Y, Y_again)
    assert not np.array_equal(first[0][0], second[0][0])
    whole = [as_rows(*(np.concatenate(parts) for parts in zip(*epoch, strict=True))) for epoch in (first, second)]
    np.testing.assert_array_equal(*whole)


def test_a_window_mixes_rows_of_several_row_groups(path, monkeypatch):
    monkeypatch.setattr(big_tables, "WINDOW", 400)
    split = big_tables.load(path, "price", wishes={"row": "number"}).cut(0, 64)
    at = split.preparation.names.index("row")
    X, _ = taken(split, 0)[0]
    assert len(np.unique((X[:, at] * 1000).round(-2))) > 4


def test_cuts_differ_by_seed_and_their_digests_with_them(path):
    table = big_tables.load(path, "price")
    one, again, other = table.cut(0, 64), table.cut(0, 64), table.cut(1, 64)
    assert one.digest == again.digest != other.digest


def test_a_table_is_too_big_from_a_quarter_of_the_free_memory_on(path, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 4 * 5 * ROWS * 32 - 1)
    assert big_tables.is_too_big(path)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 4 * 5 * ROWS * 32)
    assert not big_tables.is_too_big(path)
    assert not big_tables.is_too_big(tmp_path / "absent.parquet")
    assert not big_tables.is_too_big(tmp_path / "text.csv")


def test_what_cannot_be_streamed_is_refused(path, frame, tmp_path):
    (tmp_path / "t.csv").write_text("a,y\n1,2\n")
    (tmp_path / "broken.parquet").write_bytes(path.read_bytes()[:1000])
    frame.to_parquet(tmp_path / "few.parquet", row_group_size=2000)
    for name, word in (("t.csv", "only Parquet"), ("broken.parquet", "cannot be read"), ("few.parquet", "3 row group")):
        with pytest.raises(ValueError, match=word):
            big_tables.load(tmp_path / name, "price")
    with pytest.raises(FileNotFoundError):
        big_tables.load(tmp_path / "absent.parquet", "price")
    with pytest.raises(ValueError, match="no column 'cost'"):
        big_tables.load(path, "cost")
