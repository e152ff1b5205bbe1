"""What a comparison is made of: typed records, none of which needs a model. They are what the report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

from dpo.estimates import Estimate
from dpo.evaluation.achieved import Achieved
from dpo.evaluation.judges import PositionBias
from dpo.metrics import Row

START = "start"
"""Name of the model before any training, beside the names of the entries."""


@final
@dataclass(frozen=True)
class Measure:
    """One column of the comparison: what a number means."""

    name: str
    """The metric's name in the ledger, such as eval/gold_reward."""
    title: str
    """Short, for a table's head."""
    unit: str
    text: str
    """What is averaged over what, in a sentence."""
    better: Literal["higher", "lower"] | None
    """The direction that is an improvement, or None where neither is one by itself."""


@final
@dataclass(frozen=True)
class Difference:
    """How one entry differs from another, or from the start, in one measure."""

    measure: str
    first: str
    second: str
    value: Estimate
    """First minus second, with its interval over prompts and seeds."""
    p: float
    """Of the difference being 0, two-sided."""
    p_adjusted: float
    """Holm-corrected over all differences of this measure that the comparison asks about."""
    real: bool
    """Whether the corrected p is below 1 - LEVEL. False means: not told apart, not: equal."""

    @property
    def interval(self) -> str:
        """The value with its interval, in words."""
        return f"{self.value.value:+.2f}, by itself {self.value.low:+.2f} to {self.value.high:+.2f}"

    @property
    def chance(self) -> str:
        """The corrected p, in words."""
        return "p < 0.001 corrected" if self.p_adjusted < 0.001 else f"p = {self.p_adjusted:.2g} corrected"


@final
@dataclass(frozen=True)
class Cost:
    """What an entry took, the mean over its seeds."""

    seconds: float
    """Of training, all stages, evaluation left out."""
    memory_peak_bytes: float
    """Of the whole process; in one process the later runs' peaks include what earlier ones left."""
    steps: float
    """Optimiser steps, all stages."""
    completions: float
    """Completions that went through a loss, all stages, each time it did."""
    tokens: float
    """Tokens the trained role read, all stages."""
    gpu_hours: float | None
    """Seconds of training on a GPU in hours; None on a CPU."""


@final
@dataclass(frozen=True)
class Point:
    """Where a run stood while it trained: one point of the reward-KL frontier."""

    step: int
    kl: float
    """KL to the reference on own samples, nats a completion (k1)."""
    reward: float
    """Mean gold reward of the same samples."""
    proxy: float | None = None
    """What the reward model says of them, or None without one."""


@final
@dataclass(frozen=True)
class Entry:
    """One objective (or recipe) of the comparison, over its seeds."""

    name: str
    summary: str
    """What it is, in a line."""
    seeds: tuple[int, ...]
    """Of the finished runs."""
    failed: Mapping[int, str]
    """Seeds whose run failed, with the message."""
    measures: Mapping[str, Estimate]
    """By the measure's name, with intervals over prompts and seeds."""
    by_seed: Mapping[str, Mapping[int, float]]
    """[measure][seed]: each run's own mean."""
    cost: Cost | None
    """None for the start."""
    rows: Mapping[int, Sequence[Row]]
    """[seed]: the ledger of the last stage, train and eval rows."""
    frontier: Mapping[int, Sequence[Point]]
    """[seed]: in the order of training, from the start on."""
    settings: Mapping[str, Any]
    """Settings that are this entry's own, by dotted key."""
    tuned: Mapping[str, Any]
    """The settings that tuning chose, by dotted key; empty where the recipe's defaults were used."""
    folders: Mapping[int, str]
    """[seed]: where the run lies."""


@final
@dataclass(frozen=True)
class WinRate:
    """How often one entry's answer is preferred to another's."""

    first: str
    second: str
    plain: Estimate
    """Share of prompts in which the judge prefers first, a tie counting 1/2; over prompts and seeds."""
    length_controlled: Estimate | None
    """The same at equal length, by a regression on the difference in length; None where it cannot be fitted."""
    judged: int
    """Verdicts behind it."""
    missing: int
    """Verdicts that the judge failed to give."""


@final
@dataclass(frozen=True)
class Wins:
    """All win rates by one judge."""

    judge: str
    """Its name, for the reader."""
    rates: tuple[WinRate, ...]
    """Every pair once, the start included; the other direction is 1 minus it."""
    strengths: Mapping[str, Estimate]
    """Bradley-Terry strength over the start's, in nats, the strongest first: one scale for all pairs together. Empty
    where no finite ones exist."""
    position_bias: PositionBias | None
    """How far the verdicts hang on the order of the answers; None for a judge that sees no order."""


@final
@dataclass(frozen=True)
class SideBySide:
    """The answers to one prompt, of the first seed."""

    prompt: str
    answers: Mapping[str, str]
    """By entry's name, the start first."""


@final
@dataclass(frozen=True)
class Trained:
    """One finished run, as the comparison reads it from its folder."""

    entry: str
    seed: int
    folder: str
    achieved: Achieved
    cost: Cost
    """Over all stages."""
    rows: Sequence[Row]
    """The ledger of the last stage."""
    settings: Mapping[str, Any]
    """By dotted key; keys of a stage begin with its name where there are several."""


@final
@dataclass(frozen=True)
class Comparison:
    """All that the report says."""

    title: str
    facts: Mapping[str, str]
    """What was compared on what, for people: model, data, split, budget, seeds, device, versions."""
    verdicts: tuple[str, ...]
    """Which differences are real and which are noise, in words, the most important first."""
    warnings: tuple[str, ...]
    """What a reader must know before trusting it."""
    partial: bool
    """Whether runs or verdicts are missing."""
    primary: str
    """The measure that the verdicts are about."""
    measures: tuple[Measure, ...]
    start: Entry
    entries: tuple[Entry, ...]
    differences: tuple[Difference, ...]
    """Of all measures, every entry against the start and against each other."""
    wins: tuple[Wins, ...]
    samples: tuple[SideBySide, ...]
    settings: Mapping[str, Any]
    """Settings that all runs share, by dotted key."""
    groups: Mapping[str, Mapping[str, Mapping[str, Estimate]]] = field(
        default_factory=dict[str, Mapping[str, Mapping[str, Estimate]]]
    )
    """`[group][entry or START][measure]`: the same on the pairs and prompts of one annotator or population; empty where
    the data names none."""
    own_proxies: bool = False
    """Whether the answers were scored by different reward models, as by those that the runs were trained on: the scores
    of two entries are then on two scales."""
