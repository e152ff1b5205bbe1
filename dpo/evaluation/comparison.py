"""From finished runs to what can be said about them: estimates, differences, and all that the report shows.

Nothing here needs a model: a comparison is rebuilt from the folders of its runs. Prompts are the paired units, seeds
the second source of noise (`dpo.evaluation.statistics`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np

from dpo.estimates import LEVEL, Estimate
from dpo.evaluation import verdict
from dpo.evaluation.achieved import Achieved
from dpo.evaluation.diversity import distinct_n, self_bleu
from dpo.evaluation.judges import Judge
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
)
from dpo.evaluation.samples import Spoken
from dpo.evaluation.statistics import SeedNoise, corrected, difference, over_seeds, pooled_seed_noise
from dpo.evaluation.titles import ACCURACY, DISTINCT, GOLD, KL, LENGTH, MARGIN, OWN_PROXY, PROXY, SELF_BLEU, TITLES
from dpo.evaluation.wins import all_wins, pairs
from dpo.metrics import METRICS

PER_RUN = (DISTINCT, SELF_BLEU)
"""Measures of all of a run's answers together: one number a run, with seeds as the only units."""

SAMPLES_SHOWN = 12
"""Prompts whose answers are shown side by side."""


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
    wins, unjudged = all_wins(_said(asked, of, present), judges, own_proxies)
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
            *verdict.verdicts(primary, present, differences),
            *overoptimised(_against_start(PROXY, gained), _against_start(GOLD, differences)),
            *(line for one in entries for line in past_best(one, start)),
            *verdict.judged(wins),
            *verdict.lengthy(wins),
        ),
        warnings=(
            *verdict.warnings(of, missing, unjudged, measures, values),
            *verdict.biased(wins),
            *asked.warnings,
        ),
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
    met = [(first, second) for first, second in pairs([*values]) if _comparable(values[first], values[second])]
    found = [
        (first, second, *difference(values[first], values[second], noise, against_start=second == START))
        for first, second in met
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


def _said(
    asked: Asked, of: Mapping[str, Mapping[int, Trained]], present: Sequence[str]
) -> dict[str, dict[int, Spoken]]:
    """Return the answers of every run that has some, and for each seed the start's."""
    said = {
        name: {seed: spoken for seed, run in of[name].items() if (spoken := run.achieved.spoken) is not None}
        for name in present
    }
    if asked.start.spoken is not None:  # one model for all seeds
        said[START] = dict.fromkeys(asked.seeds, asked.start.spoken)
    return said


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
