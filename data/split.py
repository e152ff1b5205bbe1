"""Which rows evaluate. A prompt is never on both sides, whatever its case and white space."""

from collections.abc import Sequence
from hashlib import sha256

from dpo.data.records import Messages, Preference
from dpo.errors import DataError


def prompt_key(prompt: Messages) -> str:
    """Return the prompt without case and white space differences: equal keys are one prompt."""
    return "\n".join(f"{message.role} {' '.join(message.content.casefold().split())}" for message in prompt)


def split(
    records: Sequence[Preference], eval_share: float, seed: int
) -> tuple[tuple[Preference, ...], tuple[Preference, ...]]:
    """Return (train, eval), each in the order of `records`.

    A prompt's side follows from its own hash, salted with `seed`: it changes neither with the order of the rows nor
    with rows added later. Where the hash leaves a side empty, the nearest prompt goes there.

    Args:
        records: the rows to divide.
        eval_share: expected share of prompts that evaluate, 0 <= share < 1; 0 gives an empty eval side.
        seed: salt of the hash.

    Raises:
        DataError: a share is asked for and all rows have one prompt.
    """
    if not eval_share:
        return tuple(records), ()
    keys = [prompt_key(record.prompt) for record in records]
    place = {key: _fraction(key, seed) for key in keys}
    if len(place) < 2:
        raise DataError(
            f"{records[0].source if records else 'no rows'}: the rows have {len(place)} different prompts, expected at"
            " least 2 to train on one and evaluate on another. Set eval_share=0, or name a file in `eval`."
        )
    first, last = min(place, key=place.__getitem__), max(place, key=place.__getitem__)
    evaluate = ({key for key in place if place[key] < eval_share} | {first}) - {last}
    return (
        tuple(record for record, key in zip(records, keys, strict=True) if key not in evaluate),
        tuple(record for record, key in zip(records, keys, strict=True) if key in evaluate),
    )


def without_leaks(
    train: Sequence[Preference], evaluation: Sequence[Preference]
) -> tuple[tuple[Preference, ...], tuple[Preference, ...]]:
    """Return (kept, leaked): the training rows whose prompt the evaluation rows do not hold, and those they do."""
    held_out = {prompt_key(record.prompt) for record in evaluation}
    leaked = [prompt_key(record.prompt) in held_out for record in train]
    return (
        tuple(record for record, leak in zip(train, leaked, strict=True) if not leak),
        tuple(record for record, leak in zip(train, leaked, strict=True) if leak),
    )


def _fraction(key: str, seed: int) -> float:
    digest = sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
