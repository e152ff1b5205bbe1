"""Robust DPO: direct preference optimisation, corrected for labels that are reversed at a known rate."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class RobustDPO(PairObjective):
    """DPO whose mean over labels reversed with probability ε is DPO on the clean labels.

    loss = p l(z) + (1 - p) l(-z),  l(z) = [-(1 - ε) log σ(z) + ε log σ(-z)] / (1 - 2ε),  z = β (r_w - r_l),
    r = log π(y|x) - log π_ref(y|x),  p = P(w preferred).
    Where the policy equals the reference, the loss is ln 2.

    Paper: arXiv:2403.00409, section 3.1.
    Differs: the paper's labels are certain (p = 1). `CDPO` has the other sign before its second term, which limits the
    margin but leaves the noise in the optimum. Here a certain pair's loss falls without bound, by ε / (1 - 2ε) per
    unit of z in the end: the correction holds on average over pairs, and on a few of them it rewards memorising.
    """

    beta: Number = 0.1
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""
    label_smoothing: Number = 0.1
    """ε, the share of labels that are reversed in the data (>= 0, < 1/2): larger corrects more; 0 is DPO."""

    needs_reference = True
    paper = "arXiv:2403.00409, section 3.1"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "label_smoothing", at_least=0, below=0.5)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z = chosen - rejected
        kept, flipped = 1 - self.label_smoothing, self.label_smoothing
        as_labelled = (-kept * logsigmoid(z) + flipped * logsigmoid(-z)) / (kept - flipped)
        reversed_label = (-kept * logsigmoid(-z) + flipped * logsigmoid(z)) / (kept - flipped)
        losses = expected_loss(logps, as_labelled, reversed_label)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
