"""Medians of repeated measurements, what bounds them, and when a difference is one.

The bound of a median is a pair of order statistics: with n values in order, the median lies between
the k-th smallest and the k-th largest except with probability 2 P(B < k), B ~ Binomial(n, 1/2),
whatever the distribution. k is the largest that leaves at least 95%. Below 6 values no pair does;
then the smallest and the largest stand for it, and nothing is said of a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

FEWEST = 6  # values that a 95% bound needs


class Median(NamedTuple):
    """A median between its bounds."""

    median: float
    low: float
    high: float


def order(count: int) -> int:
    """How many values from either end the bound of a median of `count` values stands (0: at the
    ends).
    """
    k, tail = (
        0,
        1.0,
    )  # tail = Σ_{i <= k} C(n, i), the outcomes with fewer than k + 1 values on one side
    while 2 * (tail + math.comb(count, k + 1)) <= 0.05 * 2**count:
        k += 1
        tail += math.comb(count, k)
    return k if 2 * tail <= 0.05 * 2**count else 0


def bounded(values: Sequence[float]) -> Median:
    """The median of `values` and its 95% bound."""
    ordered, k = sorted(values), order(len(values))
    return Median(median(ordered), ordered[k], ordered[-1 - k])


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> Median:
    """The median of the ratios of measurements that were taken side by side."""
    return bounded([a / b for a, b in zip(numerator, denominator, strict=True)])


def band(same: Median) -> float:
    """The A/A band: how far from 1 the ratio of a thing to itself was found, bounds included."""
    return max(abs(math.log(value)) for value in same)


def verdict(ratio: Median, width: float) -> str:
    """What `time / time of mlpcore` says about mlpcore: "faster", "slower", or "even" where the
    bound touches the A/A band.
    """
    if math.log(ratio.low) > width:
        return "faster"
    return "slower" if math.log(ratio.high) < -width else "even"
