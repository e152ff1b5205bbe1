"""A survey, and single records, for the terminal. Text from outside is cleaned: it could steer the terminal."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dpo.data.findings import findings
from dpo.data.records import Preference
from dpo.data.render import Overlong
from dpo.data.surveyed import Survey
from dpo.data.tokens import Token
from dpo.evaluation.report.dataset import excerpt
from dpo.evaluation.report.sections import Histogram, Section, count, sections, span
from dpo.evaluation.report.text import clean

_BAR = 28  # characters of the longest bar
_BEST, _OTHER = "green", "yellow"


def show_survey(survey: Survey, console: Console, overlong: Overlong = "drop") -> None:
    """Print a survey: in words what to look at, then the facts, then one record as tokens.

    Args:
        survey: what to show.
        console: where to.
        overlong: what becomes of over-long records.
    """
    console.print(Rule(_plain(survey.source), align="left"))
    if found := findings(survey, overlong):
        console.print(Text("Look at this first:", style="bold yellow"))
        for number, one in enumerate(found, start=1):
            line = Text.assemble(f"{number}. ", _plain(one.what), "\n-> ", _plain(one.fix, "bold"))
            console.print(Padding(line, (0, 2)))
    else:
        console.print(Text("Nothing stands out."))
    for section in sections(survey):
        console.print(_section(section))
    if survey.tokens is not None and survey.tokens.sample:
        console.print(_heading(f"One record as tokens: {survey.tokens.sample_source}"))
        console.print(_sample(survey.tokens.sample))


def record_view(record: Preference, number: int, total: int) -> RenderableType:
    """Return a record as it is shown to people: the prompt, then the completions, the best first.

    Args:
        record: the record.
        number: its place, from 1.
        total: how many records there are.
    """
    return Group(*_record(record, number, total))


def _record(record: Preference, number: int, total: int) -> Iterator[RenderableType]:
    yield Rule(_plain(f"{count(number)} of {count(total)}: {record.source}"), align="left")
    for message in record.prompt:
        yield Text.assemble((f"{message.role}: ", "bold"), _plain(message.content))
    ranking = record.ranking()
    scores = record.scores if ranking is None else ranking.scores
    for place, text in enumerate(record.completions if ranking is None else ranking.completions):
        score = f" (score {scores[place]:g})" if scores else ""
        best = bool(scores) and scores is not None and scores[place] == max(scores)
        title = f"completion {place + 1}{score}: "
        yield Text.assemble((title, f"bold {_BEST if best else _OTHER}"), _plain(text))
    if not record.completions:
        yield Text("no completion", style="dim")
    facts = {
        "agreement": None if record.agreement is None else f"{record.agreement:g}",
        "weight": None if record.weight == 1 else f"{record.weight:g}",
        "group": record.group,
    }
    for name, value in [*facts.items(), *(("feedback", said) for said in record.feedback)]:
        if value is not None:
            yield Text.assemble((f"{name}: ", "bold"), _plain(value))


def _section(section: Section) -> RenderableType:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for ratio, style in ((2, ""), (2, ""), (3, "dim")):
        table.add_column(ratio=ratio, style=style, overflow="fold")
    for fact in section.facts:
        table.add_row(_plain(fact.name), _plain(fact.value), _plain(fact.note))
    return Group(_heading(section.title), table, *map(_histogram, section.histograms))


def _heading(title: str) -> Text:
    return Text.assemble("\n", _plain(title, "bold"))


def _histogram(histogram: Histogram) -> RenderableType:
    lengths = histogram.lengths
    title = (
        f"{histogram.title} in {histogram.unit}: median {count(lengths.median)}, 5 to 95 % {count(lengths.p5)} to"
        f" {count(lengths.p95)}, longest {count(lengths.maximum)}"
    )
    top = max(one.count for one in lengths.bins)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", style="dim")
    table.add_column(style="blue")
    table.add_column(justify="right", style="dim")
    for one in lengths.bins:
        bar = "█" * round(_BAR * one.count / top) or ("▏" if one.count else "")
        table.add_row(span(one.low, one.high), bar, count(one.count))
    return Group(Text(title), Padding(table, (0, 0, 1, 2)))


def _sample(tokens: Sequence[Token]) -> RenderableType:
    """Show the tokens apart, those of the completion in colour; without colours the words say which they are."""
    shown = excerpt(tokens)
    parts: list[RenderableType] = []
    for scored, title in ((False, "prompt, not scored: "), (True, "completion, scored: ")):
        line = Text(title, style="bold")
        for token in shown:
            if token.scored is scored:
                text = clean(token.text).replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
                line.append(text, style=f"not bold {_BEST}" if scored else "not bold")
                line.append("|", style="not bold dim")
        parts.append(line)
    return Group(*parts)


def _plain(text: str, style: str = "") -> Text:
    return Text(clean(text).replace("\r", "\N{REPLACEMENT CHARACTER}"), style=style)
