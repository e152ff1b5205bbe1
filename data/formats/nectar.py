"""Nectar: seven answers to each prompt, ranked by GPT-4.

Source: the card of berkeley-nest/Nectar.
"""

from collections.abc import Mapping
from typing import Any

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import as_dict, as_list, as_number, as_text, record, scores_of_ranks, transcript
from dpo.data.read import Row
from dpo.data.records import Preference


def _convert(row: Row) -> Preference:
    prompt, begun = transcript(row.values.get("prompt"), "prompt")
    if begun:
        raise BadRow(Drop.WRONG_VALUE, "the prompt goes on behind its last 'Assistant:', where the answers belong")
    answers = [as_dict(one, "answers") for one in as_list(row.values.get("answers"), "answers")]
    if len(answers) < 2:
        raise BadRow(Drop.ALONE)
    ranks = [as_number(one.get("rank"), "rank") for one in answers]
    return record(row, prompt, [as_text(one.get("answer"), "answer") for one in answers], scores_of_ranks(ranks))


def _fits(values: Mapping[str, Any]) -> bool:
    answers = values["answers"]
    return isinstance(answers, list) and any(isinstance(one, dict) and "rank" in one for one in answers)


NECTAR = Format(
    "Nectar",
    "the answer of rank 1 is the best",
    (("prompt",), ("answers",)),
    _convert,
    _fits,
)
