"""Discovered preference optimisation: the log-ratio modulated loss."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class DiscoPOP(PairObjective):
    """A blend of the logistic and the exponential loss, found by a search over programs.

    loss = p f(z) + (1 - p) f(-z),  f(z) = (1 - m) (-log σ(z)) + m e^-z,  m = σ(z / τ),  z = β (r_w - r_l),
    r = log π(y|x) - log π_ref(y|x),  p = P(w preferred); the gradient goes through m as well.
    Where the policy equals the reference, the loss is (1 + ln 2) / 2.

    f is not convex. Its slope at the reference is (1 - ln 2) / (4τ) - 3/4, positive for τ < 0.102: there, raising the
    better completion RAISES the loss, and descent leads to a local minimum left of 0 (z = -0.119 for τ = 0.05, a gap of
    -2.4 nats at β = 0.05). Only pairs that other pairs carry over the hill (z = 0.072) go on to the right.

    Paper: arXiv:2406.08414, eq. 5.
    Differs: the common code multiplies m by e^-z, which is 0 times infinity, not a number, for a pair that is far
    wrong. Here the product is one exponential whose argument, log m - z, is never above 0 while τ <= 1.
    """

    beta: Number = 0.05
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""
    tau: Number = 0.05
    """Width in z of the change from the logistic to the exponential loss (> 0, <= 1): smaller is more abrupt. Above 1
    the exponential would win on the wrong side as well, and a pair far wrong would cost without measure."""

    needs_reference = True
    pulls_at_reference = False
    paper = "arXiv:2406.08414, eq. 5"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "tau", above=0, at_most=1)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z = chosen - rejected
        losses = expected_loss(logps, self._blend(z), self._blend(-z))
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))

    def _blend(self, z: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        logistic = torch.sigmoid(-z / self.tau) * -logsigmoid(z)  # 1 - σ(v) = σ(-v), without the cancellation
        # log m <= min(0, z / τ), which is <= z for z < 0 and τ <= 1: the argument is never above 0.
        exponential = torch.exp(logsigmoid(z / self.tau) - z)
        return logistic + exponential
