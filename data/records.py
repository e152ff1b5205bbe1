"""The record that every data set becomes, and the views through which objectives read it."""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations
from typing import Literal, final, get_args

Role = Literal["system", "user", "assistant", "tool"]


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    extra: str = ""
    """What else the turn tells a chat template, as a JSON object: the `tool_calls` of an assistant, `tool_call_id` and
    `name` of a tool. Empty where there is nothing."""

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"Message.role must be one of {', '.join(get_args(Role))}, got {self.role!r}")


Messages = tuple[Message, ...]


@final
@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, the better one first."""

    prompt: Messages
    chosen: str
    rejected: str
    preference: float
    """P(chosen preferred), 0.5 to 1."""
    scores: tuple[float, float]
    """Of chosen and rejected; the first is higher."""
    weight: float
    source: str


@final
@dataclass(frozen=True, slots=True)
class Judgement:
    """One completion, judged desirable or not."""

    prompt: Messages
    completion: str
    desirable: bool
    weight: float
    source: str


@final
@dataclass(frozen=True, slots=True)
class Demonstration:
    """One completion worth imitating."""

    prompt: Messages
    completion: str
    weight: float
    source: str


@final
@dataclass(frozen=True, slots=True)
class Ranking:
    """K completions of one prompt, best first, with their scores (not increasing)."""

    prompt: Messages
    completions: tuple[str, ...]
    scores: tuple[float, ...]
    weight: float
    source: str


@final
@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to sample completions for."""

    messages: Messages
    source: str


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """A prompt, K >= 0 completions and what is known about their order.

    Raises:
        ValueError: a field is outside its range; the message names the field.
    """

    prompt: Messages
    completions: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None
    """One per completion, higher is better; None where the completions were not compared. A single completion's
    score is its thumb: above 0 desirable, else not."""
    agreement: float | None = None
    """Share of votes for the better completion, 0.5 to 1; None is a certain label."""
    weight: float = 1.0
    """Multiplies the loss of every example of this record (>= 0)."""
    group: str | None = None
    """Annotator or population."""
    feedback: tuple[str, ...] = ()
    """What people said of the completions in words. It is kept for those who can use it; no view holds it."""
    source: str
    """Where the record comes from, as `file:row`."""

    def __post_init__(self) -> None:
        if self.scores is not None:
            if len(self.scores) != len(self.completions):
                raise ValueError(
                    f"Preference.scores must hold one score per completion ({len(self.completions)}),"
                    f" got {len(self.scores)}"
                )
            if not all(map(math.isfinite, self.scores)):
                raise ValueError(f"Preference.scores must be finite, got {self.scores}")
        if self.agreement is not None and not 0.5 <= self.agreement <= 1:
            raise ValueError(f"Preference.agreement must be between 0.5 and 1, got {self.agreement}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"Preference.weight must be finite and >= 0, got {self.weight}")

    def pairs(self) -> tuple[Pair, ...]:
        """Return every pair whose scores differ; equal scores, and equal texts, never become a pair."""
        if self.scores is None:
            return ()
        certainty = 1.0 if self.agreement is None else self.agreement
        return tuple(
            Pair(self.prompt, better, worse, certainty, (high, low), self.weight, self.source)
            for (better, high), (worse, low) in permutations(zip(self.completions, self.scores, strict=True), 2)
            if high > low and better.strip() != worse.strip()
        )

    def judgements(self) -> tuple[Judgement, ...]:
        """Return each completion with its label.

        A single completion is desirable where its score is above 0. Of several, those above the record's mean score
        are desirable, those below are not, and those equal to it are not judged.
        """
        if self.scores is None:
            return ()
        if len(self.scores) == 1:
            return (Judgement(self.prompt, self.completions[0], self.scores[0] > 0, self.weight, self.source),)
        exact = [Fraction(score) for score in self.scores]  # a float mean of three equal scores can differ from them
        mean = sum(exact, Fraction(0)) / max(len(exact), 1)
        return tuple(
            Judgement(self.prompt, completion, score > mean, self.weight, self.source)
            for completion, score in zip(self.completions, exact, strict=True)
            if score != mean
        )

    def demonstrations(self) -> tuple[Demonstration, ...]:
        """Return the completions with the top score, or all of them where none is scored.

        A single completion with a score of 0 or less (a thumb down) is no demonstration.
        """
        worthy = self.completions
        if self.scores:
            top = max(self.scores)
            worthy = tuple(c for c, score in zip(self.completions, self.scores, strict=True) if score == top)
            if len(self.scores) == 1 and top <= 0:
                worthy = ()
        return tuple(Demonstration(self.prompt, c, self.weight, self.source) for c in worthy)

    def ranking(self) -> Ranking | None:
        """Return the completions best first, or None where there are fewer than two or no scores."""
        if self.scores is None or len(self.scores) < 2:
            return None
        scores = self.scores
        order = sorted(range(len(scores)), key=lambda k: -scores[k])
        return Ranking(
            self.prompt,
            tuple(self.completions[k] for k in order),
            tuple(scores[k] for k in order),
            self.weight,
            self.source,
        )

    def prompts(self) -> tuple[Prompt, ...]:
        """Return the prompt alone."""
        return (Prompt(self.prompt, self.source),)
