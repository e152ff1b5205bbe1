"""Anchored preference optimisation, for completions worse than the model's own."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class APODown(PairObjective):
    """Lowers both completions, the rejected one more: a preference between two that the model should leave behind.

    loss = p [σ(β r_w) + 1 - σ(z)] + (1 - p) [σ(β r_l) + 1 - σ(-z)],  z = β (r_w - r_l),
    r = log π(y|x) - log π_ref(y|x),  p = P(w preferred). Where the policy equals the reference, the loss is 1; there
    a certain label does not move the chosen completion, which falls as well once the rejected one has fallen.

    Paper: arXiv:2408.06266, eq. 8.
    Differs: the paper's labels are certain (p = 1), and some write the loss without the constant 1. Use it where the
    chosen completions are worse than what the model writes, `APOZero` where they are better.
    """

    beta: Number = 0.1
    """Reward per nat (> 0): the pull on a pair fades from some 1 / β nats on, so larger keeps the policy closer to the
    reference."""

    needs_reference = True
    paper = "arXiv:2408.06266, eq. 8"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z = chosen - rejected
        as_labelled = torch.sigmoid(chosen) + torch.sigmoid(-z)  # 1 - σ(z) = σ(-z), without the cancellation
        reversed_label = torch.sigmoid(rejected) + torch.sigmoid(z)
        losses = expected_loss(logps, as_labelled, reversed_label)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
