"""The equations of reinforcement learning from sampled completions, one function each.

Tensors over (batch, tokens) hold one completion a row, padded on the right; `mask` is True at sampled tokens, and
nothing outside it is read. Log-probs are in nats.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import relu

from dpo.losses.objective import Number
from dpo.losses.reduce import masked_mean

LARGEST_EXPONENT = 20.0
"""Log of the largest probability ratio; beyond it exponentials go on along their tangent. A ratio of 5e8 is as good as
any more, and its square still fits float32 in a gradient's norm. A clamp would instead drop the gradient of the very
tokens that have moved farthest."""
VARIANCE_FLOOR = 1e-8
"""Variance that counts as none; added before a root is divided by, so that what does not vary stays at 0."""
STD_FLOOR = 1e-4
"""Added to a group's standard deviation before it is divided by, as in the common code of GRPO."""
LARGEST_KL_ERROR = 0.2
"""Bound of the relative distance between KL and target to which the adaptive controller reacts."""


def k1(log_p: Float[Tensor, "*shape"], log_q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return log p - log q of samples of p: unbiased for KL(p || q), of either sign.

    Its own gradient has mean zero on samples of p: it belongs in the reward, not in the loss.
    Paper: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    return log_p - log_q


def k2(log_p: Float[Tensor, "*shape"], log_q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return (log p - log q)² / 2 of samples of p: biased for KL(p || q), but with its gradient.

    Paper: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    return (log_p - log_q) ** 2 / 2


def k3(log_p: Float[Tensor, "*shape"], log_q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return q/p - 1 - log(q/p) of samples of p: unbiased for KL(p || q) and never negative.

    Its gradient is that of KL(q || p). Where q/p is beyond e^20 the exponential is continued along its tangent.
    Paper: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    x = log_q - log_p
    return torch.expm1(x.clamp(max=LARGEST_EXPONENT)) + _tangent(x) - x


def probability_ratio(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ρ = e^log_ratio, continued along its tangent beyond e^20: it and its gradient are finite anywhere."""
    return torch.exp(log_ratio.clamp(max=LARGEST_EXPONENT)) + _tangent(log_ratio)


def shaped_rewards(
    score: Float[Tensor, " batch"],
    kl: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    kl_coefficient: Number,
) -> Float[Tensor, "batch tokens"]:
    """Return R_t = -kl_coefficient kl_t + [t is the last sampled token] score; 0 outside the mask.

    Paper: arXiv:1909.08593, eq. 2.
    Differs: the paper's reward is one sum over the completion; here each token has its part of the KL.
    """
    position = torch.arange(mask.shape[1], device=mask.device)
    last = position == mask.sum(1, keepdim=True) - 1
    return torch.where(last, score.unsqueeze(1), 0.0) - torch.where(mask, kl_coefficient * kl, 0.0)


def gae(
    rewards: Float[Tensor, "batch tokens"],
    values: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    *,
    gamma: Number,
    gae_lambda: Number,
) -> Float[Tensor, "batch tokens"]:
    """Return generalised advantages: A_t = δ_t + γλ A_{t+1},  δ_t = R_t + γ V_{t+1} - V_t; 0 outside the mask.

    After the last sampled token V and A are 0.
    Paper: arXiv:1506.02438, eq. 16.
    """
    rewards, values = (torch.where(mask, x, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * gae_lambda * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages


def whitened(
    values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], *, shift_mean: bool = True
) -> Float[Tensor, "batch tokens"]:
    """Return (x - mean) / sqrt(var + 1e-8) over the sampled tokens, plus the mean where it is not to shift.

    Paper: arXiv:1909.08593, in its authors' code.
    Differs: the variance is the biased one, as in that code; some trainers take the unbiased one.
    """
    values = torch.where(mask, values, 0.0)
    mean = masked_mean(values, mask)
    scaled = (values - mean) * torch.rsqrt(masked_variance(values, mask) + VARIANCE_FLOOR)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0)


def leave_one_out(reward: Float[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return A_i = R_i - mean of R_j over the other completions of the same prompt.

    Paper: arXiv:2402.14740.

    Raises:
        ValueError: a prompt has one completion only.
    """
    total, size = _differences(reward, prompt_index)
    return total / (size - 1)


def group_centred(reward: Float[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return A_i = R_i - mean of R over all completions of the same prompt; exactly 0 where all are equal.

    Paper: arXiv:2503.20783.

    Raises:
        ValueError: a prompt has one completion only.
    """
    total, size = _differences(reward, prompt_index)
    return total / size


def group_normalised(reward: Float[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return A_i = (R_i - mean) / (std + 1e-4) over the completions of the same prompt, std unbiased.

    Paper: arXiv:2402.03300, section 4.1.2.

    Raises:
        ValueError: a prompt has one completion only.
    """
    centred = group_centred(reward, prompt_index)
    same = prompt_index.unsqueeze(1) == prompt_index
    variance = torch.where(same, centred**2, 0.0).sum(1) / (same.sum(1) - 1)
    return centred / (variance.sqrt() + STD_FLOOR)


def adapted_coefficient(coefficient: Number, kl: Number, completions: int, *, target: Number, horizon: Number) -> float:
    """Return β (1 + e n / horizon),  e = clip(kl / target - 1, ±0.2), n completions.

    Paper: arXiv:1909.08593, section 2.2.
    Differs: n / horizon is written out, as in the authors' code; the paper has a constant of 0.1 for it.

    Raises:
        ValueError: the completions are so many that the coefficient could reach 0, where it would stay.
    """
    if LARGEST_KL_ERROR * completions >= horizon:
        raise ValueError(
            f"kl_horizon must be above {LARGEST_KL_ERROR:g} times the {completions} completions of a rollout, got "
            f"{horizon!r}: the KL coefficient could reach 0. Raise kl_horizon or sample fewer completions a rollout."
        )
    error = min(max(kl / target - 1, -LARGEST_KL_ERROR), LARGEST_KL_ERROR)
    return coefficient * (1 + error * completions / horizon)


def clipped_policy_loss(
    log_ratio: Float[Tensor, "*shape"], advantage: Float[Tensor, "*shape"], *, low: Number, high: Number
) -> Float[Tensor, "*shape"]:
    """Return max(-A ρ, -A clip(ρ, 1 - low, 1 + high)),  ρ = e^log_ratio.

    There is no gradient where ρ has already left the range in the direction that A asks for.
    Paper: arXiv:1707.06347, eq. 7; arXiv:2503.14476 for a bound of its own above.
    """
    ratio = probability_ratio(log_ratio)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def clipped_share(log_ratio: Float[Tensor, "*shape"], *, low: Number, high: Number) -> Float[Tensor, "*shape"]:
    """Return 1 where ρ = e^log_ratio lies outside [1 - low, 1 + high], else 0; without gradient."""
    ratio = probability_ratio(log_ratio.detach())
    return ((ratio < 1 - low) | (ratio > 1 + high)).to(ratio.dtype)


def clipped_value_loss(
    value: Float[Tensor, "*shape"],
    sampler_value: Float[Tensor, "*shape"],
    target: Float[Tensor, "*shape"],
    *,
    clip: Number,
) -> Float[Tensor, "*shape"]:
    """Return max((V - G)², (V_s + clip(V - V_s, ±clip) - G)²) / 2 for the target G and the value V_s at sampling.

    Paper: arXiv:1909.08593, in its authors' code.
    """
    bounded = sampler_value + (value - sampler_value).clamp(-clip, clip)
    return torch.maximum((value - target) ** 2, (bounded - target) ** 2) / 2


def masked_variance(values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
    """Return the (biased) variance over the tokens where `mask` is True."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def explained_variance(
    value: Float[Tensor, "batch tokens"], target: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Return 1 - Var(target - value) / Var(target) over the sampled tokens, and 0 where Var(target) is 1e-8 or less."""
    total = masked_variance(target, mask)
    share = 1 - masked_variance(target - value, mask) / total.clamp(min=VARIANCE_FLOOR)
    return torch.where(total > VARIANCE_FLOOR, share, 0.0)


def _tangent(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return what the tangent of e^x at x = 20 rises by, from there on."""
    return math.exp(LARGEST_EXPONENT) * relu(x - LARGEST_EXPONENT)


def _differences(
    reward: Float[Tensor, " batch"], prompt_index: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Return Σ_j (R_i - R_j) over the completions of i's prompt, and their number.

    A sum of differences, not the difference to a rounded mean: equal rewards then give exactly 0.
    """
    same = prompt_index.unsqueeze(1) == prompt_index
    size = same.sum(1)
    if bool((size < 2).any()):
        prompt = int(prompt_index[int((size < 2).nonzero()[0])])
        raise ValueError(
            f"Rollout.prompt_index: prompt {prompt} has 1 completion, expected 2 or more to compare with each other: "
            "sample several completions of each prompt, or train with PPO, whose baseline is its value role."
        )
    return torch.where(same, reward.unsqueeze(1) - reward, 0.0).sum(1), size
