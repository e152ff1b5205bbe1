"""From examples to the record an objective reads: the model's side of `objective(view(batch))`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpo.data import Example
from dpo.losses import Objective
from dpo.model.base import LanguageModel
from dpo.model.forest import Forest, Group
from dpo.model.logprobs import CompletionLogps, completion_logps
from dpo.model.reference import Key, ReferenceLogps
from dpo.types import JudgementLogps, LossInput, PairLogps


def view(
    model: LanguageModel, reference: ReferenceLogps, objective: Objective, examples: Sequence[Example]
) -> LossInput:
    """Score examples with the policy and return the record `objective` asks for, on the model's device."""
    return _VIEWS[objective.view](model, reference if objective.needs_reference else None, objective, examples)


def keys(examples: Sequence[Example]) -> list[Key]:
    """Return every (prompt, completion) of the examples: what their reference log-probs depend on."""
    return [(example.prompt, completion) for example in examples for completion in example.completions]


def tokens(examples: Sequence[Example]) -> int:
    """Count the tokens of the examples, a shared prompt once."""
    return sum(len(example.prompt) + sum(map(len, example.completions)) for example in examples)


def _pairs(
    model: LanguageModel,
    reference: ReferenceLogps | None,
    objective: Objective,  # noqa: ARG001 (every view has one signature)
    examples: Sequence[Example],
) -> PairLogps:
    scored = _score(model, [Group(example.prompt, example.completions) for example in examples])
    chosen, rejected = scored.sums[0::2], scored.sums[1::2]
    known = None if reference is None else reference.sums(keys(examples))
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


def _judgements(
    model: LanguageModel, reference: ReferenceLogps | None, objective: Objective, examples: Sequence[Example]
) -> JudgementLogps:
    own = [(example.prompt, example.completions[0]) for example in examples]
    scored = _score(model, [Group(prompt, [completion]) for prompt, completion in own])
    policy_mismatched = reference_mismatched = None
    if objective.needs_mismatched:
        other = [(example.prompt, example.completions[1]) for example in examples]
        with torch.no_grad():  # detached in the objective, so no backward pass is paid for it
            policy_mismatched = _score(model, [Group(prompt, [completion]) for prompt, completion in other]).sums
        reference_mismatched = None if reference is None else reference.sums(other)
    return JudgementLogps(
        policy=scored.sums,
        reference=None if reference is None else reference.sums(own),
        desirable=torch.tensor([example.desirable for example in examples], device=scored.sums.device),
        length=scored.lengths,
        policy_mismatched=policy_mismatched,
        reference_mismatched=reference_mismatched,
        weight=scored.sums.new_tensor([example.weight for example in examples]),
    )


_VIEWS: Mapping[str, Callable[..., LossInput]] = {
    "pairs": _pairs,
    "judgements": _judgements,
    "demonstrations": _judgements,
}


def _score(model: LanguageModel, groups: Sequence[Group]) -> CompletionLogps:
    forest = Forest.padded(groups, model.pad_id).to(model.device)
    with model.role("policy") as network:
        return completion_logps(network, forest)


Record = TypeVar("Record", PairLogps, JudgementLogps)


def concatenate(records: Sequence[Record]) -> Record:
    """Join records of one kind along the batch, so that an objective can be read over a whole dataset at once."""

    def joined(name: str) -> Any:
        parts = [getattr(record, name) for record in records]
        return None if parts[0] is None else torch.cat(parts)

    return type(records[0])(**{f.name: joined(f.name) for f in fields(records[0])})


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
