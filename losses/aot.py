"""Alignment via optimal transport."""

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.losses.objective import Number, PairObjective, require_number, require_one_of
from dpo.losses.reduce import log_ratios, pair_output, require_field
from dpo.types import LossOutput, PairLogps

Pairing = Literal["paired", "unpaired"]


@final
@dataclass(frozen=True, kw_only=True)
class AOT(PairObjective):
    """Preference between distributions: each quantile of the better one is to exceed the same quantile of the worse.

    loss = -log σ(β (a_(k) - b_(k))) for the k-th smallest a and the k-th smallest b of the batch, where
    "paired" compares a = log π(w|x) - log π(l|x) with b = log π_ref(w|x) - log π_ref(l|x), and
    "unpaired" compares a = r_w with b = r_l,  r = log π(y|x) - log π_ref(y|x).
    A loss, and with it a weight, stands at the example whose a has rank k; where "unpaired", the rejected completion it
    trains may be another example's. Where the policy equals the reference, the loss is ln 2.

    Paper: arXiv:2406.05882, section 3.
    Differs: of the paper's losses and sortings, the logistic loss and the hard sorting. "unpaired" still takes as many
    chosen as rejected completions, for the batch is one of pairs. The whole optimiser step is sorted; common code sorts
    a micro-batch, and a micro-batch of one example is DPO. Early releases of a common trainer name the unpaired form
    "aot_pair".
    """

    beta: Number = 0.01
    """Steepness of the loss, per nat (> 0): larger is content with a smaller distance between the quantiles."""
    pairing: Pairing = "paired"
    """What is sorted: the margins of pairs ("paired"), or the log-ratios of the chosen and of the rejected completions
    by themselves ("unpaired"), so that a pair's two completions need not belong together."""

    needs_reference = True
    batch_coupled = True
    needs_certain_labels = True
    paper = "arXiv:2406.05882, section 3"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)
        require_one_of(self, "pairing", get_args(Pairing))

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r of each pair, of which the loss compares quantiles.

        Raises:
            ValueError: a label is not certain.
        """
        _require_certain(logps)
        better, worse = log_ratios(logps) if self.pairing == "unpaired" else _margins(logps)
        rank = better.argsort().argsort()
        losses = -logsigmoid(self.beta * (better - worse.sort().values[rank]))
        return pair_output(logps, losses, self.beta * torch.stack(log_ratios(logps), dim=1))


def _margins(logps: PairLogps) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the policy's margin between chosen and rejected, and the reference's, without gradient into the latter."""
    chosen = require_field(logps.reference_chosen, "PairLogps.reference_chosen", "AOT.needs_reference")
    rejected = require_field(logps.reference_rejected, "PairLogps.reference_rejected", "AOT.needs_reference")
    return logps.policy_chosen - logps.policy_rejected, chosen.detach() - rejected.detach()


def _require_certain(logps: PairLogps) -> None:
    if logps.preference is not None and bool((logps.preference != 1).any()):
        row = int((logps.preference != 1).nonzero()[0])
        raise ValueError(
            f"AOT: PairLogps.preference must be 1 for every pair, got {logps.preference[row].item():g} in row {row}: "
            "sorting takes pairs apart, so that no rank has a label of its own. Train on certain labels, or choose an "
            "objective that compares pair by pair, such as DPO."
        )
