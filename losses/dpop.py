"""DPO-Positive."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import logsigmoid, relu

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class DPOP(PairObjective):
    """DPO that does not let the chosen completion become less likely than under the reference.

    loss = -p log σ(β (h(r_w) - r_l)) - (1 - p) log σ(β (h(r_l) - r_w)),  h(r) = r - λ max(0, -r),
    r = log π(y|x) - log π_ref(y|x),  p = P(w preferred).
    Where the policy equals the reference, the loss is ln 2 and its gradient DPO's; it can exceed ln 2 though
    r_w > r_l, where both have fallen.

    Paper: arXiv:2402.13228, the DPOP loss.
    Differs: the paper's labels are certain (p = 1). λ stands inside the sigmoid and is multiplied by β, as the paper
    has it; a penalty added to DPO's loss outside the sigmoid is another objective.
    """

    beta: Number = 0.3
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""
    penalty_weight: Number = 50.0
    """λ: what a nat that the preferred completion has lost counts, in nats of the gap (>= 0; 0 is DPO): larger holds
    its likelihood up more firmly."""

    needs_reference = True
    paper = "arXiv:2402.13228, the DPOP loss"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "penalty_weight", at_least=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β h(r_w) and β r_l, as the label stands."""
        chosen, rejected = log_ratios(logps)
        held_chosen, held_rejected = (r - self.penalty_weight * relu(-r) for r in (chosen, rejected))
        as_labelled = -logsigmoid(self.beta * (held_chosen - rejected))
        reversed_label = -logsigmoid(self.beta * (held_rejected - chosen))
        losses = expected_loss(logps, as_labelled, reversed_label)
        return pair_output(logps, losses, self.beta * torch.stack([held_chosen, rejected], dim=1))
