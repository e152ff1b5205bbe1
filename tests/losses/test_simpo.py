"""SimPO in closed form, and against a second implementation in plain floats."""

import math
import random

import pytest
import torch

from dpo.losses.simpo import SimPO
from dpo.types import PairLogps


def pairs(rows, preference=None, weight=None) -> PairLogps:
    """Rows of (L_w, L_l, |w|, |l|), without a reference."""
    pc, pr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if values is None else torch.tensor(values, dtype=torch.float64) for values in (preference, weight))
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), None, None, cl.long(), rl.long(), p, w)


@pytest.mark.parametrize(("beta", "ratio", "gamma"), [(2.0, 0.5, 1.0), (4.0, 0.5, 2.0), (0.1, 5.0, 0.5), (2.5, 0, 0.0)])
def test_loss_at_equal_means_tells_gamma_from_its_ratio_to_beta(beta, ratio, gamma):
    # z = 0: log(1 + e^gamma), at any length and certainty. Code that takes gamma = 0.5 itself beside beta = 0.1 has
    # the ratio 5: as much as SimPO(beta=0.1, gamma_beta_ratio=5).
    logps = pairs([(-8.0, -2.0, 4, 1), (-60.0, -60.0, 30, 30)], preference=[1.0, 0.6])
    losses = SimPO(beta=beta, gamma_beta_ratio=ratio)(logps).losses
    torch.testing.assert_close(losses, torch.full((2,), math.log1p(math.exp(gamma)), dtype=torch.float64))


def test_length_changes_nothing_at_the_same_mean():
    short, long = (-4.0, -20.0, 4, 10), (-400.0, -2.0, 400, 1)
    losses = SimPO()(pairs([short, long])).losses
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-15)


def second_simpo(pc, pr, cl, rl, p, beta, gamma):
    """Loss, d / d L_w, d / d L_l in plain floats: softplus from both sides, the logistic through tanh."""

    def softplus(x):
        return max(x, 0) + math.log1p(math.exp(-abs(x)))

    z = beta * (pc / cl - pr / rl)
    slope = -p * (1 - math.tanh((z - gamma) / 2)) / 2 + (1 - p) * (1 + math.tanh((z + gamma) / 2)) / 2
    return p * softplus(gamma - z) + (1 - p) * softplus(gamma + z), slope * beta / cl, -slope * beta / rl


def test_values_and_gradients_equal_a_second_implementation():
    draw = random.Random(1)
    rows = [
        (draw.uniform(-90, -1), draw.uniform(-90, -1), draw.randint(1, 300), draw.choice([1, 7, 300]))
        for _ in range(200)
    ]
    rows += [(-1e4, 0.0, 1, 9), (0.0, -1e4, 9, 1)]
    preference = [draw.uniform(0.5, 1) for _ in rows]
    logps = pairs(rows, preference)
    out = SimPO(beta=2.5, gamma_beta_ratio=0.3)(logps)
    out.losses.sum().backward()
    expected = [second_simpo(*row, p, 2.5, 0.75) for row, p in zip(rows, preference, strict=True)]
    got = torch.stack([out.losses, logps.policy_chosen.grad, logps.policy_rejected.grad], 1)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
