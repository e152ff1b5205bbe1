"""From examples to the record an objective reads: the model's side of `objective(view(batch))`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo.data import Example
from dpo.losses import Objective
from dpo.model.base import LanguageModel, Role
from dpo.model.forest import Group
from dpo.model.logprobs import completion_logps
from dpo.model.reference import Key, ReferenceLogps
from dpo.types import JudgementLogps, LossInput, PairLogps


def view(
    model: LanguageModel, reference: ReferenceLogps, objective: Objective, examples: Sequence[Example]
) -> LossInput:
    """Score examples with the policy and return the record `objective` asks for, on the model's device.

    The mismatched log-probs of a judgement record are absent: they belong to a whole optimiser step, see `mismatched`.
    """
    return _VIEWS[objective.view](model, reference if objective.needs_reference else None, examples)


def keys(examples: Sequence[Example]) -> list[Key]:
    """Return every (prompt, completion) of the examples: what their reference log-probs depend on."""
    return [(example.prompt, completion) for example in examples for completion in example.completions]


def tokens(examples: Sequence[Example]) -> int:
    """Count the tokens of the examples, a shared prompt once."""
    return sum(len(example.prompt) + sum(map(len, example.completions)) for example in examples)


@final
@dataclass(frozen=True)
class Scored:
    """Log-probs of completions in the order they were asked for."""

    sums: Float[Tensor, " completions"]
    """Summed over each completion's tokens, in nats."""
    lengths: Int[Tensor, " completions"]
    """Completion tokens."""


def score(model: LanguageModel, wanted: Sequence[Key], role: Role = "policy") -> Scored:
    """Score completions in `role`, in the order given; a prompt, and a completion of it, once however often."""
    grouped: dict[Any, dict[Any, int]] = {}
    for prompt, completion in wanted:
        grouped.setdefault(prompt, {}).setdefault(completion, 0)
    place = {
        (prompt, completion): n
        for n, (prompt, completion) in enumerate((p, c) for p, completions in grouped.items() for c in completions)
    }
    forest = model.forest([Group(prompt, list(completions)) for prompt, completions in grouped.items()])
    with model.role(role) as network, model.keeping():
        scored = completion_logps(network, forest)
    index = torch.tensor([place[key] for key in wanted], device=scored.sums.device)
    return Scored(scored.sums[index], scored.lengths[index])


def _pairs(model: LanguageModel, reference: ReferenceLogps | None, examples: Sequence[Example]) -> PairLogps:
    wanted = keys(examples)
    scored = score(model, wanted)
    chosen, rejected = scored.sums[0::2], scored.sums[1::2]
    known = None if reference is None else reference.sums(wanted)
    return PairLogps(
        policy_chosen=chosen,
        policy_rejected=rejected,
        reference_chosen=None if known is None else known[0::2],
        reference_rejected=None if known is None else known[1::2],
        chosen_length=scored.lengths[0::2],
        rejected_length=scored.lengths[1::2],
        preference=chosen.new_tensor([example.preference for example in examples]),
        weight=chosen.new_tensor([example.weight for example in examples]),
    )


def _judgements(model: LanguageModel, reference: ReferenceLogps | None, examples: Sequence[Example]) -> JudgementLogps:
    wanted = [(example.prompt, example.completions[0]) for example in examples]
    scored = score(model, wanted)
    return JudgementLogps(
        policy=scored.sums,
        reference=None if reference is None else reference.sums(wanted),
        desirable=torch.tensor([example.desirable for example in examples], device=scored.sums.device),
        length=scored.lengths,
        policy_mismatched=None,
        reference_mismatched=None,
        weight=scored.sums.new_tensor([example.weight for example in examples]),
    )


_VIEWS: Mapping[str, Callable[..., LossInput]] = {
    "pairs": _pairs,
    "judgements": _judgements,
    "demonstrations": _judgements,
}


Record = TypeVar("Record", PairLogps, JudgementLogps)


def concatenate(records: Sequence[Record], batches: Sequence[Sequence[int]]) -> Record:
    """Join the records of micro-batches, without their gradients, in the order that the indices in `batches` name."""
    order = torch.tensor([n for batch in batches for n in batch]).argsort()

    def joined(name: str) -> Any:
        parts = [getattr(record, name) for record in records]
        return None if parts[0] is None else torch.cat([part.detach() for part in parts])[order.to(parts[0].device)]

    return type(records[0])(**{f.name: joined(f.name) for f in fields(records[0])})


def mismatched(
    model: LanguageModel,
    reference: ReferenceLogps,
    objective: Objective,
    examples: Sequence[Example],
    batches: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """Score each judgement's other completion, without gradient: the fields of its record that `view` leaves out.

    An objective reads them as a mean, held constant: one estimate from all examples serves every micro-batch, so that
    the loss does not depend on how they are divided. Empty where the objective asks for none.
    """
    if not objective.needs_mismatched:
        return {}
    wanted = [(example.prompt, example.completions[1]) for example in examples]
    order = torch.tensor([n for batch in batches for n in batch]).argsort()
    with torch.no_grad():
        parts = [score(model, [wanted[n] for n in batch]).sums for batch in batches]
    policy = torch.cat(parts)
    return {"policy_mismatched": policy[order.to(policy.device)], "reference_mismatched": reference.sums(wanted)}


def largest_drift(record: LossInput) -> float:
    """Return the largest |policy - reference| log-prob of a completion, in nats per token.

    It is 0 where the policy starts at its reference, up to the rounding of different batch shapes.
    """
    if isinstance(record, PairLogps):
        columns = [
            (record.policy_chosen, record.reference_chosen, record.chosen_length),
            (record.policy_rejected, record.reference_rejected, record.rejected_length),
        ]
    else:
        columns = [(record.policy, record.reference, record.length)]
    drifts: list[Tensor] = [((p - r) / n).abs().max() for p, r, n in columns if r is not None]
    return max((drift.item() for drift in drifts), default=0.0)
