"""Objectives whose loss is more than that of each example: sorted batches, and a reference that follows the policy."""

import math

import pytest
import torch
from torch import Tensor

from dpo.losses.aot import AOT
from dpo.losses.dpo import DPO
from dpo.losses.trdpo import TRDPO
from dpo.recipes.reproductions.tabular import column, pairs, random_problem, train
from dpo.types import PairLogps

ANSWERS = 6
ORDERED = torch.combinations(torch.arange(ANSWERS))
"""The answer of the smaller number is preferred, for certain."""


def margins(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """What AOT sorts under "paired": the policy's margins and the reference's."""
    return logps.policy_chosen - logps.policy_rejected, logps.reference_chosen - logps.reference_rejected


def ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """What it sorts under "unpaired": the chosen log-ratios and the rejected ones."""
    return logps.policy_chosen - logps.reference_chosen, logps.policy_rejected - logps.reference_rejected


@pytest.mark.parametrize(("pairing", "compared"), [("paired", margins), ("unpaired", ratios)])
def test_aot_raises_every_quantile(pairing, compared):
    # First-order stochastic dominance: at every rank the preferred distribution lies above the other, by a nat here.
    reference, _ = random_problem(seed=3, answers=ANSWERS)
    better, worse = ORDERED.T

    def record(policy: Tensor) -> PairLogps:
        return pairs(policy, reference, better, worse)

    above, below = (side.sort().values for side in compared(record(reference)))
    torch.testing.assert_close(above, below)  # at the start the two are one
    objective = AOT(beta=0.1, pairing=pairing)
    trained = train(lambda p: objective(record(p)).loss, reference, steps=150, learning_rate=0.05).log_softmax(0)
    above, below = (side.sort().values for side in compared(record(trained)))
    assert (above - below > 1).all()


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_aot_sees_two_distributions_and_not_who_belongs_to_whom(pairing):
    # One side is the other one in another order and c nats higher: every rank loses -log σ(β c), and DPO does not.
    values, order, c = column([-3.0, 0.5, 2.0, 7.0]), [2, 0, 3, 1], 1.7
    zeros, ones = torch.zeros(4, dtype=torch.float64), torch.ones(4)
    if pairing == "paired":
        logps = PairLogps(values[order] + c, zeros, values, zeros, ones, ones)
    else:
        logps = PairLogps(values[order] + c, values, zeros, zeros, ones, ones)
    expected = torch.full((4,), math.log1p(math.exp(-0.3 * c)), dtype=torch.float64)
    torch.testing.assert_close(AOT(beta=0.3, pairing=pairing)(logps).losses, expected, rtol=0, atol=1e-14)
    assert (DPO(beta=0.3)(logps).losses - expected).abs().max() > 0.1


def distance(objective: DPO | TRDPO, steps: int) -> float:
    """The gap of two answers' log-ratios to the START after some steps on labels of which 80 % agree.

    The learning rate 4 / β² is the inverse of the largest curvature: the gap to each reference's optimum shrinks at
    least by the factor 1 - 4 * 0.16 a step, that is below 1e-15 within 40 steps.
    """
    gap, reference = torch.zeros(2, dtype=torch.float64)
    share = objective.share if isinstance(objective, TRDPO) else lambda step: 0.0
    for step in range(1, steps + 1):
        leaf = gap.clone().requires_grad_()
        policy, frozen = (torch.stack([x / 2, -x / 2]).log_softmax(0) for x in (leaf, reference))
        out = objective(pairs(policy, frozen, [0], [1], preference=column([0.8])))
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        gap = gap - 4 / objective.beta**2 * gradient
        reference = share(step) * gap + (1 - share(step)) * reference
    return gap.item()


def test_trdpo_by_hard_copies_goes_one_dpo_optimum_further_with_each():
    # Between copies it is DPO: the gap grows by logit(p) / β, so that k rounds end where DPO would at β / k.
    optimum = math.log(0.8 / 0.2) / 0.5
    assert distance(DPO(beta=0.5), 40) == pytest.approx(optimum, abs=1e-9)
    assert distance(DPO(beta=0.5), 160) == pytest.approx(optimum, abs=1e-9)
    for rounds in (1, 2, 4):
        assert distance(TRDPO(beta=0.5, alpha=1.0, tau=40), 40 * rounds) == pytest.approx(rounds * optimum, abs=1e-8)
    assert distance(DPO(beta=0.5 / 4), 160) == pytest.approx(4 * optimum, abs=1e-8)


def test_trdpo_goes_further_the_closer_its_reference_follows():
    fixed = distance(DPO(beta=0.5), 60)
    far = [
        distance(TRDPO(beta=0.5, alpha=alpha, tau=tau), 60) for alpha, tau in ((0.3, 20), (0.6, 20), (0.6, 5), (0.6, 1))
    ]
    assert [fixed, *far] == sorted([fixed, *far])
    assert far[0] > 1.2 * fixed
    assert far[-1] > 10 * fixed
