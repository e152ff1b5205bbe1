"""LD-DPO in hand numbers: the tokens beyond the shorter completion's length weigh alpha."""

import math
from dataclasses import replace

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.lddpo import LDDPO
from dpo.types import PairLogps, TokenLogps


def tokens(policy, reference=None, collision=None) -> TokenLogps:
    """Rows of log-probs of any length, padded with zeros."""
    width = max(map(len, policy))

    def table(rows):
        return None if rows is None else torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows]).double()

    mask = torch.tensor([[t < len(row) for t in range(width)] for row in policy])
    return TokenLogps(table(policy).requires_grad_(), table(reference), mask, table(collision))


def pairs(chosen: TokenLogps, rejected: TokenLogps, **labels) -> PairLogps:
    return PairLogps(
        policy_chosen=chosen.policy.sum(1),
        policy_rejected=rejected.policy.sum(1),
        reference_chosen=chosen.reference.sum(1),
        reference_rejected=rejected.reference.sum(1),
        chosen_length=chosen.completion_mask.sum(1),
        rejected_length=rejected.completion_mask.sum(1),
        chosen_tokens=chosen,
        rejected_tokens=rejected,
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in labels.items()},
    )


def example(**labels) -> PairLogps:
    """First the chosen completion is the longer one (3 tokens to 1), then the rejected one (1 to 2).

    Log-ratios by token: w 1, 2, 4 and l -1; then w 3 and l 0.5, 5.
    """
    chosen = tokens([[-1.0, -1.0, -2.0], [-1.0]], [[-2.0, -3.0, -6.0], [-4.0]])
    rejected = tokens([[-3.0], [-1.0, -1.0]], [[-2.0], [-1.5, -6.0]])
    return pairs(chosen, rejected, **labels)


def test_hand_numbers():
    # alpha = 0.25: s = 1 + 0.25 * 6 = 2.5 and -1; 3 and 0.5 + 0.25 * 5 = 1.75. beta = 0.1: z = 0.35 and 0.125.
    logps = example()
    out = LDDPO(alpha=0.25)(logps)
    out.losses.sum().backward()
    assert out.losses.tolist() == pytest.approx([math.log1p(math.exp(-z)) for z in (0.35, 0.125)], abs=1e-15)
    torch.testing.assert_close(out.rewards, torch.tensor([[0.25, -0.1], [0.3, 0.175]], dtype=torch.float64))
    # d / d log-prob of token t = -+ beta sigma(-z) c_t
    first, second = (0.1 / (1 + math.exp(z)) for z in (0.35, 0.125))
    chosen = torch.tensor([[-first, -first / 4, -first / 4], [-second, 0, 0]], dtype=torch.float64)
    rejected = torch.tensor([[first, 0], [second, second / 4]], dtype=torch.float64)
    torch.testing.assert_close(logps.chosen_tokens.policy.grad[chosen != 0], chosen[chosen != 0], rtol=1e-14, atol=0)
    torch.testing.assert_close(
        logps.rejected_tokens.policy.grad[rejected != 0], rejected[rejected != 0], rtol=1e-14, atol=0
    )
    assert out.metrics["logp/chosen"].item() == -2.5  # (-4 - 1) / 2: the plain sums


def test_alpha_1_is_dpo():
    ours, theirs = (o(example(preference=[0.9, 1.0])).losses for o in (LDDPO(alpha=1), DPO()))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


def test_alpha_0_reads_the_shared_length_only():
    # z = 0.1 (1 + 1) and 0.1 (3 - 0.5); the tokens beyond are not trained.
    logps = example()
    out = LDDPO(alpha=0)(logps)
    out.losses.sum().backward()
    assert out.losses.tolist() == pytest.approx([math.log1p(math.exp(-z)) for z in (0.2, 0.25)], abs=1e-15)
    assert logps.chosen_tokens.policy.grad[0].count_nonzero() == 1
    assert logps.rejected_tokens.policy.grad[1].count_nonzero() == 1


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_loss_at_the_reference(alpha):
    # Weights in the policy alone would leave (alpha - 1) times the excess tokens' log-probs in z.
    same = [[-1.0, -7.0, -2.0], [-1.0]], [[-3.0], [-1.0, -900.0]]
    logps = pairs(*(tokens(rows, rows) for rows in same), preference=[1.0, 0.6])
    losses = LDDPO(alpha=alpha)(logps).losses
    torch.testing.assert_close(losses, torch.full((2,), math.log(2), dtype=torch.float64), rtol=1e-15, atol=0)


def test_completions_are_counted_in_scored_tokens_wherever_they_stand():
    logps, shift = example(), torch.nn.functional.pad
    moved = {}
    for name in ("chosen_tokens", "rejected_tokens"):
        one = getattr(logps, name)
        padded = [shift(column, (2, 1)) for column in (one.policy, one.reference, one.completion_mask)]
        moved[name] = TokenLogps(*padded)
    torch.testing.assert_close(LDDPO()(replace(logps, **moved)).losses, LDDPO()(logps).losses, rtol=1e-15, atol=0)


def test_soft_label_and_weight():
    # alpha = 0.25, z = 0.35: 2 [0.8 softplus(-0.35) + 0.2 softplus(0.35)]; the second pair is silent.
    losses = LDDPO(alpha=0.25)(example(preference=[0.8, 0.7], weight=[2.0, 0.0])).losses
    expected = 2 * (math.log1p(math.exp(-0.35)) + 0.2 * 0.35)  # softplus(z) = softplus(-z) + z
    assert losses.tolist() == pytest.approx([expected, 0], abs=1e-15)


@pytest.mark.parametrize("name", ["chosen_tokens", "rejected_tokens"])
def test_missing_fields_are_named(name):
    logps = example()
    with pytest.raises(ValueError, match=rf"PairLogps\.{name} must hold .* as LDDPO\.needs_tokens asks"):
        LDDPO()(replace(logps, **{name: None}))
    without = replace(getattr(logps, name), reference=None)
    with pytest.raises(ValueError, match=rf"PairLogps\.{name}\.reference must hold .* as LDDPO\.needs_reference asks"):
        LDDPO()(replace(logps, **{name: without}))
