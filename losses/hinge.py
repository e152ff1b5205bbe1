"""The hinge loss on log-ratios."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class Hinge(PairObjective):
    """The support-vector counterpart of DPO: pairs behind the margin pull with full strength, those beyond it rest.

    loss = p max(0, 1 - z) + (1 - p) max(0, 1 + z),  z = β (r_w - r_l),  r = log π(y|x) - log π_ref(y|x),
    p = P(w preferred). Where the policy equals the reference, the loss is 1.

    Paper: arXiv:2309.06657, hinge-norm loss.
    Differs: the paper's labels are certain (p = 1), and its β is written γ. A soft label weakens the pull to 2p - 1 but
    leaves the optimum at z = 1 for every p above 1/2. The hinge of SLiC is another loss: it compares log-probs, without
    a reference. The paper's other half, rejection sampling, concerns the data and not the loss.
    """

    beta: Number = 0.05
    """Reward per nat (> 0): pairs rest from a gap of 1 / β nats on, so larger keeps the policy closer to the
    reference."""

    needs_reference = True
    paper = "arXiv:2309.06657, hinge-norm loss"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z = chosen - rejected
        losses = expected_loss(logps, torch.relu(1 - z), torch.relu(1 + z))
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
