"""DPO in closed form, and against a second implementation in plain floats."""

import math
import random

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.types import PairLogps


def pairs(policy_chosen, policy_rejected, reference_chosen, reference_rejected, **others) -> PairLogps:
    def column(values):
        return torch.tensor(values, dtype=torch.float64)

    n = len(policy_chosen)
    lengths = {name: torch.tensor(others.pop(name, [7] * n)) for name in ("chosen_length", "rejected_length")}
    return PairLogps(
        policy_chosen=column(policy_chosen).requires_grad_(),
        policy_rejected=column(policy_rejected).requires_grad_(),
        reference_chosen=column(reference_chosen),
        reference_rejected=column(reference_rejected),
        **lengths,
        **{name: column(values) for name, values in others.items()},
    )


def test_metrics_average_over_pairs_and_a_tie_counts_half():
    # beta = 1, reference 0: rewards are the log-probs. Three pairs: right (-1 > -2), tied, wrong (-6 < -3).
    logps = pairs([-1.0, -4.0, -6.0], [-2.0, -4.0, -3.0], [0.0] * 3, [0.0] * 3, weight=[0.0, 5.0, 1.0])
    metrics = DPO(beta=1)(logps).metrics
    assert metrics["reward/accuracy"].item() == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics["reward/margin"].item() == pytest.approx((1 + 0 - 3) / 3)
    assert metrics["reward/chosen"].item() == metrics["logp/chosen"].item() == pytest.approx(-11 / 3)
    assert metrics["reward/rejected"].item() == metrics["logp/rejected"].item() == pytest.approx(-3)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_loss_is_ln_2_where_the_policy_is_the_reference(beta: float):
    logps = pairs([-3.0, -700.0], [-5.0, -0.1], [-3.0, -700.0], [-5.0, -0.1], preference=[1.0, 0.7])
    out = DPO(beta=beta)(logps)
    torch.testing.assert_close(out.losses, torch.full((2,), math.log(2), dtype=torch.float64), rtol=0, atol=1e-15)
    assert out.metrics["reward/accuracy"].item() == 0.5
    assert not out.rewards.any()


def test_soft_label_hand_numbers_and_optimum():
    # z = 0.1 * 10 = 1: with p = 0.8 the loss is 0.8 ln(1 + e^-1) + 0.2 ln(1 + e) = 0.5132616875182228
    logps = pairs([-5.0], [-9.0], [-10.0], [-4.0], preference=[0.8])
    assert DPO()(logps).loss.item() == pytest.approx(0.5132616875182228, abs=1e-15)
    # The minimum is at z = logit p: at beta = 0.1 a gap of 10 ln 4 nats for p = 0.8.
    logps = pairs([10 * math.log(4)], [0.0], [0.0], [0.0], preference=[0.8])
    DPO()(logps).loss.backward()
    assert logps.policy_chosen.grad.item() == pytest.approx(0, abs=1e-15)


def second_dpo(pc, pr, rc, rr, p, beta):
    """Loss and d loss / d L_w in plain floats: L = p softplus(-z) + (1 - p) softplus(z), dL/dz = sigma(z) - p."""
    z = beta * (pc - rc - pr + rr)
    softplus = max(z, 0) + math.log1p(math.exp(-abs(z)))
    sigma = 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
    return softplus - p * z, beta * (sigma - p)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_values_and_gradients_equal_a_second_implementation(beta: float):
    draw = random.Random(0)
    rows = [(*(draw.uniform(-90, -1) for _ in range(4)), draw.uniform(0.5, 1)) for _ in range(200)]
    for margin in (0.0, 30.0, -30.0, 1e4, -1e4):  # the reference equals, then extremes
        rows += [(margin - 5, -5.0, -5.0, -5.0, p) for p in (0.5, 0.9, 1.0)]
    columns = list(zip(*rows, strict=True))
    logps = pairs(*columns[:4], preference=columns[4])
    out = DPO(beta=beta)(logps)
    out.losses.sum().backward()
    expected = torch.tensor([second_dpo(*row, beta) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(out.losses, expected[:, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logps.policy_chosen.grad, expected[:, 1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logps.policy_rejected.grad, -expected[:, 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("field", ["reference_chosen", "reference_rejected"])
def test_missing_reference_is_named(field: str):
    logps = pairs([-1.0], [-2.0], [-1.0], [-2.0])
    object.__setattr__(logps, field, None)
    with pytest.raises(ValueError, match=rf"PairLogps.{field} must hold .* got None"):
        DPO()(logps)


def test_message_of_a_bad_beta():
    with pytest.raises(ValueError, match=r"^DPO\.beta must be > 0, got 0$"):
        DPO(beta=0)
