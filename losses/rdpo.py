"""Length-regularised DPO."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import log_ratios, logistic_loss, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class RDPO(PairObjective):
    """DPO for a reward that charges for every token.

    loss = -p log σ(z) - (1 - p) log σ(-z),  z = s_w - s_l,  s = β r + α |y|,  r = log π(y|x) - log π_ref(y|x),
    p = P(w preferred). The best policy for E[reward - α |y|] - β KL(π || π_ref) has β r = reward - α |y| up to a
    constant, so that β r + α |y| is what has to explain the preferences: the sign is PLUS.
    Where the policy equals the reference, the loss is -log σ(α (|w| - |l|)).

    Paper: arXiv:2403.19159, the length-regularised loss.
    Differs: copies with the minus sign are in circulation; they reward length. (Robust DPO, also called rDPO, is
    `RobustDPO`.)
    """

    beta: Number = 0.1
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""
    alpha: Number = 0.01
    """Price of a token, in reward (>= 0; 0 is DPO): larger makes completions shorter."""

    needs_reference = True
    paper = "arXiv:2403.19159, the length-regularised loss"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "alpha", at_least=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r + α |y|: what explains the preferences."""
        lengths = logps.chosen_length, logps.rejected_length
        chosen, rejected = (
            self.beta * r + self.alpha * length.to(r.dtype)  # in r's precision: integers times α would be float32
            for r, length in zip(log_ratios(logps), lengths, strict=True)
        )
        z = chosen - rejected
        losses = logistic_loss(logps, z)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
