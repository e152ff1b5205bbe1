"""The batch: prompts from which completions branch.

This file holds the only label shift of the project. Everything after it works on `source` (where a token is
predicted), `target` (the token) and `sequence` (the completion it belongs to).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@final
@dataclass(frozen=True)
class Group:
    """One prompt and the completions that branch from it, as token ids (each at least one token long)."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]


@final
@dataclass(frozen=True)
class Tree:
    """Where a group lies in a packed row: its prompt from `start`, then its completions one behind the other."""

    start: int
    """Column of the prompt's first token."""
    prompt: int
    """Tokens of the prompt (>= 1)."""
    completions: tuple[int, ...]
    """Tokens of each completion (>= 1)."""


@final
@dataclass(frozen=True)
class Forest:
    """A batch of groups laid out in rows, and the index that finds every completion token's prediction again.

    Two layouts hold the same groups. `padded` gives every completion a row of its own, prompt repeated: it runs on any
    causal language model. `packed` stores each prompt once in a single row without padding, and needs the attention
    of `dpo.model.tree_attention`.
    """

    input_ids: Int[Tensor, "rows time"]
    position_ids: Int[Tensor, "rows time"]
    """Each completion restarts at its prompt's end."""
    group: Int[Tensor, "rows time"]
    """Index of the group; -1 is padding."""
    branch: Int[Tensor, "rows time"]
    """0 is prompt, 1..K the completion within its group."""
    source: Int[Tensor, " tokens"]
    """Flat index (row * time + column) of the position whose hidden state predicts the token."""
    target: Int[Tensor, " tokens"]
    """The completion token predicted there."""
    sequence: Int[Tensor, " tokens"]
    """Index of the token's completion, counted over all groups in order."""
    last: Int[Tensor, " completions"]
    """Flat index of each completion's own last token."""
    completions: int
    """Number of completions in the batch."""
    trees: tuple[Tree, ...] = ()
    """Of a packed row, in order; empty for padded rows."""

    @property
    def attention_mask(self) -> Bool[Tensor, "rows time"]:
        """True where a row holds a real token."""
        return self.group >= 0

    @property
    def lengths(self) -> Int[Tensor, " completions"]:
        """Completion tokens of each completion."""
        return torch.bincount(self.sequence, minlength=self.completions)

    def to(self, device: torch.device) -> "Forest":
        """Return the same batch on `device`."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in parts.items() if isinstance(v, Tensor)})

    @classmethod
    def padded(cls, groups: Sequence[Group], pad_id: int) -> "Forest":
        """Lay every completion out in a row of its own, padded on the right.

        Raises:
            ValueError: where a prompt or a completion is empty: there is nothing to predict from, or to predict.
        """
        _refuse_empty(groups, "padded")
        rows = [(g, b, group) for g, group in enumerate(groups) for b in range(len(group.completions))]
        time = max(len(group.prompt) + len(group.completions[b]) for _, b, group in rows)
        input_ids = torch.full((len(rows), time), pad_id)
        group_of = torch.full((len(rows), time), -1)
        branch = torch.zeros(len(rows), time, dtype=torch.long)
        source: list[int] = []
        last: list[int] = []
        for row, (g, b, group) in enumerate(rows):
            start, end = len(group.prompt), len(group.prompt) + len(group.completions[b])
            input_ids[row, :end] = torch.tensor([*group.prompt, *group.completions[b]])
            group_of[row, :end] = g
            branch[row, start:end] = b + 1
            source += _predicting(row * time + start - 1, row * time + start, end - start)
            last.append(row * time + end - 1)
        return cls(
            input_ids=input_ids,
            position_ids=torch.arange(time).expand(len(rows), time),
            group=group_of,
            branch=branch,
            source=torch.tensor(source),
            last=torch.tensor(last),
            **_targets(groups),
        )

    @classmethod
    def packed(cls, groups: Sequence[Group]) -> "Forest":
        """Lay all groups out in one row: `prompt | completion 1 | ... | completion K | next group ...`.

        Raises:
            ValueError: where a prompt or a completion is empty: there is nothing to predict from, or to predict.
        """
        _refuse_empty(groups, "packed")
        ids: list[int] = []
        positions: list[int] = []
        group_of: list[int] = []
        branch: list[int] = []
        source: list[int] = []
        last: list[int] = []
        trees: list[Tree] = []
        for g, group in enumerate(groups):
            start, depth = len(ids), len(group.prompt)
            trees.append(Tree(start, depth, tuple(map(len, group.completions))))
            for b, part in enumerate((group.prompt, *group.completions)):
                if b > 0:
                    source += _predicting(start + depth - 1, len(ids), len(part))
                    last.append(len(ids) + len(part) - 1)
                positions += range(depth, depth + len(part)) if b > 0 else range(depth)
                group_of += [g] * len(part)
                branch += [b] * len(part)
                ids += part
        return cls(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            group=torch.tensor([group_of]),
            branch=torch.tensor([branch]),
            source=torch.tensor(source),
            last=torch.tensor(last),
            trees=tuple(trees),
            **_targets(groups),
        )


def _refuse_empty(groups: Sequence[Group], layout: str) -> None:
    if not any(group.completions for group in groups):
        raise ValueError(f"Forest.{layout}: got no completions, expected at least one")
    for g, group in enumerate(groups):
        for b, part in enumerate((group.prompt, *group.completions)):
            if not len(part):
                name = f"completion {b - 1}" if b > 0 else "prompt"
                raise ValueError(f"Forest.{layout}: {name} of group {g} is empty, expected at least one token")


def _predicting(prompt_end: int, start: int, length: int) -> list[int]:
    """Return the positions that predict a completion at `start`: the label shift.

    Its first token is predicted where its prompt ends, which need not be the position before it.
    """
    return [prompt_end, *range(start, start + length - 1)]


def _targets(groups: Sequence[Group]) -> dict[str, Any]:
    """Return what does not depend on the layout: tokens to predict, and whose they are."""
    completions = [completion for group in groups for completion in group.completions]
    return {
        "target": torch.tensor([token for completion in completions for token in completion]),
        "sequence": torch.tensor([n for n, completion in enumerate(completions) for _ in completion]),
        "completions": len(completions),
    }
