"""From the names of sources to the records worth using, with an account of the others; no tokenizer is needed."""

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, final

from dpo.data.check import BadRow, Drop, inspect
from dpo.data.config import DataConfig, Filter, Source
from dpo.data.read import content, read
from dpo.data.recognise import check_columns, recognise, rename
from dpo.data.records import Preference
from dpo.data.report import Report, Summary, Tally
from dpo.data.shelf import Kind, Shelf, cached, turn_of, turn_row
from dpo.data.split import divide, fraction, held_out, prompt_digest

if TYPE_CHECKING:
    import pyarrow

_HEAD = 20
"""Rows that the format is told by."""

_LATER = {"max_length", "overlong", "per_prompt", "group_weights"}
"""Settings that the records do not depend on."""

_OF_MAIN = ("train", "columns", "label", "limit", "share")
"""Settings of the first source, which stand beside those of all."""


@final
@dataclass(frozen=True)
class Checked:
    """The rows worth using, and the account of the others. No tokenizer has been needed so far."""

    config: DataConfig
    train: Sequence[Preference]
    """In memory, or where they are many in a memory-mapped file; `eval` likewise."""
    eval: Sequence[Preference]
    report: Report
    """Of all training sources together; where a share of them evaluates, of both sides."""
    eval_report: Report | None
    """Of `config.eval`."""
    sources: tuple[Report, ...] = ()
    """Of `config.train` and each of `config.mix`."""


def check(config: DataConfig) -> Checked:
    """Read, recognise, check and split the rows. Many rows are kept in the cache, and found there the next time.

    Raises:
        DataError: a source cannot be read or recognised, or too many of its rows are unusable.
    """
    main = Source.model_validate({name: getattr(config, name) for name in _OF_MAIN})
    sources = (main, *config.mix)
    names = [source.train for source in sources] + ([] if config.eval is None else [config.eval])
    parts, plain = cached(
        [config.model_dump_json(exclude=_LATER), *map(content, names)],
        {"train": RECORDS, "eval": RECORDS},
        partial(_build, config, sources),
    )
    reports = tuple(map(Report.from_dict, plain["sources"]))
    report = replace(Report.together(reports), summary=Summary.from_dict(plain["summary"]))
    if plain["eval"] is not None:
        return Checked(config, parts["train"], parts["eval"], report, Report.from_dict(plain["eval"]), reports)
    return Checked(config, *divide(parts["train"], plain["held_out"]), report, None, reports)


def _build(config: DataConfig, sources: Sequence[Source], shelves: Mapping[str, Shelf[Preference]]) -> dict[str, Any]:
    """Put the records of both sides on their shelves; return the account of all rows."""
    evaluation, training = _Reading(config), _Reading(config, wanted=True)
    own_report = None
    if config.eval is not None:
        own = Source(train=config.eval, columns=config.columns, label=config.label, limit=config.limit)
        summary = Summary.of(evaluation.take(own, shelves["eval"]))
        own_report = replace(evaluation.reports[0], summary=summary).to_dict()
        training.held_out.update(evaluation.prompts)
    summary = Summary.of(chain.from_iterable(training.take(source, shelves["train"]) for source in sources))
    assert summary is not None, "a source without a record is an error"
    return {
        "sources": [report.to_dict() for report in training.reports],
        "summary": asdict(summary),
        "eval": own_report,
        "held_out": [] if config.eval else held_out(training.fractions, config.eval_share, config.train),
    }


@final
@dataclass
class _Reading:
    """Sources that are read one after the other as one set: a duplicate is one of any earlier row."""

    config: DataConfig
    wanted: bool = False
    """Whether shares and filters apply."""
    held_out: set[bytes] = field(default_factory=set)
    """Prompts that must not be trained on."""
    prompts: set[bytes] = field(default_factory=set)
    """Of the records."""
    fractions: "array[float]" = field(default_factory=lambda: array("d"))
    """Of the records' prompts, in order."""
    reports: list[Report] = field(default_factory=list)
    """Of the sources that were read to their end."""
    _seen: set[bytes] = field(default_factory=set)

    def take(self, source: Source, shelf: Shelf[Preference]) -> Iterator[Preference]:
        """Yield the records worth using, each put on the shelf; at the end there is a report of all rows.

        Raises:
            DataError: the source cannot be read or recognised, or too many of its rows are unusable.
        """
        rows = read(source.train, source.limit)
        head = list(islice(rows, _HEAD))
        check_columns(head, source.columns)
        rename_row = partial(rename, columns=source.columns)
        shape = recognise([rename_row(row) for row in head], source.label)
        tally, count, joined = Tally(self.config.on_bad_row), 0, 0
        for row in shape.gather(map(rename_row, chain(head, rows))):
            count, joined = count + row.rows, joined + row.rows - 1
            try:
                record = shape.convert(row)
                self._admit(record, source)
            except BadRow as bad:
                tally.drop(bad, row.source)
                continue
            if source.weight != 1:
                record = replace(record, weight=record.weight * source.weight)
            shelf.add(record)
            yield record
        report = Report(
            source=source.train,
            format=shape.name,
            rule=shape.rule,
            read=count,
            kept=count - joined,
            joined=joined,
            evaluation_only=shape.evaluation_only,
        ).after(tally)
        report.enforce(self.config.max_dropped_share)
        self.reports.append(report)

    def _admit(self, record: Preference, source: Source) -> None:
        """Raise `BadRow` for a record that is not to be used; remember the others."""
        inspect(record)
        if (key := _identity(record)) in self._seen:
            raise BadRow(Drop.DUPLICATE)
        prompt = prompt_digest(record.prompt)
        if self.wanted:
            _want(record, self.config.filter)
            if source.share < 1 and fraction(record.prompt, f"{self.config.seed} share") >= source.share:
                raise BadRow(Drop.NOT_DRAWN)
        self._seen.add(key)
        if prompt in self.held_out:
            raise BadRow(Drop.LEAK)
        self.prompts.add(prompt)
        self.fractions.append(fraction(record.prompt, str(self.config.seed)))


def _want(record: Preference, wanted: Filter) -> None:
    """Raise `BadRow` for a record that is not of the kind asked for."""
    if wanted.min_agreement is not None and (record.agreement or 1.0) < wanted.min_agreement:
        raise BadRow(Drop.FILTERED, f"agreement {record.agreement:g}")
    if wanted.min_gap is not None and record.scores is not None and len(record.scores) > 1:
        gap = max(record.scores) - min(record.scores)
        if gap < wanted.min_gap:
            raise BadRow(Drop.FILTERED, f"the scores differ by {gap:g}")
    for completion in record.completions:
        words = len(completion.split())
        if words < (wanted.min_words or 0) or (wanted.max_words is not None and words > wanted.max_words):
            raise BadRow(Drop.FILTERED, f"a completion of {words} words")


def _identity(record: Preference) -> bytes:
    turns = [(message.role, message.content, message.extra) for message in record.prompt]
    told = [turns, record.completions, record.scores, record.agreement, record.group]
    return sha256(json.dumps(told).encode()).digest()[:16]


# --- records in a file ----------------------------------------------------------------------------------------------


def _schema() -> "pyarrow.Schema":
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    return pa.schema(
        {
            "prompt": pa.list_(pa.struct({"role": text, "content": text, "extra": text})),
            "completions": pa.list_(text),
            "scores": pa.list_(number),
            "agreement": number,
            "weight": number,
            "group": text,
            "feedback": pa.list_(text),
            "source": text,
        }
    )


def _to_row(record: Preference) -> dict[str, Any]:
    return {
        "prompt": [turn_row(turn) for turn in record.prompt],
        "completions": record.completions,
        "scores": record.scores,
        "agreement": record.agreement,
        "weight": record.weight,
        "group": record.group,
        "feedback": record.feedback,
        "source": record.source,
    }


def _from_row(row: Mapping[str, Any]) -> Preference:
    scores = row["scores"]
    return Preference(
        **{
            **row,
            "prompt": tuple(map(turn_of, row["prompt"])),
            "completions": tuple(row["completions"]),
            "scores": None if scores is None else tuple(scores),
            "feedback": tuple(row["feedback"]),
        }
    )


RECORDS = Kind(_schema, _to_row, _from_row)
"""Records as rows of a table: also what `dpo data convert` writes."""
