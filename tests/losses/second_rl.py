"""The objectives of reward models and of reinforcement learning a second time: from the papers' formulas, one token,
one comparison at a time, in 50-digit numbers.

Sums are written out where the objectives use recursions, tables or padding, so that a mistake in one place is not made
in the other. Log-probs are in nats, and hyper-parameters bear the names and defaults of the classes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeAlias

from mpmath import MPContext

exact = MPContext()
exact.dps = 50
exp, log, sqrt, number = exact.exp, exact.log, exact.sqrt, exact.mpf
STEP = number("1e-20")
"""Of a difference quotient on either side: its own error is of the order of STEP squared."""
FLOOR = number("1e-8")
"""Added to a variance before its square root is divided by."""

Real: TypeAlias = Any  # mpmath's numbers carry no types
Tokens: TypeAlias = tuple[Real, ...]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One completion that the policy sampled; a tuple holds one number a token."""

    prompt: int
    score: Real
    policy: Tokens
    sampler: Tokens
    reference: Tokens
    value: Tokens
    sampler_value: Tokens
    demonstration: Real
    demonstration_length: int
    advantage: Tokens = ()
    target: Tokens = ()

    @property
    def length(self) -> int:
        return len(self.policy)

    def raised(self, field: str, token: int, by: Real) -> "Sampled":
        """The same with one number moved; `demonstration` has one number only."""
        held = getattr(self, field)
        if field == "demonstration":
            return replace(self, demonstration=held + by)
        return replace(self, **{field: (*held[:token], held[token] + by, *held[token + 1 :])})


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One prompt's completions as a reward model scored them and people ranked them; place 0 is the best."""

    scores: Tokens
    rank: tuple[int, ...]
    rating: Tokens | None = None
    preference: float | None = None
    weight: float | None = None

    @property
    def p(self) -> Real:
        return number(1 if self.preference is None else self.preference)

    def raised(self, which: int, by: Real) -> "Ranked":
        return replace(self, scores=(*self.scores[:which], self.scores[which] + by, *self.scores[which + 1 :]))


def total(values: Iterable[Real]) -> Real:
    return sum(values, number(0))


def mean(values: Sequence[Real]) -> Real:
    return total(values) / len(values)


def variance(values: Sequence[Real], *, unbiased: bool) -> Real:
    centre = mean(values)
    return total((value - centre) ** 2 for value in values) / (len(values) - unbiased)


def log_sigmoid(x: Real) -> Real:
    return -log(1 + exp(-x))


def clip(x: Real, low: Real, high: Real) -> Real:
    return min(max(x, low), high)


# Estimators of KL(p || q) from a sample of p: log-probs of that sample


def k1(p: Real, q: Real) -> Real:
    return log(exp(p) / exp(q))


def k2(p: Real, q: Real) -> Real:
    return log(exp(p) / exp(q)) ** 2 / 2


def k3(p: Real, q: Real) -> Real:
    ratio = exp(q) / exp(p)
    return ratio - 1 - log(ratio)


def adapted_coefficient(coefficient: Real, kl: Real, completions: int, *, kl_target: Real, kl_horizon: Real) -> Real:
    error = clip((number(kl) - number(kl_target)) / number(kl_target), -number("0.2"), number("0.2"))
    return number(coefficient) * (1 + error * completions / number(kl_horizon))


# Credit: what each token is worth


def shaped_rewards(y: Sampled, kl_coefficient: Real) -> Tokens:
    costs = [-number(kl_coefficient) * k1(p, q) for p, q in zip(y.sampler, y.reference, strict=True)]
    return (*costs[:-1], costs[-1] + y.score)


def gae(rewards: Tokens, values: Tokens, gamma: Real, gae_lambda: Real) -> Tokens:
    """A_t as the weighted sum of n-step advantages, (1 - λ) Σ_n λ^(n-1) (n-step return - V_t): no recursion."""
    steps = len(rewards)

    def n_step_return(t: int, n: int) -> Real:
        reached = t + n
        bootstrap = gamma**n * values[reached] if reached < steps else number(0)
        return total(gamma**k * rewards[t + k] for k in range(n)) + bootstrap

    def advantage(t: int) -> Real:
        left = steps - t
        shares = [(1 - gae_lambda) * gae_lambda ** (n - 1) for n in range(1, left)]
        shares.append(gae_lambda ** (left - 1))  # all longer ones are this return: the completion has ended
        return total(share * n_step_return(t, n) for n, share in enumerate(shares, start=1)) - values[t]

    return tuple(advantage(t) for t in range(steps))


def whitened(rows: Sequence[Tokens], *, shift_mean: bool) -> list[Tokens]:
    """Unit (biased) variance over all tokens of all rows, and mean 0 or the one they had."""
    every = [value for row in rows for value in row]
    centre, scale = mean(every), sqrt(variance(every, unbiased=False) + FLOOR)
    kept = number(0) if shift_mean else centre
    return [tuple((value - centre) / scale + kept for value in row) for row in rows]


def ppo_credit(
    batch: Sequence[Sampled],
    *,
    kl_coefficient=0.05,
    gamma=1.0,
    gae_lambda=0.95,
    whiten_rewards=False,
    whiten_advantages=True,
    **_: Any,
) -> list[Sampled]:
    rewards = [shaped_rewards(y, kl_coefficient) for y in batch]
    if whiten_rewards:
        rewards = whitened(rewards, shift_mean=False)
    gamma, gae_lambda = number(gamma), number(gae_lambda)
    advantages = [gae(row, y.sampler_value, gamma, gae_lambda) for y, row in zip(batch, rewards, strict=True)]
    targets = [
        tuple(a + v for a, v in zip(row, y.sampler_value, strict=True))
        for y, row in zip(batch, advantages, strict=True)
    ]
    if whiten_advantages:
        advantages = whitened(advantages, shift_mean=True)
    return [replace(y, advantage=a, target=t) for y, a, t in zip(batch, advantages, targets, strict=True)]


def group(batch: Sequence[Sampled], y: Sampled) -> list[Sampled]:
    return [other for other in batch if other.prompt == y.prompt]


def rloo_credit(batch: Sequence[Sampled], *, kl_coefficient=0.05, **_: Any) -> list[Sampled]:
    def reward(y: Sampled) -> Real:
        return total(shaped_rewards(y, kl_coefficient))

    credited = []
    for y in batch:
        others = [reward(other) for other in group(batch, y) if other is not y]
        credited.append(replace(y, advantage=(reward(y) - mean(others),) * y.length))
    return credited


def grpo_credit(batch: Sequence[Sampled], *, scale_by_std=True, **_: Any) -> list[Sampled]:
    credited = []
    for y in batch:
        scores = [other.score for other in group(batch, y)]
        scale = sqrt(variance(scores, unbiased=True)) + number(1e-4) if scale_by_std else 1
        credited.append(replace(y, advantage=((y.score - mean(scores)) / scale,) * y.length))
    return credited


# Losses of one completion, of an optimiser step whose completions have so many tokens on average


def policy_loss(advantage: Real, ratio: Real, low: Real, high: Real) -> Real:
    """The pessimistic one of two gains, A ρ and A times ρ clipped, as a loss."""
    return -min(advantage * ratio, advantage * clip(ratio, low, high))


def value_loss(value: Real, sampler_value: Real, target: Real, value_clip: Real) -> Real:
    near = sampler_value + clip(value - sampler_value, -value_clip, value_clip)
    return max((value - target) ** 2, (near - target) ** 2) / 2


def token_policy_losses(y: Sampled, low: Real, high: Real) -> list[Real]:
    return [
        policy_loss(a, exp(p) / exp(s), 1 - number(low), 1 + number(high))
        for a, p, s in zip(y.advantage, y.policy, y.sampler, strict=True)
    ]


def token_value_losses(y: Sampled, value_clip: Real) -> list[Real]:
    return [value_loss(v, s, t, number(value_clip)) for v, s, t in zip(y.value, y.sampler_value, y.target, strict=True)]


def ppo(
    y: Sampled, mean_length: Real, *, clip=0.2, value_clip=0.2, value_coefficient=0.1, ptx_coefficient=0.0, **_: Any
) -> Real:
    policy = total(token_policy_losses(y, clip, clip)) / mean_length
    value = total(token_value_losses(y, value_clip)) / mean_length
    demonstration = -y.demonstration / y.demonstration_length
    return policy + number(value_coefficient) * value + number(ptx_coefficient) * demonstration


def rloo(y: Sampled, mean_length: Real, *, clip=0.2, **_: Any) -> Real:
    ratio = exp(total(y.policy)) / exp(total(y.sampler))
    return policy_loss(y.advantage[0], ratio, 1 - number(clip), 1 + number(clip))


def grpo(
    y: Sampled,
    mean_length: Real,
    *,
    kl_coefficient=0.0,
    clip=0.2,
    clip_high=None,
    aggregation="token",
    max_completion_length=None,
    **_: Any,
) -> Real:
    gains = token_policy_losses(y, clip, clip if clip_high is None else clip_high)
    kls = [k3(p, q) for p, q in zip(y.policy, y.reference, strict=True)]
    divisor = {"sequence": y.length, "token": mean_length, "constant": max_completion_length}[aggregation]
    return total(gain + number(kl_coefficient) * kl for gain, kl in zip(gains, kls, strict=True)) / divisor


CREDIT: dict[str, Callable[..., list[Sampled]]] = {"ppo": ppo_credit, "rloo": rloo_credit, "grpo": grpo_credit}
ROLLOUT: dict[str, Callable[..., Real]] = {"ppo": ppo, "rloo": rloo, "grpo": grpo}


def rollout_metrics(name: str, batch: Sequence[Sampled], hyper: dict[str, Any]) -> dict[str, Real]:
    """What is watched, over all tokens of the batch."""
    clip_low = number(hyper.get("clip", 0.2))
    clip_high = clip_low if hyper.get("clip_high") is None else number(hyper["clip_high"])

    def outside(log_ratio: Real) -> bool:
        return not 1 - clip_low <= exp(log_ratio) <= 1 + clip_high

    def over_tokens(value: Callable[[Sampled, int], Real]) -> Real:
        return mean([number(value(y, t)) for y in batch for t in range(y.length)])

    found = {"policy/approx_kl": over_tokens(lambda y, t: k3(y.sampler[t], y.policy[t]))}
    if name == "rloo":
        found["policy/clip_fraction"] = mean([number(outside(total(y.policy) - total(y.sampler))) for y in batch])
        return found
    found["policy/clip_fraction"] = over_tokens(lambda y, t: outside(y.policy[t] - y.sampler[t]))
    if name == "ppo":
        width = number(hyper.get("value_clip", 0.2))
        errors = [t - v for y in batch for v, t in zip(y.value, y.target, strict=True)]
        found |= {
            "policy/loss": over_tokens(lambda y, t: token_policy_losses(y, clip_low, clip_low)[t]),
            "value/loss": over_tokens(lambda y, t: token_value_losses(y, width)[t]),
            "value/clip_fraction": over_tokens(lambda y, t: abs(y.value[t] - y.sampler_value[t]) > width),
            "value/explained_variance": 1
            - variance(errors, unbiased=True) / variance([t for y in batch for t in y.target], unbiased=True),
        }
        if hyper.get("ptx_coefficient", 0) > 0:
            found["ptx/loss"] = mean([-y.demonstration / y.demonstration_length for y in batch])
    return found


# Losses of one prompt's ranking


def comparison(one: Ranked, better: int, worse: int, margin_weight: Real, centring_weight: Real) -> Real:
    """-p log σ(s_w - s_l - m) - (1 - p) log σ(s_l - s_w) + λ (s_w + s_l)²: the reversed label asks for no margin."""
    gap = one.scores[better] - one.scores[worse]
    asked = number(0)
    if one.rating is not None:
        asked = number(margin_weight) * (one.rating[better] - one.rating[worse])
    centring = number(centring_weight) * (one.scores[better] + one.scores[worse]) ** 2
    return -one.p * log_sigmoid(gap - asked) - (1 - one.p) * log_sigmoid(-gap) + centring


def kwise(one: Ranked, *, margin_weight=0.0, centring_weight=0.0) -> Real:
    losses = []
    for i, j in combinations(range(len(one.scores)), 2):
        if one.rank[i] != one.rank[j]:
            better, worse = (i, j) if one.rank[i] < one.rank[j] else (j, i)
            losses.append(comparison(one, better, worse, margin_weight, centring_weight))
    return mean(losses) if losses else number(0)


def bradleyterry(one: Ranked, *, margin_weight=0.0, centring_weight=0.0) -> Real:
    better, worse = sorted((0, 1), key=one.rank.__getitem__)
    return comparison(one, better, worse, margin_weight, centring_weight)


def plackettluce(one: Ranked) -> Real:
    """The best is drawn first, by softmax of the scores, then the best of the rest; each of a tie by itself."""
    loss = number(0)
    for place in sorted(set(one.rank)):
        rest = [score for score, rank in zip(one.scores, one.rank, strict=True) if rank > place]
        for score, rank in zip(one.scores, one.rank, strict=True):
            if rank == place:
                loss -= log(exp(score) / (exp(score) + total(exp(other) for other in rest)))
    return loss


RANKING: dict[str, Callable[..., Real]] = {"bradleyterry": bradleyterry, "kwise": kwise, "plackettluce": plackettluce}


def weighted(name: str, one: Ranked, hyper: dict[str, Any]) -> Real:
    return (1 if one.weight is None else number(one.weight)) * RANKING[name](one, **hyper)


def slope(loss: Callable[[Real], Real]) -> Real:
    """The derivative at 0, from both sides."""
    return (loss(STEP) - loss(-STEP)) / (2 * STEP)
