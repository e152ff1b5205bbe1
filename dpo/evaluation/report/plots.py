"""The figures, as SVG that stands in the page and takes its colours and font from there.

One unit of a figure is one CSS pixel at its full width, so that text keeps its size on a phone: narrow screens get
narrow figures, never shrunken ones. Text stays text: the browser sets it, in its own font, also where a name holds
emoji or runs from right to left.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dpo.evaluation.records import Comparison, Entry
from dpo.evaluation.report.looks import GRID, INK, MUTED, VARIABLES, Look
from dpo.evaluation.report.text import MINUS, clean, shorten

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpo-lab",  # element ids would be random without it
    "text.parse_math": False,  # a $ in a name is a $
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "axes.ymargin": 0.08,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.solid_capstyle": "round",
}
_LINE = 13.0
"""Least distance of two labels' middles, in pixels."""
_NAME = 12
"""Longest name beside a line, in characters; the legend has the whole of it."""
_NICE = (0, 0.01, 0.03, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
"""Ticks of a KL axis, in nats, of which those that fit are shown."""
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@final
@dataclass(frozen=True)
class Line:
    """One run, or the mean of an entry's runs, as a line."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@final
@dataclass(frozen=True)
class Curves:
    """One entry's lines on one chart."""

    name: str
    look: Look
    runs: tuple[Line, ...]
    """One a seed."""
    mean: Line
    """At the steps that all its runs have."""


@final
@dataclass
class _Label:
    """A name on its way to its place."""

    left: float
    right: float
    height: float
    """Of its middle above the figure's foot, in pixels."""
    curves: Curves

    def meets(self, other: "_Label") -> bool:
        return self.left < other.right and other.left < self.right and abs(self.height - other.height) < _LINE - 0.01


def frontier(comparison: Comparison, looks: Mapping[str, Look]) -> list[Curves]:
    """Return gold reward against KL while training, of the entries that have both."""
    return _curves(
        comparison,
        looks,
        lambda entry, seed: {
            one.step: (one.kl, one.reward) for one in entry.frontier.get(seed, ()) if _finite(one.kl, one.reward)
        },
    )


def optimised(comparison: Comparison, looks: Mapping[str, Look], what: Literal["reward", "proxy"]) -> list[Curves]:
    """Return the gold reward, or what the reward model says, against KL, at the points that have both."""

    def points(entry: Entry, seed: int) -> dict[int, tuple[float, float]]:
        both = [one for one in entry.frontier.get(seed, ()) if one.proxy is not None]
        return {one.step: (one.kl, getattr(one, what)) for one in both if _finite(one.kl, getattr(one, what))}

    return _curves(comparison, looks, points)


def learning(comparison: Comparison, looks: Mapping[str, Look], metric: str, axis: str) -> list[Curves]:
    """Return a metric of the evaluation rows against an axis of the ledger, of the entries that recorded both."""
    return _curves(comparison, looks, lambda entry, seed: _recorded(entry, seed, metric, axis))


def label_room(names: Iterable[str]) -> float:
    """Return the pixels that the longest of these names needs beside its line: the same for charts side by side."""
    return max(map(_width, names), default=0.0)


def draw_frontier(curves: Sequence[Curves], start: Look, room: float, width: int, key: str, text: str) -> Markup:
    """Return the chart of reward against KL; both axes grow with the training, from the start at the left.

    Args:
        curves: what to draw.
        start: how the start is marked.
        room: what `label_room` says.
        width: of the figure, in CSS pixels.
        key: begins the ids of the figure's elements; each figure of a page has its own.
        text: what the figure shows, for those who cannot see it.
    """

    def draw(axes: Axes) -> None:
        # Gao et al. 2023 (arXiv:2210.10760) measure the way from the start as the root of the KL; k1 may be below 0.
        axes.set_xscale("function", functions=(_root, _square))
        _draw_curves(axes, curves, every_point=True)
        if starts := [(run.x[0], run.y[0]) for one in curves for run in one.runs if run.x[0] == 0]:
            x, y = (sum(values) / len(starts) for values in zip(*starts, strict=True))
            ring = {"marker": "o", "markersize": 11, "markeredgewidth": 1.4, "fillstyle": "none"}
            axes.plot(x, y, linestyle="none", color=INK, **ring)
            axes.annotate("start", (x, y), (9, -11), textcoords="offset points", color=start.colour, zorder=9)
        low, high = axes.get_xlim()
        ticks = [tick for tick in _NICE if low <= tick <= high]
        axes.xaxis.set_major_locator(FixedLocator(_apart(axes, ticks, 34)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_xlabel("KL, nats a completion", loc="right")
        _label_ends(axes, curves)

    return _svg(draw, room, width, round(width * (0.5 if width > 500 else 0.86)), key, text)


def draw_learning(curves: Sequence[Curves], axis: str, room: float, width: int, key: str, text: str) -> Markup:
    """Return one small chart; `axis` is written below it, the arguments are those of `draw_frontier`."""

    def draw(axes: Axes) -> None:
        _draw_curves(axes, curves, every_point=False)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.set_xlabel(axis, loc="right")
        _label_ends(axes, curves)

    return _svg(draw, room, width, round(width * 0.62), key, text)


def _curves(
    comparison: Comparison,
    looks: Mapping[str, Look],
    points: Callable[[Entry, int], Mapping[int, tuple[float, float]]],
) -> list[Curves]:
    """`points` gives a run's points by step."""
    found = []
    for entry in comparison.entries:
        runs = [run for seed in entry.seeds if (run := points(entry, seed))]
        if not runs:
            continue
        common = sorted(set.intersection(*(set(run) for run in runs)))
        middle = [tuple(sum(run[step][n] for run in runs) / len(runs) for n in (0, 1)) for step in common]
        found.append(
            Curves(
                entry.name,
                looks[entry.name],
                tuple(_line([run[step] for step in sorted(run)]) for run in runs),
                _line(middle),
            )
        )
    return found


def _line(points: Sequence[Sequence[float]]) -> Line:
    return Line(tuple(x for x, _ in points), tuple(y for _, y in points))


def _recorded(entry: Entry, seed: int, metric: str, axis: str) -> dict[int, tuple[float, float]]:
    """The metric's evaluation rows; where the ledger has none, the samples the frontier was measured on."""
    rows = entry.rows.get(seed, ())
    axes = {int(row["step"]): float(row[axis]) for row in rows if axis in row}
    values = {int(row["step"]): float(row[metric]) for row in rows if row["kind"] == "eval" and metric in row}
    sampled = {"eval/gold_reward": "reward", "kl/policy_reference": "kl"}
    if metric in sampled:
        on_frontier = {point.step: getattr(point, sampled[metric]) for point in entry.frontier.get(seed, ())}
        values = on_frontier | values
        axes = {0: 0.0} | axes  # the start is sampled before the ledger's first row
    return {step: (axes[step], y) for step, y in values.items() if step in axes and _finite(axes[step], y)}


def _draw_curves(axes: Axes, curves: Sequence[Curves], every_point: bool) -> None:
    for one in curves:
        dash: Any = (0, one.look.dash) if one.look.dash else "solid"
        if len(one.runs) > 1:
            for run in one.runs:
                axes.plot(run.x, run.y, color=one.look.colour, linewidth=0.8, alpha=0.45)
        points = len(one.mean.x)
        marks = range(points) if every_point else range(points - 1, -1, -max(1, points // 4))
        axes.plot(
            one.mean.x,
            one.mean.y,
            color=one.look.colour,
            linewidth=1.8,
            linestyle=dash,
            marker=one.look.marker,
            markersize=5.5,
            markeredgewidth=0,
            markevery=list(marks),
        )
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))


def _label_ends(axes: Axes, curves: Sequence[Curves]) -> None:
    """Name each line at its end; labels that would touch move apart, up and, from the top, down again."""
    axes.set_xlim(axes.get_xlim())  # drawn after this, a label's place would no longer be that of its line
    axes.set_ylim(axes.get_ylim())
    ends = [(_pixel(axes, one.mean.x[-1], one.mean.y[-1]), one) for one in curves if one.mean.x]
    labels = [_Label(x + 8, x + 12 + _width(one.name), y, one) for (x, y), one in ends]
    labels.sort(key=lambda label: label.height)
    for n, label in enumerate(labels):
        for other in labels[:n]:
            if label.meets(other):
                label.height = other.height + _LINE
    top = axes.bbox.y1
    for n, label in reversed(list(enumerate(labels))):
        label.height = min(label.height, top)
        for other in reversed(labels[n + 1 :]):
            if label.meets(other):
                label.height = other.height - _LINE
    for label in labels:
        end = (label.curves.mean.x[-1], label.curves.mean.y[-1])
        axes.annotate(
            shorten(clean(label.curves.name), _NAME),
            end,
            (8, label.height - _pixel(axes, *end)[1]),
            textcoords="offset points",
            va="center",
            zorder=9,
        )


def _width(name: str) -> float:
    """About how many pixels a name takes beside its line."""
    return 6.5 * min(len(name), _NAME)


def _apart(axes: Axes, ticks: Sequence[float], least: float) -> list[float]:
    """Those of the ticks that lie so many pixels apart: 0 first, then from the right, where the scale is wide."""
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda tick: (tick != 0, -tick)):
        if all(abs(_pixel(axes, other)[0] - _pixel(axes, tick)[0]) >= least for other in kept):
            kept.append(tick)
    return kept


def _pixel(axes: Axes, x: float, y: float = 0.0) -> tuple[float, float]:
    across, up = axes.transData.transform((x, y))
    return float(across), float(up)


def _root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: Any) -> Any:
    return np.sign(x) * np.square(x)


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _short(value: float, _: int | None = None) -> str:
    """A tick's number: 12k for 12,000."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:g}{letter}".replace("-", MINUS)
    return f"{value:,.6g}".replace("-", MINUS)


def _svg(draw: Callable[[Axes], None], room: float, width: int, height: int, key: str, text: str) -> Markup:
    """Draw at fixed margins in pixels, so that small charts side by side have their axes in line."""
    left, right, bottom, top = 44, 14 + room, 40, 10
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        draw(figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)))
        file = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    return _for_page(file.getvalue(), width, height, key, text)


def _for_page(svg: bytes, width: int, height: int, key: str, text: str) -> Markup:
    """Make matplotlib's file part of a page: own ids, the page's colours and font, no fixed size."""
    root = ElementTree.fromstring(svg)  # noqa: S314  (matplotlib wrote it just now)
    used = {name for one in root.iter() for name in _references(one)}
    for one in root.iter():
        one.tag = one.tag.rpartition("}")[2]
        for name in list(one.attrib):
            value = one.attrib.pop(name)
            name = name.rpartition("}")[2]  # HTML needs no namespaces
            if name == "id":
                if value not in used:
                    continue
                value = f"{key}-{value}"
            elif name == "href":
                value = f"#{key}-{value[1:]}"
            else:
                value = _REFERENCE.sub(rf"url(#{key}-\1)", value)
            one.set(name, _themed(value) if name == "style" else value)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    root.attrib.clear()
    root.attrib.update(
        {"class": "plot", "viewBox": f"0 0 {width} {height}", "width": str(width), "role": "img", "aria-label": text}
    )
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704  (ElementTree escapes text)


def _references(element: ElementTree.Element) -> list[str]:
    found = [value[1:] for name, value in element.attrib.items() if name.endswith("href")]
    return found + [name for value in element.attrib.values() for name in _REFERENCE.findall(value)]


def _themed(style: str) -> str:
    """Colours become the page's variables, and the font the page's own."""
    parts = [part.strip() for part in style.split(";")]
    kept = "; ".join(part for part in parts if part and not part.startswith("font-family"))
    for colour, variable in VARIABLES.items():
        kept = kept.replace(colour, f"var({variable})")
    return kept
