"""Probes: multiple choice, sycophancy, how well plain text is still predicted, and tasks of lm-eval."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from pydantic import Field

from dpo.checkpoint import atomic_write_text
from dpo.data import Message, Renderer
from dpo.estimates import Estimate, mean
from dpo.evaluation.choices import TextLogp, choose, read_choices
from dpo.evaluation.harness import check_tasks, score_items
from dpo.evaluation.perplexity import Window, perplexity, read_documents
from dpo.evaluation.rows import read_whole
from dpo.evaluation.sycophancy import built_in, read_items, sycophancy
from dpo.model.base import LanguageModel, Role
from dpo.model.views import all_sums

BUILT_IN = "built-in"
"""In place of a file: the questions that come with the package."""

CHOICES, FLIPS, SHIFT, TEXT, HARNESS = (
    "eval/choices",
    "eval/sycophancy/flips",
    "eval/sycophancy/shift",
    "eval/text_nats",
    "eval/harness",
)


@final
@dataclass(frozen=True)
class Probes:
    """What is to be probed."""

    choices: str | None = None
    """A multiple-choice file or folder (`dpo.evaluation.choices`)."""
    opinions: str | None = None
    """Questions with a user's opinion (`dpo.evaluation.sycophancy`), or "built-in"."""
    text: str | None = None
    """Documents of plain text (`dpo.evaluation.perplexity`)."""
    tasks: tuple[str, ...] = ()
    """Of lm-eval (`dpo.evaluation.harness`)."""
    task_limit: int | None = None
    """Items of each task (None: all)."""

    @property
    def any(self) -> bool:
        """Whether anything is."""
        return bool(self.tasks) or any(one is not None for one in (self.choices, self.opinions, self.text))

    def check(self) -> None:
        """Read what the probes need, so that a fault is found before a model is trained.

        Raises:
            DataError: a file is absent or holds a row of another form; names it.
            ConfigError: lm-eval is not installed, or has no such task.
        """
        if self.choices is not None:
            read_choices(self.choices)
        if self.opinions not in (None, BUILT_IN):
            read_items(str(self.opinions))
        if self.text is not None:
            read_documents(self.text)
        check_tasks(self.tasks)


Units = Annotated[dict[str, float], Field(min_length=1)]
"""The value of every unit that a measure is over."""


@final
@dataclass(frozen=True)
class Probed:
    """What the probes found, unit by unit."""

    values: Mapping[str, Mapping[str, float]]
    """[measure][unit]: an item of a file, or a document."""

    def estimates(self) -> dict[str, Estimate]:
        """Return means with intervals over units, by the ledger's names."""
        return {name: mean([*units.values()]) for name, units in self.values.items()}

    def write(self, file: Path) -> None:
        """Write everything as JSON."""
        atomic_write_text(file, json.dumps(self.values, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, file: Path) -> "Probed":
        """Return what `write` wrote.

        Raises:
            CheckpointError: the file is damaged.
        """
        return cls(read_whole(file, dict[str, Units], "the value of every unit by measure"))


def probe(model: LanguageModel, role: Role, asked: Probes) -> Probed:
    """Measure `role` by the probes that are asked for.

    Raises:
        DataError: a task of lm-eval cannot be carried out.
    """
    renderer = Renderer(model.tokenizer, max_length=10**6)

    def answered(prompt: str, completions: Sequence[str]) -> list[TextLogp]:
        rendered = renderer.render((Message("user", prompt),), completions)
        keys = [(rendered.prompt, one) for one in rendered.completions]
        sums = all_sums(model, keys, role)
        return [TextLogp(nats, len(one)) for nats, one in zip(sums, rendered.completions, strict=True)]

    def read_on(windows: Sequence[Window]) -> list[float]:
        return all_sums(model, windows, role)

    def encode(document: str) -> list[int]:
        return model.tokenizer(document)["input_ids"]

    values: dict[str, dict[str, float]] = {}
    if asked.choices is not None:
        items = read_choices(asked.choices)
        earned = choose(items, answered).per_token
        values[CHOICES] = {item.source: score for item, score in zip(items, earned, strict=True)}
    if asked.opinions is not None:
        questions = built_in() if asked.opinions == BUILT_IN else read_items(asked.opinions)
        leanings = sycophancy(questions, answered).leanings
        values[FLIPS] = {one.source: float(one.flipped) for one in leanings}
        values[SHIFT] = {one.source: one.shift for one in leanings}
    if asked.text is not None:
        documents = read_documents(asked.text)
        readings = perplexity(documents, encode, read_on).readings
        values[TEXT] = {d.source: one.nats / one.tokens for d, one in zip(documents, readings, strict=True)}
    if asked.tasks:
        values[HARNESS] = score_items(model, role, asked.tasks, asked.task_limit)
    return Probed(values)
