"""DPO-Positive at its limits."""

import math

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.dpop import DPOP
from dpo.types import PairLogps


def pairs(rows, preference=None, weight=None) -> PairLogps:
    """Rows of (L_w, L_l, reference L_w, reference L_l, |w|, |l|)."""
    pc, pr, rc, rr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if x is None else torch.tensor(x, dtype=torch.float64) for x in (preference, weight))
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), rc, rr, cl.long(), rl.long(), p, w)


BOTH_FALL = (-11.0, -16.0, -10.0, -13.0, 4, 9)
"""r_w = -1, r_l = -3."""


def test_defaults_are_the_paper_s():
    # beta 0.3, lambda 50: z = 0.3 (-51 + 3) = -14.4, loss = 14.4 + ln(1 + e^-14.4)
    loss = DPOP()(pairs([BOTH_FALL])).loss.item()
    assert loss == pytest.approx(14.4 + math.log1p(math.exp(-14.4)), abs=1e-12)


def test_a_chosen_completion_that_has_risen_is_not_penalised():
    rows = [(-10.0, -14.0, -12.0, -13.0, 4, 9), (-5.0, -1.0, -9.0, -9.0, 4, 9)]
    torch.testing.assert_close(DPOP()(pairs(rows)).losses, DPO(beta=0.3)(pairs(rows)).losses, rtol=0, atol=0)


def test_at_the_reference_it_is_dpo_to_the_first_order():
    # r = 0 and max(0, -r) at rest: ln 2, gradient -0.3 / 2.
    logps = pairs([(-3.0, -5.0, -3.0, -5.0, 1, 30)])
    out = DPOP()(logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert logps.policy_chosen.grad.item() == pytest.approx(-0.15, abs=1e-15)


def test_weight_0_of_the_penalty_is_dpo():
    ours = DPOP(beta=0.1, penalty_weight=0)(pairs([BOTH_FALL], preference=[0.7]))
    assert ours.loss.item() == pytest.approx(DPO()(pairs([BOTH_FALL], preference=[0.7])).loss.item(), abs=1e-15)
