"""Every objective a second time: from the papers' formulas, one example at a time, in 80-digit numbers.

Nothing here is vectorised or rearranged for stability, so that a mistake in one place is not made in the other.
Log-probs are in nats, and hyper-parameters bear the names and defaults of the classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from mpmath import MPContext

exact = MPContext()
exact.dps = 80
exp, log, number = exact.exp, exact.log, exact.mpf
STEP = number("1e-30")
"""Of a difference quotient: its own error is of the order of STEP, that of the rounding 1e-80 / STEP."""

SUREST = number(-1e-6)
"""Mean log-prob in nats a token, beyond which ORPO holds the odds fixed: at 0 they are infinite. The one bound here,
for it lies within what training meets."""

Real: TypeAlias = Any  # mpmath's numbers carry no types


@dataclass(frozen=True, kw_only=True)
class Completion:
    policy_tokens: tuple[Real, ...]
    reference_tokens: tuple[Real, ...]
    log_collision: tuple[Real, ...]
    constant_tokens: tuple[Real, ...]
    """`policy_tokens` as factors without gradient read them: a derivative does not move these."""

    @property
    def length(self) -> int:
        return len(self.policy_tokens)

    @property
    def policy(self) -> Real:
        return sum(self.policy_tokens, number(0))

    @property
    def reference(self) -> Real:
        return sum(self.reference_tokens, number(0))

    @property
    def log_ratio(self) -> Real:
        return self.policy - self.reference

    @property
    def mean(self) -> Real:
        return self.policy / self.length

    def raised(self, token: int, by: Real) -> "Completion":
        tokens = list(self.policy_tokens)
        tokens[token] += by
        return replace(self, policy_tokens=tuple(tokens))


@dataclass(frozen=True, kw_only=True)
class Pair:
    chosen: Completion
    rejected: Completion
    preference: float | None = None
    weight: float | None = None
    mean_log_ratio: float = 0.0
    """Of the steps before this one."""

    @property
    def p(self) -> Real:
        return number(1 if self.preference is None else self.preference)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    completion: Completion
    desirable: bool
    weight: float | None = None
    mean_log_ratio: float = 0.0
    mismatched: tuple[float, ...] = ()
    """Log-ratios of the step's completions under other prompts."""


Example: TypeAlias = Pair | Judgement


def log_sigmoid(x: Real) -> Real:
    return -log(1 + exp(-x))


def sigmoid(x: Real) -> Real:
    return 1 / (1 + exp(-x))


def expected(pair: Pair, loss: Callable[[Completion, Completion], Real]) -> Real:
    """The mean over the label: as given with probability p, exchanged with probability 1 - p."""
    return pair.p * loss(pair.chosen, pair.rejected) + (1 - pair.p) * loss(pair.rejected, pair.chosen)


def margin(win: Completion, lose: Completion) -> Real:
    return win.log_ratio - lose.log_ratio


# Pairs, with a reference


def dpo(pair: Pair, *, beta=0.1) -> Real:
    return expected(pair, lambda win, lose: -log_sigmoid(beta * margin(win, lose)))


def ipo(pair: Pair, *, tau=0.5, reduction="mean") -> Real:
    def loss(win: Completion, lose: Completion) -> Real:
        per_token = win.log_ratio / win.length - lose.log_ratio / lose.length
        return ((per_token if reduction == "mean" else margin(win, lose)) - 1 / (2 * number(tau))) ** 2

    return expected(pair, loss)


def cdpo(pair: Pair, *, beta=0.1, label_smoothing=0.1) -> Real:
    z, flip = beta * margin(pair.chosen, pair.rejected), number(label_smoothing)
    p = pair.p * (1 - flip) + (1 - pair.p) * flip
    return -p * log_sigmoid(z) - (1 - p) * log_sigmoid(-z)


def robustdpo(pair: Pair, *, beta=0.1, label_smoothing=0.1) -> Real:
    flip = number(label_smoothing)

    def loss(win: Completion, lose: Completion) -> Real:
        z = beta * margin(win, lose)
        return (-(1 - flip) * log_sigmoid(z) + flip * log_sigmoid(-z)) / (1 - 2 * flip)

    return expected(pair, loss)


def hinge(pair: Pair, *, beta=0.05) -> Real:
    return expected(pair, lambda win, lose: max(number(0), 1 - beta * margin(win, lose)))


def dponorm(pair: Pair, *, beta=5.0) -> Real:
    return expected(
        pair, lambda win, lose: -log_sigmoid(beta * (win.log_ratio / win.length - lose.log_ratio / lose.length))
    )


def exo(pair: Pair, *, beta=0.1, epsilon=1e-3) -> Real:
    z, flip = beta * margin(pair.chosen, pair.rejected), number(epsilon)
    human = pair.p * (1 - flip) + (1 - pair.p) * flip
    policy = sigmoid(z)
    # 1 - policy and log(1 - policy) as sigmoid and log_sigmoid at -z: at z = 300 even 80 digits would not hold them.
    return policy * (log_sigmoid(z) - log(human)) + sigmoid(-z) * (log_sigmoid(-z) - log(1 - human))


def nca(pair: Pair, *, beta=0.1) -> Real:
    def loss(win: Completion, lose: Completion) -> Real:
        up, down = beta * win.log_ratio, beta * lose.log_ratio
        return -log_sigmoid(up) - log_sigmoid(-up) / 2 - log_sigmoid(-down) / 2

    return expected(pair, loss)


def bcopair(pair: Pair, *, beta=0.1) -> Real:
    shift = beta * number(pair.mean_log_ratio)
    return expected(
        pair,
        lambda win, lose: -log_sigmoid(beta * win.log_ratio - shift) - log_sigmoid(-(beta * lose.log_ratio - shift)),
    )


def sppo(pair: Pair, *, beta=1e-3) -> Real:
    advantage = (pair.p - number("0.5")) / beta
    return ((pair.chosen.log_ratio - advantage) ** 2 + (pair.rejected.log_ratio + advantage) ** 2) / 2


def apozero(pair: Pair, *, beta=0.1) -> Real:
    return expected(pair, lambda win, lose: 1 - sigmoid(beta * win.log_ratio) + sigmoid(beta * lose.log_ratio))


def apodown(pair: Pair, *, beta=0.1) -> Real:
    return expected(pair, lambda win, lose: sigmoid(beta * win.log_ratio) + 1 - sigmoid(beta * margin(win, lose)))


def discopop(pair: Pair, *, beta=0.05, tau=0.05) -> Real:
    def loss(win: Completion, lose: Completion) -> Real:
        z = beta * margin(win, lose)
        share = sigmoid(z / tau)
        return (1 - share) * -log_sigmoid(z) + share * exp(-z)

    return expected(pair, loss)


def fdpo(pair: Pair, *, beta=0.1, divergence="js", alpha=0.5) -> Real:
    def slope(y: Completion) -> Real:
        """f'(u) up to a constant: of u log u, -log u, u log u - (1 + u) log((1 + u) / 2), and the alpha family."""
        u = exp(y.log_ratio)
        return {
            "reverse_kl": log(u),
            "forward_kl": -1 / u,
            "js": log(2 * u / (1 + u)),
            "alpha": (1 - u ** -number(alpha)) / alpha,
        }[divergence]

    return expected(pair, lambda win, lose: -log_sigmoid(beta * (slope(win) - slope(lose))))


def dpop(pair: Pair, *, beta=0.3, penalty_weight=50.0) -> Real:
    return expected(
        pair,
        lambda win, lose: -log_sigmoid(beta * (margin(win, lose) - penalty_weight * max(number(0), -win.log_ratio))),
    )


def rdpo(pair: Pair, *, beta=0.1, alpha=0.01) -> Real:
    return expected(
        pair, lambda win, lose: -log_sigmoid(beta * margin(win, lose) + number(alpha) * (win.length - lose.length))
    )


def lddpo(pair: Pair, *, beta=0.1, alpha=0.5) -> Real:
    shared = min(pair.chosen.length, pair.rejected.length)

    def shortened(tokens: Sequence[Real]) -> Real:
        return sum(tokens[:shared], number(0)) + alpha * sum(tokens[shared:], number(0))

    def log_ratio(y: Completion) -> Real:
        return shortened(y.policy_tokens) - shortened(y.reference_tokens)

    return expected(pair, lambda win, lose: -log_sigmoid(beta * (log_ratio(win) - log_ratio(lose))))


def wpo(pair: Pair, *, beta=0.01) -> Real:
    def weight(y: Completion) -> Real:
        aligned = [token - scale for token, scale in zip(y.constant_tokens, y.log_collision, strict=True)]
        return exp(sum(aligned, number(0)) / y.length)

    return min(number(1), weight(pair.chosen) * weight(pair.rejected)) * dpo(pair, beta=beta)


def aot(pairs: Sequence[Pair], *, beta=0.01, pairing="paired") -> list[Real]:
    if any(pair.p != 1 for pair in pairs):
        raise ValueError("an order statistic has no single label")
    if pairing == "paired":
        policy = [pair.chosen.policy - pair.rejected.policy for pair in pairs]
        other = [pair.chosen.reference - pair.rejected.reference for pair in pairs]
    else:
        policy = [pair.chosen.log_ratio for pair in pairs]
        other = [pair.rejected.log_ratio for pair in pairs]
    losses = [number(0)] * len(pairs)
    for example, against in zip(sorted(range(len(pairs)), key=policy.__getitem__), sorted(other), strict=True):
        losses[example] = -log_sigmoid(beta * (policy[example] - against))
    return losses


def trdpo(pair: Pair, *, beta=0.1, alpha=0.6, tau=1) -> Real:
    return dpo(pair, beta=beta)  # alpha and tau move the reference


def trdpo_share(step: int, *, alpha=0.6, tau=1) -> float:
    return alpha if step in range(tau, step + 1, tau) else 0.0


def rpo(pair: Pair, *, beta=0.1, alpha=1.0) -> Real:
    return dpo(pair, beta=beta) + alpha * expected(pair, lambda win, _: -win.mean)


# Pairs, without a reference


def simpo(pair: Pair, *, beta=2.0, gamma_beta_ratio=0.5) -> Real:
    gamma = number(gamma_beta_ratio) * beta
    return expected(pair, lambda win, lose: -log_sigmoid(beta * (win.mean - lose.mean) - gamma))


def cpo(pair: Pair, *, beta=0.1, alpha=1.0) -> Real:
    return expected(pair, lambda win, lose: -log_sigmoid(beta * (win.policy - lose.policy)) - alpha * win.mean)


def orpo(pair: Pair, *, odds_ratio_weight=0.1) -> Real:
    def odds(y: Completion) -> Real:
        likelihood = exp(min(y.mean, SUREST))
        return likelihood / (1 - likelihood)

    def loss(win: Completion, lose: Completion) -> Real:
        return -win.mean - odds_ratio_weight * log_sigmoid(log(odds(win) / odds(lose)))

    return expected(pair, loss)


def slic(pair: Pair, *, delta=1.0, regularisation_weight=0.1) -> Real:
    return expected(
        pair, lambda win, lose: max(number(0), delta - win.policy + lose.policy) - regularisation_weight * win.policy
    )


# Single completions


def kto(judgement: Judgement, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0) -> Real:
    mismatched = [number(log_ratio) for log_ratio in judgement.mismatched]
    kl = max(number(0), sum(mismatched, number(0)) / len(mismatched))
    gain = beta * (judgement.completion.log_ratio - kl)
    if judgement.desirable:
        return desirable_weight - desirable_weight * sigmoid(gain)
    return undesirable_weight - undesirable_weight * sigmoid(-gain)


def apozerounpaired(judgement: Judgement, *, beta=0.1) -> Real:
    q = sigmoid(beta * judgement.completion.log_ratio)
    return 1 - q if judgement.desirable else q


def bco(judgement: Judgement, *, beta=0.1) -> Real:
    logit = beta * judgement.completion.log_ratio - beta * number(judgement.mean_log_ratio)
    return -log_sigmoid(logit if judgement.desirable else -logit)


def negative_log_likelihood(y: Completion, reduction: str) -> Real:
    return -(y.mean if reduction == "mean" else y.policy)


def sft(judgement: Judgement, *, reduction="mean") -> Real:
    return negative_log_likelihood(judgement.completion, reduction)


# A sum of others

MPO = ((0.8, "dpo", {}), (0.2, "bcopair", {}), (1.0, "sft", {}))


def mixture(pairs: Sequence[Pair], *, parts=MPO) -> list[Real]:
    totals = [number(0)] * len(pairs)
    for weight, name, hyper in parts:
        if name == "sft":  # imitates the better completion of a pair
            reduction = hyper.get("reduction", "mean")
            losses = [expected(pair, lambda win, _, r=reduction: negative_log_likelihood(win, r)) for pair in pairs]
        else:
            losses = unweighted(name, pairs, hyper)
        totals = [total + weight * loss for total, loss in zip(totals, losses, strict=True)]
    return totals


EACH: dict[str, Callable[..., Real]] = {
    function.__name__: function
    for function in (
        *(apodown, apozero, apozerounpaired, bco, bcopair, cdpo, cpo, discopop, dpo, dponorm, dpop, exo, fdpo, hinge),
        *(ipo, kto, lddpo, nca, orpo, rdpo, robustdpo, rpo, sft, simpo, slic, sppo, trdpo, wpo),
    )
}
"""Objectives of which an example's loss depends on that example."""
TOGETHER: dict[str, Callable[..., list[Real]]] = {"aot": aot, "mixture": mixture}
"""Objectives of which it depends on the batch."""


def unweighted(name: str, examples: Sequence[Example], hyper: dict[str, Any]) -> list[Real]:
    if name in TOGETHER:
        return TOGETHER[name](examples, **hyper)
    return [EACH[name](example, **hyper) for example in examples]


def losses(name: str, examples: Sequence[Example], hyper: dict[str, Any]) -> list[Real]:
    """Each example's loss times its weight."""
    weights = [1 if example.weight is None else number(example.weight) for example in examples]
    return [weight * loss for weight, loss in zip(weights, unweighted(name, examples, hyper), strict=True)]


def completions(example: Example) -> dict[str, Completion]:
    """The completions of an example by the field that holds them."""
    if isinstance(example, Judgement):
        return {"completion": example.completion}
    return {"chosen": example.chosen, "rejected": example.rejected}


@dataclass(frozen=True)
class Slope:
    """The derivative of the batch's mean loss by one token's log-prob; a completion's sum moves with its tokens."""

    example: int
    side: str
    token: int
    left: float
    right: float
    """Equal to `left`, except where the loss has a kink: any number between is then a right answer."""


def slopes(name: str, examples: Sequence[Example], hyper: dict[str, Any], every_token: bool) -> Iterator[Slope]:
    """Yield the derivatives by every token, or by the first of each completion, which is that by the sum."""
    for place, example in enumerate(examples):

        def total(changed: Example, at: int = place) -> Real:
            if name in TOGETHER:
                return sum(losses(name, [*examples[:at], changed, *examples[at + 1 :]], hyper), number(0))
            return losses(name, [changed], hyper)[0]

        at_rest = total(example)
        for side, held in completions(example).items():
            for token in range(held.length if every_token else 1):
                below = total(replace(example, **{side: held.raised(token, -STEP)}))
                above = total(replace(example, **{side: held.raised(token, STEP)}))
                left, right = (float(rise / STEP / len(examples)) for rise in (at_rest - below, above - at_rest))
                yield Slope(place, side, token, left, right)


def completion(
    policy: Iterable[float], reference: Iterable[float], log_collision: Iterable[float] | None = None
) -> Completion:
    """A completion from its tokens' log-probs."""
    tokens = tuple(number(value) for value in policy)
    scales = [0.0] * len(tokens) if log_collision is None else log_collision
    return Completion(
        policy_tokens=tokens,
        constant_tokens=tokens,
        reference_tokens=tuple(number(value) for value in reference),
        log_collision=tuple(number(value) for value in scales),
    )
