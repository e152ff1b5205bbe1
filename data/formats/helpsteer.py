"""NVIDIA's HelpSteer: three generations, of which two hold comparisons and one holds ratings.

Sources: the cards of nvidia/HelpSteer3 and nvidia/HelpSteer2 (default and preference), CC-BY-4.0.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from statistics import fmean
from typing import Any

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import as_dict, as_list, as_messages, as_number, as_text, record
from dpo.data.read import Row
from dpo.data.records import Message, Messages, Preference

_LIMIT = 3
"""Largest strength of a preference."""
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _strengths(value: object, name: str) -> tuple[float, float]:
    """Return scores of the first and the second response: a negative preference is for the first, 0 is a tie."""
    strength = as_number(value, name)
    if abs(strength) > _LIMIT:
        raise BadRow(Drop.WRONG_VALUE, f"{name} is {strength:g}, expected -{_LIMIT} to {_LIMIT}")
    return max(-strength, 0.0), max(strength, 0.0)


def _helpsteer3(row: Row) -> Preference:
    values = row.values
    scores = _strengths(values.get("overall_preference"), "overall_preference")
    held = values.get("individual_preference") or []
    people = [as_dict(one, "individual_preference") for one in as_list(held, "individual_preference")]
    given = [_strengths(one["score"], "score") for one in people if one.get("score") is not None]
    said = (as_text(one.get(name), name) for one in people for name in ("reasoning", "feedback1", "feedback2"))
    return record(
        row,
        as_messages(values.get("context"), "context"),
        [as_text(values.get(name), name) for name in ("response1", "response2")],
        scores,
        agreement=_agreement(scores, given),
        feedback=[text for text in said if text.strip()],
    )


def _agreement(overall: tuple[float, float], people: list[tuple[float, float]]) -> float | None:
    """Return the share of people on the side of the overall preference; who has none is half on either side."""
    if not people:
        return None
    side = overall[0] - overall[1]
    # The overall preference is a mean of strengths: one strong voice can outweigh two weak ones.
    return max(0.5, fmean(0.5 + 0.5 * _sign(side * (first - second)) for first, second in people))


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _preference(row: Row) -> Preference:
    values = row.values
    said = (as_text(values.get(name), name) for name in ("preference_statement", "preference_elaboration"))
    return record(
        row,
        _turns(values),
        [as_text(values.get(name), name) for name in ("response_1", "response_2")],
        _strengths(values.get("preference_strength"), "preference_strength"),
        feedback=[text for text in said if text.strip()],
    )


def _turns(values: Mapping[str, Any]) -> Messages:
    """Return a prompt: its first turn stands alone, later ones follow a mark of NVIDIA's chat template."""
    first, *others = _TURN.split(as_text(values.get("prompt"), "prompt"))
    later = (
        Message("user" if speaker == "User" else "assistant", words)
        for speaker, words in zip(others[::2], others[1::2], strict=True)
    )
    return (Message("user", first), *later)


def _gather(rows: Iterable[Row]) -> Iterator[Row]:
    """Put together the rows that follow each other with the same prompt."""
    for prompt, same in groupby(rows, key=lambda row: row.values.get("prompt")):
        held = list(same)
        responses = [row.values for row in held]
        yield Row({"prompt": prompt, "responses": responses}, held[0].source, sum(row.rows for row in held))


def _rated(row: Row) -> Preference:
    responses = as_list(row.values.get("responses"), "responses")
    if len(responses) < 2:
        raise BadRow(Drop.ALONE)
    return record(
        row,
        _turns(row.values),
        [as_text(values.get("response"), "response") for values in responses],
        [as_number(values.get("helpfulness"), "helpfulness") for values in responses],
    )


HELPSTEER3 = Format(
    "HelpSteer3",
    "overall_preference below 0 is for response1, above 0 for response2, the farther the stronger; 0 is a tie",
    (("context",), ("response1",), ("response2",), ("overall_preference",)),
    _helpsteer3,
    optional=("individual_preference",),
)
HELPSTEER2_PREFERENCE = Format(
    "HelpSteer2 preference",
    "preference_strength below 0 is for response_1, above 0 for response_2, the farther the stronger; 0 is a tie",
    (("prompt",), ("response_1",), ("response_2",), ("preference_strength",)),
    _preference,
    optional=("preference_statement", "preference_elaboration"),
)
HELPSTEER2 = Format(
    "HelpSteer2",
    "among rows that follow each other with one prompt, higher helpfulness is better",
    (("prompt",), ("response",), ("helpfulness",)),
    _rated,
    gather=_gather,
)
