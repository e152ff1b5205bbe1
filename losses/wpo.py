"""Weighted preference optimisation."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import log_ratios, logistic_loss, pair_output, require_field
from dpo.types import LossOutput, PairLogps, TokenLogps


@final
@dataclass(frozen=True, kw_only=True)
class WPO(PairObjective):
    """DPO that weighs a pair by how likely the policy is to write it, so that old data act like its own samples.

    loss = ω [-p log σ(z) - (1 - p) log σ(-z)],  z = β (r_w - r_l),  r = log π(y|x) - log π_ref(y|x),
    p = P(w preferred),  ω = min(1, ω_w ω_l), held constant,
    ω_y = exp( mean_t [log π(y_t|x, y_<t) - log Σ_v π(v|x, y_<t)²] ).
    Σ_v π(v)² is the probability that two samples agree, and the mean of π at a sample: ω_y is near 1 for what the
    policy samples, and 1 where it is uniform. Where the policy equals the reference, the loss is ω ln 2.

    Paper: arXiv:2406.11827, eq. 2.
    Differs: the weight of a pair is at most 1, as in the authors' code and not in eq. 2, where a few pairs of greedy
    completions could outweigh all others; one common trainer leaves the bound out.
    """

    beta: Number = 0.01
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""

    needs_reference = True
    needs_tokens = True
    needs_collision = True
    paper = "arXiv:2406.11827, eq. 2"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        log_weight = _log_weight(logps.chosen_tokens, logps.chosen_length, "chosen_tokens")
        log_weight = log_weight + _log_weight(logps.rejected_tokens, logps.rejected_length, "rejected_tokens")
        weight = log_weight.clamp(max=0).exp()  # min(1, ω_w ω_l), without an overflow on the way
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z = chosen - rejected
        losses = weight * logistic_loss(logps, z)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))


def _log_weight(tokens: TokenLogps | None, length: Shaped[Tensor, " batch"], name: str) -> Float[Tensor, " batch"]:
    """Return log ω_y, without gradient."""
    tokens = require_field(tokens, f"PairLogps.{name}", "WPO.needs_tokens")
    collision = require_field(tokens.log_collision, f"PairLogps.{name}.log_collision", "WPO.needs_collision")
    surprise = torch.where(tokens.completion_mask, tokens.policy.detach() - collision.detach(), 0.0)
    return surprise.sum(dim=1) / length
