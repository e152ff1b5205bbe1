"""What the page's tables hold, as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from dpo.estimates import Estimate
from dpo.evaluation.records import Comparison, Cost, Difference, Entry, Measure, WinRate, Wins
from dpo.evaluation.report.text import chance, decimals, duration, has_interval, memory, number, setting


@final
@dataclass(frozen=True)
class Cell:
    """One entry in one measure."""

    value: str
    half: str
    """Half of the interval, or what is said instead of it."""
    mark: str
    """Whether it really differs from the start: a sign, empty where it does not."""
    meaning: str
    """The sign in words."""


@final
@dataclass(frozen=True)
class Row:
    """One entry in the table of measures."""

    entry: Entry
    runs: str
    """How many runs stand behind it."""
    cells: tuple[Cell | None, ...]
    """One a measure; None where it was not measured."""


@final
@dataclass(frozen=True)
class Group:
    """One annotator or population of the data."""

    name: str
    measures: tuple[Measure, ...]
    """Those that were taken on it."""
    rows: tuple[Row, ...]


@final
@dataclass(frozen=True)
class Run:
    """One run's own means."""

    name: str
    """Of its entry."""
    seed: int
    cells: tuple[str | None, ...]
    """One a measure; None where it was not measured."""


@final
@dataclass(frozen=True)
class Gap:
    """One row of a table of differences."""

    first: str
    second: str
    value: str
    interval: str
    p: str
    verdict: str
    real: bool
    left: float
    """Of the interval, in percent of the table's common scale; so are the next three."""
    right: float
    middle: float
    zero: float


@final
@dataclass(frozen=True)
class Gaps:
    """All differences in one measure."""

    measure: Measure
    real: int
    against_start: tuple[Gap, ...]
    between: tuple[Gap, ...]


@final
@dataclass(frozen=True)
class Win:
    """One cell of a matrix of win rates: the row's entry against the column's."""

    plain: str
    controlled: str
    """At equal length."""
    share: float
    """Of the wins, 0 to 1, for the cell's shade."""
    missing: int
    """Verdicts that the judge failed to give."""


@final
@dataclass(frozen=True)
class Matrix:
    """All win rates by one judge."""

    judge: str
    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Win | None, ...]], ...]
    """Name and cells; None on the diagonal and for pairs that were not judged."""
    judged: int
    missing: int
    strengths: tuple[tuple[str, str], ...]
    """Name and strength with half its interval, the strongest first."""
    places: str
    """Share of the votes for the answer shown first, with half its interval; empty for a judge that sees no order."""


@final
@dataclass(frozen=True)
class Setting:
    """One setting of an entry."""

    key: str
    value: str
    tuned: bool
    """Whether tuning chose it."""


def measure_rows(comparison: Comparison) -> list[Row]:
    """Return one row of each entry, the start first."""
    everyone = (comparison.start, *comparison.entries)
    against = {
        (one.measure, one.first): one
        for one in comparison.differences
        if one.second == comparison.start.name and one.real
    }
    columns = [_column(measure, everyone, against) for measure in comparison.measures]
    return [
        Row(entry, _runs(entry, entry is comparison.start), tuple(column[n] for column in columns))
        for n, entry in enumerate(everyone)
    ]


def groups(comparison: Comparison) -> list[Group]:
    """Return a table of measures for each group."""
    found = []
    for name, own in comparison.groups.items():
        everyone = [replace(one, measures=own.get(one.name, {})) for one in (comparison.start, *comparison.entries)]
        measures = tuple(one for one in comparison.measures if any(one.name in entry.measures for entry in everyone))
        columns = [_column(measure, everyone, {}) for measure in measures]
        rows = (
            Row(entry, _runs(entry, n == 0), tuple(column[n] for column in columns)) for n, entry in enumerate(everyone)
        )
        found.append(Group(name, measures, tuple(rows)))
    return found


def runs(comparison: Comparison) -> list[Run]:
    """Return one row of each run, with the decimals of the table of measures."""
    everyone = (comparison.start, *comparison.entries)
    places = {
        one.name: decimals(entry.measures[one.name] for entry in everyone if one.name in entry.measures)
        for one in comparison.measures
    }
    found = []
    for entry in comparison.entries:
        for seed in entry.seeds:
            own = {name: values[seed] for name, values in entry.by_seed.items() if seed in values}
            cells = (number(own[name], at) if name in own else None for name, at in places.items())
            found.append(Run(entry.name, seed, tuple(cells)))
    return found


def gaps(comparison: Comparison) -> list[Gaps]:
    """Return the differences of each measure that has some, the primary measure first."""
    found = []
    for measure in sorted(comparison.measures, key=lambda one: one.name != comparison.primary):
        own = [one for one in comparison.differences if one.measure == measure.name]
        if not own:
            continue
        places = decimals(one.value for one in own)
        ends = [0.0, *(end for one in own for end in _ends(one.value))]
        low, high = min(ends), max(ends)
        rows = [(one, _gap(one, measure, places, low, (high - low) or 1.0)) for one in own]
        found.append(
            Gaps(
                measure,
                sum(one.real for one in own),
                tuple(row for one, row in rows if one.second == comparison.start.name),
                tuple(row for one, row in rows if one.second != comparison.start.name),
            )
        )
    return found


def matrix(wins: Wins, comparison: Comparison) -> Matrix:
    """Return the win rates as rows against columns; of each pair both directions are shown."""
    known: dict[tuple[str, str], Win] = {}
    for rate in wins.rates:
        known[rate.first, rate.second] = _win(rate, reverse=False)
        known[rate.second, rate.first] = _win(rate, reverse=True)
    names = tuple(
        one.name
        for one in (comparison.start, *comparison.entries)
        if any(one.name in (rate.first, rate.second) for rate in wins.rates)
    )
    return Matrix(
        wins.judge,
        names,
        tuple((row, tuple(known.get((row, column)) for column in names)) for row in names),
        sum(rate.judged for rate in wins.rates),
        sum(rate.missing for rate in wins.rates),
        tuple((name, _with_half(one)) for name, one in wins.strengths.items()),
        "" if wins.position_bias is None else _with_half(wins.position_bias.first_shown),
    )


def _with_half(estimate: Estimate) -> str:
    half = f" ± {number(estimate.half_width, 2)}" if has_interval(estimate) else ""
    return number(estimate.value, 2) + half


def cost_cells(cost: Cost) -> tuple[str, ...]:
    """Return time, memory, GPU-hours, steps, completions and tokens."""
    return (
        duration(cost.seconds),
        memory(cost.memory_peak_bytes),
        "no GPU" if cost.gpu_hours is None else f"{number(cost.gpu_hours, 2 if cost.gpu_hours < 10 else 1)} h",
        *(number(value, 0) for value in (cost.steps, cost.completions, cost.tokens)),
    )


def own_settings(entry: Entry) -> list[Setting]:
    """Return an entry's own settings by key, those that tuning chose among them."""
    both: Mapping[str, Any] = {**entry.settings, **entry.tuned}
    return [Setting(key, setting(both[key]), key in entry.tuned) for key in sorted(both)]


def _column(
    measure: Measure, everyone: Sequence[Entry], against: Mapping[tuple[str, str], Difference]
) -> list[Cell | None]:
    places = decimals(one.measures[measure.name] for one in everyone if measure.name in one.measures)
    cells: list[Cell | None] = []
    for entry in everyone:
        estimate = entry.measures.get(measure.name)
        if estimate is None:
            cells.append(None)
            continue
        half = f"± {number(estimate.half_width, places)}" if has_interval(estimate) else "no interval"
        mark, meaning = _mark(measure, against.get((measure.name, entry.name)))
        cells.append(Cell(number(estimate.value, places), half, mark, meaning))
    return cells


def _mark(measure: Measure, real: Difference | None) -> tuple[str, str]:
    if real is None:
        return "", ""
    if measure.better is None:
        return "◆", "really differs from the start"
    if (real.value.value > 0) is (measure.better == "higher"):
        return "▲", "really better than the start"
    return "▼", "really worse than the start"


def _runs(entry: Entry, is_start: bool) -> str:
    if is_start:
        return "before training"
    done, failed = len(entry.seeds), len(entry.failed)
    seeds = "1 seed" if done + failed == 1 else f"{done + failed} seeds"
    return seeds if not failed else f"{done} of {seeds}, {failed} failed"


def _gap(one: Difference, measure: Measure, places: int, low: float, span: float) -> Gap:
    left, right = _ends(one.value)
    interval = (
        f"{number(one.value.low, places, signed=True)} to {number(one.value.high, places, signed=True)}"
        if has_interval(one.value)
        else "no interval"
    )
    return Gap(
        one.first,
        one.second,
        number(one.value.value, places, signed=True),
        interval,
        chance(one.p_adjusted),
        _verdict(one, measure),
        one.real,
        *(round(2 + 96 * (end - low) / span, 2) for end in (left, right, min(max(one.value.value, left), right), 0.0)),
    )


def _ends(value: Estimate) -> tuple[float, float]:
    """What is drawn of an interval; a number that is not finite has no place on a scale."""
    ends = (value.low, value.high) if has_interval(value) else (value.value, value.value)
    return ends if all(abs(end) < float("inf") for end in ends) else (0.0, 0.0)


def _verdict(one: Difference, measure: Measure) -> str:
    if not one.real:
        return "not told apart"
    direction = "higher" if one.value.value > 0 else "lower"
    if measure.better is None:
        return f"real, {direction}"
    return "real, better" if direction == measure.better else "real, worse"


def _win(rate: WinRate, reverse: bool) -> Win:
    value = 1 - rate.plain.value if reverse else rate.plain.value
    return Win(_percent(rate.plain, reverse), _percent(rate.length_controlled, reverse), value, rate.missing)


def _percent(estimate: Estimate | None, reverse: bool) -> str:
    if estimate is None:
        return "not fitted"
    value = 1 - estimate.value if reverse else estimate.value
    half = f" ± {number(100 * estimate.half_width, 0)}" if has_interval(estimate) else ", no interval"
    return f"{number(100 * value, 0)}{half}"
