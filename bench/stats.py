"""Medians of repeated measurements, their bounds, and significant differences.

The bound of a median is a pair of order statistics: with n values in order, the median lies between
the k-th smallest and the k-th largest except with probability 2 P(B < k), B ~ Binomial(n, 1/2),
whatever the distribution. k is the largest that leaves at least 95%. Below 6 values there is
no such pair: the smallest and the largest value are used, and no difference is reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

FEWEST = 6  # fewest values for a 95% bound


class Median(NamedTuple):
    """A median between its bounds."""

    median: float
    low: float
    high: float


def order(count: int) -> int:
    """Return the distance of a median's 95% bounds from the ends of `count` sorted values."""
    # tail = Σ_{i <= k} C(n, i), the outcomes with fewer than k + 1 values on one side
    k, tail = 0, 1.0
    while 2 * (tail + math.comb(count, k + 1)) <= 0.05 * 2**count:
        k += 1
        tail += math.comb(count, k)
    return k if 2 * tail <= 0.05 * 2**count else 0


def bounded(values: Sequence[float]) -> Median:
    """Return the median of `values` and its 95% bound."""
    ordered, k = sorted(values), order(len(values))
    return Median(median(ordered), ordered[k], ordered[-1 - k])


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> Median:
    """Return the median of the ratios of paired measurements."""
    return bounded([a / b for a, b in zip(numerator, denominator, strict=True)])


def band(same: Median) -> float:
    """Return the A/A band: the distance from 1 of a ratio of a thing to itself, with bounds."""
    return max(abs(math.log(value)) for value in same)


def verdict(ratio: Median, width: float) -> str:
    """Return the verdict on mlpcore: "faster", "slower", or "even" if ratio and band overlap."""
    if math.log(ratio.low) > width:
        return "faster"
    return "slower" if math.log(ratio.high) < -width else "even"
