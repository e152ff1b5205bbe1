"""R1: DPO reaches the reward-KL frontier of a reward model followed by its Gibbs policy, at every beta.

Paper: arXiv:2305.18290, section 4 and figure 2 (left), in a table instead of a language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from torch import Tensor

from dpo.losses.dpo import DPO
from dpo.recipes.reproductions.report import COLOURS, INK, Report, canvas, interval, main
from dpo.recipes.reproductions.tabular import fit_rewards, gibbs, kl, minimise, pairs, random_problem

ANSWERS = 8
JUDGEMENTS = 40
"""Noisy labels for each pair of answers."""
BETAS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SEEDS = 10


@dataclass(frozen=True)
class Point:
    """Where the policies of one beta stand; every tensor is (seeds,)."""

    beta: float
    dpo_reward: Tensor
    """Expected TRUE reward of DPO's policy, above the reference's."""
    dpo_kl: Tensor
    """KL(policy || reference), nats."""
    model_reward: Tensor
    """The same of the fitted reward model's Gibbs policy."""
    model_kl: Tensor
    true_reward: Tensor
    """The same of the true rewards' Gibbs policy: no policy has a higher reward at its KL."""
    true_kl: Tensor
    distance: Tensor
    """Largest difference between a log-prob of DPO's policy and of the reward model's, nats."""

    @property
    def shortfall(self) -> Tensor:
        """How much less reward - beta KL DPO's policy has than the frontier's, which has the most."""
        return (self.true_reward - self.beta * self.true_kl) - (self.dpo_reward - self.beta * self.dpo_kl)


def measure(betas: Sequence[float] = BETAS, seeds: int = SEEDS) -> list[Point]:
    """Sample labels of all pairs of answers, once a seed, and fit DPO and the reward model to the same labels."""
    return [_point(beta, [_policies(beta, seed) for seed in range(seeds)]) for beta in betas]


def _policies(beta: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reference, rewards = random_problem(seed, ANSWERS)
    first, second = torch.combinations(torch.arange(ANSWERS)).T
    odds = torch.sigmoid(rewards[first] - rewards[second])
    wins = torch.binomial(torch.full_like(odds, JUDGEMENTS), odds, generator=torch.Generator().manual_seed(seed))
    share = wins / JUDGEMENTS
    won = share >= 0.5
    better, worse, preference = first.where(won, second), second.where(won, first), share.where(won, 1 - share)
    trained = minimise(DPO(beta=beta), lambda p: pairs(p, reference, better, worse, preference=preference), reference)
    modelled = gibbs(reference, fit_rewards(better, worse, preference, ANSWERS), beta)
    return reference, rewards, trained, modelled, gibbs(reference, rewards, beta)


def _point(beta: float, found: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]) -> Point:
    reference, rewards, *policies = (torch.stack(column) for column in zip(*found, strict=True))
    reward = [((policy.exp() - reference.exp()) * rewards).sum(1) for policy in policies]
    away = [kl(policy, reference) for policy in policies]
    distance = (policies[0] - policies[1]).abs().amax(1)
    return Point(beta, reward[0], away[0], reward[1], away[1], reward[2], away[2], distance)


def report(points: Sequence[Point]) -> Report:
    """Return the frontier as a table and a figure."""
    rows = tuple(
        (
            f"{point.beta:g}",
            interval(point.dpo_reward).text(3),
            interval(point.model_reward).text(3),
            interval(point.dpo_kl).text(3),
            interval(point.model_kl).text(3),
            f"{point.distance.max().item():.0e}",
            interval(point.shortfall).text(3),
        )
        for point in points
    )

    def draw(axes: list[Axes]) -> None:
        (ax,) = axes
        kinds = (("true_kl", "true_reward", INK, None), ("model_kl", "model_reward", COLOURS[1], "s"))
        labels = ("frontier: true reward, then Gibbs", "reward model, then Gibbs")
        for (x, y, colour, marker), label in zip(kinds, labels, strict=True):
            means = [(interval(getattr(p, x)).mean, interval(getattr(p, y)).mean) for p in points]
            size = 9 if marker else 0
            ax.plot(
                *zip(*means, strict=True),
                color=colour,
                marker=marker,
                markersize=size,
                markerfacecolor="none",
                linestyle="" if marker else "--",
                label=label,
            )
        away, reward = ([interval(getattr(p, name)) for p in points] for name in ("dpo_kl", "dpo_reward"))
        ax.errorbar(
            [i.mean for i in away],
            [i.mean for i in reward],
            xerr=[i.half for i in away],
            yerr=[i.half for i in reward],
            color=COLOURS[0],
            marker="o",
            markersize=4,
            linewidth=0,
            elinewidth=1,
            label="DPO, 95 % over seeds",
        )
        for p, x, y in zip(points, away, reward, strict=True):
            place = (7, 7) if p is points[0] else (7, -13)  # the strongest stands close to the next
            ax.annotate(f"β = {p.beta:g}", (x.mean, y.mean), place, textcoords="offset points", fontsize=8)
        ax.set(xlabel="KL(policy ‖ reference), nats", ylabel="true reward above the reference's")
        ax.legend(loc="lower right")

    seeds = len(points[0].distance)
    return Report(
        title="R1: DPO stands on the frontier of its reward model",
        protocol=f"{ANSWERS} answers, every pair judged {JUDGEMENTS} times by Bradley-Terry labels, {seeds} seeds "
        "(reference, rewards, labels); "
        "gain = expected true reward above the reference's; KL in nats; "
        "short of the frontier in gain - beta KL; mean ± 95 % interval over seeds (Student's t).",
        header=(
            "beta",
            "gain, DPO",
            "gain, model then Gibbs",
            "KL, DPO",
            "KL, model then Gibbs",
            "largest difference of a log-prob",
            "short of the frontier",
        ),
        rows=rows,
        figure=canvas(1, draw),
    )


def experiment() -> Report:
    """Run it at its full size."""
    return report(measure())


if __name__ == "__main__":
    main("r1_frontier", experiment)
