"""Numbers with their intervals. Every number that a sample stands behind carries one."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Confidence of every interval."""


@final
@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Independent units (prompts, pairs) behind it."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2


def mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of independent values with its BCa bootstrap interval (Efron 1987).

    Raises:
        ValueError: for no values.
    """
    data = np.asarray(values, dtype=float)
    if data.size == 0:
        raise ValueError("mean: got no values, expected at least one")
    value = float(data.mean())
    if data.size == 1 or np.ptp(data) < 1e-12:
        return Estimate(value, value, value, data.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (data,), np.mean, n_resamples=4000, confidence_level=LEVEL, method="BCa", rng=np.random.default_rng(seed)
        )
    low, high = result.confidence_interval
    if not (np.isfinite(low) and np.isfinite(high)):  # BCa's acceleration is undefined on some tiny samples
        error = float(stats.t.ppf(0.5 + LEVEL / 2, data.size - 1) * data.std(ddof=1) / np.sqrt(data.size))
        low, high = value - error, value + error
    return Estimate(value, float(low), float(high), data.size)


def share(hits: float, n: int) -> Estimate:
    """Return a share with its Wilson interval; a tie counts as half a hit.

    Raises:
        ValueError: for n < 1, or hits outside 0 to n.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"share: got {hits} hits of {n}, expected 0 <= hits <= n and n >= 1")
    z = float(stats.norm.ppf(0.5 + LEVEL / 2))
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * float(np.sqrt(hits * (n - hits) / n + z * z / 4))
    return Estimate(hits / n, max(0.0, centre - half), min(1.0, centre + half), n)


def auc(value: float, positive: int, negative: int) -> Estimate:
    """Return an area under the curve with the interval of Hanley and McNeil 1982 (doi:10.1148/radiology.143.1.7063747).

    Args:
        value: the chance that a positive case is above a negative one, a tie counting half.
        positive: how many there are (>= 1).
        negative: likewise.
    """
    below, above = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (positive - 1) * (below - value**2) + (negative - 1) * (above - value**2)
    half = float(stats.norm.ppf(0.5 + LEVEL / 2)) * (max(variance, 0.0) / (positive * negative)) ** 0.5
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), positive + negative)
