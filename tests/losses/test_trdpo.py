"""TR-DPO: DPO's loss, and the schedule by which the reference follows."""

import math

import pytest
import torch

from dpo.losses import MovesReference
from dpo.losses.dpo import DPO
from dpo.losses.trdpo import TRDPO
from dpo.types import PairLogps


def pairs(rows, preference=None, weight=None) -> PairLogps:
    """Rows of (L_w, L_l, reference L_w, reference L_l, |w|, |l|)."""
    pc, pr, rc, rr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if x is None else torch.tensor(x, dtype=torch.float64) for x in (preference, weight))
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), rc, rr, cl.long(), rl.long(), p, w)


ROW = (-10.0, -14.0, -12.0, -13.0, 4, 10)
"""r_w = 2, r_l = -1."""


def test_the_loss_is_dpo_s_whatever_the_schedule():
    rows, labels = [ROW, (-3.0, -5.0, -3.0, -5.0, 1, 30)], {"preference": [0.8, 1.0], "weight": [2.0, 0.5]}
    expected = DPO()(pairs(rows, **labels)).losses
    for schedule in ({}, {"alpha": 1, "tau": 512}):
        torch.testing.assert_close(TRDPO(**schedule)(pairs(rows, **labels)).losses, expected, rtol=0, atol=0)
    assert expected[1].item() == pytest.approx(0.5 * math.log(2), abs=1e-15)  # policy = reference, weight 1/2


def test_soft_updates_mix_after_every_step():
    objective = TRDPO()
    assert isinstance(objective, MovesReference)
    assert [objective.share(step) for step in (1, 2, 3, 100)] == [0.6] * 4


def test_hard_updates_copy_after_every_tau_th_step():
    objective = TRDPO(alpha=1, tau=512)
    steps = (1, 511, 512, 513, 1023, 1024)
    assert [objective.share(step) for step in steps] == [0, 0, 1, 0, 0, 1]


def test_any_share_and_interval_can_be_combined():
    # A common trainer's: 0.6 every 512 steps.
    objective = TRDPO(alpha=0.6, tau=512)
    assert [objective.share(step) for step in (1, 512, 513)] == [0, 0.6, 0]


def test_half_a_step_is_refused():
    # Past the annotation, which the test run checks before the class does.
    objective = TRDPO()
    object.__setattr__(objective, "tau", 1.5)
    with pytest.raises(ValueError, match=r"^TRDPO\.tau must be a whole number of optimiser steps, got 1\.5$"):
        objective.__post_init__()
