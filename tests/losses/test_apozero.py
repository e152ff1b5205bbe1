"""APOZero in closed form, and where it saturates."""

import math

import pytest
import torch

from dpo.losses.apozero import APOZero
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


@pytest.mark.parametrize("beta", [0.1, 2])
def test_loss_is_1_where_the_policy_is_the_reference(beta):
    # With the paper's constant; without it the loss would be 0 there.
    assert APOZero(beta=beta)(pairs([0.0, 0.0], [0.0, 0.0], preference=[1.0, 0.7])).losses.tolist() == [1, 1]


def test_an_even_label_does_not_pull():
    even = pairs([2.0], [-1.0], preference=[0.5])
    APOZero(beta=0.5)(even).loss.backward()
    assert slopes(even) == pytest.approx([0, 0], abs=1e-15)


def test_at_the_reference_it_raises_the_chosen_one_and_lowers_the_rejected_one():
    # beta sigma'(0) = 0.1 / 4
    logps = pairs([0.0], [0.0])
    APOZero()(logps).loss.backward()
    assert slopes(logps) == pytest.approx([-0.025, 0.025], abs=1e-15)


def test_the_two_completions_are_anchored_apart():
    # The rejected one's fall does not change the pull on the chosen one, as it does in a margin loss.
    logps = pairs([2.0, 2.0], [0.0, -300.0])
    APOZero()(logps).losses.sum().backward()
    assert logps.policy_chosen.grad[0] == logps.policy_chosen.grad[1] < 0


def test_it_saturates_between_0_and_2_and_keeps_small_losses_exact():
    # beta = 1: 1 - sigma(50) + sigma(-50) = 2 e^-50 up to e^-100; 1 - sigma would round it to e^-50.
    best, worst = APOZero(beta=1)(pairs([50.0, -1e4], [-50.0, 1e4])).losses.tolist()
    assert best == pytest.approx(2 * math.exp(-50), rel=1e-12, abs=0)
    assert worst == 2
