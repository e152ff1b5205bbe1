"""Length-desensitised DPO."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import logistic_loss, pair_output, require_field
from dpo.types import LossOutput, PairLogps, TokenLogps


@final
@dataclass(frozen=True, kw_only=True)
class LDDPO(PairObjective):
    """DPO in which the tokens that only the longer completion has count less.

    loss = -p log σ(z) - (1 - p) log σ(-z),  z = β (s_w - s_l),  p = P(w preferred),
    s = Σ_t c_t [log π(y_t|x, y_<t) - log π_ref(y_t|x, y_<t)],  c_t = 1 for t <= min(|w|, |l|), α for t beyond.
    Where the policy equals the reference, the loss is ln 2.

    Paper: arXiv:2409.06411, the LD-DPO loss.
    Differs: the weights stand in policy and reference alike. Code that weighs the policy's tokens alone starts from a
    loss other than ln 2 and rewards length differences that nobody asked for.
    """

    beta: Number = 0.1
    """Strength of the pull to the reference, in reward per nat (> 0): larger keeps the policy closer to it."""
    alpha: Number = 0.5
    """Weight of a token beyond the shorter completion's length (0 to 1): 1 is DPO, 0 leaves those tokens out."""

    needs_reference = True
    needs_tokens = True
    paper = "arXiv:2409.06411, the LD-DPO loss"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_number(self, "alpha", at_least=0, at_most=1)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β s."""
        shared = torch.minimum(logps.chosen_length, logps.rejected_length)
        sides = {"chosen_tokens": logps.chosen_tokens, "rejected_tokens": logps.rejected_tokens}
        chosen, rejected = (self.beta * self._weighed(tokens, shared, name) for name, tokens in sides.items())
        z = chosen - rejected
        losses = logistic_loss(logps, z)
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))

    def _weighed(
        self, tokens: TokenLogps | None, shared: Shaped[Tensor, " batch"], name: str
    ) -> Float[Tensor, " batch"]:
        tokens = require_field(tokens, f"PairLogps.{name}", "LDDPO.needs_tokens")
        reference = require_field(tokens.reference, f"PairLogps.{name}.reference", "LDDPO.needs_reference")
        ratios = tokens.policy - reference.detach()
        position = tokens.completion_mask.cumsum(dim=1)  # from 1, counted in scored tokens
        return torch.where(position > shared.unsqueeze(1), self.alpha * ratios, ratios).sum(dim=1)
