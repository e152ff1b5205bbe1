"""DiscoPOP: its local minimum, its limits, and a second implementation in plain floats."""

import math
import random

import pytest
import torch

from dpo.losses.discopop import DiscoPOP
from dpo.types import PairLogps


def pairs(rows, preference=None, weight=None) -> PairLogps:
    """Rows of (L_w, L_l, reference L_w, reference L_l, |w|, |l|)."""
    pc, pr, rc, rr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if x is None else torch.tensor(x, dtype=torch.float64) for x in (preference, weight))
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), rc, rr, cl.long(), rl.long(), p, w)


def gap(*nats, **others) -> PairLogps:
    """Pairs whose chosen log-ratio is the gap."""
    return pairs([(float(one), 0.0, 0.0, 0.0, 3, 5) for one in nats], **others)


@pytest.mark.parametrize("tau", [0.01, 0.05, 0.3, 1])
def test_loss_at_the_reference(tau):
    # z = 0: m = 1/2, whatever tau, so (ln 2 + 1) / 2, whatever the label's certainty.
    losses = DiscoPOP(tau=tau)(gap(0, 0, preference=[1.0, 0.6])).losses
    torch.testing.assert_close(losses, torch.full((2,), (1 + math.log(2)) / 2, dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize(("tau", "sign"), [(0.05, 1), (0.10, 1), (0.11, -1), (0.5, -1)])
def test_slope_at_the_reference(tau, sign):
    # f'(0) = m'(0) (1 - ln 2) - 1/4 - 1/2 with m'(0) = 1 / (4 tau): it changes sign at tau = (1 - ln 2) / 3 = 0.1023.
    logps = gap(0)
    DiscoPOP(tau=tau)(logps).loss.backward()
    slope = 0.05 * ((1 - math.log(2)) / (4 * tau) - 0.75)
    assert logps.policy_chosen.grad.item() == pytest.approx(slope, abs=1e-15)
    assert math.copysign(1, slope) == sign


def test_the_class_says_that_it_does_not_pull_at_the_reference():
    assert DiscoPOP.pulls_at_reference is False


def test_local_minimum_left_of_the_reference_and_hill_right_of_it():
    # f' = 0 by bisection: z = -0.11857 (-2.3714 nats at beta = 0.05) and z = 0.07201 (1.4401 nats).
    logps = gap(-2.40, -2.3713978, -2.34, 1.41, 1.4401223, 1.47)
    out = DiscoPOP()(logps)
    out.losses.sum().backward()
    assert logps.policy_chosen.grad.sign()[[0, 2, 3, 5]].tolist() == [-1, 1, 1, -1]
    assert logps.policy_chosen.grad[[1, 4]].abs().max().item() < 1e-8
    assert out.losses[1].item() == pytest.approx(0.7859239195933658, abs=1e-12)  # below 0.8466 at the reference


def test_far_right_it_vanishes_and_far_left_it_is_linear():
    # z = 50: m = 1 and f = e^-50. z = -50: m = 0 and f = ln(1 + e^50) = 50. Rows of +-1000 nats.
    losses = DiscoPOP()(gap(1000, -1000)).losses
    assert losses.tolist() == pytest.approx([math.exp(-50), 50], rel=1e-12)


def test_a_pair_far_wrong_stays_a_number_in_float32():
    # The product of m = 0 and e^500 = inf would be no number.
    wrong = torch.tensor([-1e4], requires_grad=True)
    zero = torch.zeros(1)
    out = DiscoPOP()(PairLogps(wrong, zero, zero, zero, torch.ones(1), torch.ones(1)))
    out.loss.backward()
    assert out.loss.item() == 500
    assert wrong.grad.item() == pytest.approx(-0.05)


def second_discopop(z, tau):
    """f and f' in plain floats, as the paper writes them; z within 30 of 0."""
    m = 1 / (1 + math.exp(-z / tau))
    logistic, exponential = math.log(1 + math.exp(-z)), math.exp(-z)
    slope = m * (1 - m) / tau * (exponential - logistic) - (1 - m) / (1 + math.exp(z)) - m * exponential
    return (1 - m) * logistic + m * exponential, slope


@pytest.mark.parametrize("tau", [0.05, 0.3, 1])
def test_values_and_gradients_equal_a_second_implementation(tau):
    draw = random.Random(0)
    gaps = [draw.uniform(-300, 300) for _ in range(100)] + [draw.uniform(-5, 5) for _ in range(100)]
    preference = [draw.uniform(0.5, 1) for _ in gaps]
    logps = gap(*gaps, preference=preference)
    out = DiscoPOP(tau=tau)(logps)
    out.losses.sum().backward()
    expected = []
    for p, nats in zip(preference, gaps, strict=True):
        (right, rise), (wrong, fall) = second_discopop(0.05 * nats, tau), second_discopop(-0.05 * nats, tau)
        expected.append((p * right + (1 - p) * wrong, 0.05 * (p * rise - (1 - p) * fall)))
    got = torch.stack([out.losses, logps.policy_chosen.grad], 1)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
