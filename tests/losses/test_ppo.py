"""PPO in hand numbers, in closed form at step 0, and against the exact policy gradient of a tabular policy."""

import math
from dataclasses import fields, replace
from itertools import product

import pytest
import torch

from dpo.losses.ppo import PPO
from dpo.types import Rollout

PLAIN = PPO(kl_coefficient=0.5, gae_lambda=0.5, whiten_advantages=False)
SCALARS = ("tokens_per_completion",)
SAMPLED = ("sampler", "score", "reference", "sampler_value")
CREDITED = ("advantage", "value_target")
TRAINED = ("policy", "value", "demonstration")


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def by_hand() -> Rollout:
    """Two completions of 3 tokens and 1 token."""
    return Rollout(
        policy=double([[-1, -2, -1], [-3, 0, 0]]),
        sampler=double([[-1, -2, -1], [-3, 0, 0]]),
        completion_mask=torch.tensor([[True, True, True], [True, False, False]]),
        score=double([2, -1]),
        prompt_index=torch.tensor([0, 1]),
        reference=double([[-2, -1, -1], [-3.5, 0, 0]]),
        value=double([[0.5, 1, 0.5], [-1, 0, 0]]),
        sampler_value=double([[0.5, 1, 0.5], [-1, 0, 0]]),
    )


def random_rollout(lengths=(4, 1, 2, 5, 3, 1), seed=0, drift=0.3, tokens=None) -> Rollout:
    """Policy, reference and value are `drift` from those at sampling; the mean length, 16 / 6, is that of the step."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(tokens or max(lengths)) < torch.tensor(lengths).unsqueeze(1)

    def noise(scale):
        wide = torch.randn(len(lengths), 9, generator=draw, dtype=torch.float64)[:, : mask.shape[1]]
        return scale * torch.cat([wide, wide.new_zeros(len(lengths), mask.shape[1] - wide.shape[1])], 1) * mask

    sampler, value = -noise(1).abs(), noise(1)
    return Rollout(
        policy=sampler + noise(drift),
        sampler=sampler,
        completion_mask=mask,
        score=torch.randn(len(lengths), generator=draw, dtype=torch.float64),
        prompt_index=torch.arange(len(lengths)) // 2,
        reference=sampler + noise(0.5),
        value=value + noise(drift),
        sampler_value=value,
        tokens_per_completion=double(sum(lengths) / len(lengths)),
        demonstration=-10 * torch.rand(len(lengths), generator=draw, dtype=torch.float64),
        demonstration_length=torch.arange(1, len(lengths) + 1),
    )


def each(rollout: Rollout, change, skip=SCALARS) -> Rollout:
    held = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    return replace(rollout, **{k: change(v) for k, v in held.items() if v is not None and k not in skip})


def padded(rollout: Rollout, amount: int, filler: float) -> Rollout:
    """Write `filler` into the padding that there is, and add as many columns of it."""
    mask = rollout.completion_mask

    def wider(x):
        if x.dim() < 2:
            return x
        if x.dtype == torch.bool:
            return torch.cat([x, x.new_zeros(len(x), amount)], 1)
        return torch.cat([torch.where(mask, x, filler), x.new_full((len(x), amount), filler)], 1)

    return each(rollout, wider)


def test_credit_by_hand():
    # beta = 1/2, gamma = 1, lambda = 1/2. Row 1: k1 = (1, -1, 0), R = (-1/2, 1/2, 2), V = (1/2, 1, 1/2):
    # delta = (-1/2 + 1 - 1/2, 1/2 + 1/2 - 1, 2 - 1/2) = (0, 0, 3/2),  A = (3/8, 3/4, 3/2),  A + V = (7/8, 7/4, 2).
    # Row 2: k1 = 1/2, R = -1/4 - 1, V = -1:  A = -1/4,  A + V = -5/4.
    got = PLAIN.credit(by_hand(), 0.5)
    assert got.advantage.tolist() == [[3 / 8, 3 / 4, 3 / 2], [-1 / 4, 0, 0]]
    assert got.value_target.tolist() == [[7 / 8, 7 / 4, 2], [-5 / 4, 0, 0]]


def test_credit_takes_the_coefficient_it_is_given():
    # beta = 0: R = (0, 0, 2), delta = (1/2, -1/2, 3/2), A = (1/2 + 1/8, -1/2 + 3/4, 3/2); row 2: -1 - (-1) = 0.
    got = PLAIN.credit(by_hand(), 0.0)
    assert got.advantage.tolist() == [[5 / 8, 1 / 4, 3 / 2], [0, 0, 0]]


def test_whitened_advantages_leave_the_targets():
    # A = 3/8, 3/4, 3/2, -1/4: mean 19/32, biased variance the mean square less the mean's.
    plain = PLAIN.credit(by_hand(), 0.5)
    white = PPO(kl_coefficient=0.5, gae_lambda=0.5).credit(by_hand(), 0.5)
    values = [3 / 8, 3 / 4, 3 / 2, -1 / 4]
    mean, square = sum(values) / 4, sum(v * v for v in values) / 4
    scale = math.sqrt(square - mean**2 + 1e-8)
    mask = white.completion_mask
    torch.testing.assert_close(white.advantage[mask], double([(v - mean) / scale for v in values]))
    assert white.advantage[~mask].tolist() == [0, 0]
    assert torch.equal(white.value_target, plain.value_target)


def test_whitened_rewards_keep_their_mean():
    # One completion, R = (0, 3), V = 0: mean 3/2, deviation 3/2, so R becomes (1/2, 5/2), and with gamma = lambda = 1
    # A = (3, 5/2).
    zeros = double([[0, 0]])
    mask = torch.tensor([[True, True]])
    rollout = Rollout(zeros, zeros, mask, double([3]), torch.tensor([0]), zeros, zeros, zeros)
    got = PPO(gae_lambda=1, whiten_rewards=True, whiten_advantages=False).credit(rollout, 0.05)
    torch.testing.assert_close(got.advantage, double([[3, 2.5]]), rtol=1e-8, atol=0)
    plain = PPO(gae_lambda=1, whiten_advantages=False).credit(rollout, 0.05)
    assert plain.advantage.tolist() == [[3, 3]]


def test_loss_by_hand():
    # epsilon = epsilon_v = 0.2, lengths 2 and 1 of a step's mean length 3/2.
    # Row 1: rho = (1.5, 0.5), A = (1, -1): max(-1.5, -1.2) = -1.2 and max(0.5, 0.8) = 0.8, both clipped;
    #   V = (1, 0.1), V_s = 0, G = (1, 1): clipped to 0.2: 0.8^2 / 2 = 0.32; 0.9^2 / 2 = 0.405.
    # Row 2: rho = 1.1, A = 2: -2.2;  V = 0.1, G = -1: 1.1^2 / 2 = 0.605.
    # loss 1 = (-0.4 + 0.1 * 0.725) / 1.5,  loss 2 = (-2.2 + 0.1 * 0.605) / 1.5.
    rollout = Rollout(
        policy=double([[math.log(1.5), math.log(0.5)], [math.log(1.1), 0]]),
        sampler=double([[0, 0], [0, 0]]),
        completion_mask=torch.tensor([[True, True], [True, False]]),
        score=double([5, 7]),
        prompt_index=torch.tensor([0, 1]),
        value=double([[1, 0.1], [0.1, 0]]),
        sampler_value=double([[0, 0], [0, 0]]),
        advantage=double([[1, -1], [2, 0]]),
        value_target=double([[1, 1], [-1, 0]]),
        tokens_per_completion=double(1.5),
    )
    out = PPO()(rollout)
    torch.testing.assert_close(out.losses, double([-0.3275 / 1.5, -2.1395 / 1.5]), rtol=1e-12, atol=0)
    assert out.loss.item() == pytest.approx(-2.467 / 3, rel=1e-12)
    assert out.rewards.tolist() == [5, 7]
    # k3 per token: rho - 1 - log rho; of 3 tokens 2 left the range; 1 value of 3 moved by more than 0.2.
    k3 = sum(rho - 1 - math.log(rho) for rho in (1.5, 0.5, 1.1)) / 3
    # G = 1, 1, -1: variance 8/9. G - V = 0, 0.9, -1.1: mean -1/15, variance 2.02 / 3 - 1 / 225 = 0.668888...
    explained = 1 - (2.02 / 3 - 1 / 225) / (8 / 9)
    expected = {
        "policy/loss": -2.6 / 3,
        "policy/approx_kl": k3,
        "policy/clip_fraction": 2 / 3,
        "value/loss": 1.33 / 3,
        "value/clip_fraction": 1 / 3,
        "value/explained_variance": explained,
    }
    assert {name: value.item() for name, value in out.metrics.items()} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("whiten", [False, True])
def test_step_0_is_minus_the_mean_advantage(whiten):
    # rho = 1, V = V_s, G - V = A before whitening: -mean A + 0.1 mean A^2 / 2, over the 16 tokens.
    start = random_rollout(drift=0)
    mask = start.completion_mask
    before = PPO(whiten_advantages=False).credit(start, 0.05).advantage[mask]
    objective = PPO(whiten_advantages=whiten)
    out = objective(objective.credit(start, 0.05))
    mean = 0 if whiten else before.mean()
    torch.testing.assert_close(out.loss, 0.1 * (before**2).mean() / 2 - mean, rtol=1e-12, atol=1e-14)
    assert out.metrics["policy/clip_fraction"] == out.metrics["policy/approx_kl"] == 0


def test_demonstrations_by_hand():
    # NLL a token: 6 / 3 = 2 and 10 / 4 = 2.5, times 27.8; nothing else changes.
    rollout = PLAIN.credit(by_hand(), 0.5)
    rollout = replace(rollout, demonstration=double([-6, -10]), demonstration_length=torch.tensor([3, 4]))
    plain, mixed = PPO()(rollout), PPO(ptx_coefficient=27.8)(rollout)
    torch.testing.assert_close(mixed.losses - plain.losses, double([27.8 * 2, 27.8 * 2.5]), rtol=1e-12, atol=0)
    assert mixed.metrics["ptx/loss"].item() == 2.25
    assert set(mixed.metrics) - set(plain.metrics) == {"ptx/loss"}
    assert (PPO().needs_demonstrations, PPO(ptx_coefficient=1).needs_demonstrations) == (False, True)


def test_gradient_reaches_policy_value_and_demonstrations_alone():
    def leaves(rollout, names):
        return {name: getattr(rollout, name).detach().clone().requires_grad_() for name in names}

    objective, start = PPO(ptx_coefficient=1), random_rollout()
    credited = objective.credit(replace(start, **leaves(start, SAMPLED)), 0.05)
    assert not credited.advantage.requires_grad
    assert not credited.value_target.requires_grad
    everything = leaves(credited, (*SAMPLED, *CREDITED, *TRAINED))
    objective(replace(credited, **everything)).loss.backward()
    assert {name for name, leaf in everything.items() if leaf.grad is not None and leaf.grad.any()} == set(TRAINED)


@pytest.mark.parametrize("filler", [0.0, 123.0, -1e4])
def test_padding_never_matters(filler):
    objective = PPO(ptx_coefficient=1, whiten_rewards=True)
    rollout = random_rollout()
    wide = padded(rollout, 3, filler)
    credited, wide_credited = objective.credit(rollout, 0.05), objective.credit(wide, 0.05)
    mask = rollout.completion_mask
    for name in ("advantage", "value_target"):
        got = getattr(wide_credited, name)
        torch.testing.assert_close(got[:, : mask.shape[1]], getattr(credited, name), rtol=1e-12, atol=1e-14)
        assert not got[~wide_credited.completion_mask].any()
    dirty = padded(credited, 3, filler)
    policy = dirty.policy.clone().requires_grad_()
    value = dirty.value.clone().requires_grad_()
    out, dirty_out = objective(credited), objective(replace(dirty, policy=policy, value=value))
    torch.testing.assert_close(dirty_out.losses, out.losses, rtol=1e-12, atol=1e-14)
    for name, metric in out.metrics.items():
        torch.testing.assert_close(dirty_out.metrics[name], metric, rtol=1e-12, atol=1e-14)
    dirty_out.loss.backward()
    assert not policy.grad[~dirty.completion_mask].any()
    assert not value.grad[~dirty.completion_mask].any()


def test_row_order_never_matters():
    objective = PPO(ptx_coefficient=1, whiten_rewards=True)
    rollout, order = random_rollout(), torch.tensor([3, 0, 5, 1, 4, 2])
    straight = objective.credit(rollout, 0.05)
    moved = objective.credit(each(rollout, lambda x: x[order]), 0.05)
    torch.testing.assert_close(moved.advantage, straight.advantage[order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moved.value_target, straight.value_target[order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(objective(moved).losses, objective(straight).losses[order], rtol=1e-12, atol=1e-14)


def test_micro_batches_weighted_by_their_share_equal_the_batch():
    objective = PPO(ptx_coefficient=1)
    rollout = objective.credit(random_rollout(), 0.05)
    out = objective(rollout)
    # Uneven in completions and in tokens: 4 + 1 tokens, then 2 + 5 + 3 + 1.
    parts = [objective(each(rollout, lambda x, part=part: x[part])) for part in (slice(0, 2), slice(2, 6))]
    total = sum(len(part.losses) / 6 * part.loss for part in parts)
    torch.testing.assert_close(total, out.loss, rtol=1e-12, atol=0)
    for name in set(out.metrics) - {"value/explained_variance"}:
        mean = sum(len(part.losses) / 6 * part.metrics[name] for part in parts)
        torch.testing.assert_close(mean, out.metrics[name], rtol=1e-12, atol=1e-15)


def test_gradient_is_that_of_the_expected_reward_less_the_kl():
    # All four completions of two tokens of a tabular policy, each weighed by its probability. With gamma = lambda = 1
    # the credit is reward to go less a baseline, and the expected gradient that of E[score] - beta KL(policy ||
    # reference), whatever the values are. The mean over tokens divides by the length, 2.
    draw = torch.Generator().manual_seed(0)

    def table():
        return [torch.randn(2, 2, generator=draw, dtype=torch.float64) for _ in range(2)]

    sequences = list(product((0, 1), (0, 1)))

    def logps(logits):
        first, second = logits[0][0].log_softmax(0), logits[1].log_softmax(1)
        return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in sequences])

    policy, reference, values = table(), logps(table()), table()
    for leaf in policy:
        leaf.requires_grad_()
    score = torch.randn(4, generator=draw, dtype=torch.float64)
    logp = logps(policy)
    expected = (logp.sum(1).exp() * (score - 0.3 * (logp - reference).sum(1))).sum()
    exact = torch.autograd.grad(expected, policy, allow_unused=True)

    logp = logps(policy)
    value = torch.stack([torch.stack([values[0][0, 0], values[1][a, 0]]) for a, _ in sequences])
    rollout = Rollout(
        logp, logp.detach(), torch.ones(4, 2, dtype=torch.bool), score, torch.arange(4), reference, value, value
    )
    objective = PPO(kl_coefficient=0.3, gae_lambda=1, whiten_advantages=False, value_coefficient=0)
    losses = objective(objective.credit(rollout, 0.3)).losses
    (logp.detach().sum(1).exp() * losses).sum().backward()
    for leaf, gradient in zip(policy, exact, strict=True):
        torch.testing.assert_close(-2 * leaf.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_records_stay_finite(dtype):
    objective = PPO()
    credited = objective.credit(random_rollout(), 0.05)
    far = torch.where(credited.completion_mask, 1e4 * credited.policy.sin().sign(), 0.0)
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


@pytest.mark.parametrize(("name", "need"), [("reference", "needs_reference"), ("sampler_value", "needs_values")])
def test_a_field_that_credit_misses_is_named(name, need):
    message = rf"^Rollout\.{name} must hold values, got None: score the batch as PPO\.{need} asks"
    with pytest.raises(ValueError, match=message):
        PPO().credit(replace(random_rollout(), **{name: None}), 0.05)


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("value", "needs_values"),
        ("sampler_value", "needs_values"),
        ("advantage", "credit"),
        ("value_target", "credit"),
        ("demonstration", "needs_demonstrations"),
        ("demonstration_length", "needs_demonstrations"),
    ],
)
def test_a_field_that_the_loss_misses_is_named(name, need):
    objective = PPO(ptx_coefficient=1)
    rollout = replace(objective.credit(random_rollout(), 0.05), **{name: None})
    message = rf"^Rollout\.{name} must hold values, got None: score the batch as PPO\.{need} asks"
    with pytest.raises(ValueError, match=message):
        objective(rollout)


def test_the_coefficient_follows_the_kl_only_where_there_is_a_target():
    # 0.2 (1 + 0.2 * 500 / 1000), the KL being far above its target; fixed without one.
    assert PPO(kl_target=6, kl_horizon=1000).next_kl_coefficient(0.2, 60.0, 500) == pytest.approx(0.22)
    assert PPO().next_kl_coefficient(0.2, 60.0, 500) == 0.2


BAD = {
    "kl_coefficient": [-0.1, math.nan, True],
    "kl_target": [0, -6],
    "kl_horizon": [0],
    "gamma": [-0.1, 1.1],
    "gae_lambda": [-0.1, 1.1],
    "clip": [0, 1],
    "value_clip": [0],
    "value_coefficient": [-1],
    "ptx_coefficient": [-1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_hyper_parameters_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^PPO\.{name} must be"):
        PPO(**{name: value})


def test_a_target_needs_a_coefficient_to_multiply():
    with pytest.raises(ValueError, match=r"^PPO\.kl_coefficient must be > 0 where kl_target is set, got 0: "):
        PPO(kl_coefficient=0, kl_target=6)
