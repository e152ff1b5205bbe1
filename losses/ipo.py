"""Identity preference optimisation."""

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch

from dpo.losses.objective import Number, PairObjective, require_number, require_one_of
from dpo.losses.reduce import expected_loss, log_ratios, pair_output
from dpo.types import LossOutput, PairLogps

Reduction = Literal["mean", "sum"]


@final
@dataclass(frozen=True, kw_only=True)
class IPO(PairObjective):
    """Regression of the log-ratio gap onto a fixed margin, so that certain preferences do not push without end.

    loss = p (h - t)² + (1 - p) (h + t)²,  h = r_w - r_l,  t = 1 / (2τ),  p = P(w preferred), and
    r = (log π(y|x) - log π_ref(y|x)) / |y| under "mean", or the undivided sum under "sum".
    Where the policy equals the reference, the loss is 1 / (4τ²).

    Paper: arXiv:2310.12036, eq. 17.
    Differs: eq. 17 is the "sum" with p = 1; "mean" is what its authors use for language models. The two do not share
    a good τ: under "mean" the margin t is a gap in nats per TOKEN, and the 5 that τ = 0.1 asks for is out of reach, so
    that the loss pushes almost linearly; τ from 0.5 to 1 sets a margin that training can meet: here 0.5 is the default.
    """

    tau: Number = 0.5
    """Strength of the pull to the reference (> 0): larger asks for a smaller margin 1 / (2τ), in nats a token under
    "mean". Where τ is 0.1 elsewhere, as for "sum", the margin is 5."""
    reduction: Reduction = "mean"
    """Compare log-ratios per token ("mean", length-neutral) or per completion ("sum", the paper's bandit form)."""

    needs_reference = True
    paper = "arXiv:2310.12036, eq. 17"

    def __post_init__(self) -> None:
        require_number(self, "tau", above=0)
        require_one_of(self, "reduction", get_args(Reduction))

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are r."""
        chosen, rejected = log_ratios(logps)
        if self.reduction == "mean":
            chosen, rejected = chosen / logps.chosen_length, rejected / logps.rejected_length
        gap, target = chosen - rejected, 1 / (2 * self.tau)
        losses = expected_loss(logps, (gap - target) ** 2, (gap + target) ** 2)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
