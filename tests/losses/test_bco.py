"""BCO in hand numbers, at its optimum, and against a second implementation in plain floats."""

import math
import random
from dataclasses import replace

import pytest
import torch

from dpo.losses.bco import BCO
from dpo.types import JudgementLogps


def judgements(log_ratios, desirable, mean_log_ratio=0.0, weight=None, reference=-20.0) -> JudgementLogps:
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
        mean_log_ratio=torch.tensor(mean_log_ratio, dtype=torch.float64).requires_grad_(),
    )


def test_hand_numbers():
    # beta = 0.5, mean log-ratio 2: delta = 1. Desirable, r = 4: -log sigma(2 - 1) = log(1 + e^-1).
    # Undesirable, r = 0: -log sigma(-(0 - 1)), the same. Undesirable, r = 4: -log sigma(-1) = log(1 + e).
    # d / d L = -0.5 sigma(-1) = -0.13447071068499755; +0.5 sigma(-1); +0.5 sigma(1) = 0.36552928931500245.
    logps = judgements([4.0, 0.0, 4.0], [True, False, False], mean_log_ratio=2.0)
    out = BCO(beta=0.5)(logps)
    out.losses.sum().backward()
    low, high = 0.31326168751822286, 1.3132616875182228
    assert out.losses.tolist() == pytest.approx([low, low, high], abs=1e-15)
    expected = [-0.13447071068499755, 0.13447071068499755, 0.36552928931500245]
    assert logps.policy.grad.tolist() == pytest.approx(expected, abs=1e-15)
    assert logps.mean_log_ratio.grad is None
    assert out.rewards.tolist() == [2, 0, 2]  # beta r: the shift would make rewards of two steps incomparable


def test_loss_is_ln_2_in_the_first_step():
    losses = BCO()(judgements([0.0, 0.0], [True, False])).losses
    torch.testing.assert_close(losses, torch.full((2,), math.log(2), dtype=torch.float64))


def test_the_shift_is_not_that_of_the_current_batch():
    # An example's loss is its own, whatever stands beside it.
    alone = BCO()(judgements([3.0], [True], mean_log_ratio=1.0)).losses
    beside = BCO()(judgements([3.0, 500.0], [True, False], mean_log_ratio=1.0)).losses
    assert alone[0].item() == beside[0].item()


def test_optimum_is_the_log_odds_of_being_judged_desirable_above_the_shift():
    # A completion judged desirable in 4 of 5 cases: 4/5 sigma(-s) = 1/5 sigma(s) at s = logit(4/5) = ln 4,
    # beta r = delta + ln 4. With beta = 0.5 and delta = 1: r = 2 (1 + ln 4).
    logps = judgements([2 * (1 + math.log(4))] * 5, [True] * 4 + [False], mean_log_ratio=2.0)
    BCO(beta=0.5)(logps).loss.backward()
    assert logps.policy.grad.sum().item() == pytest.approx(0, abs=1e-15)


def test_weights_divide_by_the_number_of_examples():
    out = BCO()(judgements([0.0, 9.0], [True, False], weight=[3.0, 0.0]))
    assert out.loss.item() == pytest.approx(3 * math.log(2) / 2)


def second_bco(r, shift, desirable, beta):
    """Loss and d loss / d L in plain floats, as the cross-entropy of softplus(s) - s d."""
    s = beta * (r - shift)
    loss = max(s, 0) + math.log1p(math.exp(-abs(s))) - s * desirable
    return loss, beta * ((1 + math.tanh(s / 2)) / 2 - desirable)


def test_values_and_gradients_equal_a_second_implementation():
    draw = random.Random(6)
    ratios = [draw.uniform(-40, 40) for _ in range(200)] + [0.0, 30.0, -30.0, 1e4, -1e4] * 2
    desirable = [draw.random() < 0.5 for _ in range(200)] + [True] * 5 + [False] * 5
    logps = judgements(ratios, desirable, mean_log_ratio=-3.5)
    out = BCO(beta=0.2)(logps)
    out.losses.sum().backward()
    expected = [second_bco(r, -3.5, d, 0.2) for r, d in zip(ratios, desirable, strict=True)]
    got = torch.stack([out.losses, logps.policy.grad], 1)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("field", ["reference", "mean_log_ratio"])
def test_missing_field_is_named(field: str):
    with pytest.raises(ValueError, match=rf"JudgementLogps\.{field} must hold"):
        BCO()(replace(judgements([0.0], [True]), **{field: None}))
