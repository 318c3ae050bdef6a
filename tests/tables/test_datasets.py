"""Data sets: read as stated, split honestly, standardised."""

import math
import re
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

import mlpcore as mc
from mlpcore.tables import datasets as data
from mlpcore.tables.flights import load_flights
from mlpcore.tables.splits import split_rows
from mlpcore.tables.standardizer import Standardizer


@pytest.fixture(scope="module")
def flights():
    return load_flights()


@pytest.mark.slow
def test_flights_are_those_with_an_arrival_delay_and_a_quarter_of_them_late(flights):
    assert flights.X.shape[0] == 327_346
    assert flights.X.dtype == np.float32
    assert flights.X.flags.c_contiguous
    assert len(flights.feature_names) == flights.X.shape[1]
    assert np.isfinite(flights.X).all()
    assert 0.23 < flights.Y.mean() < 0.24
    assert set(flights.groups) == set(range(1, 366))


@pytest.mark.slow
def test_no_flight_column_is_known_only_after_departure(flights):
    for forbidden in ("dep_delay", "arr_delay", "dep_time", "arr_time", "air_time"):
        assert not any(
            name == forbidden or name.startswith(f"{forbidden}_") for name in flights.feature_names
        )
    late, worst = flights.Y - flights.Y.mean(), 0.0
    for column in range(flights.X.shape[1]):
        x = flights.X[:, column].astype(np.float64)
        worst = max(worst, abs(np.mean((x - x.mean()) * late)) / (x.std() * late.std() + 1e-300))
    assert worst < 0.3  # a departure delay would show up with 0.6


@pytest.mark.slow
def test_a_split_of_flights_keeps_each_day_whole(flights):
    parts = split_rows(flights, seed=0)
    days = [set(flights.groups[rows]) for rows in parts]
    assert not days[0] & days[1]
    assert not days[0] & days[2]
    assert not days[1] & days[2]
    assert [len(d) for d in days] == [256, 36, 73]
    assert sorted(np.concatenate(parts)) == list(range(len(flights.X)))


def test_a_split_is_the_same_for_a_seed_and_holds_the_class_shares():
    digits = data.load_digits()
    first, again, other = (split_rows(digits, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[2], other[2])
    assert np.abs(np.bincount(digits.Y[first[2]]) - 0.2 * np.bincount(digits.Y)).max() <= 2


def test_a_standardiser_maps_its_rows_to_mean_0_and_deviation_1_and_leaves_constants_alone():
    rng = np.random.default_rng(0)
    X = (1e6 + rng.standard_normal((40_000, 3))).astype(np.float32)
    X[:, 2] = 7
    rows = np.arange(0, 40_000, 2)
    Z = Standardizer.fit(X, rows).apply(X)[rows].astype(np.float64)
    np.testing.assert_allclose(Z[:, :2].mean(axis=0), 0, atol=0.1)  # float32 resolves 1/16 at 1e6
    np.testing.assert_allclose(Z[:, :2].std(axis=0), 1, rtol=1e-3)
    assert (Z[:, 2] == 0).all()


def test_text_and_integer_labels_become_classes_and_floats_targets(tmp_path):
    X = np.arange(6).reshape(3, 2)
    for Y, classes, expected in (
        (np.array(["b", "a", "b"]), ("a", "b"), [1, 0, 1]),
        (np.array([7, 3, 7]), ("3", "7"), [1, 0, 1]),
        (np.array([1.5, 2.5, 3.5]), (), [[1.5], [2.5], [3.5]]),
    ):
        np.savez(tmp_path / "x.npz", X=X, Y=Y)
        loaded = data.load_npz(tmp_path / "x.npz")
        assert loaded.class_names == classes
        assert loaded.Y.tolist() == expected
    assert data.load_npz(tmp_path / "x.npz", target=False).Y is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"Y": [0, 1]}, ["X"]),
        ({"X": [[1.0], [2.0]]}, ["Y"]),
        ({"X": [1.0, 2.0], "Y": [0, 1]}, ["X", "(2,)"]),
        ({"X": np.empty((0, 3)), "Y": []}, ["X", "(0, 3)"]),
        ({"X": [[1.0], [2.0]], "Y": [0, 1, 2]}, ["Y", "2 rows"]),
        ({"X": [[1.0, 2.0], [3.0, np.nan]], "Y": [0, 1]}, ["X", "(1, 1)"]),
        ({"X": [["a"], ["b"]], "Y": [0, 1]}, ["X", "numbers"]),
    ],
)
def test_an_archive_that_cannot_be_trained_on_is_refused_by_name(arrays, words, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=r"bad\.npz") as error:
        data.load_npz(tmp_path / "bad.npz")
    assert all(word in str(error.value) for word in words)


# -- numbers far from 0, of any size


def standardised(values):
    """The columns standardised in Python's fractions, rounded at the end."""
    columns = []
    for column in np.asarray(values).T.tolist():
        exact = [Fraction(value) for value in column]
        mean = sum(exact) / len(exact)
        variance = sum((value - mean) ** 2 for value in exact) / len(exact)
        scale = Fraction(math.isqrt(int(variance * 10**700))) / 10**350
        columns.append([float((value - mean) / scale) for value in exact])
    return np.array(columns).T


@pytest.mark.parametrize(
    ("origin", "unit", "dtype"),
    [
        (0, 1, "f8"),
        (1.7e9, 10, "f8"),
        (1e15, 10, "f8"),
        (-3e8, 1000, "f4"),
        (0, 1e-300, "f8"),
        (0, 1e300, "f8"),
        (2**53, 9, "i8"),
        (2**60, 1000, "i8"),
        (-(2**63) + 10**6, 1000, "i8"),
        (2**64 - 10**6, 1000, "u8"),
        (0, 2.0**61, "i8"),
        (0, 1e-38, "f4"),
        (2**31 - 10**4, 100, "i4"),
        (100, 9, "u1"),
    ],
)
def test_standardising_loses_no_digits_to_an_offset_or_a_scale(origin, unit, dtype):
    e = np.random.default_rng(0).normal(size=(60, 2))
    if dtype[0] == "f":
        X = (origin + e * unit).astype(dtype)
    else:
        X = np.array([[int(origin) + int(v * unit) for v in row] for row in e], dtype)
    scale = Standardizer.fit(X)
    wanted = standardised(X)
    np.testing.assert_allclose(scale.exactly(X), wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scale.apply(X), wanted, rtol=2e-7, atol=1e-12)
    assert scale.apply(X).dtype == np.float32
    back = scale.invert(scale.exactly(X))
    assert back.dtype == np.float64
    np.testing.assert_allclose(
        back, X.astype(np.float64), rtol=4e-16, atol=1e-13 * float(scale.scale.max())
    )
    rows = np.arange(0, 60, 3)
    np.testing.assert_allclose(
        Standardizer.fit(X, rows).exactly(X[rows]),
        standardised(X[rows]),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("value", [7, 2**62 + 1, 0.1, 1.7e9, 1e300, np.float32(0.1), 0])
def test_a_constant_column_becomes_0_and_keeps_its_unit(value):
    X = np.full((50_000, 1), value)
    scale = Standardizer.fit(X)
    assert scale.scale.tolist() == [1]
    assert not scale.apply(X).any()
    noisy = np.full((40, 1), 0.1) + np.arange(40)[:, None] % 2 * 1.4e-17  # rounding, no signal
    assert Standardizer.fit(noisy).scale.tolist() == [1]


def test_alike_columns_share_the_mean_and_the_deviation_of_all_numbers():
    X = 1e9 + np.random.default_rng(0).normal(size=(200, 3)) * [1, 2, 3] + [0, 5, 9]
    Z = Standardizer.fit(X, alike=True).exactly(X)
    np.testing.assert_allclose(Z, (X - X.mean()) / (X - X.mean()).std(), atol=1e-7)


def test_what_cannot_be_standardised_is_named():
    scale = Standardizer.fit(np.arange(6.0).reshape(3, 2))
    with pytest.raises(ValueError, match=r"row 2: 1e\+300 in column 1 is too far"):
        scale.apply(np.array([[1.0, 2.0], [1e300, 0.0]]))
    with pytest.raises(ValueError, match="column 1 is not"):
        Standardizer.fit(np.array([[0.0, -1.7e308], [1.0, 1.7e308]]))
    with pytest.raises(ValueError, match=r"takes \(m, 2\)"):
        scale.apply(np.zeros((3, 3)))
    assert np.isnan(scale.apply(np.array([[np.nan, 1.0]]))).tolist() == [[True, False]]


# -- classes or a quantity, and what another archive says of them


@pytest.mark.parametrize(
    ("Y", "task", "classes"),
    [
        (np.arange(991).repeat(2), None, 0),  # a quantity in whole numbers
        (np.arange(100).repeat(6), None, 100),
        (np.arange(101).repeat(6), None, 0),
        (np.arange(30).repeat(2), None, 0),  # too few rows of each
        (np.arange(30).repeat(2), "classification", 30),
        (np.arange(10).repeat(9), "regression", 0),
        (np.arange(10.0).repeat(9), None, 0),
        (np.arange(10.0).repeat(9), "classification", 10),
        (np.array([-0.0, 0.0, 1.0] * 9), "classification", 2),
        (np.array([True, False] * 9), None, 2),
        (np.array([True, False] * 9), "regression", 0),
        (np.array(["a", "b"] * 9), None, 2),
        (np.arange(10, dtype=np.uint8).reshape(5, 2), "regression", 0),
    ],
)
def test_whole_numbers_are_classes_where_they_are_few_or_the_task_says_so(
    Y, task, classes, tmp_path
):
    np.savez(tmp_path / "x.npz", X=np.random.default_rng(0).normal(size=(len(Y), 2)), Y=Y)
    loaded = data.load_npz(tmp_path / "x.npz", task=task)
    assert len(loaded.class_names) == classes
    told = task is None and Y.dtype.kind == "i"
    assert ("--task" in loaded.note) == told
    if told:
        assert ("treated as classes" in loaded.note) == (classes > 0)
    if not classes:
        np.testing.assert_array_equal(loaded.Y, Y.reshape(len(Y), -1))


@pytest.mark.parametrize(
    ("Y", "task", "word"),
    [
        (np.array(["a", "b"]), "regression", "regression must be numbers"),
        (np.array([2, 2]), "regression", "Y is 2 in every row"),
        (np.array([[1, 2], [3, 4]]), None, "--task regression"),
        (np.array([1.5, np.nan]), None, "finite"),
        (np.array([1.5, np.nan]), "classification", "finite"),
    ],
)
def test_a_target_that_does_not_fit_its_task_is_refused(Y, task, word, tmp_path):
    np.savez(tmp_path / "x.npz", X=[[1.0], [2.0]], Y=Y)
    with pytest.raises(ValueError, match=word):
        data.load_npz(tmp_path / "x.npz", task=task)


def test_an_archive_is_judged_by_the_classes_of_the_model_and_not_by_its_own(tmp_path):
    for Y in (
        np.array([7, 3, 9]),
        np.array([7.0, 3.0, 9.0]),
        np.array(["7", "3", "9"]),
        np.array(["7.0", " 3", "+9"]),
    ):
        np.savez(tmp_path / "x.npz", X=np.zeros((3, 1)), Y=Y)
        truth = data.load_truth(tmp_path / "x.npz", 3, ("3", "7"), "number", 2)
        assert truth.values.tolist() == [1, 0, -1]
        assert (truth.wrong, truth.such) == (1, "9")
    np.savez(tmp_path / "x.npz", X=np.zeros((4, 1)), Y=[1.5, np.nan, np.inf, 2])
    truth = data.load_truth(tmp_path / "x.npz", 4, (), "", 1)
    assert truth.values.tolist() == [[1.5], [2.0]]
    assert truth.rows.tolist() == [True, False, False, True]
    assert (truth.missing, truth.wrong, truth.such) == (1, 1, "inf")
    for Y, classes, outputs, word in (
        ([[1, 2]] * 4, (), 1, "1 per row"),
        (["a"] * 4, (), 1, "1 per row"),
        ([[1]] * 4, ("1",), 2, "labels"),
    ):
        np.savez(tmp_path / "x.npz", X=np.zeros((4, 1)), Y=Y)
        with pytest.raises(ValueError, match=word):
            data.load_truth(tmp_path / "x.npz", 4, classes, "number", outputs)


# -- frames in memory


def test_a_frame_of_several_types_is_read_column_by_column():
    rng = np.random.default_rng(0)
    plain = np.column_stack([rng.random(50) > 0.5, rng.normal(size=50), rng.integers(0, 5, 50)])
    frame = pd.DataFrame(
        {
            "flag": plain[:, 0] > 0,
            "x": plain[:, 1],
            "whole": pd.array(plain[:, 2].astype(int), dtype="Int64"),
        }
    )
    y = plain @ [1.0, 2.0, -1.0]
    parameters = []
    for X in (plain, frame):
        net = mc.MLP([3, 4, 1], seed=0)
        mc.Trainer(net, "squared_error", seed=0).fit(X, y, epochs=2, batch_size=10, progress=False)
        parameters.append(net.parameters.copy())
        assert net.predict(X).shape == (50,)
    np.testing.assert_array_equal(*parameters)


@pytest.mark.parametrize(
    ("column", "error", "words"),
    [
        (["u"] * 4, TypeError, ["X", "its column 'bad'"]),
        (pd.date_range("2024-01-01", periods=4), TypeError, ["X", "'bad'", "datetime64"]),
        (pd.Categorical([1, 2, 1, 2]), TypeError, ["X", "'bad'", "category"]),
        (pd.array([1, None, 2, 3], dtype="Int64"), ValueError, ["row 1, column 2"]),
    ],
)
def test_a_column_of_a_frame_that_holds_no_numbers_is_named(column, error, words):
    frame = pd.DataFrame({"flag": [True, False] * 2, "x": np.arange(4.0), "bad": column})
    with pytest.raises(error, match=re.escape(words[0])) as caught:
        mc.Trainer(mc.MLP([3, 1]), "squared_error").fit(
            frame, np.zeros(4), epochs=1, progress=False
        )
    assert all(word in str(caught.value) for word in words), caught.value


def test_pickled_objects_and_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", X=np.array([[object()]]), Y=[0])
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("objects.npz", "text.npz"):
        with pytest.raises(ValueError, match=name):
            data.load_npz(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        data.load_npz(tmp_path / "absent.npz")
