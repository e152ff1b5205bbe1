"""Supervised fine-tuning."""

from dataclasses import dataclass
from typing import Literal, final, get_args

from dpo.losses.objective import DemonstrationObjective, require_one_of
from dpo.losses.reduce import demonstration_output
from dpo.types import JudgementLogps, LossOutput

Reduction = Literal["mean", "sum"]


@final
@dataclass(frozen=True, kw_only=True)
class SFT(DemonstrationObjective):
    """Maximum likelihood on demonstrations: imitate what is in the data.

    loss = -log π(y|x) / |y| under "mean", -log π(y|x) under "sum", in nats.

    Paper: arXiv:2203.02155, section 3.5.
    Differs: common trainers take one mean over all tokens of a batch. Here each example has its own mean first: a long
    one weighs no more than a short one, and accumulating gradients over micro-batches stays exact.
    """

    reduction: Reduction = "mean"
    """Each completion weighs the same ("mean") or as its length ("sum", the likelihood proper)."""

    needs_reference = False
    paper = "arXiv:2203.02155, section 3.5"

    def __post_init__(self) -> None:
        require_one_of(self, "reduction", get_args(Reduction))

    def __call__(self, logps: JudgementLogps) -> LossOutput:
        """Map a batch of demonstrations to its loss; the rewards are log π(y|x)."""
        losses = -logps.policy / logps.length if self.reduction == "mean" else -logps.policy
        return demonstration_output(logps, losses, logps.policy)
