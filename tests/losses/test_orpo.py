"""ORPO in closed form, at probability 1, and against a second implementation."""

import math
import random

import mpmath
import pytest
import torch

from dpo.losses.orpo import ORPO
from dpo.types import PairLogps


def pairs(rows, preference=None, weight=None, dtype=torch.float64) -> PairLogps:
    """Rows of (L_w, L_l, |w|, |l|), without a reference."""
    pc, pr, cl, rl = (torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True))
    p, w = (None if values is None else torch.tensor(values, dtype=dtype) for values in (preference, weight))
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), None, None, cl.long(), rl.long(), p, w)


def test_loss_at_equal_means():
    # d = 0: -a + lambda ln 2, a = -2 at both lengths.
    out = ORPO()(pairs([(-6.0, -40.0, 3, 20)]))
    assert out.loss.item() == pytest.approx(2 + 0.1 * math.log(2), abs=1e-14)


@pytest.mark.parametrize("certain", [0.0, -1e-9, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probability_one_has_bounded_odds(certain, dtype):
    # Rounding takes a log-prob to 0 and beyond. The odds stay at those of a = -1e-6: (1 - 1e-6) / 1e-6.
    logps = pairs([(certain, -5.0, 1, 5), (-5.0, certain, 5, 1)], dtype=dtype)
    out = ORPO()(logps)
    out.loss.backward()
    assert out.losses.isfinite().all()
    assert logps.policy_chosen.grad.isfinite().all()
    assert logps.policy_rejected.grad.isfinite().all()
    bound = math.log((1 - 1e-6) / 1e-6)
    assert [out.rewards[0, 0].item(), out.rewards[1, 1].item()] == pytest.approx([bound] * 2, rel=1e-5)


def second_orpo(pc, pr, cl, rl, weight):
    """Loss, d / d L_w, d / d L_l in 50 digits, from probabilities instead of their logarithms."""
    with mpmath.workdps(50):
        p, q = mpmath.exp(mpmath.mpf(pc) / cl), mpmath.exp(mpmath.mpf(pr) / rl)
        share = (p / (1 - p)) / (p / (1 - p) + q / (1 - q))  # sigma(log a - log b) = a / (a + b)
        loss = -mpmath.log(p) - weight * mpmath.log(share)
        chosen, rejected = -1 - weight * (1 - share) / (1 - p), weight * (1 - share) / (1 - q)
        return float(loss), float(chosen / cl), float(rejected / rl)


def test_values_and_gradients_equal_a_second_implementation():
    draw = random.Random(5)
    rows = [
        (draw.uniform(-90, -0.1), draw.uniform(-90, -0.1), draw.randint(1, 300), draw.choice([1, 7, 300]))
        for _ in range(100)
    ]
    rows += [(-3e-6, -200.0, 1, 1), (-200.0, -3e-6, 1, 1), (-3e-6, -2e-6, 1, 1)]
    logps = pairs(rows)
    out = ORPO(odds_ratio_weight=0.7)(logps)
    out.losses.sum().backward()
    expected = torch.tensor([second_orpo(*row, 0.7) for row in rows], dtype=torch.float64)
    got = torch.stack([out.losses, logps.policy_chosen.grad, logps.policy_rejected.grad], 1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
