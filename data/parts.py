"""The parts of a row that formats share: texts, messages, prompts, numbers, and the record made of them.

Each raises `BadRow` for a value that it cannot read.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpo.data.check import BadRow, Drop
from dpo.data.format import Columns
from dpo.data.read import Row
from dpo.data.records import Message, Messages, Preference, Role

PROMPT: Columns = ("prompt", "question", "instruction", "input")
BESIDE_PROMPT: Columns = ("system", "input")
"""Columns that `prompt_of` reads where a text prompt has them beside it."""
COMMON: Columns = ("agreement", "weight", "group", "feedback")
"""Columns that `record` reads in every format."""
PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
BESIDE_PAIR: Columns = ("votes", *(name for names in PAIR_SCORES for name in names))
"""Columns that `chosen_over` reads where a row has them."""
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
TOOL_FIELDS: Mapping[Role, Columns] = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
"""What a message holds beside its text, by who speaks."""
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ANSWER = "\n\nAssistant:"


# --- records --------------------------------------------------------------------------------------------------------


def record(
    row: Row,
    prompt: Messages,
    completions: Sequence[str],
    scores: Sequence[float] | None,
    *,
    agreement: float | None = None,
    group: object = None,
    feedback: Iterable[str] = (),
) -> Preference:
    """Return a row as a record, with what its columns `agreement`, `weight`, `group` and `feedback` add.

    Args:
        row: the row.
        prompt: what the completions answer.
        completions: the texts, in any order.
        scores: one per completion, higher is better; None where they are not compared.
        agreement: share of votes for the better completion, where the format counts them.
        group: annotator or population, where the row has no column for it.
        feedback: what people said, where the format holds it; what the column holds comes behind it.
    """
    values = row.values
    if (own := values.get("agreement")) is not None:
        if agreement is not None:
            raise BadRow(Drop.WRONG_VALUE, "the votes and the column agreement both say how many agree")
        agreement = as_number(own, "agreement")
    weight = values.get("weight")
    group = group if values.get("group") is None else values["group"]
    try:
        return Preference(
            prompt=prompt,
            completions=tuple(completions),
            scores=None if scores is None else tuple(scores),
            agreement=agreement,
            weight=1.0 if weight is None else as_number(weight, "weight"),
            group=None if group is None else str(group),
            feedback=(*feedback, *_said(values.get("feedback"))),
            source=row.source,
        )
    except ValueError as error:
        raise BadRow(Drop.WRONG_VALUE, str(error)) from error


def preferred(
    row: Row,
    prompt: Messages,
    completions: tuple[str, str],
    better: int,
    scores: Sequence[float] | None = None,
    *,
    agreement: float | None = None,
    group: object = None,
    feedback: Iterable[str] = (),
) -> Preference:
    """Return a record of two completions of which the one at `better` (0 or 1) is preferred.

    Raises:
        BadRow: by its scores the other one is better.
    """
    if scores is None:
        scores = (0.0, 1.0) if better else (1.0, 0.0)
    if (high := scores[better]) < (low := scores[1 - better]):
        raise BadRow(Drop.CONTRADICTION, f"preferred {high:g}, the other {low:g}")
    return record(row, prompt, completions, scores, agreement=agreement, group=group, feedback=feedback)


def chosen_over(row: Row, prompt: Messages, chosen: str, rejected: str) -> Preference:
    """Return a record in which `chosen` is preferred, with the scores or the votes that the row has for the two."""
    values, scores, agreement = row.values, None, None
    for first, second in PAIR_SCORES:
        if values.get(first) is not None and values.get(second) is not None:
            scores = (as_number(values[first], first), as_number(values[second], second))
    if values.get("votes") is not None:
        counts = votes_of(values, 2)
        if counts[0] < counts[1]:
            raise BadRow(Drop.CONTRADICTION, f"{counts[0]:g} votes for chosen, {counts[1]:g} for rejected")
        agreement = share(counts)
        scores = counts if agreement == 0.5 else scores
    return preferred(row, prompt, (chosen, rejected), 0, scores, agreement=agreement)


def scores_of_ranks(ranks: Sequence[float]) -> tuple[float, ...]:
    """Return how many places each rank is above the worst: the same numbers whether ranks count from 0 or from 1."""
    if min(ranks, default=0) < 0:
        raise BadRow(Drop.WRONG_VALUE, f"a rank is {min(ranks):g}, expected 0 or more")
    return tuple(max(ranks) - rank for rank in ranks)


def votes_of(values: Mapping[str, Any], count: int) -> tuple[float, ...]:
    """Return the column `votes`: whole numbers, one for each of `count` completions."""
    votes = as_list(values.get("votes"), "votes")
    numbers = tuple(as_number(vote, "votes") for vote in votes)
    if len(numbers) != count or any(number < 0 or number % 1 for number in numbers):
        raise BadRow(Drop.WRONG_VALUE, f"votes are {votes}, expected {count} counts")
    return numbers


def share(votes: Sequence[float]) -> float:
    """Return the winner's share of all votes; 0.5 where nobody voted."""
    return max(votes) / sum(votes) if sum(votes) else 0.5


def _said(value: object) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(as_text(text, "feedback") for text in value)
    text = as_text(value, "feedback")
    return (text,) if text.strip() else ()


# --- prompts and completions ----------------------------------------------------------------------------------------


def column(values: Mapping[str, Any], names: Columns) -> tuple[str, Any]:
    """Return the first of the columns that holds something, with its name."""
    return next(((name, values[name]) for name in names if values.get(name) is not None), (names[0], None))


def prompt_of(values: Mapping[str, Any]) -> Messages:
    """Return the prompt: a text is one user turn, below the text of the column `system` where there is one."""
    name, value = column(values, PROMPT)
    if isinstance(value, list):
        return as_messages(value, name)
    text = as_text(value, name)
    if name == "instruction" and isinstance(extra := values.get("input"), str) and extra.strip():
        text = f"{text}\n\n{extra}"  # an instruction and the material it is about
    system = as_text(values.get("system"), "system")
    turn = Message("user", text)
    return (Message("system", system), turn) if system.strip() else (turn,)


def shared_prompt(values: Mapping[str, Any], repeated: Iterable[Messages]) -> Messages:
    """Return the prompt of a row whose completions may repeat it.

    What they repeat may be longer than a text in the prompt column, of which it then holds the turn.

    Args:
        values: the row's.
        repeated: the turns in front of each completion; () where it stands alone.
    """
    prompt, found = prompt_of(values), set(filter(None, repeated))
    if not found:
        return prompt
    longest = max(found, key=len)
    text = isinstance(column(values, PROMPT)[1], str) and len(prompt) == 1
    if len(found) > 1 or (longest != prompt and not (text and prompt[0] in longest)):
        raise BadRow(Drop.PROMPTS_DIFFER, "the prompt column and the messages before the completions differ")
    return longest


def completion_of(value: object, name: str) -> tuple[Messages, str]:
    """Return the turns that stand before the last one, and the last one's text, which the assistant must speak."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return (), as_text(value, name)
    messages = as_messages(value, name)
    if not messages:
        return (), ""
    if (role := messages[-1].role) != "assistant":
        raise BadRow(Drop.WRONG_ROLE, f"{name} ends with a turn of the {role}")
    if messages[-1].extra:
        raise BadRow(Drop.WRONG_VALUE, f"{name} ends with a call of tools, expected text")
    return messages[:-1], messages[-1].content


def is_transcript(value: object) -> bool:
    """Return whether a value is a text of turns that begin with "\\n\\nHuman:" and "\\n\\nAssistant:"."""
    return isinstance(value, str) and _TURN.match(value) is not None


def transcript(value: object, name: str) -> tuple[Messages, str]:
    """Return a transcript's turns up to its last "\\n\\nAssistant:", and the text behind that."""
    head, answer, completion = as_text(value, name).rpartition(_ANSWER)
    if not answer or not is_transcript(head):
        raise BadRow(Drop.WRONG_VALUE, f"{name} is no transcript of '\\n\\nHuman:' and '\\n\\nAssistant:' turns")
    if _TURN.search(completion):
        raise BadRow(Drop.WRONG_ROLE, f"{name} ends with a turn of the user")
    _, *pieces = _TURN.split(head)
    prompt = tuple(
        Message("user" if speaker == "Human" else "assistant", words.strip())
        for speaker, words in zip(pieces[::2], pieces[1::2], strict=True)
    )
    return prompt, completion.strip()


# --- values ---------------------------------------------------------------------------------------------------------


def as_messages(value: object, name: str) -> Messages:
    """Return a list of messages, in OpenAI's names (role, content) or ShareGPT's (from, value)."""
    return tuple(_message(turn, name) for turn in as_list(value, name))


def _message(turn: object, name: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(Drop.WRONG_VALUE, f"{name} holds a {type(turn).__name__} where a message belongs")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow(Drop.WRONG_ROLE, f"role {role!r} in {name}")
    own = ROLES[role.lower()]
    return Message(own, _content(turn.get("content", turn.get("value")), name), _extra(turn, own, name))


def _extra(turn: Mapping[str, Any], role: Role, name: str) -> str:
    """Return what a message of or to a tool holds beside its text, as JSON; also as this project writes it."""
    if (written := turn.get("extra")) is not None:
        return _compact(as_dict(from_json(written, name), name)) if written else ""
    found = {key: turn[key] for key in TOOL_FIELDS[role] if turn.get(key)} if role in TOOL_FIELDS else {}
    return _compact(found) if found else ""


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _content(value: object, name: str) -> str:
    """Return a message's text; of OpenAI's list of parts, the texts, one below the other."""
    if not isinstance(value, list):
        return as_text(value, name)
    parts = [as_dict(part, name) for part in value]
    if kinds := sorted({str(part.get("type")) for part in parts} - {"text"}):
        raise BadRow(Drop.WRONG_VALUE, f"{name} holds parts of the kind {', '.join(kinds)}, expected text alone")
    return "\n".join(as_text(part.get("text"), name) for part in parts)


def as_text(value: object, name: str) -> str:
    """Return a text; null is the empty one, which the check drops."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(Drop.WRONG_VALUE, f"{name} holds a {type(value).__name__} where a text belongs")
    return value


def as_list(value: object, name: str) -> list[Any]:
    """Return a list."""
    if not isinstance(value, list):
        raise BadRow(Drop.WRONG_VALUE, f"{name} holds a {type(value).__name__} where a list belongs")
    return value


def as_number(value: object, name: str) -> float:
    """Return a finite number; a text that spells one counts (CSV, some hub sets)."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(Drop.WRONG_VALUE, f"{name} is {value!r}, not a finite number")
    return number


def as_index(value: object, name: str) -> int:
    """Return 0 or 1: which of two completions."""
    number = as_number(value, name)
    if number not in (0, 1):
        raise BadRow(Drop.WRONG_VALUE, f"{name} is {value!r}, not 0 or 1")
    return int(number)


def as_dict(value: object, name: str) -> dict[str, Any]:
    """Return an object with named values."""
    if not isinstance(value, dict):
        raise BadRow(Drop.WRONG_VALUE, f"{name} holds a {type(value).__name__} where an object belongs")
    return value


def from_json(value: object, name: str) -> Any:
    """Return what a text holds as JSON; a value that is no text is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        decoded = json.loads(value)
        json.dumps(decoded, ensure_ascii=False).encode()  # half a surrogate pair could not be written to any file
    except (ValueError, RecursionError) as error:
        raise BadRow(Drop.WRONG_VALUE, f"{name} holds a text that is no JSON ({error})") from error
    return decoded
