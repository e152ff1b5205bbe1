"""The reward model of rankings, comparison by comparison."""

from dataclasses import dataclass
from typing import final

import torch

from dpo.losses.bradleyterry import comparison_losses
from dpo.losses.objective import Number, RankingObjective, require_number
from dpo.losses.reduce import comparisons, ranking_output
from dpo.types import LossOutput, RankingScores


@final
@dataclass(frozen=True, kw_only=True)
class KWise(RankingObjective):
    """Bradley-Terry on all comparisons of a prompt's K completions, which together are one example.

    loss = (1 / C) Σ_{i better than j} [-p log σ(s_i - s_j - m_ij) - (1 - p) log σ(s_j - s_i) + c (s_i + s_j)²],
    m_ij = k (g_i - g_j), where C counts the prompt's comparisons, s is the score of a completion and g people's rating
    of it, k the margin's and c the centring's weight, p = P(the better one is preferred).
    Where all scores are equal (and k = c = 0), the loss is ln 2.

    Paper: arXiv:2203.02155, eq. 1.
    Differs: the paper's rankings have no ties, so that C = K (K - 1) / 2; here completions of equal rank are not
    compared, and a prompt without any comparison has the loss 0. A batch's loss is the mean over prompts, as in the
    paper: with a mean over comparisons, which is common, a prompt with 9 completions would weigh as much as 36 with 2.
    Margin, soft labels and centring are those of `BradleyTerry`.
    """

    margin_weight: Number = 0.0
    """Score asked for per unit of the ratings' difference (>= 0): larger sets clearly better completions farther apart.
    0 leaves ratings unread; it suits data in which people only ranked."""
    centring_weight: Number = 0.0
    """Loss per squared sum of two scores (>= 0): above 0, as 0.01, it draws the mean score of a prompt to 0, which the
    comparisons leave free, at the price of slightly smaller gaps."""

    view = "rankings"
    paper = "arXiv:2203.02155, eq. 1"

    def __post_init__(self) -> None:
        require_number(self, "margin_weight", at_least=0)
        require_number(self, "centring_weight", at_least=0)

    def __call__(self, scores: RankingScores) -> LossOutput:
        """Map a batch of rankings to its loss; the rewards are the scores.

        Raises:
            ValueError: a margin is asked for and there are no ratings.
        """
        better, worse = comparisons(scores)
        each = comparison_losses(
            scores, better, worse, margin_weight=self.margin_weight, centring_weight=self.centring_weight
        )
        index = scores.prompt_index[better]
        total = each.new_zeros(int(scores.prompt_index[-1]) + 1)
        count = total.index_add(0, index, torch.ones_like(each)).clamp(min=1)
        return ranking_output(scores, total.index_add(0, index, each) / count)
