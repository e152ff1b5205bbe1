"""SFT in hand numbers and against a second implementation in plain floats."""

import random

import pytest
import torch

from dpo.losses.sft import SFT
from dpo.types import JudgementLogps


def demonstrations(policy, length, weight=None) -> JudgementLogps:
    return JudgementLogps(
        policy=torch.tensor(policy, dtype=torch.float64).requires_grad_(),
        reference=None,
        desirable=torch.ones(len(policy), dtype=torch.bool),
        length=torch.tensor(length),
        policy_mismatched=None,
        reference_mismatched=None,
        weight=None if weight is None else torch.tensor(weight, dtype=torch.float64),
    )


def test_hand_numbers():
    # 2 nats on 1 token and 30 nats on 10 tokens: 2 and 3 nats per token, mean 2.5 (a mean over tokens gives 32/11).
    logps = demonstrations([-2.0, -30.0], [1, 10])
    out = SFT()(logps)
    out.loss.backward()
    assert out.losses.tolist() == [2, 3]
    assert out.loss.item() == 2.5
    assert logps.policy.grad.tolist() == pytest.approx([-1 / 2, -1 / 20])
    assert out.rewards.tolist() == [-2, -30]
    assert {name: value.item() for name, value in out.metrics.items()} == {"logp/chosen": -16, "length/chosen": 5.5}


def test_sum_is_the_likelihood():
    logps = demonstrations([-2.0, -30.0], [1, 10])
    out = SFT(reduction="sum")(logps)
    out.loss.backward()
    assert (out.losses.tolist(), out.loss.item()) == ([2, 30], 16)
    assert logps.policy.grad.tolist() == [-0.5, -0.5]


def test_weights_divide_by_the_number_of_examples():
    # (0 * 2 + 3 * 3) / 2, not / 3: parts of a batch then add up.
    assert SFT()(demonstrations([-2.0, -30.0], [1, 10], weight=[0.0, 3.0])).loss.item() == 4.5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradients_equal_a_second_implementation(reduction):
    draw = random.Random(4)
    rows = [(draw.uniform(-900, 0), draw.randint(1, 300)) for _ in range(100)] + [(0.0, 1), (-1e4, 1), (-1e4, 300)]
    logps = demonstrations(*zip(*rows, strict=True))
    out = SFT(reduction=reduction)(logps)
    out.loss.backward()
    divisors = [length if reduction == "mean" else 1 for _, length in rows]
    expected = [[-logp / d, -1 / d / len(rows)] for (logp, _), d in zip(rows, divisors, strict=True)]
    got = torch.stack([out.losses, logps.policy.grad], 1)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
