"""What a comparison says in words: which differences are real, what judges prefer, and what to be careful of."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo.evaluation.records import START, Difference, Measure, Trained, Wins
from dpo.evaluation.titles import ACCURACY, BY_GOLD, GOLD, OWN_PROXY, TITLES
from dpo.metrics import METRICS

FEW_PROMPTS = 30
"""Below so many prompts the report warns."""


FEW_DEGREES = 4
"""Below so many degrees of freedom of the seeds' spread it warns too: entries times seeds less one."""


def verdicts(primary: str, present: Sequence[str], differences: Sequence[Difference]) -> list[str]:
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


def judged(wins: Sequence[Wins]) -> list[str]:
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


def lengthy(wins: Sequence[Wins]) -> list[str]:
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


def warnings(
    of: Mapping[str, Mapping[int, Trained]],
    missing: Sequence[str],
    unjudged: int,
    measures: Sequence[Measure],
    values: Mapping[str, Mapping[str, np.ndarray[Any, Any]]],
) -> list[str]:
    """Say what the verdict rests on that is little, or absent.

    Args:
        of: `[entry][seed]`, those that finished.
        missing: the others.
        unjudged: questions that no judge answered.
        measures: of the comparison.
        values: `[measure][entry or START]`: (seeds, prompts), NaN where missing.
    """
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
        trained = (one for entry, one in values[name].items() if entry != START)
        tables = [one for one in trained if np.isfinite(one).any()]
        if not tables:
            continue
        shared = int(np.all([np.isfinite(one).any(axis=0) for one in tables], axis=0).sum())
        if shared < FEW_PROMPTS:
            found.append(f"Few prompts: {TITLES[name]} rests on {shared}; intervals of so few are rough.")
        if shared < tables[0].shape[1]:
            lost = tables[0].shape[1] - shared
            found.append(f"{TITLES[name]}: {lost} prompts were measured in some entries only, and are not compared.")
    return found


def biased(wins: Sequence[Wins]) -> list[str]:
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
