"""How the experiments report: intervals over seeds, a table in Markdown, a figure in SVG of one style."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from scipy.stats import t as student
from torch import Tensor

INK = "#333333"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette, told apart with any kind of colour vision; in this order also in grey."""
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "dpo-lab",  # element ids would be random without it
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E0E0E0",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "errorbar.capsize": 3,
}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its 95 % interval (Student's t)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """Its lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self.half

    def text(self, digits: int) -> str:
        """Return it as "0.51 ± 0.02"."""
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def interval(values: Tensor | Sequence[float]) -> Interval:
    """Return the mean of one value a seed with its 95 % interval.

    Raises:
        ValueError: there is one seed only, which has no interval.
    """
    sample = torch.as_tensor(values, dtype=torch.float64)
    if len(sample) < 2:
        raise ValueError(f"interval: got {len(sample)} seed, expected 2 or more: one value has no spread")
    width = float(student.ppf(0.975, len(sample) - 1))
    return Interval(sample.mean().item(), width * sample.std().item() / len(sample) ** 0.5)


@dataclass(frozen=True)
class Report:
    """What an experiment shows."""

    title: str
    protocol: str
    """One paragraph: task, sizes, seeds, intervals."""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    figure: Figure

    def text(self) -> str:
        """Return title, protocol and table as Markdown."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "\n".join([f"# {self.title}", "", self.protocol, "", *(f"| {' | '.join(line)} |" for line in lines)])

    def save(self, path: Path) -> None:
        """Write the figure as SVG: the same bytes whenever the same numbers are drawn."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            FigureCanvasSVG(self.figure).print_svg(path, metadata={"Date": None})


def canvas(panels: int, draw: Callable[[list[Axes]], None]) -> Figure:
    """Return a figure of panels side by side, drawn in the one style."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * panels, 3.9), layout="constrained")
        draw([figure.add_subplot(1, panels, 1 + n) for n in range(panels)])
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: a second pass would move it by a hair, and change the bytes
    return figure


def main(name: str, experiment: Callable[[], Report], arguments: Sequence[str] | None = None) -> None:
    """Run an experiment from the command line: print its table, and draw its figure where a folder is given."""
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=sys.modules[experiment.__module__].__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"write {name}.svg into this folder")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # tensors of this size gain nothing from more, and sums then repeat exactly
    report = experiment()
    print(report.text())
    if chosen.out is not None:
        report.save(chosen.out / f"{name}.svg")
        print(f"\nfigure: {chosen.out / f'{name}.svg'}")
