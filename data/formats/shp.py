"""Stanford Human Preferences: two comments below a Reddit post, and which one the readers voted up.

Source: the card of stanfordnlp/SHP.
"""

from dpo.data.format import Format
from dpo.data.parts import as_index, as_number, as_text, preferred
from dpo.data.read import Row
from dpo.data.records import Message, Preference


def _convert(row: Row) -> Preference:
    values = row.values
    first, second = (as_text(values.get(name), name) for name in ("human_ref_A", "human_ref_B"))
    return preferred(
        row,
        (Message("user", as_text(values.get("history"), "history")),),
        (first, second),
        1 - as_index(values.get("labels"), "labels"),  # 1 is for A, which stands first
        (as_number(values.get("score_A"), "score_A"), as_number(values.get("score_B"), "score_B")),
    )


SHP = Format(
    "SHP",
    "labels is 1 where human_ref_A is preferred and 0 where human_ref_B is; score_A and score_B are their votes",
    (("history",), ("human_ref_A",), ("human_ref_B",), ("labels",), ("score_A",), ("score_B",)),
    _convert,
)
