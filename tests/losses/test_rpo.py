"""RPO: DPO plus the likelihood of the preferred completion."""

import math

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.rpo import RPO
from dpo.types import PairLogps


def pairs(rows, preference=None, weight=None) -> PairLogps:
    """Rows of (L_w, L_l, reference L_w, reference L_l, |w|, |l|)."""
    pc, pr, rc, rr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if x is None else torch.tensor(x, dtype=torch.float64) for x in (preference, weight))
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), rc, rr, cl.long(), rl.long(), p, w)


ROW = (-10.0, -14.0, -12.0, -13.0, 4, 10)
"""r_w = 2, r_l = -1; L_w / |w| = -2.5, L_l / |l| = -1.4."""


def test_loss_at_the_reference():
    # ln 2 - alpha L_w / |w|: ln 2 + 3 / 1, ln 2 + 600 / 300
    logps = pairs([(-3.0, -5.0, -3.0, -5.0, 1, 30), (-600.0, -0.1, -600.0, -0.1, 300, 1)])
    assert RPO()(logps).losses.tolist() == pytest.approx([math.log(2) + 3, math.log(2) + 2], abs=1e-14)


def test_each_completion_has_its_own_mean_over_tokens():
    # At the reference: 4 / 2 = 2 and 4 / 8 = 0.5 nats a token. One mean over all tokens would be 8 / 10, not 1.25.
    logps = pairs([(-4.0, 0.0, -4.0, 0.0, 2, 1), (-4.0, 0.0, -4.0, 0.0, 8, 1)])
    assert RPO()(logps).loss.item() == pytest.approx(math.log(2) + 1.25, abs=1e-14)


def test_alpha_0_is_dpo():
    ours, theirs = (o(pairs([ROW], preference=[0.9])).losses for o in (RPO(alpha=0), DPO()))
    torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=0)
