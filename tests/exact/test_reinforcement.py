"""What reward models and reinforcement learning converge to: exact expectations over everything a policy can say.

The policy is a table of softmaxes, one for each beginning of a completion: at every step it ends or says one of two
words, three tokens at most. All 15 completions are the batch, and their losses are weighed by their probabilities.
"""

import math
from collections.abc import Callable
from itertools import permutations, product

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from dpo.losses import RankingObjective, RolloutObjective
from dpo.losses.bradleyterry import BradleyTerry
from dpo.losses.credit import k1, k2, k3
from dpo.losses.dpo import DPO
from dpo.losses.grpo import GRPO
from dpo.losses.kwise import KWise
from dpo.losses.plackettluce import PlackettLuce
from dpo.losses.ppo import PPO
from dpo.losses.rloo import RLOO
from dpo.losses.sft import SFT
from dpo.recipes.reproductions.tabular import (
    bradley_terry,
    column,
    gibbs,
    kl,
    minimise,
    pairs,
    random_problem,
    solve,
)
from dpo.rewards.ensemble import combined
from dpo.types import JudgementLogps, RankingScores, Rollout

END, LONGEST = 0, 3
CHOICES = (END, 1, 2)
PREFIXES: list[tuple[int, ...]] = [
    prefix for length in range(LONGEST) for prefix in product(CHOICES[1:], repeat=length)
]
COMPLETIONS = [(*prefix, one) for prefix in PREFIXES for one in CHOICES if one == END or len(prefix) == LONGEST - 1]


def _padded(rows: list[list[int]]) -> Tensor:
    return torch.tensor([row + [0] * (LONGEST - len(row)) for row in rows])


STATES = _padded([[PREFIXES.index(y[:t]) for t in range(len(y))] for y in COMPLETIONS])
TOKENS = _padded([list(y) for y in COMPLETIONS])
MASK = torch.tensor([[t < len(y) for t in range(LONGEST)] for y in COMPLETIONS])

_generator = torch.Generator().manual_seed(7)


def _table(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(len(PREFIXES), len(CHOICES), generator=_generator, dtype=torch.float64)


REFERENCE = _table(0.7).log_softmax(1)
POLICY = _table(0.7).log_softmax(1)
"""Some policy, neither the reference nor the optimum."""
REWARDS = torch.randn(len(COMPLETIONS), generator=_generator, dtype=torch.float64)
VALUES = torch.linspace(-2, 3, len(PREFIXES), dtype=torch.float64)
"""What some value role expects at each prefix, wrongly."""
BETA = 0.8


def token_logps(policy: Tensor) -> Tensor:
    """Log-probs (completions, tokens) of a table of log-probs."""
    return torch.where(MASK, policy[STATES, TOKENS], 0.0)


def law(policy: Tensor) -> Tensor:
    """Log-probs of whole completions."""
    return token_logps(policy).sum(1)


def close(got: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def gradient(loss: Callable[[Tensor], Tensor], policy: Tensor) -> Tensor:
    """The derivative by the logits of each prefix."""
    logits = policy.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(logits.log_softmax(1)), logits)
    return found


def visits(policy: Tensor) -> Tensor:
    """How likely a completion is to come to each prefix and go on with each choice."""
    if policy.shape != REFERENCE.shape:  # one token only
        return policy.exp()
    reached = {}
    for index, prefix in enumerate(PREFIXES):
        steps = [policy[PREFIXES.index(prefix[:t]), CHOICES.index(one)] for t, one in enumerate(prefix)]
        reached[index] = torch.stack([policy.new_zeros(()), *steps]).sum().exp()
    return torch.stack(list(reached.values()))[:, None] * policy.exp()


def descended(slope: Callable[[Tensor], Tensor], start: Tensor = REFERENCE, *, rate: float) -> Tensor:
    """Where an objective's own gradient leads, and is 0. Its sampler moves with the policy, so that there is no
    function to minimise: every step goes down the gradient, in proportion to what each choice is worth by itself."""
    policy, downhill, steps = start, slope(start), 0
    while downhill.abs().max() > 1e-13:
        policy = (policy - rate * downhill / visits(policy)).log_softmax(1)
        downhill, steps = slope(policy), steps + 1
        assert steps < 2000, f"the gradient is still {downhill.abs().max():.2g}"
    return policy


# The KL in the reward: PPO and RLOO


def regularised(policy: Tensor, beta: float = BETA) -> Tensor:
    """E[r] - β KL(π || π_ref), by enumeration."""
    return (law(policy).exp() * REWARDS).sum() - beta * kl(law(policy), law(REFERENCE))


def optimum(beta: float = BETA) -> Tensor:
    return gibbs(law(REFERENCE), REWARDS, beta)


def record(policy: Tensor, sampler: Tensor | None = None, rows: Tensor | None = None, **fields) -> Rollout:
    """All completions, or those with the numbers `rows`; a mean over tokens is then a sum over them."""
    rows = torch.arange(len(COMPLETIONS)) if rows is None else rows
    sampler = policy.detach() if sampler is None else sampler
    return Rollout(
        policy=token_logps(policy)[rows],
        sampler=token_logps(sampler)[rows],
        completion_mask=MASK[rows],
        score=REWARDS[rows],
        reference=token_logps(REFERENCE)[rows],
        tokens_per_completion=column([1.0])[0],
        **{"prompt_index": torch.arange(len(rows))} | fields,
    )


def ppo_loss(objective: PPO, policy: Tensor, values: Tensor, now: Tensor | None = None, **fields) -> Tensor:
    """The expected loss on samples of the policy, with a table of values at sampling and perhaps another one now."""
    before, after = (torch.where(MASK, table[STATES], 0.0) for table in (values, values if now is None else now))
    rollout = record(policy, value=after, sampler_value=before, **fields)
    losses = objective(objective.credit(rollout, objective.kl_coefficient)).losses
    return (law(policy).exp().detach() * losses).sum()


def plain_ppo(**hyper) -> PPO:
    return PPO(**{"kl_coefficient": BETA, "whiten_advantages": False, "value_coefficient": 0} | hyper)


def true_values(policy: Tensor, beta: float = BETA) -> Tensor:
    """E[what is still to come | prefix], the KL's price included, by enumeration: reward less the prices from t on."""
    prices = beta * (token_logps(policy) - token_logps(REFERENCE))
    to_come = REWARDS[:, None] - prices.flip(1).cumsum(1).flip(1)
    weight = torch.where(MASK, law(policy).exp()[:, None], 0.0)
    sums = [torch.zeros(len(PREFIXES), dtype=torch.float64).index_add(0, STATES.flatten(), x.flatten()) for x in (
        weight * to_come, weight
    )]  # fmt: skip
    return sums[0] / sums[1]


@pytest.mark.parametrize("baseline", ["any values, λ = 1", "true values, λ = 0.95", "true values, λ = 0"])
def test_ppo_follows_the_gradient_of_the_kl_regularised_reward(baseline: str):
    objective = plain_ppo(gae_lambda=float(baseline.split()[-1]))
    values = true_values(POLICY) if baseline.startswith("true") else VALUES
    got = gradient(lambda policy: ppo_loss(objective, policy, values), POLICY)
    close(got, gradient(lambda policy: -regularised(policy), POLICY), atol=1e-13)


@pytest.mark.parametrize("beta", [0.3, 0.8, 3.0])
def test_ppo_reaches_the_kl_regularised_optimum(beta: float):
    any_values, true = plain_ppo(gae_lambda=1, kl_coefficient=beta), plain_ppo(kl_coefficient=beta)
    for objective, values in ((any_values, lambda at: VALUES), (true, lambda at: true_values(at, beta))):

        def slope(at: Tensor, objective=objective, values=values) -> Tensor:
            return gradient(lambda policy: ppo_loss(objective, policy, values(at)), at)

        close(law(descended(slope, rate=1 / beta)), optimum(beta))


def test_ppo_with_wrong_values_and_lambda_below_one_ends_elsewhere():
    objective = plain_ppo(gae_lambda=0.5)
    found = descended(lambda at: gradient(lambda policy: ppo_loss(objective, policy, VALUES), at), rate=1 / BETA)
    assert (law(found) - optimum()).abs().max() > 0.1


def test_the_value_role_fits_what_is_still_to_come():
    # λ = 1: the target is the sampled return, and its mean given the prefix is the least-squares fit.
    objective = plain_ppo(gae_lambda=1, value_coefficient=0.5, value_clip=1e9)
    fitted = solve(lambda now: ppo_loss(objective, POLICY, VALUES, now), torch.zeros_like(VALUES))
    close(fitted, true_values(POLICY), atol=1e-7)


def test_ppo_ptx_adds_the_log_likelihood_of_demonstrations():
    shares, weight = torch.linspace(1, 3, len(COMPLETIONS), dtype=torch.float64).softmax(0), 0.6
    objective = plain_ppo(gae_lambda=1, ptx_coefficient=weight)

    def slope(at: Tensor) -> Tensor:
        def loss(policy: Tensor) -> Tensor:
            likelihood = (shares * law(policy)).sum().expand(len(COMPLETIONS))
            ones = torch.ones(len(COMPLETIONS))
            return ppo_loss(objective, policy, VALUES, demonstration=likelihood, demonstration_length=ones)

        return gradient(loss, at)

    direct = solve(
        lambda logits: -regularised(logits.log_softmax(1)) - weight * (shares * law(logits.log_softmax(1))).sum(),
        REFERENCE,
    ).log_softmax(1)
    close(law(descended(slope, rate=0.3)), law(direct), atol=1e-7)
    assert (law(direct) - optimum()).abs().max() > 0.1


def test_the_controller_settles_where_the_kl_is_its_target():
    # The optimum's KL falls as β rises, so that β rests at one place only, from either side.
    def moved(beta: float) -> float:
        return kl(optimum(beta), law(REFERENCE)).item()

    target = 0.4
    rest = brentq(lambda beta: moved(beta) - target, 0.05, 20)
    for start in (0.1, 5.0):
        objective, beta = PPO(kl_coefficient=start, kl_target=target, kl_horizon=1000), start
        for _ in range(600):
            beta = objective.next_kl_coefficient(beta, moved(beta), 64)
        assert beta == pytest.approx(rest, rel=1e-6)


def grouped_loss(objective: RolloutObjective, policy: Tensor, size: int = 2, sampler: Tensor | None = None) -> Tensor:
    """The expected loss of a completion in a group that is drawn from the sampler."""
    drawn_from = law(policy.detach() if sampler is None else sampler)
    total = policy.new_zeros(())
    for groups in torch.cartesian_prod(*[torch.arange(len(COMPLETIONS))] * size).split(225):
        index = torch.arange(len(groups)).repeat_interleave(size)
        rollout = record(policy, sampler, groups.flatten(), prompt_index=index)
        losses = objective(objective.credit(rollout, objective.kl_coefficient)).losses
        total = total + (drawn_from[groups].sum(1).exp() * losses.view(-1, size).mean(1)).sum()
    return total


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_follows_the_gradient_of_the_kl_regularised_reward(size: int):
    got = gradient(lambda policy: grouped_loss(RLOO(kl_coefficient=BETA), policy, size), POLICY)
    close(got, gradient(lambda policy: -regularised(policy), POLICY), atol=1e-13)


def test_rloo_reaches_the_kl_regularised_optimum():
    objective = RLOO(kl_coefficient=BETA)
    found = descended(lambda at: gradient(lambda policy: grouped_loss(objective, policy), at), rate=1 / BETA)
    close(law(found), optimum())


def test_rloo_on_samples_of_another_policy_is_exact_while_nothing_is_clipped():
    # E_s[ρ R] = E_π[R]: minus the loss is by how much π does better than the sampler s, at the price that s paid.
    sampler = POLICY
    policy = (POLICY + 0.1 * (REFERENCE - POLICY)).log_softmax(1)
    assert ((law(policy) - law(sampler)).exp() - 1).abs().max() < 0.9
    rewards = REWARDS - BETA * (law(sampler) - law(REFERENCE))
    better = ((law(policy).exp() - law(sampler).exp()) * rewards).sum()
    close(-grouped_loss(RLOO(kl_coefficient=BETA, clip=0.9), policy, sampler=sampler), better, atol=1e-13)
    assert (-grouped_loss(RLOO(kl_coefficient=BETA, clip=0.01), policy, sampler=sampler) - better).abs() > 1e-3


# The KL in the loss: GRPO


def plain_grpo(**hyper) -> GRPO:
    return GRPO(**{"aggregation": "constant", "max_completion_length": 1, "scale_by_std": False} | hyper)


def centred_grpo_loss(objective: GRPO, policy: Tensor) -> Tensor:
    """The expected loss with the group so large that its mean is the expectation."""
    at = law(policy.detach()).exp()
    advantage = (REWARDS - (at * REWARDS).sum())[:, None] * MASK
    return (at * objective(record(policy, advantage=advantage)).losses).sum()


def reweighted(reference: Tensor, worth: Tensor, beta: float) -> Tensor:
    """The log-probs of β π_ref / (λ - worth), λ above all worths such that they sum to 1."""

    def mass(above: float) -> float:
        return (beta * reference.exp() / (worth.max() + above - worth)).sum().item() - 1

    above = float(brentq(mass, 1e-12, 1e3, xtol=1e-15))  # type: ignore[arg-type]
    return (beta * reference.exp() / (worth.max() + above - worth)).log()


def test_one_token_grpo_reaches_the_optimum_under_the_forward_kl():
    # d/d logit of E[r] - β KL(π_ref || π) is π (r - E r) + β (π_ref - π) = 0, hence π = β π_ref / (λ - r) with
    # λ = E r + β. k3's gradient on samples of π is E_π[(1 - π_ref/π) ∇log π] = -Σ π_ref ∇log π: that of the forward KL.
    reference, rewards = random_problem(seed=0)
    objective, beta = plain_grpo(kl_coefficient=0.8), 0.8

    def slope(at: Tensor) -> Tensor:
        def loss(policy: Tensor) -> Tensor:
            p, sampled = policy.view(-1, 1), policy.detach().exp()[0]
            rollout = Rollout(
                policy=p,
                sampler=p.detach(),
                completion_mask=torch.ones_like(p, dtype=torch.bool),
                score=rewards,
                prompt_index=torch.zeros(len(rewards), dtype=torch.long),
                reference=reference[:, None],
                advantage=(rewards - (sampled * rewards).sum())[:, None],
            )
            return (sampled * objective(rollout).losses).sum()

        return gradient(loss, at)

    found = descended(slope, reference[None], rate=0.3)[0]
    close(found, reweighted(reference, rewards, beta))
    direct = solve(
        lambda logits: -(logits.softmax(0) * rewards).sum() + beta * kl(reference, logits.log_softmax(0)), reference
    )
    close(found, direct.log_softmax(0), atol=1e-7)
    assert (found - gibbs(reference, rewards, beta)).abs().max() > 0.1


def by_induction(beta: float) -> Tensor:
    """GRPO's fixed point from the last token back: at each prefix β π_ref / (λ - Q), Q the expected REWARD after it.

    How often a prefix is visited is no part of k3's gradient, so that later KLs cost an earlier token nothing.
    """
    table, value = torch.zeros_like(REFERENCE), {}
    for prefix in reversed(PREFIXES):
        s = PREFIXES.index(prefix)
        after = [(*prefix, one) for one in CHOICES]
        worth = torch.stack([REWARDS[COMPLETIONS.index(y)] if y in COMPLETIONS else value[y] for y in after])
        table[s] = reweighted(REFERENCE[s], worth, beta)
        value[prefix] = (table[s].exp() * worth).sum()
    return table


def test_grpo_with_k3_in_the_loss_reaches_another_optimum():
    objective = plain_grpo(kl_coefficient=BETA)
    found = descended(lambda at: gradient(lambda policy: centred_grpo_loss(objective, policy), at), rate=0.3)
    close(found, by_induction(BETA))
    assert (law(found) - optimum()).abs().max() > 0.1
    # Nor is it the best one under the forward KL of whole completions, which weighs a prefix as the REFERENCE visits
    # it: where completions have several tokens, k3's gradient is that of no function.
    sequence = solve(
        lambda logits: -regularised(logits.log_softmax(1), 0) + BETA * kl(law(REFERENCE), law(logits.log_softmax(1))),
        REFERENCE,
    ).log_softmax(1)
    assert (law(found) - law(sequence)).abs().max() > 0.02


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_of_its_own_group_shrinks_a_reward_and_so_raises_the_kl_weight(size: int):
    # r_i - mean = (K - 1) / K (r_i - mean of the others): the reward counts less, k3 does not.
    got = gradient(lambda policy: grouped_loss(plain_grpo(), policy, size), POLICY)
    close(got, (size - 1) / size * gradient(lambda policy: -regularised(policy, 0), POLICY), atol=1e-13)
    if size == 2:
        objective = plain_grpo(kl_coefficient=BETA)
        found = descended(lambda at: gradient(lambda policy: grouped_loss(objective, policy), at), rate=0.5)
        close(found, by_induction(2 * BETA))


def test_two_completions_over_their_std_say_only_which_is_better():
    # (r_1 - r_2) / 2 over |r_1 - r_2| / √2 is ± 1/√2, up to the 1e-4 below the fraction: P(to win against a sample).
    def better(policy: Tensor) -> Tensor:
        wins = (REWARDS[:, None] - REWARDS).sign() / 2
        return (law(policy).exp()[:, None] * wins * law(policy.detach()).exp()).sum()

    got = gradient(lambda policy: grouped_loss(plain_grpo(scale_by_std=True), policy), POLICY)
    close(got, -math.sqrt(2) * gradient(better, POLICY), atol=2e-4)
    assert got.abs().max() > 0.05


def test_only_a_mean_per_completion_turns_the_gradient_by_length():
    # Under "token" and "constant" all tokens weigh the same: the gradient is parallel to that of E[r].
    def slope(aggregation: str) -> Tensor:
        objective = plain_grpo(aggregation=aggregation, max_completion_length=5)
        return gradient(lambda policy: centred_grpo_loss(objective, policy), POLICY)

    straight = gradient(lambda policy: -regularised(policy, 0), POLICY)
    close(slope("token"), straight, atol=1e-13)
    close(slope("constant"), straight / 5, atol=1e-13)
    cosine = torch.nn.functional.cosine_similarity(slope("sequence").flatten(), straight.flatten(), dim=0)
    assert cosine < 0.99


# Estimators of the KL


def test_the_kls_of_tokens_add_up_to_that_of_the_completion():
    visited = torch.where(MASK, law(POLICY).exp()[:, None], 0.0)
    total = (visited * kl(POLICY, REFERENCE)[STATES]).sum()
    close(total, kl(law(POLICY), law(REFERENCE)), atol=1e-14)
    close(total, (law(POLICY).exp() * k1(law(POLICY), law(REFERENCE))).sum(), atol=1e-14)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    p, q = token_logps(POLICY), token_logps(REFERENCE)
    exact = kl(law(POLICY), law(REFERENCE))
    for estimator in (k1, k3):
        close((law(POLICY).exp()[:, None] * torch.where(MASK, estimator(p, q), 0.0)).sum(), exact, atol=1e-14)
    # π = (1/2, 1/2), π_ref = (1/4, 3/4): KL = ½ (ln 2 + ln 2/3) = ½ ln 4/3, and E k2 = ¼ (ln² 2 + ln² 2/3).
    p, q = column([0.5, 0.5]).log(), column([0.25, 0.75]).log()
    assert [(p.exp() * estimator(p, q)).sum().item() for estimator in (k1, k2, k3)] == pytest.approx(
        [math.log(4 / 3) / 2, (math.log(2) ** 2 + math.log(2 / 3) ** 2) / 4, math.log(4 / 3) / 2], abs=1e-15
    )


def test_as_a_loss_k1_says_nothing_k2_is_the_reverse_kl_and_k3_the_forward_kl():
    reference, _ = random_problem(seed=1)
    at = random_problem(seed=2)[0]

    def slope(estimator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return gradient(lambda p: (at.exp() * estimator(p[0], reference)).sum(), at[None])

    close(slope(k1), torch.zeros_like(at)[None], atol=1e-15)
    close(slope(k2), gradient(lambda p: kl(p[0], reference), at[None]), atol=1e-14)
    close(slope(k3), gradient(lambda p: kl(reference, p[0]), at[None]), atol=1e-14)
    assert (slope(k2) - slope(k3)).abs().max() > 0.05


# Reward models

ANSWERS = 5
TRUE = column([1.2, -0.7, 0.4, 2.0, 0.1, -1.5, 0.3])
"""Rewards of four completions of one prompt, and of three of another."""
PROMPTS = ((0, 1, 2, 3), (4, 5, 6))


def recovered(objective: RankingObjective, rankings: Callable[[Tensor], RankingScores]) -> Tensor:
    """The scores that minimise the loss, each prompt's shifted to have mean 0."""
    return centred(solve(lambda scores: objective(rankings(scores)).loss, torch.zeros_like(TRUE)))


def centred(scores: Tensor) -> Tensor:
    return torch.cat([scores[list(prompt)] - scores[list(prompt)].mean() for prompt in PROMPTS])


def compared(scores: Tensor, gaps: Tensor = TRUE) -> RankingScores:
    """All pairs within a prompt, as a population of judges decides them."""
    pairs_of = [(i, j) for prompt in PROMPTS for i in prompt for j in prompt if i < j]
    better, worse, preference = bradley_terry(gaps, pairs_of)
    members = torch.tensor([better, worse]).T.flatten()
    return RankingScores(
        scores=scores[members],
        rank=torch.tensor([0, 1]).repeat(len(pairs_of)),
        prompt_index=torch.arange(len(pairs_of)).repeat_interleave(2),
        margin=torch.ones(len(members), dtype=torch.float64) - torch.tensor([0, 1]).repeat(len(pairs_of)),
        preference=preference,
    )


def ordered(scores: Tensor, *, best_only: bool = False) -> RankingScores:
    """Every order of each prompt, weighed by its probability: the best is drawn by e^r, then the best of the rest."""
    members, rank, weight = [], [], []
    for prompt in PROMPTS:
        for order in permutations(prompt):
            rest = [TRUE[list(order[k:])] for k in range(len(order))]
            weight.append(math.exp(sum((left[0] - left.logsumexp(0)).item() for left in rest)))
            members.append(order)
            rank.append([0] + [1] * (len(order) - 1) if best_only else list(range(len(order))))
    return RankingScores(
        scores=scores[[one for order in members for one in order]],
        rank=torch.tensor([place for places in rank for place in places]),
        prompt_index=torch.tensor([index for index, order in enumerate(members) for _ in order]),
        weight=column(weight),
    )


def test_bradley_terry_recovers_the_rewards_up_to_a_constant_of_each_prompt():
    close(recovered(BradleyTerry(), compared), centred(TRUE), atol=1e-7)


@pytest.mark.parametrize("best_only", [False, True])
@pytest.mark.parametrize("objective", [KWise(), PlackettLuce()], ids=repr)
def test_rankings_recover_the_rewards_up_to_a_constant_of_each_prompt(objective: RankingObjective, best_only: bool):
    # Where only the best is named: i is it as often as e^r_i says, so that i beats j with odds e^(r_i - r_j) still.
    close(recovered(objective, lambda scores: ordered(scores, best_only=best_only)), centred(TRUE), atol=1e-7)


@pytest.mark.parametrize("objective", [KWise(), PlackettLuce(), BradleyTerry()], ids=repr)
def test_the_constant_of_a_prompt_is_free(objective: RankingObjective):
    shift = column([5.0] * 4 + [-3.0] * 3)
    population = compared if isinstance(objective, BradleyTerry) else ordered
    close(objective(population(TRUE + shift)).losses, objective(population(TRUE)).losses, atol=1e-13)


@pytest.mark.parametrize(("objective", "population"), [(BradleyTerry, compared), (KWise, ordered)])
def test_centring_sets_the_constant_and_shrinks_the_gaps(objective, population):
    # A shift of one prompt's scores leaves the comparisons alone, so that the sum of (s_w + s_l) over them must be 0.
    found = solve(lambda scores: objective(centring_weight=0.05)(population(scores)).loss, torch.zeros_like(TRUE))
    assert all(abs(found[list(prompt)].mean().item()) < 1e-7 for prompt in PROMPTS)
    spread = found[:4].max() - found[:4].min()
    assert 0.5 * 2.7 < spread < 0.99 * 2.7
    close(recovered(objective(centring_weight=1e-7), population), centred(TRUE), atol=1e-4)


@pytest.mark.parametrize("m", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("p", [0.5, 0.8, 0.95])
def test_a_constant_margin_widens_a_gap_by_less_than_itself(p: float, m: float):
    # p σ(m - d) = (1 - p) σ(d), for the reversed label asks for no margin. With x = e^d:
    # (1 - p) e^-m x² + (1 - 2p) x - p = 0. At p = 1/2 the gap is m / 2, where there is no difference.
    a, b = (1 - p) * math.exp(-m), 1 - 2 * p
    expected = math.log((-b + math.sqrt(b * b + 4 * a * p)) / (2 * a))

    def loss(gap: Tensor) -> Tensor:
        zero = torch.zeros(1, dtype=torch.float64)
        rank, index = torch.tensor([0, 1]), torch.tensor([0, 0])
        scores = torch.cat([gap, zero])
        return BradleyTerry(margin_weight=m)(
            RankingScores(scores, rank, index, margin=column([1.0, 0.0]), preference=column([p]))
        ).loss

    found = solve(loss, torch.zeros(1, dtype=torch.float64)).item()
    assert found == pytest.approx(expected, abs=1e-7)
    assert math.log(p / (1 - p)) - 1e-9 <= found <= math.log(p / (1 - p)) + m


def test_the_least_of_an_ensemble_undoes_overestimates_that_not_all_members_share():
    # Each of three members overrates another answer by 5: the least is the truth, and so is its optimum. The mean
    # keeps a third of each error, and one member all of its own.
    reference, true = random_problem(seed=0)
    errors = 5.0 * torch.eye(3, ANSWERS, dtype=torch.float64)
    members = (true + errors).tolist()

    def worth(scores: list[float]) -> float:
        policy = gibbs(reference, column(scores), BETA)
        return ((policy.exp() * true).sum() - BETA * kl(policy, reference)).item()

    close(column(combined(members, "min").scores), true, atol=1e-12)
    close(column(combined(members, "mean").scores), true + errors.mean(0), atol=1e-12)
    assert worth(true.tolist()) > worth(combined(members, "mean").scores) > worth(members[0])
    # 5 beside two 0s: mean 5/3 and variance 50/9, so that λ = 3/10 takes away just what the mean has too much.
    close(column(combined(members, "mean_minus_variance", 0.3).scores), true, atol=1e-12)


def test_of_two_members_the_least_is_the_mean_less_their_deviation():
    # r ± d: least r - d, deviation d, variance d²; λ = 1 / d makes both pessimists equal.
    members = [[1.0, -2.0], [1.8, -2.8]]
    least, uncertain = combined(members, "min"), combined(members, "mean_minus_variance", 1 / 0.4)
    assert least.scores == pytest.approx([1.0, -2.8])
    assert uncertain.scores == pytest.approx(least.scores)
    assert least.disagreement == pytest.approx([0.4, 0.4])


# Samples as a source of batches for other objectives


def imitate(shares: Tensor) -> Tensor:
    """What SFT makes of demonstrations in these shares."""

    def demonstrations(policy: Tensor) -> JudgementLogps:
        everyone = torch.ones(len(shares), dtype=torch.bool)
        return JudgementLogps(policy, None, everyone, torch.ones(len(shares)), None, None, weight=shares)

    return minimise(SFT(), demonstrations, torch.zeros_like(shares))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [2, 4])
def test_imitating_the_best_of_n_gives_its_exact_law_and_bound(n: int, tied: bool):
    reference, rewards = random_problem(seed=0)
    rewards = rewards.sign() if tied else rewards
    shares = torch.zeros(ANSWERS, dtype=torch.float64)
    for drawn in product(range(ANSWERS), repeat=n):  # the first of equals is kept
        shares[max(drawn, key=lambda y: rewards[y])] += reference[list(drawn)].sum().exp()
    learned = imitate(shares)
    # A level of reward is the best of n with F^n - F_below^n; within it the reference's shares are kept.
    below, level = (
        torch.stack([reference.exp()[holds].sum() for holds in compare(rewards, rewards[:, None])])
        for compare in (torch.lt, torch.eq)
    )
    expected = reference + (((below + level) ** n - below**n) / level).log()
    close(learned, expected, atol=1e-6)
    assert kl(learned, reference).item() < math.log(n) - (n - 1) / n


def test_the_bound_of_best_of_n_is_met_where_ties_vanish():
    # N answers, equally likely, all of different reward: two of n draws are the same answer with probability O(1 / N).
    for n in (2, 4, 16):
        gaps = []
        for size in (100, 1000, 10_000):
            edges = torch.arange(size + 1, dtype=torch.float64) / size
            best = (edges[1:] ** n - edges[:-1] ** n).clamp(min=1e-300).log()
            gaps.append(math.log(n) - (n - 1) / n - kl(best, torch.full_like(best, -math.log(size))).item())
        assert 0 < gaps[2] < gaps[1] / 5 < gaps[0] / 25
        assert gaps[2] < 2e-3


def test_imitating_what_rejection_sampling_accepts_gives_the_kl_regularised_optimum():
    # y of the reference is accepted with probability e^((r - r_max) / β), a share Z e^(-r_max / β) of all.
    reference, rewards = random_problem(seed=0)
    accepted = reference.exp() * ((rewards - rewards.max()) / BETA).exp()
    close(imitate(accepted / accepted.sum()), gibbs(reference, rewards, BETA), atol=1e-6)


def test_online_dpo_rests_at_the_same_optimum_though_its_pairs_are_its_own():
    reference, rewards = random_problem(seed=0)
    better, worse, preference = bradley_terry(rewards, [(i, j) for i in range(ANSWERS) for j in range(i)])

    def slope(at: Tensor) -> Tensor:
        drawn = at[0].detach().exp()
        weight = drawn[better] * drawn[worse]
        return gradient(
            lambda p: DPO(beta=BETA)(
                pairs(p[0], reference, better, worse, preference=preference, weight=weight)
            ).losses.sum(),
            at,
        )

    close(descended(slope, reference[None], rate=3)[0], gibbs(reference, rewards, BETA))
