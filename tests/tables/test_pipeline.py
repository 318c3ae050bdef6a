"""The map from a table's columns to the network's input: scikit-learn's numbers, and a format of
its own in model files.
"""

import csv
import io
import json
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import mlpcore as mc
from mlpcore.cli import main
from mlpcore.tables import files
from mlpcore.tables import table as tables
from mlpcore.tables.pipeline import LEAST_ROWS, MOST_CATEGORIES, Category, Column, Pipeline
from mlpcore.tables.standardizer import Standardizer

DATA = Path(__file__).parents[1] / "stored"


def of_sklearn(frame, rows, columns):
    """Return names and values of the columns that scikit-learn makes, with exact means and
    deviations.
    """
    numbers = [column.name for column in columns if column.kind == "number"]
    scaled = make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
        StandardScaler(),
    )
    coded = OneHotEncoder(
        handle_unknown="infrequent_if_exist",
        min_frequency=LEAST_ROWS,
        max_categories=MOST_CATEGORIES,
        sparse_output=False,
        dtype=np.float32,
    )
    others = [column.name for column in columns if column.kind != "number"]
    made = ColumnTransformer([("n", scaled, numbers), ("c", coded, others)], sparse_threshold=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a column without values
        made.fit(frame.iloc[rows])
        exact = Standardizer.fit(scaled_input(made, frame.iloc[rows][numbers]))
        made.named_transformers_["n"][1].mean_, made.named_transformers_["n"][1].scale_ = (
            exact.mean,
            exact.scale,
        )
        X = made.transform(frame).astype(np.float32)
    return tuple(name.split("__", 1)[1] for name in made.get_feature_names_out()), X


def scaled_input(made, frame):
    return made.named_transformers_["n"][0].transform(frame)


def random_frame(seed, rows=700):
    """Numbers of all sizes with gaps, and categories with rare values, ties and more than a hundred
    of them.
    """
    rng = np.random.default_rng(seed)

    def gaps(values, share):
        return np.where(
            rng.random(rows) < share, None if values.dtype == object else np.nan, values
        )

    frame = {
        f"n{i}": gaps(rng.normal(size=rows) * 10.0 ** rng.integers(-30, 30), rng.choice([0, 0.3]))
        for i in range(6)
    }
    # none in the training rows
    frame["late gap"] = np.where(np.arange(rows) > rows - 5, np.nan, rng.integers(0, 3, rows))
    frame["none"], frame["same"] = np.full(rows, np.nan), np.ones(rows)
    for i, count in enumerate((2, 30, 99, 100, 101, 400)):
        words = np.array([f"{k}ü" for k in range(count)], object)
        frame[f"c{i}"] = gaps(words[rng.integers(0, count, rows)], rng.choice([0, 0.01, 0.3]))
    # 120 values, 5 or 6 rows each
    frame["tied"] = np.array([f"{k % 120:03}" for k in range(rows)], object)
    frame["last"] = np.array(["a"] * (rows - 3) + ["b"] * 3, object)  # new after training
    return pd.DataFrame(
        {name: pd.Series(values, dtype=values.dtype) for name, values in frame.items()}
    )


@pytest.mark.parametrize("seed", range(4))
def test_columns_names_and_numbers_are_those_of_scikit_learn_to_the_bit(seed):
    frame = random_frame(seed)
    rows = np.random.default_rng(seed).permutation(len(frame) - 10)[:600]
    columns = [
        Column(name, "category" if frame[name].dtype == object else "number") for name in frame
    ]
    made = Pipeline.fit(frame, rows, columns)
    used = [column for column in columns if column in made.columns]
    names, X = of_sklearn(frame, rows, used)
    assert made.names == names
    assert made.width == len(names)
    np.testing.assert_array_equal(made.apply(frame), X)
    assert any(name.endswith("infrequent_sklearn") for name in names)
    assert "late gap" in names
    assert "missingindicator_late gap" not in names


@pytest.mark.parametrize(
    "counts", [[5] * 99, [5] * 100, [5] * 101, [9, 4, 5], [4] * 3 + [5] * 99, range(1, 150), [5]]
)
def test_values_apart_are_those_of_scikit_learn_with_ties(counts):
    values = np.array(
        [f"{k:03}" for k, count in enumerate(counts) for _ in range(count)] + [None] * 5, object
    )
    found = Category.fit(np.random.default_rng(0).permutation(values))
    encoder = OneHotEncoder(
        min_frequency=LEAST_ROWS,
        max_categories=MOST_CATEGORIES,
        handle_unknown="infrequent_if_exist",
    )
    encoder.fit(values[:, None])
    rare = encoder.infrequent_categories_[0]
    assert found.rare == (() if rare is None else tuple(rare))
    assert found.names("c") == [
        name.replace("x0_", "c_") for name in encoder.get_feature_names_out()
    ]


def test_medians_of_huge_numbers_do_not_overflow():
    frame = pd.DataFrame({"a": [1.2e308, 1.4e308, np.nan]})
    made = Pipeline.fit(frame, np.arange(3), [Column("a", "number")])
    assert made.median[0] == 1.3e308


# -- in a model file


@pytest.fixture(scope="module")
def kept():
    """A pipeline with everything in it, and what a model file holds of it."""
    frame = random_frame(0)
    texts = [frame[name].dtype == object for name in frame]
    columns = [
        Column(name, "category" if text else "number", labels="text" if text else "")
        for name, text in zip(frame, texts, strict=True)
    ]
    made = Pipeline.fit(frame, np.arange(len(frame) - 10), columns)
    return frame, made


def notes(made):
    return json.loads(json.dumps(made.about))


def as_tensor(told):
    return np.frombuffer((told if isinstance(told, str) else json.dumps(told)).encode(), np.uint8)


def test_a_pipeline_is_the_same_after_saving(kept, tmp_path):
    frame, made = kept
    mc.MLP([made.width, 1]).save(tmp_path / "m.safetensors", tensors=made.tensors, about=made.about)
    _, tensors, about = mc.MLP.load_with(tmp_path / "m.safetensors")
    again = Pipeline.restore(tensors, about, made.width)
    assert again.names == made.names
    np.testing.assert_array_equal(again.apply(frame), made.apply(frame))
    assert all(name.isascii() or "ü" in name for name in again.names)
    assert b"\xc3\xbc" in tensors["pipeline"].tobytes()  # UTF-8, no escapes


# each that has been written since the first; files of it are read while it stands here
FORMATS = [1]


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("what", ["table-{}-classes", "table-{}-quantity", "archive-{}"])
def test_models_of_each_format_predict_what_they_did(version, what, tmp_path, capsys):
    """The models, and the predictions beside them, were written by `mlpcore train` and `predict` of
    their time.
    """
    name = what.format(f"format-{version}")
    data = DATA / (f"table-format-{version}.csv" if what.startswith("table") else f"{name}.npz")
    assert (
        main(
            [
                "predict",
                str(DATA / f"{name}.safetensors"),
                str(data),
                "--out",
                str(tmp_path / "p.csv"),
            ]
        )
        == 0
    )
    wanted, found = (
        list(csv.reader(io.StringIO(path.read_text())))
        for path in (DATA / f"{name}.csv", tmp_path / "p.csv")
    )
    assert found[0] == wanted[0]
    assert len(found) == len(wanted) > 5
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        numbers = slice(1 if "classes" in what else 0, None)
        assert ours[: numbers.start] == theirs[: numbers.start]
        np.testing.assert_allclose(
            [float(x) for x in ours[numbers]],
            [float(x) for x in theirs[numbers]],
            rtol=1e-6,
            atol=1e-6,
        )
    capsys.readouterr()


def test_a_newer_format_asks_for_an_upgrade_and_the_one_of_before_for_training(tmp_path, capsys):
    for name in ("table-format-1-classes", "archive-format-1"):
        net, tensors, about = mc.MLP.load_with(DATA / f"{name}.safetensors")
        data = DATA / ("table-format-1.csv" if name.startswith("table") else f"{name}.npz")
        path = str(tmp_path / "m.safetensors")
        net.save(path, tensors=tensors, about={**about, "format": 2})
        assert main(["predict", path, str(data), "--out", str(tmp_path / "p.csv")]) == 2
        error = capsys.readouterr().err
        assert path in error
        assert "format 2; this mlpcore reads formats up to 1: upgrade mlpcore" in error
    net, tensors, about = mc.MLP.load_with(DATA / "table-format-1-classes.safetensors")
    del about["format"]
    net.save(
        path,
        tensors={**tensors, "pipeline": np.frombuffer(b"PK\3\4 a zip file of skops", np.uint8)},
        about=about,
    )
    assert (
        main(["predict", path, str(DATA / "table-format-1.csv"), "--out", str(tmp_path / "p.csv")])
        == 2
    )
    assert (
        "written by an older development version of mlpcore; train again" in capsys.readouterr().err
    )
    assert not (tmp_path / "p.csv").exists()


def forged(made):
    """Return forged variants of a file: the field that must be named, tensors, notes."""
    tensors, about = made.tensors, notes(made)
    names = list(about["columns"])
    told = json.loads(tensors["pipeline"].tobytes())
    number, category = names[0], names[-1]

    def column(name, **changes):
        return (
            "columns",
            {},
            {"columns": {**about["columns"], name: {**about["columns"][name], **changes}}},
        )

    def values(name, **changes):
        return "pipeline", {"pipeline": as_tensor({**told, name: {**told[name], **changes}})}, {}

    yield from (
        ("columns", {}, {"columns": value})
        for value in (None, [], {}, 5, {"a": 1}, {"a": {}}, {**about["columns"], "\ud800": {}})
    )
    yield from (
        column(number, origin=value)
        for value in (None, "0", True, 1e300, float("nan"), 10**400, [0.0])
    )
    yield from (column(number, missing=value) for value in (None, 1, "true"))
    yield from (column(number, kind=value) for value in (None, "", "numbers", ["number"], {}))
    yield from (
        column(number, labels="text"),
        column(category, labels="words"),
        column(category, labels=[]),
    )
    yield from (column(category, missing=True), column(category, more=1))
    yield from (
        values(category, apart=value)
        for value in (None, "ab", 5, {}, [1], [["a"]], ["a", "a"], ["\ud800"], [{}])
    )
    yield from (
        values(category, rare=value) for value in (None, told[category]["apart"], [True], [1.5])
    )
    yield values(category, apart=[], rare=[])
    yield values(category, apart=[str(k) for k in range(100_000)])
    for text in (
        "",
        "[]",
        "{}",
        "null",
        "5",
        "[" * 50_000,
        '{"a":' * 50_000,
        "1" * 50_000,
        '{"c0": 1}',
        json.dumps(told)[:-1],
    ):
        yield "pipeline", {"pipeline": as_tensor(text)}, {}
    yield "pipeline", {"pipeline": np.array([255, 254], np.uint8)}, {}
    yield "pipeline", {"pipeline": tensors["pipeline"].astype(np.int8)}, {}
    yield "pipeline", {"pipeline": tensors["pipeline"].reshape(1, -1)}, {}
    yield "pipeline", {"pipeline": as_tensor({name: told[name] for name in reversed(told)})}, {}
    for name in ("median", "mean", "scale"):
        tensor = tensors[f"pipeline {name}"]
        bad = [
            tensor[:-1],
            np.append(tensor, 1),
            tensor.astype(np.float32),
            tensor[:, None],
            np.full_like(tensor, np.nan),
            None,
        ]
        for value in [*bad, *([np.zeros_like(tensor), -tensor] if name == "scale" else [])]:
            yield f"pipeline {name}", {f"pipeline {name}": value}, {}
    yield from (
        ("features", {}, {"features": value})
        for value in (None, [], list(made.names)[::-1], ["x"] * made.width)
    )


def test_what_somebody_made_up_is_refused_by_its_field(kept):
    _, made = kept
    tensors, about = made.tensors, notes(made)
    count = 0
    for field, arrays, changes in forged(made):
        given = {name: value for name, value in {**tensors, **arrays}.items() if value is not None}
        with pytest.raises(
            ValueError, match=rf"its '{field}' is missing or does not fit.*train again"
        ) as error:
            Pipeline.restore(given, {**about, **changes}, made.width)
        assert len(str(error.value)) < 400
        count += 1
    assert count > 60
    with pytest.raises(ValueError, match=r"makes [0-9]+ columns; the network takes 3"):
        Pipeline.restore(tensors, about, 3)


def test_random_changes_of_a_model_never_end_in_anything_but_a_sentence_or_predictions(
    tmp_path, capsys
):
    """Each note and tensor is replaced, at random, by another kind, anywhere in their trees."""
    rng = np.random.default_rng(0)
    net, tensors, about = mc.MLP.load_with(DATA / "table-format-1-classes.safetensors")
    path, data = str(tmp_path / "m.safetensors"), str(DATA / "table-format-1.csv")
    odd = [
        None,
        True,
        -1,
        2**70,
        1e308,
        "",
        "x" * 5000,
        [],
        {},
        [[[[]]]],
        {"a": {"b": []}},
        "1",
        ["no", "yes"],
        "\u2028",
    ]

    def changed(tree):
        if isinstance(tree, dict) and tree and rng.random() < 0.85:
            key = list(tree)[rng.integers(len(tree))]
            if rng.random() < 0.1:
                return {name: value for name, value in tree.items() if name != key}
            return {**tree, key: changed(tree[key])}
        if isinstance(tree, list) and tree and rng.random() < 0.85:
            at = rng.integers(len(tree))
            return [*tree[:at], changed(tree[at]), *tree[at + 1 :]]
        return odd[rng.integers(len(odd))]

    statuses = set()
    for _ in range(120):
        arrays = {**tensors}
        if rng.random() < 0.5:
            arrays["pipeline"] = as_tensor(changed(json.loads(tensors["pipeline"].tobytes())))
        net.save(path, tensors=arrays, about=changed(about))
        status = main(["predict", path, data, "--force", "--out", str(tmp_path / "p.csv")])
        error = capsys.readouterr().err
        assert status in (0, 2)
        assert not status or (path in error and error.count("\n") == 1 and len(error) < 1000), error
        statuses.add(status)
    assert statuses == {0, 2}


def test_reading_takes_memory_and_steps_in_proportion_to_the_file():
    """Files of 55 KiB are read in bounded time, as are ten times as many names."""
    frame = pd.DataFrame({"a": np.arange(20.0)})
    made = Pipeline.fit(frame, np.arange(20), [Column("a", "number")])
    about = notes(made)
    about["columns"]["c"] = {"kind": "category", "labels": "text", "origin": 0.0, "missing": False}
    for text in (
        "[" * 55_000,
        '{"c": {"apart": ' * 3000,
        '{"c": {"apart": [' + '"a", ' * 10_000 + '"b"], "rare": []}}',
    ):
        tracemalloc.start()
        with pytest.raises(ValueError, match="'pipeline'"):
            Pipeline.restore({**made.tensors, "pipeline": as_tensor(text)}, about, made.width)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 << 20


# -- many columns


def calls(function):
    """Return how many calls a function makes, of Python's and of C's."""
    count = 0

    def seen(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


class Name(str):
    """A name that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Name.compared += 1
        return str.__eq__(self, other)


def wide(columns, path):
    rng = np.random.default_rng(0)
    held = {
        f"c{i}": rng.normal(size=60) if i % 2 else rng.choice(["x", "y"], 60)
        for i in range(columns)
    }
    parquet.write_table(pa.table({**held, "y": rng.normal(size=60)}), path)
    return path


@pytest.mark.slow
def test_training_and_predicting_take_steps_in_proportion_to_the_columns(tmp_path):
    steps = {}
    for columns in (60, 240):
        path = wide(columns, tmp_path / f"{columns}.parquet")
        made = tables.load_table(path, "y").prepare(np.arange(60))
        steps[columns] = [
            calls(lambda path=path: tables.load_table(path, "y").prepare(np.arange(60))),
            calls(lambda path=path, made=made: made.apply(made.read(path)[0])),
            calls(
                lambda made=made: tables.Transformer.restore(made.tensors, notes(made), made.width)
            ),
        ]
    for few, many in zip(steps[60], steps[240], strict=True):
        assert many < 5 * few


@pytest.mark.slow
def test_time_is_in_proportion_to_the_columns(tmp_path):
    """The time is the process's, not the clock's; four times the columns took it sixteen times as
    long.
    """
    seconds = {}
    for columns in (2000, 8000):
        path = tmp_path / f"{columns}.parquet"
        parquet.write_table(pa.table({f"c{i}": [0.0, 1.0] for i in range(columns)}), path)
        frame = files.read_table(path).to_pandas()
        made = tables.Transformer.fit(
            frame, np.arange(2), [Column(name, "number") for name in frame]
        )
        began = time.process_time()
        made.read(path)
        between = time.process_time()
        mc.Parquet(path, "c0")
        seconds[columns] = between - began, time.process_time() - between
    for few, many in zip(seconds[2000], seconds[8000], strict=True):
        assert many < 9 * few


def test_names_are_not_compared_each_with_each():
    names = [Name(f"c{i}") for i in range(2000)]
    Name.compared = 0
    files.require_different("t.csv", names)
    tables.require_columns("t.csv", names, names[-1], names[-2], dict.fromkeys(names, "number"))
    assert Name.compared < 20 * len(names)
