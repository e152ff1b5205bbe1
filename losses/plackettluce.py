"""The reward model of rankings, place by place."""

import math
from dataclasses import dataclass
from typing import final

from dpo.losses.objective import RankingObjective
from dpo.losses.reduce import ranking_output
from dpo.types import LossOutput, RankingScores


@final
@dataclass(frozen=True, kw_only=True)
class PlackettLuce(RankingObjective):
    """The likelihood of the whole order: each place is filled by a softmax over the completions not yet placed.

    loss = Σ_i [log(e^s_i + Σ_{j worse than i} e^s_j) - s_i] over a prompt's completions, where s is the score of a
    completion. Two completions make it Bradley-Terry. Where all K scores are equal, and none tied, the loss is ln K!.

    Paper: arXiv:2301.11270, section 4.
    Differs: the paper's rankings have no ties. Here a completion competes with the worse ones alone, not with its
    equals, so that a tie asserts no order; ties at the last place, as where only the best is known, leave an exact
    likelihood, other ties a product of exact factors that are no longer independent. It is a sum over places, not a
    mean: a prompt with more completions says more and weighs more.
    """

    needs_certain_labels = True
    view = "rankings"
    paper = "arXiv:2301.11270, section 4"

    def __call__(self, scores: RankingScores) -> LossOutput:
        """Map a batch of rankings to its loss; the rewards are the scores.

        Raises:
            ValueError: a label is not certain.
        """
        _require_certain(scores)
        same = scores.prompt_index.unsqueeze(1) == scores.prompt_index
        unplaced = (same & (scores.rank.unsqueeze(1) < scores.rank)).fill_diagonal_(True)
        contenders = scores.scores.expand(unplaced.shape).masked_fill(~unplaced, -math.inf)
        each = contenders.logsumexp(1) - scores.scores
        total = each.new_zeros(int(scores.prompt_index[-1]) + 1)
        return ranking_output(scores, total.index_add(0, scores.prompt_index, each))


def _require_certain(scores: RankingScores) -> None:
    if scores.preference is not None and bool((scores.preference != 1).any()):
        prompt = int((scores.preference != 1).nonzero()[0])
        raise ValueError(
            f"PlackettLuce: RankingScores.preference must be 1 for every prompt, got "
            f"{scores.preference[prompt].item():g} for prompt {prompt}: one probability says too little of an order "
            "of K completions. Train on certain labels, or choose KWise, which compares two at a time."
        )
