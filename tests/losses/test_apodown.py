"""APODown in closed form, and where it saturates."""

import math

import pytest
import torch

from dpo.losses.apodown import APODown
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


def test_at_the_reference_the_chosen_one_rests_and_then_falls_with_the_rejected_one():
    # At the reference sigma'(0) - sigma'(0) = 0 and beta sigma'(0) = 0.025. With the rejected one 10 nats down, z = 1:
    # 0.1 (0.25 - 0.1966119332414819) = 0.0053388066758518 lowers the chosen one; APOZero would raise it.
    at_reference, later, zero = pairs([0.0], [0.0]), pairs([0.0], [-10.0]), pairs([0.0], [-10.0])
    APODown()(at_reference).loss.backward()
    APODown()(later).loss.backward()
    APOZero()(zero).loss.backward()
    assert slopes(at_reference) == [0, 0.025]
    assert slopes(later) == pytest.approx([0.0053388066758518, 0.0196611933241482], abs=1e-12)
    assert slopes(zero)[0] == pytest.approx(-0.025, abs=1e-15)


def test_it_saturates_between_0_and_2_and_keeps_small_losses_exact():
    # beta = 1, r_w = -50, z = 50: sigma(-50) + 1 - sigma(50) = 2 e^-50 up to e^-100; 1 - sigma would round it to e^-50.
    best, worst = APODown(beta=1)(pairs([-50.0, 1e4], [-100.0, 2e4])).losses.tolist()
    assert best == pytest.approx(2 * math.exp(-50), rel=1e-12, abs=0)
    assert worst == 2
