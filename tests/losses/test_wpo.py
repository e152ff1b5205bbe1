"""WPO in hand numbers: the weight of a pair, its bound, and that it is a constant."""

import math
from dataclasses import replace

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.wpo import WPO
from dpo.types import PairLogps, TokenLogps


def tokens(policy, reference=None, collision=None) -> TokenLogps:
    """Rows of log-probs of any length, padded with zeros."""
    width = max(map(len, policy))

    def table(rows):
        return None if rows is None else torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows]).double()

    mask = torch.tensor([[t < len(row) for t in range(width)] for row in policy])
    return TokenLogps(table(policy).requires_grad_(), table(reference), mask, table(collision))


def example(chosen: TokenLogps, rejected: TokenLogps, **labels) -> PairLogps:
    """One pair with r_w = 2 and r_l = -1, whatever its tokens' log-probs."""
    two = {
        "policy_chosen": [-10.0],
        "policy_rejected": [-14.0],
        "reference_chosen": [-12.0],
        "reference_rejected": [-13.0],
    }
    columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in (two | labels).items()}
    return PairLogps(
        **columns,
        chosen_length=chosen.completion_mask.sum(1),
        rejected_length=rejected.completion_mask.sum(1),
        chosen_tokens=chosen,
        rejected_tokens=rejected,
    )


def of(*differences: float) -> TokenLogps:
    """One completion whose tokens' log-probs differ by so much from their log collision probability."""
    return tokens([[-5 + d for d in differences]], None, [[-5.0 for _ in differences]])


LOSS = math.log1p(math.exp(-1.5))
"""DPO's at beta = 0.5: z = 0.5 (2 + 1)."""


def test_hand_numbers():
    # log weights: mean(-1, 0.5, -1) = -0.5 and mean(-0.5, 0) = -0.25; weight e^-0.75
    logps = example(of(-1.0, 0.5, -1.0), of(-0.5, 0.0))
    leaf = logps.policy_chosen.requires_grad_()
    out = WPO(beta=0.5)(logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.exp(-0.75) * LOSS, abs=1e-15)
    assert leaf.grad.item() == pytest.approx(-math.exp(-0.75) * 0.0912127619031782, abs=1e-15)
    assert out.rewards.tolist() == [[1.0, -0.5]]


def test_the_weight_is_a_constant():
    # The tokens' log-probs and collisions are read for the weight alone: no gradient may reach them.
    logps = example(of(-1.0, 0.5, -1.0), of(-0.5, 0.0))
    logps.policy_chosen.requires_grad_()
    logps.chosen_tokens.log_collision.requires_grad_()
    WPO()(logps).loss.backward()
    leaves = (logps.chosen_tokens.policy, logps.rejected_tokens.policy, logps.chosen_tokens.log_collision)
    assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize(
    ("chosen", "rejected", "log_weight"),
    [
        (0.5, 0.25, 0),  # min(1, e^0.75): the authors' code; eq. 2 alone would say e^0.75
        (0.5, -0.75, -0.25),  # the product is bounded, not each factor
        (5000.0, 5000.0, 0),  # no overflow on the way
        (5000.0, -5001.0, -1),
    ],
)
def test_the_product_of_the_weights_is_at_most_1(chosen, rejected, log_weight):
    loss = WPO(beta=0.5)(example(of(chosen), of(rejected))).loss.item()
    assert loss == pytest.approx(math.exp(log_weight) * LOSS, rel=1e-12)


@pytest.mark.parametrize("vocabulary", [2, 1000])
def test_a_uniform_policy_gives_dpo(vocabulary):
    # log p = -ln V and sum p^2 = V / V^2 = 1 / V: every difference is 0, the weight 1.
    uniform = [[-math.log(vocabulary)] * 7]
    completion = tokens(uniform, None, uniform)
    out = WPO(beta=0.1)(example(completion, completion, preference=[0.8], weight=[3.0]))
    plain = DPO()(example(completion, completion, preference=[0.8], weight=[3.0]))
    assert out.loss.item() == pytest.approx(plain.loss.item(), abs=1e-15)


def test_padding_does_not_count():
    # Mean over the 2 scored tokens; in the padding a collision of -9 stands where the mask says False.
    mask = torch.tensor([[True, True, False]])
    policy, collision = torch.tensor([[-1.0, -2.0, 0.0]]).double(), torch.tensor([[-0.5, -1.0, -9.0]]).double()
    chosen = TokenLogps(policy, None, mask, collision)
    loss = WPO(beta=0.5)(example(chosen, of(0.0))).loss.item()
    assert loss == pytest.approx(math.exp(-0.75) * LOSS, abs=1e-15)


def test_soft_label_and_weight():
    # 3 e^-0.5 [0.8 softplus(-1.5) + 0.2 softplus(1.5)]
    loss = WPO(beta=0.5)(example(of(-0.5), of(0.0), preference=[0.8], weight=[3.0])).loss.item()
    assert loss == pytest.approx(3 * math.exp(-0.5) * (LOSS + 0.2 * 1.5), abs=1e-14)


def test_at_the_reference_the_loss_is_the_weight_times_ln_2():
    logps = example(of(-0.5), of(0.0))
    same = replace(logps, reference_chosen=logps.policy_chosen, reference_rejected=logps.policy_rejected)
    assert WPO()(same).loss.item() == pytest.approx(math.exp(-0.5) * math.log(2), abs=1e-15)


@pytest.mark.parametrize("name", ["chosen_tokens", "rejected_tokens"])
def test_missing_fields_are_named(name):
    logps = example(of(-0.5), of(0.0))
    with pytest.raises(ValueError, match=rf"PairLogps\.{name} must hold .* as WPO\.needs_tokens asks"):
        WPO()(replace(logps, **{name: None}))
    without = replace(getattr(logps, name), log_collision=None)
    with pytest.raises(ValueError, match=rf"PairLogps\.{name}\.log_collision must hold .* WPO\.needs_collision asks"):
        WPO()(replace(logps, **{name: without}))
