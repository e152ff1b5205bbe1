"""Optima over whole populations: a softmax policy over several answers, compared pair by pair or judged.

Tolerances are 1e-6 nats for what L-BFGS finds: it stops at gradients below 1e-8, and curvatures are 1e-2 and more.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from dpo.losses import Objective
from dpo.losses.apodown import APODown
from dpo.losses.apozero import APOZero
from dpo.losses.apozerounpaired import APOZeroUnpaired
from dpo.losses.bco import BCO
from dpo.losses.bcopair import BCOPair
from dpo.losses.cdpo import CDPO
from dpo.losses.dpo import DPO
from dpo.losses.dponorm import DPONorm
from dpo.losses.exo import EXO
from dpo.losses.fdpo import FDPO
from dpo.losses.nca import NCA
from dpo.losses.rdpo import RDPO
from dpo.losses.robustdpo import RobustDPO
from dpo.losses.sppo import SPPO
from dpo.losses.wpo import WPO
from dpo.recipes.reproductions.tabular import (
    Loss,
    bradley_terry,
    column,
    gibbs,
    minimise,
    pairs,
    random_problem,
    solve,
)
from dpo.types import JudgementLogps, PairLogps, TokenLogps

ANSWERS = 5
ALL_PAIRS = [(i, j) for i in range(ANSWERS) for j in range(i)]
CHAIN = [(i, i + 1) for i in range(ANSWERS - 1)]
LENGTHS = torch.tensor([2, 9, 4, 1, 6])


def close(got: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def optimum(objective: Loss, *, flipped: float = 0.0, compared=ALL_PAIRS, seed: int = 0) -> Tensor:
    """The policy that minimises a loss on Bradley-Terry preferences, a share of whose labels is reversed."""
    reference, rewards = random_problem(seed)
    better, worse, clean = bradley_terry(rewards, compared)
    preference = clean * (1 - flipped) + (1 - clean) * flipped
    return minimise(
        objective, lambda p: pairs(p, reference, better, worse, preference=preference, lengths=LENGTHS), reference
    )


def linked(link: Callable[[Tensor], Tensor], beta: float, seed: int = 0) -> Tensor:
    """The policy whose β r falls by `link` of the clean preference from one answer of a chain to the next."""
    reference, rewards = random_problem(seed)
    steps = link(torch.sigmoid(rewards[:-1] - rewards[1:]))
    return gibbs(reference, torch.cat([steps.new_zeros(1), -steps.cumsum(0)]), beta)


def test_robust_dpo_recovers_the_clean_optimum_from_flipped_labels_and_the_others_do_not():
    reference, rewards = random_problem(seed=0)
    clean = gibbs(reference, rewards, 1.0)
    close(optimum(RobustDPO(beta=1, label_smoothing=0.1), flipped=0.1), clean)

    def kl_from_clean(objective: Objective) -> float:
        policy = optimum(objective, flipped=0.1)
        return (clean.exp() * (clean - policy)).sum().item()

    robust, plain, conservative = (kl_from_clean(kind) for kind in (RobustDPO(beta=1), DPO(beta=1), CDPO(beta=1)))
    assert robust < 1e-12
    # In nats, where the reference itself is 0.290 away: flipped labels shrink the margins, and cDPO shrinks them again.
    assert (plain, conservative) == pytest.approx((0.0219, 0.0596), abs=5e-4)


@pytest.mark.parametrize("flipped", [0.0, 0.1])
def test_margins_of_a_chain_follow_the_link_of_each_objective(flipped: float):
    def logit(p: Tensor) -> Tensor:
        return (p / (1 - p)).log()

    def mixed(share: float) -> Callable[[Tensor], Tensor]:
        return lambda p: p * (1 - share) + (1 - p) * share

    noise = mixed(flipped)
    close(optimum(DPO(beta=1), flipped=flipped, compared=CHAIN), linked(lambda p: logit(noise(p)), 1))
    smooth = CDPO(beta=1, label_smoothing=0.2)
    close(optimum(smooth, flipped=flipped, compared=CHAIN), linked(lambda p: logit(mixed(0.2)(noise(p))), 1))
    close(optimum(EXO(beta=1, epsilon=0.05), flipped=flipped, compared=CHAIN), linked(
        lambda p: logit(mixed(0.05)(noise(p))), 1
    ))  # fmt: skip
    if flipped:
        close(optimum(RobustDPO(beta=1), flipped=flipped, compared=CHAIN), linked(logit, 1))


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_rdpo_takes_the_price_of_length_off_the_reward(alpha: float):
    reference, rewards = random_problem(seed=0)
    close(optimum(RDPO(beta=0.5, alpha=alpha)), gibbs(reference, rewards - alpha * LENGTHS, 0.5))


def test_rdpo_with_the_minus_sign_rewards_length():
    def minus(logps: PairLogps):
        exchanged = replace(logps, chosen_length=logps.rejected_length, rejected_length=logps.chosen_length)
        return RDPO(beta=0.5, alpha=0.2)(exchanged)

    reference, rewards = random_problem(seed=0)
    turned = optimum(minus)
    close(turned, gibbs(reference, rewards + 0.2 * LENGTHS, 0.5))
    plus, none = optimum(RDPO(beta=0.5, alpha=0.2)), optimum(DPO(beta=0.5))
    shorter, same, longer = ((policy.exp() * LENGTHS).sum() for policy in (plus, none, turned))
    assert shorter < same < longer


def test_dponorm_fits_the_reward_per_token():
    # β r / |y| = reward + c for all answers; c is where the policy sums to 1.
    reference, rewards = random_problem(seed=0)

    def policy(c: float) -> Tensor:
        return reference + LENGTHS * (rewards + c) / 5

    c = brentq(lambda c: policy(c).exp().sum().item() - 1, -50, 50, xtol=1e-14)
    close(optimum(DPONorm()), policy(c))


def generator(name: str) -> Callable[[Tensor], Tensor]:
    """The convex f of D_f(π || π_ref) = E_ref f(π / π_ref), as its definition has it."""
    order = 0.3
    return {
        "reverse_kl": lambda u: u * u.log(),
        "forward_kl": lambda u: -u.log(),
        "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha": lambda u: (u ** (1 - order) - (1 - order) * u - order) / (order * (order - 1)),
    }[name]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_fdpo_reaches_the_optimum_of_its_own_divergence(divergence):
    beta = 1.5
    reference, rewards = random_problem(seed=0)
    f = generator(divergence)

    def regularised(logits: Tensor) -> Tensor:
        policy = logits.log_softmax(0)
        return -(policy.exp() * rewards).sum() + beta * (reference.exp() * f((policy - reference).exp())).sum()

    expected = solve(regularised, reference).log_softmax(0)
    found = optimum(FDPO(beta=beta, divergence=divergence, alpha=0.3))
    close(found, expected, atol=1e-5)
    u = (found - reference).exp().requires_grad_()
    (derivative,) = torch.autograd.grad(f(u).sum(), u)
    left = rewards / beta - derivative
    close(left - left.mean(), torch.zeros(ANSWERS, dtype=torch.float64), atol=1e-5)  # f'(u) = r / β + const
    if divergence != "reverse_kl":
        assert (found - gibbs(reference, rewards, beta)).abs().max() > 0.02


def test_wpo_weighs_pairs_and_leaves_their_optimum():
    # Its weights follow the policy without a gradient, so that there is no loss to descend: at DPO's optimum the
    # gradient is 0 however pairs weigh, and at no other policy of the path there.
    reference, rewards = random_problem(seed=0)
    better, worse, preference = bradley_terry(rewards, ALL_PAIRS)
    target = gibbs(reference, rewards, 2.0)
    weights = []

    def steepest(logits: Tensor) -> float:
        leaf = logits.clone().requires_grad_()
        policy = leaf.log_softmax(0)
        logps = pairs(policy, reference, better, worse, preference=preference)
        collision = torch.logsumexp(2 * policy.detach(), 0).expand(len(better), 1)
        sides = [
            TokenLogps(policy[side][:, None], reference[side][:, None], torch.ones(len(side), 1).bool(), collision)
            for side in (better, worse)
        ]
        out = WPO(beta=2)(replace(logps, chosen_tokens=sides[0], rejected_tokens=sides[1]))
        weights.append(out.losses.detach() / DPO(beta=2)(logps).losses.detach())
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return gradient.abs().max().item()

    assert steepest(target) < 1e-14
    assert all(steepest(reference + share * (target - reference)) > 1e-3 for share in (0.0, 0.5, 1.5))
    assert (weights[0].max() - weights[0].min()).item() > 0.5


# An answer that is never compared takes up what the others leave: their log-ratios are then free, one by one.
SPARE = column([0.1, 0.15, 0.05, 0.1, 0.6]).log()
COMPARED = [(i, j) for i in range(ANSWERS - 1) for j in range(i)]
REWARDS = column([0.9, -0.3, 0.4, -1.2])


def free_optimum(objective: Objective, *, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """The optimal log-ratios of the answers that are compared, and how often each of them wins."""
    better, worse, preference = bradley_terry(REWARDS, COMPARED)

    def record(policy: Tensor) -> PairLogps:
        return replace(pairs(policy, SPARE, better, worse, preference=preference), mean_log_ratio=column([mean])[0])

    wins = torch.sigmoid(REWARDS[:, None] - REWARDS)
    others = ~torch.eye(len(REWARDS), dtype=torch.bool)
    return (minimise(objective, record, SPARE) - SPARE)[:-1], (wins * others).sum(1) / others.sum(1)


def test_nca_sets_the_likelihood_to_twice_the_win_rate():
    # As winner an answer adds -log σ(x), as either side -½ log σ(-x): q σ(-x) = ½ σ(x), hence e^x = 2 q.
    log_ratios, win_rate = free_optimum(NCA(beta=0.8))
    close(0.8 * log_ratios, (2 * win_rate).log())


def test_bcopair_sets_the_reward_to_the_logit_of_the_win_rate():
    log_ratios, q = free_optimum(BCOPair(beta=2), mean=0.15)
    close(2 * log_ratios, 2 * 0.15 + (q / (1 - q)).log())


def test_sppo_regresses_on_the_win_rate():
    # One multiplicative-weights step: r = η (P(y beats another) - 1/2), η = 1 / β.
    log_ratios, win_rate = free_optimum(SPPO(beta=0.7))
    close(log_ratios, (win_rate - 0.5) / 0.7)


def test_bco_sets_the_reward_to_the_logit_of_desirability():
    q = column([0.9, 0.5, 0.35, 0.05])
    answers = torch.arange(4).repeat(2)

    def record(policy: Tensor) -> JudgementLogps:
        return JudgementLogps(
            policy=policy[answers],
            reference=SPARE[answers],
            desirable=torch.arange(8) < 4,
            length=torch.ones(8),
            policy_mismatched=None,
            reference_mismatched=None,
            weight=torch.cat([q, 1 - q]),
            mean_log_ratio=column([0.15])[0],
        )

    log_ratios = (minimise(BCO(beta=3), record, SPARE) - SPARE)[:-1]
    close(3 * log_ratios, 3 * 0.15 + (q / (1 - q)).log())


def score_gradient(loss: Callable[[Tensor], Tensor], log_ratios: list[float]) -> Tensor:
    scores = column(log_ratios).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(scores), scores)
    return gradient


@pytest.mark.parametrize("log_ratio", [-5.0, -0.5, 0.0, 1.0, 6.0])
@pytest.mark.parametrize("kind", [APOZero, APOZeroUnpaired])
def test_apo_zero_is_a_threshold_rule_at_one_half(kind: type[Objective], log_ratio: float):
    # d / d r = β v (1 - v) (1 - 2 q): its sign is that of 1/2 - q however far the policy has gone.
    beta = 0.7
    v = 1 / (1 + math.exp(-beta * log_ratio))
    for q in (0.1, 0.5, 0.8):

        def loss(scores: Tensor, q: float = q) -> Tensor:
            reference, ones = torch.zeros(2, dtype=torch.float64), torch.ones(2)
            if kind is APOZero:  # the answer wins a share q of the pairs with another one, of its own log-ratio 0
                wins, others = scores, torch.zeros_like(scores)
                chosen, rejected = torch.stack([wins[0], others[0]]), torch.stack([others[1], wins[1]])
                logps = PairLogps(chosen, rejected, reference, reference, ones, ones, weight=column([q, 1 - q]))
            else:
                label = torch.tensor([True, False])
                logps = JudgementLogps(scores, reference, label, ones, None, None, weight=column([q, 1 - q]))
            return kind(beta=beta)(logps).losses.sum()

        got = score_gradient(loss, [log_ratio, log_ratio]).sum().item()
        assert got == pytest.approx(beta * v * (1 - v) * (1 - 2 * q), abs=1e-12)


@pytest.mark.parametrize(("objective", "chosen_rises"), [(APOZero(beta=1), True), (APODown(beta=1), False)])
def test_apo_zero_raises_the_chosen_answer_and_apo_down_lowers_both(objective: Objective, chosen_rises: bool):
    zeros, ones, scores, path = torch.zeros(1, dtype=torch.float64), torch.ones(1), [0.0, 0.0], []
    for _ in range(200):
        gradient = score_gradient(lambda r: objective(PairLogps(r[:1], r[1:], zeros, zeros, ones, ones)).loss, scores)
        scores = (column(scores) - 0.5 * gradient).tolist()
        path.append(scores)
    chosen, rejected = torch.tensor(path[1:]).T
    assert (rejected < chosen).all()
    assert (rejected < 0).all()
    assert (chosen > 0).all() if chosen_rises else (chosen < 0).all()


def test_apo_down_leaves_the_chosen_answer_at_the_reference_for_one_moment():
    # β [σ'(r_w) - σ'(z)] is 0 at r = 0; as soon as the rejected one has fallen, σ'(z) < 1/4 and the chosen falls too.
    zeros, ones = torch.zeros(1, dtype=torch.float64), torch.ones(1)

    def loss(scores: Tensor) -> Tensor:
        return APODown(beta=0.5)(PairLogps(scores[:1], scores[1:], zeros, zeros, ones, ones)).loss

    assert score_gradient(loss, [0.0, 0.0]).tolist() == [0.0, 0.125]
    chosen, rejected = score_gradient(loss, [0.0, -1.0]).tolist()
    assert chosen > 0
    assert rejected > 0
