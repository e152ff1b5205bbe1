"""Odds ratio preference optimisation."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log1mexp, pair_output
from dpo.types import LossOutput, PairLogps

LARGEST_MEAN = -1e-6
"""Bound on a mean log-prob in nats a token. At 0 the odds are infinite, and nearer to 0 than this a float32 log-prob
is rounding error; a completion beyond the bound gets no gradient through its odds."""


@final
@dataclass(frozen=True, kw_only=True)
class ORPO(PairObjective):
    """Imitation of the chosen completion with a penalty on the odds of the rejected one, in one stage.

    loss = p [-a_w - λ log σ(d)] + (1 - p) [-a_l - λ log σ(-d)],  d = log odds_w - log odds_l,
    log odds = a - log(1 - e^a),  a = log π(y|x) / |y|,  p = P(w preferred).
    Where the two completions have the same mean log-prob a, the loss is -a + λ ln 2.

    Paper: arXiv:2403.07691, eq. 6.
    Differs: the paper's labels are certain (p = 1). Common code takes the first term over all tokens of the batch at
    once, some of it over the prompt's tokens too; here it is each completion's own mean.
    """

    odds_ratio_weight: Number = 0.1
    """λ (> 0): what the odds ratio weighs beside a nat a token of imitation; larger pushes the rejected one lower."""

    needs_reference = False
    paper = "arXiv:2403.07691, eq. 6"

    def __post_init__(self) -> None:
        require_number(self, "odds_ratio_weight", above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are the log odds."""
        chosen, rejected = logps.policy_chosen / logps.chosen_length, logps.policy_rejected / logps.rejected_length
        odds = _log_odds(chosen), _log_odds(rejected)
        ratio = odds[0] - odds[1]
        as_labelled = -chosen - self.odds_ratio_weight * logsigmoid(ratio)
        reversed_label = -rejected - self.odds_ratio_weight * logsigmoid(-ratio)
        losses = expected_loss(logps, as_labelled, reversed_label)
        return pair_output(logps, losses, torch.stack(odds, dim=1))


def _log_odds(mean: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    bounded = mean.clamp(max=LARGEST_MEAN)
    return bounded - log1mexp(bounded)
