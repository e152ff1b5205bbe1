"""Conservative DPO: direct preference optimisation with smoothed labels."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class CDPO(PairObjective):
    """DPO that trusts no label fully: each may be reversed with probability ε, so that the margin stays finite.

    loss = -p' log σ(z) - (1 - p') log σ(-z),  p' = p (1 - ε) + (1 - p) ε,  z = β (r_w - r_l),
    r = log π(y|x) - log π_ref(y|x),  p = P(w preferred).
    Least at z = logit p', for a certain label logit(1 - ε). Where the policy equals the reference, the loss is ln 2.

    Paper: Mitchell 2023, ericmitchell.ai/cdpo.pdf, eq. 3.
    Differs: the paper's labels are certain (p = 1). Some trainers accept a label smoothing and leave it unused. It is
    a bias, not a correction: of labels reversed with rate ε this loss recovers a smaller margin than the clean one,
    `RobustDPO` recovers the clean one.
    """

    beta: Number = 0.1
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""
    label_smoothing: Number = 0.1
    """ε, the probability that a label is reversed (>= 0, < 1/2): larger asks for a smaller margin; 0 is DPO."""

    needs_reference = True
    paper = "Mitchell 2023, ericmitchell.ai/cdpo.pdf, eq. 3"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "label_smoothing", at_least=0, below=0.5)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z, smoothing = chosen - rejected, self.label_smoothing
        as_labelled = -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)
        reversed_label = -(1 - smoothing) * logsigmoid(-z) - smoothing * logsigmoid(z)
        losses = expected_loss(logps, as_labelled, reversed_label)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
