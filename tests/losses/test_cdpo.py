"""CDPO in closed form: its optimum, and DPO on smoothed labels."""

import math

import pytest
import torch

from dpo.losses.cdpo import CDPO
from dpo.losses.dpo import DPO
from dpo.losses.robustdpo import RobustDPO
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


@pytest.mark.parametrize("smoothing", [0, 0.1, 0.4])
def test_loss_is_ln_2_where_the_policy_is_the_reference(smoothing):
    out = CDPO(label_smoothing=smoothing)(pairs([0.0, 0.0], [0.0, 0.0], preference=[1.0, 0.7]))
    assert out.losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)


@pytest.mark.parametrize(("p", "target"), [(1.0, 0.9), (0.8, 0.74), (0.5, 0.5)])
def test_optimum_is_the_logit_of_the_smoothed_label(p, target):
    # p' = p (1 - eps) + (1 - p) eps: 0.8 * 0.9 + 0.2 * 0.1 = 0.74. At beta = 0.1 the gap is 10 logit p' nats.
    logps = pairs([10 * math.log(target / (1 - target))], [0.0], preference=[p])
    CDPO()(logps).loss.backward()
    assert slopes(logps) == pytest.approx([0, 0], abs=1e-15)


def test_it_is_dpo_on_smoothed_labels_and_dpo_itself_without_smoothing():
    gaps, zeros = [-40.0, -3.0, 0.0, 5.0, 60.0], [0.0] * 5
    soft = pairs(gaps, zeros, preference=[0.8] * 5)
    smoothed = pairs(gaps, zeros, preference=[0.74] * 5)
    torch.testing.assert_close(CDPO()(soft).losses, DPO()(smoothed).losses, rtol=1e-14, atol=0)
    assert torch.equal(CDPO(label_smoothing=0)(soft).losses, DPO()(soft).losses)


def test_smoothing_bounds_the_margin_where_the_robust_loss_does_not():
    # Far beyond the optimum z = logit 0.9 = 2.2, here at z = 10: CDPO pulls back by beta (sigma(10) - 0.9) = 0.1 * 0.1.
    logps = pairs([100.0], [0.0])
    CDPO()(logps).loss.backward()
    assert slopes(logps)[0] == pytest.approx(0.00999546, abs=1e-8)
    logps = pairs([100.0], [0.0])
    RobustDPO()(logps).loss.backward()
    assert slopes(logps)[0] < 0
