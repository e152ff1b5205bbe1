"""Contrastive preference optimisation."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class CPO(PairObjective):
    """DPO against a uniform reference, held back by imitating the chosen completion instead.

    loss = p [-log σ(z) - α a_w] + (1 - p) [-log σ(-z) - α a_l],  z = β (L_w - L_l),  L = log π(y|x),  a = L / |y|,
    p = P(w preferred). Where the two completions are equally likely and p = 1, the loss is ln 2 - α a_w.

    Paper: arXiv:2401.08417, section 3.
    Differs: the paper's labels are certain (p = 1), and it writes the sum L_w for the second term, where its authors'
    code, and ours, averages over tokens. That code takes one mean over all tokens of a batch; here each example has
    its own mean, so that accumulating gradients over micro-batches stays exact.
    """

    beta: Number = 0.1
    """Reward per nat of log-prob (> 0): larger saturates at a smaller gap."""
    alpha: Number = 1.0
    """Weight of the imitation of the chosen completion (>= 0): larger keeps its likelihood higher."""

    needs_reference = False
    paper = "arXiv:2401.08417, section 3"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "alpha", at_least=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β L."""
        chosen, rejected = self.beta * logps.policy_chosen, self.beta * logps.policy_rejected
        z = chosen - rejected
        as_labelled = -logsigmoid(z) - self.alpha * logps.policy_chosen / logps.chosen_length
        reversed_label = -logsigmoid(-z) - self.alpha * logps.policy_rejected / logps.rejected_length
        losses = expected_loss(logps, as_labelled, reversed_label)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
