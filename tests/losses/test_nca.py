"""NCA in hand numbers and in closed form."""

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


def test_hand_numbers():
    # beta = 0.5: rewards 1 and -0.5. -log sigma(1) = 0.3132616875182228, -log sigma(-1) = 1.3132616875182228,
    # -log sigma(0.5) = 0.4740769841801067. loss = 0.31326 + 1.31326 / 2 + 0.47408 / 2 = 1.2069310233673876
    # d / d L_w = 0.5 (-sigma(-1) + sigma(1) / 2) = 0.0482939339725037, d / d L_l = 0.5 sigma(-0.5) / 2
    #   = 0.0943851671995363: beyond ln 2 the chosen completion is held back.
    logps = pairs([2.0], [-1.0])
    out = NCA(beta=0.5)(logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(1.2069310233673876, abs=1e-12)
    assert slopes(logps) == pytest.approx([0.0482939339725037, 0.0943851671995363], abs=1e-12)
    assert out.rewards.tolist() == [[1.0, -0.5]]


def test_a_weight_multiplies_its_pair_and_the_mean_is_over_pairs():
    out = NCA(beta=0.5)(pairs([2.0, 2.0, 0.0], [-1.0, -1.0, 0.0], weight=[3.0, 1.0, 0.0]))
    assert out.losses.tolist() == pytest.approx([3 * 1.2069310233673876, 1.2069310233673876, 0], abs=1e-12)
    assert out.loss.item() == pytest.approx(4 * 1.2069310233673876 / 3, abs=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5])
def test_loss_is_2_ln_2_where_the_policy_is_the_reference(beta):
    losses = NCA(beta=beta)(pairs([0.0, 0.0], [0.0, 0.0], preference=[1.0, 0.7])).losses
    assert losses.tolist() == pytest.approx([2 * math.log(2)] * 2, abs=1e-15)


def test_soft_label_is_the_loss_over_two_responses_with_their_softmax():
    # The numbers above with p = 0.8, and -log sigma(-0.5) = 0.9740769841801067:
    # 0.8 * 0.31326 + 0.2 * 0.97408 + (1.31326 + 0.47408) / 2 = 1.3390940826997644
    out = NCA(beta=0.5)(pairs([2.0], [-1.0], preference=[0.8]))
    assert out.loss.item() == pytest.approx(1.3390940826997644, abs=1e-12)


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


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf, True])
def test_bad_beta_is_refused(beta):
    with pytest.raises(ValueError, match=r"^NCA\.beta must be"):
        NCA(beta=beta)
