"""REINFORCE with the other completions of a prompt as its baseline."""

from dataclasses import dataclass, replace
from typing import final

import torch

from dpo.losses.credit import clipped_policy_loss, clipped_share, k1, k3, leave_one_out
from dpo.losses.objective import Number, RolloutObjective, require_number
from dpo.losses.reduce import require_field, rollout_output, token_mean
from dpo.types import LossOutput, Rollout


@final
@dataclass(frozen=True, kw_only=True)
class RLOO(RolloutObjective):
    """Policy gradient in which a completion is one action, compared with the others of its prompt; no value role.

    R_i = score_i - β Σ_t (log π_s(y_t) - log π_ref(y_t)),  A_i = R_i - mean of R_j over the prompt's other completions,
    loss = mean_i max(-A_i ρ_i, -A_i clip(ρ_i, 1 ± ε)),  ρ = π(y|x) / π_s(y|x), where s is the policy at sampling.
    Where the policy equals that at sampling, the loss is minus the mean advantage, 0 over a whole rollout.

    Paper: arXiv:2402.14740.
    Differs: the paper updates once on each sample, where ρ = 1 and nothing is clipped; the clipped ratio of
    arXiv:1707.06347 lets a rollout serve several updates. It is that of the whole completion, whose sum of log-ratios
    leaves 1 ± ε earlier than any one token's does. Beyond ρ = e^20 the exponential is continued along its tangent, so
    that losses and gradients stay finite.
    """

    kl_coefficient: Number = 0.05
    """β, reward lost per nat of KL(policy || reference) (>= 0): larger keeps the policy closer to the reference."""
    clip: Number = 0.2
    """ε (> 0, < 1): a completion has no more gradient once its ratio has left 1 ± ε in the direction asked for; larger
    allows larger steps on one rollout."""

    needs_reference = True
    paper = "arXiv:2402.14740"

    def __post_init__(self) -> None:
        require_number(self, "kl_coefficient", at_least=0)
        require_number(self, "clip", above=0, below=1)

    def credit(self, rollout: Rollout, kl_coefficient: Number) -> Rollout:
        """Return the rollout with each completion's advantage, the same at all of its tokens.

        Raises:
            ValueError: a prompt has one completion only.
        """
        reference = require_field(rollout.reference, "Rollout.reference", "RLOO.needs_reference").detach()
        kl = torch.where(rollout.completion_mask, k1(rollout.sampler.detach(), reference), 0.0).sum(1)
        advantage = leave_one_out(rollout.score.detach() - kl_coefficient * kl, rollout.prompt_index)
        return replace(rollout, advantage=torch.where(rollout.completion_mask, advantage.unsqueeze(1), 0.0))

    def __call__(self, rollout: Rollout) -> LossOutput:
        """Map a batch of credited completions to its loss; the rewards are the scores, the KL left out."""
        advantage = require_field(rollout.advantage, "Rollout.advantage", "RLOO.credit").detach()[:, 0]
        sampler = rollout.sampler.detach()
        log_ratio = torch.where(rollout.completion_mask, rollout.policy - sampler, 0.0).sum(1)
        losses = clipped_policy_loss(log_ratio, advantage, low=self.clip, high=self.clip)
        metrics = {
            "policy/loss": losses.detach().mean(),
            "policy/approx_kl": token_mean(rollout, k3(sampler, rollout.policy.detach())).mean(),
            "policy/clip_fraction": clipped_share(log_ratio, low=self.clip, high=self.clip).mean(),
        }
        return rollout_output(rollout, losses, metrics)
