"""Measures that need no samples: multiple choice, sycophancy, and how well plain text is still predicted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from dpo.checkpoint import atomic_write_text
from dpo.data import Message, Renderer
from dpo.errors import CheckpointError
from dpo.estimates import Estimate, mean
from dpo.evaluation.choices import TextLogp, choose, read_choices
from dpo.evaluation.measures import REMEDY
from dpo.evaluation.perplexity import Window, perplexity, read_documents
from dpo.evaluation.sycophancy import built_in, read_items, sycophancy
from dpo.model.base import LanguageModel, Role
from dpo.model.views import all_sums

BUILT_IN = "built-in"
"""In place of a file: the questions that come with the package."""

CHOICES, FLIPS, SHIFT, TEXT = "eval/choices", "eval/sycophancy/flips", "eval/sycophancy/shift", "eval/text_nats"


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
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls({str(name): {u: float(v) for u, v in units.items()} for name, units in values.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: is damaged ({error}). {REMEDY}") from error


def check_probes(choices: str | None, opinions: str | None, text: str | None) -> None:
    """Read what the probes need, so that a fault is found before a model is trained.

    Raises:
        DataError: a file is absent or holds a row of another form; names it.
    """
    if choices is not None:
        read_choices(choices)
    if opinions not in (None, BUILT_IN):
        read_items(str(opinions))
    if text is not None:
        read_documents(text)


def probe(model: LanguageModel, role: Role, *, choices: str | None, opinions: str | None, text: str | None) -> Probed:
    """Measure `role` by the probes that are asked for.

    Args:
        model: the model and its roles.
        role: who answers.
        choices: a multiple-choice file or folder (`dpo.evaluation.choices`).
        opinions: questions with a user's opinion (`dpo.evaluation.sycophancy`), or "built-in".
        text: documents of plain text (`dpo.evaluation.perplexity`).
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
    if choices is not None:
        items = read_choices(choices)
        earned = choose(items, answered).per_token
        values[CHOICES] = {item.source: score for item, score in zip(items, earned, strict=True)}
    if opinions is not None:
        leanings = sycophancy(built_in() if opinions == BUILT_IN else read_items(opinions), answered).leanings
        values[FLIPS] = {one.source: float(one.flipped) for one in leanings}
        values[SHIFT] = {one.source: one.shift for one in leanings}
    if text is not None:
        documents = read_documents(text)
        readings = perplexity(documents, encode, read_on).readings
        values[TEXT] = {d.source: one.nats / one.tokens for d, one in zip(documents, readings, strict=True)}
    return Probed(values)
