"""The packed batch: prompts from which completions branch.

This file holds the only label shift of the project. Everything after it works on `source` (where a token is
predicted), `target` (the token) and `sequence` (the completion it belongs to).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import final

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
class Forest:
    """A batch of groups laid out in rows, and the index that finds every completion token's prediction again.

    The padded layout gives every completion a row of its own, prompt repeated: it runs on any causal language model
    and is what every faster layout must equal.
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
    completions: int
    """Number of completions in the batch."""

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
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "completions"}
        return replace(self, **tensors)

    @classmethod
    def padded(cls, groups: Sequence[Group], pad_id: int) -> "Forest":
        """Lay every completion out in a row of its own, padded on the right.

        Raises:
            ValueError: where a prompt or a completion is empty: there is nothing to predict from, or to predict.
        """
        rows = [(g, b, group) for g, group in enumerate(groups) for b in range(len(group.completions))]
        if not rows:
            raise ValueError("Forest.padded: got no completions, expected at least one")
        time = max(len(group.prompt) + len(group.completions[b]) for _, b, group in rows)
        input_ids = torch.full((len(rows), time), pad_id)
        group_of = torch.full((len(rows), time), -1)
        branch = torch.zeros(len(rows), time, dtype=torch.long)
        source, target, sequence = [], [], []
        for row, (g, b, group) in enumerate(rows):
            prompt, completion = group.prompt, group.completions[b]
            if not prompt or not completion:
                part = "prompt" if not prompt else f"completion {b}"
                raise ValueError(f"Forest.padded: {part} of group {g} is empty, expected at least one token")
            start, end = len(prompt), len(prompt) + len(completion)
            input_ids[row, :end] = torch.tensor([*prompt, *completion])
            group_of[row, :end] = g
            branch[row, start:end] = b + 1
            source.append(torch.arange(start - 1, end - 1) + row * time)  # the label shift
            target.append(input_ids[row, start:end])
            sequence.append(torch.full((len(completion),), row))
        return cls(
            input_ids=input_ids,
            position_ids=torch.arange(time).expand(len(rows), time),
            group=group_of,
            branch=branch,
            source=torch.cat(source),
            target=torch.cat(target),
            sequence=torch.cat(sequence),
            completions=len(rows),
        )
