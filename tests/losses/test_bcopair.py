"""BCOPair: its shift, and its bound on DPO."""

import math
from dataclasses import replace

import pytest
import torch

from dpo.losses.bcopair import BCOPair
from dpo.losses.dpo import DPO
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


def test_without_a_shift_it_is_the_loss_of_common_code():
    # delta = 0: 0.3132616875182228 + 0.4740769841801067
    loss = BCOPair(beta=0.5)(pairs([2.0], [-1.0], mean_log_ratio=0.0)).loss
    assert loss.item() == pytest.approx(0.3132616875182228 + 0.4740769841801067, abs=1e-12)


def test_loss_where_the_policy_is_the_reference():
    # The first step: 2 ln 2. Later, delta = 0.5 * 0.5: -log sigma(0.25) - log sigma(-0.25) = 1.4018788397576871.
    at_reference = {"chosen": [0.0, 0.0], "rejected": [0.0, 0.0], "preference": [1.0, 0.7]}
    first = BCOPair(beta=0.5)(pairs(**at_reference, mean_log_ratio=0.0)).losses
    later = BCOPair(beta=0.5)(pairs(**at_reference, mean_log_ratio=0.5)).losses
    assert first.tolist() == pytest.approx([2 * math.log(2)] * 2, abs=1e-15)
    assert later.tolist() == pytest.approx([1.4018788397576871] * 2, abs=1e-12)


def test_a_drift_of_all_log_ratios_leaves_the_loss_when_the_mean_follows():
    steady = BCOPair()(pairs([2.0, -1.0], [-1.0, 3.0], mean_log_ratio=0.75)).losses
    drifted = BCOPair()(pairs([-38.0, -41.0], [-41.0, -37.0], mean_log_ratio=-39.25)).losses
    torch.testing.assert_close(drifted, steady, rtol=1e-13, atol=0)


def test_the_mean_is_a_constant_of_the_step_and_takes_no_gradient():
    logps = pairs([2.0], [-1.0], mean_log_ratio=0.5)
    mean = logps.mean_log_ratio.requires_grad_()
    BCOPair()(logps).loss.backward()
    assert mean.grad is None


@pytest.mark.parametrize("mean", [-30.0, 0.0, 4.0])
def test_it_bounds_dpo_from_above(mean):
    # sigma(a) sigma(b) <= sigma(a + b), and delta leaves the sum of the two arguments alone.
    chosen, rejected = [-40.0, -3.0, 0.0, 5.0, 60.0], [2.0, -30.0, 0.0, 4.0, -9.0]
    logps = pairs(chosen, rejected, preference=[1.0, 0.9, 0.8, 0.6, 0.5], mean_log_ratio=mean)
    assert (BCOPair()(logps).losses > DPO()(logps).losses).all()


def test_missing_mean_is_named():
    logps = replace(pairs([2.0], [-1.0]), mean_log_ratio=None)
    with pytest.raises(ValueError, match=r"PairLogps\.mean_log_ratio must hold .* BCOPair\.needs_mean_log_ratio"):
        BCOPair()(logps)
