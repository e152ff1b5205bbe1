"""OpenAssistant: a tree of messages, in which people ranked the replies to each prompter's message.

Source: the card of OpenAssistant/oasst1, Apache-2.0.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import ROLES, as_messages, as_number, record, scores_of_ranks
from dpo.data.read import Row
from dpo.data.records import Preference

_Values = Mapping[str, Any]


def _gather(rows: Iterable[Row]) -> Iterator[Row]:
    """Put each prompter's message together with its ranked replies.

    Replies without a rank, or with one that no other reply has beside it, make a row of their own, as does each message
    that cannot be used or whose parent is absent. All rows are held: a reply may stand far from its parent.
    """
    held = list(rows)
    known: dict[object, _Values] = {}
    for row in held:
        known.setdefault(_id(row.values), row.values)
    replies: defaultdict[object, list[Row]] = defaultdict(list)
    prompters, others = [], []
    for row in held:
        values, parent = row.values, known.get(_parent(row.values), {})
        sound = _id(values) is not None and known[_id(values)] is values and not _marked(values)
        if sound and _role(values) == "user":
            prompters.append(row)
        elif sound and _role(values) == "assistant" and _role(parent) == "user" and not _marked(parent):
            replies[_parent(values)].append(row)
        else:
            others.append(row)
    for row in prompters:
        below = replies[_id(row.values)]
        ranked = [reply for reply in below if reply.values.get("rank") is not None]
        unranked = [reply for reply in below if reply.values.get("rank") is None]
        if len(ranked) < 2:
            ranked, unranked = [], below
        thread = _thread(row.values, known)
        yield _together(thread, [row, *(ranked or unranked)], 1)
        if ranked and unranked:
            yield _together(thread, unranked, 0)
    for row in others:
        yield _together([], [row], 0)


def _together(thread: list[_Values], rows: list[Row], prompts: int) -> Row:
    """Return rows as one, of which the first `prompts` belong to the thread and the others reply to it."""
    replies = [row.values for row in rows[prompts:]]
    return Row({"thread": thread, "replies": replies}, rows[0].source, sum(row.rows for row in rows))


def _thread(values: _Values, known: Mapping[object, _Values]) -> list[_Values]:
    """Return the messages from the first one above down to this one."""
    thread, seen = [values], {_id(values)}
    while (parent := _parent(thread[-1])) is not None and parent in known and parent not in seen:
        thread.append(known[parent])
        seen.add(parent)
    return thread[::-1]


def _id(values: _Values) -> str | None:
    return None if (name := values.get("message_id")) is None else str(name)


def _parent(values: _Values) -> str | None:
    return None if (name := values.get("parent_id")) is None else str(name)


def _role(values: _Values) -> str | None:
    return ROLES.get(str(values.get("role")).lower())


def _marked(values: _Values) -> str:
    """Return why a message should not be used, or nothing."""
    if values.get("deleted"):
        return "deleted is true"
    return "review_result is false" if values.get("review_result") is False else ""


def _convert(row: Row) -> Preference:
    thread, replies = row.values["thread"], row.values["replies"]
    for values in (*thread, *replies):
        if why := _marked(values):
            raise BadRow(Drop.MARKED, f"message {values.get('message_id')}: {why}")
    top = (thread or replies)[0]
    if not thread or top.get("parent_id") is not None:
        raise BadRow(
            Drop.WRONG_VALUE,
            f"message {top.get('message_id')!r} of the role {top.get('role')!r} has the parent"
            f" {top.get('parent_id')!r}, expected an id of its own and, above it, messages of the file",
        )
    prompt = as_messages([_turn(values) for values in thread], "text")
    answers = as_messages([_turn(values) for values in replies], "text")
    ranks = [as_number(values["rank"], "rank") for values in replies if values.get("rank") is not None]
    ordered = len(ranks) == len(replies) > 1
    return record(row, prompt, [answer.content for answer in answers], scores_of_ranks(ranks) if ordered else None)


def _turn(values: _Values) -> dict[str, Any]:
    return {"role": values.get("role"), "content": values.get("text")}


OASST = Format(
    "OpenAssistant",
    "among the replies to one message, rank 0 is the best; replies without a rank are all worth imitating",
    (("message_id",), ("message_tree_id",), ("text",), ("role",)),
    _convert,
    gather=_gather,
    optional=("parent_id", "rank", "deleted", "review_result"),
)
