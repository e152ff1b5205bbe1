"""The rows that are timed: real preference pairs, as they are or brought to given lengths.

All of them are made of real tokens in a fixed order, so that every worker, and every repetition, sees the same rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from typing import Any, final

from dpo.batches import Plan
from dpo.data import DataConfig, Example, prepare

SEED = 0
"""Of the order of examples, in every worker."""

HH_MAX_LENGTH = 512
"""Most tokens of prompt and completion in `hh`; longer pairs are dropped."""

WIDTH = 0.25
"""Lengths lie within this share of the one that is asked for: equal lengths would hide what padding costs."""


@final
@dataclass(frozen=True)
class Shape:
    """What the examples of a scenario look like."""

    prompt: int
    """Tokens of a prompt (>= 4), on average."""
    completion: int
    """Tokens of a completion (>= 4), on average."""
    completions: int = 2
    """Completions of a prompt (>= 2)."""
    ranked: bool = False
    """Whether a loss ranks all completions of a prompt; else it compares them two by two."""

    @property
    def pairs(self) -> int:
        """Pairs of a prompt in one step, where completions are compared two by two."""
        return self.completions // 2


SHAPES: dict[str, Shape | None] = {
    "hh": None,
    "long": Shape(prompt=400, completion=60),
    "short": Shape(prompt=20, completion=200),
    "k4": Shape(prompt=200, completion=60, completions=4),
    "k4-ranked": Shape(prompt=200, completion=60, completions=4, ranked=True),
}
"""By scenario; None takes the pairs as they are."""


def read_pairs(file: str, tokenizer: Any, max_length: int) -> list[Example]:
    """Return the file's pairs, in its order.

    Raises:
        DataError: the file cannot be read, or holds no pairs.
    """
    config = DataConfig.model_validate({"train": file, "eval_share": 0, "max_length": max_length})
    return prepare(config, tokenizer, "pairs").train


def derive(pairs: Sequence[Example], shape: Shape | None, count: int) -> list[Example]:
    """Return `count` examples of the shape: real ones where there are enough, else real tokens cut to length."""
    if shape is None:
        return _spread(pairs, count)
    fitting = [pair for pair in pairs if _fits(pair, shape)]
    return _spread(fitting, count) if len(fitting) >= count else _cut(pairs, shape, count)


def in_pairs(examples: Sequence[Example], batch: int) -> list[Example]:
    """Return every example's completions two by two, in the places where `batches` finds a prompt's pairs in one step.

    Args:
        examples: each of the same even number of completions.
        batch: examples of one step.
    """
    pairs = [
        replace(e, completions=e.completions[n : n + 2]) for e in examples for n in range(0, len(e.completions), 2)
    ]
    size = batch * len(pairs) // len(examples)
    plan = Plan.of(len(pairs), size, epochs=1, max_steps=None, seed=SEED)
    taken = [n for step in range(plan.steps) for n in plan.indices(step)]
    placed = dict(zip(taken, pairs, strict=True))
    return [placed[n] for n in range(len(pairs))]


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Take examples at equal distances, from the whole file; the same one again where there are too few."""
    return [examples[i * len(examples) // count] for i in range(count)]


def _fits(pair: Example, shape: Shape) -> bool:
    near = [abs(len(pair.prompt) - shape.prompt) <= WIDTH * shape.prompt]
    near += [abs(len(ids) - shape.completion) <= WIDTH * shape.completion for ids in pair.completions]
    return all(near) and len(pair.completions) == shape.completions


def _cut(pairs: Sequence[Example], shape: Shape, count: int) -> list[Example]:
    """Join all prompts and all completions, and cut both streams into pieces; begin again where one ends."""
    prompts = cycle(chain.from_iterable(pair.prompt for pair in pairs))
    answers = cycle(chain.from_iterable(ids for pair in pairs for ids in pair.completions))
    prompt_lengths, answer_lengths = _lengths(shape.prompt), _lengths(shape.completion)
    return [
        replace(
            pairs[0],
            prompt=tuple(islice(prompts, next(prompt_lengths))),
            completions=tuple(tuple(islice(answers, next(answer_lengths))) for _ in range(shape.completions)),
        )
        for _ in range(count)
    ]


def _lengths(mean: int) -> Iterator[int]:
    """Yield lengths without end, spread evenly over `mean` +- WIDTH: the golden ratio's multiples, modulo 1."""
    part = 0.5
    while True:
        yield round(mean * (1 - WIDTH + 2 * WIDTH * part))
        part = (part + 0.618033988749895) % 1


def to_rows(examples: Sequence[Example]) -> list[list[list[int]]]:
    """Return examples as `benchmarks.turns.Job.rows`."""
    return [[list(example.prompt), *map(list, example.completions)] for example in examples]


def from_rows(rows: Sequence[Sequence[Sequence[int]]]) -> list[Example]:
    """Return the examples of a job; texts and messages do not travel."""
    return [
        Example(
            prompt=tuple(prompt),
            completions=tuple(map(tuple, completions)),
            preference=1.0,
            desirable=True,
            weight=1.0,
            source=f"row {number}",
            prompt_messages=(),
            texts=(),
        )
        for number, (prompt, *completions) in enumerate(rows)
    ]


def batches(examples: Sequence[Example], batch: int) -> list[list[Example]]:
    """Return what each optimiser step of the product's own loop takes in one epoch: others are given the same."""
    plan = Plan.of(len(examples), batch, epochs=1, max_steps=None, seed=SEED)
    return [[examples[i] for i in plan.indices(step)] for step in range(plan.steps)]
