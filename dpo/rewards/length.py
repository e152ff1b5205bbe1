"""A price on length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from dpo.rewards.base import Answer, Reward


@final
@dataclass(frozen=True, kw_only=True)
class LengthPenalty(Reward):
    """Takes reward off for every token beyond a target: -per_token * max(0, tokens - target).

    Learned rewards tend to like long answers, and a policy trained on them grows its own. A shorter answer than the
    target is not rewarded, so that nothing is gained by silence.
    """

    target: int
    """Completion tokens that cost nothing (>= 0); lower is stricter."""
    per_token: float
    """Reward lost with each token beyond it (> 0); higher is stricter."""

    def __post_init__(self) -> None:
        if isinstance(self.target, bool) or not isinstance(self.target, int) or self.target < 0:
            raise ValueError(f"LengthPenalty.target must be a number of tokens >= 0, got {self.target!r}")
        if not 0 < self.per_token < math.inf:
            raise ValueError(f"LengthPenalty.per_token must be a finite number > 0, got {self.per_token!r}")

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return 0 for each answer within the target, less for a longer one."""
        return [-self.per_token * max(0, one.tokens - self.target) for one in answers]
