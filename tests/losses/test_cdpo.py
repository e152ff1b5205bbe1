"""CDPO in hand numbers and in closed form."""

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


def test_hand_numbers():
    # beta = 0.5: z = 0.5 (2 + 1) = 1.5, -log sigma(1.5) = 0.2014132779827525, -log sigma(-1.5) = 1.7014132779827525.
    # loss = 0.9 * 0.2014132779827525 + 0.1 * 1.7014132779827525 = 0.3514132779827524
    # d loss / d L_w = beta (sigma(z) - 0.9) = 0.5 (0.8175744761936437 - 0.9) = -0.0412127619031782
    logps = pairs([2.0], [-1.0])
    out = CDPO(beta=0.5)(logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.3514132779827524, abs=1e-12)
    assert slopes(logps) == pytest.approx([-0.0412127619031782, 0.0412127619031782], abs=1e-12)
    assert out.rewards.tolist() == [[1.0, -0.5]]


def test_a_weight_multiplies_its_pair_and_the_mean_is_over_pairs():
    out = CDPO(beta=0.5)(pairs([2.0, 2.0, 0.0], [-1.0, -1.0, 0.0], weight=[3.0, 1.0, 0.0]))
    assert out.losses.tolist() == pytest.approx([3 * 0.3514132779827524, 0.3514132779827524, 0], abs=1e-12)
    assert out.loss.item() == pytest.approx(4 * 0.3514132779827524 / 3, abs=1e-12)


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


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf, True])
def test_bad_beta_is_refused(beta):
    with pytest.raises(ValueError, match=r"^CDPO\.beta must be"):
        CDPO(beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1, math.nan, True])
def test_bad_label_smoothing_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"^CDPO\.label_smoothing must be"):
        CDPO(label_smoothing=smoothing)
