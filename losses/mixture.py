"""A weighted sum of objectives."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from dpo.losses.bcopair import BCOPair
from dpo.losses.dpo import DPO
from dpo.losses.objective import DemonstrationObjective, MovesReference, Number, Objective, PairObjective, Part
from dpo.losses.reduce import expected_loss, pair_output
from dpo.losses.sft import SFT
from dpo.types import JudgementLogps, LossOutput, PairLogps

NEEDS = (
    "needs_reference",
    "needs_mismatched",
    "needs_tokens",
    "needs_collision",
    "needs_mean_log_ratio",
    "batch_coupled",
    "needs_certain_labels",
)
"""What the mixture asks for as soon as one of its parts does."""


@final
@dataclass(frozen=True, kw_only=True)
class Mixture(PairObjective):
    """Several objectives on the same pairs; by default DPO, BCO and imitation, as in mixed preference optimisation.

    loss = Σ_k w_k loss_k. A part that reads demonstrations scores the preferred completion, which is the chosen one
    with probability p = P(w preferred). Where the policy equals the reference, the default's loss is
    0.8 ln 2 + 0.2 * 2 ln 2 - a_w in its first step, a = log π(y|x) / |y|.

    Paper: arXiv:2411.10442.
    Differs: the paper's labels are certain (p = 1). Its BCO term shifts rewards by their moving average, as `BCOPair`
    does; common code leaves the shift out.
    """

    parts: tuple[Part, ...] = (
        Part(weight=0.8, objective=DPO()),
        Part(weight=0.2, objective=BCOPair()),
        Part(weight=1.0, objective=SFT()),
    )
    """The terms, at least one of them over pairs. The rewards are those of the first."""

    needs_reference: bool = field(init=False, repr=False)
    needs_mismatched: bool = field(init=False, repr=False)
    needs_tokens: bool = field(init=False, repr=False)
    needs_collision: bool = field(init=False, repr=False)
    needs_mean_log_ratio: bool = field(init=False, repr=False)
    batch_coupled: bool = field(init=False, repr=False)
    needs_certain_labels: bool = field(init=False, repr=False)
    pulls_at_reference: bool = field(init=False, repr=False)
    paper = "arXiv:2411.10442"

    def __post_init__(self) -> None:
        _require_parts(self.parts)
        objectives = [part.objective for part in self.parts]
        for name in NEEDS:
            object.__setattr__(self, name, any(getattr(objective, name) for objective in objectives))
        object.__setattr__(self, "pulls_at_reference", all(objective.pulls_at_reference for objective in objectives))

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; "custom/dpo_loss" is the mean loss of the part DPO, before its w_k."""
        terms = [_term(part.objective, logps) for part in self.parts]
        weighted = [part.weight * losses for part, (losses, _) in zip(self.parts, terms, strict=True)]
        # Every part has applied the example's weight already; a second time it would count squared.
        out = pair_output(replace(logps, weight=None), torch.stack(weighted).sum(0), terms[0][1])
        own = {name: losses.detach().mean() for name, (losses, _) in zip(_names(self.parts), terms, strict=True)}
        return replace(out, metrics={**out.metrics, **own})


def _term(objective: Objective, logps: PairLogps) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch 2"]]:
    """Return a part's losses, the example's weight applied, and its rewards (chosen, rejected)."""
    if isinstance(objective, DemonstrationObjective):
        sides = (
            (logps.policy_chosen, logps.reference_chosen, logps.chosen_length),
            (logps.policy_rejected, logps.reference_rejected, logps.rejected_length),
        )
        chosen, rejected = (objective(_demonstrations(logps, *side)) for side in sides)
        losses = expected_loss(logps, chosen.losses, rejected.losses)
        return losses, torch.stack([chosen.rewards, rejected.rewards], dim=1)
    out = objective(logps)
    return out.losses, out.rewards


def _demonstrations(logps: PairLogps, policy: Tensor, reference: Tensor | None, length: Tensor) -> JudgementLogps:
    return JudgementLogps(
        policy=policy,
        reference=reference,
        desirable=torch.ones_like(policy, dtype=torch.bool),
        length=length,
        policy_mismatched=None,
        reference_mismatched=None,
        weight=logps.weight,
        mean_log_ratio=logps.mean_log_ratio,
    )


def _names(parts: tuple[Part, ...]) -> list[str]:
    """Return the metric of each part, numbered from 1 where several have the same class name."""
    names = [type(part.objective).__name__.lower() for part in parts]
    total, seen, metrics = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        metrics.append(f"custom/{name}_loss" + (f"_{seen[name]}" if total[name] > 1 else ""))
    return metrics


def _require_parts(parts: tuple[Part, ...]) -> None:
    """Refuse parts that are none, or that do not add up to an objective over pairs."""
    if not isinstance(parts, tuple) or not parts or not all(isinstance(part, Part) for part in parts):
        raise ValueError(
            f"Mixture.parts must be a tuple of one Part or more, got {parts!r}: "
            "write parts=(Part(weight=0.8, objective=DPO()), ...)"
        )
    for place, part in enumerate(parts):
        weight, objective = part.weight, part.objective
        if isinstance(weight, bool) or not isinstance(weight, Number) or not math.isfinite(weight) or weight <= 0:
            raise ValueError(
                f"Mixture.parts[{place}].weight must be a finite number > 0, got {weight!r}: leave out what is to "
                "weigh nothing"
            )
        if isinstance(objective, Mixture):
            raise ValueError(
                f"Mixture.parts[{place}].objective must be no mixture itself, got {objective!r}: write its parts out, "
                "each with the product of the weights"
            )
        if isinstance(objective, MovesReference):
            raise ValueError(
                f"Mixture.parts[{place}].objective must leave the reference in place, got {objective!r}: the other "
                "parts compare with the same reference; train it alone, or take DPO in its place"
            )
        if not isinstance(objective, PairObjective | DemonstrationObjective):
            raise ValueError(
                f"Mixture.parts[{place}].objective must read pairs or demonstrations, got {objective!r}: pairs hold no "
                "judgements; take its form for pairs, as BCOPair for BCO"
            )
    if not any(isinstance(part.objective, PairObjective) for part in parts):
        raise ValueError(
            f"Mixture.parts must hold an objective that compares pairs, got {parts!r}: train demonstrations by "
            "themselves, or add one, as DPO"
        )
