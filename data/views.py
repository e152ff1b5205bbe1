"""What one example is, for each of the views that objectives read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, final

from dpo.data.records import Pair, Preference
from dpo.data.report import Tally
from dpo.data.shelf import pick
from dpo.data.split import prompt_digest

View = Literal["pairs", "judgements", "demonstrations", "comparisons", "rankings", "prompts"]
"""What one example is. Comparisons are pairs with people's scores, rankings all scored completions of a prompt, and
prompts have none: they are to be sampled for."""


@final
@dataclass(frozen=True, slots=True)
class Item:
    """What the views have in common: an example as text."""

    texts: tuple[str, ...]
    preference: float = 1.0
    desirable: bool = True
    scores: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()
    """Shown in place of `texts` where the view has none."""


def items(record: Preference, view: View, min_gap: float | None = None) -> tuple[Item, ...]:
    """Return the examples that a record holds in a view; of pairs, those whose scores differ by `min_gap` or more."""
    return _VIEWS[view](record, min_gap or 0.0)


def distinct_prompts(records: Sequence[Preference], tally: Tally) -> Sequence[Preference]:
    """Return one record for each prompt, one with an answer where any has it; the others are counted as unused."""
    found: dict[bytes, int] = {}
    answered: set[bytes] = set()
    for place, record in enumerate(records):
        key = prompt_digest(record.prompt, exact=True)
        answers = bool(record.demonstrations())
        if key not in found or (answers and key not in answered):
            found[key] = place
        if answers:
            answered.add(key)
    tally.unused += len(records) - len(found)
    return pick(records, found.values())


def supported(*sides: Sequence[Preference]) -> list[View]:
    """Return the views in which any record holds an example, prompts aside, which every file holds."""
    return [view for view in _VIEWS if view != "prompts" and holds(view, *sides)]


def holds(view: View, *sides: Sequence[Preference]) -> bool:
    """Return whether any record holds an example in the view."""
    return any(items(record, view) for record in chain.from_iterable(sides))


def _clear(record: Preference, min_gap: float) -> tuple[Pair, ...]:
    return tuple(pair for pair in record.pairs() if pair.scores[0] - pair.scores[1] >= min_gap)


def _pairs(record: Preference, min_gap: float) -> tuple[Item, ...]:
    return tuple(Item((p.chosen, p.rejected), preference=p.preference) for p in _clear(record, min_gap))


def _comparisons(record: Preference, min_gap: float) -> tuple[Item, ...]:
    return tuple(
        Item((p.chosen, p.rejected), preference=p.preference, scores=p.scores) for p in _clear(record, min_gap)
    )


def _judgements(record: Preference, _: float) -> tuple[Item, ...]:
    return tuple(Item((own.completion,), desirable=own.desirable) for own in record.judgements())


def _demonstrations(record: Preference, _: float) -> tuple[Item, ...]:
    return tuple(Item((own.completion,)) for own in record.demonstrations())


def _rankings(record: Preference, _: float) -> tuple[Item, ...]:
    if (ranking := record.ranking()) is None:
        return ()
    certainty = 1.0 if record.agreement is None else record.agreement
    return (Item(ranking.completions, preference=certainty, scores=ranking.scores),)


def _prompts(record: Preference, _: float) -> tuple[Item, ...]:
    return (Item((), answers=tuple(own.completion for own in record.demonstrations()[:1])),)


_VIEWS: Mapping[View, Callable[[Preference, float], tuple[Item, ...]]] = {
    "pairs": _pairs,
    "judgements": _judgements,
    "demonstrations": _demonstrations,
    "comparisons": _comparisons,
    "rankings": _rankings,
    "prompts": _prompts,
}
