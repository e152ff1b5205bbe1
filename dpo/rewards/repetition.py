"""How much of a text repeats itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from dpo.rewards.base import Answer, Reward


def repetition(text: str) -> float:
    """Return the share of a text's word trigrams that repeat an earlier one, from 0 to below 1.

    Words are what white space separates, in lower case. A text of fewer than three words has no trigram and repeats
    nothing.
    """
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


@final
@dataclass(frozen=True, kw_only=True)
class RepetitionPenalty(Reward):
    """Takes off the share of word trigrams that repeat an earlier one: -repetition(completion), above -1 to 0."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return 0 for each answer that repeats nothing, less for one that does."""
        return [-repetition(one.completion) for one in answers]
