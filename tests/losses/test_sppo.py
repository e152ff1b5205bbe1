"""SPPO in closed form."""

import pytest
import torch

from dpo.losses.sppo import SPPO
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


@pytest.mark.parametrize(("p", "constant"), [(1.0, 250_000.0), (0.7, 40_000.0), (0.5, 0.0)])
def test_loss_where_the_policy_is_the_reference(p, constant):
    # (p - 1/2)^2 / beta^2 with beta = 1e-3
    assert SPPO()(pairs([0.0], [0.0], preference=[p])).loss.item() == pytest.approx(constant, rel=1e-12)


def test_soft_label_sets_both_targets():
    # p = 0.8, beta = 0.1: targets 3 and -3. ((2 - 3)^2 + (-1 + 3)^2) / 2 = 2.5; nothing is left at the targets.
    assert SPPO(beta=0.1)(pairs([2.0], [-1.0], preference=[0.8])).loss.item() == pytest.approx(2.5, abs=1e-12)
    assert SPPO(beta=0.1)(pairs([3.0], [-3.0], preference=[0.8])).loss.item() == pytest.approx(0, abs=1e-24)


def test_the_expectation_over_labels_has_the_same_gradient_and_another_constant():
    # p (r - t)^2 + (1 - p) (r + t)^2 = (r - (2p - 1) t)^2 + 4 p (1 - p) t^2 with t = 5: for both completions and with
    # the factor 1/2, 4 * 0.8 * 0.2 * 25 = 16 more.
    soft = pairs([2.0], [-1.0], preference=[0.8])
    SPPO(beta=0.1)(soft).loss.backward()
    certain, other = pairs([2.0], [-1.0]), pairs([-1.0], [2.0])
    expected = 0.8 * SPPO(beta=0.1)(certain).loss + 0.2 * SPPO(beta=0.1)(other).loss
    expected.backward()
    assert expected.item() == pytest.approx(2.5 + 16, abs=1e-12)
    mixed = [a + b for a, b in zip(slopes(certain), reversed(slopes(other)), strict=True)]
    assert slopes(soft) == pytest.approx(mixed, abs=1e-12)


def test_common_code_is_twice_this_loss_at_certain_labels():
    # (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2
    assert SPPO(beta=0.1)(pairs([2.0], [-1.0])).loss.item() == ((2 - 5) ** 2 + (-1 + 5) ** 2) / 2


def test_each_completion_is_drawn_to_its_own_target_unlike_a_margin():
    # Both log-ratios 100 nats up: the gap is as before, the loss is not.
    low, high = SPPO(beta=0.1)(pairs([5.0, 105.0], [-5.0, 95.0])).losses.tolist()
    assert (low, high) == (0, 10_000)
