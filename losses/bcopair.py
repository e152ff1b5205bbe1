"""Binary classifier optimisation, for pairs."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log_ratios, pair_output, require_field
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class BCOPair(PairObjective):
    """A binary classifier of chosen against rejected, whose logit is the implicit reward; it bounds DPO from above.

    loss = p [-log σ(β r_w - δ) - log σ(δ - β r_l)] + (1 - p) [-log σ(β r_l - δ) - log σ(δ - β r_w)],
    r = log π(y|x) - log π_ref(y|x),  δ = β · mean log-ratio of the steps before, a constant,  p = P(w preferred).
    Where the policy equals the reference, the loss is -log σ(δ) - log σ(-δ): 2 ln 2 in the first step.

    Paper: arXiv:2404.04656, section 4.
    Differs: the paper's labels are certain (p = 1). δ is the running mean of the optimiser steps before this one, the
    paper's moving average without the batch at hand, so that the loss does not depend on micro-batches. Common code
    has left δ out (0) or takes the mean of the batch.
    """

    beta: Number = 0.1
    """Reward per nat (> 0): larger keeps the policy closer to the reference."""

    needs_reference = True
    needs_mean_log_ratio = True
    paper = "arXiv:2404.04656, section 4"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r, before δ is taken off."""
        mean = require_field(logps.mean_log_ratio, "PairLogps.mean_log_ratio", "BCOPair.needs_mean_log_ratio")
        shift = self.beta * mean.detach()
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        as_labelled = -logsigmoid(chosen - shift) - logsigmoid(shift - rejected)
        reversed_label = -logsigmoid(rejected - shift) - logsigmoid(shift - chosen)
        losses = expected_loss(logps, as_labelled, reversed_label)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
