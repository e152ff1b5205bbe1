"""Kahneman-Tversky optimisation, and its rule for uneven numbers of the two labels."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.objective import JudgementObjective, Number, require_number
from dpo.losses.reduce import judgement_output, log_ratio, require_field
from dpo.types import JudgementLogps, LossOutput

LARGEST_RATIO = 4 / 3
"""Upper end of the paper's interval for λ_D n_D / (λ_U n_U); the lower end is 1."""


@final
@dataclass(frozen=True, kw_only=True)
class KTO(JudgementObjective):
    """A value function that saturates for gains and for losses, over single completions judged good or bad.

    loss = λ_D - λ_D σ(β (r - z)) if desirable, λ_U - λ_U σ(β (z - r)) if not,  r = log π(y|x) - log π_ref(y|x),
    z = max(0, mean_i [log π(y_j|x_i) - log π_ref(y_j|x_i)]) over mismatched completions y_j, held constant.
    Where the policy equals the reference, the loss is λ / 2.

    Paper: arXiv:2402.01306, section 4.
    Differs: β multiplies r - z once, where the first version writes it into r and z; the two are equal. z is the mean
    over the whole optimiser step, not over the micro-batch at hand; a step should hold 4 examples or more.
    """

    beta: Number = 0.1
    """Steepness of the value function, in value per nat (> 0): larger saturates nearer to the reference."""
    desirable_weight: Number = 1.0
    """λ_D (> 0): what a desirable completion weighs."""
    undesirable_weight: Number = 1.0
    """λ_U (> 0): what an undesirable completion weighs."""

    needs_reference = True
    needs_mismatched = True
    paper = "arXiv:2402.01306, section 4"

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            require_number(self, name, above=0)

    def __call__(self, logps: JudgementLogps) -> LossOutput:
        """Map a batch of judgements to its loss; the rewards are β r, and "kl/reference_point" is z in nats."""
        mismatched = require_field(logps.policy_mismatched, "JudgementLogps.policy_mismatched", "KTO.needs_mismatched")
        kl = log_ratio(mismatched.detach(), logps.reference_mismatched, "JudgementLogps.reference_mismatched")
        z = kl.mean().clamp(min=0)
        r = log_ratio(logps.policy, logps.reference, "JudgementLogps.reference")
        gain = self.beta * (r - z)
        desirable = self.desirable_weight * torch.sigmoid(-gain)  # λ - λ σ(v) = λ σ(-v), without the cancellation
        undesirable = self.undesirable_weight * torch.sigmoid(gain)
        losses = torch.where(logps.desirable, desirable, undesirable)
        return judgement_output(logps, losses, self.beta * r, {"kl/reference_point": z})


def balanced_weights(n_desirable: int, n_undesirable: int, *, ratio: Number = 1.0) -> tuple[float, float]:
    """Return (desirable_weight, undesirable_weight) that make up for uneven numbers of the two labels.

    The rule: 1 <= λ_D n_D / (λ_U n_U) <= 4/3. Numbers that obey it already give (1, 1). Otherwise the more frequent
    side keeps weight 1 and the rarer one is raised until the quotient equals `ratio`.

    Paper: arXiv:2402.01306v1, eq. 8.
    Differs: later versions of the paper print [1, 3/2] for the interval.

    Raises:
        ValueError: a number is below 1, or `ratio` is outside [1, 4/3].
    """
    if n_desirable < 1 or n_undesirable < 1:
        raise ValueError(
            f"balanced_weights needs both labels, got {n_desirable} desirable and {n_undesirable} undesirable: "
            "no weight replaces a missing label"
        )
    if not 1 <= ratio <= LARGEST_RATIO:
        raise ValueError(f"balanced_weights: ratio must be >= 1 and <= 4/3, got {ratio!r}")
    if n_desirable < n_undesirable:
        return ratio * n_undesirable / n_desirable, 1.0
    if n_desirable / n_undesirable > LARGEST_RATIO:
        return 1.0, n_desirable / (ratio * n_undesirable)
    return 1.0, 1.0
