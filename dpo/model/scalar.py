"""The roles that say a number: a reward of each completion, a value before each of its tokens."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from dpo.cache import hash_file
from dpo.model.base import HEAD_FILE, LanguageModel, Role
from dpo.model.forest import Group
from dpo.model.logprobs import completion_hidden, wide_dtype
from dpo.model.reference import Key
from dpo.progress import bar
from dpo.rewards import Answer, Reward
from dpo.rewards.ensemble import Combination, combined

Place = Literal["source", "last"]
"""Where a head reads: at the position that predicts each token, or at each completion's own last token."""


def values(model: LanguageModel, wanted: Sequence[Key], role: Role = "value") -> list[Tensor]:
    """Return what `role` expects before each token of each completion is written, `(tokens,)`, in the order asked for.

    It reads the state that predicts the token, so that it has seen all before and nothing after.
    """
    lengths = [len(completion) for _, completion in wanted]
    return list(_numbers(model, wanted, role, "source").split(lengths))


def scores(model: LanguageModel, wanted: Sequence[Key], role: Role) -> Float[Tensor, " completions"]:
    """Return what `role` says of each whole completion, at its last token, in the order asked for."""
    return _numbers(model, wanted, role, "last")


def _numbers(model: LanguageModel, wanted: Sequence[Key], role: Role, place: Place) -> Tensor:
    """Return the head's numbers, flat, in the order asked for; float32, also on a base in half precision."""
    grouped: dict[Any, list[int]] = {}
    for n, (prompt, _) in enumerate(wanted):
        grouped.setdefault(prompt, []).append(n)
    groups = [Group(prompt, [wanted[n][1] for n in members]) for prompt, members in grouped.items()]
    with model.role(role) as network, model.keeping():
        hidden = completion_hidden(network, model.forest(groups))[0 if place == "source" else 1]
    head = model.heads[role]
    numbers = torch.nn.functional.linear(hidden.to(wide_dtype(head.weight)), head.weight, head.bias).squeeze(1)
    asked = [n for members in grouped.values() for n in members]
    sizes = [len(wanted[n][1]) if place == "source" else 1 for n in asked]
    parts = dict(zip(asked, numbers.split(sizes), strict=True))
    return torch.cat([parts[n] for n in range(len(wanted))])


def fingerprint(folder: Path) -> str:
    """Return a hash of a reward model's files: equal where two folders hold one and the same."""
    parts = [hash_file(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors", HEAD_FILE)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@final
class LearnedReward(Reward):
    """Reward roles on the policy's own base, alone or as an ensemble."""

    def __init__(
        self,
        model: LanguageModel,
        roles: Sequence[Role],
        combination: Combination,
        variance_weight: float = 0.0,
        batch_size: int = 16,
    ) -> None:
        """Score with `roles` of `model`, `batch_size` answers at once."""
        self._model, self._roles = model, tuple(roles)
        self._combination: Combination = combination
        self._variance_weight, self._batch_size = variance_weight, batch_size
        self.members = len(self._roles)
        """Reward models that are combined."""
        self.disagreement: list[float] = []
        """Standard deviation between the members, for each answer of the last call, in units of reward."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return one number an answer: of the one role, or of all combined."""
        members = [self._of(role, answers) for role in self._roles]
        found, self.disagreement = combined(members, self._combination, self._variance_weight)
        return found

    def _of(self, role: Role, answers: Sequence[Answer]) -> list[float]:
        found: list[float] = []
        with self._model.reading(role):
            for start in range(0, len(answers), self._batch_size):
                wanted = [one.key for one in answers[start : start + self._batch_size]]
                found += scores(self._model, wanted, role).tolist()
        return found


@torch.no_grad()
def normalise(model: LanguageModel, role: Role, wanted: Sequence[Key], batch_size: int = 16) -> tuple[float, float]:
    """Give the scores of `wanted` mean 0 and deviation 1, by scaling and shifting the role's head.

    Differences of scores keep their order, so that accuracy does not change. Ziegler et al. 2019 (arXiv:1909.08593,
    section 2) normalise on samples of the reference.

    Returns:
        the mean and the standard deviation as they were; a deviation of 0 is left as it is.
    """
    parts: list[Tensor] = []
    with model.reading(role), bar(total=len(wanted), name="reward normalisation", unit="answer") as shown:
        for start in range(0, len(wanted), batch_size):
            parts.append(scores(model, wanted[start : start + batch_size], role))
            shown.update(len(parts[-1]))
    known = torch.cat(parts).double()
    mean, deviation = known.mean().item(), known.std(correction=0).item()
    head, scale = model.heads[role], deviation if deviation > 0 else 1.0
    head.weight.div_(scale)
    head.bias.sub_(mean).div_(scale)
    return mean, deviation
