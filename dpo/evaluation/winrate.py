"""Who is preferred to whom: win rates, the same at equal length, and strengths on one scale.

The verdicts between two entries are an array (seeds, prompts): 1 where the first is preferred, 0 where the second is,
1/2 for a tie, or the mean of several verdicts; NaN where one is missing. Exchanging the two turns v into 1 - v.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse.csgraph import connected_components

from dpo.estimates import Estimate, share
from dpo.evaluation.records import START
from dpo.evaluation.statistics import SeedNoise, over_seeds, pooled_seed_noise

FEWEST = 10
"""Prompts below which no regression is fitted."""

Pair = tuple[str, str]


def verdict_noise(verdicts: Mapping[Pair, np.ndarray]) -> SeedNoise | None:
    """Return the seed noise of one run's win rate, pooled over pairs, or None where no pair has two seeds.

    Both entries' seeds are in it. Pairs that share an entry share its noise: K entries, each against each, have
    K (K - 1) / 2 pairs but K - 1 times the degrees of freedom of one pair (exact where seeds act additively).
    Against the start only one side was trained, so pool those pairs by themselves.

    Args:
        verdicts: (seeds, prompts) by pair, row s of the s-th seed of both.

    Raises:
        ValueError: for pairs against the start beside others, or an array of another shape.
    """
    against_start = {START in pair for pair in verdicts}
    if len(against_start) > 1:
        raise ValueError(f"verdict_noise: got pairs with and without {START!r}, expected one of the two kinds")
    noise = pooled_seed_noise({" - ".join(pair): array for pair, array in verdicts.items()})
    if noise is None:
        return None
    names = {name for pair in verdicts for name in pair}
    degrees = noise.degrees * min(1.0, (len(names) - 1) / len(verdicts))
    return SeedNoise(noise.between, noise.within, degrees)


def win_rate(verdicts: np.ndarray, seed_noise: SeedNoise | None) -> Estimate:
    """Return the share of verdicts for the first, with its interval over prompts and seeds, within 0 to 1.

    Where all prompts agree nothing varies that could be resampled: the interval is then at least Wilson's.

    Args:
        verdicts: (seeds, prompts), see above.
        seed_noise: of one run's win rate, from `verdict_noise`; None: over prompts only.

    Raises:
        ValueError: for a verdict outside 0 to 1, an array of another shape, or no verdict.
    """
    _check(verdicts, "win_rate")
    return _within(over_seeds(verdicts, seed_noise))


def length_controlled(
    verdicts: np.ndarray, length_difference: np.ndarray, seed_noise: SeedNoise | None
) -> Estimate | None:
    """Return the win rate that answers of equal length would have, or None where it cannot be fitted.

    logit P(first preferred) = theta + phi tanh(d / sd(d)), read at d = 0: 1 / (1 + exp(-theta))

    d is first's length minus second's. Exchanging the two entries turns x into 1 - x. The interval is `over_seeds` of
    each verdict's influence on the result (the one-step bootstrap of a fitted model over prompts).

    Paper: Dubois et al. 2024, arXiv:2404.04475, section 3.
    Differs: one pair of entries is fitted at a time, without the term for a prompt's difficulty, which needs many
    models, and without a penalty. sd(d) is the root mean square about 0.

    Args:
        verdicts: (seeds, prompts), see above.
        length_difference: of the same shape, in tokens or characters; NaN where missing.
        seed_noise: of one run's win rate, from `verdict_noise`; None: over prompts only.

    Returns:
        None for fewer than FEWEST prompts, for verdicts that some difference in length tells apart without exception
        (perfect separation: there is no best phi), and for differences in length that are all the same.

    Raises:
        ValueError: for a verdict outside 0 to 1, or arrays of other shapes.
    """
    won, longer = _check(verdicts, "length_controlled"), np.asarray(length_difference, dtype=float)
    if won.shape != longer.shape:
        raise ValueError(
            f"length_controlled: got lengths of shape {longer.shape}, expected {won.shape} as the verdicts"
        )
    known = ~(np.isnan(won) | np.isnan(longer))
    y, d = won[known], longer[known]
    if known.any(axis=0).sum() < FEWEST or np.ptp(d) == 0 or _separated(y, d):
        return None
    x = np.column_stack([np.ones(d.size), np.tanh(d / np.sqrt((d**2).mean()))])
    (theta, _), influence = _logistic(y, x)
    rate = 1 / (1 + np.exp(-theta))
    values = np.full(won.shape, np.nan)
    values[known] = rate + rate * (1 - rate) * influence[:, 0]
    return _within(over_seeds(values, seed_noise))


def preference_from_scores(first: Sequence[float], second: Sequence[float]) -> float:
    """Return how often a sample of the first scores higher than one of the second to the same prompt, 0 to 1.

    Over all cross pairs of samples, an exact tie counting 1/2 (Mann and Whitney's U over the number of pairs): a better
    estimate than one pair at a time, from the same samples. NaN where either has no sample, or one without a score.
    """
    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if not one.size or not other.size or np.isnan(one).any() or np.isnan(other).any():
        return float("nan")
    higher = np.greater.outer(one, other) + 0.5 * np.equal.outer(one, other)
    return float(higher.mean())


def bradley_terry(verdicts: Mapping[Pair, np.ndarray]) -> dict[str, Estimate] | None:
    """Return every entry's strength relative to the start's, which is 0, strongest first: one scale for a ranking.

    logit P(i preferred to j) = strength_i - strength_j, in nats: +1.1 is a win rate of 3/4 against the start.

    By logistic regression over all verdicts together, so it does not hang on their order, as running ratings do. The
    intervals, over prompts and seeds, are `over_seeds` of each verdict's influence on the strength.

    Paper: Bradley and Terry 1952.

    Args:
        verdicts: (seeds, prompts) by pair of names; the start under its name START. The same prompts in every pair.

    Returns:
        None where no finite strengths exist: some entries won, or lost, without exception against all the others
        (Ford 1957), or were never compared with them.

    Raises:
        ValueError: without the start, or for a verdict outside 0 to 1.
    """
    names = sorted({name for pair in verdicts for name in pair} - {START})
    if not any(START in pair for pair in verdicts):
        raise ValueError(f"bradley_terry: got pairs of {names}, expected some against {START!r}")
    tables = [_check(array, "bradley_terry") for array in verdicts.values()]
    column = {name: i for i, name in enumerate([*names, START])}
    beaten = np.zeros((len(column), len(column)))
    rows = []
    for (first, second), table in zip(verdicts, tables, strict=True):
        i, j = column[first], column[second]
        beaten[i, j] += np.nansum(table)
        beaten[j, i] += np.nansum(1 - table)
        rows.append(np.eye(len(column))[i] - np.eye(len(column))[j])
    if connected_components(beaten > 0, connection="strong")[0] > 1:
        return None
    known = [~np.isnan(table) for table in tables]
    y = np.concatenate([table[k] for table, k in zip(tables, known, strict=True)])
    x = np.concatenate([np.tile(row[:-1], (k.sum(), 1)) for row, k in zip(rows, known, strict=True)])
    strengths, influence = _logistic(y, x)
    # A prompt's influence in a run is the sum of its verdicts' in all pairs.
    shape = max(table.shape[0] for table in tables), tables[0].shape[1]
    spread = np.zeros((*shape, len(names)))
    cells = np.concatenate([np.argwhere(k) for k in known])
    np.add.at(spread, tuple(cells.T), influence / len(y) * shape[0] * shape[1])
    values = {name: strengths[i] + spread[:, :, i] for i, name in enumerate(names)}
    noise = pooled_seed_noise(values)
    found = {name: over_seeds(array, noise) for name, array in values.items()}
    found[START] = Estimate(0.0, 0.0, 0.0, shape[1])
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def _logistic(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit logit E[y] = x b; return b and each row's influence on it, (rows, columns), of mean 0.

    influence = (x' W x / n)^-1 x (y - E[y]), the first-order change of b for a row counted more (Hampel 1974).
    """
    from statsmodels.genmod.families import Binomial  # here, not at the top: they take seconds to load
    from statsmodels.genmod.generalized_linear_model import GLM

    fitted = GLM(y, x, family=Binomial()).fit(tol=1e-12)
    p = fitted.fittedvalues
    information = (x * (p * (1 - p))[:, None]).T @ x / len(y)
    return fitted.params, np.linalg.solve(information, (x * (y - p)[:, None]).T).T


def _separated(y: np.ndarray, d: np.ndarray) -> bool:
    """Say whether a threshold on d tells wins from losses, or there are only one of them (Albert and Anderson 1984)."""
    wins, losses = d[y > 0], d[y < 1]  # a tie is half of each
    return not wins.size or not losses.size or losses.max() <= wins.min() or wins.max() <= losses.min()


def _within(rate: Estimate) -> Estimate:
    """Keep an interval of a share inside 0 to 1, and no shorter than can be known where all prompts agree."""
    low, high = max(0.0, rate.low), min(1.0, rate.high)
    if rate.value in (0.0, 1.0):
        wilson = share(rate.value * rate.n, rate.n)
        low, high = min(low, wilson.low), max(high, wilson.high)
    return Estimate(rate.value, low, high, rate.n)


def _check(verdicts: np.ndarray, place: str) -> np.ndarray:
    table = np.asarray(verdicts, dtype=float)
    if table.ndim != 2 or (table < 0).any() or (table > 1).any():
        raise ValueError(f"{place}: got verdicts of shape {table.shape}, expected (seeds, prompts) from 0 to 1 or NaN")
    return table
