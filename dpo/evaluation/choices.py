"""Multiple choice: which of the given answers a model holds the most probable."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

from dpo.data.read import read
from dpo.errors import DataError, ModelError
from dpo.estimates import Estimate, share


@final
@dataclass(frozen=True)
class TextLogp:
    """How probable a model holds a text."""

    nats: float
    """Log-probability, summed over its tokens."""
    tokens: int
    """Tokens of the text (>= 1)."""


TextLogps: TypeAlias = Callable[[str, Sequence[str]], Sequence[TextLogp]]
"""Maps (prompt, completions) to what a model holds of each completion as its answer to the prompt, in the same order.
The prompt is the text of the user's message; the chat template is the caller's."""


@final
@dataclass(frozen=True)
class ChoiceItem:
    """A question with answers to choose from."""

    prompt: str
    choices: tuple[str, ...]
    """Two or more, all different."""
    scores: tuple[float, ...]
    """What choosing each earns, 0 to 1; 1 for the right one and 0 for the others where there is one right answer."""
    category: str
    source: str
    """Where it stands, for messages."""


@final
@dataclass(frozen=True)
class Accuracy:
    """Mean score of the chosen answers; where answers are right or wrong, the share of right ones."""

    plain: Estimate
    """Choosing by log-probability, which favours short answers."""
    per_token: Estimate
    """Choosing by log-probability a token, which takes that away (and favours long answers of common words)."""


@final
@dataclass(frozen=True)
class ChoiceResult:
    """How a model chose."""

    overall: Accuracy
    categories: Mapping[str, Accuracy]
    """By category, in the order of the file."""
    plain: tuple[float, ...]
    """[item]: the score earned, choosing by log-probability; for comparisons that are paired over items."""
    per_token: tuple[float, ...]
    """[item]: the same by log-probability a token."""


def choose(items: Sequence[ChoiceItem], logps: TextLogps) -> ChoiceResult:
    """Return how a model chooses; equally probable answers share the choice, so that ignorance earns chance level.

    Intervals are Wilson's. The choices are not listed in the prompt: the model sees the question and scores each
    answer as its own.

    Paper: arXiv:2112.00861 (the HHH evaluation, two answers to each question).
    Differs: log-probabilities stand as they are, not relative to those of the answer without its question.

    Raises:
        ModelError: a log-probability is missing or not finite; names the item.
        ValueError: no items.
    """
    if not items:
        raise ValueError("choose: got no items, expected at least one")
    plain, per_token = [], []
    for item in items:
        known = checked(logps, item.prompt, item.choices, item.source)
        plain.append(_earned(item, [one.nats for one in known]))
        per_token.append(_earned(item, [one.nats / one.tokens for one in known]))
    rows: dict[str, list[int]] = {}
    for n, item in enumerate(items):
        rows.setdefault(item.category, []).append(n)

    def accuracy(part: Sequence[int]) -> Accuracy:
        return Accuracy(*(share(sum(earned[n] for n in part), len(part)) for earned in (plain, per_token)))

    return ChoiceResult(
        overall=accuracy(range(len(items))),
        categories={category: accuracy(part) for category, part in rows.items()},
        plain=tuple(plain),
        per_token=tuple(per_token),
    )


def checked(logps: TextLogps, prompt: str, completions: Sequence[str], source: str) -> list[TextLogp]:
    """Return the log-probabilities of completions, one for each.

    Raises:
        ModelError: one is missing, not finite, or of no token; names `source`.
    """
    found = list(logps(prompt, completions))
    if len(found) != len(completions) or not all(math.isfinite(one.nats) and one.tokens >= 1 for one in found):
        raise ModelError(
            f"{source}: got {found} for {len(completions)} answers, expected a finite log-probability and at least one "
            "token for each. Check that the model's weights are finite and that no answer is empty."
        )
    return found


def read_choices(path: str | Path) -> list[ChoiceItem]:
    """Read multiple-choice questions.

    A file of rows (JSON Lines, CSV and the like) has the columns prompt, choices (a list of texts), label (the index of
    the right one, from 0) and, if wanted, category. A task of BIG-bench, task.json, has a list "examples", each with
    input and target_scores (a score for each answer); its category is the name of its folder, and the prefixes and the
    preprompt that a task may name are not used. For a folder, all task.json in it and below it are read.

    Raises:
        DataError: no such file, or a row that is no question; names the file and the row.
    """
    place = Path(path)
    if place.is_dir():
        tasks = sorted(place.rglob("task.json"))
        items = [item for task in tasks if _holds_examples(_parsed(task)) for item in _tasks(task)]
    else:
        items = list(_tasks(place) if place.name == "task.json" else _rows(str(place)))
    if not items:
        raise DataError(
            f"{place}: got no questions, expected rows of prompt, choices and label, or a task.json with examples. "
            "Name another file or folder."
        )
    return items


def _rows(path: str) -> Iterator[ChoiceItem]:
    default = Path(path).stem
    for row in read(path):
        values = row.values
        choices, label = values.get("choices"), values.get("label")
        if not isinstance(choices, list) or type(label) is not int or not 0 <= label < len(choices):
            raise _fault(
                row.source,
                f"choices {choices!r:.60} and label {label!r:.20}",
                "a list of texts, and the index of the right one from 0",
            )
        scores = [float(n == label) for n in range(len(choices))]
        yield _item(values.get("prompt"), choices, scores, values.get("category", default), row.source)


def _tasks(path: Path) -> Iterator[ChoiceItem]:
    task = _parsed(path)
    if not _holds_examples(task):
        raise _fault(str(path), "no list of examples", 'an object with the key "examples"')
    for number, example in enumerate(task["examples"], start=1):
        source = f"{path}: example {number}"
        targets = example.get("target_scores") if isinstance(example, dict) else None
        if not isinstance(targets, dict):
            raise _fault(source, f"{example!r:.60}", "input, and target_scores with a score for each answer")
        yield _item(example.get("input"), list(targets), list(targets.values()), path.parent.name, source)


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}). Give the path of a local file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: got bytes that are no UTF-8 ({error}). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: {error.msg}. Mend this place in the file.") from error


def _holds_examples(task: Any) -> bool:
    """Tell whether a task holds questions; one with subtasks holds none of its own."""
    return isinstance(task, dict) and isinstance(task.get("examples"), list)


def _item(prompt: Any, choices: Sequence[Any], scores: Sequence[Any], category: Any, source: str) -> ChoiceItem:
    if not isinstance(prompt, str) or not prompt.strip():
        raise _fault(source, f"the prompt {prompt!r:.60}", "text")
    if len(choices) < 2 or not all(isinstance(one, str) and one.strip() for one in choices):
        raise _fault(source, f"the choices {choices!r:.60}", "two texts or more, none of them empty")
    if len(set(choices)) < len(choices):
        raise _fault(source, "a choice twice", "different choices")
    numbers = all(type(one) in (int, float) and 0 <= one <= 1 for one in scores)
    if not numbers or len(set(scores)) < 2:
        raise _fault(source, f"the scores {list(scores)!r:.60}", "numbers from 0 to 1, of which one is the highest")
    if not isinstance(category, str):
        raise _fault(source, f"the category {category!r:.60}", "text")
    return ChoiceItem(prompt, tuple(choices), tuple(map(float, scores)), category, source)


def _fault(source: str, got: str, expected: str) -> DataError:
    return DataError(f"{source}: got {got}, expected {expected}. Mend this row or delete it.")


def _earned(item: ChoiceItem, values: Sequence[float]) -> float:
    """Return the mean score of the choices with the highest value."""
    best = [score for score, value in zip(item.scores, values, strict=True) if value == max(values)]
    return sum(best) / len(best)
