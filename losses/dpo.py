"""Direct preference optimisation."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import log_ratios, logistic_loss, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class DPO(PairObjective):
    """Logistic regression on the implicit reward: the policy is its own Bradley-Terry reward model.

    loss = -p log σ(z) - (1 - p) log σ(-z),  z = β (r_w - r_l),  r = log π(y|x) - log π_ref(y|x), p = P(w preferred).
    Where the policy equals the reference, the loss is ln 2.

    Paper: arXiv:2305.18290, eq. 7.
    Differs: the paper's labels are certain (p = 1). A soft label takes the expectation over the label, which has a
    finite optimum: z = logit p.
    """

    beta: Number = 0.1
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""

    needs_reference = True
    paper = "arXiv:2305.18290, eq. 7"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z = chosen - rejected
        losses = logistic_loss(logps, z)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
