"""AOT in hand numbers: what is sorted, where a loss stands, and which labels it takes."""

import math

import pytest
import torch

from dpo.losses.aot import AOT
from dpo.losses.dpo import DPO
from dpo.types import PairLogps


def pairs(rows, preference=None, weight=None) -> PairLogps:
    """Rows of (L_w, L_l, reference L_w, reference L_l, |w|, |l|)."""
    pc, pr, rc, rr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if x is None else torch.tensor(x, dtype=torch.float64) for x in (preference, weight))
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), rc, rr, cl.long(), rl.long(), p, w)


ROWS = [(-1.0, -4.0, -2.0, -3.0, 2, 2), (-6.0, -5.0, -4.0, -8.0, 2, 2), (-2.0, -4.0, -3.0, -1.0, 2, 2)]
"""Policy margins 3, -1, 2; reference margins 1, 4, -2; r_w = 1, -2, 1; r_l = -1, 3, -3."""


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_paired_hand_numbers():
    # Sorted margins: policy -1, 2, 3 and reference -2, 1, 4: distances 1, 1, -1 for the examples 1, 2, 0.
    # beta = 1: losses softplus(1), softplus(-1), softplus(-1); d / d L_w = -sigma(-distance) / 3.
    logps = pairs(ROWS)
    out = AOT(beta=1)(logps)
    out.loss.backward()
    assert out.losses.tolist() == pytest.approx([softplus(1), softplus(-1), softplus(-1)], abs=1e-15)
    assert out.rewards.tolist() == [[1, -1], [-2, 3], [1, -3]]  # of each pair, whatever its rank
    slopes = [1 / (1 + math.exp(distance)) / 3 for distance in (-1, 1, 1)]
    assert logps.policy_chosen.grad.tolist() == pytest.approx([-slope for slope in slopes], abs=1e-15)
    assert logps.policy_rejected.grad.tolist() == pytest.approx(slopes, abs=1e-15)


UNPAIRED_ROWS = [(1.0, -1.0, 0.0, 0.0, 2, 2), (-2.0, 3.0, 0.0, 0.0, 2, 2), (0.5, -3.0, 0.0, 0.0, 2, 2)]
"""r_w = 1, -2, 0.5; r_l = -1, 3, -3."""


def test_unpaired_hand_numbers():
    # Sorted: chosen -2, 0.5, 1 (examples 1, 2, 0), rejected -3, -1, 3 (examples 2, 0, 1): distances 1, 1.5, -2.
    # Example 0's chosen meets example 1's rejected, 1's meets 2's, 2's meets 0's.
    logps = pairs(UNPAIRED_ROWS)
    out = AOT(beta=1, pairing="unpaired")(logps)
    out.loss.backward()
    assert out.losses.tolist() == pytest.approx([softplus(2), softplus(-1), softplus(-1.5)], abs=1e-15)
    assert out.rewards.tolist() == [[1, -1], [-2, 3], [0.5, -3]]
    first, second, third = (1 / (1 + math.exp(distance)) / 3 for distance in (-2, 1, 1.5))
    assert logps.policy_chosen.grad.tolist() == pytest.approx([-first, -second, -third], abs=1e-15)
    assert logps.policy_rejected.grad.tolist() == pytest.approx([third, first, second], abs=1e-15)


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_loss_at_the_reference(pairing):
    logps = pairs(
        [(-3.0, -5.0, -3.0, -5.0, 1, 30), (-700.0, -0.1, -700.0, -0.1, 300, 1), (-1.0, -4.0, -1.0, -4.0, 2, 2)]
    )
    losses = AOT(pairing=pairing)(logps).losses
    torch.testing.assert_close(losses, torch.full((3,), math.log(2), dtype=torch.float64), rtol=1e-15, atol=0)


def test_unpaired_does_not_ask_which_completions_belong_together():
    exchanged = [(w[0], other[1], w[2], other[3], 2, 2) for w, other in zip(ROWS, ROWS[1:] + ROWS[:1], strict=True)]
    for pairing, same in (("unpaired", True), ("paired", False)):
        one, other = (AOT(beta=1, pairing=pairing)(pairs(rows)).loss.item() for rows in (ROWS, exchanged))
        assert (one == pytest.approx(other, abs=1e-12)) == same


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_a_batch_of_one_is_dpo_and_parts_of_a_batch_are_not_the_batch(pairing):
    objective = AOT(pairing=pairing, beta=0.1)
    alone = [objective(pairs([row])).loss.item() for row in ROWS]
    assert alone == pytest.approx(DPO()(pairs(ROWS)).losses.tolist(), abs=1e-15)
    assert objective.batch_coupled
    assert objective(pairs(ROWS)).loss.item() != pytest.approx(sum(alone) / 3, abs=1e-4)


def test_weight_stands_where_the_loss_does():
    # Unpaired: example 0's weight, 5, also multiplies the gradient of the rejected completion it meets: example 1's.
    weighted, plain = pairs(UNPAIRED_ROWS, weight=[5.0, 0.0, 1.0]), pairs(UNPAIRED_ROWS)
    out, expected = (AOT(beta=1, pairing="unpaired")(logps) for logps in (weighted, plain))
    out.loss.backward()
    expected.loss.backward()
    assert out.losses.tolist() == [5 * expected.losses[0].item(), 0, expected.losses[2].item()]
    ratio = weighted.policy_rejected.grad / plain.policy_rejected.grad
    assert ratio.tolist() == pytest.approx([1, 5, 0], abs=1e-15)


def test_certain_labels_are_taken_and_others_refused():
    certain = AOT()(pairs(ROWS, preference=[1.0, 1.0, 1.0])).losses
    torch.testing.assert_close(certain, AOT()(pairs(ROWS)).losses, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"PairLogps\.preference must be 1 .* got 0\.7 in row 1: sorting takes .* DPO"):
        AOT()(pairs(ROWS, preference=[1.0, 0.7, 0.9]))


@pytest.mark.parametrize("field", ["reference_chosen", "reference_rejected"])
@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_missing_reference_is_named(pairing, field):
    logps = pairs(ROWS)
    object.__setattr__(logps, field, None)
    with pytest.raises(ValueError, match=rf"PairLogps\.{field} must hold .* got None"):
        AOT(pairing=pairing)(logps)
