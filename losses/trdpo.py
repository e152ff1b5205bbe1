"""Trust-region DPO: the reference follows the policy."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.objective import MovesReference, Number, PairObjective, require_number
from dpo.losses.reduce import log_ratios, logistic_loss, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class TRDPO(PairObjective, MovesReference):
    """DPO whose reference follows the policy, so that the policy may go farther in small, safe steps.

    loss = -p log σ(z) - (1 - p) log σ(-z),  z = β (r_w - r_l),  r = log π(y|x) - log π_ref(y|x), p = P(w preferred);
    after every τ-th optimiser step, θ_ref <- α θ + (1 - α) θ_ref.
    Soft updates are τ = 1 with α < 1, hard ones α = 1 with a large τ, such as 512.
    Where the policy equals the reference, at the start and after each hard update, the loss is ln 2.

    Paper: arXiv:2404.09656, section 3.
    Differs: a common trainer couples the two kinds, a share of 0.6 every 512 steps; that is neither of the paper's.
    LoRA is mixed by its low-rank factors A and B, not by the products B A: with the distances dA and dB between
    policy and reference, the mixed weights are off by α (1 - α) dB dA, second order, and 0 in hard updates. Log-probs
    of the reference that were computed before training do not serve.
    """

    beta: Number = 0.1
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""
    alpha: Number = 0.6
    """The policy's share in an update of the reference (> 0, <= 1): larger lets the reference follow more closely."""
    tau: int = 1
    """Optimiser steps from one update of the reference to the next (>= 1): more hold it still for longer."""

    needs_reference = True
    paper = "arXiv:2404.09656, section 3"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "alpha", above=0, at_most=1)
        require_number(self, "tau", at_least=1)
        if not isinstance(self.tau, int):
            raise ValueError(f"TRDPO.tau must be a whole number of optimiser steps, got {self.tau!r}")

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r, from the reference as it is now."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z = chosen - rejected
        losses = logistic_loss(logps, z)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))

    def share(self, step: int) -> float:
        """Return the policy's share in the reference after optimiser step `step` (from 1): α at each τ-th, else 0."""
        return float(self.alpha) if step % self.tau == 0 else 0.0
