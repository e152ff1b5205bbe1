"""Lengths and shares of many records, summed up without keeping the records."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Confidence of every interval."""


@final
@dataclass(frozen=True)
class Share:
    """A share of `n` cases and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Independent cases behind it."""

    @classmethod
    def of(cls, value: float, n: int) -> "Share":
        """Return a share with its Wilson interval.

        Args:
            value: the share, 0 to 1.
            n: independent cases (>= 1).
        """
        interval = stats.binomtest(round(value * n), n).proportion_ci(LEVEL, method="wilson")
        return cls(value, min(value, float(interval.low)), max(value, float(interval.high)), n)


@final
@dataclass(frozen=True)
class Bin:
    """Lengths from `low` to `high`, both counted in."""

    low: int
    high: int
    count: int


@final
@dataclass(frozen=True)
class Lengths:
    """How long texts are: quantiles, and a histogram whose bins double in width."""

    n: int
    minimum: int
    p5: int
    p25: int
    median: int
    p75: int
    p95: int
    p99: int
    maximum: int
    bins: tuple[Bin, ...]
    """0, 1, 2-3, 4-7, ...: from the shortest length to the longest."""

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        """Sum up at least one length.

        Args:
            lengths: none below 0; any unit.
        """
        values = np.asarray(lengths)
        # A quantile is a length that occurs: the smallest that so large a share of the texts does not exceed.
        found = np.quantile(values, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1), method="inverted_cdf")
        minimum, p5, p25, median, p75, p95, p99, maximum = (int(one) for one in found)
        widths = np.frexp(values.astype(np.float64))[1]  # 0 for 0, else the number of binary digits
        counts = np.bincount(widths)
        bins = tuple(
            Bin(1 << (digits - 1) if digits else 0, (1 << digits) - 1, int(count))
            for digits, count in enumerate(counts)
            if digits >= widths.min()
        )
        return cls(len(values), minimum, p5, p25, median, p75, p95, p99, maximum, bins)


def separation(positive: Sequence[int], negative: Sequence[int]) -> Share | None:
    """Return the chance that a value of `positive` is above one of `negative`, a tie counting half (AUC).

    Its interval is that of Hanley and McNeil 1982 (doi:10.1148/radiology.143.1.7063747). None where a side is empty.
    """
    first, second = len(positive), len(negative)
    if not first or not second:
        return None
    area = float(stats.mannwhitneyu(positive, negative, method="asymptotic").statistic) / (first * second)
    both_below, both_above = area / (2 - area), 2 * area * area / (1 + area)
    spread = area * (1 - area) + (first - 1) * (both_below - area * area) + (second - 1) * (both_above - area * area)
    half = float(stats.norm.ppf(0.5 + LEVEL / 2)) * math.sqrt(max(spread, 0.0) / (first * second))
    return Share(area, max(0.0, area - half), min(1.0, area + half), first + second)
