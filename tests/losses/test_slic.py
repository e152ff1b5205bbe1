"""SLiC in hand numbers, on both sides of its margin."""

import pytest
import torch

from dpo.losses.slic import SLiC
from dpo.types import PairLogps


def pairs(rows, preference=None, weight=None) -> PairLogps:
    """Rows of (L_w, L_l), without a reference; the lengths, 3 and 8 tokens, play no part."""
    pc, pr = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if values is None else torch.tensor(values, dtype=torch.float64) for values in (preference, weight))
    length = torch.full((len(rows),), 3)
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), None, None, length, length + 5, p, w)


def test_hand_numbers_within_and_beyond_the_margin():
    # delta = 1, lambda = 0.1. Gap 1/2: (1 - 1/2) + 0.1 * 10 = 3/2. Gap 3: 0 + 1. Gap -2: 3 + 1.
    # The hinge gives -1 by L_w and +1 by L_l within the margin, nothing beyond; the imitation always -0.1 by L_w.
    logps = pairs([(-10.0, -10.5), (-10.0, -13.0), (-10.0, -8.0)])
    out = SLiC()(logps)
    out.losses.sum().backward()
    assert out.losses.tolist() == [1.5, 1, 4]
    assert logps.policy_chosen.grad.tolist() == pytest.approx([-1.1, -0.1, -1.1])
    assert logps.policy_rejected.grad.tolist() == [1, 0, 1]
    assert out.rewards.tolist() == [[-10, -10.5], [-10, -13], [-10, -8]]
    assert out.metrics["reward/accuracy"].item() == pytest.approx(2 / 3)


def test_loss_at_equal_log_probs():
    # delta - lambda L.
    assert SLiC(delta=2, regularisation_weight=0.5)(pairs([(-6.0, -6.0)])).loss.item() == 2 + 3


def test_hyper_parameters_have_one_place_each():
    # Gap 1: max(0, 3 - 1) + 0.5 * 4.
    assert SLiC(delta=3, regularisation_weight=0.5)(pairs([(-4.0, -5.0)])).loss.item() == 4
