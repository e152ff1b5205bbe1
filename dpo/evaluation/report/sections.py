"""A survey as sections of facts: what the page and the terminal both show."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from dpo.data.report import Report
from dpo.data.statistics import Lengths
from dpo.data.surveyed import Names, Side, Survey, Twins
from dpo.data.tokens import TokenSurvey
from dpo.estimates import Estimate

_SIMILAR = "80 % of the word pairs in common; at least so many"


@final
@dataclass(frozen=True)
class Fact:
    """One line: what was counted, what came out, and, where it is not plain, what that means."""

    name: str
    value: str
    note: str = ""


@final
@dataclass(frozen=True)
class Histogram:
    """How long texts are."""

    title: str
    unit: str
    lengths: Lengths


@final
@dataclass(frozen=True)
class Section:
    """Facts that belong together, and the histograms below them."""

    title: str
    facts: tuple[Fact, ...]
    histograms: tuple[Histogram, ...] = ()


def sections(survey: Survey) -> tuple[Section, ...]:
    """Return all that a survey holds but its findings and its sample."""
    found = [Section("Rows", tuple(_rows(survey.report)))]
    found += [Section(f"Rows of {report.source}", tuple(_rows(report))) for report in survey.sources]
    if survey.eval_report is not None:
        found.append(Section("Rows of the evaluation file", tuple(_rows(survey.eval_report))))
    found.append(_side("Training records", survey.train))
    if survey.eval is not None:
        found.append(_side("Evaluation records", survey.eval))
    if (leaks := survey.leaks) is not None:
        facts = (
            Fact("prompt also in training", count(leaks.repeated), "case and white space aside"),
            Fact("in training but for punctuation", count(leaks.near)),
            Fact("similar to one in training", count(leaks.similar), _SIMILAR),
            *_examples(leaks.examples),
        )
        found.append(Section(f"Leakage into the {count(leaks.records)} evaluation records", facts))
    if survey.tokens is not None:
        found.append(_tokens(survey.tokens))
    return tuple(found)


def count(value: int) -> str:
    """Return a whole number with its thousands apart."""
    return f"{value:,}"


def share(value: Estimate) -> str:
    """Return a share with its interval, in percent."""
    return f"{value.value:.1%} [{value.low:.1%}, {value.high:.1%}]"


def span(low: int, high: int) -> str:
    """Return what a bin of a histogram holds."""
    return count(low) if low == high else f"{low:,}-{high:,}"


def _rows(report: Report) -> Iterator[Fact]:
    yield Fact("format", report.format, report.rule)
    yield Fact("read", count(report.read))
    yield Fact("kept", count(report.kept), _of(report.kept, report.read))
    if report.joined:
        yield Fact("joined", count(report.joined), "rows that became one record with another of the same prompt")
    for reason, dropped in sorted(report.dropped.items(), key=lambda item: -item[1]):
        examples = ", ".join(report.examples.get(reason, ()))
        yield Fact(f"dropped: {reason.label}", count(dropped), f"{reason.meaning}: {examples}" if examples else "")


def _side(title: str, side: Side) -> Section:
    histograms = [Histogram("Prompts", "words", side.prompt_words)]
    if side.completion_words is not None:
        histograms.append(Histogram("Completions", "words", side.completion_words))
    return Section(title, tuple(_side_facts(side)), tuple(histograms))


def _side_facts(side: Side) -> Iterator[Fact]:
    yield Fact("records", count(side.records))
    for completions, records in side.completions:
        kind = {0: "without completion", 1: "with 1 completion"}.get(completions, f"with {completions} completions")
        yield Fact(kind, count(records), _of(records, side.records))
    if side.unscored:
        yield Fact("not compared", count(side.unscored), "completions without scores: demonstrations")
    if (pairs := side.pairs) is not None:
        yield Fact("pairs", count(pairs.n))
        yield Fact("stated again", count(pairs.restated), "the same pair in an earlier record")
        yield Fact("stated both ways", count(pairs.contradictions), "two records contradict each other")
        yield from _examples(pairs.examples)
        if pairs.longer_wins is not None:
            yield Fact("the longer wins", share(pairs.longer_wins), "of pairs that differ in their number of words")
        yield Fact("equally long", f"{pairs.equal_length:.1%}", "pairs with the same number of words")
        rule = "longer" if pairs.longer else "shorter"
        yield Fact("length alone", share(pairs.by_length), f'pairs that "the {rule} wins" gets right; 50 % is chance')
    if (thumbs := side.thumbs) is not None:
        yield Fact("desirable", share(thumbs.desirable), "of single completions with a label")
        if thumbs.by_length is not None:
            note = "chance that a desirable completion is longer than an undesirable one (AUC); 50 %: no bias"
            yield Fact("length alone", share(thumbs.by_length), note)
    if (votes := side.votes) is not None:
        soft = f"{count(votes.soft)} of {count(votes.n)} soft, {count(votes.undecided)} undecided (0.5)"
        yield Fact("agreement", f"{votes.mean:.3f}", f"mean; {soft}")
    repeats = side.repeats
    yield Fact("different prompts", count(repeats.prompts), "case and white space aside")
    yield Fact("prompt repeated", count(repeats.repeated), "records with the prompt of an earlier one")
    yield Fact("nearly repeated", count(repeats.near), "equal but for punctuation")
    yield Fact("similar prompt", count(repeats.similar), _SIMILAR)
    yield from _examples(repeats.examples)
    if side.weightless:
        yield Fact("weight 0", count(side.weightless))
    if side.feedback:
        yield Fact("feedback in words", count(side.feedback), "kept, never trained on")
    yield from _names("group", side.groups)
    if side.sources.different > 1:
        yield from _names("source", side.sources)


def _tokens(tokens: TokenSurvey) -> Section:
    kind = "a random sample of the training records" if tokens.sampled else "all training records"
    facts = [Fact("tokenizer", tokens.tokenizer), Fact("records tokenised", count(tokens.records), kind)]
    if tokens.over is not None:
        facts.append(
            Fact(f"over {count(tokens.max_length)} tokens", share(tokens.over), "prompt and longest completion")
        )
    if tokens.refused:
        facts.append(
            Fact("not rendered", count(tokens.refused), "the chat template refuses them, or they hold no token")
        )
    facts.append(Fact("spelling special tokens", count(tokens.special_records), ", ".join(tokens.special_examples)))
    facts += [Fact(f"spelling {spelling}", count(records)) for spelling, records in tokens.special]
    histograms = [Histogram("Prompts", "tokens", tokens.prompt)] if tokens.prompt else []
    histograms += [Histogram("Completions", "tokens", tokens.completion)] if tokens.completion else []
    return Section("Tokens", tuple(facts), tuple(histograms))


def _names(kind: str, names: Names | None) -> Iterator[Fact]:
    if names is not None:
        yield Fact(f"different {kind}s", count(names.different))
        for name, records in names.largest:
            yield Fact(f"{kind} {name}", count(records))


def _examples(twins: Twins) -> Sequence[Fact]:
    return [Fact("for instance", f"{one} and {other}") for one, other in twins]


def _of(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
