"""The arithmetic that objectives share: log(1 - e^x), log-ratios, and fields that must be there."""

import math
from dataclasses import replace

import mpmath
import pytest
import torch

from dpo.losses.reduce import log1mexp, log_ratios, logistic_loss, pair_output, require_field
from dpo.types import PairLogps

EXPONENTS = [-1e-12, -1e-9, -1e-6, -1e-3, -0.1, -0.5, -0.69, -0.7, -1.0, -2.0, -5.0, -20.0, -40.0, -100.0, -700.0]
"""From beside 0 to beside underflow, with both sides of the switch at -ln 2."""


def exactly(x: float) -> tuple[float, float]:
    """log(1 - e^x) and its derivative -e^x / (1 - e^x), in 400 digits (1 - e^-700 alone takes 305)."""
    with mpmath.workdps(400):
        e = mpmath.exp(mpmath.mpf(x))
        return float(mpmath.log(1 - e)), float(-e / (1 - e))


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-14), (torch.float32, 5e-6)])
def test_log1mexp_and_its_gradient_are_exact_over_the_whole_range(dtype, precision):
    x = torch.tensor([*EXPONENTS, -math.log(2)], dtype=dtype)
    x = x[x > math.log(torch.finfo(dtype).tiny)].requires_grad_()
    values = log1mexp(x)
    values.sum().backward()
    expected = torch.tensor([exactly(value) for value in x.tolist()], dtype=torch.float64)
    got = torch.stack([values.detach(), x.grad], 1).double()
    torch.testing.assert_close(got, expected, rtol=precision, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log1mexp_vanishes_beyond_underflow_without_a_gradient(dtype):
    x = torch.tensor([-1e4, -1e30], dtype=dtype).requires_grad_()
    values = log1mexp(x)
    values.sum().backward()
    assert values.tolist() == [0, 0]
    assert x.grad.tolist() == [0, 0]


def pairs() -> PairLogps:
    pc, pr, rc, rr = torch.tensor([[-4.0, -6.0], [-5.0, -1.0], [-7.0, -6.5], [-3.0, -1.0]], dtype=torch.float64)
    length = torch.tensor([2, 3])
    return PairLogps(*(side.clone().requires_grad_() for side in (pc, pr, rc, rr)), length, length)


def test_log_ratios_are_policy_over_reference_without_a_gradient_into_the_reference():
    # Chosen -4 + 7 = 3 and -6 + 6.5 = 0.5, rejected -5 + 3 = -2 and -1 + 1 = 0.
    logps = pairs()
    chosen, rejected = log_ratios(logps)
    (chosen + 10 * rejected).sum().backward()
    assert (chosen.tolist(), rejected.tolist()) == ([3, 0.5], [-2, 0])
    assert logps.policy_chosen.grad.tolist() == [1, 1]
    assert logps.policy_rejected.grad.tolist() == [10, 10]
    assert logps.reference_chosen.grad is None
    assert logps.reference_rejected.grad is None


@pytest.mark.parametrize("field", ["reference_chosen", "reference_rejected"])
def test_log_ratios_name_the_missing_reference(field: str):
    message = rf"^PairLogps\.{field} must hold the reference policy's log-probs, got None: score the batch"
    with pytest.raises(ValueError, match=message):
        log_ratios(replace(pairs(), **{field: None}))


@pytest.mark.parametrize("value", [0.0, torch.zeros(()), False])
def test_a_field_that_holds_a_falsy_value_is_there(value):
    assert require_field(value, "PairLogps.mean_log_ratio", "BCOPair.needs_mean_log_ratio") is value


def test_an_absent_field_is_named_with_what_asks_for_it():
    message = r"^PairLogps\.chosen_tokens must hold values, got None: score the batch as LDDPO\.needs_tokens asks$"
    with pytest.raises(ValueError, match=message):
        require_field(None, "PairLogps.chosen_tokens", "LDDPO.needs_tokens")


def test_the_logistic_loss_is_softplus_expected_over_the_label():
    # z = 1.5, p = 0.8: ln(1 + e^-1.5) + 0.2 * 1.5; without a preference the label is certain.
    z, soft = torch.tensor([1.5, -1e4], dtype=torch.float64), torch.tensor([0.8, 1.0], dtype=torch.float64)
    certain = [0.2014132779827525, 1e4]
    assert logistic_loss(pairs(), z).tolist() == pytest.approx(certain, abs=1e-15)
    assert logistic_loss(replace(pairs(), preference=soft), z).tolist() == pytest.approx([certain[0] + 0.3, 1e4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_margin_is_too_small_to_count_in_the_accuracy(dtype):
    # Right by a hair, wrong by a hair, tied: a threshold at the rounding of log-probs would make them three ties, and
    # with them the small real margins of the first steps.
    rewards = torch.tensor([[1e-9, 0.0], [3e-9, 0.0], [0.0, 1e-9], [0.0, 0.0]], dtype=dtype)
    half = torch.zeros(4, dtype=dtype)
    logps = PairLogps(half, half, half, half, half + 1, half + 1)
    assert pair_output(logps, half, rewards).metrics["reward/accuracy"].item() == (1 + 1 + 0 + 0.5) / 4
