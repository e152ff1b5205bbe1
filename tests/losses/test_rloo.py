"""RLOO in hand numbers, and against the exact policy gradient of a tabular policy."""

import math
from dataclasses import fields, replace
from itertools import product

import pytest
import torch

from dpo.losses.rloo import RLOO
from dpo.types import Rollout

SCALARS = ("tokens_per_completion",)
CONSTANTS = ("sampler", "score", "reference", "advantage")


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_rollout(lengths=(4, 1, 2, 5, 3, 1), drift=0.1) -> Rollout:
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


def test_credit_by_hand():
    # beta = 1/2. Sequence KLs 1 + 1, 2, -2, 0; R = 4 - 1, 1 - 1, 0 + 1, 9.
    # Prompt 8 has R = 3, 0: A = 3, -3. Prompt 1 has R = 1, 9: A = -8, 8.
    rollout = Rollout(
        policy=double([[0, 0], [0, 0], [0, 0], [0, 0]]),
        sampler=double([[-1, -1], [-1, 0], [-3, 0], [-1, -2]]),
        completion_mask=torch.tensor([[True, True], [True, False], [True, False], [True, True]]),
        score=double([4, 0 + 1, 0, 9]),
        prompt_index=torch.tensor([8, 8, 1, 1]),
        reference=double([[-2, -2], [-3, 7], [-1, 7], [-2, -1]]),
    )
    assert RLOO().credit(rollout, 0.5).advantage.tolist() == [[3, 3], [-3, 0], [-8, 0], [8, 8]]
    # beta = 0: the scores alone, 4 against 1 and 0 against 9.
    assert RLOO().credit(rollout, 0.0).advantage.tolist() == [[3, 3], [-3, 0], [-9, 0], [9, 9]]


def test_loss_by_hand():
    # rho is the product over tokens: 1.1 * 1.2 = 1.32 and 0.5. A = 2: max(-2.64, -2.4); A = -1: max(0.5, 0.8).
    # Token by token no ratio of row 1 would be clipped. Row 3: rho = 1.1, A = 1.
    rollout = Rollout(
        policy=double([[math.log(1.1), math.log(1.2)], [math.log(0.5), 0], [math.log(1.1), 0]]),
        sampler=double([[0, 0], [0, 0], [0, 0]]),
        completion_mask=torch.tensor([[True, True], [True, False], [True, False]]),
        score=double([5, 7, 9]),
        prompt_index=torch.tensor([0, 0, 1]),
        advantage=double([[2, 2], [-1, 0], [1, 0]]),
        tokens_per_completion=double(4 / 3),
    )
    policy = rollout.policy.clone().requires_grad_()
    out = RLOO()(replace(rollout, policy=policy))
    out.loss.backward()
    torch.testing.assert_close(out.losses, double([-2.4, 0.8, -1.1]), rtol=1e-12, atol=0)
    torch.testing.assert_close(policy.grad, double([[0, 0], [0, 0], [-1.1 / 3, 0]]), rtol=1e-12, atol=0)
    assert out.rewards.tolist() == [5, 7, 9]
    k3 = sum(rho - 1 - math.log(rho) for rho in (1.1, 1.2, 0.5, 1.1)) / 4
    expected = {"policy/loss": -0.9, "policy/approx_kl": k3, "policy/clip_fraction": 2 / 3}
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(expected, rel=1e-12)


def test_step_0_is_minus_the_mean_advantage():
    # rho = 1: minus the advantage each; the advantages of a prompt sum to 0.
    rollout = RLOO().credit(random_rollout(drift=0), 0.05)
    out = RLOO()(rollout)
    assert torch.equal(out.losses, -rollout.advantage[:, 0])
    assert abs(out.loss.item()) < 1e-14
    assert out.metrics["policy/clip_fraction"] == out.metrics["policy/approx_kl"] == 0


def test_gradient_reaches_the_policy_alone():
    def leaves(rollout, names):
        return {name: getattr(rollout, name).detach().clone().requires_grad_() for name in names}

    start = random_rollout()
    credited = RLOO().credit(replace(start, **leaves(start, CONSTANTS[:3])), 0.05)
    assert not credited.advantage.requires_grad
    everything = leaves(credited, (*CONSTANTS, "policy"))
    RLOO()(replace(credited, **everything)).loss.backward()
    assert [n for n, leaf in everything.items() if leaf.grad is not None and leaf.grad.any()] == ["policy"]


@pytest.mark.parametrize("filler", [0.0, 123.0, -1e4])
def test_padding_never_matters(filler):
    rollout = random_rollout()
    credited, wide = RLOO().credit(rollout, 0.05), RLOO().credit(padded(rollout, filler), 0.05)
    torch.testing.assert_close(wide.advantage[:, :5], credited.advantage, rtol=1e-12, atol=1e-14)
    assert not wide.advantage[~wide.completion_mask].any()
    dirty = padded(credited, filler)
    policy = dirty.policy.clone().requires_grad_()
    out, dirty_out = RLOO()(credited), RLOO()(replace(dirty, policy=policy))
    torch.testing.assert_close(dirty_out.losses, out.losses, rtol=1e-12, atol=1e-14)
    for name, metric in out.metrics.items():
        torch.testing.assert_close(dirty_out.metrics[name], metric, rtol=1e-12, atol=1e-14)
    dirty_out.loss.backward()
    assert not policy.grad[~dirty.completion_mask].any()


def test_row_order_never_matters():
    rollout, order = random_rollout(), torch.tensor([3, 0, 5, 1, 4, 2])
    straight, moved = (RLOO().credit(one, 0.05) for one in (rollout, each(rollout, lambda x: x[order])))
    torch.testing.assert_close(moved.advantage, straight.advantage[order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(RLOO()(moved).losses, RLOO()(straight).losses[order], rtol=1e-12, atol=1e-14)


def test_micro_batches_weighted_by_their_share_equal_the_batch():
    # They cut through the prompts: once credited, a completion stands alone.
    rollout = RLOO().credit(random_rollout(), 0.05)
    out = RLOO()(rollout)
    parts = [RLOO()(each(rollout, lambda x, part=part: x[part])) for part in (slice(0, 2), slice(2, 6))]
    total = sum(len(part.losses) / 6 * part.loss for part in parts)
    torch.testing.assert_close(total, out.loss, rtol=1e-12, atol=1e-15)
    for name, metric in out.metrics.items():
        mean = sum(len(part.losses) / 6 * part.metrics[name] for part in parts)
        torch.testing.assert_close(mean, metric, rtol=1e-12, atol=1e-15)


def test_gradient_is_that_of_the_expected_reward_less_the_kl():
    # All pairs of the four completions of two tokens of a tabular policy, each pair weighed by its probability: the
    # expected gradient is exactly that of E[score] - beta KL(policy || reference).
    draw = torch.Generator().manual_seed(0)

    def table():
        return [torch.randn(n, 2, generator=draw, dtype=torch.float64) for n in (1, 2)]

    def logps(logits):
        first, second = logits[0][0].log_softmax(0), logits[1].log_softmax(1)
        return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in product((0, 1), (0, 1))])

    policy, reference = [logits.requires_grad_() for logits in table()], logps(table())
    score = torch.randn(4, generator=draw, dtype=torch.float64)
    logp = logps(policy)
    expected = (logp.sum(1).exp() * (score - 0.3 * (logp - reference).sum(1))).sum()
    exact = torch.autograd.grad(expected, policy)

    rows = torch.tensor([row for pair in product(range(4), range(4)) for row in pair])
    logp = logps(policy)
    mask, prompt = torch.ones(32, 2, dtype=torch.bool), torch.arange(32) // 2
    rollout = Rollout(logp[rows], logp[rows].detach(), mask, score[rows], prompt, reference[rows])
    losses = RLOO()(RLOO().credit(rollout, 0.3)).losses.view(16, 2).mean(1)
    probability = logp.detach()[rows].sum(1).exp().view(16, 2).prod(1)
    (probability * losses).sum().backward()
    for leaf, gradient in zip(policy, exact, strict=True):
        torch.testing.assert_close(-leaf.grad, gradient, rtol=1e-10, atol=1e-12)


def test_a_prompt_with_one_completion_is_refused():
    rollout = replace(random_rollout(), prompt_index=torch.tensor([0, 0, 0, 1, 1, 2]))
    message = r"^Rollout\.prompt_index: prompt 2 has 1 completion, expected 2 or more .*: sample several completions"
    with pytest.raises(ValueError, match=message):
        RLOO().credit(rollout, 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_records_stay_finite(dtype):
    credited = RLOO().credit(random_rollout(), 0.05)
    far = torch.where(credited.completion_mask, 1e4 * credited.score.sign().unsqueeze(1), 0.0)
    rollout = each(
        replace(credited, policy=credited.sampler + far), lambda x: x.to(dtype) if x.is_floating_point() else x
    )
    rollout = replace(rollout, policy=rollout.policy.requires_grad_())
    out = RLOO()(rollout)
    out.loss.backward()
    assert out.losses.isfinite().all()
    assert out.losses.dtype == dtype
    assert rollout.policy.grad.isfinite().all()
    assert all(metric.isfinite() for metric in out.metrics.values())


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"^Rollout\.advantage must hold values, got None: .* as RLOO\.credit asks"):
        RLOO()(random_rollout())
    with pytest.raises(ValueError, match=r"^Rollout\.reference must hold values, .* as RLOO\.needs_reference asks"):
        RLOO().credit(replace(random_rollout(), reference=None), 0.05)


@pytest.mark.parametrize(
    ("name", "value"), [("kl_coefficient", -0.1), ("kl_coefficient", math.inf), ("clip", 0), ("clip", 1)]
)
def test_bad_hyper_parameters_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^RLOO\.{name} must be"):
        RLOO(**{name: value})
