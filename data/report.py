"""The account of all rows: each is kept, counted under a `Drop`, or counted as unused by the view or as joined."""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any, final

from dpo.data.check import BadRow, Drop, OnBadRow
from dpo.data.records import Preference
from dpo.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 3
"""Example rows kept for each reason."""

_COUNTS = ("unused", "truncated", "merged", "special_tokens")
"""What a tally and a report both count, beside what is dropped."""


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

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Tally":
        """Return what `to_dict` wrote."""
        return cls(
            dropped=Counter({Drop.labelled(label): count for label, count in plain["dropped"].items()}),
            examples={Drop.labelled(label): shown for label, shown in plain["examples"].items()},
            **{name: plain[name] for name in _COUNTS},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain values, ready for JSON."""
        return {
            "dropped": {reason.label: count for reason, count in self.dropped.items()},
            "examples": {reason.label: shown for reason, shown in self.examples.items()},
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def add(self, other: "Tally") -> None:
        """Count what the other has counted as well."""
        self.dropped += other.dropped
        for reason, shown in other.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *shown][:_SHOWN]
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

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
    def of(cls, records: Iterable[Preference]) -> "Summary | None":
        """Summarise the records, read once; only numbers are held of them. None where there are none."""
        prompts, completions = array("I"), array("I")
        labels, longer, soft = [0, 0], [0, 0], [0.0, 0.0]
        stated: set[int] = set()
        contradictions = 0
        for record in records:
            prompts.append(sum(_words(turn.content) for turn in record.prompt))
            completions.extend(_words(completion) for completion in record.completions)
            if record.agreement is not None and record.agreement < 1:
                _count(soft, record.agreement)
            for judgement in record.judgements():
                _count(labels, judgement.desirable)
            for pair in record.pairs():
                _count(longer, _words(pair.chosen) > _words(pair.rejected))
                new = hash((pair.prompt, pair.chosen, pair.rejected))
                if new not in stated:
                    stated.add(new)
                    contradictions += hash((pair.prompt, pair.rejected, pair.chosen)) in stated
        if not prompts:
            return None
        return cls(
            prompt_words=_spread(prompts),
            completion_words=_spread(completions) if completions else None,
            longer_wins=_mean(longer),
            desirable=_mean(labels),
            soft=int(soft[0]),
            agreement=_mean(soft),
            contradictions=contradictions,
        )

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Summary":
        """Return what `asdict` wrote."""
        spreads = {name: plain[name] and Spread(**plain[name]) for name in ("prompt_words", "completion_words")}
        return cls(**{**plain, **spreads})


@final
@dataclass(frozen=True)
class Report:
    """What became of every row: `read == kept + total_dropped + unused + joined`."""

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
    joined: int = 0
    """Rows that another row of the same prompt took in: together they are one record."""
    truncated: int = 0
    """Kept rows whose prompt or completions were cut."""
    merged: int = 0
    """Kept rankings in which equal completions count as one, at the best of their places."""
    special_tokens: int = 0
    """Kept rows whose texts spell a special token; it was tokenised as ordinary text."""
    summary: Summary | None = None

    evaluation_only: str = ""
    """Why the set must not be trained on; empty where it may."""

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Report":
        """Return what `to_dict` wrote."""
        return cls(
            **{
                **plain,
                "dropped": {Drop.labelled(label): count for label, count in plain["dropped"].items()},
                "examples": {Drop.labelled(label): tuple(shown) for label, shown in plain["examples"].items()},
                "summary": plain["summary"] and Summary.from_dict(plain["summary"]),
            }
        )

    @property
    def total_dropped(self) -> int:
        """Rows dropped, all reasons together."""
        return sum(self.dropped.values())

    @property
    def faulty(self) -> int:
        """Rows dropped that the settings did not ask to leave out."""
        return sum(count for reason, count in self.dropped.items() if not reason.asked)

    @classmethod
    def together(cls, reports: Sequence["Report"]) -> "Report":
        """Return the account of several sources that were mixed."""
        if len(reports) == 1:
            return reports[0]
        first = reports[0]
        nothing = replace(
            first,
            source=" + ".join(one.source for one in reports),
            format=" + ".join(dict.fromkeys(one.format for one in reports)),
            rule="; ".join(dict.fromkeys(one.rule for one in reports)),
            read=sum(one.read for one in reports),
            kept=sum(one.read - one.joined for one in reports),
            joined=sum(one.joined for one in reports),
            dropped={},
            examples={},
            summary=None,
            **dict.fromkeys(_COUNTS, 0),
        )
        return nothing.after(
            *(
                Tally(
                    dropped=Counter(one.dropped),
                    examples={reason: list(shown) for reason, shown in one.examples.items()},
                    **{name: getattr(one, name) for name in _COUNTS},
                )
                for one in reports
            )
        )

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
        share = self.faulty / self.read if self.read else 0.0
        if share > max_dropped_share or (self.total_dropped and not self.kept):
            lost = self.faulty if share > max_dropped_share else self.total_dropped
            worst = max(self.dropped, key=lambda reason: (lost > self.faulty or not reason.asked, self.dropped[reason]))
            raise DataError(
                "\n".join(
                    [
                        f"{self.source}: {lost} of {self.read} rows were dropped ({lost / self.read:.0%}),"
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
            "joined": self.joined,
            "truncated": self.truncated,
            "merged": self.merged,
            "special_tokens": self.special_tokens,
            "summary": asdict(self.summary) if self.summary else None,
            "evaluation_only": self.evaluation_only,
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
        if self.joined:
            facts.append(("rows joined with another into one record", str(self.joined)))
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


def _count(into: list[Any], value: float) -> None:
    into[0] += 1
    into[1] += value


def _mean(counted: Sequence[float]) -> float | None:
    return counted[1] / counted[0] if counted[0] else None


def _spread(lengths: Sequence[int]) -> Spread:
    rank = -(-95 * len(lengths) // 100)  # nearest rank: the smallest length that 95 % of the rows do not exceed
    return Spread(median=float(median(lengths)), p95=float(sorted(lengths)[rank - 1]))
