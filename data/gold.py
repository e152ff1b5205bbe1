"""Gold rewards: functions that know how good a completion truly is, so that over-optimisation can be seen.

A gold reward is called as `gold(prompt, completion)` and returns a float, higher is better. It stands in for the
people whose preferences a run never sees in full: it labels the training pairs and judges the trained model.
"""

import re
from functools import cache
from typing import Any, Final

MINIMUM_SENTIMENT: Final = -1.0
"""The worst score, and the score of a completion that is no answer."""

FEWEST_WORDS: Final = 3
"""A completion with fewer distinct words is no answer."""

_WORD: Final = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def sentiment(prompt: str, completion: str) -> float:  # noqa: ARG001  (every gold reward is called the same way)
    """Return how positive a completion is, from -1 (negative) to 1 (positive).

    The score is the `compound` value of the VADER lexicon (Hutto and Gilbert 2014), made harder to cheat by three
    rules. Only words count: capitals, exclamation marks and emoticons add nothing. A word that carries sentiment
    counts once, however often it is repeated. A completion with fewer than `FEWEST_WORDS` distinct words scores
    `MINIMUM_SENTIMENT`, so that silence is never better than an answer.

    The score can still be cheated by naming many different good things: a lexicon does not read.

    Args:
        prompt: What was asked; the score does not depend on it.
        completion: The text to judge, without special tokens.
    """
    words = [word.replace("’", "'") for word in _WORD.findall(completion.lower())]
    if len(set(words)) < FEWEST_WORDS:
        return MINIMUM_SENTIMENT
    analyser = _analyser()
    seen: set[str] = set()
    kept: list[str] = []
    for word in words:
        if word in seen:
            continue
        if word in analyser.lexicon:  # words outside the lexicon stay: "not" must reach each word it negates
            seen.add(word)
        kept.append(word)
    return float(analyser.polarity_scores(" ".join(kept))["compound"])


@cache
def _analyser() -> Any:
    """Load the lexicon once (15 ms); here, not at the top, so that importing `dpo.data` does not load it."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
