"""f-DPO in hand numbers, its limits, and its behaviour where likelihoods have fallen."""

import math
from typing import get_args

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.fdpo import FDPO, Divergence
from dpo.types import PairLogps

DIVERGENCES = get_args(Divergence)
LN2 = math.log(2)


def pairs(rows, preference=None, weight=None) -> PairLogps:
    """Rows of (L_w, L_l, reference L_w, reference L_l, |w|, |l|)."""
    pc, pr, rc, rr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if x is None else torch.tensor(x, dtype=torch.float64) for x in (preference, weight))
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), rc, rr, cl.long(), rl.long(), p, w)


ROW = (LN2, 0.0, 0.0, LN2, 3, 5)
"""u = 2 for the chosen completion, 1/2 for the rejected one."""


@pytest.mark.parametrize(
    ("divergence", "rewards", "loss", "slopes"),
    [
        # g = ln u: z = 2 ln 2, -log sigma(z) = ln(1 + 1/4). g' = 1.
        ("reverse_kl", (LN2, -LN2), math.log(1.25), (1, 1)),
        # g = 1 - 1/u: 1/2 and -1, z = 3/2. g' = 1/u: 1/2 and 2.
        ("forward_kl", (0.5, -1.0), 0.2014132779827525, (0.5, 2)),
        # g = ln(2u / (1 + u)): ln(4/3) and ln(2/3), z = ln 2, -log sigma(z) = ln(3/2). g' = 1 / (1 + u): 1/3 and 2/3.
        ("js", (math.log(4 / 3), math.log(2 / 3)), math.log(1.5), (1 / 3, 2 / 3)),
        # alpha = 1/2: g = 2 (1 - u^-1/2): 2 - sqrt 2 and 2 - 2 sqrt 2, z = sqrt 2. g' = u^-1/2.
        ("alpha", (2 - 2**0.5, 2 - 2 * 2**0.5), math.log1p(math.exp(-(2**0.5))), (2**-0.5, 2**0.5)),
    ],
)
def test_hand_numbers(divergence, rewards, loss, slopes):
    logps = pairs([ROW])
    out = FDPO(beta=1, divergence=divergence)(logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss, abs=1e-15)
    assert out.rewards[0].tolist() == pytest.approx(rewards, abs=1e-15)
    pull = 1 - math.exp(-loss)  # sigma(-z)
    assert logps.policy_chosen.grad.item() == pytest.approx(-pull * slopes[0], abs=1e-15)
    assert logps.policy_rejected.grad.item() == pytest.approx(pull * slopes[1], abs=1e-15)


@pytest.mark.parametrize(("divergence", "slope"), [("reverse_kl", 1), ("forward_kl", 1), ("js", 0.5), ("alpha", 1)])
def test_at_the_reference(divergence, slope):
    # g(0) = 0 and z = 0: ln 2, rewards 0, gradient -beta g'(0) / 2; g'(0) = f''(1).
    logps = pairs([(-3.0, -5.0, -3.0, -5.0, 1, 30), (-700.0, -0.1, -700.0, -0.1, 300, 1)], preference=[1.0, 0.6])
    out = FDPO(divergence=divergence)(logps)
    out.losses.sum().backward()
    torch.testing.assert_close(out.losses, torch.full((2,), LN2, dtype=torch.float64), rtol=1e-15, atol=0)
    assert not out.rewards.any()
    assert logps.policy_chosen.grad[0].item() == pytest.approx(-0.1 * slope / 2, abs=1e-15)


def test_reverse_kl_is_dpo():
    rows = [(-10.0, -14.0, -12.0, -13.0, 4, 10), (-900.0, -3.0, -4.0, -800.0, 9, 1)]
    ours, theirs = (o(pairs(rows, preference=[0.9, 1.0])) for o in (FDPO(divergence="reverse_kl"), DPO()))
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=0, atol=0)


def test_alpha_lies_between_the_reverse_kl_at_0_and_the_forward_kl_at_1():
    rows = [(-10.0, -14.0, -12.0, -13.0, 4, 10), (-9.0, -3.0, -4.0, -5.0, 9, 1)]

    def losses(**chosen):
        return FDPO(beta=0.1, **chosen)(pairs(rows)).losses

    small, large = losses(divergence="alpha", alpha=1e-9), losses(divergence="alpha", alpha=1 - 1e-9)
    torch.testing.assert_close(small, losses(divergence="reverse_kl"), rtol=1e-7, atol=0)
    torch.testing.assert_close(large, losses(divergence="forward_kl"), rtol=1e-7, atol=0)
    # A coefficient that means 1 - alpha, as in a common trainer, is another loss except at 1/2.
    assert not torch.allclose(losses(divergence="alpha", alpha=0.25), losses(divergence="alpha", alpha=0.75), rtol=1e-3)


def test_only_the_alpha_divergence_reads_alpha():
    for divergence in DIVERGENCES:
        one, other = (FDPO(divergence=divergence, alpha=alpha)(pairs([ROW])).loss for alpha in (0.2, 0.8))
        assert (one == other) == (divergence != "alpha")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_soft_label_has_its_optimum_at_the_logit(divergence):
    # z = beta (g_w - g_l) = ln 4 = logit 0.8 at u_w = 2, u_l = 1/2 gives beta.
    margin = FDPO(beta=1, divergence=divergence)(pairs([ROW])).metrics["reward/margin"].item()
    logps = pairs([ROW], preference=[0.8])
    FDPO(beta=math.log(4) / margin, divergence=divergence)(logps).loss.backward()
    assert logps.policy_chosen.grad.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("divergence", "order"), [("forward_kl", 1), ("alpha", 0.5)])
def test_a_chosen_completion_far_below_the_reference_is_still_pulled_up(divergence, order):
    # Beyond alpha r = -30 the tangent: g' = e^30, and sigma(-z) = 1. In float32, where e^10000 is infinite.
    fallen, zero = torch.tensor([-1e4], requires_grad=True), torch.zeros(1)
    out = FDPO(divergence=divergence)(PairLogps(fallen, zero, zero, zero, torch.ones(1), torch.ones(1)))
    out.loss.backward()
    assert fallen.grad.item() == pytest.approx(-0.1 * math.exp(30), rel=1e-5)
    assert out.loss.item() == pytest.approx(0.1 / order * (math.exp(30) * (1 + order * 1e4 - 30) - 1), rel=1e-5)


@pytest.mark.parametrize(("divergence", "order"), [("forward_kl", 1), ("alpha", 0.5)])
def test_the_tangent_joins_without_a_step_and_leaves_no_rounding_behind(divergence, order):
    edge = -30 / order
    rows = [(edge + step, 0.0, 0.0, 0.0, 1, 1) for step in (1e-9, -1e-9)] + [(-2.0, 0.0, 0.0, 0.0, 1, 1)]
    logps = pairs(rows)
    out = FDPO(beta=1e-14, divergence=divergence)(logps)  # so small that sigma(-z) stays near 1/2
    out.losses.sum().backward()
    torch.testing.assert_close(out.rewards[0], out.rewards[1], rtol=1e-7, atol=0)
    torch.testing.assert_close(logps.policy_chosen.grad[0], logps.policy_chosen.grad[1], rtol=1e-7, atol=0)
    exact = -1e-14 * math.exp(2 * order) / 2  # -beta sigma(-z) e^(-alpha r) at r = -2
    assert logps.policy_chosen.grad[2].item() == pytest.approx(exact, rel=1e-12)
