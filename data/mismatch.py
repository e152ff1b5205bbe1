"""Completions under prompts that they do not answer, for objectives with a reference point (ADR 3)."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from dpo.data.config import DataConfig
from dpo.data.examples import Example
from dpo.data.split import fraction
from dpo.errors import DataError


def with_mismatched(
    examples: Sequence[Example], own: Iterable[Example], side: str, config: DataConfig
) -> Iterator[Example]:
    """Yield the examples, each with the completion of another prompt behind its own.

    Examples stand in a ring in which those of one prompt are neighbours and the prompts are shuffled by the seed. Each
    takes its partner from the arc that follows its own prompt: where every prompt has as many examples as the others
    this is a rotation, which uses every completion once.

    Args:
        examples: of one side; partners are drawn from them.
        own: the same, as they are to be yielded.
        side: of which they are, for the message.
        config: has the seed.

    Raises:
        DataError: all examples have one prompt.
    """
    # Equal numbers are one prompt, whatever its case and white space.
    prompts = array("d", (fraction(example.prompt_messages, str(config.seed)) for example in examples))
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    partner = array("q", [0] * len(prompts))
    start = 0
    for _, members in groupby(order, key=prompts.__getitem__):
        block = list(members)
        outside = len(order) - len(block)
        if not outside:
            raise DataError(
                f"{examples[0].source}: all {len(examples)} {side} examples have one prompt, expected at least two:"
                " this objective scores each prompt with a completion of another. Add prompts, or change eval_share."
            )
        for step, member in enumerate(block):
            partner[member] = order[(start + len(block) + step % outside) % len(order)]
        start += len(block)
    for example, other in zip(own, partner, strict=True):
        yield _matched_with(example, examples[other], config.max_length)


def _matched_with(example: Example, other: Example, max_length: int) -> Example:
    room = max_length - len(example.prompt)
    return replace(
        example,
        completions=(*example.completions, other.completions[0][:room]),
        texts=(*example.texts, other.texts[0]),
    )
