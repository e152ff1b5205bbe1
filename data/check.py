"""Why a row is not used, and the account of all rows.

No row disappears: it is kept, counted under a `Drop`, or counted as unused by the view.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from statistics import fmean, median
from typing import TYPE_CHECKING, Literal, final

from dpo.data.records import Messages, Preference
from dpo.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

OnBadRow = Literal["drop", "error"]

_SHOWN = 3
"""Example rows kept for each reason."""


@final
class Drop(Enum):
    """Every reason for which a row can be dropped: its name, what it means, and what mends it."""

    def __init__(self, label: str, meaning: str, fix: str, harmless: bool = False) -> None:
        self.label = label
        self.meaning = meaning
        self.fix = fix
        self.harmless = harmless
        """True where honest data holds such rows: `on_bad_row="error"` does not stop at them."""

    WRONG_VALUE = (
        "wrong value",
        "a field has a type or value that its column cannot hold",
        "Write texts as strings, scores and weights as finite numbers, labels as true or false.",
    )
    WRONG_ROLE = (
        "wrong role",
        "a turn has an unknown role, or a completion is not spoken by the assistant",
        "Use the roles system, user, assistant and tool, and end completions with an assistant turn.",
    )
    PROMPTS_DIFFER = (
        "prompts differ",
        "the completions answer different prompts",
        "Give all completions of a row the same prompt.",
    )
    CONTRADICTION = (
        "scores contradict",
        "the rejected completion has the higher score",
        "Swap chosen and rejected, or correct the scores.",
    )
    EMPTY_PROMPT = (
        "empty prompt",
        "the prompt, or its last turn, holds no text",
        "Write the prompt, or remove the row.",
    )
    TURNS = (
        "last turn",
        "the prompt does not end with a user or tool turn",
        "End the prompt with the turn that the completion answers.",
    )
    EMPTY_COMPLETION = (
        "empty completion",
        "a completion holds no text",
        "Write the completion, or remove the row.",
    )
    IDENTICAL = (
        "identical completions",
        "all completions are the same text (white space at the ends aside)",
        "Remove the row: it holds no preference.",
    )
    TEMPLATE = (
        "template refuses",
        "the tokenizer's chat template refuses the conversation",
        "Change the turns to those the template takes, or set another chat template.",
    )
    TIE = (
        "tie",
        "all completions have the same score",
        "Nothing to mend: a tie holds no preference.",
        True,
    )
    DUPLICATE = (
        "duplicate",
        "the same prompt, completions, scores and group as an earlier row",
        "Nothing to mend: the first copy is kept.",
        True,
    )
    LEAK = (
        "prompt also in evaluation set",
        "the prompt stands in the evaluation file as well (case and white space aside)",
        "Nothing to mend: the row is kept out of training.",
        True,
    )
    OVERLONG_PROMPT = (
        "over-long prompt",
        "the prompt leaves no room for a completion within max_length tokens",
        "Raise max_length, or set overlong=truncate_prompt.",
        True,
    )
    OVERLONG_COMPLETION = (
        "over-long completion",
        "prompt and longest completion together exceed max_length tokens",
        "Raise max_length, or set overlong=truncate_completion.",
        True,
    )
    IDENTICAL_TOKENS = (
        "identical after truncation",
        "the completions are the same tokens once rendered and truncated",
        "Raise max_length, or set overlong=drop.",
        True,
    )


@final
class BadRow(Exception):  # noqa: N818  # not an error of the program: the caller counts it
    """A row that cannot be used, for `reason`; `detail` says what was got."""

    def __init__(self, reason: Drop, detail: str = "") -> None:
        super().__init__(f"{reason.label}: {detail or reason.meaning}")
        self.reason = reason
        self.detail = detail


def inspect(record: Preference) -> None:
    """Raise `BadRow` where a record holds nothing to learn from.

    Two turns of one role in a row, or a system turn in the middle, are kept: real conversations have them, and a chat
    template that cannot render them says so itself.
    """
    texts = {completion.strip() for completion in record.completions}
    if not record.prompt or not record.prompt[-1].content.strip():
        raise BadRow(Drop.EMPTY_PROMPT)
    if (last := record.prompt[-1].role) not in ("user", "tool"):
        raise BadRow(Drop.TURNS, f"the prompt ends with a turn of the {last}")
    if "" in texts:
        raise BadRow(Drop.EMPTY_COMPLETION)
    if len(record.completions) > 1 and len(texts) == 1:
        raise BadRow(Drop.IDENTICAL)
    if record.scores is not None and len(record.scores) > 1 and len(set(record.scores)) == 1:
        raise BadRow(Drop.TIE)


@final
@dataclass
class Tally:
    """A running count of what happened to the rows."""

    on_bad_row: OnBadRow = "drop"
    dropped: Counter[Drop] = field(default_factory=Counter)
    examples: dict[Drop, list[str]] = field(default_factory=dict)
    unused: int = 0
    truncated: int = 0
    merged: int = 0
    special_tokens: int = 0

    def drop(self, bad: BadRow, source: str) -> None:
        """Count a dropped row.

        Raises:
            DataError: bad rows are errors (`on_bad_row="error"`) and this one is not of a harmless kind.
        """
        if self.on_bad_row == "error" and not bad.reason.harmless:
            raise DataError(f"{source}: {bad}. {bad.reason.fix} Or set on_bad_row=drop to leave such rows out.")
        self.dropped[bad.reason] += 1
        shown = self.examples.setdefault(bad.reason, [])
        if len(shown) < _SHOWN:
            shown.append(f"{source} ({bad.detail})" if bad.detail else source)


@final
@dataclass(frozen=True)
class Spread:
    """Median and 95th percentile of a length in words."""

    median: float
    p95: float


@final
@dataclass(frozen=True)
class Summary:
    """What the kept rows of one file are like."""

    prompt_words: Spread
    completion_words: Spread | None
    """None where no row has a completion."""
    longer_wins: float | None
    """Share of pairs whose chosen completion has more words than the rejected one; None without pairs."""
    desirable: float | None
    """Share of judged completions that are desirable; None without judgements."""
    soft: int
    """Rows whose label is soft: less than all votes are for the better completion."""
    agreement: float | None
    """Mean share of votes for the better completion over these rows; None without any."""
    contradictions: int
    """Pairs that another row states the other way round."""

    @classmethod
    def of(cls, records: Sequence[Preference]) -> "Summary":
        """Summarise at least one record."""
        pairs = [pair for record in records for pair in record.pairs()]
        labels = [judgement.desirable for record in records for judgement in record.judgements()]
        completions = [_words(completion) for record in records for completion in record.completions]
        soft = [share for record in records if (share := record.agreement) is not None and share < 1]
        stated: set[tuple[Messages, str, str]] = {(p.prompt, p.chosen, p.rejected) for p in pairs}
        return cls(
            prompt_words=_spread([sum(_words(m.content) for m in record.prompt) for record in records]),
            completion_words=_spread(completions) if completions else None,
            longer_wins=_share(_words(p.chosen) > _words(p.rejected) for p in pairs),
            desirable=_share(labels),
            soft=len(soft),
            agreement=fmean(soft) if soft else None,
            contradictions=sum((prompt, worse, better) in stated for prompt, better, worse in stated) // 2,
        )


@final
@dataclass(frozen=True)
class Report:
    """What became of every row of one file: `read == kept + total_dropped + unused`."""

    source: str
    format: str
    rule: str
    """In words: how the format says which completion is better."""
    read: int
    kept: int
    dropped: Mapping[Drop, int] = field(default_factory=dict)
    examples: Mapping[Drop, tuple[str, ...]] = field(default_factory=dict)
    """Up to three rows for each reason."""
    unused: int = 0
    """Good rows that hold no example in the view asked for (a thumb down, when demonstrations are asked for; a prompt
    that an earlier row holds, when prompts are)."""
    truncated: int = 0
    """Kept rows whose prompt or completions were cut."""
    merged: int = 0
    """Kept rankings in which equal completions count as one, at the best of their places."""
    special_tokens: int = 0
    """Kept rows whose texts spell a special token; it was tokenised as ordinary text."""
    summary: Summary | None = None

    @property
    def total_dropped(self) -> int:
        """Rows dropped, all reasons together."""
        return sum(self.dropped.values())

    def after(self, *tallies: Tally) -> "Report":
        """Return the report with what later steps did to the kept rows."""
        dropped, examples, kept = Counter(self.dropped), dict(self.examples), self.kept
        for tally in tallies:
            dropped += tally.dropped
            kept -= tally.dropped.total() + tally.unused
            for reason, shown in tally.examples.items():
                examples[reason] = (*examples.get(reason, ()), *shown)[:_SHOWN]
        return replace(
            self,
            kept=kept,
            dropped=dropped,
            examples=examples,
            unused=self.unused + sum(t.unused for t in tallies),
            truncated=self.truncated + sum(t.truncated for t in tallies),
            merged=self.merged + sum(t.merged for t in tallies),
            special_tokens=self.special_tokens + sum(t.special_tokens for t in tallies),
        )

    def enforce(self, max_dropped_share: float) -> None:
        """Raise a `DataError` with the reasons where nothing is left, or too large a share was dropped."""
        share = self.total_dropped / self.read if self.read else 0.0
        if self.total_dropped and (share > max_dropped_share or not self.kept):
            worst = max(self.dropped, key=lambda reason: self.dropped[reason])
            raise DataError(
                "\n".join(
                    [
                        f"{self.source}: {self.total_dropped} of {self.read} rows were dropped ({share:.0%}),"
                        f" expected at most {max_dropped_share:.0%} and at least one row left.",
                        *self._reasons(),
                        f"To mend most of them: {worst.fix} Or raise max_dropped_share.",
                    ]
                )
            )

    def lines(self) -> list[str]:
        """Return the report as plain lines."""
        rows = [f"{name}: {value}" for name, value in self._facts()]
        return [*rows, *self._reasons()]

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain values, ready for JSON."""
        return {
            "source": self.source,
            "format": self.format,
            "rule": self.rule,
            "read": self.read,
            "kept": self.kept,
            "dropped": {reason.label: count for reason, count in self.dropped.items()},
            "examples": {reason.label: list(shown) for reason, shown in self.examples.items()},
            "unused": self.unused,
            "truncated": self.truncated,
            "merged": self.merged,
            "special_tokens": self.special_tokens,
            "summary": asdict(self.summary) if self.summary else None,
        }

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.source), show_header=False)
        for name, value in self._facts():
            table.add_row(Text(name), Text(value))
        for line in self._reasons():
            table.add_row(Text(""), Text(line.strip()))
        return table

    def _facts(self) -> list[tuple[str, str]]:
        facts = [
            ("format", self.format),
            ("rule", self.rule),
            ("rows read", str(self.read)),
            ("rows kept", str(self.kept)),
        ]
        if self.unused:
            facts.append(("rows without an example in this view", str(self.unused)))
        if self.truncated:
            facts.append(("rows truncated", str(self.truncated)))
        if self.merged:
            facts.append(("rankings with equal completions, counted once", str(self.merged)))
        if self.special_tokens:
            facts.append(("rows spelling a special token (kept as text)", str(self.special_tokens)))
        if summary := self.summary:
            facts.append(("words in a prompt", _words_line(summary.prompt_words)))
            if summary.completion_words:
                facts.append(("words in a completion", _words_line(summary.completion_words)))
            if summary.longer_wins is not None:
                facts.append(("pairs in which the longer completion wins", f"{summary.longer_wins:.0%}"))
            if summary.desirable is not None:
                facts.append(("judgements that are desirable", f"{summary.desirable:.0%}"))
            if summary.agreement is not None:
                facts.append(("rows with a soft label", f"{summary.soft}, mean agreement {summary.agreement:.2f}"))
            if summary.contradictions:
                facts.append(("pairs stated both ways round", str(summary.contradictions)))
        facts.append(("rows dropped", str(self.total_dropped)))
        return facts

    def _reasons(self) -> list[str]:
        most_first = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0].label))
        return [
            f"  {count} {reason.label}: {reason.meaning}; for example {', '.join(self.examples[reason])}"
            for reason, count in most_first
        ]


def _words(text: str) -> int:
    return len(text.split())


def _words_line(spread: Spread) -> str:
    return f"{spread.median:g} (median), {spread.p95:g} (95th percentile)"


def _share(flags: Iterable[bool]) -> float | None:
    found = list(flags)
    return sum(found) / len(found) if found else None


def _spread(lengths: list[int]) -> Spread:
    rank = -(-95 * len(lengths) // 100)  # nearest rank: the smallest length that 95 % of the rows do not exceed
    return Spread(median=float(median(lengths)), p95=float(sorted(lengths)[rank - 1]))
