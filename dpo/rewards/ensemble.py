"""Several reward models as one that is harder to exploit."""

from collections.abc import Sequence
from statistics import fmean, pstdev, pvariance
from typing import Literal, NamedTuple, TypeAlias, get_args

Combination: TypeAlias = Literal["mean", "min", "mean_minus_variance"]


class Combined(NamedTuple):
    """What an ensemble says of each answer."""

    scores: list[float]
    """Higher is better."""
    disagreement: list[float]
    """Standard deviation between the members, in units of reward; 0 where they agree, and for a single member."""


def combined(scores: Sequence[Sequence[float]], how: Combination = "mean", variance_weight: float = 0.0) -> Combined:
    """Combine what the members of an ensemble say, answer by answer.

    With the scores r_1 .. r_k of one answer: mean = (1/k) Σ_i r_i; min = min_i r_i, which trusts the most critical
    member (worst-case optimisation); mean_minus_variance = mean - λ (1/k) Σ_i (r_i - mean)^2, which distrusts what the
    members disagree about (uncertainty-weighted optimisation). Variance and deviation are those of the population,
    divided by k.

    Paper: arXiv:2310.02743, section 3.

    Args:
        scores: [member][answer], at least one member.
        how: How to combine them.
        variance_weight: λ (>= 0), reward lost per unit of variance; only mean_minus_variance reads it.

    Raises:
        ValueError: no member, members that scored different numbers of answers, an unknown way, or a λ below 0.
    """
    if how not in get_args(Combination):
        raise ValueError(f"combined: how must be one of {', '.join(get_args(Combination))}, got {how!r}")
    if not variance_weight >= 0:
        raise ValueError(f"combined: variance_weight must be >= 0, got {variance_weight!r}")
    if not scores or len({len(member) for member in scores}) > 1:
        counts = [len(member) for member in scores]
        raise ValueError(f"combined: each of one member or more must score every answer, got {counts} scores")
    answers = list(zip(*scores, strict=True))
    disagreement = [pstdev(one) for one in answers]
    if how == "min":
        return Combined([min(one) for one in answers], disagreement)
    means = [fmean(one) for one in answers]
    if how == "mean":
        return Combined(means, disagreement)
    spread = [pvariance(one) for one in answers]
    return Combined([mean - variance_weight * one for mean, one in zip(means, spread, strict=True)], disagreement)
