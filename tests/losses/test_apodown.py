"""APODown in hand numbers and in closed form."""

import math

import pytest
import torch

from dpo.losses.apodown import APODown
from dpo.losses.apozero import APOZero
from dpo.types import PairLogps


def pairs(chosen, rejected, **others) -> PairLogps:
    """Pairs whose log-ratios are `chosen` and `rejected`, in nats; the reference gives -20 and -30."""

    def column(values, shift=0.0):
        return torch.tensor(values, dtype=torch.float64) + shift

    n = len(chosen)
    lengths = {side: torch.tensor(others.pop(side, [7] * n)) for side in ("chosen_length", "rejected_length")}
    return PairLogps(
        policy_chosen=column(chosen, -20.0).requires_grad_(),
        policy_rejected=column(rejected, -30.0).requires_grad_(),
        reference_chosen=column([0.0] * n, -20.0),
        reference_rejected=column([0.0] * n, -30.0),
        **lengths,
        **{name: column(values) for name, values in others.items()},
    )


def slopes(logps: PairLogps) -> list[float]:
    """d loss / d L_w and d loss / d L_l of a single pair."""
    return [logps.policy_chosen.grad.item(), logps.policy_rejected.grad.item()]


def test_hand_numbers():
    # beta = 0.5: reward 1 of the chosen one, z = 1.5. sigma(1) = 0.7310585786300049, sigma(1.5) = 0.8175744761936437
    # loss = 0.7310585786300049 + 1 - 0.8175744761936437 = 0.9134841024363612
    # d / d L_w = 0.5 (sigma'(1) - sigma'(1.5)) = 0.5 (0.1966119332414819 - 0.1491464520703329) = 0.0237327405855745
    # d / d L_l = 0.5 sigma'(1.5) = 0.0745732260351664
    logps = pairs([2.0], [-1.0])
    out = APODown(beta=0.5)(logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.9134841024363612, abs=1e-12)
    assert slopes(logps) == pytest.approx([0.0237327405855745, 0.0745732260351664], abs=1e-12)
    assert out.rewards.tolist() == [[1.0, -0.5]]


def test_a_weight_multiplies_its_pair_and_the_mean_is_over_pairs():
    out = APODown(beta=0.5)(pairs([2.0, 2.0, 0.0], [-1.0, -1.0, 0.0], weight=[3.0, 1.0, 0.0]))
    assert out.losses.tolist() == pytest.approx([3 * 0.9134841024363612, 0.9134841024363612, 0], abs=1e-12)
    assert out.loss.item() == pytest.approx(4 * 0.9134841024363612 / 3, abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2])
def test_loss_is_1_where_the_policy_is_the_reference(beta):
    # With the paper's constant; without it the loss would be 0 there.
    assert APODown(beta=beta)(pairs([0.0, 0.0], [0.0, 0.0], preference=[1.0, 0.7])).losses.tolist() == [1, 1]


def test_soft_label_hand_number():
    # p = 0.8, the numbers above; reversed: sigma(-0.5) + sigma(1.5) = 0.3775406687981454 + 0.8175744761936437.
    # 0.8 * 0.9134841024363612 + 0.2 * 1.1951151449917891 = 0.9698103109474468
    loss = APODown(beta=0.5)(pairs([2.0], [-1.0], preference=[0.8])).loss
    assert loss.item() == pytest.approx(0.9698103109474468, abs=1e-12)


def test_at_the_reference_the_chosen_one_rests_and_then_falls_with_the_rejected_one():
    # At the reference sigma'(0) - sigma'(0) = 0 and beta sigma'(0) = 0.025. With the rejected one 10 nats down, z = 1:
    # 0.1 (0.25 - 0.1966119332414819) = 0.0053388066758518 lowers the chosen one; APOZero would raise it.
    at_reference, later, zero = pairs([0.0], [0.0]), pairs([0.0], [-10.0]), pairs([0.0], [-10.0])
    APODown()(at_reference).loss.backward()
    APODown()(later).loss.backward()
    APOZero()(zero).loss.backward()
    assert slopes(at_reference) == [0, 0.025]
    assert slopes(later) == pytest.approx([0.0053388066758518, 0.0196611933241482], abs=1e-12)
    assert slopes(zero)[0] == pytest.approx(-0.025, abs=1e-15)


def test_it_saturates_between_0_and_2_and_keeps_small_losses_exact():
    # beta = 1, r_w = -50, z = 50: sigma(-50) + 1 - sigma(50) = 2 e^-50 up to e^-100; 1 - sigma would round it to e^-50.
    best, worst = APODown(beta=1)(pairs([-50.0, 1e4], [-100.0, 2e4])).losses.tolist()
    assert best == pytest.approx(2 * math.exp(-50), rel=1e-12, abs=0)
    assert worst == 2


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf, True])
def test_bad_beta_is_refused(beta):
    with pytest.raises(ValueError, match=r"^APODown\.beta must be"):
        APODown(beta=beta)
