"""SimPO in hand numbers, in closed form, and against a second implementation in plain floats."""

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


ROW = (-4.0, -20.0, 4, 10)
"""a_w = -1 nat a token, a_l = -2."""


def test_hand_numbers():
    # beta = 2, gamma = 2 * 0.5 = 1. z = 2 (-1 + 2) = 2, loss = -log sigma(2 - 1) = log(1 + e^-1).
    # d loss / d z = -sigma(-1) = -0.2689414213699951: times beta / 4 by L_w, times -beta / 10 by L_l.
    logps = pairs([ROW])
    out = SimPO()(logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.31326168751822286, abs=1e-15)
    assert logps.policy_chosen.grad.item() == pytest.approx(-0.13447071068499755, abs=1e-15)
    assert logps.policy_rejected.grad.item() == pytest.approx(0.05378828427399902, abs=1e-15)
    assert out.rewards.tolist() == [[-2, -4]]  # beta a, without the margin
    assert out.metrics["reward/margin"].item() == 2
    assert out.metrics["logp/chosen"].item() == -4  # always the sum over tokens


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


def test_soft_label_exchanges_the_completions_under_the_margin():
    # Reversed, -log sigma(-2 - 1) = log(1 + e^3) = 3.048587351573742: the margin stays on the side of the loser.
    out = SimPO()(pairs([ROW], preference=[0.75]))
    assert out.loss.item() == pytest.approx(0.75 * 0.31326168751822286 + 0.25 * 3.048587351573742, abs=1e-14)


def test_weights_divide_by_the_number_of_examples():
    # (3 + 0) / 2 times the one loss.
    out = SimPO()(pairs([ROW, ROW], weight=[3.0, 0.0]))
    assert out.loss.item() == pytest.approx(1.5 * 0.31326168751822286, abs=1e-15)


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


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True])
@pytest.mark.parametrize("name", ["beta", "gamma_beta_ratio"])
def test_bad_hyper_parameter_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^SimPO\.{name} must be"):
        SimPO(**{name: value})


def test_beta_must_not_be_zero():
    with pytest.raises(ValueError, match=r"^SimPO\.beta must be > 0, got 0$"):
        SimPO(beta=0)
