"""The names of values: the same from each type and spelling of the same value."""

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpcore.tables import labels


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["3", "3.0", "3.00", "+3", " 3 ", "3.", "0x3", "3e0", "30E-1"], "3"),
        (["0", "-0", "-0.0", "0.00", "0e5", ".0"], "0"),
        (["-1.50", "-1.5", "-15e-1"], "-1.5"),
        (["1e20", "1E+20", "100000000000000000000"], "100000000000000000000"),
        (["1e300", "10e299", "1" + "0" * 300], "1e+300"),
        (["12.5e299", "1.25e300"], "1.25e+300"),
        (["1e-3", "0.001", ".0010"], "0.001"),
        (["-2.5e-77"], "-2.5e-77"),
        (["9007199254740993"], "9007199254740993"),  # 2^53 + 1
        (["True", "true"], "1"),
        (["1,000"], "1,000"),
        (["1_0"], "1_0"),
    ],
)
def test_a_number_has_one_name(texts, name):
    assert {labels.name_of(text, "number") for text in texts} == {name}


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_a_name_is_the_number_and_its_own_name(value):
    name = labels.name_of(str(value), "number", "number")
    assert Decimal(name) == value
    assert labels.name_of(name, "number") == name


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_keeps_its_value_and_has_the_name_of_an_integer_where_it_is_one(value):
    name = labels.name_of(str(value), "number", "number")
    assert float(name) == value
    if value.is_integer() and abs(value) < 2**53:
        assert name == str(int(value))


@pytest.mark.parametrize(
    ("text", "kind", "source", "name"),
    [
        ("true", "boolean", "boolean", "True"),
        ("FALSE", "boolean", "text", "False"),
        ("1.0", "boolean", "number", "True"),
        ("0", "boolean", "text", "False"),
        ("maybe", "boolean", "text", "maybe"),
        ("true", "number", "boolean", "1"),
        ("true", "text", "text", "true"),
        ("01", "text", "text", "01"),
        (" a b ", "text", "text", "a b"),
        ("3.0", "text", "number", "3"),
        ("3.0", "text", "text", "3.0"),
        ("2024-05-01T00:00:00", "date", "text", "2024-05-01"),
        ("2024-05-01 00:00:00.000000", "date", "date", "2024-05-01"),
        ("2024-05-01T10:30", "date", "text", "2024-05-01 10:30:00"),
        ("2024-05-01 10:30:00.500000", "date", "date", "2024-05-01 10:30:00.5"),
        ("2024-05-01T10:30:00+02:00", "date", "text", "2024-05-01 08:30:00Z"),
        ("2024-05-01 08:30:00Z", "date", "date", "2024-05-01 08:30:00Z"),
        ("soon", "date", "text", "soon"),
    ],
)
def test_a_value_is_named_by_the_kind_of_its_column(text, kind, source, name):
    assert labels.name_of(text, kind, source) == name


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["1", "2", "10"], "number"),
        (["3.0", "10.0"], "number"),
        (["0.5", ".25", "1e-07", "0"], "number"),
        (["01", "2"], "text"),
        (["1.1", "1.10"], "text"),  # versions
        (["1.1", "1.10", "2"], "text"),
        (["-0.50", "-.5"], "text"),
        (["1.50", "2.5", "-1.5", "+2.5"], "number"),
        (["1", "1.0", "1.00", "+1", "10"], "number"),
        (["-0.0", "0.0", "0", "-0", "1.0"], "number"),
        (["1e-07", "1.0e-7", "0.0000001"], "number"),
        (["1E5", "2E7"], "text"),  # codes
        (["1e+20", "2"], "number"),
        (["00.5", "0.5"], "text"),
        (["-007", "7"], "text"),
        (["0x10", "0xE5", "7"], "number"),
        (["1", "A"], "text"),
        (["1,000", "2,000"], "text"),
        (["true", "FALSE "], "boolean"),
        (["true", "1"], "text"),
        (["2024-05-01", "2024-05-02T10:00"], "date"),
        (["2024-13-01"], "text"),
        (["a"], "text"),
        ([], "text"),
    ],
)
def test_the_kind_of_a_column_is_told_from_all_its_texts(texts, kind):
    assert labels.kind_of(texts) == kind


def test_names_are_in_the_order_of_their_values():
    assert labels.sort_names(["10", "9", "-2", "0.5"], "number") == ("-2", "0.5", "9", "10")
    assert labels.sort_names(["10", "9", "a"], "text") == ("10", "9", "a")


def test_arrays_have_the_names_of_their_values():
    for values in (
        [3, 10, 0],
        [3.0, 10.0, -0.0],
        ["3", "10", "0"],
        ["3.0", "10.0", "0.0"],
        [b"3", b"10", b"0"],
    ):
        array = np.array(values)
        assert labels.array_kind(array) == "number"
        assert labels.array_names(array, "number").tolist() == ["3", "10", "0"]
    assert labels.array_names(np.float32([0.1]), "number").tolist() == ["0.1"]
    assert labels.array_kind(np.array([True])) == "boolean"
    assert labels.array_names(np.array([True, False]), "boolean").tolist() == ["True", "False"]
    assert labels.array_names(np.array([" a", "a"]), "text").tolist() == ["a", "a"]


def test_a_whole_number_written_with_a_fraction_is_the_known_one_and_nothing_else_is():
    names = np.array(["3.0", "4", "5.5", "07.0", None, "8.0"], object)
    assert labels.matched(names, ["3", "4", "5", "7", "8.0", "8"]).tolist() == [
        "3",
        "4",
        "5.5",
        "07.0",
        None,
        "8.0",
    ]
