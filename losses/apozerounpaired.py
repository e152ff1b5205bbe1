"""Anchored preference optimisation over single completions."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.objective import JudgementObjective, Number, require_number
from dpo.losses.reduce import judgement_output, log_ratio
from dpo.types import JudgementLogps, LossOutput


@final
@dataclass(frozen=True, kw_only=True)
class APOZeroUnpaired(JudgementObjective):
    """Desirable completions up and undesirable ones down, each by itself, anchored at the reference.

    loss = 1 - σ(β r) if desirable, σ(β r) if not,  r = log π(y|x) - log π_ref(y|x).
    Where the policy equals the reference, the loss is 1/2.

    Paper: arXiv:2408.06266, eq. 7.
    Differs: the paper's APO-zero adds the two up over a pair; here each is a judgement of its own. It is KTO with its
    reference point held at 0, so that no mismatched completions are scored.
    """

    beta: Number = 0.1
    """Steepness, in value per nat (> 0): larger saturates nearer to the reference."""

    needs_reference = True
    paper = "arXiv:2408.06266, eq. 7"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: JudgementLogps) -> LossOutput:
        """Map a batch of judgements to its loss; the rewards are β r."""
        reward = self.beta * log_ratio(logps.policy, logps.reference, "JudgementLogps.reference")
        losses = torch.sigmoid(torch.where(logps.desirable, -reward, reward))  # 1 - σ(v) = σ(-v), without cancellation
        return judgement_output(logps, losses, reward, {})
