"""Bounds of a median, the A/A band, verdicts, and the tolerance on losses."""

import math

import numpy as np
import pytest

from bench import stats
from bench.measure import agree
from bench.tables import duration, mebibytes, number


@pytest.mark.parametrize("count", range(6, 60))
def test_the_bound_leaves_at_least_95_percent_and_is_the_narrowest(count):
    def outside(k):  # probability that the median lies beyond the values at k from either end
        return 2 * sum(math.comb(count, i) for i in range(k + 1)) / 2**count

    assert outside(stats.order(count)) <= 0.05 < outside(stats.order(count) + 1)


@pytest.mark.parametrize("count", range(1, 6))
def test_few_values_are_bounded_by_the_extremes(count):
    assert stats.bounded(range(count))[1:] == (0, count - 1)


def test_the_bound_holds_the_median_as_often_as_it_says():
    draws = np.random.default_rng(0).exponential(size=(2000, 11))
    held = [low <= math.log(2) <= high for _, low, high in map(stats.bounded, draws.tolist())]
    assert 0.97 < np.mean(held) < 1  # 98.8% for eleven values


def test_ratios_are_taken_pair_by_pair():
    assert stats.paired([2.0, 30.0, 400.0], [1.0, 10.0, 100.0]) == (3.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ((1.5, 1.2, 1.6), "faster"),
        ((0.5, 0.4, 0.8), "slower"),
        ((1.5, 1.05, 1.6), "even"),
        ((0.8, 0.7, 0.95), "even"),
    ],
)
def test_nothing_that_touches_the_band_is_a_difference(ratio, said):
    width = stats.band(stats.Median(1.01, 0.98, 1.1))
    assert width == pytest.approx(math.log(1.1))
    assert stats.verdict(stats.Median(*ratio), width) == said


def test_losses_agree_up_to_rounding_and_a_share_of_what_training_changed():
    ours = [2.0, 1.9, 1.8]
    assert agree([2.00001, 1.9005, 1.8005], ours, "float32") == ""
    assert "step 3" in agree([2.0, 1.9, 1.81], ours, "float32")
    assert "step 1" in agree([2.1, 1.9, 1.8], ours, "float32")
    assert "step 2" in agree([2.0, float("nan"), 1.8], ours, "float32")


def test_a_peer_whose_rate_is_a_tenth_off_disagrees():
    ours = [3.0 - 0.05 * t for t in range(10)]
    assert agree([3.0 - 0.055 * t for t in range(10)], ours, "float32")


def test_figures_are_written_with_units():
    assert [duration(s) for s in (2.5, 0.0123, 4.56e-6)] == ["2.5 s", "12.3 ms", "4.56 us"]
    assert [number(n) for n in (12, 1234, 5.6e6)] == ["12", "1.23k", "5.6M"]
    assert mebibytes(3 << 20) == "3.0 MiB"
    assert mebibytes(None) == "-"
