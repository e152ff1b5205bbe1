"""From finished runs to what can be said about them: estimates, differences, win rates, and the verdict in words.

Nothing here needs a model: a comparison is rebuilt from the folders of its runs. Prompts are the paired units, seeds
the second source of noise (`dpo.evaluation.statistics`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, final

import numpy as np

from dpo.estimates import LEVEL, Estimate
from dpo.evaluation.achieved import Achieved
from dpo.evaluation.diversity import distinct_n, self_bleu
from dpo.evaluation.judges import Judge, Question, Verdict, position_bias
from dpo.evaluation.overoptimisation import overoptimised, past_best
from dpo.evaluation.probes import CHOICES, FLIPS, HARNESS, SHIFT, TEXT
from dpo.evaluation.records import (
    START,
    Comparison,
    Cost,
    Difference,
    Entry,
    Measure,
    Point,
    SideBySide,
    Trained,
    WinRate,
    Wins,
)
from dpo.evaluation.samples import Answer, Spoken
from dpo.evaluation.statistics import SeedNoise, corrected, difference, over_seeds, pooled_seed_noise
from dpo.evaluation.winrate import bradley_terry, length_controlled, preference_from_scores, verdict_noise, win_rate
from dpo.metrics import METRICS

GOLD, PROXY, ACCURACY, MARGIN, KL, LENGTH = (
    "eval/gold_reward",
    "eval/proxy_reward",
    "eval/pair/accuracy",
    "eval/pair/margin",
    "kl/policy_reference",
    "eval/length",
)
DISTINCT, SELF_BLEU = "eval/distinct_2", "eval/self_bleu"

TITLES: Mapping[str, str] = {
    GOLD: "gold reward",
    PROXY: "reward model",
    ACCURACY: "pair accuracy",
    MARGIN: "pair margin",
    KL: "KL to start",
    LENGTH: "length",
    DISTINCT: "distinct bigrams",
    SELF_BLEU: "self-BLEU",
    CHOICES: "right choices",
    FLIPS: "sycophantic flips",
    SHIFT: "sycophantic shift",
    TEXT: "plain text",
    HARNESS: "lm-eval",
}
"""The measures of a comparison, in the order of its table."""

BY_GOLD = "gold reward"
"""Name of the judge that the gold reward is."""

BY_PROXY = "reward model"
"""Likewise, where one reward model scored all answers."""

OWN_PROXY = Measure(
    PROXY,
    "own reward model",
    "own scale",
    "Mean over the prompts of what the reward model that an entry was trained on says of its answers. Each entry has "
    "its own, on a scale of its own: nothing is compared between them.",
    None,
)
"""What the reward model's measure is where there is not one for all."""

PER_RUN = (DISTINCT, SELF_BLEU)
"""Measures of all of a run's answers together: one number a run, with seeds as the only units."""

SAMPLES_SHOWN = 12
"""Prompts whose answers are shown side by side."""

FEW_PROMPTS = 30
"""Below so many prompts the report warns."""

FEW_DEGREES = 4
"""Below so many degrees of freedom of the seeds' spread it warns too: entries times seeds less one."""

Values = Mapping[str, np.ndarray[Any, Any]]
"""By entry: (seeds, prompts), NaN where missing."""


@final
@dataclass(frozen=True)
class Asked:
    """What was to be compared: the frame that finished runs are put into."""

    title: str
    entries: Mapping[str, str]
    """In order: the name of each, and what it is in a line."""
    seeds: tuple[int, ...]
    start: Achieved
    """The model before training, on the prompts of all runs; empty where it was not measured."""
    facts: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    """What is known beforehand, such as untuned settings."""
    failed: Mapping[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])
    """The message of every run that failed."""
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """[entry]: the settings that tuning chose."""


def compare(asked: Asked, runs: Sequence[Trained], judges: Sequence[Judge] = ()) -> Comparison:
    """Return all that can be said about the runs.

    Args:
        asked: what was to be compared.
        runs: those that finished, at most one of each entry and seed.
        judges: each is asked about every pair of entries, the start included, prompt by prompt.
    """
    of = {name: {run.seed: run for run in runs if run.entry == name} for name in asked.entries}
    present = [name for name in asked.entries if of[name]]
    own_proxies = not _one_proxy([asked.start, *(run.achieved for run in runs)])
    values = {name: _values(name, present, of, asked.start) for name in TITLES}
    if own_proxies:
        values[PROXY].pop(START, None)  # on whichever scale it is, it is not that of all
    measures = tuple(
        OWN_PROXY
        if name == PROXY and own_proxies
        else Measure(name, title, METRICS[name].unit, METRICS[name].estimator, METRICS[name].better)
        for name, title in TITLES.items()
        if any(np.isfinite(one).any() for one in _trained(values[name]).values())
    )
    compared = [one for one in measures if one is not OWN_PROXY]
    noise = {one.name: pooled_seed_noise(_trained(values[one.name])) for one in compared}
    differences = tuple(d for one in compared for d in _differences(one.name, values[one.name], noise[one.name]))
    wins, unjudged = _wins(asked, of, present, judges, own_proxies)
    gained = _own_gains(of) if own_proxies else differences
    names = [one.name for one in measures]
    primary = next((name for name in (GOLD, ACCURACY) if name in names), "")
    shared, own = _settings(of)
    entries = tuple(_entry(name, asked, of[name], measures, values, noise, own.get(name, {})) for name in asked.entries)
    start = _start(measures, values)
    missing = [f"{name}, seed {seed}" for name in asked.entries for seed in asked.seeds if seed not in of[name]]
    return Comparison(
        title=asked.title,
        facts=asked.facts,
        verdicts=(
            *_verdicts(primary, present, differences),
            *overoptimised(_against_start(PROXY, gained), _against_start(GOLD, differences)),
            *(line for one in entries for line in past_best(one, start)),
            *_judged(wins),
            *_lengthy(wins),
        ),
        warnings=(*_warnings(of, missing, unjudged, measures, values), *_biased(wins), *asked.warnings),
        partial=bool(missing) or unjudged > 0,
        primary=primary,
        measures=measures,
        start=start,
        entries=entries,
        differences=differences,
        wins=wins,
        samples=_side_by_side(asked, of, present),
        settings=shared,
        groups=_groups(of, present, measures, asked.start),
        own_proxies=OWN_PROXY in measures,
    )


def _one_proxy(everyone: Sequence[Achieved]) -> bool:
    """Tell whether one and the same reward model scored all answers, those of the start included."""
    scored_by = {one.spoken.proxy_by for one in everyone if one.spoken is not None}
    return len(scored_by) == 1 and "" not in scored_by


def _against_start(measure: str, differences: Sequence[Difference]) -> list[Difference]:
    return [one for one in differences if one.measure == measure and one.second == START]


def _own_gains(of: Mapping[str, Mapping[int, Trained]]) -> list[Difference]:
    """Return how far each entry raised its own reward model above what that says of the reference's answers."""
    gains: dict[str, list[Mapping[str, float]]] = {}
    for name, runs in of.items():
        for spoken in (run.achieved.spoken for run in runs.values()):
            if spoken is not None and spoken.proxy is not None and spoken.reference_proxy:
                both = zip(_units(spoken), spoken.proxy, spoken.reference_proxy, strict=True)
                gains.setdefault(name, []).append({unit: after - before for unit, after, before in both})
    found = []
    for name, rows in gains.items():
        values = _table_of(rows, _all_units([rows]))
        if _comparable(values, values):
            noise = pooled_seed_noise({name: values})  # other entries' are on other scales
            found.append((name, START, *difference(values, np.zeros_like(values), noise, against_start=True)))
    return _tested(PROXY, found)


def _groups(
    of: Mapping[str, Mapping[int, Trained]], present: Sequence[str], measures: Sequence[Measure], start: Achieved
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Return every measure of every entry on the pairs and prompts of each group."""
    apart = {name: {seed: run.achieved.groups() for seed, run in of[name].items()} for name in present}
    at_start = start.groups()
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for group in sorted({one for runs in apart.values() for groups in runs.values() for one in groups}):
        own = {
            name: {
                seed: replace(run, achieved=apart[name][seed].get(group, Achieved())) for seed, run in of[name].items()
            }
            for name in present
        }
        for measure in measures:
            values = _values(measure.name, present, own, at_start.get(group, Achieved()))
            noise = None if measure is OWN_PROXY else pooled_seed_noise(_trained(values))
            for name, one in values.items():
                if np.isfinite(one).any():
                    own_noise = pooled_seed_noise({name: one}) if measure is OWN_PROXY else noise
                    estimate = over_seeds(one, None if name == START else own_noise)
                    found.setdefault(group, {}).setdefault(name, {})[measure.name] = estimate
    return found


def _values(
    measure: str, present: Sequence[str], of: Mapping[str, Mapping[int, Trained]], start: Achieved
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the measure of every entry that has runs, (seeds, prompts) with the same prompts for all."""
    found: dict[str, list[Mapping[str, float]]] = {
        name: [_of_run(measure, run.achieved) for run in of[name].values()] for name in present
    }
    if measure != KL and (at_start := _of_run(measure, start)):  # the start has not moved from itself
        found[START] = [at_start]
    units = _all_units(found.values())
    return {name: _table_of(rows, units) for name, rows in found.items()}


def _all_units(tables: Iterable[Sequence[Mapping[str, float]]]) -> list[str]:
    return list(dict.fromkeys(unit for rows in tables for row in rows for unit in row))


def _table_of(rows: Sequence[Mapping[str, float]], units: Sequence[str]) -> np.ndarray[Any, Any]:
    """Return (runs, units) with what is not finite counted as missing."""
    values = np.array([[row.get(unit, np.nan) for unit in units] for row in rows], dtype=float)
    return np.where(np.isfinite(values), values, np.nan).reshape(len(rows), -1)


def _of_run(measure: str, achieved: Achieved) -> Mapping[str, float]:
    """Return the measure of one run by unit: a prompt, an item, or the whole run."""
    held, spoken, probed = achieved.held_out, achieved.spoken, achieved.probed
    if measure in (ACCURACY, MARGIN):
        return {} if held is None else held.by_prompt()[measure]
    if measure in (CHOICES, FLIPS, SHIFT, TEXT, HARNESS):
        return {} if probed is None else probed.values.get(measure, {})
    if spoken is None:
        return {}
    if measure in PER_RUN:
        texts = [one.text for row in spoken.answers for one in row]
        if len(texts) < 2:  # one answer has nothing to differ from
            return {}
        return {"run": distinct_n(texts, 2) if measure == DISTINCT else self_bleu(texts)}
    by_prompt = {GOLD: spoken.gold, PROXY: spoken.proxy, KL: spoken.kl, LENGTH: spoken.length}[measure]
    return {} if by_prompt is None else dict(zip(_units(spoken), by_prompt, strict=True))


def _units(spoken: Spoken) -> list[str]:
    """Name prompts by text, and by number where several end in the same words."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in spoken.prompts:
        seen[prompt] += 1
        found.append(f"{prompt} ({seen[prompt]})")
    return found


def _differences(measure: str, values: Values, noise: SeedNoise | None) -> list[Difference]:
    """Compare every entry with the start, where it has a value there, and with every other."""
    pairs = [(first, second) for first, second in _pairs([*values]) if _comparable(values[first], values[second])]
    found = [
        (first, second, *difference(values[first], values[second], noise, against_start=second == START))
        for first, second in pairs
    ]
    return _tested(measure, found)


def _tested(measure: str, found: Sequence[tuple[str, str, Estimate, float]]) -> list[Difference]:
    """Correct the p-values of all that is asked about in a measure."""
    adjusted = corrected([p for *_, p in found])
    return [
        Difference(measure, first, second, estimate, p, after, after < 1 - LEVEL)
        for (first, second, estimate, p), after in zip(found, adjusted, strict=True)
    ]


def _trained(values: Values) -> Values:
    return {name: one for name, one in values.items() if name != START}


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return every pair once; with the start always second."""
    entries = [name for name in names if name != START]
    against = [(name, START) for name in entries] if START in names else []
    return [*against, *combinations(entries, 2)]


def _comparable(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> bool:
    """Tell whether there is noise to measure a difference against: two prompts that both answered."""
    both = np.isfinite(first).any(axis=0) & np.isfinite(second).any(axis=0)
    return int(both.sum()) >= 2


def _entry(
    name: str,
    asked: Asked,
    runs: Mapping[int, Trained],
    measures: Sequence[Measure],
    values: Mapping[str, Values],
    noise: Mapping[str, SeedNoise | None],
    settings: Mapping[str, Any],
) -> Entry:
    known = {one.name: values[one.name][name] for one in measures if name in values[one.name]}
    known = {measure: one for measure, one in known.items() if np.isfinite(one).any()}
    return Entry(
        name=name,
        summary=asked.entries[name],
        seeds=tuple(runs),
        failed={seed: message for (entry, seed), message in asked.failed.items() if entry == name},
        measures={
            measure: over_seeds(one, noise[measure] if measure in noise else pooled_seed_noise({name: one}))
            for measure, one in known.items()
        },
        by_seed={
            measure: {
                seed: float(np.nanmean(row)) for seed, row in zip(runs, one, strict=True) if np.isfinite(row).any()
            }
            for measure, one in known.items()
        },
        cost=_mean_cost([run.cost for run in runs.values()]) if runs else None,
        rows={seed: run.rows for seed, run in runs.items()},
        frontier={seed: points for seed, run in runs.items() if (points := _path(run, asked.start.spoken))},
        settings=settings,
        tuned=asked.tuned.get(name, {}),
        folders={seed: run.folder for seed, run in runs.items()},
    )


def _means(runs: Mapping[int, Trained], values: np.ndarray[Any, Any]) -> dict[int, float]:
    rows = zip(runs, values, strict=True)
    return {seed: float(np.nanmean(row)) for seed, row in rows if np.isfinite(row).any()}


def _start(measures: Sequence[Measure], values: Mapping[str, Values]) -> Entry:
    known = {one.name: values[one.name][START] for one in measures if START in values[one.name]}
    known = {measure: one for measure, one in known.items() if np.isfinite(one).any()}
    return Entry(
        name=START,
        summary="the model before training",
        seeds=(),
        failed={},
        measures={measure: over_seeds(one, None) for measure, one in known.items()},
        by_seed={},
        cost=None,
        rows={},
        frontier={},
        settings={},
        tuned={},
        folders={},
    )


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    def mean(of: Callable[[Cost], float]) -> float:
        return sum(map(of, costs)) / len(costs)

    hours = [one.gpu_hours for one in costs if one.gpu_hours is not None]
    return Cost(
        seconds=mean(lambda one: one.seconds),
        memory_peak_bytes=mean(lambda one: one.memory_peak_bytes),
        steps=mean(lambda one: one.steps),
        completions=mean(lambda one: one.completions),
        tokens=mean(lambda one: one.tokens),
        gpu_hours=sum(hours) / len(hours) if hours else None,
    )


def _path(run: Trained, start: Spoken | None) -> tuple[Point, ...]:
    """Return where the run stood at the start, on the way, and at its end, by KL, gold reward and reward model."""
    points, end = [], run.achieved.spoken
    if start is not None and start.gold is not None:
        before = end.reference_proxy if end is not None and end.reference_proxy else start.proxy
        points.append(Point(0, 0.0, float(np.mean(start.gold)), _mean(before)))
    on_the_way = (row for row in run.rows if row["kind"] == "eval" and GOLD in row and KL in row)
    points += [
        Point(int(row["step"]), float(row[KL]), float(row[GOLD]), float(row[PROXY]) if PROXY in row else None)
        for row in on_the_way
    ]
    if end is not None and end.gold is not None:
        step = int(run.rows[-1]["step"]) if run.rows else 0
        points.append(Point(step, float(np.mean(end.kl)), float(np.mean(end.gold)), _mean(end.proxy)))
    return tuple(points) if len(points) > 1 else ()


def _mean(values: Sequence[float] | None) -> float | None:
    return None if values is None else float(np.mean(values))


def _wins(
    asked: Asked,
    of: Mapping[str, Mapping[int, Trained]],
    present: Sequence[str],
    judges: Sequence[Judge],
    own_proxies: bool,
) -> tuple[tuple[Wins, ...], int]:
    """Return the win rates by the gold reward, by one reward model of all and by every judge; and the verdicts missing.

    The first two where there are such.
    """
    said: dict[str, dict[int, Spoken]] = {
        name: {seed: spoken for seed, run in of[name].items() if (spoken := run.achieved.spoken) is not None}
        for name in present
    }
    if asked.start.spoken is not None:  # one model for all seeds
        said[START] = dict.fromkeys(asked.seeds, asked.start.spoken)
    met = {(first, second): _meet(said[first], said[second]) for first, second in _pairs([*said])}
    met = {pair: both for pair, both in met.items() if both}
    found: list[tuple[Wins, int]] = []
    if met and all(one.gold is not None for runs in said.values() for one in runs.values()):
        found.append(_counted(BY_GOLD, met, _by_scores(lambda one: one.gold), ()))
    if met and not own_proxies:
        found.append(_counted(BY_PROXY, met, _by_scores(lambda one: one.proxy), ()))
    for judge in judges:
        verdicts: list[Verdict] = []
        found.append(_counted(judge.name, met, _asking(judge, verdicts), verdicts))
    return tuple(wins for wins, _ in found if wins.rates), sum(missing for _, missing in found)


def _counted(
    name: str, met: Mapping[tuple[str, str], "Meeting"], ask: "Ask", verdicts: Sequence[Verdict]
) -> tuple[Wins, int]:
    """Ask about all meetings; return the win rates and how many verdicts are missing.

    `verdicts` are those that `ask` gathers on the way.
    """
    tables = {pair: _table(ask, both) for pair, both in met.items()}
    known = {pair: table for pair, table in tables.items() if np.isfinite(table).any()}
    strengths = bradley_terry(known) if any(START in pair for pair in known) else None
    missing = sum(int(np.isnan(table).sum()) for table in tables.values())
    return Wins(name, _rates(known, met), strengths or {}, position_bias(verdicts)), missing


Ask = Callable[[Spoken, Spoken], list[float]]
"""Maps the answers of two entries to the verdicts for the first, prompt by prompt, NaN where there is none."""

Meeting = Sequence[tuple[Spoken, Spoken]]
"""Two entries' answers to the same prompts, by seed."""


def _meet(first: Mapping[int, Spoken], second: Mapping[int, Spoken]) -> Meeting:
    both = [(one, second[seed]) for seed, one in first.items() if seed in second]
    return [(one, other) for one, other in both if one.prompts == other.prompts]


def _table(ask: Ask, both: Meeting) -> np.ndarray[Any, Any]:
    return np.array([ask(one, other) for one, other in both], dtype=float)


def _by_scores(of: Callable[[Answer], float | None]) -> Ask:
    """Prefer the answer that a reward gives the higher score."""

    def scores(row: Sequence[Answer]) -> list[float]:
        return [np.nan if (score := of(one)) is None else score for one in row]

    def ask(first: Spoken, second: Spoken) -> list[float]:
        rows = zip(first.answers, second.answers, strict=True)
        return [preference_from_scores(scores(a), scores(b)) for a, b in rows]

    return ask


def _asking(judge: Judge, gathered: list[Verdict]) -> Ask:
    """Compare the first answers of each prompt: a judge's time is dear."""

    def ask(first: Spoken, second: Spoken) -> list[float]:
        rows = zip(first.prompts, first.answers, second.answers, strict=True)
        verdicts = judge.judge([Question(prompt, a[0].text, b[0].text) for prompt, a, b in rows])
        gathered.extend(verdicts)
        return [np.nan if one.value is None else one.value for one in verdicts]

    return ask


def _rates(
    known: Mapping[tuple[str, str], np.ndarray[Any, Any]], met: Mapping[tuple[str, str], Meeting]
) -> tuple[WinRate, ...]:
    found = []
    for against_start in (True, False):
        some = {pair: one for pair, one in known.items() if (START in pair) == against_start}
        noise = verdict_noise(some) if some else None
        for (first, second), one in some.items():
            lengths = [[a - b for a, b in zip(x.length, y.length, strict=True)] for x, y in met[first, second]]
            found.append(
                WinRate(
                    first,
                    second,
                    plain=win_rate(one, noise),
                    length_controlled=length_controlled(one, np.array(lengths), noise),
                    judged=int(np.isfinite(one).sum()),
                    missing=int(np.isnan(one).sum()),
                )
            )
    return tuple(found)


def _verdicts(primary: str, present: Sequence[str], differences: Sequence[Difference]) -> list[str]:
    """Say in words which differences are real, the most important first."""
    own = [one for one in differences if one.measure == primary]
    if not own:
        why = (
            "no two of the models share two prompts"
            if primary
            else "there is neither a gold reward nor a held-out pair"
        )
        return [f"Nothing is said on which is better: {why}."]
    title = TITLES[primary]
    said = []
    between = [one for one in own if START not in (one.first, one.second)]
    ahead = {name: [_loser(one) for one in between if one.real and _winner(one) == name] for name in present}
    behind = {name: [one for one in between if one.real and _loser(one) == name] for name in present}
    leaders: dict[tuple[str, ...], list[str]] = {}  # by whom they beat
    for name in present:
        if ahead[name] and not behind[name]:
            leaders.setdefault(tuple(ahead[name]), []).append(name)
    for beaten, group in leaders.items():
        level = [name for name in present if name not in beaten and name not in group]
        level = ["one another", *level] if len(group) > 1 else level
        has = "have" if len(group) > 1 else "has"
        tail = f"; not told apart from {_listed(level)}" if level else ""
        said.append(f"{_listed(group)} {has} the higher {title} than {_listed(beaten)}{tail}.")
    if len(present) > 1 and not leaders:
        said.append(f"No entry is told apart from another in {title}: what differs between them here may be noise.")
    for one in own:
        if one.second == START:
            verb = "raised" if one.value.value > 0 else "lowered"
            told = f"{verb} {title}" if one.real else f"is not told apart from the start in {title}"
            said.append(f"{one.first} {told} ({one.interval}; {one.chance}).")
    for one in between if len(present) == 2 else ():  # of more entries the table tells every pair
        if one.real:
            told = f"{_winner(one)} is ahead of {_loser(one)}"
        else:
            told = f"{one.first} and {one.second} are not told apart"
        said.append(f"{told}: {one.first} minus {one.second} is {one.interval} ({one.chance}).")
    return said


def _winner(one: Difference) -> str:
    better = METRICS[one.measure].better
    return one.first if (one.value.value > 0) == (better != "lower") else one.second


def _loser(one: Difference) -> str:
    return one.second if _winner(one) == one.first else one.first


def _judged(wins: Sequence[Wins]) -> list[str]:
    """Say what a judge prefers, where its interval leaves a tie out; the gold reward has been spoken of."""
    found = []
    for one in (one for one in wins if one.judge != BY_GOLD):
        for rate in one.rates:
            if not rate.plain.low <= 0.5 <= rate.plain.high:
                first, second, share = rate.first, rate.second, rate.plain.value
                if share < 0.5:
                    first, second, share = second, first, 1 - share
                found.append(f"{one.judge} prefers {first} to {second} in {share:.0%} of its verdicts.")
    return found


def _lengthy(wins: Sequence[Wins]) -> list[str]:
    """Say where a win rate hangs on length."""
    found = []
    for judge in wins:
        for one in judge.rates:
            controlled = one.length_controlled
            if controlled is not None and (one.plain.value - 0.5) * (controlled.value - 0.5) < 0:
                found.append(
                    f"Mind the length: by {judge.judge}, {one.first} against {one.second} wins {one.plain.value:.0%}, "
                    f"but {controlled.value:.0%} at equal length."
                )
    return found


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _warnings(
    of: Mapping[str, Mapping[int, Trained]],
    missing: Sequence[str],
    unjudged: int,
    measures: Sequence[Measure],
    values: Mapping[str, Values],
) -> list[str]:
    found = []
    if missing:
        found.append(f"Partial: these runs are missing: {'; '.join(missing)}. Start the same command again.")
    if unjudged:
        found.append(f"Partial: the judge gave no verdict on {unjudged} questions; they are left out.")
    finished = max((len(runs) for runs in of.values()), default=0)
    if finished == 1:
        found.append(
            "One seed: intervals cover the prompts only. A difference is one between these trained models, and another "
            "seed of the same objectives may turn it round."
        )
    elif sum(len(runs) - 1 for runs in of.values() if runs) < FEW_DEGREES and finished:
        found.append(
            f"Few seeds: {finished} of each entry tell little of how far seeds lie apart, so intervals are "
            "wide and real differences may be missed."
        )
    if not any(one.name == GOLD for one in measures):
        found.append(
            "No gold reward was given (evaluation.gold): the verdict rests on held-out pairs, not on what the models "
            "say."
        )
    if OWN_PROXY in measures:
        found.append(
            "Each entry's reward model is its own, the one it was trained on: their scores share no scale, and nothing "
            "is compared between entries in them. evaluation.reward_model=FOLDER scores all answers by one."
        )
    for name in (GOLD, ACCURACY):
        tables = [one for one in _trained(values[name]).values() if np.isfinite(one).any()]
        if not tables:
            continue
        shared = int(np.all([np.isfinite(one).any(axis=0) for one in tables], axis=0).sum())
        if shared < FEW_PROMPTS:
            found.append(f"Few prompts: {TITLES[name]} rests on {shared}; intervals of so few are rough.")
        if shared < tables[0].shape[1]:
            lost = tables[0].shape[1] - shared
            found.append(f"{TITLES[name]}: {lost} prompts were measured in some entries only, and are not compared.")
    return found


def _biased(wins: Sequence[Wins]) -> list[str]:
    """Warn of judges whose verdicts hang on the order of the answers."""
    found = []
    for one in wins:
        bias = one.position_bias
        if bias is not None and not bias.first_shown.low <= 0.5 <= bias.first_shown.high:
            found.append(
                f"{one.judge} favours a place: {bias.first_shown.value:.0%} of its votes go to the answer shown first. "
                "Both orders are asked, and where they disagree it counts as a tie."
            )
    return found


def _side_by_side(
    asked: Asked, of: Mapping[str, Mapping[int, Trained]], present: Sequence[str]
) -> tuple[SideBySide, ...]:
    said = {} if asked.start.spoken is None else {START: asked.start.spoken}
    for name in present:
        first = next(iter(of[name].values())).achieved.spoken
        if first is not None:
            said[name] = first
    if not said:
        return ()
    prompts = next(iter(said.values())).prompts
    same = {name: one for name, one in said.items() if one.prompts == prompts}
    return tuple(
        SideBySide(prompt, {name: one.answers[n][0].text for name, one in same.items()})
        for n, prompt in enumerate(prompts[:SAMPLES_SHOWN])
    )


def _settings(of: Mapping[str, Mapping[int, Trained]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the settings that all runs share, and those that are each entry's own; the seed is neither."""
    firsts = {name: dict(next(iter(runs.values())).settings) for name, runs in of.items() if runs}
    if not firsts:
        return {}, {}
    keys = list(dict.fromkeys(key for one in firsts.values() for key in one if not key.endswith("loop.seed")))
    absent = object()
    shared = {
        key: next(iter(firsts.values()))[key]
        for key in keys
        if all(one.get(key, absent) == next(iter(firsts.values())).get(key) for one in firsts.values())
    }
    own = {name: {key: one[key] for key in keys if key in one and key not in shared} for name, one in firsts.items()}
    return shared, own
