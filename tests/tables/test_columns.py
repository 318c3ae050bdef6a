"""Tables with named columns: read as stated, each column taken as stated, kept without pickle."""

import json
import re
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from mlpcore.tables import files
from mlpcore.tables import table as tables
from mlpcore.tables.columns import describe
from mlpcore.tables.pipeline import Column
from mlpcore.tables.targets import find_truth

ROWS = 200


@pytest.fixture(scope="module")
def frame():
    """Every kind of column, with gaps."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "number": np.where(rng.random(ROWS) < 0.1, np.nan, rng.normal(50, 10, ROWS)),
            "whole": pd.array(rng.integers(0, 9, ROWS), dtype="Int64"),
            "city": np.where(
                rng.random(ROWS) < 0.1, None, rng.choice(["Oslo", "Rome", "Bonn"], ROWS)
            ),
            "rare": ["seldom"] + ["x", "y"] * (ROWS // 2 - 1) + ["once"],
            "flag": rng.random(ROWS) < 0.5,
            "grade": pd.Categorical(rng.choice(["a", "b"], ROWS)),
            "row": np.arange(1, ROWS + 1),
            "id": [f"u{i}" for i in range(ROWS)],
            "same": "always",
            "empty": np.full(ROWS, np.nan),
            "day": pd.date_range("2024-01-01", periods=ROWS),
            "hour": [f"2024-01-01T{i % 24:02}:00:00Z" for i in range(ROWS)],
            "late": rng.choice(["yes", "no"], ROWS),
        }
    )


@pytest.fixture(params=["csv", "tsv", "parquet"])
def path(request, frame, tmp_path):
    target = tmp_path / f"table.{request.param}"
    if request.param == "parquet":
        frame.to_parquet(target)
    else:
        frame.to_csv(target, index=False, sep="\t" if request.param == "tsv" else ",")
    return target


def written(tmp_path, text, name="t.csv"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / name


def kinds(table):
    return {column.name: column.kind for column in table.columns}


def notes(table):
    return {column.name: column.note for column in table.columns}


# -- what is taken as what


def test_a_column_is_taken_by_its_type_and_values_whatever_the_format(path, frame):
    table = tables.load_table(path, "late")
    assert kinds(table) == {
        "number": "number",
        "whole": "number",
        "city": "category",
        "rare": "category",
        "flag": "boolean",
        "grade": "category",
        "row": "",
        "id": "",
        "same": "",
        "empty": "",
        "day": "",
        "hour": "",
    }
    said = notes(table)
    assert "missing" in said["number"]
    assert said["row"] == "row numbers, 1 to 200"
    assert "200 values" in said["id"]
    assert "'always'" in said["same"]
    assert "no value" in said["empty"]
    assert said["day"] == "a date or time"
    # as read from CSV, from Parquet
    assert said["hour"] in ("a date or time", "dates as text, such as '2024-01-01T00:00:00Z'")
    assert table.class_names == ("no", "yes")
    assert np.array_equal(table.Y, (frame["late"] == "yes").astype(int))
    assert table.target == "late"


def test_numbers_are_standardised_with_the_median_and_an_indicator_for_gaps_categories_one_hot(
    path, frame
):
    table = tables.load_table(path, "late")
    rows = np.arange(ROWS - 20)
    made = table.prepare(rows)
    X = dict(zip(made.names, made.apply(table.X).T, strict=True))
    raw = frame["number"].to_numpy()
    filled = np.where(np.isnan(raw), np.nanmedian(raw[rows]), raw)
    np.testing.assert_allclose(
        X["number"], (filled - filled[rows].mean()) / filled[rows].std(), rtol=1e-4, atol=1e-5
    )
    assert set(X["missingindicator_number"][np.isnan(raw)]) == {X["missingindicator_number"].max()}
    for city in ("Oslo", "Rome", "Bonn"):
        assert np.array_equal(X[f"city_{city}"], frame["city"] == city)
    assert np.array_equal(X["city_None"], frame["city"].isna())
    assert np.array_equal(X["flag_True"], frame["flag"])
    # "seldom" was in the training rows, "once" was not
    assert X["rare_infrequent_sklearn"].sum() == 2
    assert made.apply(table.X).dtype == np.float32


def test_what_a_column_is_taken_as_can_be_said(tmp_path):
    text = "zip,room,junk,y\n" + "".join(f"0{i % 3}1,{i % 4},{i},{i / 7}\n" for i in range(60))
    table = tables.load_table(
        written(tmp_path, text), "y", wishes={"zip": "category", "room": "category", "junk": "out"}
    )
    assert kinds(table) == {"zip": "category", "room": "category", "junk": ""}
    assert set(table.X["zip"]) == {"001", "011", "021"}  # read as text: zeros in front stay
    assert set(table.X["room"]) == {"0", "1", "2", "3"}


def test_text_that_is_nearly_all_numbers_is_numbers_and_the_rest_is_missing_and_said(tmp_path):
    text = "a,y\n" + "".join(f"{i * i},{i / 7}\n" for i in range(60)) + "unknown,3\ninf,4\n"
    table = tables.load_table(written(tmp_path, text), "y")
    assert kinds(table) == {"a": "number"}
    assert "'unknown'" in notes(table)["a"]
    assert table.X["a"].isna().sum() == 2
    mixed = "a,y\n" + "".join(f"{'ab'[i % 2] if i % 3 else 7},{i / 7}\n" for i in range(60))
    assert kinds(tables.load_table(written(tmp_path, mixed), "y")) == {"a": "category"}


@pytest.mark.parametrize(
    "day",
    [
        "2021-{m:02}-{d:02} 10:30:00",
        "2021/{m:02}/{d:02}",
        "{d:02}/{m:02}/2021",
        "{m}/{d}/21 8:26 PM",
        "{d}.{m}.2021 08:15",
        "{d:02}-{m:02}-2021",
        "2021-{m:02}-{d:02}T10:30:00.5+01:00",
    ],
)
def test_dates_as_text_are_left_out_with_that_note_unless_asked_for(day, tmp_path):
    days = [day.format(d=13 + i % 10, m=1 + i % 2) for i in range(97)] + ["?"] * 3
    text = "a,day,y\n" + "".join(f"{i * i},{day},{i / 7}\n" for i, day in enumerate(days))
    path = written(tmp_path, text)
    table = tables.load_table(path, "y")
    assert kinds(table) == {"a": "number", "day": ""}
    assert notes(table)["day"] == f"dates as text, such as {days[0]!r}"
    assert kinds(tables.load_table(path, "y", wishes={"day": "category"}))["day"] == "category"


def test_versions_shares_and_texts_with_a_few_dates_are_no_dates(tmp_path):
    for words in (
        ["1.2.10", "2.0.1"],
        ["1/2", "3/4"],
        ["14/02/2021", "never"],
        ["2021-14-15", "2021-99-01"],
        ["42/02/2021", "x"],
    ):
        text = "a,y\n" + "".join(f"{words[i % 2]},{i / 7}\n" for i in range(40))
        assert kinds(tables.load_table(written(tmp_path, text), "y")) == {"a": "category"}, words


def test_missing_values_are_counted_once_with_the_text_among_them(tmp_path):
    for gaps, said in (
        (["?"] * 3, "3 missing, all of them text such as '?'"),
        (["?", "", ""], "3 missing, 1 of them text such as '?'"),
    ):
        text = "a,y\n" + "".join(
            f"{a},{i / 7}\n" for i, a in enumerate([*(j * j for j in range(97)), *gaps])
        )
        assert notes(tables.load_table(written(tmp_path, text), "y"))["a"] == f"0 to 9216; {said}"


def test_a_category_of_rare_values_only_is_left_out_before_and_after_the_split(tmp_path):
    text = "a,b,c,y\n" + "".join(f"u{i % 30},{'v' * (i // 6)},{i % 2},{i / 7}\n" for i in range(90))
    table = tables.load_table(written(tmp_path, text), "y", wishes={"b": "category"})
    assert notes(table)["a"] == "30 values, none of them in 5 rows or more"
    assert kinds(table) == {"a": "", "b": "category", "c": "number"}
    made = table.prepare(np.arange(0, 90, 2))  # 3 rows of each of b's
    assert made.names == ("c",)
    assert [column.name for column in made.columns] == ["c"]
    with pytest.raises(ValueError, match="5 training rows"):
        tables.Transformer.fit(table.X[["b"]], np.arange(0, 90, 2), [Column("b", "category")])


def test_the_note_of_a_category_counts_the_columns_it_makes(tmp_path):
    text = "a,y\n" + "".join(
        f"{'pqr'[i % 3] if i < 60 else f'u{i % 20}'},{i / 7}\n" for i in range(100)
    )
    table = tables.load_table(written(tmp_path, text), "y")
    note = "23 values, own columns for those in 5 training rows or more, 3 at most"
    assert notes(table)["a"] == note
    assert table.prepare(np.arange(100)).width == 4  # and the rare ones


def test_many_categories_get_at_most_a_hundred_columns(tmp_path):
    text = "a,y\n" + "".join(f"v{i % 300},{i / 7}\n" for i in range(3000))
    table = tables.load_table(written(tmp_path, text), "y")
    assert "300 values, own columns for the 99 most frequent" in notes(table)["a"]
    assert table.prepare(np.arange(3000)).width == 100


def test_the_listing_of_columns_names_them_all_up_to_its_limit():
    columns = [Column(f"c{i}", "number" if i % 2 else "", "note") for i in range(10)]
    text = describe(columns, most=4)
    assert all(f"c{i}" in text for i in range(4))
    assert "c4" not in text
    assert "6 more: 3 left out, 3 number" in text


# -- the target


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (["b", "a"] * 20, None, ("a", "b")),
        ([True, False] * 20, None, ("False", "True")),
        ([10, 9, 2] * 20, None, ("2", "9", "10")),
        ([1.0, 0.0] * 20, None, ("0", "1")),  # integers with a gap are written like that
        ([1.5, 0.25] * 20, None, ()),
        (list(range(40)), None, ()),
        ([1, 2] * 20, "regression", ()),
        (["1.5", "x1.5"] * 20, "classification", ("1.5", "x1.5")),
        ([0.5, 1.5, 2.5] * 20, "classification", ("0.5", "1.5", "2.5")),
    ],
)
def test_classes_or_a_quantity_is_told_from_the_target_or_by_the_task(
    values, task, classes, tmp_path
):
    pd.DataFrame({"a": np.random.default_rng(0).normal(size=len(values)), "y": values}).to_parquet(
        tmp_path / "t.parquet"
    )
    table = tables.load_table(tmp_path / "t.parquet", "y", task)
    assert table.class_names == classes
    if classes:
        shown = [table.class_names[k] for k in table.Y]
        assert shown == [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    else:
        assert table.Y[:, 0].tolist() == values


def test_rows_without_a_target_are_dropped_and_counted(tmp_path):
    text = "a,y\n" + "".join(f"{i * i},{'' if i % 4 == 0 else i / 7}\n" for i in range(40))
    table = tables.load_table(written(tmp_path, text), "y")
    assert table.dropped == 10
    assert len(table.X) == len(table.Y) == 30
    assert table.X["a"].iloc[0] == 1


def test_groups_are_the_values_of_their_column_which_is_not_learnt_from(tmp_path):
    text = "a,day,y\n" + "".join(f"{i * i},2024-01-0{1 + i % 5},{i / 7}\n" for i in range(40))
    table = tables.load_table(written(tmp_path, text), "y", groups="day")
    assert kinds(table) == {"a": "number", "day": ""}
    assert table.groups.tolist() == [i % 5 for i in range(40)]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            [1, 2, 3] * 20,
            "3 different whole numbers: treated as classes (for a quantity: --task regression)",
        ),
        (
            list(range(40)),
            "40 different whole numbers: treated as a quantity (for classes: --task "
            "classification)",
        ),
        (
            [2**60 + i for i in range(40)],
            "40 different whole numbers: treated as a quantity (for classes: --task "
            "classification)",
        ),
        ([0.5, 1.5] * 20, ""),
    ],
)
def test_how_whole_numbers_were_taken_is_said_with_how_to_say_otherwise(numbers, said, tmp_path):
    pd.DataFrame(
        {"a": np.random.default_rng(0).normal(size=len(numbers)), "y": numbers}
    ).to_parquet(tmp_path / "t.parquet")
    assert tables.load_table(tmp_path / "t.parquet", "y").note == said
    assert tables.load_table(tmp_path / "t.parquet", "y", "regression").note == ""


# -- a value has one name


def written_as(how, values, tmp_path, name="y"):
    """A file with a column of these values, in one type or another, and a column of numbers."""
    a = np.random.default_rng(0).normal(size=len(values)).tolist()
    path = tmp_path / f"{how}.{'csv' if how.startswith('csv') else 'parquet'}"
    if how.startswith("csv"):
        form = {"csv": "{}", "csv float": "{}.0", "csv spaces": "  {} ", "csv decimal": "{}.00"}[
            how
        ]
        lines = [
            f"{x},{'' if v is None else form.format(v)}" for x, v in zip(a, values, strict=True)
        ]
        path.write_text(f"a,{name}\n" + "\n".join(lines) + "\n")
        return path
    types = {
        "int": pa.int8(),
        "float": pa.float64(),
        "half": pa.float16(),
        "decimal": pa.decimal128(8, 2),
        "text": pa.string(),
    }
    values = [
        None if v is None else Decimal(v) if how == "decimal" else str(v) if how == "text" else v
        for v in values
    ]
    if how == "half":
        values = [None if v is None else np.float16(v) for v in values]
    parquet.write_table(pa.table({"a": a, name: pa.array(values, types[how])}), path)
    return path


FORMS = ["csv", "csv float", "csv spaces", "csv decimal", "int", "float", "half", "decimal", "text"]


@pytest.mark.parametrize("trained", FORMS)
@pytest.mark.parametrize("used", FORMS)
def test_a_number_is_the_same_class_and_category_in_whatever_type(trained, used, tmp_path):
    values = [3, 10, 2, None] * 10
    (tmp_path / "trained").mkdir()
    (tmp_path / "used").mkdir()
    path, other = (
        written_as(trained, values, tmp_path / "trained"),
        written_as(used, values, tmp_path / "used"),
    )
    table = tables.load_table(path, "y", "classification")
    assert table.class_names == ("2", "3", "10")
    truth = find_truth(files.read_table(other, ["y"]).column("y"), table.class_names, table.labels)
    assert np.array_equal(truth.values, table.Y)
    assert (truth.missing, truth.wrong) == (10, 0)
    table = tables.load_table(path, "a", "regression", wishes={"y": "category"})
    made = table.prepare(np.arange(len(table.X)))
    frame, _, remarks = made.read(other)
    assert not remarks
    assert np.array_equal(made.apply(frame), made.apply(table.X))


def test_zeros_are_one_class_whatever_their_sign(tmp_path):
    text = "a,y\n" + "".join(f"{i * i},{['0.0', '-0.0', '1.0'][i % 3]}\n" for i in range(60))
    table = tables.load_table(written(tmp_path, text), "y")
    assert table.class_names == ("0", "1")
    assert np.bincount(table.Y).tolist() == [40, 20]


@pytest.mark.parametrize("form", ["csv", "text", "float"])
def test_zeros_are_one_category_whatever_their_sign_and_the_file(form, tmp_path):
    values = ["0.0", "-0.0", "1.0"] * 20
    frame = pd.DataFrame({"f": values, "y": np.arange(60) / 7})
    if form == "csv":
        frame.to_csv(tmp_path / "t.csv", index=False)
    else:
        frame.astype({"f": float} if form == "float" else {}).to_parquet(tmp_path / "t.parquet")
    path = tmp_path / ("t.csv" if form == "csv" else "t.parquet")
    assert (
        tables.load_table(path, "y", wishes={"f": "category"}).columns[0].note == "2 values: 0, 1"
    )
    assert tables.load_table(path, "f", "classification").class_names == ("0", "1")


@pytest.mark.parametrize(
    ("values", "others", "names"),
    [
        # read as text where no "A" stands, too
        (["01", "02", "A"], ["02", "01"], ("01", "02", "A")),
        (["01", "02"], ["02", "01"], ("01", "02")),
        # pandas writes so where a value is missing
        (["3", "4", "A"], ["4.0", "3.0"], ("3", "4", "A")),
        (["true", "FALSE"], ["True", "false"], ("False", "True")),
        (["true", "false"], ["1", "0"], ("False", "True")),
        (["0", "1"], ["True", "False"], ("0", "1")),
        ([" x", "y "], ["y", "x"], ("x", "y")),
        (["1e+20", "2"], ["100000000000000000000", "2.0"], ("2", "100000000000000000000")),
        (["0.30", "1e-3"], [".3", "0.0010"], ("0.001", "0.3")),
        (["0x10", "0x0A"], ["16", "10"], ("10", "16")),
    ],
)
def test_labels_of_another_file_are_read_as_those_of_the_first(values, others, names, tmp_path):
    def text(labels):
        return "a,y\n" + "".join(f"{i * i},{labels[i % len(labels)]}\n" for i in range(60))

    table = tables.load_table(written(tmp_path, text(values)), "y", "classification")
    assert table.class_names == names
    truth = find_truth(
        files.read_table(written(tmp_path, text(others)), ["y"]).column("y"), names, table.labels
    )
    assert truth.wrong == truth.missing == 0
    at = [table.Y[i] for i in range(len(values))]
    order = {
        "02": 1,
        "4.0": 1,
        "y": 1,
        "1": 0,
        ".3": 0,
        "16": 0,
        "100000000000000000000": 0,
        "True": None,
    }
    if (first := order[others[0]]) is not None:
        assert truth.values[:2].tolist() == [at[first], at[1 - first]]
    else:
        assert [names[k].lower() in ("true", "1") for k in truth.values[:2]] == [True, False]


def in_both(labels, tmp_path, **options):
    """Return two tables with these texts as targets: from CSV, and from Parquet as text."""
    frame = pd.DataFrame(
        {"a": np.arange(60.0) ** 2, "y": [labels[i % len(labels)] for i in range(60)]}
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    return [tables.load_table(tmp_path / name, "y", **options) for name in ("t.csv", "t.parquet")]


@pytest.mark.parametrize(
    ("texts", "task", "names"),
    [
        (["1.1", "1.10", "1.2"], "classification", ("1.1", "1.10", "1.2")),
        (["1.1", "1.10"], "classification", ("1.1", "1.10")),  # one number in every row
        (["1E5", "100000", "2E3"], None, ("100000", "1E5", "2E3")),
        (["00.5", "0.5"], "classification", ("0.5", "00.5")),
        (["007", "7"], None, ("007", "7")),
        (
            ["18446744073709551617", "18446744073709551616"],
            None,
            ("18446744073709551616", "18446744073709551617"),
        ),
        (["-0", "+18446744073709551615"], None, ("0", "18446744073709551615")),
        (["1", "1.0", "+1", "0", "-0.0"], None, ("0", "1")),
        (["10", "9.0", "2"], None, ("2", "9", "10")),
        (["true", "1"], None, ("1", "true")),
        (["True", "false"], None, ("False", "True")),
        (["0xE5", "229", "16"], None, None),
        (["10:30", "11:00:00"], None, ("10:30", "11:00:00")),
    ],
)
def test_classes_are_the_same_from_csv_and_from_text(texts, task, names, tmp_path):
    of_csv, of_text = in_both(texts, tmp_path, task=task)
    assert of_csv.class_names == of_text.class_names == (names or ("16", "229"))
    assert of_csv.labels == of_text.labels
    np.testing.assert_array_equal(of_csv.Y, of_text.Y)


@pytest.mark.parametrize(
    "days", [["2024-01-01", "2024-01-02"], ["2024-01-01 10:00", "2024-01-02T11:30:00"]]
)
@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "dates.parquet"])
def test_dates_are_no_target_in_any_file(days, name, tmp_path):
    frame = pd.DataFrame({"a": np.arange(60.0) ** 2, "y": days * 30})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    frame.assign(y=pd.to_datetime(frame["y"], format="ISO8601")).to_parquet(
        tmp_path / "dates.parquet"
    )
    with pytest.raises(
        ValueError,
        match=r"--target 'y' holds .*(date|timestamp).*; expected numbers, text or booleans",
    ):
        tables.load_table(tmp_path / name, "y")


def test_infinite_targets_of_a_csv_file_are_no_class(tmp_path):
    text = "a,y\n" + "".join(f"{i * i},{['1', '2', 'inf', ''][i % 4]}\n" for i in range(80))
    table = tables.load_table(written(tmp_path, text), "y")
    assert table.class_names == ("1", "2")
    assert (table.dropped, table.infinite) == (40, 20)
    assert (
        table.note
        == "2 different whole numbers: treated as classes (for a quantity: --task regression)"
    )


@pytest.mark.parametrize("texts", [False, True])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_infinity_is_missing_in_a_category_of_numbers_and_in_classes_in_every_file(
    form, texts, tmp_path
):
    numbers = np.array([1, 2, np.inf, -np.inf] * 30)
    infinite = np.isinf(numbers)
    values = [str(x).removesuffix(".0") for x in numbers] if texts else numbers
    frame = pd.DataFrame({"a": np.arange(120.0) ** 2, "k": values, "y": np.arange(120) / 7})
    frame.to_parquet(tmp_path / "t.parquet") if form == "parquet" else frame.to_csv(
        tmp_path / "t.csv", index=False
    )
    path = tmp_path / f"t.{form}"
    table = tables.load_table(path, "y", wishes={"k": "category"})
    assert [name is None for name in table.X["k"]] == infinite.tolist()
    made, _, remarks = table.prepare(np.arange(120)).read(path)
    assert [name is None for name in made["k"]] == infinite.tolist()
    assert remarks == []
    assert set(table.X["k"]) == {"1", "2", None}
    table = tables.load_table(path, "k", "classification")
    assert table.class_names == ("1", "2")
    assert (table.rows, table.infinite) == (60, 60)


def test_a_text_that_reads_as_infinity_is_a_text_among_texts(tmp_path):
    path = written(
        tmp_path,
        "a,k,y\n" + "".join(f"{i * i},{['inf', 'sup'][i % 2]},{i / 7}\n" for i in range(60)),
    )
    assert set(tables.load_table(path, "y").X["k"]) == {"inf", "sup"}


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_codes_of_groups_are_kept_apart_in_every_file(form, tmp_path):
    frame = pd.DataFrame(
        {"a": np.arange(60.0) ** 2, "g": ["1.1", "1.10", "2"] * 20, "y": np.arange(60) / 7}
    )
    frame.to_parquet(tmp_path / "t.parquet") if form == "parquet" else frame.to_csv(
        tmp_path / "t.csv", index=False
    )
    assert (
        tables.load_table(tmp_path / f"t.{form}", "y", groups="g").groups.tolist() == [0, 1, 2] * 20
    )


def test_codes_stay_text_in_a_file_whose_every_value_is_digits(tmp_path):
    text = "code,y\n" + "".join(f"{['01', '02', 'A'][i % 3]},{i / 7}\n" for i in range(60))
    made = tables.load_table(written(tmp_path, text), "y").prepare(np.arange(60))
    frame, _, remarks = made.read(written(tmp_path, text.replace("A", "01"), "other.csv"))
    assert remarks == []
    assert set(frame["code"]) == {"01", "02"}
    parquet.write_table(pa.table({"code": pa.array([1, 2])}), tmp_path / "numbers.parquet")
    _, _, remarks = made.read(tmp_path / "numbers.parquet")
    assert remarks == [
        "code: values not seen in training, such as '1', in 2 row(s): treated as none of the known "
        "ones"
    ]


def test_booleans_with_gaps_are_the_same_from_any_file(tmp_path):
    flags = [True, False, None] * 20
    y = np.random.default_rng(0).normal(size=60)
    pd.DataFrame({"f": pd.array(flags, "boolean"), "y": y}).to_parquet(tmp_path / "bool.parquet")
    pd.DataFrame({"f": pd.array(flags, "boolean"), "y": y}).to_csv(
        tmp_path / "bool.csv", index=False
    )
    pd.DataFrame({"f": pd.Series(flags, dtype=object).astype(float), "y": y}).to_csv(
        tmp_path / "float.csv", index=False
    )
    pd.DataFrame({"f": [None if f is None else str(f).upper() for f in flags], "y": y}).to_parquet(
        tmp_path / "text.parquet"
    )
    names = ("bool.parquet", "bool.csv", "float.csv", "text.parquet")
    for trained in (name for name in names if name != "float.csv"):  # by itself, numbers
        table = tables.load_table(tmp_path / trained, "y", "regression")
        assert kinds(table) == {"f": "boolean"}
        made = table.prepare(np.arange(60))
        for name in names:
            frame, _, remarks = made.read(tmp_path / name)
            assert not remarks
            assert frame["f"].tolist() == ["True", "False", None] * 20


def test_dates_asked_for_are_the_same_from_any_type(tmp_path):
    days, y = (
        pd.date_range("2024-01-01", periods=3).tolist() * 20,
        np.random.default_rng(0).normal(size=60),
    )
    files = {
        "time.parquet": pd.Series(days),
        "date.parquet": [day.date() for day in days],
        "text.parquet": [f"{day:%Y-%m-%d}T00:00:00" for day in days],
    }
    for name, column in files.items():
        pd.DataFrame({"d": column, "y": y}).to_parquet(tmp_path / name)
    pd.DataFrame({"d": days, "y": y}).to_csv(tmp_path / "day.csv", index=False)
    for trained in (*files, "day.csv"):
        made = tables.load_table(tmp_path / trained, "y", wishes={"d": "category"}).prepare(
            np.arange(60)
        )
        for name in (*files, "day.csv"):
            frame, _, remarks = made.read(tmp_path / name)
            assert not remarks
            assert set(frame["d"]) == {"2024-01-01", "2024-01-02", "2024-01-03"}


def test_missing_values_are_missing_in_every_file(tmp_path):
    words = ["x", "NA", "", " ", "nan", "null"] * 10
    y = np.random.default_rng(0).normal(size=60)
    pd.DataFrame({"w": words, "y": y}).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text(
        "w,y\n" + "".join(f"{w},{v}\n" for w, v in zip(words, y, strict=True))
    )
    for name in ("t.parquet", "t.csv"):
        table = tables.load_table(tmp_path / name, "y", "regression")
        assert set(table.X["w"]) == {"x", None}
        assert table.X["w"].isna().sum() == 50


def test_many_values_with_fractions_are_the_same_from_text_and_from_numbers(tmp_path):
    values = np.random.default_rng(0).normal(size=40).repeat(5)
    y = np.random.default_rng(1).normal(size=200)
    for dtype in (np.float64, np.float32):
        frame = pd.DataFrame({"v": values.astype(dtype), "y": y})
        frame.to_parquet(tmp_path / "v.parquet")
        frame.to_csv(tmp_path / "v.csv", index=False)
        for trained, used in (("v.parquet", "v.csv"), ("v.csv", "v.parquet")):
            made = tables.load_table(tmp_path / trained, "y", wishes={"v": "category"}).prepare(
                np.arange(200)
            )
            assert made.width == 40
            assert made.read(tmp_path / used)[2] == []


@pytest.mark.parametrize("dtype", [int, float, bool, str])
def test_a_category_of_pandas_is_one_whatever_it_holds(dtype, tmp_path):
    values = np.array([0, 1] if dtype is bool else [7, 14, 21])[
        np.random.default_rng(0).integers(0, 2, 60)
    ].astype(dtype)
    y = np.random.default_rng(0).normal(size=60)
    pd.DataFrame({"k": pd.Categorical(values), "y": y}).to_parquet(tmp_path / "t.parquet")
    parquet.write_table(
        pa.table({"k": pa.array(values).dictionary_encode(), "y": y}), tmp_path / "arrow.parquet"
    )
    for name in ("t.parquet", "arrow.parquet"):
        table = tables.load_table(tmp_path / name, "y")
        assert kinds(table) == {"k": "category"}, name
        assert kinds(
            tables.load_table(
                tmp_path / name, "y", wishes={"k": "out"} if dtype is str else {"k": "number"}
            )
            if dtype in (int, float)
            else table
        ) == {"k": "number" if dtype in (int, float) else "category"}
    many = pd.DataFrame(
        {
            "a": y,
            "y": pd.Categorical(
                np.arange(30).repeat(2).astype(dtype if dtype is not bool else str)
            ),
        }
    )
    many.to_parquet(tmp_path / "y.parquet")
    assert len(tables.load_table(tmp_path / "y.parquet", "y").class_names) == 30


def test_groups_without_a_name_are_refused_and_one_group_has_one_name(tmp_path):
    frame = pd.DataFrame(
        {"a": np.arange(40.0) ** 2, "g": [0.0, -0.0, 1.0, 2.0] * 10, "y": np.arange(40) / 7}
    )
    frame.to_parquet(tmp_path / "g.parquet")
    assert (
        tables.load_table(tmp_path / "g.parquet", "y", groups="g").groups.tolist()
        == [0, 0, 1, 2] * 10
    )
    parquet.write_table(
        pa.table({"a": frame["a"], "g": pa.array([[1]] * 40), "y": frame["y"]}),
        tmp_path / "g.parquet",
    )
    with pytest.raises(ValueError, match="--groups 'g' holds list"):
        tables.load_table(tmp_path / "g.parquet", "y", groups="g")
    frame.assign(g=frame["g"].replace(2.0, np.nan)).to_parquet(tmp_path / "g.parquet")
    with pytest.raises(ValueError, match="--groups 'g' has no value in 10 row"):
        tables.load_table(tmp_path / "g.parquet", "y", groups="g")


# -- numbers far from 0, of any size


FAR = [
    (0, 1, np.float64),
    (1.7e9, 1, np.float64),
    (-1e12, 100, np.float64),
    (0, 1e-300, np.float64),
    (0, 1e300, np.float64),
    (2**60, 100, np.int64),
    (-(2**62), 100, np.int64),
    (1_700_000_000_000_000_000, 9, np.int64),
]


@pytest.mark.parametrize(
    ("origin", "unit", "dtype", "suffix"),
    [
        *((*case, suffix) for case in FAR for suffix in ("csv", "parquet")),
        *((2**63, 100, np.uint64, suffix) for suffix in ("csv", "parquet")),
    ],
)
def test_numbers_are_standardised_as_if_they_were_around_0(origin, unit, dtype, suffix, tmp_path):
    """The reference is the same column without its offset, in Python's exact integers and in
    double.
    """
    e = np.random.default_rng(0).normal(size=(300, 2))
    near = np.rint(e * unit) if np.issubdtype(dtype, np.integer) else e
    if np.issubdtype(dtype, np.integer):
        held = np.array([[int(origin) + int(v) for v in row] for row in near], dtype)
    else:
        held = (origin + near * unit).astype(dtype)
        near = (held - origin) / unit
    frame = pd.DataFrame({"a": held[:, 0], "y": held[:, 1]})
    frame.to_parquet(tmp_path / "t.parquet") if suffix == "parquet" else frame.to_csv(
        tmp_path / "t.csv", index=False
    )
    table = tables.load_table(tmp_path / f"t.{suffix}", "y", "regression")
    rows = np.arange(200)
    wanted = (near - near[rows].mean(axis=0)) / near[rows].std(axis=0)
    made = table.prepare(rows)
    np.testing.assert_allclose(made.apply(table.X)[:, 0], wanted[:, 0], rtol=2e-6, atol=2e-6)
    cut = table.split(0)
    assert cut.scale is not None
    back = cut.scale.invert(cut.test[1])
    np.testing.assert_allclose(
        back, cut.answers.astype(np.float64), rtol=2e-16, atol=1e-6 * float(cut.scale.scale[0])
    )
    again = tables.Transformer.restore(made.tensors, json.loads(json.dumps(made.about)), made.width)
    np.testing.assert_array_equal(
        again.apply(again.read(tmp_path / f"t.{suffix}")[0]), made.apply(table.X)
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("first", [2**53 + 1, 2**60, -(2**62)])
def test_integers_of_many_digits_may_have_gaps(first, suffix, tmp_path):
    steps = [i * 7 % 1000 for i in range(299)]
    frame = pd.DataFrame(
        {"f": pd.array([*(first + k for k in steps), None], "Int64"), "y": [*steps, 0.5]}
    )
    frame.to_parquet(tmp_path / "t.parquet") if suffix == "parquet" else frame.to_csv(
        tmp_path / "t.csv", index=False
    )
    table = tables.load_table(tmp_path / f"t.{suffix}", "y", "regression")
    (column,) = table.columns
    assert column.note == f"{first} to {first + max(steps)}; 1 missing"
    numbers = table.X["f"].to_numpy()
    assert np.isnan(numbers[-1])
    np.testing.assert_array_equal(numbers[:-1] - numbers[0], steps)


@pytest.mark.parametrize("first", [2**63, 2**64 - 500, -(2**63) - 500, 10**30])
def test_integers_beyond_int64_keep_their_digits_in_csv(first, tmp_path):
    steps = [i * 7 % 1000 for i in range(299)]
    text = "f,g,y\n" + "".join(f"{first + k},{first + k}.5,{k / 7}\n" for k in steps) + ",,0.5\n"
    table = tables.load_table(written(tmp_path, text), "y")
    f = table.X["f"].to_numpy()
    np.testing.assert_array_equal(f[:-1] - f[0], steps)
    assert np.isnan(f[-1])
    assert table.columns[0].note == f"{first} to {first + max(steps)}; 1 missing"
    made = table.prepare(np.arange(200))
    parquet.write_table(
        pa.table({"f": [str(first + k) for k in steps], "g": [0.0] * 299}), tmp_path / "t.parquet"
    )
    frame, _, _ = made.read(tmp_path / "t.parquet")
    np.testing.assert_array_equal(made.apply(frame)[:, 0], made.apply(table.X)[:-1, 0])


def test_integers_of_many_digits_are_the_same_from_text(tmp_path):
    values = [2**60 + i * i for i in range(60)]
    parquet.write_table(
        pa.table({"a": values, "y": [i / 7 for i in range(60)]}), tmp_path / "t.parquet"
    )
    made = tables.load_table(tmp_path / "t.parquet", "y").prepare(np.arange(60))
    assert made.columns[0].origin > 2.0**59
    parquet.write_table(
        pa.table({"a": [str(v) for v in values], "y": [i / 7 for i in range(60)]}),
        tmp_path / "s.parquet",
    )
    of_text = tables.load_table(tmp_path / "s.parquet", "y")
    np.testing.assert_array_equal(
        of_text.prepare(np.arange(60)).apply(of_text.X),
        made.apply(made.read(tmp_path / "t.parquet")[0]),
    )
    forms = {
        "text": [str(v) for v in values],
        "decimal": pa.array([Decimal(v) for v in values], pa.decimal128(25, 1)),
    }
    X = made.apply(made.read(tmp_path / "t.parquet")[0])
    assert len(set(X[:, 0].tolist())) == 60
    for name, column in forms.items():
        parquet.write_table(pa.table({"a": column}), tmp_path / f"{name}.parquet")
        np.testing.assert_array_equal(made.apply(made.read(tmp_path / f"{name}.parquet")[0]), X)


def test_a_column_far_from_0_that_is_constant_on_the_training_rows_is_left_at_0(tmp_path):
    values = [2**60] * 50 + [2**60 + 3] * 10
    parquet.write_table(
        pa.table({"a": values, "b": [1.7e9 + i % 2 for i in range(60)], "y": np.arange(60) / 7}),
        tmp_path / "t.parquet",
    )
    table = tables.load_table(tmp_path / "t.parquet", "y")
    X = table.prepare(np.arange(50)).apply(table.X)
    np.testing.assert_array_equal(X[:, 0], [0] * 50 + [3] * 10)
    np.testing.assert_allclose(X[:, 1], [-1, 1] * 30, rtol=1e-6)


# -- errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("a,y\n", ["no rows"]),
        ("a,y\n1,2\n3\n", ["#3", "2 columns, got 1"]),
        ("a,y\n1,2\n3,4,5\n", ["#3", "2 columns, got 3"]),
        ("a,a,y\n1,2,3\n", ["2 columns", "'a'"]),
        ("a;y\n1;2\n", ["'a;y'", "commas"]),
        ("a;b,c;y\n1,5;2,0;3,5\n", ["2 columns", "commas (.csv)"]),
        ("a;b;y\n1,5;2;3,5\n", ["1 columns, got 3", "commas (.csv)"]),
        ("a,yy\n1,2\n", ["'y'", "mean 'yy'"]),
        ("a,y\n1,caf\xe9\n".encode("latin-1"), ["'y'", "UTF-8"]),
        ("caf\xe9,y\n1,2\n".encode("latin-1"), ["UTF-8"]),
        ("a,y\n1,\n2,\n", ["'y'", "no value"]),
        ("a,y\n1,x\n2,x\n", ["'x' in every row"]),
        ("a,y\n1,1.5\n2,1.5\n", ["1.5 in every row"]),
        ("y\n1\n2\n", ["no column is left", "no other"]),
        ("a,y\nq,1\nq,2\n", ["no column is left", "'q' in every row"]),
        ("a,y\n1,2024-01-01\n2,2024-01-02\n", ["'y'", "date"]),
        ("a,y\n" + "".join(f"{i},n{i}\n" for i in range(9)), ["9 classes in 9 rows", "identifier"]),
    ],
)
def test_a_table_that_cannot_be_trained_on_is_refused_by_name(text, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        tables.load_table(written(tmp_path, text), "y")
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert "t.csv" in str(error.value) or "--target 'y'" in str(error.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"task": "regression"}, ["row 2", "'x'"]),
        ({"groups": "g"}, ["--groups", "'g'"]),
        ({"groups": "y"}, ["--groups and --target"]),
        ({"groups": "gap"}, ["'gap'", "1 row"]),
        ({"wishes": {"q": "number"}}, ["--as", "'q'"]),
        ({"wishes": {"a": "numbr"}}, ["--as a", "'number'"]),
        ({"wishes": {"day": "number"}}, ["--as day=number", "date"]),
        ({"wishes": {"word": "number"}}, ["--as word=number", "the first value is 'u'"]),
        ({"wishes": {"income": "number"}}, ["--as income=number", "the first value is '11,525'"]),
    ],
)
def test_a_wrong_argument_is_refused_by_name(more, words, tmp_path):
    text = (
        'a,gap,day,word,income,y\n1,1,2024-01-01,u,"11,525",1\n2,,2024-01-02,v,"9,000",x\n'
        '4,3,2024-01-03,v,"1,000",x\n'
    )
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        tables.load_table(written(tmp_path, text), "y", **more)
    assert all(word in str(error.value) for word in words), error.value


def test_files_that_are_not_there_or_not_parquet_are_refused(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    for name, error, word in (
        ("no.csv", FileNotFoundError, "no such file"),
        ("folder.csv", FileNotFoundError, "a folder"),
    ):
        with pytest.raises(error, match=word):
            tables.load_table(tmp_path / name, "y")
    with pytest.raises(ValueError, match=r"t\.parquet: cannot be read"):
        tables.load_table(written(tmp_path, "a,y\n1,2\n", "t.parquet"), "y")


def test_a_number_that_cannot_be_standardised_is_named(tmp_path):
    text = "a,y\n" + "".join(f"{i * i},{i / 7}\n" for i in range(9)) + "1e300,3\n"
    table = tables.load_table(written(tmp_path, text), "y")
    with pytest.raises(ValueError, match="'a' is too far"):
        table.prepare(np.arange(9)).apply(table.X)


# -- kept and used again


@pytest.fixture
def kept(path):
    """A table, its transformer, and what a model file holds of it after a round through JSON."""
    table = tables.load_table(path, "late")
    made = table.prepare(np.arange(ROWS - 20))
    return table, made, made.tensors, json.loads(json.dumps(made.about))


def test_the_same_rows_give_the_same_input_after_saving(kept, path):
    table, made, tensors, about = kept
    again = tables.Transformer.restore(tensors, about, made.width)
    frame, whole, remarks = again.read(path)
    assert remarks == [
        "rare: values not seen in training, such as 'once', in 1 row(s): treated as rare"
    ]
    assert again.names == made.names
    assert np.array_equal(again.apply(frame), made.apply(table.X))
    truth = find_truth(whole.column("late"), table.class_names, table.labels)
    assert np.array_equal(truth.values, table.Y)
    assert truth.rows.all()


def test_a_table_of_other_types_without_target_gives_the_same_input(kept, frame, tmp_path):
    table, made, tensors, about = kept
    again = tables.Transformer.restore(tensors, about, made.width)
    other = frame.drop(columns=["late", "id", "day"])[::-1].assign(
        whole=frame["whole"].astype(float), extra=1
    )
    other["number"] = other["number"].map(lambda x: "unknown" if np.isnan(x) else repr(x))
    other.to_parquet(tmp_path / "other.parquet")
    X, whole, remarks = again.read(tmp_path / "other.parquet")
    assert np.array_equal(again.apply(X)[::-1], made.apply(table.X))
    assert "late" not in whole.column_names
    assert any("number" in remark and "without a finite number" in remark for remark in remarks)


def test_values_never_seen_are_taken_as_rare_or_nothing_and_said(kept, frame, tmp_path):
    _, made, _, _ = kept
    frame.assign(city="Atlantis", rare="other", flag=None).to_parquet(tmp_path / "new.parquet")
    X, _, remarks = made.read(tmp_path / "new.parquet")
    columns = dict(zip(made.names, made.apply(X).T, strict=True))
    assert not any(values.any() for name, values in columns.items() if name.startswith("city_"))
    assert columns["rare_infrequent_sklearn"].all()
    assert {remark.split(":")[0] for remark in remarks} == {"city", "rare", "flag"}
    assert any("'Atlantis'" in remark for remark in remarks)


def test_a_missing_column_is_refused_with_the_nearest(kept, frame, tmp_path):
    frame.rename(columns={"whole": "wholes"}).to_parquet(tmp_path / "new.parquet")
    with pytest.raises(ValueError, match=r"new\.parquet.*no column 'whole'; did you mean 'wholes'"):
        kept[1].read(tmp_path / "new.parquet")


def test_a_category_of_lists_is_refused(kept, frame, tmp_path):
    frame.assign(city=[["Oslo"]] * ROWS).to_parquet(tmp_path / "new.parquet")
    with pytest.raises(
        ValueError, match=r"new\.parquet: column 'city' holds list<.*it was a category in training"
    ):
        kept[1].read(tmp_path / "new.parquet")


@pytest.mark.parametrize(
    ("value", "held"),
    [
        ([1.0], "list<"),
        (b"1", "binary"),
        (pd.Timestamp("2024-05-01"), "timestamp"),
        ("red", "no numbers, but text such as 'red'"),
    ],
)
def test_a_number_that_can_be_none_is_refused_and_one_among_texts_is_enough(
    value, held, kept, frame, tmp_path
):
    new = frame.assign(number=[value] * ROWS)
    new.to_parquet(tmp_path / "new.parquet")
    with pytest.raises(
        ValueError,
        match=rf"new\.parquet: column 'number' holds {held}.*it was a number in training",
    ):
        kept[1].read(tmp_path / "new.parquet")
    if isinstance(value, str):
        new.loc[3, "number"] = "7"
        new.to_parquet(tmp_path / "new.parquet")
        assert any(
            "number: " in remark and "without a finite number" in remark
            for remark in kept[1].read(tmp_path / "new.parquet")[2]
        )


def test_texts_as_views_are_texts(tmp_path):
    columns = {"s": pa.array(["x", "y", None] * 20, pa.string_view()), "y": np.arange(60) / 7}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert kinds(tables.load_table(tmp_path / "t.parquet", "y")) == {"s": "category"}
    assert tables.load_table(tmp_path / "t.parquet", "s").class_names == ("x", "y")


def test_of_many_columns_the_nearest_and_ten_at_most_are_named(tmp_path):
    text = (
        ",".join(f"c{i}" for i in range(30)) + ",size\n" + ",".join("1" for _ in range(31)) + "\n"
    )
    with pytest.raises(ValueError, match="did you mean 'size'") as error:
        tables.load_table(written(tmp_path, text), "sizes")
    assert str(error.value).endswith("There are size, c0, c1, c2, c3, c4, c5, c6, c7, c8, …")


def test_targets_that_are_no_class_of_the_model_stay_in_the_count():
    truth = find_truth(pa.chunked_array([["b", None, "z", "a", ""]]), ("a", "b"), "text")
    assert truth.values.tolist() == [1, -1, 0]
    assert truth.rows.tolist() == [True, False, True, True, False]
    assert (truth.missing, truth.wrong, truth.such) == (2, 1, "z")
    truth = find_truth(pa.chunked_array([[1.5, None, float("inf"), float("nan")]]), (), "")
    assert truth.values.tolist() == [[1.5]]
    assert truth.rows.tolist() == [True, False, False, False]
    assert (truth.missing, truth.wrong, truth.such) == (2, 1, "inf")
    truth = find_truth(pa.chunked_array([["1.5", "n/k", None]]), (), "")
    assert truth.values.tolist() == [[1.5]]
    assert (truth.missing, truth.wrong, truth.such) == (1, 1, "n/k")


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.rename(columns={"x": "size"}),
        lambda frame: frame.rename(columns={"y": "z"}),
        lambda frame: frame.assign(x=frame["x"] * 2),
        lambda frame: frame.assign(y=frame["y"] * 2),
        lambda frame: frame.assign(c=frame["c"].map({"p": "q", "q": "r"})),
        lambda frame: frame.assign(c=frame["c"].map({"p": 1, "q": 2})),
    ],
)
@pytest.mark.parametrize("target", ["y", "c"])
def test_tables_whose_standardised_numbers_are_equal_have_different_digests(change, target):
    rng = np.random.default_rng(0)
    columns = {"x": rng.normal(size=90), "c": np.tile(["p", "q"], 45), "y": rng.normal(size=90)}

    def digest(frame):
        name = "z" if target == "y" and "z" in frame else target
        table = tables.make_table(
            pa.Table.from_pandas(frame), "t", name, None, None, None, np.arange(90)
        )
        return table.split(0).digest

    frame = pd.DataFrame(columns)
    assert digest(frame) == digest(frame.copy())
    assert digest(frame) != digest(change(frame))
