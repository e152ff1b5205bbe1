"""R-DPO: the sign of its length term."""

import math

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.rdpo import RDPO
from dpo.types import PairLogps


def pairs(rows, preference=None, weight=None) -> PairLogps:
    """Rows of (L_w, L_l, reference L_w, reference L_l, |w|, |l|)."""
    pc, pr, rc, rr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if x is None else torch.tensor(x, dtype=torch.float64) for x in (preference, weight))
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), rc, rr, cl.long(), rl.long(), p, w)


ROW = (-10.0, -14.0, -12.0, -13.0, 4, 10)
"""r_w = 2 nats over 4 tokens, r_l = -1 nat over 10 tokens."""


def test_at_the_reference_a_shorter_chosen_completion_has_more_to_gain():
    # z = 0.01 (|w| - |l|): -log sigma(-0.29) above ln 2 above -log sigma(2.99).
    logps = pairs([(-3.0, -5.0, -3.0, -5.0, 1, 30), (-7.0, -1.0, -7.0, -1.0, 300, 1), (-7.0, -1.0, -7.0, -1.0, 8, 8)])
    expected = [math.log1p(math.exp(0.29)), math.log1p(math.exp(-2.99)), math.log(2)]
    assert RDPO()(logps).losses.tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("reward_w", "reward_l", "long", "short"), [(1.0, 0.0, 60, 20), (0.0, 0.0, 60, 20)])
def test_the_optimum_is_that_of_the_reward_minus_the_price_of_tokens(reward_w, reward_l, long, short):
    # Bradley-Terry labels p = sigma(R_w - R_l). The optimum of E[R - alpha |y|] - beta KL has
    # beta (r_w - r_l) = R_w - R_l - alpha (|w| - |l|): the gradient must vanish there. The minus sign gives + instead.
    beta, alpha = 0.1, 0.02
    gap = (reward_w - reward_l - alpha * (long - short)) / beta
    p = 1 / (1 + math.exp(reward_l - reward_w))
    logps = pairs([(gap, 0.0, 0.0, 0.0, long, short)], preference=[p])
    RDPO(beta=beta, alpha=alpha)(logps).loss.backward()
    assert logps.policy_chosen.grad.item() == pytest.approx(0, abs=1e-15)
    if reward_w == reward_l:
        assert gap < 0  # equally good: the longer one becomes less likely


def test_price_0_and_equal_lengths_are_dpo():
    rows = [ROW, (-10.0, -14.0, -12.0, -13.0, 6, 6)]
    expected = DPO()(pairs(rows)).losses
    torch.testing.assert_close(RDPO(alpha=0)(pairs(rows)).losses, expected, rtol=0, atol=0)
    ours = RDPO(alpha=0.3)(pairs(rows)).losses
    assert ours[1].item() == pytest.approx(expected[1].item(), abs=1e-15)
    assert ours[0].item() > expected[0].item()
