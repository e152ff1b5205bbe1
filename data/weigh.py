"""How much an example counts: how many a prompt may have, and what a group weighs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from heapq import heappush, heappushpop
from typing import Literal

from dpo.data.check import BadRow, Drop
from dpo.data.config import DataConfig
from dpo.data.examples import Example
from dpo.data.report import Tally
from dpo.data.shelf import pick
from dpo.data.split import prompt_digest
from dpo.errors import DataError, nearest

_NO_GROUP = "none"
"""How rows without a group are called in a message."""


def capped(examples: Sequence[Example], config: DataConfig, tally: Tally) -> Sequence[Example]:
    """Return the examples with at most `config.per_prompt` of each prompt; all where that is None.

    Which ones follows from their texts and the seed, not from their order. Rows that lose all of theirs are counted.
    """
    if config.per_prompt is None:
        return examples
    kept: dict[bytes, list[tuple[bytes, int]]] = defaultdict(list)  # highest first: what to take off comes out first
    for place, example in enumerate(examples):
        text = f"{config.seed}\n{example.texts}\n{example.scores}\n{example.desirable}"
        drawn = (sha256(text.encode("utf-8", "surrogatepass")).digest()[:16], place)
        held = kept[prompt_digest(example.prompt_messages)]
        (heappush if len(held) < config.per_prompt else heappushpop)(held, drawn)
    places = sorted(place for held in kept.values() for _, place in held)
    left = {example.source for example in pick(examples, places)}
    for source in dict.fromkeys(example.source for example in examples):
        if source not in left:
            tally.drop(BadRow(Drop.CAPPED), source)
    return pick(examples, places)


def group_factors(
    examples: Sequence[Example], weights: Mapping[str, float] | Literal["equal"]
) -> dict[str | None, float]:
    """Return what multiplies the weight of each group's examples.

    Under "equal" the sum of weights is the same for every group, rows without a group being one of them, and the mean
    weight of an example stays as it is.

    Raises:
        DataError: a weight is given to a group that no example has.
    """
    if weights == "equal":
        total: defaultdict[str | None, float] = defaultdict(float)
        for example in examples:
            total[example.group] += example.weight
        share = sum(total.values()) / len(total)
        return {group: share / own if own else 1.0 for group, own in total.items()}
    if not weights:
        return {}
    known = {example.group or _NO_GROUP for example in examples}
    for group in weights:
        if group not in known:
            raise DataError(
                f"data.group_weights: got the group {group!r}, expected one of {', '.join(sorted(known))}."
                f"{nearest(group, known)} Correct its name, or leave it out."
            )
    return {None if group == _NO_GROUP else group: weight for group, weight in weights.items()}
