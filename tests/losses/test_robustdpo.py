"""RobustDPO's law: under reversed labels its mean is the clean loss."""

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
    # ((1 - eps) ln 2 - eps ln 2) / (1 - 2 eps) = ln 2
    out = RobustDPO(label_smoothing=smoothing)(pairs([0.0, 0.0], [0.0, 0.0], preference=[1.0, 0.7]))
    assert out.losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-14)


@pytest.mark.parametrize("smoothing", [0.1, 0.3, 0.45])
def test_its_mean_over_reversed_labels_is_dpo_on_the_clean_one(smoothing):
    # A label reversed with probability eps is a label of preference 1 - eps.
    gaps, zeros = [-40.0, -3.0, 0.0, 5.0, 60.0], [0.0] * 5
    noisy = pairs(gaps, zeros, preference=[1 - smoothing] * 5)
    robust = RobustDPO(label_smoothing=smoothing)(noisy).losses
    torch.testing.assert_close(robust, DPO()(pairs(gaps, zeros)).losses, rtol=1e-12, atol=1e-12)


def test_it_finds_the_clean_optimum_and_dpo_and_cdpo_do_not():
    # 80 of 100 judges prefer w, and 10 % of the labels are reversed: 0.8 * 0.9 + 0.2 * 0.1 = 0.74 of them say so.
    # The clean optimum is z = logit 0.8 = ln 4; at beta = 0.1 a gap of 10 ln 4 nats.
    slope = {}
    for objective in (RobustDPO(), DPO(), CDPO()):
        logps = pairs([10 * math.log(4)], [0.0], preference=[0.74])
        objective(logps).loss.backward()
        slope[type(objective)] = slopes(logps)[0]
    assert slope[RobustDPO] == pytest.approx(0, abs=1e-15)
    assert slope[DPO] == pytest.approx(0.1 * (0.8 - 0.74), abs=1e-15)  # pulls back to logit 0.74
    assert slope[CDPO] == pytest.approx(0.1 * (0.8 - 0.692), abs=1e-15)  # 0.74 * 0.9 + 0.26 * 0.1: further back


def test_without_smoothing_it_is_dpo():
    logps = pairs([-3.0, 5.0], [0.0, 1.0], preference=[1.0, 0.8])
    assert torch.equal(RobustDPO(label_smoothing=0)(logps).losses, DPO()(logps).losses)


def test_a_certain_pair_s_loss_falls_without_bound():
    # For large z: (0.9 * 0 - 0.1 z) / 0.8 = -z / 8; beta = 0.1 and gaps of 1000 and 8000 nats are z = 100 and 800.
    losses = RobustDPO()(pairs([1000.0, 8000.0], [0.0, 0.0])).losses
    assert losses.tolist() == pytest.approx([-12.5, -100], abs=1e-12)
