"""Several rewards as one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from dpo.rewards.base import Answer, Reward, checked


@final
@dataclass(frozen=True)
class Weighted:
    """One term of a weighted sum of rewards."""

    weight: float
    """What the term's numbers are multiplied by (finite); higher counts for more, below 0 turns good into bad."""
    reward: Reward


@final
@dataclass(frozen=True, kw_only=True)
class WeightedSum(Reward):
    """Judges by several rewards at once: Σ_k w_k r_k(answer).

    Rewards differ in scale, and a term counts by weight times spread: look at how much each varies before weighing.
    """

    terms: tuple[Weighted, ...]
    """The rewards and their weights, at least one."""

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("WeightedSum.terms must be one Weighted or more, got none: write terms=(Weighted(1, r),)")
        for place, term in enumerate(self.terms):
            if not math.isfinite(term.weight):
                raise ValueError(f"WeightedSum.terms[{place}].weight must be a finite number, got {term.weight!r}")

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the sum for each answer.

        Raises:
            RewardError: where one of the rewards fails; names that one.
        """
        told = [[term.weight * value for value in checked(term.reward, answers)] for term in self.terms]
        return [sum(values) for values in zip(*told, strict=True)]
