"""At most one completion of a prompt: judged, to be imitated, or yet to be sampled."""

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import BESIDE_PROMPT, PROMPT, completion_of, prompt_of, record, shared_prompt
from dpo.data.read import Row
from dpo.data.records import Messages, Preference

_LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": -1.0, "0": -1.0, "0.0": -1.0}


def _judged(row: Row) -> Preference:
    prompt, completion = _texts(row)
    label = row.values.get("label")
    score = _LABELS.get(str(label).lower())
    if score is None:
        raise BadRow(Drop.WRONG_VALUE, f"label is {label!r}, not true or false")
    return record(row, prompt, (completion,), (score,))


def _demonstrated(row: Row) -> Preference:
    if (label := row.values.get("label")) is not None:  # the first rows had none: imitating this one may be wrong
        raise BadRow(Drop.WRONG_VALUE, f"label is {label!r} in a file whose first rows have no label")
    prompt, completion = _texts(row)
    return record(row, prompt, (completion,), None)


def _texts(row: Row) -> tuple[Messages, str]:
    repeated, completion = completion_of(row.values.get("completion"), "completion")
    return shared_prompt(row.values, (repeated,)), completion


THUMBS = Format(
    "thumbs",
    "a true label is desirable, a false one is not",
    (PROMPT, ("completion",), ("label",)),
    _judged,
    optional=BESIDE_PROMPT,
)
DEMONSTRATION = Format(
    "demonstration",
    "every completion is worth imitating",
    (PROMPT, ("completion",)),
    _demonstrated,
    optional=BESIDE_PROMPT,
)
PROMPTS = Format(
    "prompts",
    "no completions: prompts to sample from",
    (PROMPT,),
    lambda row: record(row, prompt_of(row.values), (), None),
    optional=BESIDE_PROMPT,
)
