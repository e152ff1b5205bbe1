"""Proximal policy optimisation of a reward with a KL penalty, as in reinforcement learning from human feedback."""

from dataclasses import dataclass, field, replace
from typing import final

import torch

from dpo.losses.credit import (
    adapted_coefficient,
    clipped_policy_loss,
    clipped_share,
    clipped_value_loss,
    explained_variance,
    gae,
    k1,
    k3,
    shaped_rewards,
    whitened,
)
from dpo.losses.objective import AdaptsKL, Number, RolloutObjective, require_flag, require_number
from dpo.losses.reduce import require_field, rollout_output, token_mean
from dpo.types import LossOutput, Rollout


@final
@dataclass(frozen=True, kw_only=True)
class PPO(RolloutObjective, AdaptsKL):
    """Policy gradient in small steps: each token's credit is what followed it, less what a value role expected.

    R_t = -β (log π_s(y_t) - log π_ref(y_t)) + [t = T] score,  δ_t = R_t + γ V_s,t+1 - V_s,t,  A_t = δ_t + γλ A_t+1,
    target G_t = A_t + V_s,t, where s is the policy (and its value role) at sampling, T the last sampled token, and
    V and A are 0 after it; then A is whitened over the rollout.
    loss = mean_t max(-A ρ, -A clip(ρ, 1 ± ε)) + c_v mean_t max((V - G)², (V_s + clip(V - V_s, ±ε_v) - G)²) / 2
    + c_ptx mean NLL per token of demonstrations,  ρ = π(y_t) / π_s(y_t), both means over the tokens of the step.
    Where policy and value equal those at sampling, the loss is minus the mean advantage (0 where whitened) plus
    c_v mean_t A² / 2, with the A before whitening.

    Paper: arXiv:1707.06347, eq. 7.
    Differs: the KL in the reward and its controller are arXiv:1909.08593's, the demonstrations arXiv:2203.02155's
    (PPO-ptx), where each half is a mean over its own batch. The score stands at the last sampled token; some code puts
    it on the slot after, whose value the last token then sees through λ. Advantages (and rewards, where asked) are
    whitened over the whole rollout with the biased variance; some code does so per mini-batch, or unbiased. Beyond
    ρ = e^20 the exponential is continued along its tangent, so that losses and gradients stay finite.
    """

    kl_coefficient: Number = 0.05
    """β, reward lost per nat of KL(policy || reference) (>= 0): larger keeps the policy closer to the reference."""
    kl_target: Number | None = None
    """KL to the reference in nats a completion (> 0) that the coefficient is steered to; None keeps it fixed."""
    kl_horizon: Number = 10_000
    """Completions in which a KL off its target by a fifth or more moves the coefficient by a fifth (> 0): larger steers
    more slowly."""
    gamma: Number = 1.0
    """γ, what reward one token later counts for (0 to 1): smaller credits a token with what follows soon."""
    gae_lambda: Number = 0.95
    """λ (0 to 1): 1 trusts the rewards that came, 0 the value role's next expectation; smaller varies less, but
    inherits the value role's errors."""
    clip: Number = 0.2
    """ε (> 0, < 1): a token has no more gradient once its ratio has left 1 ± ε in the direction asked for; larger
    allows larger steps on one rollout."""
    value_clip: Number = 0.2
    """ε_v, in reward (> 0): likewise for the distance of a value from that at sampling."""
    value_coefficient: Number = 0.1
    """c_v, weight of the value loss (>= 0)."""
    whiten_rewards: bool = False
    """Divide the rewards by their standard deviation over the rollout, without shifting their mean."""
    whiten_advantages: bool = True
    """Shift and scale the advantages to mean 0 and variance 1 over the rollout."""
    ptx_coefficient: Number = 0.0
    """c_ptx, weight of imitating demonstrations (>= 0): larger forgets less of them; 0 reads none. InstructGPT
    takes 27.8."""

    needs_demonstrations: bool = field(init=False, repr=False)
    needs_reference = True
    needs_values = True
    paper = "arXiv:1707.06347, eq. 7"

    def __post_init__(self) -> None:
        for name in ("kl_coefficient", "value_coefficient", "ptx_coefficient"):
            require_number(self, name, at_least=0)
        for name in ("gamma", "gae_lambda"):
            require_number(self, name, at_least=0, at_most=1)
        for name in ("kl_horizon", "value_clip"):
            require_number(self, name, above=0)
        require_number(self, "clip", above=0, below=1)
        for name in ("whiten_rewards", "whiten_advantages"):
            require_flag(self, name)
        if self.kl_target is not None:
            require_number(self, "kl_target", above=0)
            if self.kl_coefficient == 0:
                raise ValueError(
                    "PPO.kl_coefficient must be > 0 where kl_target is set, got 0: the controller multiplies it. "
                    "Start from a small one, or leave kl_target out."
                )
        object.__setattr__(self, "needs_demonstrations", self.ptx_coefficient > 0)

    def credit(self, rollout: Rollout, kl_coefficient: Number) -> Rollout:
        """Return the rollout with each token's advantage and value target."""
        mask = rollout.completion_mask
        reference = require_field(rollout.reference, "Rollout.reference", "PPO.needs_reference").detach()
        values = require_field(rollout.sampler_value, "Rollout.sampler_value", "PPO.needs_values").detach()
        kl = k1(rollout.sampler.detach(), reference)
        rewards = shaped_rewards(rollout.score.detach(), kl, mask, kl_coefficient)
        if self.whiten_rewards:
            rewards = whitened(rewards, mask, shift_mean=False)
        advantage = gae(rewards, values, mask, gamma=self.gamma, gae_lambda=self.gae_lambda)
        target = torch.where(mask, advantage + values, 0.0)
        if self.whiten_advantages:
            advantage = whitened(advantage, mask)
        return replace(rollout, advantage=advantage, value_target=target)

    def __call__(self, rollout: Rollout) -> LossOutput:
        """Map a batch of credited completions to its loss; the rewards are the scores."""
        advantage = require_field(rollout.advantage, "Rollout.advantage", "PPO.credit").detach()
        target = require_field(rollout.value_target, "Rollout.value_target", "PPO.credit").detach()
        value = require_field(rollout.value, "Rollout.value", "PPO.needs_values")
        sampler_value = require_field(rollout.sampler_value, "Rollout.sampler_value", "PPO.needs_values").detach()
        sampler = rollout.sampler.detach()
        log_ratio = rollout.policy - sampler

        policy_loss = token_mean(rollout, clipped_policy_loss(log_ratio, advantage, low=self.clip, high=self.clip))
        value_loss = token_mean(rollout, clipped_value_loss(value, sampler_value, target, clip=self.value_clip))
        moved = ((value.detach() - sampler_value).abs() > self.value_clip).to(value.dtype)
        outside = clipped_share(log_ratio, low=self.clip, high=self.clip)
        metrics = {
            "policy/loss": policy_loss.detach().mean(),
            "policy/approx_kl": token_mean(rollout, k3(sampler, rollout.policy.detach())).mean(),
            "policy/clip_fraction": token_mean(rollout, outside).mean(),
            "value/loss": value_loss.detach().mean(),
            "value/clip_fraction": token_mean(rollout, moved).mean(),
            "value/explained_variance": explained_variance(value.detach(), target, rollout.completion_mask),
        }
        losses = policy_loss + self.value_coefficient * value_loss
        if self.needs_demonstrations:
            need = "PPO.needs_demonstrations"
            demonstration = require_field(rollout.demonstration, "Rollout.demonstration", need)
            nll = -demonstration / require_field(rollout.demonstration_length, "Rollout.demonstration_length", need)
            losses = losses + self.ptx_coefficient * nll
            metrics["ptx/loss"] = nll.detach().mean()
        return rollout_output(rollout, losses, metrics)

    def next_kl_coefficient(self, coefficient: float, kl: float, completions: int) -> float:
        """Return the coefficient after a rollout of so many completions with mean `kl` to the reference, in nats."""
        if self.kl_target is None:
            return coefficient
        return adapted_coefficient(coefficient, kl, completions, target=self.kl_target, horizon=self.kl_horizon)
