"""A fuzz of the public door: what is refused is refused by name, in time, and leaves everything as
it was.
"""

import pytest

import mlpcore as mc
from tests.reliability.fuzz import Fuzz

CALLS = 1500


def run(folder, seed, calls):
    """So many random calls; what was wrong with them."""
    fuzz = Fuzz(folder, seed)
    fuzz.run(calls)
    assert fuzz.refused > 0.8 * calls
    assert fuzz.worked > 0.02 * calls
    return "\n".join(f"{fault}\n{how}" for fault, how in fuzz.faults.items())


@pytest.mark.slow
def test_random_calls_work_or_are_refused_by_the_arguments_name_and_change_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert not run(tmp_path, 0, CALLS)


@pytest.mark.parametrize("fault", ["another error", "no name", "changed"])
def test_the_fuzz_notices_each_kind_of_fault(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict = mc.MLP.predict

    def broken(self, X, chunk_rows=None):
        if fault == "changed":
            self.parameters[0] += 1
        try:
            return predict(self, X, chunk_rows)
        except (TypeError, ValueError):
            if fault == "changed":
                raise
            raise {"another error": IndexError, "no name": ValueError}[fault](
                "tuple index out of range"
            ) from None

    monkeypatch.setattr(mc.MLP, "predict", broken)
    fuzz = Fuzz(tmp_path, 0)
    fuzz.doors = {"predict": fuzz.doors["predict"]}
    fuzz.run(20)
    said = {
        "another error": "of another kind",
        "no name": "no argument is named",
        "changed": "changed the trainer",
    }[fault]
    assert any(said in found for found in fuzz.faults)
