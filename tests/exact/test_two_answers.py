"""Optima of one pair: two answers, one number to find, and the condition that it has to meet in plain floats.

The policy's gap d = L_w - L_l fixes both log-probs: L_w = log σ(d), L_l = log σ(-d). The optimum is found by bisection
on the loss's own gradient, which takes kinks and constant factors as well, and put into the condition.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.losses import Objective
from dpo.losses.cdpo import CDPO
from dpo.losses.cpo import CPO
from dpo.losses.discopop import DiscoPOP
from dpo.losses.dpo import DPO
from dpo.losses.dponorm import DPONorm
from dpo.losses.dpop import DPOP
from dpo.losses.exo import EXO
from dpo.losses.fdpo import FDPO
from dpo.losses.hinge import Hinge
from dpo.losses.ipo import IPO
from dpo.losses.lddpo import LDDPO
from dpo.losses.mixture import Mixture
from dpo.losses.orpo import ORPO
from dpo.losses.rdpo import RDPO
from dpo.losses.robustdpo import RobustDPO
from dpo.losses.rpo import RPO
from dpo.losses.simpo import SimPO
from dpo.losses.slic import SLiC
from dpo.losses.trdpo import TRDPO
from dpo.losses.wpo import WPO
from dpo.types import PairLogps, TokenLogps

MEAN_LOG_RATIO = 0.3
REFERENCE_GAP = -0.4


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@dataclass(frozen=True)
class At:
    """Where a condition is read: the policy's gap, what follows from it, and the label."""

    d: float
    p: float
    m: int = 1
    """Tokens of the chosen answer."""
    n: int = 1
    """Tokens of the rejected answer."""

    @property
    def policy(self) -> tuple[float, float]:
        return math.log(sigma(self.d)), math.log(sigma(-self.d))

    @property
    def ratios(self) -> tuple[float, float]:
        chosen, rejected = self.policy
        return chosen - math.log(sigma(REFERENCE_GAP)), rejected - math.log(sigma(-REFERENCE_GAP))

    @property
    def gap(self) -> float:
        """r_w - r_l."""
        return self.d - REFERENCE_GAP

    @property
    def imitation(self) -> float:
        """d/dd of the expected log-prob per token of the preferred answer."""
        return self.p * sigma(-self.d) / self.m - (1 - self.p) * sigma(self.d) / self.n


def record(gap: Tensor, at: At) -> PairLogps:
    """One pair with everything that an objective may ask for; an answer's log-prob is spread evenly over its tokens."""

    def tokens(policy: Tensor, reference: Tensor, length: int) -> TokenLogps:
        ones = torch.ones(1, length, dtype=torch.float64)
        spread = policy[:, None] * ones / length, reference[:, None] * ones / length
        return TokenLogps(*spread, ones.bool(), -0.5 * ones)

    chosen, rejected = logsigmoid(gap), logsigmoid(-gap)
    reference = logsigmoid(torch.full_like(gap, REFERENCE_GAP)), logsigmoid(torch.full_like(gap, -REFERENCE_GAP))
    return PairLogps(
        chosen,
        rejected,
        *reference,
        torch.tensor([at.m]),
        torch.tensor([at.n]),
        torch.tensor([at.p], dtype=torch.float64),
        chosen_tokens=tokens(chosen, reference[0], at.m),
        rejected_tokens=tokens(rejected, reference[1], at.n),
        mean_log_ratio=torch.tensor(MEAN_LOG_RATIO, dtype=torch.float64),
    )


def slope(objective: Objective, d: float, at: At) -> float:
    gap = torch.tensor([d], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(record(gap, at)).loss, gap)
    return gradient.item()


def optimum(objective: Objective, at: At, low: float = -40.0, high: float = 40.0) -> At:
    """Find the gap where the loss stops falling; the loss must fall at `low` and rise at `high`."""
    assert slope(objective, low, at) < 0 < slope(objective, high, at), "no minimum in between"
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(objective, middle, at) < 0 else (low, middle)
    return At((low + high) / 2, at.p, at.m, at.n)


def divergence_gap(derivative: Callable[[float], float]) -> Callable[[At], float]:
    return lambda a: derivative(math.exp(a.ratios[0])) - derivative(math.exp(a.ratios[1])) - logit(a.p) / 1.5


def simpo_target(p: float, gamma: float) -> float:
    """The minimiser of -p log σ(m - γ) - (1 - p) log σ(-m - γ).

    p σ(γ - m) = (1 - p) σ(γ + m) is a quadratic in t = e^m: (1 - p) g t² - (2p - 1) t - p g = 0, with g = e^-γ.
    """
    g, q = math.exp(-gamma), 2 * p - 1
    return math.log((q + math.sqrt(q * q + 4 * p * (1 - p) * g * g)) / (2 * (1 - p) * g))


def dpop_slope(a: At) -> float:
    """β = 1.5, λ = 0.5, where r_w > 0 > r_l: the penalty is that of the reversed label, on the rejected answer."""
    z, (_, rejected) = 1.5 * a.gap, a.ratios
    return -a.p * sigma(-z) + (1 - a.p) * sigma(z - 1.5 * 0.5 * rejected) * (1 + 0.5 * sigma(a.d))


def mixture_slope(a: At) -> float:
    """0.8 DPO + 0.2 BCOPair + SFT, both betas 0.1; dr_w = σ(-d), dr_l = -σ(d) per unit of d."""
    shifted = [0.1 * r - 0.1 * MEAN_LOG_RATIO for r in a.ratios]
    as_labelled = -sigma(-shifted[0]) * sigma(-a.d) - sigma(shifted[1]) * sigma(a.d)
    reversed_label = sigma(-shifted[1]) * sigma(a.d) + sigma(shifted[0]) * sigma(-a.d)
    pairwise = 0.8 * 0.1 * (sigma(0.1 * a.gap) - a.p)
    return pairwise + 0.2 * 0.1 * (a.p * as_labelled + (1 - a.p) * reversed_label) - a.imitation


CONDITIONS: list[tuple[Objective, Callable[[At], float]]] = [
    (DPO(beta=1.5), lambda a: 1.5 * a.gap - logit(a.p)),
    (CDPO(beta=1.5, label_smoothing=0.2), lambda a: 1.5 * a.gap - logit(0.8 * a.p + 0.2 * (1 - a.p))),
    # A share p of the labels points this way after 5 % were flipped: (p - 0.05) / 0.9 did before.
    (RobustDPO(beta=1.5, label_smoothing=0.05), lambda a: 1.5 * a.gap - logit((a.p - 0.05) / 0.9)),
    (EXO(beta=1.5, epsilon=0.01), lambda a: 1.5 * a.gap - logit(0.99 * a.p + 0.01 * (1 - a.p))),
    (TRDPO(beta=1.5), lambda a: 1.5 * a.gap - logit(a.p)),
    (WPO(beta=1.5), lambda a: 1.5 * a.gap - logit(a.p)),  # its weight is a constant to the gradient
    (RDPO(beta=1.5, alpha=0.05), lambda a: 1.5 * a.gap + 0.05 * (a.m - a.n) - logit(a.p)),
    (DPONorm(beta=1.5), lambda a: 1.5 * (a.ratios[0] / a.m - a.ratios[1] / a.n) - logit(a.p)),
    (
        LDDPO(beta=1.5, alpha=0.25),  # m = 3 and n = 7: 3 of the rejected answer's tokens in full, 4 at a quarter
        lambda a: 1.5 * (a.ratios[0] - a.ratios[1] * (a.m + 0.25 * (a.n - a.m)) / a.n) - logit(a.p),
    ),
    (FDPO(beta=1.5, divergence="reverse_kl"), divergence_gap(math.log)),
    (FDPO(beta=1.5, divergence="forward_kl"), divergence_gap(lambda u: -1 / u)),
    (FDPO(beta=1.5, divergence="js"), divergence_gap(lambda u: math.log(2 * u / (1 + u)))),
    (FDPO(beta=1.5, divergence="alpha", alpha=0.3), divergence_gap(lambda u: (1 - u**-0.3) / 0.3)),
    (IPO(tau=0.5), lambda a: a.ratios[0] / a.m - a.ratios[1] / a.n - (2 * a.p - 1)),
    (Hinge(beta=1.5), lambda a: 1.5 * a.gap - 1),  # the kink, for any p between 1/2 and 1
    (DPOP(beta=1.5, penalty_weight=0.5), dpop_slope),
    (RPO(beta=1.5, alpha=0.7), lambda a: 1.5 * (sigma(1.5 * a.gap) - a.p) - 0.7 * a.imitation),
    (SimPO(beta=1.5, gamma_beta_ratio=0.4), lambda a: (
        1.5 * (a.policy[0] / a.m - a.policy[1] / a.n) - simpo_target(a.p, 0.6)
    )),
    (CPO(beta=1.5, alpha=0.7), lambda a: 1.5 * (sigma(1.5 * a.d) - a.p) - 0.7 * a.imitation),
    (SLiC(delta=0.5, regularisation_weight=0.1), lambda a: a.d - 0.5),  # the kink again
    (Mixture(), mixture_slope),
]  # fmt: skip


@pytest.mark.parametrize("p", [0.6, 0.85])
@pytest.mark.parametrize(("objective", "condition"), CONDITIONS, ids=[repr(o)[:40] for o, _ in CONDITIONS])
def test_the_optimum_meets_its_condition(objective: Objective, condition: Callable[[At], float], p: float):
    # Bisection leaves 80 / 2^60 of the gap, and rounding 1e-15 of the slope, which is divided by the curvature.
    assert condition(optimum(objective, At(0.0, p, m=3, n=7))) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("p", [0.6, 0.85])
def test_orpo_balances_imitation_and_odds(p: float):
    # One token each: log odds are d and -d, so that the slope is σ(d) - p + 2 λ (σ(2d) - p).
    found = optimum(ORPO(odds_ratio_weight=0.5), At(0.0, p))
    assert sigma(found.d) - p + 2 * 0.5 * (sigma(2 * found.d) - p) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("alpha", [0, 0.3, 5])
def test_cpo_without_lengths_recovers_the_preference(alpha: float):
    # At beta 1 and one token each, both of its terms ask for σ(d) = p: imitation changes the speed only.
    assert optimum(CPO(beta=1, alpha=alpha), At(0.0, 0.8)).d == pytest.approx(logit(0.8), abs=1e-9)


def test_exo_stops_at_a_finite_margin_even_for_certain_labels():
    # z = logit(1 - ε) = 6.907 at the default, where DPO has no optimum.
    assert EXO().beta * optimum(EXO(), At(0.0, 1.0), high=200.0).gap == pytest.approx(6.906754778648554, abs=1e-7)
    assert slope(DPO(), 200.0, At(0.0, 1.0)) < 0


def test_what_a_certain_label_asks_for():
    at = At(0.0, 1.0)
    assert optimum(CDPO(beta=1), at).gap == pytest.approx(logit(0.9), abs=1e-9)
    hinge = Hinge(beta=1)  # falls at rate β up to the margin, rests beyond
    slopes = [slope(hinge, REFERENCE_GAP + z, at) for z in (-30, 0, 0.999, 1.001, 30)]
    assert slopes == pytest.approx([-1, -1, -1, 0, 0], abs=1e-12)
    for falls_without_end in (RobustDPO(beta=1), SLiC(), SimPO(), DPO(beta=1)):
        assert all(slope(falls_without_end, d, at) < 0 for d in (-30.0, -1.0, 0.0, 1.0, 5.0, 30.0))


def test_discopop_has_a_local_optimum_on_the_wrong_side():
    # f = (1 - m) softplus(-z) + m e^-z, m = σ(20 z). At 0: f' = m' (1 - ln 2) - σ(0) / 2 - 1/2 with m' = 5, hence
    # f'(0) = 5 * 0.3069 - 0.75 > 0: raising the margin of a pair at the reference costs.
    beta, at = 1.0, At(REFERENCE_GAP, 1.0)
    objective = DiscoPOP(beta=beta)
    assert slope(objective, REFERENCE_GAP, at) == pytest.approx(5 * (1 - math.log(2)) - 0.75, abs=1e-12)
    local = optimum(objective, at, low=REFERENCE_GAP - 1, high=REFERENCE_GAP)

    def plain(z: float) -> float:
        m = sigma(z / 0.05)
        return (1 - m) * math.log1p(math.exp(-z)) + m * math.exp(-z)

    grid = [n / 10_000 for n in range(-2000, 1)]
    assert local.gap == pytest.approx(min(grid, key=plain), abs=1e-4)
    assert -0.2 < local.gap < 0
    # To the right there is a barrier first, and then a fall without end.
    barrier = max((n / 10_000 for n in range(2001)), key=plain)
    assert (
        slope(objective, REFERENCE_GAP + barrier - 0.01, at) > 0 > slope(objective, REFERENCE_GAP + barrier + 0.01, at)
    )
    assert all(slope(objective, REFERENCE_GAP + z, at) < 0 for z in (0.5, 2.0, 10.0))


def test_dpop_pays_no_likelihood_of_the_chosen_answer_for_margin():
    # Policies in which the margin costs: logits moved by t (0, -1, 3) for chosen, rejected and a third answer. Then
    # r_w = -log Z(t), below 0 for t > 0, and the margin is t: DPO takes t = logit(p) / β, DPOP does not leave t = 0.
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
    direction = torch.tensor([0.0, -1.0, 3.0], dtype=torch.float64)

    def slope_along(objective: Objective, t: float) -> float:
        moved = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        policy = (reference + moved * direction).log_softmax(0)
        one, preference = torch.ones(1, dtype=torch.long), torch.tensor([0.8], dtype=torch.float64)
        logps = PairLogps(policy[:1], policy[1:2], reference[:1], reference[1:2], one, one, preference)
        (gradient,) = torch.autograd.grad(objective(logps).loss, moved)
        return gradient.item()

    assert slope_along(DPO(beta=1), 0.001) < 0
    assert slope_along(DPO(beta=1), logit(0.8)) == pytest.approx(0, abs=1e-12)
    assert slope_along(DPOP(beta=1), -0.001) < 0 < slope_along(DPOP(beta=1), 0.001)
