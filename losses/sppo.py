"""Self-play preference optimisation: one iteration's loss."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class SPPO(PairObjective):
    """Regression of each completion's log-ratio onto its win probability: one step of multiplicative weights.

    loss = ½ [(r_w - (p - ½) / β)² + (r_l - (½ - p) / β)²],  r = log π(y|x) - log π_ref(y|x),  p = P(w preferred).
    Where the policy equals the reference, the loss is (p - ½)² / β².

    Paper: arXiv:2405.00675, eq. 4.7.
    Differs: β is the paper's 1/η. Its p is a completion's mean probability to win against samples of the reference;
    here p is the label's, between the two. p sets the targets; the expectation over labels has the same gradient and
    another constant. Common code takes p = 1 for all pairs and leaves the ½ out: twice the gradient. The paper's
    reference is the policy of the iteration before, on whose samples the pairs are made.
    """

    beta: Number = 1e-3
    """1/η, reward per nat (> 0): larger asks for a smaller step, of (p - ½) / β nats. At 1e-3 a certain label asks for
    500 nats, so that training pulls with almost constant strength and the loss is in the hundred thousands."""

    needs_reference = True
    paper = "arXiv:2405.00675, eq. 4.7"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are r."""
        chosen, rejected = log_ratios(logps)
        p = 1.0 if logps.preference is None else logps.preference
        target = (p - 0.5) / self.beta
        losses = ((chosen - target) ** 2 + (rejected + target) ** 2) / 2
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
