"""Differences between trained models, with the noise of prompts and of training seeds in their intervals.

The values of one measure and one entry are an array (seeds, prompts), NaN where one is missing. All entries have the
same prompts in the same order. Two things make a mean of them uncertain: it would differ on other prompts, of which
there are many, the same for all entries; and it would differ after training with other seeds, of which there are few.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy import stats

from dpo.estimates import LEVEL, Estimate

DRAWS = 10_000
"""Of the error of a mean. The smallest p is 2 / (DRAWS + 1): below 0.05 after a correction for 200 tests."""
_BLOCK = 2_000_000  # values resampled at a time: bounds the memory


@final
@dataclass(frozen=True)
class SeedNoise:
    """How far runs that differ in the seed alone lie apart, in the measure's unit squared."""

    between: float
    """Variance of such runs' means. The sampling of their answers makes a part of it."""
    within: float
    """That part, estimated from the spread within the runs."""
    degrees: float
    """Degrees of freedom of `between`: runs minus entries, where each entry has its own mean."""

    @property
    def variance(self) -> float:
        """The variance that training itself adds to a run's mean, 0 where sampling explains all."""
        return max(0.0, self.between - self.within)


def pooled_seed_noise(values: Mapping[str, np.ndarray]) -> SeedNoise | None:
    """Return the seed noise of one run, pooled over entries, or None where no entry has two seeds.

    The two mean squares of prompts crossed with seeds, each pooled over entries by its degrees of freedom. Assumes that
    training is equally noisy for all entries: with two or three seeds each, one entry's own estimate would be worth
    little. Leave out the start, which no training seed has touched.

    Args:
        values: (seeds, prompts) by entry; prompts that a run lacks are left out for that entry.

    Raises:
        ValueError: for an array of another shape, or with an infinite value.
    """
    between = within = degrees = 0.0
    for name, array in values.items():
        data = _table(array, name)
        data = data[~np.isnan(data).all(axis=1)]
        data = data[:, ~np.isnan(data).any(axis=0)]
        runs, prompts = data.shape
        if runs < 2 or prompts < 1:
            continue
        means = data.mean(axis=1, keepdims=True)
        residuals = data - means - data.mean(axis=0) + data.mean()
        between += float(((means - means.mean()) ** 2).sum())
        if prompts > 1:
            within += float((residuals**2).sum()) / (prompts - 1) / prompts
        degrees += runs - 1
    return SeedNoise(between / degrees, within / degrees, degrees) if degrees else None


def over_seeds(values: np.ndarray, seed_noise: SeedNoise | None, seed: int = 0) -> Estimate:
    """Return the mean over seeds and prompts, with its interval over prompts and seeds.

    The interval is that of `difference`, for one entry. Where `seed_noise` is None it is over prompts only, and speaks
    of these trained models alone; for a single prompt it is over seeds only.

    Args:
        values: (seeds, prompts), NaN where missing.
        seed_noise: of one run, from `pooled_seed_noise`; None for the start or where every entry has one seed.
        seed: of the resampling.

    Raises:
        ValueError: for an array of another shape, with an infinite value, or without any value.
    """
    prompts, runs = _prompt_means(values, "values")
    prompts = prompts[~np.isnan(prompts)]
    if not prompts.size:
        raise ValueError("over_seeds: got no values, expected at least one")
    estimate, _ = _estimate(prompts, seed_noise, 1 / runs, seed)
    return estimate


def difference(
    first: np.ndarray,
    second: np.ndarray,
    seed_noise: SeedNoise | None,
    *,
    against_start: bool = False,
    seed: int = 0,
) -> tuple[Estimate, float]:
    """Return the mean of first minus second with its interval over prompts and seeds, and the two-sided p.

    error = sqrt(P / chi2_{P-1}) (m* - m) + sqrt(c (1/S_1 + 1/S_2)) z

    m is the mean of the P prompts' differences, each averaged over seeds first, and m* its paired bootstrap over
    prompts; chi2_{P-1} is for the spread being itself estimated, which makes the first term Student's t for normal
    values. z is standard normal, and c = max(0, between * degrees / chi2_degrees - within) draws the seeds' variance
    from its fiducial distribution: few seeds leave it uncertain, and fixing it at an estimate, 0 included, makes
    intervals too short just when the estimate happens to be low. The interval holds the middle LEVEL of value + error;
    p counts the draws of it on the other side of 0.

    Assumes that the seeds of different entries act independently; where the same seed helps or hurts both, the interval
    is too wide, never too short. Without `seed_noise` it covers the models at hand, not other runs of their objectives.

    Source: Efron 1979 (bootstrap); Weerahandi 1993 (generalised confidence intervals), whose fiducial quantities for
    variance components this is.

    Args:
        first: (seeds, prompts), NaN where missing.
        second: the same prompts, any number of seeds.
        seed_noise: of one run, from `pooled_seed_noise` over all entries.
        against_start: second is the model before training: no seed noise of its own.
        seed: of the resampling; with the same one, all differences are taken over the same resamples of prompts.

    Raises:
        ValueError: for arrays of other shapes, with an infinite value, or without a prompt in common.
    """
    one, first_runs = _prompt_means(first, "first")
    other, second_runs = _prompt_means(second, "second")
    if one.shape != other.shape:
        raise ValueError(f"difference: got {one.size} and {other.size} prompts, expected the same prompts")
    prompts = one - other
    prompts = prompts[~np.isnan(prompts)]
    if not prompts.size:
        raise ValueError("difference: got no prompt that both have a value for, expected at least one")
    runs = 1 / first_runs + (0 if against_start else 1 / second_runs)
    estimate, draws = _estimate(prompts, seed_noise, runs, seed)
    beyond = min((draws <= 0).sum(), (draws >= 0).sum())
    least = 2.0 ** (1 - prompts.size)  # of a test by signs: so few prompts cannot say more, however much they agree
    return estimate, min(1.0, max(least, float(2 * (1 + beyond) / (1 + DRAWS))))


def corrected(ps: Sequence[float]) -> list[float]:
    """Return the p values corrected for their number, so that any false find among them has the stated probability.

    Paper: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    from statsmodels.stats.multitest import multipletests  # here, not at the top: it takes seconds to load

    return np.asarray(multipletests(ps, method="holm")[1]).tolist() if len(ps) else []


def _estimate(prompts: np.ndarray, seed_noise: SeedNoise | None, runs: float, seed: int) -> tuple[Estimate, np.ndarray]:
    """Return the prompts' mean with its interval, and the draws it is read from; `runs` multiplies the seeds' noise."""
    rng = np.random.default_rng(seed)
    value, n = float(prompts.mean()), prompts.size
    draws = np.full(DRAWS, value)
    if n > 1:
        resampled = stats.bootstrap(
            (prompts,), np.mean, n_resamples=DRAWS, method="percentile", batch=max(1, _BLOCK // n), rng=rng
        ).bootstrap_distribution
        draws += (resampled - value) * np.sqrt(n / rng.chisquare(n - 1, DRAWS))
    if seed_noise is not None:
        between = seed_noise.between * seed_noise.degrees / rng.chisquare(seed_noise.degrees, DRAWS)
        draws += np.sqrt(np.maximum(0, between - seed_noise.within) * runs) * rng.standard_normal(DRAWS)
    low, high = np.quantile(draws, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), n), draws


def _prompt_means(values: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    """Return each prompt's mean over the seeds that have it, NaN where none has; and the number of runs with values."""
    data = _table(values, name)
    known = ~np.isnan(data)
    count = known.sum(axis=0)
    sums = np.where(known, data, 0).sum(axis=0)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan), int(known.any(axis=1).sum())


def _table(values: np.ndarray, name: str) -> np.ndarray:
    data = np.asarray(values, dtype=float)
    if data.ndim != 2 or np.isinf(data).any():
        raise ValueError(
            f"{name}: got an array of shape {data.shape}, expected (seeds, prompts) of finite numbers or NaN"
        )
    return data
