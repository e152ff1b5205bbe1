"""Binary classifier optimisation."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import logsigmoid

from dpo.losses.objective import JudgementObjective, Number, require_number
from dpo.losses.reduce import judgement_output, log_ratio, require_field
from dpo.types import JudgementLogps, LossOutput


@final
@dataclass(frozen=True, kw_only=True)
class BCO(JudgementObjective):
    """Logistic regression of the label on the implicit reward, which a running mean centres first.

    loss = -log σ(β r - δ) if desirable, -log σ(-(β r - δ)) if not,  r = log π(y|x) - log π_ref(y|x),
    δ = β * (mean log-ratio of the steps before this one), held constant.
    In the first step, where the policy equals the reference, the loss is ln 2.

    Paper: arXiv:2404.04656, section 4.
    Differs: δ is the running mean over all completions of the steps before this one, without the batch at hand, so
    that the loss does not depend on micro-batches; the paper weighs the two labels' means the same, whatever their
    numbers. Its correction for labels that come from different prompts goes into `weight`.
    """

    beta: Number = 0.1
    """Reward per nat (> 0): larger keeps the policy closer to the reference."""

    needs_reference = True
    needs_mean_log_ratio = True
    paper = "arXiv:2404.04656, section 4"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: JudgementLogps) -> LossOutput:
        """Map a batch of judgements to its loss; the rewards are β r, without the shift."""
        mean = require_field(logps.mean_log_ratio, "JudgementLogps.mean_log_ratio", "BCO.needs_mean_log_ratio")
        reward = self.beta * log_ratio(logps.policy, logps.reference, "JudgementLogps.reference")
        shifted = reward - self.beta * mean.detach()
        losses = -logsigmoid(torch.where(logps.desirable, shifted, -shifted))
        return judgement_output(logps, losses, reward, {})
