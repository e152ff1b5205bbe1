"""R1: where DPO, IPO, KTO, PPO and best-of-n stand between reward and KL, on a language model of 135M weights.

Paper: arXiv:2305.18290, section 6.1 and figure 2 (left), controlled sentiment: the gold reward of a policy's samples
beside its KL to the start. Takes tens of minutes on 2 CPU cores for every seed; started again, it goes on.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dpo.compare import RUNS, Wanted, run_comparison
from dpo.data import check
from dpo.errors import TrainingError
from dpo.estimates import Estimate
from dpo.evaluation.bestofn import best_of
from dpo.evaluation.records import Comparison, Entry
from dpo.evaluation.samples import Spoken
from dpo.evaluation.titles import GOLD, KL
from dpo.model.base import load_base
from dpo.recipes.reproductions.report import COLOURS, INK, MARKERS, Report, canvas
from dpo.run import measure_start, read_result, speaking, stage_folders

OBJECTIVES = ("dpo", "ipo", "kto", "reward_ppo")
BEST_OF_N = "best-of-n"
SEEDS = 3
SAMPLES = 32
"""Answers of the start to each prompt, from which best-of-n is estimated."""
COUNTS = (1, 2, 4, 8, 16)
"""The n of best-of-n: at most half of SAMPLES, for at n = SAMPLES there is one subset to average over."""
SAMPLES_FILE = "start-samples.jsonl"


@dataclass(frozen=True)
class Point:
    """One place between reward and KL."""

    at: str
    """After how many optimiser steps, or of how many answers the best was chosen."""
    kl: float
    """KL to the start, nats a completion: of a trained policy on its own samples (k1), of best-of-n the upper bound."""
    gold: float
    """Mean gold reward, -1 to 1."""
    interval: Estimate | None
    """Of `gold`, over prompts and seeds; None on the way, where only the means are kept."""


@dataclass(frozen=True)
class Curve:
    """The points of one method, in the order of growing optimisation."""

    method: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Measured:
    """What the experiment found."""

    curves: tuple[Curve, ...]
    facts: Mapping[str, str]
    """Of the comparison: model, data, budget and seeds."""
    samples: int
    """Answers of the start to each prompt."""
    prompts: int


def measure(
    folder: Path | None = None,
    seeds: int = SEEDS,
    completions: int | None = None,
    samples: int = SAMPLES,
    counts: Sequence[int] = COUNTS,
    overrides: Mapping[str, Any] | None = None,
) -> Measured:
    """Train on the embedded task, and sample the start for best-of-n.

    Args:
        folder: of the comparison (None: as `dpo compare` names it).
        seeds: trainings of each objective.
        completions: that every stage learns from (None: the embedded task's budget).
        samples: answers of the start to each prompt.
        counts: the n of best-of-n, each at most `samples`.
        overrides: nested settings of all runs.

    Raises:
        TrainingError: a run failed.
        DPOError: as `run_comparison`.
    """
    wanted = Wanted(OBJECTIVES, seeds, completions, overrides=overrides or {})
    found, root = run_comparison(wanted, folder)
    if failed := [
        f"{entry.name}, seed {seed}: {told}" for entry in found.entries for seed, told in entry.failed.items()
    ]:
        raise TrainingError(
            f"{root}: these runs failed: {'; '.join(failed)}. Start again: the others are not repeated."
        )
    start = _start(root, samples)
    chosen = [best_of(start, n) for n in counts]
    points = tuple(Point(f"n = {one.n}", one.kl_bound, one.gold.value, one.gold) for one in chosen)
    curves = (*(_curve(entry) for entry in found.entries), Curve(BEST_OF_N, points))
    return Measured(curves, _facts(found), samples, len(start.prompts))


def _start(root: Path, samples: int) -> Spoken:
    """Return `samples` answers of the start to each of the comparison's prompts; they are kept for the next time."""
    file = root / SAMPLES_FILE
    if file.exists() and len((kept := Spoken.read(file)).answers[0]) == samples:
        return kept
    run = read_result(stage_folders(root / RUNS / f"{OBJECTIVES[0]}-seed0")[-1]).run
    run = run.override({"evaluation": {"samples_per_prompt": samples}})
    spoken = measure_start(run, load_base(run.model), check(run.data)).spoken
    assert spoken is not None, "the embedded task has evaluation prompts"
    spoken.write(file)
    return spoken


def _curve(entry: Entry) -> Curve:
    """Return an entry's path, at each place the mean over seeds; its end as the comparison measured it."""
    steps = [[(point.step, point.kl, point.reward) for point in path] for path in entry.frontier.values()]
    means = [[sum(column) / len(column) for column in zip(*same, strict=True)] for same in zip(*steps, strict=True)]
    on_the_way = [Point(f"{step:.0f} steps", kl, gold, None) for step, kl, gold in means[:-1]]
    kl, gold = entry.measures[KL].value, entry.measures[GOLD]
    return Curve(entry.name, (*on_the_way, Point(f"{means[-1][0]:.0f} steps", kl, gold.value, gold)))


def _facts(found: Comparison) -> dict[str, str]:
    return {key: found.facts[key] for key in ("model", "trained weights", "budget", "seeds", "evaluation")}


def report(measured: Measured) -> Report:
    """Return the points as a table and a figure."""
    rows = tuple(
        (
            curve.method,
            point.at,
            f"{point.kl:.2f}",
            f"{point.gold:.3f}",
            "" if point.interval is None else f"{point.interval.low:.3f} to {point.interval.high:.3f}",
        )
        for curve in measured.curves
        for point in curve.points
    )

    def draw(axes: list[Axes]) -> None:
        (ax,) = axes
        for n, curve in enumerate(measured.curves):
            trained = curve.method != BEST_OF_N
            colour = COLOURS[n] if trained else INK
            kl, gold = [one.kl for one in curve.points], [one.gold for one in curve.points]
            marker, style = (MARKERS[n], "-") if trained else ("x", "--")
            label = curve.method if trained else f"{curve.method}, KL at most"
            ax.plot(kl, gold, color=colour, marker=marker, linestyle=style, label=label)
            for point in curve.points:
                if point.interval is not None:
                    ax.vlines(point.kl, point.interval.low, point.interval.high, color=colour, linewidth=1)
        ax.set(xlabel="KL(policy ‖ start), nats a completion", ylabel="gold reward of own samples")
        ax.legend(loc="lower right", fontsize=8)

    facts = "; ".join(f"{key}: {value}" for key, value in measured.facts.items())
    return Report(
        title="R1: reward and KL of DPO, IPO, KTO, PPO and best-of-n on a language model",
        protocol=f"Controlled sentiment; {facts}. Each path is the mean over seeds, from the start to the end of "
        "training; 95 % intervals at its end are over prompts and seeds. Best-of-n by the gold reward itself, from "
        f"{measured.samples} answers of the start to each of {measured.prompts} prompts; its KL is the upper bound "
        "log n - (n - 1) / n, its intervals are over prompts.",
        header=("method", "after", "KL, nats", "gold reward", "95 % interval"),
        rows=rows,
        figure=canvas(1, draw),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line: print its table, and draw its figure where a folder is given."""
    name = "r1_language_model"
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"write {name}.svg into this folder")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="of the trained runs (default: runs/compare-HASH)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"trainings of each objective (default: {SEEDS})")
    parser.add_argument("--completions", type=int, help="budget of every stage (default: the embedded task's)")
    chosen = parser.parse_args(arguments)
    with speaking():
        made = report(measure(chosen.runs, chosen.seeds, chosen.completions))
        print(made.text())
        if chosen.out is not None:
            made.save(chosen.out / f"{name}.svg")
            print(f"\nfigure: {chosen.out / f'{name}.svg'}")


if __name__ == "__main__":
    main()
