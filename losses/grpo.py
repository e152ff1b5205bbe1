"""Group relative policy optimisation, and its variants DAPO and Dr. GRPO."""

from dataclasses import dataclass, field, replace
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dpo.losses.credit import clipped_policy_loss, clipped_share, group_centred, group_normalised, k3
from dpo.losses.objective import Number, RolloutObjective, require_flag, require_number, require_one_of
from dpo.losses.reduce import require_field, rollout_output, token_mean
from dpo.types import LossOutput, Rollout

Aggregation = Literal["sequence", "token", "constant"]


@final
@dataclass(frozen=True, kw_only=True)
class GRPO(RolloutObjective):
    """Clipped policy gradient in which a completion's credit is its place among the others of its prompt.

    A = (score - mean) / (std + 1e-4) over the completions of the same prompt, the same at all tokens;
    loss_t = max(-A ρ_t, -A clip(ρ_t, 1 - ε, 1 + ε')) + β k3_t,  ρ_t = π(y_t) / π_s(y_t), where s is the policy at
    sampling, and k3_t = u - 1 - log u with u = π_ref(y_t) / π(y_t); averaged over tokens as `aggregation` says.
    A group of equal scores has A = 0. Where the policy equals that at sampling and the reference, the loss is minus the
    mean advantage: 0 for "sequence", and for the others where the lengths are equal.

    k3 in the LOSS is not the penalty of PPO and RLOO: on samples of the policy its gradient is that of the forward
    KL(π_ref || π), and the optimum is another one than π_ref exp(score / β) / Z: for a single token
    π = β π_ref / (λ - score), λ such that it adds up to 1. The mean over the group's own K scores makes β count
    K / (K - 1) times.

    Paper: arXiv:2402.03300, eq. 3.
    Differs: the paper's mean over completions of token means ("sequence") favours short good completions and long bad
    ones; "token" is arXiv:2503.14476's (DAPO), over the optimiser step, and "constant" with scale_by_std=False
    arXiv:2503.20783's (Dr. GRPO). The std is the unbiased one. The paper's β is 0.04; 0, as here, trains without a
    reference. Beyond e^20 the exponentials are continued along their tangents: losses and gradients stay finite.
    """

    kl_coefficient: Number = 0.0
    """β, weight of k3 to the reference, per token of the loss (>= 0): larger keeps the policy closer to the reference;
    0 needs none."""
    clip: Number = 0.2
    """ε (> 0, < 1): a token has no more gradient once its ratio has left the range in the direction asked for; larger
    allows larger steps on one rollout."""
    clip_high: Number | None = None
    """ε', the range above 1 (> 0): more than ε, as DAPO's 0.28, lets unlikely tokens rise faster. None is ε."""
    aggregation: Aggregation = "token"
    """What is averaged: completions, each by its token mean ("sequence", GRPO); all tokens of the optimiser step alike
    ("token", DAPO); or completions, each by its token sum over a fixed length ("constant", Dr. GRPO)."""
    max_completion_length: int | None = None
    """The fixed length of "constant", in tokens (>= 1): the most that sampling allows. The others do not read it."""
    scale_by_std: bool = True
    """Divide by the group's standard deviation: prompts then weigh alike, be their scores close or far apart."""

    needs_reference: bool = field(init=False, repr=False)
    paper = "arXiv:2402.03300, eq. 3"

    def __post_init__(self) -> None:
        require_flag(self, "scale_by_std")
        require_number(self, "kl_coefficient", at_least=0)
        require_number(self, "clip", above=0, below=1)
        require_one_of(self, "aggregation", get_args(Aggregation))
        if self.clip_high is not None:
            require_number(self, "clip_high", above=0)
        if self.max_completion_length is not None:
            require_number(self, "max_completion_length", at_least=1)
            if not isinstance(self.max_completion_length, int):
                raise ValueError(f"GRPO.max_completion_length must be whole tokens, got {self.max_completion_length!r}")
        elif self.aggregation == "constant":
            raise ValueError(
                "GRPO.max_completion_length must be set where aggregation is 'constant', got None: give the largest "
                "number of tokens that sampling allows, or choose 'token'."
            )
        object.__setattr__(self, "needs_reference", self.kl_coefficient > 0)

    def credit(self, rollout: Rollout, kl_coefficient: Number) -> Rollout:  # noqa: ARG002  (the KL is in the loss)
        """Return the rollout with each completion's advantage, the same at all of its tokens.

        Raises:
            ValueError: a prompt has one completion only.
        """
        relative = group_normalised if self.scale_by_std else group_centred
        advantage = relative(rollout.score.detach(), rollout.prompt_index)
        return replace(rollout, advantage=torch.where(rollout.completion_mask, advantage.unsqueeze(1), 0.0))

    def __call__(self, rollout: Rollout) -> LossOutput:
        """Map a batch of credited completions to its loss; the rewards are the scores."""
        advantage = require_field(rollout.advantage, "Rollout.advantage", "GRPO.credit").detach()
        sampler = rollout.sampler.detach()
        log_ratio = rollout.policy - sampler
        bounds = {"low": self.clip, "high": self.clip if self.clip_high is None else self.clip_high}
        policy_loss = clipped_policy_loss(log_ratio, advantage, **bounds)
        metrics = {
            "policy/loss": token_mean(rollout, policy_loss.detach()).mean(),
            "policy/approx_kl": token_mean(rollout, k3(sampler, rollout.policy.detach())).mean(),
            "policy/clip_fraction": token_mean(rollout, clipped_share(log_ratio, **bounds)).mean(),
        }
        loss = policy_loss
        if self.needs_reference:
            reference = require_field(rollout.reference, "Rollout.reference", "GRPO.needs_reference").detach()
            loss = loss + self.kl_coefficient * k3(rollout.policy, reference)
        return rollout_output(rollout, self._aggregated(rollout, loss), metrics)

    def _aggregated(self, rollout: Rollout, loss: Float[Tensor, "batch tokens"]) -> Float[Tensor, " batch"]:
        total = (loss * rollout.completion_mask).sum(1)
        match self.aggregation:
            case "sequence":
                return total / rollout.completion_mask.sum(1)
            case "token":
                return token_mean(rollout, loss)
            case "constant":
                return total / require_field(self.max_completion_length, "GRPO.max_completion_length", "aggregation")
