"""R2: with deterministic preferences IPO stays near the reference, DPO leaves it whatever its beta.

Paper: arXiv:2310.12036, sections 4.2 and 5.3: three answers in a total order, sampled without noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from torch import Tensor

from dpo.losses.dpo import DPO
from dpo.losses.ipo import IPO
from dpo.losses.objective import Objective
from dpo.recipes.reproductions.report import COLOURS, INK, MARKERS, Report, canvas, interval, main
from dpo.recipes.reproductions.tabular import column, kl, pairs, train

ANSWERS = 3
BATCH = 9
"""Pairs a step, drawn anew."""
STRENGTHS = (0.3, 1.0, 3.0)
"""beta of DPO and tau of IPO: what holds the policy to the reference."""
STEPS = 3200
LEARNING_RATE = 0.01
LOOKS = 8
"""Times that the policy is looked at, each after twice the steps of the one before."""
SEEDS = 10


@dataclass(frozen=True)
class Curve:
    """How far one objective went from the reference."""

    objective: str
    strength: float
    steps: tuple[int, ...]
    """When it was looked at."""
    kl: Tensor
    """KL(policy || reference) in nats, (looks, seeds)."""
    limit: float
    """The same of the objective's optimum: ln 3 is the KL of the best answer alone."""


def measure(
    strengths: Sequence[float] = STRENGTHS, steps: int = STEPS, seeds: int = SEEDS, looks: int = LOOKS
) -> list[Curve]:
    """Train both objectives at each strength from a uniform reference; every seed has its own pairs."""
    curves = []
    for strength in strengths:
        curves.append(_curve("DPO", DPO(beta=strength), strength, _alone(), steps, seeds, looks))
        ipo = IPO(tau=strength, reduction="sum")
        curves.append(_curve("IPO", ipo, strength, _least_squares(strength), steps, seeds, looks))
    return curves


def _alone() -> Tensor:
    """Return the best answer with probability 1, as log-probs."""
    return column([0.0, -1e9, -1e9])


def _least_squares(tau: float) -> Tensor:
    """Return IPO's optimum: gaps of 1 / (2 tau) wanted of three differences at once give log-ratios a third apart."""
    step = 2 / 3 / (2 * tau)
    return column([step, 0.0, -step]).log_softmax(0)


def _curve(
    name: str, objective: Objective, strength: float, optimum: Tensor, steps: int, seeds: int, looks: int
) -> Curve:
    uniform = torch.zeros(seeds, ANSWERS, dtype=torch.float64).log_softmax(1)
    generator = torch.Generator().manual_seed(0)
    ordered = torch.combinations(torch.arange(ANSWERS))  # the better answer has the smaller number
    place = ANSWERS * torch.arange(seeds).unsqueeze(1)  # seeds train side by side: losses are per example
    when = sorted({steps >> n for n in range(looks)})
    seen: list[Tensor] = []

    def loss(policy: Tensor) -> Tensor:
        drawn = ordered[torch.randint(len(ordered), (seeds, BATCH), generator=generator)] + place.unsqueeze(2)
        better, worse = drawn.reshape(-1, 2).T
        return objective(pairs(policy.reshape(-1), uniform.reshape(-1), better, worse)).losses.sum() / BATCH

    def watch(step: int, logits: Tensor) -> None:
        if step in when:
            seen.append(kl(logits.log_softmax(1), uniform))

    train(loss, uniform, steps=steps, learning_rate=LEARNING_RATE, watch=watch)
    return Curve(name, strength, tuple(when), torch.stack(seen), kl(optimum, uniform[0]).item())


def report(curves: Sequence[Curve]) -> Report:
    """Return the distances as a table and a figure."""
    rows = tuple(
        (
            curve.objective,
            f"{curve.strength:g}",
            *(interval(curve.kl[n]).text(3) for n in (0, len(curve.steps) // 2, -1)),
            f"{curve.limit:.3f}",
        )
        for curve in curves
    )
    steps, seeds = curves[0].steps, curves[0].kl.shape[1]

    def draw(axes: list[Axes]) -> None:
        strengths = sorted({curve.strength for curve in curves})
        for ax, objective, symbol in zip(axes, ("DPO", "IPO"), ("β", "τ"), strict=True):
            for curve in (curve for curve in curves if curve.objective == objective):
                n = strengths.index(curve.strength)
                means = [interval(at) for at in curve.kl]
                label = f"{symbol} = {curve.strength:g}"
                ax.plot(steps, [m.mean for m in means], color=COLOURS[n], marker=MARKERS[n], label=label)
                ax.fill_between(
                    steps, [m.low for m in means], [m.high for m in means], color=COLOURS[n], alpha=0.25, linewidth=0
                )
                if objective == "IPO":
                    ax.axhline(curve.limit, color=COLOURS[n], linestyle=":", linewidth=1)
            if objective == "DPO":
                ax.axhline(curves[0].limit, color=INK, linestyle=":", linewidth=1)
            ax.set(xlabel="optimiser steps", xscale="log", ylim=(-0.05, 1.2), title=objective)
            ax.legend(loc="upper left" if objective == "DPO" else "upper right")
        axes[0].set_ylabel("KL(policy ‖ reference), nats")
        axes[1].annotate("dotted: the optimum", (0.04, 0.93), xycoords="axes fraction", fontsize=8)

    return Report(
        title="R2: IPO stays near the reference under deterministic preferences, DPO does not",
        protocol=f"{ANSWERS} answers in a total order, uniform reference, {BATCH} noiseless pairs a step, Adam at "
        f"{LEARNING_RATE:g}, {seeds} seeds (the pairs drawn); KL to the reference in nats, mean ± 95 % interval over "
        "seeds (Student's t). Limit: the optimum's.",
        header=("objective", "beta or tau", *(f"{steps[n]} steps" for n in (0, len(steps) // 2, -1)), "limit"),
        rows=rows,
        figure=canvas(2, draw),
    )


def experiment() -> Report:
    """Run it at its full size."""
    return report(measure())


if __name__ == "__main__":
    main("r2_bandit", experiment)
