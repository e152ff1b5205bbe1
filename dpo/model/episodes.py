"""Sampled completions on their way from a rollout to the updates on it, and through a checkpoint in between."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo.data import Example, Message
from dpo.types import Rollout

TOKEN_FIELDS = ("sampler", "reference", "sampler_value", "advantage", "value_target")
"""Fields of an episode that hold one number a completion token."""


@final
@dataclass(frozen=True, eq=False)
class Episode:
    """One completion that the policy sampled, and all that an update reads of it beside the policy as it is then.

    The per-token fields are those of `Rollout`, `(tokens,)` each.
    """

    example: Example
    """The prompt and, as its one completion, what was sampled."""
    score: float
    prompt_index: int
    sampler: Float[Tensor, " tokens"]
    reference: Float[Tensor, " tokens"] | None
    sampler_value: Float[Tensor, " tokens"] | None
    advantage: Float[Tensor, " tokens"] | None = None
    value_target: Float[Tensor, " tokens"] | None = None
    temperature: float = 1.0
    """Of the sampling; all log-probs are at it."""
    demonstration: Example | None = None
    """What goes with it where the objective asks for demonstrations."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.example.prompt

    @property
    def completions(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of what a forward pass scores: the sample, and the demonstration where there is one."""
        shown = () if self.demonstration is None else self.demonstration.completions
        return (*self.example.completions, *shown)

    @property
    def source(self) -> str:
        """`file:row` of the prompt."""
        return self.example.source

    @property
    def weight(self) -> float:
        """Of the example."""
        return self.example.weight

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt and sample."""
        return self.example.prompt, self.example.completions[0]


def record(
    episodes: Sequence[Episode],
    policy: Sequence[Tensor],
    demonstration: Float[Tensor, " batch"] | None = None,
) -> Rollout:
    """Put episodes and what the policy now says of them into the record that an objective reads, padded on the right.

    `policy` holds each episode's log-probs, `(tokens,)`.
    """
    mask = pad_sequence([torch.ones(len(one), dtype=torch.bool) for one in policy], batch_first=True)
    known = {name: [getattr(one, name) for one in episodes] for name in TOKEN_FIELDS}
    padded = {
        name: None if parts[0] is None else pad_sequence(parts, batch_first=True) for name, parts in known.items()
    }
    first = policy[0]
    shown = [one.demonstration for one in episodes if one.demonstration is not None]
    return Rollout(
        policy=pad_sequence(list(policy), batch_first=True),
        completion_mask=mask.to(first.device),
        score=first.new_tensor([one.score for one in episodes]),
        prompt_index=torch.tensor([one.prompt_index for one in episodes], device=first.device),
        demonstration=demonstration,
        demonstration_length=torch.tensor([len(one.completions[0]) for one in shown], device=first.device)
        if demonstration is not None
        else None,
        **padded,  # pyright: ignore[reportArgumentType]  (the names are the record's own)
    )


def unpadded(values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> list[Tensor]:
    """Return each row's numbers where the mask is True."""
    return [row[kept] for row, kept in zip(values, mask, strict=True)]


Item = Example | Episode
"""What an optimiser step is made of."""


def pack(items: Sequence[Item]) -> tuple[dict[str, Tensor], list[Any]]:
    """Return items as tensors and plain JSON, for a checkpoint."""
    plain: list[Any] = []
    for one in items:
        if isinstance(one, Example):
            plain.append({"example": _plain(one)})
            continue
        shown = None if one.demonstration is None else _plain(one.demonstration)
        plain.append(
            {
                "example": _plain(one.example),
                "score": one.score,
                "prompt_index": one.prompt_index,
                "temperature": one.temperature,
                "demonstration": shown,
            }
        )
    tensors: dict[str, Tensor] = {}
    for name in TOKEN_FIELDS:
        parts = [part for one in items if (part := getattr(one, name, None)) is not None]
        if parts:
            tensors[name] = torch.cat(parts).detach().cpu()
    return tensors, plain


def unpack(tensors: Mapping[str, Tensor], plain: Sequence[Any], device: torch.device) -> Sequence[Item]:
    """Return what `pack` was given, bit for bit."""
    examples = [_example(one["example"]) for one in plain]
    if not plain or "score" not in plain[0]:
        return examples
    lengths = [len(one.completions[0]) for one in examples]
    parts = {name: tensors[name].to(device).split(lengths) if name in tensors else None for name in TOKEN_FIELDS}
    return [
        Episode(
            example=example,
            score=one["score"],
            prompt_index=one["prompt_index"],
            temperature=one["temperature"],
            demonstration=None if one["demonstration"] is None else _example(one["demonstration"]),
            **{name: None if split is None else split[n] for name, split in parts.items()},  # pyright: ignore[reportArgumentType]
        )
        for n, (one, example) in enumerate(zip(plain, examples, strict=True))
    ]


def _plain(example: Example) -> dict[str, Any]:
    found = {field.name: getattr(example, field.name) for field in fields(Example)}
    return {
        **found,
        "prompt": list(example.prompt),
        "completions": [list(one) for one in example.completions],
        "texts": list(example.texts),
        "scores": list(example.scores),
        "prompt_messages": [[turn.role, turn.content, turn.extra] for turn in example.prompt_messages],
    }


def _example(plain: Mapping[str, Any]) -> Example:
    return Example(
        **{
            **plain,
            "prompt": tuple(plain["prompt"]),
            "completions": tuple(map(tuple, plain["completions"])),
            "texts": tuple(plain["texts"]),
            "scores": tuple(plain["scores"]),
            "prompt_messages": tuple(Message(*turn) for turn in plain["prompt_messages"]),
        }
    )
