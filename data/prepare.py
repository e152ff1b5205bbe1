"""From checked rows to tokenised examples."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, Any, final

from dpo.data.check import BadRow, Drop
from dpo.data.config import DataConfig
from dpo.data.examples import EXAMPLES, Example
from dpo.data.load import Checked, check
from dpo.data.mismatch import with_mismatched
from dpo.data.records import Preference
from dpo.data.render import Renderer
from dpo.data.report import Report, Tally
from dpo.data.shelf import Shelf, cached, digest
from dpo.data.views import Item, View, distinct_prompts, holds, items, supported
from dpo.data.weigh import capped, group_factors
from dpo.errors import DataError

if TYPE_CHECKING:
    from hashlib import _Hash

    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class Prepared:
    """Everything a run trains and evaluates on."""

    train: Sequence[Example]
    """In memory, or where they are many in a memory-mapped file; `eval` likewise."""
    eval: Sequence[Example]
    report: Report
    eval_report: Report | None
    fingerprint: str
    """SHA-256 over ids, labels, scores and weights of all examples in order, and over the answers that go with prompts:
    equal exactly when runs see the same data."""


def prepare(
    source: Checked | DataConfig, tokenizer: "PreTrainedTokenizerBase", view: View, mismatched: bool = False
) -> Prepared:
    """Tokenise the rows in one view. Many examples are kept in the cache, and found there the next time.

    Args:
        source: checked rows, or the configuration to check first.
        tokenizer: the model's.
        view: what one example is.
        mismatched: give every judgement a completion of another prompt of its side as well. It is cut, where it must
            be, to the room that its new prompt leaves.

    Raises:
        ValueError: mismatched completions are asked for outside judgements.
        DataError: the view is empty, too many rows are unusable, a side ends without examples, a group that is given a
            weight has no example, or a side that needs mismatched completions holds one prompt only.
    """
    if mismatched and view != "judgements":
        raise ValueError(f"prepare: mismatched completions belong to the view 'judgements', got {view!r}")
    checked = check(source) if isinstance(source, DataConfig) else source
    config = checked.config
    if not holds(view, checked.train, checked.eval):
        raise DataError(_unsupported(checked, view))
    room = 1 if view == "prompts" else 0  # what is yet to be sampled has one token at least
    renderer = Renderer(tokenizer, config.max_length - room, config.overlong)
    made_of = [digest(checked.train), digest(checked.eval), _identity(tokenizer), view, config.model_dump_json()]
    parts, plain = cached(made_of, _SIDES, partial(_tokenise_sides, checked, renderer, view))
    tallies = {side: Tally.of(plain[side]) for side in _SIDES}
    if mismatched or config.per_prompt or config.group_weights:
        parts, plain = cached([*made_of, mismatched], _SIDES, partial(_finish, parts, config, mismatched))
        tallies["train"].add(Tally.of(plain["capped"]))
    report, eval_report = checked.report, checked.eval_report
    if eval_report is None:
        report = report.after(tallies["train"], tallies["eval"])
    else:
        report, eval_report = report.after(tallies["train"]), eval_report.after(tallies["eval"])
        eval_report.enforce(config.max_dropped_share)
    report.enforce(config.max_dropped_share)
    for side, rows in (("train", checked.train), ("eval", checked.eval)):
        if not parts[side] and (rows or side == "train"):
            raise DataError(
                f"{report.source}: got no {side} example in the view {view!r} from {len(rows)} rows, expected at least"
                " one. Give more rows, or change eval_share (0 evaluates on none)."
            )
    return Prepared(parts["train"], parts["eval"], report, eval_report, plain["fingerprint"])


_SIDES = {"train": EXAMPLES, "eval": EXAMPLES}


def held_out_pairs(checked: Checked, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Return the pairs among the held-out rows, whatever view is trained on; none where there are none that fit."""
    tally = Tally("drop")  # the account is that of `prepare`
    renderer = Renderer(tokenizer, checked.config.max_length, checked.config.overlong)
    return list(_tokenise(checked.eval, renderer, "pairs", tally))


def _tokenise_sides(
    checked: Checked, renderer: Renderer, view: View, shelves: Mapping[str, Shelf[Example]]
) -> dict[str, Any]:
    config, fingerprint = checked.config, sha256()
    plain: dict[str, Any] = {}
    for side, records in (("train", checked.train), ("eval", checked.eval)):
        tally = Tally(config.on_bad_row)
        source = distinct_prompts(records, tally) if view == "prompts" else records
        for example in _tokenise(source, renderer, view, tally, config.filter.min_gap if side == "train" else None):
            _put(side, example, shelves, fingerprint)
        plain[side] = tally.to_dict()
    return {**plain, "fingerprint": fingerprint.hexdigest()}


def _finish(
    sides: Mapping[str, Sequence[Example]],
    config: DataConfig,
    mismatched: bool,
    shelves: Mapping[str, Shelf[Example]],
) -> dict[str, Any]:
    """Cap and weigh the training examples, and give those of both sides a mismatched completion where asked for."""
    tally, fingerprint = Tally(config.on_bad_row), sha256()
    for side, found in sides.items():
        examples: Iterable[Example] = found
        if side == "train":
            found = capped(found, config, tally)
            factors = group_factors(found, config.group_weights)
            examples = (replace(one, weight=one.weight * factors.get(one.group, 1.0)) for one in found)
        if mismatched:
            examples = with_mismatched(found, examples, side, config)
        for example in examples:
            _put(side, example, shelves, fingerprint)
    return {"capped": tally.to_dict(), "fingerprint": fingerprint.hexdigest()}


def _tokenise(
    records: Iterable[Preference], renderer: Renderer, view: View, tally: Tally, min_gap: float | None = None
) -> Iterator[Example]:
    """Yield the examples of all records. A record whose completions do not all fit is dropped as a whole."""
    for record in records:
        own = items(record, view, min_gap)
        if not own:
            tally.unused += 1
            continue
        texts = tuple(dict.fromkeys(chain.from_iterable(item.texts for item in own)))
        try:
            rendered = renderer.render(record.prompt, texts, record.source)
            ids = dict(zip(texts, rendered.completions, strict=True))
            distinct = [(item, _distinct(item, ids)) for item in own]
            kept = [(item, places) for item, places in distinct if len(places) >= min(2, len(item.texts))]
            if not kept:
                raise BadRow(Drop.IDENTICAL_TOKENS if rendered.truncated else Drop.IDENTICAL)
            found = [
                Example(
                    prompt=rendered.prompt,
                    completions=tuple(ids[item.texts[n]] for n in places),
                    preference=item.preference,
                    desirable=item.desirable,
                    weight=record.weight,
                    source=record.source,
                    prompt_messages=record.prompt,
                    texts=tuple(item.texts[n] for n in places) or item.answers,
                    group=record.group,
                    scores=tuple(item.scores[n] for n in places) if item.scores else (),
                )
                for item, places in kept
            ]
            if view == "rankings" and len(set(found[0].scores)) == 1:
                raise BadRow(Drop.TIE, "the completions that differ have the same score")
        except BadRow as bad:
            tally.drop(bad, record.source)
            continue
        tally.truncated += rendered.truncated
        tally.special_tokens += rendered.spells_special
        tally.merged += any(len(places) < len(item.texts) for item, places in kept)
        yield from found


def _distinct(item: Item, ids: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Return the places of an item's completions, without those that equal an earlier one, hence a better or equal one.

    Equal are the same tokens, and the same text but for white space at the ends.
    """
    seen: set[str | tuple[int, ...]] = set()
    places: list[int] = []
    for place, text in enumerate(item.texts):
        names = {text.strip(), ids[text]}
        if not names & seen:
            places.append(place)
        seen |= names
    return places


def _unsupported(checked: Checked, view: View) -> str:
    held = supported(checked.train, checked.eval)
    return (
        f"{checked.report.source}: got {checked.report.format!r} rows ({checked.report.rule}), expected rows that hold"
        f" {view}. They hold {' and '.join(held) or 'prompts only'}: choose an objective with such a view, or"
        " other data."
    )


def _put(side: str, example: Example, shelves: Mapping[str, Shelf[Example]], fingerprint: "_Hash") -> None:
    """Put an example on its side's shelf; the fingerprint sees all of it that a run depends on."""
    e = example
    values: list[object] = [side, e.prompt, e.completions, e.preference, e.desirable, e.weight]
    if e.scores:
        values.append(e.scores)
    if not e.completions:
        values.append(e.texts)
    fingerprint.update(json.dumps(values).encode() + b"\n")
    shelves[side].add(example)


def _identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a hash of all that decides which ids a text becomes."""
    import tokenizers
    import transformers

    versions = [transformers.__version__, tokenizers.__version__]
    own = [tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()]
    return sha256(json.dumps([*versions, *own], default=str).encode()).hexdigest()
