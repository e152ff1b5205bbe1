"""Two completions of one prompt, the better one named: the shape of most sets of preferences."""

from collections.abc import Mapping
from typing import Any

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import (
    BESIDE_PAIR,
    BESIDE_PROMPT,
    PROMPT,
    chosen_over,
    column,
    completion_of,
    is_transcript,
    preferred,
    shared_prompt,
    transcript,
)
from dpo.data.read import Row
from dpo.data.records import Messages, Preference

_CHOSEN = ("chosen", "chosen_response")
_REJECTED = ("rejected", "rejected_response")


def _prompted(row: Row) -> Preference:
    (before, chosen), (other, rejected) = (
        completion_of(value, name) for name, value in (column(row.values, names) for names in (_CHOSEN, _REJECTED))
    )
    return chosen_over(row, shared_prompt(row.values, (before, other)), chosen, rejected)


def _corrected(row: Row) -> Preference:
    (before, original), (other, correction) = (
        completion_of(row.values.get(name), name) for name in ("completion", "correction")
    )
    return preferred(row, shared_prompt(row.values, (before, other)), (correction, original), 0)


def _transcripts(row: Row) -> Preference:
    (prompt, chosen), (other, rejected) = (transcript(row.values.get(name), name) for name in ("chosen", "rejected"))
    return chosen_over(row, _same(prompt, other), chosen, rejected)


def _conversations(row: Row) -> Preference:
    (prompt, chosen), (other, rejected) = (completion_of(row.values.get(name), name) for name in ("chosen", "rejected"))
    return chosen_over(row, _same(prompt, other), chosen, rejected)


def _same(prompt: Messages, other: Messages) -> Messages:
    if prompt != other:
        raise BadRow(Drop.PROMPTS_DIFFER, "chosen and rejected are not the same up to their last turns")
    return prompt


def _are_transcripts(values: Mapping[str, Any]) -> bool:
    return all(is_transcript(values[name]) for name in ("chosen", "rejected"))


def _are_conversations(values: Mapping[str, Any]) -> bool:
    return isinstance(values["chosen"], list) and isinstance(values["rejected"], list)


PAIR = Format(
    "pair",
    "chosen is preferred to rejected",
    (PROMPT, _CHOSEN, _REJECTED),
    _prompted,
    optional=(*BESIDE_PROMPT, *BESIDE_PAIR),
)
TRANSCRIPTS = Format(
    "pair of transcripts",
    "chosen is preferred to rejected; the prompt is everything up to the last '\\n\\nAssistant:'",
    (("chosen",), ("rejected",)),
    _transcripts,
    _are_transcripts,
    optional=BESIDE_PAIR,
)
CONVERSATIONS = Format(
    "pair of conversations",
    "chosen is preferred to rejected; the prompt is every message but the last",
    (("chosen",), ("rejected",)),
    _conversations,
    _are_conversations,
    optional=BESIDE_PAIR,
)
CORRECTION = Format(
    "correction",
    "the correction is preferred to the completion",
    (PROMPT, ("completion",), ("correction",)),
    _corrected,
    optional=BESIDE_PROMPT,
)
