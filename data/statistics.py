"""Lengths of many records, summed up without keeping the records."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy import stats

from dpo.estimates import Estimate, auc


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


def separation(positive: Sequence[int], negative: Sequence[int]) -> Estimate | None:
    """Return the chance that a value of `positive` is above one of `negative`, a tie counting half (AUC).

    None where a side is empty.
    """
    if not positive or not negative:
        return None
    ranked = stats.mannwhitneyu(positive, negative, method="asymptotic")
    return auc(float(ranked.statistic) / (len(positive) * len(negative)), len(positive), len(negative))
