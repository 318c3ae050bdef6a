"""The size of the code and the trip of the data: what is counted, and the command."""

import json

import pytest

from bench import house

TEXT = '''"""Module."""
# a comment

class A:
    """Class."""

    def f(self):  # another
        """Function."""
        return "no docstring"
'''


def test_tokens_are_those_of_code_alone():
    # class A : NEWLINE, def f ( self ) : NEWLINE, return "…" NEWLINE; NEWLINE behind each docstring
    assert house.code_tokens(TEXT) == 4 + 7 + 3 + 3


def test_the_longest_parts_are_named(tmp_path):
    (tmp_path / "a.py").write_text(TEXT)
    (tmp_path / "b.py").write_text("x = 1\n")
    found = house.size(tmp_path)
    assert found["longest file"] == {"name": "a.py", "lines": 9}
    assert found["longest class"] == {"name": "a.py: A", "lines": 6}
    assert found["longest function"] == {"name": "a.py: f", "lines": 3}
    assert (found["files"], found["lines"]) == (2, 10)
    assert found["share of lines above 100 columns"] == 0


def test_a_trip_counts_calls_of_our_own_functions():
    found = house.figures([("a.py", "f"), ("b/c.py", "g"), ("b/c.py", "g"), ("a.py", "f")])
    assert found == {
        "calls": 4, "functions": 2, "files": 2, "changes of file": 2, "rooms": {"a": 2, "b": 2},
    }  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--calls"], ["--json"]])
def test_the_command_prints_size_and_trips(options, capsys):
    house.main(options)
    text = capsys.readouterr().out
    assert ("training/steps.py: Steps.step\n" in text) == ("--calls" in options)
    if "--json" in options:
        result = json.loads(text)
        assert result["size"]["tokens"] > 10_000
        for trip in result["trips"].values():
            assert trip["calls"] == sum(trip["rooms"].values()) >= trip["functions"]
    else:
        assert "step(X, Y)" in text


def test_a_warm_step_takes_at_most_40_calls_in_8_files():
    """The promise of a short trip; `python bench/house.py --calls` lists where it goes."""
    found = house.figures(house.calls(house.trips()["step(X, Y)"]))
    assert found["calls"] <= 40
    assert found["files"] <= 8
