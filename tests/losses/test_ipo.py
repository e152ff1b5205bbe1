"""IPO in hand numbers, in closed form, and against a second implementation in plain floats."""

import random

import pytest
import torch

from dpo.losses.ipo import IPO
from dpo.types import PairLogps


def pairs(rows, preference=None) -> PairLogps:
    """Rows of (L_w, L_l, reference L_w, reference L_l, |w|, |l|)."""
    pc, pr, rc, rr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p = None if preference is None else torch.tensor(preference, dtype=torch.float64)
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), rc, rr, cl.long(), rl.long(), p)


ROW = (-10.0, -14.0, -12.0, -13.0, 4, 10)
"""r_w = 2 nats over 4 tokens, r_l = -1 nat over 10 tokens."""


def test_hand_numbers_sum():
    # tau = 0.5: t = 1. h = 2 - (-1) = 3, loss = (3 - 1)^2 = 4, d loss / d L_w = 2 (3 - 1) = 4.
    logps = pairs([ROW])
    out = IPO(tau=0.5, reduction="sum")(logps)
    out.loss.backward()
    assert out.loss.item() == 4
    assert (logps.policy_chosen.grad.item(), logps.policy_rejected.grad.item()) == (4, -4)
    assert out.rewards.tolist() == [[2, -1]]
    assert out.metrics["reward/margin"].item() == 3
    assert out.metrics["logp/chosen"].item() == -10  # always the sum over tokens
    assert (out.metrics["length/chosen"].item(), out.metrics["length/rejected"].item()) == (4, 10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tau", [0.1, 0.5, 1])
def test_loss_at_the_reference(reduction, tau):
    # h = 0: (0 - 1 / (2 tau))^2 = 1 / (4 tau^2), whatever the label's certainty.
    logps = pairs([(-3.0, -5.0, -3.0, -5.0, 1, 30), (-700.0, -0.1, -700.0, -0.1, 300, 1)], preference=[1.0, 0.6])
    losses = IPO(tau=tau, reduction=reduction)(logps).losses
    torch.testing.assert_close(losses, torch.full((2,), 1 / (4 * tau**2), dtype=torch.float64), rtol=1e-15, atol=0)


def test_loss_vanishes_at_the_target_and_pulls_back_beyond_it():
    # tau = 0.1: t = 5. Gaps of 5 and 8 nats.
    logps = pairs([(5.0, 0.0, 0.0, 0.0, 1, 1), (8.0, 0.0, 0.0, 0.0, 1, 1)])
    out = IPO(tau=0.1, reduction="sum")(logps)
    out.losses.sum().backward()
    assert out.losses.tolist() == [0, 9]
    assert logps.policy_chosen.grad.tolist() == [0, 6]


def test_mean_and_sum_agree_only_at_length_one():
    one, longer = (-10.0, -14.0, -12.0, -13.0, 1, 1), (-10.0, -14.0, -12.0, -13.0, 6, 6)
    mean, total = (IPO(reduction=reduction)(pairs([one, longer])).losses for reduction in ("mean", "sum"))
    assert mean[0] == total[0] == total[1] != mean[1]


def test_soft_label_moves_the_target():
    # p (h - t)^2 + (1 - p) (h + t)^2 is least at h = (2p - 1) t: for p = 0.8 and tau = 0.1 at 0.6 * 5 = 3 nats,
    # where it is 0.8 * 4 + 0.2 * 64 = 16.
    logps = pairs([(3.0, 0.0, 0.0, 0.0, 1, 1)], preference=[0.8])
    out = IPO(tau=0.1)(logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(16, abs=1e-12)
    assert logps.policy_chosen.grad.item() == pytest.approx(0, abs=1e-12)


def second_ipo(pc, pr, rc, rr, cl, rl, p, tau, reduction):
    """Loss, d / d L_w, d / d L_l in plain floats, the square multiplied out: h^2 - 2 (2p - 1) t h + t^2."""
    if reduction == "sum":
        cl = rl = 1
    h, t = (pc - rc) / cl - (pr - rr) / rl, 0.5 / tau
    slope = 2 * h - 2 * (2 * p - 1) * t
    return h * h - 2 * (2 * p - 1) * t * h + t * t, slope / cl, -slope / rl


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradients_equal_a_second_implementation(reduction):
    draw = random.Random(1)
    rows = [
        (*(draw.uniform(-90, -1) for _ in range(4)), draw.randint(1, 300), draw.choice([1, 7, 300])) for _ in range(200)
    ]
    rows += [(margin, 0.0, 0.0, 0.0, 1, 9) for margin in (0.0, 30.0, -30.0, 1e4, -1e4)]
    preference = [draw.uniform(0.5, 1) for _ in rows]
    logps = pairs(rows, preference)
    out = IPO(tau=0.3, reduction=reduction)(logps)
    out.losses.sum().backward()
    expected = [second_ipo(*row, p, 0.3, reduction) for row, p in zip(rows, preference, strict=True)]
    got = torch.stack([out.losses, logps.policy_chosen.grad, logps.policy_rejected.grad], 1)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
