"""KTO in hand numbers, in closed form, and against a second implementation in plain floats."""

import math
import random
from dataclasses import replace

import pytest
import torch

from dpo.losses.kto import KTO, balanced_weights
from dpo.types import JudgementLogps


def judgements(log_ratios, desirable, mismatched, reference=-20.0) -> JudgementLogps:
    """A batch with these log-ratios; `mismatched` are those of the completions under other prompts."""
    ratio, other = (torch.tensor(values, dtype=torch.float64) for values in (log_ratios, mismatched))
    base, other_base = torch.full_like(ratio, reference), torch.full_like(other, reference - 3)
    return JudgementLogps(
        policy=(base + ratio).requires_grad_(),
        reference=base,
        desirable=torch.tensor(desirable),
        length=torch.arange(len(log_ratios)) + 1,
        policy_mismatched=(other_base + other).requires_grad_(),
        reference_mismatched=other_base,
    )


def test_hand_numbers():
    # z = (4 + 0) / 2 = 2 nats. beta = 0.5.
    # Desirable, r = 4: v = sigma(0.5 * 2) = sigma(1) = 0.7310585786300049, loss 2 (1 - v) = 0.5378828427399902,
    #   d / d L = -2 * 0.5 v (1 - v) = -0.19661193324148185.
    # Undesirable, r = 0: v = sigma(0.5 * (2 - 0)) = sigma(1), loss 3 (1 - v) = 0.8068242641099853,
    #   d / d L = +3 * 0.5 v (1 - v) = 0.2949178998622228.
    logps = judgements([4.0, 0.0], [True, False], [4.0, 0.0])
    out = KTO(beta=0.5, desirable_weight=2, undesirable_weight=3)(logps)
    out.losses.sum().backward()
    torch.testing.assert_close(
        out.losses, torch.tensor([0.5378828427399902, 0.8068242641099853], dtype=torch.float64), rtol=0, atol=1e-15
    )
    expected = torch.tensor([-0.19661193324148185, 0.2949178998622228], dtype=torch.float64)
    torch.testing.assert_close(logps.policy.grad, expected, rtol=0, atol=1e-15)
    assert logps.policy_mismatched.grad is None
    assert out.rewards.tolist() == [2, 0]
    assert {name: value.item() for name, value in out.metrics.items()} == {
        "kl/reference_point": 2.0,
        "reward/chosen": 2.0,
        "reward/rejected": 0.0,
        "reward/margin": 2.0,
        "reward/accuracy": 1.0,
        "logp/chosen": -16.0,
        "logp/rejected": -20.0,
        "length/chosen": 1.0,
        "length/rejected": 2.0,
    }


def test_loss_is_half_the_weight_where_the_policy_is_the_reference():
    logps = judgements([0.0, 0.0], [True, False], [0.0, 0.0])
    assert KTO(desirable_weight=1.5, undesirable_weight=0.4)(logps).losses.tolist() == [0.75, 0.2]


def test_reference_point_is_never_negative():
    # mean(-6, 2) = -2 is clamped to 0, so that r = 0 still gives 1/2.
    out = KTO()(judgements([0.0, 0.0], [True, False], [-6.0, 2.0]))
    assert out.metrics["kl/reference_point"].item() == 0
    assert out.losses.tolist() == [0.5, 0.5]


def test_reference_point_is_the_mean_over_all_mismatched_completions_whatever_their_label():
    out = KTO()(judgements([0.0] * 4, [True, False, False, False], [1.0, 2.0, 3.0, 6.0]))
    assert out.metrics["kl/reference_point"].item() == 3


@pytest.mark.parametrize(("desirable", "absent"), [(True, "rejected"), (False, "chosen")])
def test_metrics_of_a_missing_label_are_absent(desirable, absent):
    metrics = KTO()(judgements([1.0, 2.0], [desirable] * 2, [0.0, 0.0])).metrics
    present = "rejected" if absent == "chosen" else "chosen"
    assert set(metrics) == {"kl/reference_point", *(f"{group}/{present}" for group in ("reward", "logp", "length"))}


def test_accuracy_is_the_share_of_ordered_combinations():
    # Desirable 3, 1, 2; undesirable 1, 2: of the six combinations 3 > 1, 3 > 2, 2 > 1 are right, two are ties.
    ratios, desirable = [3.0, 1.0, 1.0, 2.0, 2.0], [True, False, True, False, True]
    accuracy = KTO()(judgements(ratios, desirable, [0.0] * 5)).metrics["reward/accuracy"]
    assert accuracy.item() == pytest.approx((3 + 2 / 2) / 6)


def test_accuracy_equals_counting():
    draw = random.Random(2)
    ratios = [float(draw.randint(-5, 5)) for _ in range(60)]
    desirable = [draw.random() < 0.3 for _ in ratios]
    good = [r for r, d in zip(ratios, desirable, strict=True) if d]
    bad = [r for r, d in zip(ratios, desirable, strict=True) if not d]
    counted = sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))
    accuracy = KTO()(judgements(ratios, desirable, [0.0] * 60)).metrics["reward/accuracy"]
    assert accuracy.item() == pytest.approx(counted, abs=1e-12)


def second_kto(r, z, desirable, beta, weight):
    """Loss and d loss / d L in plain floats, through tanh: 1 - sigma(v) = (1 - tanh(v / 2)) / 2."""
    sign = 1 if desirable else -1
    t = math.tanh(sign * beta * (r - z) / 2)
    return weight * (1 - t) / 2, -sign * weight * beta * (1 - t * t) / 4


def test_values_and_gradients_equal_a_second_implementation():
    draw = random.Random(3)
    ratios = [draw.uniform(-40, 40) for _ in range(200)] + [0.0, 30.0, -30.0, 1e4, -1e4] * 2
    desirable = [draw.random() < 0.5 for _ in range(200)] + [True] * 5 + [False] * 5
    mismatched = [draw.uniform(-3, 9) for _ in ratios]
    logps = judgements(ratios, desirable, mismatched)
    out = KTO(beta=0.2, desirable_weight=1.3, undesirable_weight=0.7)(logps)
    out.losses.sum().backward()
    z = sum(mismatched) / len(mismatched)
    assert z > 0
    expected = [second_kto(r, z, d, 0.2, 1.3 if d else 0.7) for r, d in zip(ratios, desirable, strict=True)]
    got = torch.stack([out.losses, logps.policy.grad], 1)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("field", ["reference", "policy_mismatched", "reference_mismatched"])
def test_missing_field_is_named(field: str):
    logps = replace(judgements([0.0], [True], [0.0]), **{field: None})
    with pytest.raises(ValueError, match=rf"JudgementLogps\.{field} must hold"):
        KTO()(logps)


@pytest.mark.parametrize(
    ("n_desirable", "n_undesirable", "ratio", "expected"),
    [
        (1, 10, 4 / 3, (40 / 3, 1.0)),  # the paper's example: 13.33 to 1
        (1, 10, 1.0, (10.0, 1.0)),
        (10, 1, 1.0, (1.0, 10.0)),
        (10, 1, 4 / 3, (1.0, 7.5)),  # 10 / (7.5 * 1) = 4/3
        (100, 100, 4 / 3, (1.0, 1.0)),
        (4, 3, 1.0, (1.0, 1.0)),  # 4/3 itself is within the interval
        (400, 300, 1.0, (1.0, 1.0)),
        (99, 100, 1.0, (100 / 99, 1.0)),
    ],
)
def test_balanced_weights(n_desirable, n_undesirable, ratio, expected):
    assert balanced_weights(n_desirable, n_undesirable, ratio=ratio) == pytest.approx(expected)


def test_balanced_weights_always_meet_the_rule_and_never_shrink_a_side():
    for n_desirable in range(1, 40):
        for n_undesirable in range(1, 40):
            for ratio in (1.0, 1.2, 4 / 3):
                desirable, undesirable = balanced_weights(n_desirable, n_undesirable, ratio=ratio)
                quotient = desirable * n_desirable / (undesirable * n_undesirable)
                assert 1 - 1e-12 <= quotient <= 4 / 3 + 1e-12
                assert min(desirable, undesirable) == 1
                assert max(desirable, undesirable) >= 1


@pytest.mark.parametrize("counts", [(0, 5), (5, 0), (0, 0), (-1, 3)])
def test_balanced_weights_need_both_labels(counts):
    with pytest.raises(ValueError, match="needs both labels"):
        balanced_weights(*counts)


@pytest.mark.parametrize("ratio", [0.99, 1.5, math.nan])
def test_balanced_weights_refuse_a_ratio_outside_the_interval(ratio):
    with pytest.raises(ValueError, match="ratio must be >= 1 and <= 4/3"):
        balanced_weights(1, 2, ratio=ratio)
