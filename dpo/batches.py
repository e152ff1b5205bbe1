"""Which examples an optimiser step takes, and how they are divided to fit in memory.

The first is a function of the settings and the step's number alone: a uniform draw, whatever the lengths, so that no
step sees only short examples. Lengths matter within a step, where micro-batches are packed; as every example weighs
the same in the step's mean, how they are divided changes nothing but time and memory.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, final

import torch

from dpo.errors import TrainingError

log = logging.getLogger("dpo")

Result = TypeVar("Result")


class Sized(Protocol):
    """What is divided: anything with a prompt and completions that branch from it."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids."""
        ...

    @property
    def completions(self) -> Sequence[Sequence[int]]:
        """Token ids of each."""
        ...

    @property
    def source(self) -> str:
        """`file:row`."""
        ...


@final
@dataclass(frozen=True)
class Plan:
    """Which examples each optimiser step takes."""

    examples: int
    """Training examples."""
    batch: int
    """Examples of one optimiser step."""
    steps: int
    """Optimiser steps of the run."""
    seed: int
    """Of the order."""

    @classmethod
    def of(cls, examples: int, batch: int, epochs: int, max_steps: int | None, seed: int) -> "Plan":
        """Lay out the steps of so many epochs, or fewer."""
        steps = math.ceil(examples / batch) * epochs
        return cls(examples, batch, min(steps, max_steps or steps), seed)

    def indices(self, step: int) -> list[int]:
        """Return the examples of optimiser step `step` (from 0): a seeded order, drawn anew for every epoch."""
        epoch, within = divmod(step, math.ceil(self.examples / self.batch))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.examples, generator=generator)
        return order[within * self.batch : (within + 1) * self.batch].tolist()


@final
@dataclass(frozen=True)
class Division:
    """How many examples are in memory at once."""

    size: int
    """Examples of a micro-batch."""
    max_tokens: int | None
    """Tokens of a micro-batch in place of `size`; an example longer than that stands alone."""
    padded: bool
    """Whether every completion takes a padded row of its own; else a prompt counts once and nothing is padded."""
    scored: int | None
    """Completions of an example that one forward pass scores: both of a pair, one of a judgement; None: all."""
    parts: int = 1
    """Both limits are divided by it; doubled when memory runs out."""

    def micro_batches(self, examples: Sequence[Sized]) -> list[list[int]]:
        """Divide examples, none lost, none doubled; each micro-batch holds indices into `examples`."""
        size, budget = max(1, self.size // self.parts), self.max_tokens and max(1, self.max_tokens // self.parts)
        if budget is not None:
            return self._fill_rows(examples, budget) if self.padded else self._fill(examples, budget)
        ordered = _longest_first(examples, _row) if self.padded else list(range(len(examples)))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def largest(self, examples: Sequence[Sized]) -> int:
        """Return the most tokens, padding included, that any micro-batch of the examples can hold."""
        sizes = sorted((self._tokens(example) for example in examples), reverse=True)
        if self.max_tokens is not None:
            return max(self.max_tokens, sizes[0])
        return sizes[0] * self.size if self.padded else sum(sizes[: self.size])

    def _tokens(self, example: Sized) -> int:
        """Return what the example takes alone: its prompt once, or in padded rows one for each completion."""
        if self.padded:
            return self._rows(example) * _row(example)
        return len(example.prompt) + sum(sorted(map(len, example.completions), reverse=True)[: self.scored])

    def _rows(self, example: Sized) -> int:
        return len(example.completions) if self.scored is None else self.scored

    def _fill(self, examples: Sequence[Sized], budget: int) -> list[list[int]]:
        """Pack first-fit-decreasing: at most 11/9 of the fewest micro-batches, plus one (Johnson 1973)."""
        batches: list[list[int]] = []
        room: list[int] = []
        for n in _longest_first(examples, self._tokens):
            need = self._tokens(examples[n])
            fitting = next((b for b, free in enumerate(room) if free >= need), None)
            if fitting is None:
                batches.append([n])
                room.append(budget - need)
            else:
                batches[fitting].append(n)
                room[fitting] -= need
        return batches

    def _fill_rows(self, examples: Sequence[Sized], budget: int) -> list[list[int]]:
        """Take examples of similar length together; a micro-batch costs its rows times the longest of them."""
        batches: list[list[int]] = []
        longest = rows = 0
        for n in _longest_first(examples, _row):
            rows += self._rows(examples[n])
            if not batches or rows * longest > budget:
                batches.append([])
                longest, rows = _row(examples[n]), self._rows(examples[n])
            batches[-1].append(n)
        return batches


def _row(example: Sized) -> int:
    """Return the tokens of the example's longest row."""
    return len(example.prompt) + max(map(len, example.completions))


def _longest_first(examples: Sequence[Sized], tokens: Callable[[Sized], int]) -> list[int]:
    return sorted(range(len(examples)), key=lambda n: tokens(examples[n]), reverse=True)


def within_memory(
    work: Callable[[list[list[int]]], Result], examples: Sequence[Sized], division: Division
) -> tuple[Result, Division]:
    """Do `work` on micro-batches of the examples; where memory runs out, do it again on smaller ones.

    Args:
        work: gets all micro-batches, as indices into `examples`, and can be repeated from its beginning.
        examples: what to divide.
        division: how to divide them at first.

    Returns:
        The result, and the division it was reached with.

    Raises:
        TrainingError: memory does not hold even a single example.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    while True:
        batches = division.micro_batches(examples)
        try:
            return work(batches), division
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if max(map(len, batches)) == 1:
                longest = max(examples, key=_row)
                raise TrainingError(
                    f"{longest.source}: memory does not hold a single example (a row of {_row(longest)} tokens). Use "
                    "model.gradient_checkpointing=true, model.quantization=nf4, a smaller data.max_length, or a "
                    "smaller model; `dpo train ... --plan` shows what takes how much."
                ) from error
        # Outside the handler: the exception's traceback would keep the failed step's tensors alive.
        clear_device_cache(garbage_collection=True)
        most = max(map(len, batches))
        while max(map(len, division.micro_batches(examples))) >= most:
            division = replace(division, parts=division.parts * 2)
        log.warning(
            "out of memory with %d examples at once: from here on %d at once, the optimiser step takes the same ones",
            most, max(map(len, division.micro_batches(examples))),
        )  # fmt: skip
