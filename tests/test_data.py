"""Data sets: read as stated, split honestly, standardised."""

import numpy as np
import pytest

from mlpcore import data


@pytest.fixture(scope="module")
def flights():
    return data.load_flights()


def test_flights_are_those_with_an_arrival_delay_and_a_quarter_of_them_late(flights):
    assert flights.X.shape[0] == 327_346
    assert flights.X.dtype == np.float32
    assert flights.X.flags.c_contiguous
    assert len(flights.feature_names) == flights.X.shape[1]
    assert np.isfinite(flights.X).all()
    assert 0.23 < flights.Y.mean() < 0.24
    assert set(flights.groups) == set(range(1, 366))


def test_no_flight_column_is_known_only_after_departure(flights):
    for forbidden in ("dep_delay", "arr_delay", "dep_time", "arr_time", "air_time"):
        assert not any(name == forbidden or name.startswith(f"{forbidden}_") for name in flights.feature_names)
    late, worst = flights.Y - flights.Y.mean(), 0.0
    for column in range(flights.X.shape[1]):
        x = flights.X[:, column].astype(np.float64)
        worst = max(worst, abs(np.mean((x - x.mean()) * late)) / (x.std() * late.std() + 1e-300))
    assert worst < 0.3  # a departure delay would show up with 0.6


def test_a_split_of_flights_keeps_each_day_whole(flights):
    parts = data.split(flights, seed=0)
    days = [set(flights.groups[rows]) for rows in parts]
    assert not days[0] & days[1]
    assert not days[0] & days[2]
    assert not days[1] & days[2]
    assert [len(d) for d in days] == [256, 36, 73]
    assert sorted(np.concatenate(parts)) == list(range(len(flights.X)))


def test_a_split_is_the_same_for_a_seed_and_holds_the_class_shares():
    digits = data.load_digits()
    first, again, other = (data.split(digits, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[2], other[2])
    assert np.abs(np.bincount(digits.Y[first[2]]) - 0.2 * np.bincount(digits.Y)).max() <= 2


def test_a_standardiser_maps_its_rows_to_mean_0_and_deviation_1_and_leaves_constants_alone():
    rng = np.random.default_rng(0)
    X = (1e6 + rng.standard_normal((40_000, 3))).astype(np.float32)
    X[:, 2] = 7
    rows = np.arange(0, 40_000, 2)
    Z = data.Standardizer.fit(X, rows).apply(X)[rows].astype(np.float64)
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


def test_pickled_objects_and_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", X=np.array([[object()]]), Y=[0])
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("objects.npz", "text.npz"):
        with pytest.raises(ValueError, match=name):
            data.load_npz(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        data.load_npz(tmp_path / "absent.npz")
