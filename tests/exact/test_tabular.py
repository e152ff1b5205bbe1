"""What DPO, IPO, KTO and SFT converge to: a softmax policy over a handful of answers, the population as the batch.

Answers have one token, float64 throughout; the optimum is found by L-BFGS and compared with its closed form.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dpo.losses.dpo import DPO
from dpo.losses.ipo import IPO
from dpo.losses.kto import KTO
from dpo.losses.sft import SFT
from dpo.recipes.reproductions.tabular import bradley_terry, column, gibbs, minimise, pairs, random_problem
from dpo.types import JudgementLogps, PairLogps

ANSWERS = 5
ALL_PAIRS = [(i, j) for i in range(ANSWERS) for j in range(i)]
CHAIN = [(i, i + 1) for i in range(ANSWERS - 1)]


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("compared", ["all pairs", "random weights", "chain"])
def test_dpo_reaches_the_kl_regularised_optimum(beta: float, compared: str):
    reference, rewards = random_problem(seed=0)
    better, worse, preference = bradley_terry(rewards, CHAIN if compared == "chain" else ALL_PAIRS)
    weight = torch.ones_like(preference)
    if compared == "random weights":
        weight = 0.1 + torch.rand(len(better), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def record(policy: Tensor) -> PairLogps:
        return pairs(policy, reference, better, worse, preference=preference, weight=weight)

    optimum = minimise(DPO(beta=beta), record, reference)
    # argmax E[r] - beta KL(pi || pi_ref) is pi_ref exp(r / beta) / Z, whichever pairs were compared.
    torch.testing.assert_close(optimum, gibbs(reference, rewards, beta), rtol=0, atol=1e-6)


def two_answers(policy: Tensor) -> PairLogps:
    """Answer 0 is preferred to answer 1 for certain; the reference is uniform."""
    uniform = torch.full((2,), -math.log(2), dtype=torch.float64)
    return pairs(policy, uniform, [0], [1])


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_ipo_stays_near_the_reference_under_a_certain_preference(tau: float):
    optimum = minimise(IPO(tau=tau, reduction="sum"), two_answers, torch.zeros(2, dtype=torch.float64))
    assert optimum[0].exp().item() == pytest.approx(1 / (1 + math.exp(-1 / (2 * tau))), abs=1e-9)


def test_dpo_does_not():
    # The gap h of the two logits obeys dh/dn = 2 σ(-h) at rate 1, so that e^h -> 2n: the worse answer's probability
    # halves with every doubling of the steps: it has no limit but 0.
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    worse = []
    for step in range(1, 401):
        (gradient,) = torch.autograd.grad(DPO(beta=1)(two_answers(logits.log_softmax(0))).loss, logits)
        logits = (logits - gradient).detach().requires_grad_()
        if step in (100, 200, 400):
            worse.append(logits.detach().softmax(0)[1].item())
    assert [later / earlier for earlier, later in pairwise(worse)] == pytest.approx([0.5, 0.5], rel=0.02)


def test_ipo_on_three_totally_ordered_answers():
    # y0 > y1 > y2 for certain, each pair as often: the log-ratios are the least-squares fit of gaps t = 1 / (2 tau) to
    # three differences, which is (2t/3, 0, -2t/3); the policy is pi_ref times their exponential.
    tau, reference = 0.7, column([0.5, 0.2, 0.3]).log()

    def record(policy: Tensor) -> PairLogps:
        return pairs(policy, reference, [0, 0, 1], [1, 2, 2])

    optimum = minimise(IPO(tau=tau, reduction="sum"), record, reference)
    step = 2 / 3 / (2 * tau)
    torch.testing.assert_close(optimum, (reference + column([step, 0.0, -step])).log_softmax(0), rtol=0, atol=1e-9)


def test_ipo_with_soft_labels_regresses_on_the_expected_margin():
    # p (h - t)^2 + (1 - p) (h + t)^2 is least at h = (2p - 1) / (2 tau).
    def record(policy: Tensor) -> PairLogps:
        return pairs(policy, column([0.25, 0.75]).log(), [0], [1], preference=column([0.8]))

    optimum = minimise(IPO(tau=0.5, reduction="sum"), record, torch.zeros(2, dtype=torch.float64))
    assert (optimum[0] - optimum[1] - math.log(1 / 3)).item() == pytest.approx(0.6, abs=1e-9)


def mixed_label_gradient(q: float, log_ratio: float, objective: KTO, z: float) -> float:
    """d loss / d log-prob of one answer that a share q of judges calls desirable: the population gradient."""
    policy = torch.full((2,), log_ratio - 2.0, dtype=torch.float64, requires_grad=True)
    logps = JudgementLogps(
        policy=policy,
        reference=torch.full((2,), -2.0, dtype=torch.float64),
        desirable=torch.tensor([True, False]),
        length=torch.ones(2),
        policy_mismatched=torch.full((2,), z - 3.0, dtype=torch.float64),
        reference_mismatched=torch.full((2,), -3.0, dtype=torch.float64),
        weight=column([q, 1 - q]),
    )
    (gradient,) = torch.autograd.grad(objective(logps).losses.sum(), policy)
    return gradient.sum().item()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (4 / 3, 1.0), (1.0, 3.0)])
def test_kto_is_a_threshold_rule_without_an_interior_optimum(weights: tuple[float, float]):
    desirable, undesirable = weights
    objective = KTO(beta=0.5, desirable_weight=desirable, undesirable_weight=undesirable)
    threshold = undesirable / (desirable + undesirable)
    for log_ratio in (-6.0, -1.0, 0.0, 0.4, 2.0, 9.0):
        for z in (0.0, 1.5):
            v = 1 / (1 + math.exp(-0.5 * (log_ratio - z)))
            for q in (0.0, 0.1, 0.3, 0.6, 0.9, 1.0):
                got = mixed_label_gradient(q, log_ratio, objective, z)
                assert got == pytest.approx(0.5 * v * (1 - v) * (undesirable * (1 - q) - desirable * q), abs=1e-12)
            # However far the policy has gone, the answer rises above the threshold, falls below it, and rests on it.
            assert mixed_label_gradient(threshold + 0.01, log_ratio, objective, z) < 0
            assert mixed_label_gradient(threshold - 0.01, log_ratio, objective, z) > 0
            assert mixed_label_gradient(threshold, log_ratio, objective, z) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sft_recovers_the_distribution_of_the_demonstrations(reduction):
    shares = column([0.4, 0.3, 0.15, 0.1, 0.05])

    def record(policy: Tensor) -> JudgementLogps:
        everyone = torch.ones(ANSWERS, dtype=torch.bool)
        return JudgementLogps(policy, None, everyone, torch.ones(ANSWERS), None, None, weight=shares)

    optimum = minimise(SFT(reduction=reduction), record, torch.zeros(ANSWERS, dtype=torch.float64))
    torch.testing.assert_close(optimum.exp(), shares, rtol=0, atol=1e-7)
