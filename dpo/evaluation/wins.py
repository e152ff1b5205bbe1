"""Who is preferred to whom: every two entries' answers to the same prompts, put before every judge."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from dpo.evaluation.judges import Judge, Question, Verdict, position_bias
from dpo.evaluation.records import START, WinRate, Wins
from dpo.evaluation.samples import Answer, Spoken
from dpo.evaluation.titles import BY_GOLD, BY_PROXY
from dpo.evaluation.winrate import bradley_terry, length_controlled, preference_from_scores, verdict_noise, win_rate

Ask = Callable[[Spoken, Spoken], list[float]]
"""Maps the answers of two entries to the verdicts for the first, prompt by prompt, NaN where there is none."""

Meeting = Sequence[tuple[Spoken, Spoken]]
"""Two entries' answers to the same prompts, by seed."""


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return every pair once; with the start always second."""
    entries = [name for name in names if name != START]
    against = [(name, START) for name in entries] if START in names else []
    return [*against, *combinations(entries, 2)]


def all_wins(
    said: Mapping[str, Mapping[int, Spoken]], judges: Sequence[Judge], own_proxies: bool
) -> tuple[tuple[Wins, ...], int]:
    """Return the win rates by the gold reward, by one reward model of all and by every judge; and the verdicts missing.

    The first two where there are such.

    Args:
        said: `[entry or START][seed]`: answers to the prompts.
        judges: each is asked about every pair of entries, prompt by prompt.
        own_proxies: whether different reward models scored the answers, so that their scores cannot be compared.
    """
    met = {(first, second): _meet(said[first], said[second]) for first, second in pairs([*said])}
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
    name: str, met: Mapping[tuple[str, str], Meeting], ask: Ask, verdicts: Sequence[Verdict]
) -> tuple[Wins, int]:
    """Ask about all meetings; return the win rates and how many verdicts are missing.

    `verdicts` are those that `ask` gathers on the way.
    """
    tables = {pair: _table(ask, both) for pair, both in met.items()}
    known = {pair: table for pair, table in tables.items() if np.isfinite(table).any()}
    strengths = bradley_terry(known) if any(START in pair for pair in known) else None
    missing = sum(int(np.isnan(table).sum()) for table in tables.values())
    return Wins(name, _rates(known, met), strengths or {}, position_bias(verdicts)), missing


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
