"""R4: KTO with 1 desirable to 10 undesirable completions: the rule for its weights beats no weights.

Paper: arXiv:2402.01306, eq. 8 of version 1 and its experiment with few desirable examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from torch import Tensor

from dpo.losses.kto import KTO, balanced_weights
from dpo.recipes.reproductions.report import COLOURS, INK, MARKERS, Report, canvas, interval, main
from dpo.recipes.reproductions.tabular import kl, train
from dpo.types import JudgementLogps

PROMPTS, SENSIBLE, NONSENSE = 8, 8, 24
"""Answers of each prompt: those that the reference writes, and those that it hardly ever does, all undesirable. In
language almost every string is of the second kind, and what training takes from the first kind has to go somewhere."""
RARITY = 5.0
"""How far the logits of nonsense lie below those of sensible answers on average, nats."""
DESIRABLE, UNDESIRABLE = 160, 1600
BATCH = 88
"""Judgements a step: 8 desirable ones on average."""
STEPS = 300
LEARNING_RATE = 0.1
SEEDS = 10
LOOK = 25
"""Steps between two looks at the policy."""


@dataclass(frozen=True)
class Curve:
    """How one setting of the weights trained; the tensors are (looks, seeds)."""

    name: str
    weights: tuple[float, float]
    """(desirable, undesirable)."""
    steps: tuple[int, ...]
    quality: Tensor
    """Probability that a sample of the policy is judged desirable, averaged over prompts."""
    kl: Tensor
    """KL(policy || reference), nats, averaged over prompts."""


@dataclass(frozen=True)
class Data:
    """Judged samples of the reference."""

    reference: Tensor
    """Log-probs, (prompts, answers)."""
    odds: Tensor
    """P(desirable) of each answer, (prompts, answers)."""
    prompt: Tensor
    answer: Tensor
    desirable: Tensor


def measure(steps: int = STEPS, seeds: int = SEEDS) -> list[Curve]:
    """Train KTO on the same samples without weights, and with weights at both ends of the rule's interval."""
    settings: Mapping[str, tuple[float, float]] = {
        "no weights": (1.0, 1.0),
        "rule, quotient 1": balanced_weights(DESIRABLE, UNDESIRABLE),
        "rule, quotient 4/3": balanced_weights(DESIRABLE, UNDESIRABLE, ratio=4 / 3),
    }
    return [_curve(name, weights, steps, seeds) for name, weights in settings.items()]


def _sampled(generator: torch.Generator) -> Data:
    """Draw prompts and answers from the reference and keep the first of each label."""
    answers = SENSIBLE + NONSENSE
    logits, scores = torch.randn(2, PROMPTS, answers, generator=generator, dtype=torch.float64)
    sensible = torch.arange(answers) < SENSIBLE
    reference = torch.where(sensible, logits, logits - RARITY).log_softmax(1)
    odds = torch.where(sensible, torch.sigmoid(2 * scores), 0.0)
    parts = []
    for share, size in ((odds, DESIRABLE), (1 - odds, UNDESIRABLE)):
        law = (reference.exp() * share).reshape(-1)
        parts.append(torch.multinomial(law, size, replacement=True, generator=generator))
    place = torch.cat(parts)
    return Data(reference, odds, place // answers, place % answers, torch.arange(len(place)) < DESIRABLE)


def _curve(name: str, weights: tuple[float, float], steps: int, seeds: int) -> Curve:
    objective = KTO(desirable_weight=weights[0], undesirable_weight=weights[1])
    when = tuple(range(0, steps + 1, LOOK))
    trained = [_trained(objective, seed, steps) for seed in range(seeds)]
    quality, away = (torch.stack(column, dim=1) for column in zip(*trained, strict=True))
    return Curve(name, weights, when, quality, away)


def _trained(objective: KTO, seed: int, steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data = _sampled(generator)
    quality: list[Tensor] = []
    away: list[Tensor] = []

    def loss(policy: Tensor) -> Tensor:
        batch = torch.randint(len(data.prompt), (BATCH,), generator=generator)
        prompt, answer = data.prompt[batch], data.answer[batch]
        other = answer.roll(1)  # answers under other prompts, up to chance
        record = JudgementLogps(
            policy=policy[prompt, answer],
            reference=data.reference[prompt, answer],
            desirable=data.desirable[batch],
            length=torch.ones_like(answer),
            policy_mismatched=policy[prompt, other],
            reference_mismatched=data.reference[prompt, other],
        )
        return objective(record).loss

    def watch(step: int, logits: Tensor) -> None:
        if step % LOOK == 0:
            policy = logits.log_softmax(1)
            quality.append((policy.exp() * data.odds).sum(1).mean())
            away.append(kl(policy, data.reference).mean())

    train(loss, data.reference, steps=steps, learning_rate=LEARNING_RATE, watch=watch)
    return torch.stack(quality), torch.stack(away)


def report(curves: list[Curve]) -> Report:
    """Return what the weights gave as a table and a figure."""
    rows = tuple(
        (
            curve.name,
            f"{curve.weights[0]:.4g}, {curve.weights[1]:.4g}",
            interval(curve.quality[-1]).text(3),
            interval(curve.quality[-1] - curve.quality[0]).text(3),
            interval(curve.quality[-1] - curves[0].quality[-1]).text(3) if n else "",
            interval(curve.kl[-1]).text(2),
        )
        for n, curve in enumerate(curves)
    )
    steps, seeds = curves[0].steps, curves[0].quality.shape[1]

    def draw(axes: list[Axes]) -> None:
        (ax,) = axes
        for n, curve in enumerate(curves):
            gains = [interval(at) for at in curve.quality - curve.quality[0]]
            ax.plot(steps, [g.mean for g in gains], color=COLOURS[n], marker=MARKERS[n], label=curve.name)
            ax.fill_between(
                steps, [g.low for g in gains], [g.high for g in gains], color=COLOURS[n], alpha=0.2, linewidth=0
            )
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set(xlabel="optimiser steps", ylabel="gain in P(sample is desirable)")
        ax.legend(loc="best")

    return Report(
        title="R4: with 1 desirable to 10 undesirable, KTO needs its weights",
        protocol=f"{PROMPTS} prompts of {SENSIBLE} sensible and {NONSENSE} nonsensical answers; "
        f"{DESIRABLE} desirable and {UNDESIRABLE} undesirable samples "
        f"of the reference; KTO at beta {KTO().beta:g}, {BATCH} judgements a step, Adam at {LEARNING_RATE:g}, "
        f"{steps[-1]} steps, {seeds} seeds (task, samples, batches); mean ± 95 % interval over seeds (Student's t). "
        "Quality: probability that a sample of the policy is desirable; differences are paired by seed.",
        header=("weights", "desirable, undesirable", "quality", "over the reference", "over no weights", "KL, nats"),
        rows=rows,
        figure=canvas(1, draw),
    )


def experiment() -> Report:
    """Run it at its full size."""
    return report(measure())


if __name__ == "__main__":
    main("r4_imbalance", experiment)
