"""R5: on pairs whose labels favour length DPO grows the answers many times over; R-DPO, DPO-norm and SimPO do not.

Papers: arXiv:2403.19159 (R-DPO), arXiv:2411.15124 (DPO-norm), arXiv:2405.14734 (SimPO).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from matplotlib.axes import Axes
from torch import Tensor

from dpo.losses.dpo import DPO
from dpo.losses.dponorm import DPONorm
from dpo.losses.rdpo import RDPO
from dpo.losses.simpo import SimPO
from dpo.recipes.reproductions.report import COLOURS, INK, Report, canvas, interval, main
from dpo.recipes.reproductions.tabular import Loss, column, train
from dpo.types import LossOutput, PairLogps

PAIRS = 256
STOP = 0.1
"""The reference's probability to end after any token: it writes 10 tokens on average, the end included."""
QUALITY = 4.0
"""Reward of an answer whose tokens are all good, over one without any."""
BIAS = 0.05
"""Reward that the judges give for each token of length."""
STEPS = 100
LEARNING_RATE = 0.02
SEEDS = 30


@dataclass(frozen=True)
class Outcome:
    """Where one objective ended; the tensors are (seeds,)."""

    name: str
    length: Tensor
    """Expected tokens of an answer."""
    quality: Tensor
    """Probability that a token is good, given that the answer goes on."""


@dataclass(frozen=True)
class Labelled:
    """Pairs of answers; (seeds, pairs, 3) numbers of good, bad and end tokens."""

    chosen: Tensor
    rejected: Tensor


def objectives() -> Mapping[str, Loss]:
    """Return what is compared: default settings but for R-DPO's price of a token."""
    return {
        "DPO": DPO(),
        "R-DPO, 0.05": RDPO(alpha=0.05),
        "R-DPO, 0.1": RDPO(alpha=0.1),
        "R-DPO, 0.2": RDPO(alpha=0.2),
        "R-DPO, 0.05, minus": minus_sign(RDPO(alpha=0.05)),
        "DPO-norm": DPONorm(),
        "SimPO": SimPO(),
    }


def minus_sign(objective: RDPO) -> Loss:
    """Return R-DPO with the sign of the length term turned, which some code has: the lengths trade places."""

    def loss(logps: PairLogps) -> LossOutput:
        return objective(replace(logps, chosen_length=logps.rejected_length, rejected_length=logps.chosen_length))

    return loss


def measure(losses: Mapping[str, Loss] | None = None, steps: int = STEPS, seeds: int = SEEDS) -> list[Outcome]:
    """Train the same policy with each objective on the same pairs."""
    reference = column([(1 - STOP) / 2, (1 - STOP) / 2, STOP]).log().expand(seeds, 3)
    data = _labelled(seeds)
    outcomes = [_outcome("reference", reference)]
    for name, loss in (objectives() if losses is None else losses).items():
        trained = train(
            lambda policy, loss=loss: loss(_record(policy, reference, data)).losses.sum() / PAIRS,
            reference,
            steps=steps,
            learning_rate=LEARNING_RATE,
        )
        outcomes.append(_outcome(name, trained.log_softmax(1)))
    return outcomes


def _outcome(name: str, policy: Tensor) -> Outcome:
    good, bad, stop = policy.exp().T
    return Outcome(name, 1 / stop, good / (good + bad))


def _labelled(seeds: int) -> Labelled:
    """Sample two answers of the reference for each pair, and a Bradley-Terry label."""
    generator = torch.Generator().manual_seed(0)

    def answers() -> Tensor:
        draw = torch.rand(seeds, PAIRS, generator=generator, dtype=torch.float64)
        content = (draw.log() / math.log(1 - STOP)).floor()  # tokens before the end: geometric
        good = torch.binomial(content, torch.full_like(content, 0.5), generator=generator)
        return torch.stack([good, content - good, torch.ones_like(content)], dim=2)

    def reward(answer: Tensor) -> Tensor:
        good, bad, _ = answer.unbind(2)
        share = torch.where(good + bad > 0, good / (good + bad).clamp(min=1), 0.5)
        return QUALITY * share + BIAS * answer.sum(2)

    first, second = answers(), answers()
    won = (
        torch.rand(seeds, PAIRS, generator=generator, dtype=torch.float64) < (reward(first) - reward(second)).sigmoid()
    )
    won = won.unsqueeze(2)
    return Labelled(first.where(won, second), second.where(won, first))


def _record(policy: Tensor, reference: Tensor, data: Labelled) -> PairLogps:
    """Score answers under a policy that draws every token alike: the sum over tokens is counts times log-probs."""

    def scores(logps: Tensor, counts: Tensor) -> Tensor:
        return (counts * logps.unsqueeze(1)).sum(2).reshape(-1)  # seeds train side by side: losses are per example

    return PairLogps(
        policy_chosen=scores(policy, data.chosen),
        policy_rejected=scores(policy, data.rejected),
        reference_chosen=scores(reference, data.chosen),
        reference_rejected=scores(reference, data.rejected),
        chosen_length=data.chosen.sum(2).reshape(-1),
        rejected_length=data.rejected.sum(2).reshape(-1),
    )


def report(outcomes: list[Outcome]) -> Report:
    """Return lengths and qualities as a table and a figure."""
    rows = tuple((o.name, interval(o.length).text(1), interval(o.quality).text(3)) for o in outcomes)
    seeds = len(outcomes[0].length)

    def draw(axes: list[Axes]) -> None:
        names = [outcome.name for outcome in outcomes]
        panels = (("length", "expected tokens of an answer"), ("quality", "P(a token is good)"))
        for ax, (field, label), colour in zip(axes, panels, COLOURS, strict=False):
            found = [interval(getattr(outcome, field)) for outcome in outcomes]
            ax.errorbar(
                [i.mean for i in found],
                range(len(found)),
                xerr=[i.half for i in found],
                marker="o",
                color=colour,
                linestyle="",
            )
            ax.axvline(found[0].mean, color=INK, linestyle=":", linewidth=1)
            ax.set(xlabel=label, yticks=range(len(names)), yticklabels=names if field == "length" else [])
            ax.invert_yaxis()
        axes[0].set_xscale("log")
        ticks = (5, 10, 20, 40, 80)
        axes[0].set_xticks(ticks, [str(tick) for tick in ticks])
        axes[0].minorticks_off()

    return Report(
        title="R5: DPO grows the length on length-biased pairs",
        protocol=f"A policy of 3 token probabilities (good, bad, end), 10 tokens an answer at the start; {PAIRS} pairs "
        f"of its samples, Bradley-Terry labels of {QUALITY:g} x share of good tokens + {BIAS:g} x tokens; Adam at "
        f"{LEARNING_RATE:g}, whole data, {STEPS} steps, {seeds} seeds (answers, labels); default settings but R-DPO's "
        "alpha; mean ± 95 % interval over seeds (Student's t).",
        header=("objective", "tokens", "share of good tokens"),
        rows=rows,
        figure=canvas(2, draw),
    )


def experiment() -> Report:
    """Run it at its full size."""
    return report(measure())


if __name__ == "__main__":
    main("r5_length", experiment)
