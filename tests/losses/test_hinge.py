"""Hinge on both sides of its margin."""

import pytest
import torch

from dpo.losses.hinge import Hinge
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


def test_a_pair_beyond_the_margin_rests_and_one_behind_it_pulls_with_full_strength():
    # beta = 0.05: the margin is 1 / beta = 20 nats. Gaps of 21, 19 and -1000 nats: z = 1.05, 0.95, -50.
    logps = pairs([21.0, 19.0, -1000.0], [0.0] * 3)
    out = Hinge()(logps)
    out.losses.sum().backward()
    assert out.losses.tolist() == pytest.approx([0, 0.05, 51], abs=1e-12)
    assert logps.policy_chosen.grad.tolist() == [0, -0.05, -0.05]


@pytest.mark.parametrize("beta", [0.05, 1.0, 3])
def test_loss_is_1_where_the_policy_is_the_reference(beta):
    assert Hinge(beta=beta)(pairs([0.0, 0.0], [0.0, 0.0], preference=[1.0, 0.7])).losses.tolist() == [1, 1]


def test_soft_label_weakens_the_pull_and_keeps_the_optimum():
    # p = 0.8, beta = 1. z = 0.5: 0.8 * 0.5 + 0.2 * 1.5 = 0.7, slope -0.8 + 0.2 = -0.6. z = 1.5: 0.2 * 2.5 = 0.5,
    # slope 0.2. The least is between, at z = 1: 0.2 * 2 = 0.4.
    logps = pairs([0.5, 1.5, 1.0], [0.0] * 3, preference=[0.8] * 3)
    out = Hinge(beta=1)(logps)
    out.losses.sum().backward()
    assert out.losses.tolist() == pytest.approx([0.7, 0.5, 0.4], abs=1e-12)
    assert logps.policy_chosen.grad.tolist()[:2] == pytest.approx([-0.6, 0.2], abs=1e-12)


def test_it_compares_with_the_reference_unlike_slic():
    logps = pairs([2.0], [-1.0])
    moved = PairLogps(
        policy_chosen=logps.policy_chosen + 7,
        policy_rejected=logps.policy_rejected - 5,
        reference_chosen=logps.reference_chosen + 7,
        reference_rejected=logps.reference_rejected - 5,
        chosen_length=logps.chosen_length,
        rejected_length=logps.rejected_length,
    )
    assert Hinge()(moved).loss.item() == pytest.approx(Hinge()(logps).loss.item(), abs=1e-12)
