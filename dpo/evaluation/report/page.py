"""The page: the template, and what it is filled with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from markupsafe import Markup

from dpo.estimates import LEVEL
from dpo.evaluation.records import Comparison
from dpo.evaluation.report import plots, tables
from dpo.evaluation.report.looks import Look, looks
from dpo.evaluation.report.template import template
from dpo.evaluation.report.text import clean, shorten
from dpo.metrics import METRICS

CURVES = (
    ("eval/gold_reward", "Gold reward"),
    ("kl/policy_reference", "KL to the reference"),
    ("eval/reward/accuracy", "Reward accuracy"),
    ("eval/length", "Length"),
)
"""What is drawn over the training: only what means the same whatever the objective, so no loss and no margin."""
AXES = (
    ("train/examples_seen", "examples", "examples seen"),
    ("train/tokens_seen", "tokens", "tokens read"),
    ("time/seconds", "seconds", "seconds"),
)
_PHONE, _PANEL, _WIDE = 340, 350, 736  # CSS pixels


@final
@dataclass(frozen=True)
class Chart:
    """A small chart of learning curves, or what is said in its place."""

    title: str
    unit: str
    svg: Markup
    absent: tuple[str, ...]
    """Entries that recorded nothing of it."""


def page(comparison: Comparison) -> str:
    """Return the whole of `report.html`: one file without scripts, that asks nothing of any network."""
    known = looks(comparison)
    return template("report.html.jinja").render(
        comparison=comparison,
        looks=known,
        level=f"{100 * LEVEL:g}",
        alpha=f"{1 - LEVEL:g}",
        seeds=max((len(entry.seeds) for entry in comparison.entries), default=0),
        failed=[(one.name, seed, why) for one in comparison.entries for seed, why in sorted(one.failed.items())],
        missing=sum(rate.missing for wins in comparison.wins for rate in wins.rates),
        rows=tables.measure_rows(comparison),
        runs=tables.runs(comparison),
        groups=tables.groups(comparison),
        gaps=tables.gaps(comparison),
        cost_cells=tables.cost_cells,
        own_settings=tables.own_settings,
        matrices=[tables.matrix(wins, comparison) for wins in comparison.wins],
        frontier=_frontier(comparison, known),
        proxies=_proxies(comparison, known),
        charts={word: _charts(comparison, known, axis, label) for axis, word, label in AXES},
    )


def _frontier(comparison: Comparison, known: Mapping[str, Look]) -> dict[str, Markup]:
    """The same chart for wide and for narrow screens."""
    curves = plots.frontier(comparison, known)
    if not curves:
        return {}
    names = ", ".join(one.name for one in curves)
    text = f"Gold reward against KL to the reference over the training, one line for each of: {shorten(names, 200)}"
    start = known[comparison.start.name]
    room = plots.label_room(one.name for one in curves)
    return {
        kind: plots.draw_frontier(curves, start, room, width, f"frontier-{kind}", clean(text))
        for kind, width in (("wide", _WIDE), ("narrow", _PHONE))
    }


def _proxies(comparison: Comparison, known: Mapping[str, Look]) -> list[Chart]:
    """The gold reward beside the reward model's score, one chart of that for each scale that it has."""
    golds = plots.optimised(comparison, known, "reward")
    proxies = plots.optimised(comparison, known, "proxy")
    if not proxies:
        return []
    unit = METRICS["eval/proxy_reward"].unit
    shown = [("Gold: the true reward", METRICS["eval/gold_reward"].unit, golds)]
    if comparison.own_proxies:
        shown += [(f"Proxy of {shorten(one.name, 24)}: its own reward model", unit, [one]) for one in proxies]
    else:
        shown.append(("Proxy: the reward model", unit, proxies))
    drawn, start = {one.name for one in golds}, known[comparison.start.name]
    room = plots.label_room(one.name for one in golds)
    return [
        Chart(
            title,
            unit,
            plots.draw_frontier(
                curves, start, room, _PANEL, f"proxy-{n}", clean(f"{title}, against KL while training")
            ),
            () if n else tuple(entry.name for entry in comparison.entries if entry.name not in drawn),
        )
        for n, (title, unit, curves) in enumerate(shown)
    ]


def _charts(comparison: Comparison, known: Mapping[str, Look], axis: str, label: str) -> list[Chart]:
    found = []
    room = plots.label_room(entry.name for entry in comparison.entries)
    for n, (metric, title) in enumerate(CURVES):
        curves = plots.learning(comparison, known, metric, axis)
        if not curves:
            continue
        key = f"curve-{n}-{axis.replace('/', '-')}"
        drawn = {one.name for one in curves}
        found.append(
            Chart(
                title,
                METRICS[metric].unit,
                plots.draw_learning(curves, label, room, _PANEL, key, f"{title} by {label}"),
                tuple(entry.name for entry in comparison.entries if entry.name not in drawn),
            )
        )
    return found
