"""What kind of preference data a file holds, told by its columns.

A format is a row of `FORMATS`: the columns it needs, how they say which completion is better, and one function that
turns a row into a `Preference`. To add one, write that function and put it before the formats it is a special case of.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

from dpo.data.check import BadRow, Drop
from dpo.data.read import Row
from dpo.data.records import Message, Messages, Preference, Role
from dpo.errors import DataError, nearest

Columns = tuple[str, ...]
"""Names of which a row needs one, in order of preference."""

PROMPT: Columns = ("prompt", "question", "instruction", "input")
ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
_LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": -1.0, "0": -1.0, "0.0": -1.0}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ANSWER = "\n\nAssistant:"


@final
@dataclass(frozen=True)
class Format:
    """A shape of preference data."""

    name: str
    rule: str
    """In words: how it says which completion is better."""
    columns: tuple[Columns, ...]
    """What a row must have: one column of each tuple."""
    convert: Callable[[Row], Preference]
    """Raises `BadRow` for a row that the format cannot hold."""
    fits: Callable[[Mapping[str, Any]], bool] = lambda _: True
    """Whether the values of the first rows are of the format's kind; asked only when the columns are there."""


def recognise(rows: Sequence[Row]) -> Format:
    """Return the first, and so most specific, format that the first rows of a file fit.

    Raises:
        DataError: no format fits; the message lists the columns got, the shapes expected and the nearest match.
    """
    seen: dict[str, Any] = {}
    for row in rows:
        seen.update({name: value for name, value in row.values.items() if value is not None and name not in seen})
    for candidate in FORMATS:
        if all(any(name in seen for name in names) for names in candidate.columns) and candidate.fits(seen):
            return candidate
    known = sorted(set(chain.from_iterable(names for candidate in FORMATS for names in candidate.columns)))
    got = sorted(set(chain.from_iterable(row.values for row in rows)))
    hints = "".join(
        f" For the column {name!r}:{hint}" for name in got if name not in known and (hint := nearest(name, known))
    )
    shapes = "\n".join(
        f"  {candidate.name}: {', '.join('|'.join(names) for names in candidate.columns)}" for candidate in FORMATS
    )
    raise DataError(
        f"{rows[0].source if rows else 'no rows'}: got the columns {', '.join(got) or '(none)'}, expected one of\n"
        f"{shapes}\nRename the columns.{hints}"
    )


# --- one function per format ----------------------------------------------------------------------------------------


def _prompted_pair(row: Row) -> Preference:
    prompt = _prompt(row.values)
    chosen, rejected = (_completion(row.values.get(name), name) for name in ("chosen", "rejected"))
    for repeated, _ in (chosen, rejected):
        if repeated:
            prompt = _reconcile(prompt, repeated, text_prompt=_column(row.values, PROMPT)[1])
    return _pair(row, prompt, chosen[1], rejected[1])


def _transcript_pair(row: Row) -> Preference:
    (prompt, chosen), (other, rejected) = (_transcript(row.values.get(name), name) for name in ("chosen", "rejected"))
    if prompt != other:
        raise BadRow(Drop.PROMPTS_DIFFER)
    return _pair(row, prompt, chosen, rejected)


def _message_pair(row: Row) -> Preference:
    (prompt, chosen), (other, rejected) = (_completion(row.values.get(name), name) for name in ("chosen", "rejected"))
    if prompt != other:
        raise BadRow(Drop.PROMPTS_DIFFER, "chosen and rejected are not the same up to their last turns")
    return _pair(row, prompt, chosen, rejected)


def _judged(row: Row) -> Preference:
    prompt, completion = _prompt_and_completion(row)
    label = row.values.get("label")
    score = _LABELS.get(str(label).lower())
    if score is None:
        raise BadRow(Drop.WRONG_VALUE, f"label is {label!r}, not true or false")
    return _record(row, prompt, (completion,), (score,))


def _scored(row: Row) -> Preference:
    completions, scores = row.values.get("completions"), row.values.get("scores")
    if not isinstance(completions, list) or not isinstance(scores, list):
        raise BadRow(Drop.WRONG_VALUE, "completions and scores are not both lists")
    texts = [_completion(value, "completions") for value in completions]
    prompt = _prompt(row.values)
    for repeated, _ in texts:
        if repeated:
            prompt = _reconcile(prompt, repeated, text_prompt=_column(row.values, PROMPT)[1])
    return _record(row, prompt, tuple(text for _, text in texts), tuple(_number(s, "scores") for s in scores))


def _demonstrated(row: Row) -> Preference:
    if (label := row.values.get("label")) is not None:  # the first rows had none: imitating this one may be wrong
        raise BadRow(Drop.WRONG_VALUE, f"label is {label!r} in a file whose first rows have no label")
    prompt, completion = _prompt_and_completion(row)
    return _record(row, prompt, (completion,), None)


def _prompt_only(row: Row) -> Preference:
    return _record(row, _prompt(row.values), (), None)


def _is_transcript(values: Mapping[str, Any]) -> bool:
    return all(isinstance(values[name], str) and _TURN.match(values[name]) for name in ("chosen", "rejected"))


def _is_messages(values: Mapping[str, Any]) -> bool:
    return isinstance(values["chosen"], list) and isinstance(values["rejected"], list)


FORMATS: tuple[Format, ...] = (
    Format("pair", "chosen is preferred to rejected", (PROMPT, ("chosen",), ("rejected",)), _prompted_pair),
    Format(
        "pair of transcripts",
        "chosen is preferred to rejected; the prompt is everything up to the last '\\n\\nAssistant:'",
        (("chosen",), ("rejected",)),
        _transcript_pair,
        _is_transcript,
    ),
    Format(
        "pair of conversations",
        "chosen is preferred to rejected; the prompt is every message but the last",
        (("chosen",), ("rejected",)),
        _message_pair,
        _is_messages,
    ),
    Format("thumbs", "a true label is desirable, a false one is not", (PROMPT, ("completion",), ("label",)), _judged),
    Format("rated", "a higher score is better", (PROMPT, ("completions",), ("scores",)), _scored),
    Format("demonstration", "every completion is worth imitating", (PROMPT, ("completion",)), _demonstrated),
    Format("prompts", "no completions: prompts to sample from", (PROMPT,), _prompt_only),
)
"""All formats, most specific first."""


# --- the parts of a row ---------------------------------------------------------------------------------------------


def _record(row: Row, prompt: Messages, completions: tuple[str, ...], scores: tuple[float, ...] | None) -> Preference:
    values = row.values
    agreement, weight, group = values.get("agreement"), values.get("weight"), values.get("group")
    try:
        return Preference(
            prompt=prompt,
            completions=completions,
            scores=scores,
            agreement=None if agreement is None else _number(agreement, "agreement"),
            weight=1.0 if weight is None else _number(weight, "weight"),
            group=None if group is None else str(group),
            source=row.source,
        )
    except ValueError as error:
        raise BadRow(Drop.WRONG_VALUE, str(error)) from error


def _pair(row: Row, prompt: Messages, chosen: str, rejected: str) -> Preference:
    scores = (1.0, 0.0)
    for names in _PAIR_SCORES:
        if all(row.values.get(name) is not None for name in names):
            scores = (_number(row.values[names[0]], names[0]), _number(row.values[names[1]], names[1]))
    if scores[0] < scores[1]:
        raise BadRow(Drop.CONTRADICTION, f"chosen {scores[0]:g}, rejected {scores[1]:g}")
    return _record(row, prompt, (chosen, rejected), scores)


def _prompt_and_completion(row: Row) -> tuple[Messages, str]:
    repeated, completion = _completion(row.values.get("completion"), "completion")
    prompt = _prompt(row.values)
    if repeated:
        prompt = _reconcile(prompt, repeated, text_prompt=_column(row.values, PROMPT)[1])
    return prompt, completion


def _column(values: Mapping[str, Any], names: Columns) -> tuple[str, Any]:
    """Return the first of the columns that holds something, with its name."""
    return next(((name, values[name]) for name in names if values.get(name) is not None), (names[0], None))


def _prompt(values: Mapping[str, Any]) -> Messages:
    """Return the prompt: a text is one user turn, below the text of the column `system` where there is one."""
    name, value = _column(values, PROMPT)
    if isinstance(value, list):
        return _messages(value, name)
    text = _text(value, name)
    if name == "instruction" and isinstance(extra := values.get("input"), str) and extra.strip():
        text = f"{text}\n\n{extra}"  # an instruction and the material it is about
    system = _text(values.get("system"), "system")
    turn = Message("user", text)
    return (Message("system", system), turn) if system.strip() else (turn,)


def _completion(value: object, name: str) -> tuple[Messages, str]:
    """Return the turns that stand before the last one, and the last one's text, which the assistant must speak."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return (), _text(value, name)
    messages = _messages(value, name)
    if not messages:
        return (), ""
    if (role := messages[-1].role) != "assistant":
        raise BadRow(Drop.WRONG_ROLE, f"{name} ends with a turn of the {role}")
    return messages[:-1], messages[-1].content


def _reconcile(prompt: Messages, repeated: Messages, text_prompt: object) -> Messages:
    """Return the prompt as a completion column repeats it, which may be longer than a text in the prompt column."""
    same = repeated == prompt
    if isinstance(text_prompt, str) and not same:
        same = prompt[-1] in repeated and len(prompt) == 1
    if not same:
        raise BadRow(Drop.PROMPTS_DIFFER, "the prompt column and the messages before the completion differ")
    return repeated


def _transcript(value: object, name: str) -> tuple[Messages, str]:
    text = _text(value, name)
    head, answer, completion = text.rpartition(_ANSWER)
    if not answer or not _TURN.match(head):
        raise BadRow(Drop.WRONG_VALUE, f"{name} is no transcript of '\\n\\nHuman:' and '\\n\\nAssistant:' turns")
    if _TURN.search(completion):
        raise BadRow(Drop.WRONG_ROLE, f"{name} ends with a turn of the user")
    _, *parts = _TURN.split(head)
    prompt = tuple(
        Message("user" if speaker == "Human" else "assistant", words.strip())
        for speaker, words in zip(parts[::2], parts[1::2], strict=True)
    )
    return prompt, completion.strip()


def _messages(value: list[Any], name: str) -> Messages:
    return tuple(_message(turn, name) for turn in value)


def _message(turn: object, name: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(Drop.WRONG_VALUE, f"{name} holds a {type(turn).__name__} where a message belongs")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow(Drop.WRONG_ROLE, f"role {role!r} in {name}")
    return Message(ROLES[role.lower()], _text(turn.get("content", turn.get("value")), name))


def _text(value: object, name: str) -> str:
    """Return a text; null is the empty one, which the check drops."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(Drop.WRONG_VALUE, f"{name} holds a {type(value).__name__} where a text belongs")
    return value


def _number(value: object, name: str) -> float:
    """Return a finite number; a text that spells one counts (CSV, some hub sets)."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(Drop.WRONG_VALUE, f"{name} is {value!r}, not a finite number")
    return number
