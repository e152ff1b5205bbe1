"""The reward model of pairs."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, RankingObjective, require_number
from dpo.losses.reduce import comparisons, ranking_output, require_field
from dpo.types import LossOutput, RankingScores


@final
@dataclass(frozen=True, kw_only=True)
class BradleyTerry(RankingObjective):
    """Logistic regression on the difference of two scores: the odds of a preference are e to that difference.

    loss = -p log σ(s_w - s_l - m) - (1 - p) log σ(s_l - s_w) + c (s_w + s_l)²,  m = k (g_w - g_l), where s is the score
    of a completion and g people's rating of it, k the margin's and c the centring's weight, p = P(w preferred).
    Where both scores are equal (and m = c = 0), the loss is ln 2.

    Paper: arXiv:2307.09288, eq. 2.
    Differs: the paper's margin is a table of four degrees of preference; here it is proportional to the difference of
    the ratings. A margin that is the same for all pairs adds between 0 and its size to a reward gap, depending on how
    sure the label is, and so biases the scores. The paper's labels are certain (p = 1); the reversed label asks for no
    margin, for no rating says by how much the worse one is better. The centring is that of arXiv:2312.09244.
    """

    margin_weight: Number = 0.0
    """Score asked for per unit of the ratings' difference (>= 0): larger sets clearly better completions farther apart.
    0 leaves ratings unread; it suits data in which people only ranked."""
    centring_weight: Number = 0.0
    """Loss per squared sum of the two scores (>= 0): above 0, as 0.01, it draws the mean score of a prompt to 0, which
    the comparison leaves free, at the price of slightly smaller gaps."""

    view = "comparisons"
    paper = "arXiv:2307.09288, eq. 2"

    def __post_init__(self) -> None:
        require_number(self, "margin_weight", at_least=0)
        require_number(self, "centring_weight", at_least=0)

    def __call__(self, scores: RankingScores) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are the scores.

        Raises:
            ValueError: a prompt has not exactly two completions, one better than the other; or a margin is asked for
                and there are no ratings.
        """
        better, worse = comparisons(scores)
        one_each = torch.arange(len(better), device=better.device).repeat_interleave(2)
        if not torch.equal(scores.prompt_index, one_each.to(scores.prompt_index.dtype)):
            raise ValueError(
                "BradleyTerry: RankingScores must hold two completions of unequal rank for each prompt, got "
                f"prompt_index {scores.prompt_index.tolist()} with rank {scores.rank.tolist()}: compare one pair an "
                "example, or choose KWise, which takes any number of completions"
            )
        losses = comparison_losses(
            scores, better, worse, margin_weight=self.margin_weight, centring_weight=self.centring_weight
        )
        return ranking_output(scores, losses)


def comparison_losses(
    scores: RankingScores,
    better: Int[Tensor, " comparisons"],
    worse: Int[Tensor, " comparisons"],
    *,
    margin_weight: Number,
    centring_weight: Number,
) -> Float[Tensor, " comparisons"]:
    """Return each comparison's -p log σ(s_w - s_l - m) - (1 - p) log σ(s_l - s_w) + c (s_w + s_l)².

    Args:
        scores: the record.
        better: index of the preferred completion w of each comparison.
        worse: index of the other one, l.
        margin_weight: k in m = k (g_w - g_l); where it is 0, ratings are not read.
        centring_weight: c.

    Raises:
        ValueError: a margin is asked for and there are no ratings.
    """
    won, lost = scores.scores[better], scores.scores[worse]
    gap, asked = won - lost, torch.zeros_like(won)
    if margin_weight:
        rating = require_field(scores.margin, "RankingScores.margin", "a margin_weight above 0")
        asked = margin_weight * (rating[better] - rating[worse])
    losses = -logsigmoid(gap - asked)
    if scores.preference is not None:
        p = scores.preference[scores.prompt_index[better]]
        losses = p * losses - (1 - p) * logsigmoid(-gap)
    return losses + centring_weight * (won + lost) ** 2
