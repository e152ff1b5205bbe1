"""Noise-contrastive alignment, for pairs."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class NCA(PairObjective):
    """Noise-contrastive estimation of each completion's own reward, which keeps the chosen one's likelihood up.

    loss = -p log σ(β r_w) - (1 - p) log σ(β r_l) - ½ log σ(-β r_w) - ½ log σ(-β r_l),
    r = log π(y|x) - log π_ref(y|x),  p = P(w preferred).
    Least at β r_w = ln(2p) and β r_l = ln(2 (1 - p)): a certain label raises the chosen completion to twice its
    reference probability at β = 1, and no further. Where the policy equals the reference, the loss is 2 ln 2.

    Paper: arXiv:2402.05369, section 4.1.
    Differs: this is the paper's loss over K responses at K = 2, with (p, 1 - p) for the softmax of the two scores; its
    loss for preferences has p = 1.
    """

    beta: Number = 0.1
    """Reward per nat (> 0): larger keeps the policy closer to the reference."""

    needs_reference = True
    paper = "arXiv:2402.05369, section 4.1"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        raised = expected_loss(logps, -logsigmoid(chosen), -logsigmoid(rejected))
        losses = raised - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
