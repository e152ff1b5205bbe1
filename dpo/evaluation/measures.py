"""Measures of a reward model or a policy on held-out comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from dpo.estimates import Estimate, share

REMEDY = "Delete it and the summary.json beside it and start the run again: it is measured anew, not trained anew."
"""What to do about a damaged file of measurements."""


@final
@dataclass(frozen=True)
class Bin:
    """Comparisons that a reward model was about equally sure of."""

    predicted: float
    """Mean probability it gave to its own choice, 0.5 to 1."""
    observed: Estimate
    """Share in which the choice was the people's."""


def calibration(differences: Sequence[float], bins: int = 5) -> list[Bin]:
    """Say whether the probabilities of a Bradley-Terry model mean what they say.

    Args:
        differences: score of the completion people chose minus that of the other, one a comparison.
        bins: of equal numbers of comparisons, by how sure the model was.

    Returns:
        the bins, least sure first; a calibrated model has `predicted` within the interval of `observed` in each.
    """
    known = np.asarray(differences, dtype=float)
    order = np.argsort(np.abs(known), kind="stable")
    found = []
    for part in np.array_split(order, min(bins, len(order))):
        sure = 1 / (1 + np.exp(-np.abs(known[part])))
        hits = float((known[part] > 0).sum() + 0.5 * (known[part] == 0).sum())
        found.append(Bin(float(sure.mean()), share(hits, len(part))))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean |predicted - observed| over all comparisons (expected calibration error)."""
    total = sum(one.observed.n for one in bins)
    return sum(abs(one.predicted - one.observed.value) * one.observed.n for one in bins) / total


def by_agreement(differences: Sequence[float], agreement: Sequence[float]) -> dict[str, Estimate]:
    """Return the accuracy where people agreed so much, by their share of votes for the better completion.

    Where people are split, no model can agree with all of them: accuracy is to be read beside their agreement.
    """
    levels = sorted(set(agreement))
    edges = levels if len(levels) <= 5 else [0.5, 0.6, 0.7, 0.8, 0.9]
    found = {}
    for low, high in zip(edges, [*edges[1:], float("inf")], strict=True):
        part = [d for d, level in zip(differences, agreement, strict=True) if low <= level < high]
        if part:
            found[f"{low:g}"] = pair_accuracy(part, [0.0] * len(part))
    return found


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> Estimate:
    """Return the share of pairs whose chosen reward is the higher; a tie counts 1/2."""
    hits = sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True))
    return share(hits, len(chosen))
