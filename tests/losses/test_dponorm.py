"""DPONorm in closed form, and where it is DPO."""

import math

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.dponorm import DPONorm
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


LENGTHS = {"chosen_length": [4], "rejected_length": [10]}


@pytest.mark.parametrize("beta", [0.5, 5.0, 20])
def test_loss_is_ln_2_where_the_policy_is_the_reference(beta):
    logps = pairs([0.0, 0.0], [0.0, 0.0], chosen_length=[1, 30], rejected_length=[30, 1], preference=[1.0, 0.7])
    assert DPONorm(beta=beta)(logps).losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)


def test_optimum_of_a_soft_label():
    # The least is at z = logit 0.8 = ln 4: with beta = 5 and 4 tokens at r_w = 4 ln 4 / 5.
    logps = pairs([0.8 * math.log(4)], [0.0], preference=[0.8], **LENGTHS)
    DPONorm()(logps).loss.backward()
    assert slopes(logps) == pytest.approx([0, 0], abs=1e-14)


def test_between_completions_of_n_tokens_it_is_dpo_with_beta_over_n():
    logps = pairs([2.0, -3.0], [-1.0, 8.0], chosen_length=[50, 50], rejected_length=[50, 50])
    torch.testing.assert_close(DPONorm(beta=5)(logps).losses, DPO(beta=0.1)(logps).losses, rtol=1e-14, atol=0)


def test_length_alone_earns_no_reward():
    # Both rise by 0.1 nats a token, over 10 and over 100 tokens: DPO sees a margin, here is none.
    logps = pairs([10.0], [1.0], chosen_length=[100], rejected_length=[10])
    assert DPONorm()(logps).loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert DPO()(logps).loss.item() < 0.5
