"""R3: optimising against a learned reward raises the true one, then lowers it; cautious ensembles resist longer.

Papers: arXiv:2210.10760 (over-optimisation), arXiv:2310.02743 (reward ensembles), on a finite set of answers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from torch import Tensor

from dpo.losses.bradleyterry import BradleyTerry
from dpo.losses.reduce import log1mexp
from dpo.losses.rloo import RLOO
from dpo.recipes.reproductions.report import COLOURS, INK, MARKERS, Report, canvas, interval, main
from dpo.recipes.reproductions.tabular import column, gibbs, kl
from dpo.rewards.ensemble import Combination, combined
from dpo.types import RankingScores, Rollout

ANSWERS = 4096
"""The reference writes each with the same probability."""
SEEN, HIDDEN = 6, 2
"""Features of an answer that reward models see, and those that they do not."""
TAILS = 10
"""Degrees of freedom of the features' joint Student t law: some answers lie far from all others."""
USUAL = 1.5
"""Root mean square of an answer's features up to which it counts as usual; the true reward falls beyond it."""
PENALTY = 1.5
"""How fast it falls there, in standard deviations of its smooth part."""
PAIRS = 500
"""Labelled comparisons, the same for all reward models of a seed."""
FLIPPED = 0.1
"""Share of labels that are wrong."""
MEMBERS = 5
"""Reward models of a seed: they differ in their starts and in the order of the batches, as in the paper."""
WIDTH = 32
"""Hidden units of a reward model."""
BATCH, STEPS, LEARNING_RATE = 32, 400, 0.01
"""Of a reward model: pairs a step, steps (some 25 passes) and the rate of AdamW."""
VARIANCE_WEIGHT = 1.0
"""The paper's lambda, for rewards of unit variance."""
SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""The n of best-of-n: every curve is read at the KL of one of these."""
POLICY_FEATURES = 64
"""Random features in which the logits of RLOO's policy are linear."""
ROLLOUT, UPDATES, POLICY_RATE = 128, 400, 0.05
"""Completions a rollout, rollouts (each for one update), and Adam's rate."""
SEEDS = 20

OPTIMISERS = ("best-of-n", "Gibbs", "RLOO")
REWARDS = ("one model", "mean", "mean - variance", "minimum")


@dataclass(frozen=True)
class Task:
    """One seed's answers and what is known of them."""

    features: Tensor
    """(answers, SEEN + HIDDEN)."""
    gold: Tensor
    """True rewards, (answers,), of mean 0 and variance 1 under the reference."""
    rewards: Mapping[str, Tensor]
    """What is optimised, by name: (models, answers), more than one only where the models are tried one by one."""


@dataclass(frozen=True)
class Curve:
    """What one optimiser reached with one reward at growing KL; the tensors are (points, seeds)."""

    optimiser: str
    reward: str
    gold: Tensor
    """Expected true reward, above the reference's."""
    proxy: Tensor
    """The same of the reward that was optimised."""
    kl: tuple[float, ...]
    """KL(policy || reference), nats, of each point; the same for every curve."""

    @property
    def fall(self) -> Tensor:
        """What each seed loses from the point where the mean over seeds is highest to the last."""
        return self.gold[self.gold.mean(1).argmax()] - self.gold[-1]


def measure(
    samples: Sequence[int] = SAMPLES,
    seeds: int = SEEDS,
    *,
    pairs: int = PAIRS,
    updates: int = UPDATES,
    optimisers: Sequence[str] = OPTIMISERS,
) -> list[Curve]:
    """Fit reward models, optimise against each of them and against ensembles, and look at the true reward."""
    tasks = [_task(seed, pairs) for seed in range(seeds)]
    away = tuple(kl(best_of(n, tasks[0].gold), _uniform()).item() for n in samples)
    curves = []
    for optimiser in optimisers:
        if optimiser == "RLOO":
            found = _reinforced(tasks, away, updates)
        else:
            found = [_optimised(task, optimiser, samples, away) for task in tasks]
        for reward in ("gold", *REWARDS):
            gold, proxy = (torch.stack(points, 1) for points in zip(*(one[reward] for one in found), strict=True))
            curves.append(Curve(optimiser, reward, gold, proxy, away))
    return curves


def rewards(gold: Tensor, members: Tensor) -> Mapping[str, Tensor]:
    """Return the true reward and those that reward models (members, answers) give, alone and as an ensemble.

    The minimum is the worst-case and mean - lambda x variance the uncertainty-weighted optimisation of
    arXiv:2310.02743.
    """
    scores = members.tolist()
    hows: Mapping[str, Combination] = {"mean": "mean", "mean - variance": "mean_minus_variance", "minimum": "min"}
    ensembles = {name: column(combined(scores, how, VARIANCE_WEIGHT).scores) for name, how in hows.items()}
    return {"gold": gold.unsqueeze(0), "one model": members} | {name: e.unsqueeze(0) for name, e in ensembles.items()}


def best_of(n: float, reward: Tensor) -> Tensor:
    """Return the log-probs (answers,) of the best of n samples of a uniform reference: rewards without ties.

    P(the best is among the k lowest of M) = (k / M)^n. KL = log n - (n - 1) / n for M without end, and less for few.
    Paper: arXiv:2210.10760, appendix G.
    """
    k = torch.arange(1, len(reward) + 1, dtype=torch.float64)
    place = reward.argsort().argsort()
    return (n * (k / len(reward)).log() + log1mexp(n * ((k - 1) / k).log()))[place]  # k^n - (k - 1)^n may underflow


def _uniform() -> Tensor:
    return torch.zeros(ANSWERS, dtype=torch.float64).log_softmax(0)


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean(-1, keepdim=True)) / values.std(-1, correction=0, keepdim=True)


def _task(seed: int, pairs: int) -> Task:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = normal(TAILS, ANSWERS).square().mean(0).sqrt()
    features = normal(ANSWERS, SEEN + HIDDEN) / scale.unsqueeze(1)
    inward, bias, outward = normal(SEEN + HIDDEN, 16) * 1.5 / (SEEN + HIDDEN) ** 0.5, normal(16), normal(16)
    smooth = _standardised(torch.tanh(features @ inward + bias) @ outward)
    unusual = (features.square().mean(1).sqrt() - USUAL).clamp(min=0)
    gold = _standardised(smooth - PENALTY * unusual)
    first, second = torch.randint(ANSWERS, (2, pairs), generator=generator)
    wrong = torch.rand(pairs, generator=generator) < FLIPPED
    won = (gold[first] > gold[second]) ^ wrong
    better, worse = first.where(won, second), second.where(won, first)
    return Task(features, gold, rewards(gold, _fitted(features[:, :SEEN], better, worse, generator)))


def _fitted(seen: Tensor, better: Tensor, worse: Tensor, generator: torch.Generator) -> Tensor:
    """Fit the reward models of a seed side by side: the loss is per pair, and no parameter is shared."""
    shapes = ((SEEN, WIDTH), (1, WIDTH), (WIDTH, 1))
    weights = [
        (torch.randn(MEMBERS, *shape, generator=generator, dtype=torch.float64) / size**0.5).requires_grad_()
        for shape, size in zip(shapes, (SEEN, 1, WIDTH), strict=True)
    ]

    def scored(features: Tensor) -> Tensor:
        inward, bias, outward = weights
        return (torch.relu(features @ inward + bias) @ outward).squeeze(2)

    objective, optimiser = BradleyTerry(), torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=1e-4)
    index, rank = torch.arange(MEMBERS * BATCH).repeat_interleave(2), torch.tensor([0, 1]).repeat(MEMBERS * BATCH)
    for _ in range(STEPS):
        drawn = torch.randint(len(better), (MEMBERS, BATCH), generator=generator)
        compared = torch.stack([better[drawn], worse[drawn]], dim=2).reshape(MEMBERS, 2 * BATCH)
        optimiser.zero_grad()
        objective(RankingScores(scored(seen[compared]).reshape(-1), rank, index)).losses.sum().div(BATCH).backward()
        optimiser.step()
    with torch.no_grad():
        return _standardised(scored(seen.expand(MEMBERS, -1, -1)))


Found = Mapping[str, tuple[Tensor, Tensor]]
"""True and optimised reward of each kind of reward, (points,) each, of one seed."""


def _optimised(task: Task, optimiser: str, samples: Sequence[int], away: Sequence[float]) -> Found:
    """Follow the exact policies of best-of-n or of the Gibbs law."""

    def policies(reward: Tensor) -> Iterator[Tensor]:
        for n, distance in zip(samples, away, strict=True):
            yield best_of(n, reward) if optimiser == "best-of-n" else gibbs_at(reward, distance)

    found = {}
    for name, models in task.rewards.items():
        laws = torch.stack([torch.stack(list(policies(model))) for model in models]).exp()  # (models, points, answers)
        gold, proxy = laws @ task.gold, (laws @ models.unsqueeze(2)).squeeze(2)
        found[name] = gold.mean(0), proxy.mean(0)
    return found


def gibbs_at(reward: Tensor, distance: float) -> Tensor:
    """Return the policy of highest expected reward at a KL: reference exp(reward / beta) / Z, beta by bisection."""
    low, high = -10.0, 12.0  # log of 1 / beta
    for _ in range(50):
        middle = (low + high) / 2
        near = kl(gibbs(_uniform(), reward, math.exp(-middle)), _uniform()) < distance
        low, high = (middle, high) if near else (low, middle)
    return gibbs(_uniform(), reward, math.exp(-low))


def _reinforced(tasks: Sequence[Task], away: Sequence[float], updates: int) -> list[Found]:
    """Train one policy for each reward of each seed, side by side, and read its path at the distances asked for.

    No KL penalty, as in most of arXiv:2210.10760: the path away from the reference is what is looked at.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = [name for name, models in tasks[0].rewards.items() for _ in models]
    reward = torch.stack([torch.cat(list(task.rewards.values())) for task in tasks])  # (seeds, kinds, answers)
    gold = torch.stack([task.gold for task in tasks]).unsqueeze(1)
    size = SEEN + HIDDEN
    inward = torch.randn(len(tasks), size, POLICY_FEATURES, generator=generator, dtype=torch.float64) / size**0.5
    bias = torch.randn(len(tasks), 1, POLICY_FEATURES, generator=generator, dtype=torch.float64)
    basis = torch.tanh(torch.stack([task.features for task in tasks]) @ inward + bias).mT
    weights = torch.zeros(len(tasks), len(kinds), POLICY_FEATURES, dtype=torch.float64, requires_grad=True)
    objective, optimiser = RLOO(kl_coefficient=0.0), torch.optim.Adam([weights], lr=POLICY_RATE)
    path: list[Tensor] = []
    for update in range(updates + 1):
        policy = (weights @ basis).log_softmax(2)
        with torch.no_grad():
            law = policy.exp()
            path.append(torch.stack([kl(policy, _uniform()), (law * gold).sum(2), (law * reward).sum(2)]))
        if update < updates:
            drawn = torch.multinomial(law.flatten(0, 1), ROLLOUT, replacement=True, generator=generator)
            optimiser.zero_grad()
            _rollouts(objective, policy.flatten(0, 1), reward.flatten(0, 1), drawn).backward()
            optimiser.step()
    return [_read(torch.stack(path)[:, :, seed], kinds, away) for seed in range(len(tasks))]


def _rollouts(objective: RLOO, policy: Tensor, reward: Tensor, drawn: Tensor) -> Tensor:
    """Return the sum of the losses of all policies, each of which samples its own completions of one token."""
    total = policy.new_zeros(())
    for logps, score in zip(policy.gather(1, drawn), reward.gather(1, drawn), strict=True):
        rollout = Rollout(
            policy=logps.unsqueeze(1),
            sampler=logps.detach().unsqueeze(1),
            completion_mask=torch.ones(len(logps), 1, dtype=torch.bool),
            score=score,
            prompt_index=torch.zeros(len(logps), dtype=torch.long),
            reference=torch.full((len(logps), 1), -math.log(ANSWERS), dtype=torch.float64),
        )
        total = total + objective(objective.credit(rollout, 0.0)).loss
    return total


def _read(path: Tensor, kinds: Sequence[str], away: Sequence[float]) -> Found:
    """Interpolate gold and proxy linearly in KL between looks at (looks, [kl, gold, proxy], kinds).

    Raises:
        RuntimeError: a policy ended nearer to the reference than asked for.
    """
    reached = path[-1, 0].min().item()
    if reached < away[-1]:
        raise RuntimeError(f"r3: RLOO ended at a KL of {reached:.2f} nats, expected {away[-1]:.2f}: give more updates")
    found: dict[str, list[Tensor]] = {}
    for n, name in enumerate(kinds):
        distance = path[:, 0, n].cummax(0).values
        wanted = column(away)
        after = torch.searchsorted(distance, wanted).clamp(min=1)
        share = (wanted - distance[after - 1]) / (distance[after] - distance[after - 1])
        low, high = path[after - 1, 1:, n], path[after, 1:, n]
        found.setdefault(name, []).append(low + share.unsqueeze(1) * (high - low))
    means = {name: torch.stack(models).mean(0) for name, models in found.items()}
    return {name: (mean[:, 0], mean[:, 1]) for name, mean in means.items()}


def report(curves: Sequence[Curve]) -> Report:
    """Return the ends of the curves as a table, and the curves as a figure."""
    ends = {(curve.optimiser, curve.reward): curve.gold[-1] for curve in curves}
    away, seeds = curves[0].kl, curves[0].gold.shape[1]
    optimisers = tuple(dict.fromkeys(curve.optimiser for curve in curves))
    rows = tuple(
        (
            curve.optimiser,
            curve.reward,
            interval(curve.proxy[-1]).text(2),
            interval(curve.gold[-1]).text(2),
            f"{away[int(curve.gold.mean(1).argmax())] ** 0.5:.2f}",
            interval(curve.fall).text(2),
            interval(curve.gold[-1] - ends[curve.optimiser, "one model"]).text(2),
            interval(curve.gold[-1] - ends[curve.optimiser, "mean"]).text(2),
        )
        for curve in curves
    )

    def draw(axes: list[Axes]) -> None:
        root = [distance**0.5 for distance in away]
        top = 1.05 * max(curve.proxy.mean(1).max().item() for curve in curves)
        for ax, optimiser in zip(axes, optimisers, strict=True):
            for curve in (curve for curve in curves if curve.optimiser == optimiser):
                n = REWARDS.index(curve.reward) if curve.reward in REWARDS else None
                colour = INK if n is None else COLOURS[n]
                means = [interval(at) for at in curve.gold]
                mark = None if n is None else MARKERS[n]
                style = "--" if n is None else "-"
                label = "optimising the true reward" if n is None else curve.reward
                if curve.reward == "one model":
                    own = [value.item() for value in curve.proxy.mean(1)]
                    ax.plot(root, own, color=colour, linestyle=":", label="one model, by its own reward")
                    label = "one model, 95 % over seeds"
                    ax.fill_between(
                        root, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.2, linewidth=0
                    )
                ax.plot(root, [m.mean for m in means], color=colour, marker=mark, linestyle=style, label=label)
            ax.set(xlabel="√KL(policy ‖ reference), √nats", ylim=(-0.1, top), title=optimiser)
            ax.axhline(0, color=INK, linewidth=0.8)
        axes[0].set_ylabel("true reward above the reference's (dotted: the model's)")
        axes[0].legend(loc="upper left", fontsize=8)

    return Report(
        title="R3: a learned reward, optimised too far, lowers the true one; cautious ensembles resist longer",
        protocol=f"{ANSWERS} answers of {SEEN + HIDDEN} heavy-tailed features, uniform reference; the true reward, a "
        f"random network less {PENALTY:g} x what is unusual about an answer, has variance 1; {MEMBERS} reward models "
        f"of {WIDTH} hidden units see {SEEN} features and fit {PAIRS} pairs, {FLIPPED:.0%} of them mislabelled; "
        f"lambda {VARIANCE_WEIGHT:g}; end: the KL of best-of-{SAMPLES[-1]}, {away[-1]:.2f} nats; {seeds} seeds (task, "
        "labels, models, samples); mean ± 95 % interval over seeds (Student's t), differences paired by seed.",
        header=(
            "optimiser",
            "reward",
            "optimised reward, end",
            "true reward, end",
            "√KL of its peak",
            "fall from the peak",
            "end, over one model",
            "end, over the mean",
        ),
        rows=rows,
        figure=canvas(len(optimisers), draw),
    )


def experiment() -> Report:
    """Run it at its full size."""
    return report(measure())


if __name__ == "__main__":
    main("r3_overoptimisation", experiment)
