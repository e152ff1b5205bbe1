"""GRPO, DAPO and Dr. GRPO in hand numbers, and the gradient of k3 in the loss."""

import math
from dataclasses import fields, replace

import pytest
import torch

from dpo.losses.grpo import GRPO
from dpo.types import Rollout

SCALARS = ("tokens_per_completion",)
CONSTANTS = ("sampler", "score", "reference", "advantage")
EVERY_AGGREGATION = [
    GRPO(aggregation="sequence", kl_coefficient=0.1),
    GRPO(aggregation="token", kl_coefficient=0.1),
    GRPO(aggregation="constant", kl_coefficient=0.1, max_completion_length=8),
]
every_aggregation = pytest.mark.parametrize("objective", EVERY_AGGREGATION, ids=lambda o: o.aggregation)


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_rollout(lengths=(4, 1, 2, 5, 3, 1), drift=0.3) -> Rollout:
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)

    def noise(scale):
        return scale * torch.randn(mask.shape, generator=draw, dtype=torch.float64) * mask

    sampler = -noise(1).abs()
    return Rollout(
        policy=sampler + noise(drift),
        sampler=sampler,
        completion_mask=mask,
        score=torch.randn(len(lengths), generator=draw, dtype=torch.float64),
        prompt_index=torch.tensor([5, 2, 5, 2, 2, 5]),
        reference=sampler + noise(0.5),
        tokens_per_completion=double(sum(lengths) / len(lengths)),
    )


def each(rollout: Rollout, change) -> Rollout:
    held = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    return replace(rollout, **{k: change(v) for k, v in held.items() if v is not None and k not in SCALARS})


def padded(rollout: Rollout, filler: float) -> Rollout:
    """Write `filler` into the padding that there is, and add three columns of it."""

    def wider(x):
        if x.dim() < 2:
            return x
        if x.dtype == torch.bool:
            return torch.cat([x, x.new_zeros(len(x), 3)], 1)
        return torch.cat([torch.where(rollout.completion_mask, x, filler), x.new_full((len(x), 3), filler)], 1)

    return each(rollout, wider)


def graded() -> Rollout:
    """Prompt 3 has the scores 1, 2, 6, prompt 9 has 4, 4."""
    zeros = double([[0, 0]] * 5)
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True], [True, False]])
    return Rollout(zeros, zeros, mask, double([1, 4, 2, 6, 4]), torch.tensor([3, 9, 3, 3, 9]))


def test_credit_by_hand():
    # Mean 3, unbiased variance (4 + 1 + 9) / 2 = 7; equal scores give 0. The coefficient is of no concern here.
    std = math.sqrt(7) + 1e-4
    expected = double([[-2 / std, -2 / std], [0, 0], [-1 / std, -1 / std], [3 / std, 3 / std], [0, 0]])
    torch.testing.assert_close(GRPO().credit(graded(), 0.7).advantage, expected, rtol=1e-14, atol=0)


def test_credit_without_scaling():
    got = GRPO(scale_by_std=False).credit(graded(), 0.0).advantage
    assert got.tolist() == [[-2, -2], [0, 0], [-1, -1], [3, 3], [0, 0]]


def by_hand() -> Rollout:
    """Token losses with epsilon = 0.2: row 1 -1.2 (clipped from -1.5) and -0.5; row 2 1.6 (from 1.0); row 3 0.9."""
    rows = [[1.5, 0.5, 1], [0.5, 1, 1], [0.9, 1, 1]]
    return Rollout(
        policy=double(rows).log(),
        sampler=double([[0, 0, 0]] * 3),
        completion_mask=torch.tensor([[True, True, False], [True, False, False], [True, False, False]]),
        score=double([5, 7, 9]),
        prompt_index=torch.tensor([0, 0, 0]),
        advantage=double([[1, 1, 0], [-2, 0, 0], [-1, 0, 0]]),
        tokens_per_completion=double(4 / 3),
    )


@pytest.mark.parametrize(
    ("aggregation", "losses"),
    [
        ("sequence", [-1.7 / 2, 1.6, 0.9]),
        ("token", [-1.7 * 3 / 4, 1.6 * 3 / 4, 0.9 * 3 / 4]),  # whose mean is 0.8 / 4, over the four tokens
        ("constant", [-1.7 / 8, 1.6 / 8, 0.9 / 8]),
    ],
)
def test_aggregations_by_hand(aggregation, losses):
    out = GRPO(aggregation=aggregation, max_completion_length=8)(by_hand())
    torch.testing.assert_close(out.losses, double(losses), rtol=1e-12, atol=0)
    assert out.loss.item() == pytest.approx(sum(losses) / 3, rel=1e-12)
    assert out.rewards.tolist() == [5, 7, 9]
    # Metrics are over tokens, whatever the aggregation; 1.5, 0.5 and 0.5 are outside 1 ± 0.2, 0.9 is not.
    k3 = sum(rho - 1 - math.log(rho) for rho in (1.5, 0.5, 0.5, 0.9)) / 4
    expected = {"policy/loss": 0.8 / 4, "policy/approx_kl": k3, "policy/clip_fraction": 3 / 4}
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(expected, rel=1e-12)


def test_the_higher_bound_of_its_own():
    # 1.5 may go up to 1.6: -1.5 in the place of -1.2, and one token less is outside.
    out = GRPO(clip_high=0.6, aggregation="sequence")(by_hand())
    torch.testing.assert_close(out.losses, double([-2 / 2, 1.6, 0.9]), rtol=1e-12, atol=0)
    assert out.metrics["policy/clip_fraction"].item() == pytest.approx(2 / 4)


def test_k3_by_hand():
    # u = pi_ref / pi = 2 at row 1's first token, 1 elsewhere: k3 = 1 - ln 2 there, 0 elsewhere, times 0.04.
    rollout = by_hand()
    reference = rollout.policy.clone()
    reference[0, 0] += math.log(2)
    plain = GRPO(aggregation="sequence")(rollout)
    held = GRPO(aggregation="sequence", kl_coefficient=0.04)(replace(rollout, reference=reference))
    expected = double([0.04 * (1 - math.log(2)) / 2, 0, 0])
    torch.testing.assert_close(held.losses - plain.losses, expected, rtol=1e-11, atol=1e-16)
    assert held.metrics == plain.metrics


def test_k3_in_the_loss_pulls_as_the_forward_kl():
    # Samples in proportion to p = (1/2, 1/4, 1/4), no advantage: d loss / d logit = beta (p - q), which is the gradient
    # of KL(q || p). That of KL(p || q) is p_i (log(p_i / q_i) - KL), another vector.
    p, q = double([0.5, 0.25, 0.25]), double([0.2, 0.3, 0.5])
    action = torch.tensor([0, 0, 1, 2])
    logits = p.log().requires_grad_()
    policy = logits.log_softmax(0)[action].unsqueeze(1)
    zero, mask = torch.zeros_like(policy.detach()), torch.ones(4, 1, dtype=torch.bool)
    reference = q.log()[action].unsqueeze(1)
    rollout = Rollout(policy, policy.detach(), mask, zero[:, 0], torch.zeros(4).long(), reference, advantage=zero)
    GRPO(kl_coefficient=0.1)(rollout).loss.backward()
    torch.testing.assert_close(logits.grad, 0.1 * (p - q), rtol=1e-12, atol=1e-16)


def test_the_reference_is_read_only_where_it_counts():
    assert not GRPO().needs_reference
    assert GRPO(kl_coefficient=0.04).needs_reference
    with pytest.raises(ValueError, match=r"^Rollout\.reference must hold values, .* as GRPO\.needs_reference asks"):
        GRPO(kl_coefficient=0.04)(by_hand())


@every_aggregation
def test_step_0_is_minus_the_mean_advantage(objective):
    # rho = 1 and k3 = 0; "sequence" averages the advantages, which sum to 0 over a prompt.
    rollout = objective.credit(random_rollout(drift=0), 0.0)
    out = objective(replace(rollout, reference=rollout.policy))
    advantage, length = rollout.advantage[:, 0], rollout.completion_mask.sum(1)
    expected = {
        "sequence": -advantage,
        "token": -advantage * length / rollout.tokens_per_completion,
        "constant": -advantage * length / 8,
    }
    torch.testing.assert_close(out.losses, expected[objective.aggregation], rtol=1e-12, atol=0)
    assert objective.aggregation != "sequence" or abs(out.loss.item()) < 1e-14
    assert out.metrics["policy/clip_fraction"] == out.metrics["policy/approx_kl"] == 0


@every_aggregation
def test_micro_batches_weighted_by_their_share_equal_the_batch(objective):
    # They cut through the prompts: once credited, a completion stands alone.
    rollout = objective.credit(random_rollout(), 0.0)
    out = objective(rollout)
    parts = [objective(each(rollout, lambda x, part=part: x[part])) for part in (slice(0, 2), slice(2, 6))]
    total = sum(len(part.losses) / 6 * part.loss for part in parts)
    torch.testing.assert_close(total, out.loss, rtol=1e-12, atol=1e-15)
    for name, metric in out.metrics.items():
        mean = sum(len(part.losses) / 6 * part.metrics[name] for part in parts)
        torch.testing.assert_close(mean, metric, rtol=1e-12, atol=1e-15)


@every_aggregation
@pytest.mark.parametrize("filler", [0.0, 123.0, -1e4])
def test_padding_never_matters(objective, filler):
    rollout = random_rollout()
    credited, wide = objective.credit(rollout, 0.0), objective.credit(padded(rollout, filler), 0.0)
    assert torch.equal(wide.advantage[:, :5], credited.advantage)
    assert not wide.advantage[~wide.completion_mask].any()
    dirty = padded(credited, filler)
    policy = dirty.policy.clone().requires_grad_()
    out, dirty_out = objective(credited), objective(replace(dirty, policy=policy))
    torch.testing.assert_close(dirty_out.losses, out.losses, rtol=1e-12, atol=1e-14)
    for name, metric in out.metrics.items():
        torch.testing.assert_close(dirty_out.metrics[name], metric, rtol=1e-12, atol=1e-14)
    dirty_out.loss.backward()
    assert not policy.grad[~dirty.completion_mask].any()


@every_aggregation
def test_row_order_never_matters(objective):
    rollout, order = random_rollout(), torch.tensor([3, 0, 5, 1, 4, 2])
    straight, moved = (objective.credit(one, 0.0) for one in (rollout, each(rollout, lambda x: x[order])))
    torch.testing.assert_close(moved.advantage, straight.advantage[order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(objective(moved).losses, objective(straight).losses[order], rtol=1e-12, atol=1e-14)


@every_aggregation
def test_gradient_reaches_the_policy_alone(objective):
    def leaves(rollout, names):
        return {name: getattr(rollout, name).detach().clone().requires_grad_() for name in names}

    start = random_rollout()
    credited = objective.credit(replace(start, **leaves(start, CONSTANTS[:3])), 0.0)
    assert not credited.advantage.requires_grad
    everything = leaves(credited, (*CONSTANTS, "policy"))
    objective(replace(credited, **everything)).loss.backward()
    assert [n for n, leaf in everything.items() if leaf.grad is not None and leaf.grad.any()] == ["policy"]


@every_aggregation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1e4, -1e4])
def test_extreme_records_stay_finite(objective, dtype, distance):
    credited = objective.credit(random_rollout(), 0.0)
    far = torch.where(credited.completion_mask, distance * credited.score.sign().unsqueeze(1), 0.0)
    rollout = each(
        replace(credited, policy=credited.sampler + far), lambda x: x.to(dtype) if x.is_floating_point() else x
    )
    rollout = replace(rollout, policy=rollout.policy.requires_grad_())
    out = objective(rollout)
    out.loss.backward()
    assert out.losses.isfinite().all()
    assert out.losses.dtype == dtype
    assert rollout.policy.grad.isfinite().all()
    assert all(metric.isfinite() for metric in out.metrics.values())


def test_a_prompt_with_one_completion_is_refused():
    rollout = replace(random_rollout(), prompt_index=torch.tensor([0, 0, 0, 1, 1, 2]))
    with pytest.raises(ValueError, match=r"^Rollout\.prompt_index: prompt 2 has 1 completion, expected 2 or more"):
        GRPO().credit(rollout, 0.0)


def test_a_missing_advantage_is_named():
    with pytest.raises(ValueError, match=r"^Rollout\.advantage must hold values, got None: .* as GRPO\.credit asks"):
        GRPO()(random_rollout())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl_coefficient", -0.1),
        ("clip", 0),
        ("clip", 1),
        ("clip_high", 0),
        ("max_completion_length", 0),
    ],
)
def test_bad_hyper_parameters_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^GRPO\.{name} must be"):
        GRPO(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("aggregation", "mean"), ("max_completion_length", 2.5)])
def test_a_value_of_the_wrong_kind_is_refused(name, value):
    # Past the annotation, which the test run checks before the class does.
    objective = GRPO()
    object.__setattr__(objective, name, value)
    with pytest.raises(ValueError, match=rf"^GRPO\.{name} must be .*, got"):
        objective.__post_init__()


def test_the_constant_needs_its_length():
    with pytest.raises(ValueError, match=r"^GRPO\.max_completion_length must be set where aggregation is 'constant'"):
        GRPO(aggregation="constant")
