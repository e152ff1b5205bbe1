"""From examples to the record an objective reads: the model's side of `objective(view(batch))`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from dpo.data import Example
from dpo.errors import ConfigError
from dpo.losses import Objective
from dpo.model.base import LanguageModel, Role
from dpo.model.episodes import Episode, Item, record
from dpo.model.forest import Group
from dpo.model.logprobs import NOTHING, Spread, completion_logps
from dpo.model.reference import Key, Reference, batches, summed
from dpo.model.scalar import scores, values
from dpo.types import JudgementLogps, LossInput, PairLogps, RankingScores, Rollout, TokenLogps


def view(model: LanguageModel, reference: Reference, objective: Objective, examples: Sequence[Any]) -> LossInput:
    """Score examples with the policy and return the record `objective` asks for, on the model's device.

    The fields that belong to a whole optimiser step are absent, see `step_fields`.
    """
    return _VIEWS[objective.view](model, reference, objective, examples)


def keys(examples: Sequence[Item]) -> list[Key]:
    """Return every (prompt, completion) of the examples: what their reference log-probs depend on."""
    return [(example.prompt, completion) for example in examples for completion in example.completions]


def tokens(examples: Sequence[Item]) -> int:
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
    tokens: Sequence[Tensor]
    """Each completion's, token by token, `(tokens,)`."""
    collisions: Sequence[Tensor] | None
    """As `TokenLogps.log_collision`; None where not asked for."""
    entropies: Sequence[Tensor] | None = None
    """Each completion's, token by token: the entropy in nats of the distribution that predicts it, without gradient;
    None where not asked for."""


def score(
    model: LanguageModel,
    wanted: Sequence[Key],
    role: Role = "policy",
    spread: Spread = NOTHING,
    temperature: int | float = 1.0,
) -> Scored:
    """Score completions in `role`, in the order given; a prompt, and a completion of it, once however often.

    All that is told is of the distribution at `temperature`, which divides the logits (> 0).
    """
    grouped: dict[Any, dict[Any, int]] = {}
    for prompt, completion in wanted:
        grouped.setdefault(prompt, {}).setdefault(completion, 0)
    place = {
        (prompt, completion): n
        for n, (prompt, completion) in enumerate((p, c) for p, completions in grouped.items() for c in completions)
    }
    forest = model.forest([Group(prompt, list(completions)) for prompt, completions in grouped.items()])
    with model.role(role) as network, model.keeping():
        scored = completion_logps(network, forest, spread=spread, temperature=temperature)
    order, lengths = [place[key] for key in wanted], scored.lengths.tolist()
    index = torch.tensor(order, device=scored.sums.device)

    def placed(values: Tensor) -> list[Tensor]:
        parts = values.split(lengths)
        return [parts[n] for n in order]

    return Scored(
        scored.sums[index],
        scored.lengths[index],
        placed(scored.tokens),
        collisions=None if scored.collisions is None else placed(scored.collisions),
        entropies=None if scored.entropies is None else placed(scored.entropies),
    )


def _pairs(model: LanguageModel, reference: Reference, objective: Objective, examples: Sequence[Example]) -> PairLogps:
    wanted = keys(examples)
    scored = score(model, wanted, spread=Spread(collision=objective.needs_collision))
    chosen, rejected = scored.sums[0::2], scored.sums[1::2]
    known = reference.tokens(wanted) if objective.needs_reference else None
    sums = None if known is None else summed(known).to(chosen.device)
    record = PairLogps(
        policy_chosen=chosen,
        policy_rejected=rejected,
        reference_chosen=None if sums is None else sums[0::2],
        reference_rejected=None if sums is None else sums[1::2],
        chosen_length=scored.lengths[0::2],
        rejected_length=scored.lengths[1::2],
        preference=chosen.new_tensor([example.preference for example in examples]),
        weight=chosen.new_tensor([example.weight for example in examples]),
    )
    if not objective.needs_tokens:
        return record
    return replace(
        record,
        chosen_tokens=_token_logps(scored, known, slice(0, None, 2)),
        rejected_tokens=_token_logps(scored, known, slice(1, None, 2)),
    )


def _judgements(
    model: LanguageModel, reference: Reference, objective: Objective, examples: Sequence[Example]
) -> JudgementLogps:
    if objective.needs_tokens or objective.needs_collision:
        raise ConfigError(
            f"objective: {type(objective).__name__} needs log-probs token by token, which the record of "
            f"{objective.view} does not hold, expected a PairObjective. Use the sums, or score pairs."
        )
    wanted = [(example.prompt, example.completions[0]) for example in examples]
    scored = score(model, wanted)
    return JudgementLogps(
        policy=scored.sums,
        reference=reference.sums(wanted).to(scored.sums.device) if objective.needs_reference else None,
        desirable=torch.tensor([example.desirable for example in examples], device=scored.sums.device),
        length=scored.lengths,
        policy_mismatched=None,
        reference_mismatched=None,
        weight=scored.sums.new_tensor([example.weight for example in examples]),
    )


def _token_logps(scored: Scored, reference: Sequence[Tensor] | None, side: slice) -> TokenLogps:
    """Pad what belongs to one side of the pairs on the right."""

    def padded(values: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(values[side]), batch_first=True)

    policy = padded(scored.tokens)
    return TokenLogps(
        policy=policy,
        reference=None if reference is None else padded(reference).to(policy.device),
        completion_mask=torch.arange(policy.shape[1], device=policy.device) < scored.lengths[side].unsqueeze(1),
        log_collision=None if scored.collisions is None else padded(scored.collisions),
    )


def _rankings(
    model: LanguageModel,
    reference: Reference,  # noqa: ARG001 (every view is called the same way)
    objective: Objective,  # noqa: ARG001
    examples: Sequence[Example],
) -> RankingScores:
    wanted = keys(examples)
    said = scores(model, wanted, model.trained[0])
    ranks = [sorted(set(example.scores), reverse=True).index(one) for example in examples for one in example.scores]
    return RankingScores(
        scores=said,
        rank=torch.tensor(ranks, device=said.device),
        prompt_index=torch.tensor([n for n, one in enumerate(examples) for _ in one.completions], device=said.device),
        margin=said.new_tensor([score for example in examples for score in example.scores]),
        preference=said.new_tensor([example.preference for example in examples]),
        weight=said.new_tensor([example.weight for example in examples]),
    )


def _rollouts(
    model: LanguageModel,
    reference: Reference,  # noqa: ARG001 (an episode holds what its reference said)
    objective: Objective,
    episodes: Sequence[Episode],
) -> Rollout:
    found = _said_by_policy(model, objective, episodes)
    return replace(found, value=_values(model, episodes)) if objective.needs_values else found


def by_role(model: LanguageModel, objective: Objective, episodes: Sequence[Episode]) -> Iterator[tuple[Role, Rollout]]:
    """Yield each role that learns from episodes, with the record in which that role's numbers alone carry a gradient.

    The policy comes first, beside what the value role said when the episodes were sampled; then the value role, beside
    the policy's log-probs as constants: the record as `view` returns it. Whoever does a backward pass in between holds
    the activations of one role at a time. The two gradients are those of the whole record, as the policy's depends on
    `sampler_value` and never on `value` (`dpo.losses.RolloutObjective`).
    """
    found = _said_by_policy(model, objective, episodes)
    yield "policy", replace(found, value=found.sampler_value)
    found = replace(found, **{name: one.detach() for name, one in policy_logps(found).items()})
    yield "value", replace(found, value=_values(model, episodes))


def _said_by_policy(model: LanguageModel, objective: Objective, episodes: Sequence[Episode]) -> Rollout:
    policy = score(model, [one.key for one in episodes], temperature=episodes[0].temperature).tokens
    shown = None
    if objective.needs_demonstrations:
        shown = score(model, keys([one.demonstration for one in episodes if one.demonstration is not None])).sums
    return record(episodes, policy, shown)


def _values(model: LanguageModel, episodes: Sequence[Episode]) -> Float[Tensor, "batch tokens"]:
    return pad_sequence(values(model, [one.key for one in episodes]), batch_first=True)


_VIEWS: Mapping[str, Callable[..., LossInput]] = {
    "pairs": _pairs,
    "judgements": _judgements,
    "demonstrations": _judgements,
    "comparisons": _rankings,
    "rankings": _rankings,
    "rollouts": _rollouts,
}


Record = TypeVar("Record", PairLogps, JudgementLogps, RankingScores, Rollout)


def examples_in(record: LossInput) -> int:
    """Return the number of examples in a record: pairs, judgements, prompts of rankings, completions of a rollout."""
    if isinstance(record, PairLogps):
        return len(record.chosen_length)
    if isinstance(record, RankingScores):
        return int(record.prompt_index.max()) + 1
    return len(record.length if isinstance(record, JudgementLogps) else record.score)


def concatenate(records: Sequence[Record], batches: Sequence[Sequence[int]]) -> Record:
    """Join the records of micro-batches, without their gradients, in the order that the indices in `batches` name."""
    if isinstance(records[0], RankingScores):
        return _concatenated_rankings(records, batches)  # pyright: ignore  (all are what the first one is)
    order = torch.tensor([n for batch in batches for n in batch]).argsort()

    def joined(parts: Sequence[Any]) -> Any:
        if parts[0] is None:
            return None
        if isinstance(parts[0], TokenLogps):
            return TokenLogps(**{f.name: joined([getattr(part, f.name) for part in parts]) for f in fields(TokenLogps)})
        width = max(part.shape[1] for part in parts) if parts[0].ndim == 2 else None
        if width is not None:  # tokens, padded on the right: 0 where nothing is scored, False in a mask
            parts = [pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.cat([part.detach() for part in parts])[order.to(parts[0].device)]

    return type(records[0])(**{f.name: joined([getattr(r, f.name) for r in records]) for f in fields(records[0])})


def _concatenated_rankings(records: Sequence[RankingScores], batches: Sequence[Sequence[int]]) -> RankingScores:
    """Join rankings, whose completions stand behind one another, in the order of the examples."""
    places = {
        example: (record, n) for record, batch in zip(records, batches, strict=True) for n, example in enumerate(batch)
    }
    ordered = [places[example] for example in sorted(places)]

    def joined(name: str) -> Any:
        if getattr(records[0], name) is None:
            return None
        parts = [getattr(record, name) for record, _ in ordered]
        if name in ("preference", "weight"):
            return torch.stack([part[n] for part, (_, n) in zip(parts, ordered, strict=True)])
        return torch.cat([p.detach()[one.prompt_index == n] for p, (one, n) in zip(parts, ordered, strict=True)])

    counts = torch.stack([(record.prompt_index == n).sum() for record, n in ordered])
    index = torch.arange(len(ordered), device=counts.device).repeat_interleave(counts)
    names = ("scores", "rank", "margin", "preference", "weight")
    return RankingScores(prompt_index=index, **{name: joined(name) for name in names})


def step_fields(
    model: LanguageModel,
    reference: Reference,
    objective: Objective,
    examples: Sequence[Any],
    batches: Sequence[Sequence[int]],
    mean_log_ratio: float,
) -> dict[str, Tensor]:
    """Return the fields of a record that belong to a whole optimiser step and that `view` leaves out.

    Each judgement's other completion is scored without gradient: an objective reads these as a mean, held constant,
    and one estimate from all examples serves every micro-batch, so that the loss does not depend on how they are
    divided. Empty where the objective asks for none.
    """
    found: dict[str, Tensor] = {}
    if objective.view == "rollouts":
        lengths = [len(one.key[1]) for one in examples]
        found["tokens_per_completion"] = torch.tensor(sum(lengths) / len(lengths), device=model.device)
    if objective.needs_mean_log_ratio:
        found["mean_log_ratio"] = torch.tensor(mean_log_ratio, device=model.device)
    if objective.needs_mismatched:
        wanted = [(example.prompt, example.completions[1]) for example in examples]
        order = torch.tensor([n for batch in batches for n in batch]).argsort()
        parts = [[wanted[n] for n in batch] for batch in batches]
        with torch.no_grad():
            policy = torch.cat([score(model, part).sums for part in parts])
        order = order.to(policy.device)
        found["policy_mismatched"] = policy[order]
        found["reference_mismatched"] = torch.cat([reference.sums(part) for part in parts]).to(policy.device)[order]
    return found


TOKENS = {"policy_chosen": "chosen_tokens", "policy_rejected": "rejected_tokens"}
"""Fields of a record that hold the same log-probs as sums and token by token."""


def policy_logps(record: LossInput) -> dict[str, Tensor]:
    """Return what a record holds that carries a gradient, by the name of its field."""
    if isinstance(record, JudgementLogps):
        return {"policy": record.policy}
    if isinstance(record, RankingScores):
        return {"scores": record.scores}
    if isinstance(record, Rollout):
        known = {name: getattr(record, name) for name in ("policy", "value", "demonstration")}
        return {name: one for name, one in known.items() if one is not None}
    found = {name: getattr(record, name) for name in TOKENS}
    return found | {field: one.policy for field in TOKENS.values() if (one := getattr(record, field)) is not None}


def with_policy_logps(record: Record, logps: Mapping[str, Tensor]) -> Record:
    """Return the record with others in the places that `policy_logps` names."""
    tokens = [] if isinstance(record, Rollout) else TOKENS.values()
    changed = {n: replace(getattr(record, n), policy=one) if n in tokens else one for n, one in logps.items()}
    return replace(record, **changed)


def log_ratios(record: LossInput) -> list[Tensor]:
    """Return the log-ratios of policy to reference in nats, `(batch,)` of each side; none without a reference."""
    if isinstance(record, RankingScores | Rollout):
        return []
    if isinstance(record, PairLogps):
        sides = [(record.policy_chosen, record.reference_chosen), (record.policy_rejected, record.reference_rejected)]
    else:
        sides = [(record.policy, record.reference)]
    return [policy.detach() - reference for policy, reference in sides if reference is not None]


def drift(record: LossInput) -> float:
    """Return how far the policy's log-probs of completions are from the reference's, in nats per token.

    sum |log π(y|x) - log π_ref(y|x)| / sum |y| over the completions: 0 where the policy starts at its reference, up to
    the rounding of different batch shapes. The largest of a batch would be no measure of that: in bfloat16 a completion
    of ten tokens is rounded by 0.1 a token now and then, as much as a wrong reference moves all of them.
    """
    if isinstance(record, RankingScores | Rollout):
        return 0.0
    pair = isinstance(record, PairLogps)
    lengths = [record.chosen_length, record.rejected_length] if pair else [record.length]
    ratios = log_ratios(record)
    tokens = sum(length.sum().item() for length in lengths[: len(ratios)])
    return sum(ratio.abs().sum().item() for ratio in ratios) / tokens if tokens else 0.0


def all_sums(model: LanguageModel, wanted: Sequence[Key], role: Role) -> list[float]:
    """Return the log-prob of each completion in `role`, nats, without dropout and gradient; any number of them."""
    found: dict[Key, float] = {}
    with model.reading(role):
        for batch in batches(wanted, model.base.layout):
            some = [(tuple(group.prompt), tuple(one)) for group in batch for one in group.completions]
            found.update(zip(some, score(model, some, role).sums.tolist(), strict=True))
    return [found[key] for key in wanted]


@final
class FreshReference(Reference):
    """A role of the model, scored anew at every call: for a reference that moves, or completions never seen before."""

    def __init__(self, model: LanguageModel, role: Role) -> None:
        """Score with `role` of `model`: "reference", or "moving" where it was started with one."""
        self._model, self._role = model, role

    def prepare(self, keys: Iterable[Key], progress: bool = False) -> None:
        """Nothing is scored ahead."""

    def tokens(self, keys: Sequence[Key]) -> list[Tensor]:
        """Score the completions in the role, without dropout and gradient."""
        with self._model.reading(self._role):
            return list(score(self._model, keys, self._role).tokens)
