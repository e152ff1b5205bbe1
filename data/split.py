"""Which rows evaluate. A prompt is never on both sides, whatever its case and white space."""

import json
from collections.abc import Sequence
from hashlib import sha256

from dpo.data.records import Messages, Preference
from dpo.data.shelf import pick
from dpo.errors import DataError


def prompt_key(prompt: Messages) -> str:
    """Return the prompt without case and white space differences: equal keys are one prompt."""
    return "\n".join(
        f"{message.role} {' '.join(message.content.casefold().split())}{message.extra}" for message in prompt
    )


def prompt_digest(prompt: Messages, exact: bool = False) -> bytes:
    """Return 16 bytes that stand for `prompt_key`, or where `exact` for the prompt as it is."""
    text = json.dumps([(turn.role, turn.content, turn.extra) for turn in prompt]) if exact else prompt_key(prompt)
    return sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def fraction(prompt: Messages, salt: str) -> float:
    """Return a number from 0 to below 1 that the prompt alone decides, whatever its case and white space."""
    return _fraction(prompt_key(prompt), salt)


def split(
    records: Sequence[Preference], eval_share: float, seed: int
) -> tuple[Sequence[Preference], Sequence[Preference]]:
    """Return (train, eval), each in the order of `records`: tuples, or parts of the file that `records` lie in.

    A prompt's side follows from its own hash, salted with `seed`: it changes neither with the order of the rows nor
    with rows added later. Only where the hash leaves a side empty, the nearest prompt goes there as long as none else
    does.

    Args:
        records: the rows to divide.
        eval_share: expected share of prompts that evaluate, 0 <= share < 1; 0 gives an empty eval side.
        seed: salt of the hash.

    Raises:
        DataError: a share is asked for and all rows have one prompt.
    """
    source = records[0].source if records else "no rows"
    return divide(records, held_out([fraction(one.prompt, str(seed)) for one in records], eval_share, source))


def divide(records: Sequence[Preference], evaluate: Sequence[int]) -> tuple[Sequence[Preference], Sequence[Preference]]:
    """Return the records without those at the indices `evaluate`, and those."""
    away = set(evaluate)
    return pick(records, [place for place in range(len(records)) if place not in away]), pick(records, evaluate)


def held_out(fractions: Sequence[float], eval_share: float, source: str) -> list[int]:
    """Return which records evaluate, in their order; see `split`.

    Args:
        fractions: of each record's prompt.
        eval_share: as in `split`.
        source: where the records are from, for the message.
    """
    if not eval_share:
        return []
    if len(prompts := set(fractions)) < 2:
        raise DataError(
            f"{source}: the rows have {len(prompts)} different prompts, expected at least 2 to train on one and"
            " evaluate on another. Set eval_share=0, or name a file in `eval`."
        )
    first, last = min(prompts), max(prompts)
    return [place for place, at in enumerate(fractions) if (at < eval_share or at == first) and at != last]


def _fraction(key: str, salt: str) -> float:
    digest = sha256(f"{salt}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
