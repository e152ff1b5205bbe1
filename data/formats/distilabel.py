"""Orca pairs, rated anew by distilabel, with what its makers say about each pair.

Source: the card of argilla/distilabel-intel-orca-dpo-pairs, Apache-2.0.
"""

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import BESIDE_PAIR, BESIDE_PROMPT, PROMPT, as_text, chosen_over, prompt_of
from dpo.data.read import Row
from dpo.data.records import Preference


def _convert(row: Row) -> Preference:
    values = row.values
    if values.get("status") == "tie":
        raise BadRow(Drop.TIE, "status is tie")
    if values.get("in_gsm8k_train"):
        raise BadRow(Drop.MARKED, "in_gsm8k_train is true: the prompt is from the benchmark GSM8K")
    chosen, rejected = (as_text(values.get(name), name) for name in ("chosen", "rejected"))
    return chosen_over(row, prompt_of(values), chosen, rejected)


DISTILABEL = Format(
    "distilabel Orca pairs",
    "chosen is preferred to rejected; the status tie and in_gsm8k_train leave a row out",
    (PROMPT, ("chosen",), ("rejected",), ("status",), ("in_gsm8k_train",)),
    _convert,
    optional=(*BESIDE_PROMPT, *BESIDE_PAIR),
)
