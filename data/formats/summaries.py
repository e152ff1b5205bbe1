"""OpenAI's comparisons of summaries: Reddit posts and news articles.

Sources: the card of openai/summarize_from_feedback; "Learning to summarize from human feedback", arXiv:2009.01325,
whose code has the forms of the two prompts.
"""

from collections.abc import Mapping
from typing import Any

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import as_dict, as_index, as_list, as_text, preferred
from dpo.data.read import Row
from dpo.data.records import Message, Preference


def _convert(row: Row) -> Preference:
    values = row.values
    summaries = [as_dict(one, "summaries") for one in as_list(values.get("summaries"), "summaries")]
    if len(summaries) != 2:
        raise BadRow(Drop.WRONG_VALUE, f"summaries holds {len(summaries)}, expected 2")
    # They begin with the space that joined them to "TL;DR:".
    first, second = (as_text(one.get("text"), "text").strip() for one in summaries)
    confidence = as_dict(values.get("extra") or {}, "extra").get("confidence")
    return preferred(
        row,
        (Message("user", _prompt(as_dict(values.get("info"), "info"))),),
        (first, second),
        as_index(values.get("choice"), "choice"),
        group=values.get("worker"),
        feedback=() if confidence is None else (f"confidence {confidence}",),
    )


def _prompt(info: Mapping[str, Any]) -> str:
    post, article, title, subreddit = (
        as_text(info.get(name), name) for name in ("post", "article", "title", "subreddit")
    )
    if post.strip():
        return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    return f"Article:\n{article}\n\nTL;DR:" if article.strip() else ""


SUMMARIES = Format(
    "summarize_from_feedback",
    "choice is the number, 0 or 1, of the preferred summary",
    (("info",), ("summaries",), ("choice",)),
    _convert,
    optional=("worker", "extra"),
)
