"""APO-zero over judgements in hand numbers, in closed form, and as KTO without its reference point."""

from dataclasses import replace

import pytest
import torch

from dpo.losses.apozerounpaired import APOZeroUnpaired
from dpo.losses.kto import KTO
from dpo.types import JudgementLogps


def judgements(log_ratios, desirable, weight=None, reference=-20.0) -> JudgementLogps:
    ratio = torch.tensor(log_ratios, dtype=torch.float64)
    base = torch.full_like(ratio, reference)
    return JudgementLogps(
        policy=(base + ratio).requires_grad_(),
        reference=base,
        desirable=torch.tensor(desirable),
        length=torch.arange(len(log_ratios)) + 1,
        policy_mismatched=None,
        reference_mismatched=None,
        weight=None if weight is None else torch.tensor(weight, dtype=torch.float64),
    )


def test_hand_numbers():
    # beta = 0.5, r = 2: sigma(1) = 0.7310585786300049. Desirable 1 - sigma(1), undesirable sigma(1).
    # d / d L = -+ 0.5 sigma(1) (1 - sigma(1)) = -+ 0.09830596662074093.
    logps = judgements([2.0, 2.0], [True, False])
    out = APOZeroUnpaired(beta=0.5)(logps)
    out.losses.sum().backward()
    assert out.losses.tolist() == pytest.approx([0.2689414213699951, 0.7310585786300049], abs=1e-15)
    assert logps.policy.grad.tolist() == pytest.approx([-0.09830596662074093, 0.09830596662074093], abs=1e-15)
    assert out.rewards.tolist() == [1, 1]
    assert (out.metrics["reward/chosen"].item(), out.metrics["logp/chosen"].item()) == (1, -18)


def test_loss_is_a_half_where_the_policy_is_the_reference():
    assert APOZeroUnpaired()(judgements([0.0, 0.0], [True, False])).losses.tolist() == [0.5, 0.5]


def test_each_label_pulls_most_at_the_reference():
    # Saturating on both sides: the pull of r = 0 is beta / 4, and less at any other r.
    logps = judgements([0.0, -30.0, 30.0], [True] * 3)
    APOZeroUnpaired()(logps).losses.sum().backward()
    pull = logps.policy.grad.abs()
    assert pull[0].item() == pytest.approx(0.1 / 4)
    assert (pull[1:] < 0.1 / 4).all()


def test_it_is_kto_with_the_reference_point_at_zero():
    logps = judgements([3.0, -1.0, 0.5, 40.0], [True, False, True, False], weight=[1.0, 2.0, 0.0, 3.0])
    below = torch.full((4,), -1.0, dtype=torch.float64)  # mismatched log-ratios of -1: KTO's mean is floored at 0
    kto = KTO()(replace(logps, policy_mismatched=below, reference_mismatched=torch.zeros_like(below)))
    torch.testing.assert_close(APOZeroUnpaired()(logps).losses, kto.losses)


def test_weights_divide_by_the_number_of_examples():
    assert APOZeroUnpaired()(judgements([0.0, 9.0], [True, False], weight=[3.0, 0.0])).loss.item() == 3 * 0.5 / 2


def test_missing_reference_is_named():
    with pytest.raises(ValueError, match=r"JudgementLogps\.reference must hold"):
        APOZeroUnpaired()(replace(judgements([0.0], [True]), reference=None))
