"""Pairs below a conversation in ShareGPT's names, as LLaMA-Factory keeps them.

Source: the card of llamafactory/DPO-En-Zh-20k.
"""

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import BESIDE_PAIR, as_messages, chosen_over, completion_of
from dpo.data.read import Row
from dpo.data.records import Preference


def _convert(row: Row) -> Preference:
    prompt = as_messages(row.values.get("conversations"), "conversations")
    (before, chosen), (other, rejected) = (completion_of(row.values.get(name), name) for name in ("chosen", "rejected"))
    if {before, other} - {(), prompt}:
        raise BadRow(Drop.PROMPTS_DIFFER, "chosen or rejected repeats other turns than conversations holds")
    return chosen_over(row, prompt, chosen, rejected)


SHAREGPT = Format(
    "ShareGPT pair",
    "chosen is preferred to rejected; the prompt is conversations",
    (("conversations",), ("chosen",), ("rejected",)),
    _convert,
    optional=BESIDE_PAIR,
)
