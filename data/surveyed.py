"""The records of a survey."""

from dataclasses import dataclass
from typing import final

from dpo.data.report import Report
from dpo.data.statistics import Lengths
from dpo.data.tokens import TokenSurvey
from dpo.estimates import Estimate

Twins = tuple[tuple[str, str], ...]
"""Sources of two records each, the first few."""


@final
@dataclass(frozen=True)
class Names:
    """How many records have which name (a group, a file)."""

    different: int
    largest: tuple[tuple[str, int], ...]
    """The most frequent names with their records, at most 20."""


@final
@dataclass(frozen=True)
class Repeats:
    """Prompts that stand in the data more than once. Each count is of further records; the first is not in it."""

    prompts: int
    """Different prompts, case and white space aside."""
    repeated: int
    """Records with the prompt of an earlier one, case and white space aside."""
    near: int
    """Records whose prompt equals an earlier one but for punctuation (and case and white space)."""
    similar: int
    """Records whose prompt has about 80 % of its word pairs in common with an earlier one; at least so many."""
    examples: Twins
    """Of near and similar ones."""


@final
@dataclass(frozen=True)
class Leaks:
    """Evaluation records whose prompt is known from training."""

    records: int
    """Evaluation records looked up."""
    repeated: int
    """The prompt is in training, case and white space aside. `check` leaves none."""
    near: int
    """The prompt is in training but for punctuation."""
    similar: int
    """A prompt of training has about 80 % of its word pairs; at least so many."""
    examples: Twins
    """(training, evaluation)."""


@final
@dataclass(frozen=True)
class Pairs:
    """What the pairs are like. Intervals count a record as one case, however many pairs it holds."""

    n: int
    restated: int
    """Pairs that an earlier record states as well: same prompt, same better and worse completion."""
    contradictions: int
    """Pairs that are stated both ways round."""
    examples: Twins
    """Records that contradict each other."""
    longer_wins: Estimate | None
    """Of the pairs whose completions differ in their number of words: the better one is the longer."""
    equal_length: float
    """Share of the pairs whose completions have the same number of words."""
    by_length: Estimate
    """Share of the pairs that the better of two rules, "the longer wins" and "the shorter wins", gets right."""
    longer: bool
    """True where the better rule is "the longer wins"."""


@final
@dataclass(frozen=True)
class Thumbs:
    """What the records with a single, scored completion are like."""

    desirable: Estimate
    by_length: Estimate | None
    """The chance that a desirable completion has more words than an undesirable one (AUC); 0.5: length tells
    nothing. None where a label is absent."""


@final
@dataclass(frozen=True)
class Votes:
    """Labels that come with a share of votes."""

    n: int
    mean: float
    soft: int
    """Records whose agreement is below 1."""
    undecided: int
    """Records whose agreement is 0.5."""


@final
@dataclass(frozen=True)
class Side:
    """The training or the evaluation records."""

    records: int
    completions: tuple[tuple[int, int], ...]
    """(number of completions, records that have so many)."""
    unscored: int
    """Records with completions that nobody compared."""
    prompt_words: Lengths
    completion_words: Lengths | None
    """None where no record has a completion."""
    repeats: Repeats
    pairs: Pairs | None
    thumbs: Thumbs | None
    votes: Votes | None
    weightless: int
    """Records of weight 0."""
    feedback: int
    """Records with feedback in words."""
    groups: Names | None
    sources: Names
    """Files that the records come from."""


@final
@dataclass(frozen=True)
class Survey:
    """What a practitioner should know before training."""

    source: str
    report: Report
    eval_report: Report | None
    sources: tuple[Report, ...]
    """Of each training source where several are mixed, else none."""
    train: Side
    eval: Side | None
    """None where no record evaluates."""
    leaks: Leaks | None
    tokens: TokenSurvey | None
    """None without a tokenizer."""
