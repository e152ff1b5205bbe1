"""The loss of iterative reasoning preference optimisation."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class RPO(PairObjective):
    """DPO plus the likelihood of the preferred completion, which DPO alone often lets fall.

    loss = p [-log σ(z) - α L_w / |w|] + (1 - p) [-log σ(-z) - α L_l / |l|],  z = β (r_w - r_l),
    L = log π(y|x),  r = L - log π_ref(y|x),  p = P(w preferred).
    Where the policy equals the reference, the loss of a certain label is ln 2 - α L_w / |w|.

    Paper: arXiv:2404.19733, eq. 1.
    Differs: the paper draws fresh pairs in each of several rounds; this is the loss of one. Each completion has its own
    mean over tokens, as in the paper; common trainers take one mean over all tokens of a batch, which lets long
    completions outweigh short ones and depends on the micro-batch.
    """

    beta: Number = 0.1
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""
    alpha: Number = 1.0
    """Weight of the imitation of the preferred completion (>= 0; 0 is DPO): larger keeps its likelihood higher."""

    needs_reference = True
    paper = "arXiv:2404.19733, eq. 1"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "alpha", at_least=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z = chosen - rejected
        as_labelled = -logsigmoid(z) - self.alpha * logps.policy_chosen / logps.chosen_length
        reversed_label = -logsigmoid(-z) - self.alpha * logps.policy_rejected / logps.rejected_length
        losses = expected_loss(logps, as_labelled, reversed_label)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
