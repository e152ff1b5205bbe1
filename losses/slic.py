"""Sequence likelihood calibration with human feedback."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class SLiC(PairObjective):
    """A hinge on the gap of log-probs, held back by imitating the chosen completion.

    loss = p [max(0, δ - L_w + L_l) - λ L_w] + (1 - p) [max(0, δ - L_l + L_w) - λ L_l],  L = log π(y|x),
    p = P(w preferred). Where the two completions have the same log-prob L, the loss is δ - λ L.

    Paper: arXiv:2305.10425, section 2.
    Differs: the paper's labels are certain (p = 1), and its second term imitates the target of supervised fine-tuning;
    a pair holds none, so that the chosen completion stands in its place. Both terms are sums over tokens.
    """

    delta: Number = 1.0
    """δ, the gap beyond which a pair no longer pulls, in nats a completion (> 0)."""
    regularisation_weight: Number = 0.1
    """λ (> 0): what a nat of imitation weighs beside a nat of the gap; larger keeps the chosen one more likely."""

    needs_reference = False
    paper = "arXiv:2305.10425, section 2"

    def __post_init__(self) -> None:
        for name in ("delta", "regularisation_weight"):
            require_number(self, name, above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are L."""
        chosen, rejected = logps.policy_chosen, logps.policy_rejected
        gap = chosen - rejected
        as_labelled = (self.delta - gap).clamp(min=0) - self.regularisation_weight * chosen
        reversed_label = (self.delta + gap).clamp(min=0) - self.regularisation_weight * rejected
        losses = expected_loss(logps, as_labelled, reversed_label)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
