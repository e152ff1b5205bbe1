"""NCA in closed form."""

import math

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.nca import NCA
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


@pytest.mark.parametrize("beta", [0.01, 0.1, 5])
def test_loss_is_2_ln_2_where_the_policy_is_the_reference(beta):
    losses = NCA(beta=beta)(pairs([0.0, 0.0], [0.0, 0.0], preference=[1.0, 0.7])).losses
    assert losses.tolist() == pytest.approx([2 * math.log(2)] * 2, abs=1e-15)


@pytest.mark.parametrize("p", [0.5, 0.8, 0.99])
def test_each_completion_has_its_own_optimum(p):
    # p sigma(-x) = sigma(x) / 2 at x = ln 2p; beta = 0.1.
    logps = pairs([10 * math.log(2 * p)], [10 * math.log(2 * (1 - p))], preference=[p])
    NCA()(logps).loss.backward()
    assert slopes(logps) == pytest.approx([0, 0], abs=1e-15)


def test_a_certain_label_keeps_the_chosen_likelihood_up_where_dpo_lets_both_fall():
    # Both have fallen by 50 nats, the rejected one by 20 more: DPO's pull on the chosen one is 0.1 sigma(-2) = 0.012,
    # here it is 0.1 (sigma(5) - sigma(-5) / 2) = 0.099.
    slope = {}
    for objective in (NCA(), DPO()):
        logps = pairs([-50.0], [-70.0])
        objective(logps).loss.backward()
        slope[type(objective)] = slopes(logps)[0]
    assert slope[NCA] == pytest.approx(-0.0989960, abs=1e-6)
    assert slope[DPO] == pytest.approx(-0.0119203, abs=1e-6)
