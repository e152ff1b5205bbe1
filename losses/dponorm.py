"""Length-normalised DPO."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import log_ratios, logistic_loss, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class DPONorm(PairObjective):
    """DPO on log-ratios per token, so that a longer completion has no more room for reward than a short one.

    loss = -p log σ(z) - (1 - p) log σ(-z),  z = β (r_w / |w| - r_l / |l|),  r = log π(y|x) - log π_ref(y|x),
    |y| = completion tokens,  p = P(w preferred). Where the policy equals the reference, the loss is ln 2.

    Paper: arXiv:2411.15124, section 5.
    Differs: the paper's labels are certain (p = 1). Common code logs β r as the rewards of this loss; here they are
    β r / |y|, what the loss compares. β is per nat a TOKEN, hence far larger than DPO's: between completions of n
    tokens this loss is DPO with β / n.
    """

    beta: Number = 5.0
    """Strength of the pull to the reference, in reward per nat a token (> 0): larger keeps the policy closer to it."""

    needs_reference = True
    paper = "arXiv:2411.15124, section 5"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r / |y|."""
        chosen, rejected = log_ratios(logps)
        chosen, rejected = self.beta * chosen / logps.chosen_length, self.beta * rejected / logps.rejected_length
        z = chosen - rejected
        losses = logistic_loss(logps, z)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
