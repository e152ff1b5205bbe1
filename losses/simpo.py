"""Simple preference optimisation."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class SimPO(PairObjective):
    """Logistic regression on mean log-probs, the scale on which text is decoded, beyond a margin.

    loss = -p log σ(z - γ) - (1 - p) log σ(-z - γ),  z = β (a_w - a_l),  a = log π(y|x) / |y|,  p = P(w preferred),
    γ = β * gamma_beta_ratio. Where the two completions have the same mean log-prob, the loss is log(1 + e^γ).

    Paper: arXiv:2405.14734, eq. 6.
    Differs: the paper's labels are certain (p = 1). The margin is given as γ/β, in nats a token, as in the authors'
    code. Other code takes γ itself: its default of 0.5 beside β = 0.1 is a ratio of 5, out of reach.
    """

    beta: Number = 2.0
    """Reward per nat of mean log-prob (> 0): larger saturates at a smaller gap. No reference holds the policy back."""
    gamma_beta_ratio: Number = 0.5
    """The margin γ/β in nats a token (>= 0): larger asks for a wider gap before the loss saturates."""

    needs_reference = False
    paper = "arXiv:2405.14734, eq. 6"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "gamma_beta_ratio", at_least=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β a."""
        chosen = self.beta * logps.policy_chosen / logps.chosen_length
        rejected = self.beta * logps.policy_rejected / logps.rejected_length
        z, margin = chosen - rejected, self.beta * self.gamma_beta_ratio
        losses = expected_loss(logps, -logsigmoid(z - margin), -logsigmoid(-z - margin))
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))
