"""EXO in closed form: a KL divergence, least at the logit of its target."""

import math

import pytest
import torch

from dpo.losses.exo import EXO
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


def logit(q: float) -> float:
    return math.log(q) - math.log(1 - q)


def test_loss_where_the_policy_is_the_reference():
    # -ln 2 - (ln 0.999 + ln 0.001) / 2 = 2.7612307090979150; with p = 1/2 the target is p_theta, and the loss 0.
    losses = EXO()(pairs([0.0, 0.0], [0.0, 0.0], preference=[1.0, 0.5])).losses
    assert losses.tolist() == pytest.approx([2.761230709097915, 0], abs=1e-12)


@pytest.mark.parametrize(("p", "epsilon"), [(1.0, 1e-3), (1.0, 1e-9), (0.8, 1e-3), (0.8, 0.1), (0.5, 0.1)])
def test_least_and_zero_at_the_logit_of_the_target(p, epsilon):
    q = p * (1 - epsilon) + (1 - p) * epsilon
    at = logit(q) if p < 1 else math.log1p(-epsilon) - math.log(epsilon)
    logps = pairs([at - 0.5, at, at + 0.5], [0.0] * 3, preference=[p] * 3)
    out = EXO(beta=1, epsilon=epsilon)(logps)
    out.losses.sum().backward()
    before, least, after = out.losses.tolist()
    assert least == pytest.approx(0, abs=1e-15)  # the logits (0, -10) as a target would fall below 0
    assert min(before, after) > 1e-12
    slope_before, slope, slope_after = logps.policy_chosen.grad.tolist()
    assert slope == pytest.approx(0, abs=1e-15)
    assert slope_before < 0 < slope_after


def test_a_tiny_epsilon_survives_in_float32():
    logps = pairs([0.0], [0.0])
    single = PairLogps(
        *(getattr(logps, name).detach().float() for name in ("policy_chosen", "policy_rejected")),
        *(getattr(logps, name).float() for name in ("reference_chosen", "reference_rejected")),
        logps.chosen_length,
        logps.rejected_length,
    )
    # -ln 2 - (ln(1 - 1e-9) + ln 1e-9) / 2 = 9.668485737; 1 - q in float32 is 0, and its log infinite.
    assert EXO(epsilon=1e-9)(single).loss.item() == pytest.approx(9.668485737, rel=1e-6)


def test_a_pair_far_on_the_wrong_side_is_given_up():
    # d loss / d L_w = beta sigma(z) sigma(-z) (z - logit q): at beta = 0.1 for gaps of 0, -30, -300 nats
    # 0.1 * 0.25 * -6.9 = -0.17, then -0.045, then 0; DPO would pull with -0.05, -0.095, -0.1.
    logps = pairs([0.0, -30.0, -300.0], [0.0] * 3)
    EXO()(logps).losses.sum().backward()
    assert logps.policy_chosen.grad.tolist() == pytest.approx([-0.1726688695, -0.0447554, 0], abs=1e-6)
