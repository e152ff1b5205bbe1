"""Efficient exact optimisation, for pairs."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class EXO(PairObjective):
    """The reverse KL divergence from the policy's preference to the label's: mode-seeking where DPO is mean-seeking.

    loss = KL(p_θ || p_h) = σ(z) [log σ(z) - log q] + σ(-z) [log σ(-z) - log(1 - q)],  p_θ = (σ(z), σ(-z)),
    p_h = (q, 1 - q),  q = p (1 - ε) + (1 - p) ε,  z = β (r_w - r_l),  r = log π(y|x) - log π_ref(y|x),
    p = P(w preferred). Least, with value 0, at z = logit q.
    Where the policy equals the reference, the loss is -ln 2 - (log q + log(1 - q)) / 2.

    Paper: arXiv:2402.00856, eq. 16.
    Differs: the paper's labels are certain (p = 1). A soft label enters the target q; the expectation over labels would
    average two divergences instead, and its optimum would be at z = (2p - 1) logit(1 - ε). The authors' code takes the
    logits (0, -10) for the target as they are; here p_h is a distribution, and ε = 0 is refused because log 0 is
    infinite. The gradient vanishes as z falls: a pair that is far on the wrong side is given up, so start from a
    fine-tuned model.
    """

    beta: Number = 0.1
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""
    epsilon: Number = 1e-3
    """ε, what a certain label leaves to the rejected completion (> 0, < 1/2): larger asks for a smaller margin
    logit(1 - ε)."""

    needs_reference = True
    paper = "arXiv:2402.00856, eq. 16"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "epsilon", above=0, below=0.5)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z = chosen - rejected
        p = torch.ones_like(z) if logps.preference is None else logps.preference
        target_chosen = p * (1 - self.epsilon) + (1 - p) * self.epsilon
        target_rejected = p * self.epsilon + (1 - p) * (1 - self.epsilon)  # 1 - q would round away a small ε
        losses = torch.sigmoid(z) * (logsigmoid(z) - target_chosen.log())
        losses = losses + torch.sigmoid(-z) * (logsigmoid(-z) - target_rejected.log())
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
