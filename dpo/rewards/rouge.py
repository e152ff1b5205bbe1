"""Overlap of words with an answer that people gave."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

from dpo.errors import RewardError
from dpo.rewards.base import Answer, Reward

Variant: TypeAlias = Literal["rouge1", "rouge2", "rougeL"]


@final
@dataclass(frozen=True, kw_only=True)
class Rouge(Reward):
    """How many words an answer has in common with the reference, from 0 (none) to 1 (the same words).

    F = 2 P R / (P + R), where P is the share of the answer's units found in the reference and R that of the
    reference's found in the answer. The units are words (rouge1), pairs of neighbouring words (rouge2), or the longest
    sequence of words that both have in the same order, gaps allowed (rougeL).

    Paper: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    Differs: words are lower-cased runs of a-z and 0-9, as in the common code, and not stemmed. Other scripts hold none.
    """

    variant: Variant = "rougeL"
    """Which units are counted."""

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"Rouge.variant must be one of {', '.join(get_args(Variant))}, got {self.variant!r}")

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the F-measure of each answer.

        Raises:
            RewardError: where an answer has no reference, or one without a word.
        """
        from rouge_score.rouge_scorer import RougeScorer  # here, not at the top: it takes seconds to load

        scorer = RougeScorer([self.variant])
        return [scorer.score(_reference(one), one.completion)[self.variant].fmeasure for one in answers]


def _reference(answer: Answer) -> str:
    """Return the answer that people gave; without a word in it every completion would score 0."""
    if answer.reference is None or not re.search("[a-z0-9]", answer.reference.lower()):
        got = "none" if answer.reference is None else repr(answer.reference[:60])
        raise RewardError(
            f"{answer.source}: the reward Rouge compares with an answer that people gave to the prompt "
            f"{answer.prompt[:60]!r}: got {got}, expected text with words of a-z and 0-9. Sample only for prompts "
            "that have one, or take another reward."
        )
    return answer.reference
