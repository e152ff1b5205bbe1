"""Reference log-probs: each completion scored once, however many epochs or objectives read it."""

from collections.abc import Iterable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dpo.model.base import Base, LanguageModel
from dpo.model.forest import Forest, Group
from dpo.model.logprobs import completion_logps

Key = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt ids and completion ids: what a reference log-prob depends on, for one model."""

References = dict[tuple[Base, str], dict[Key, Tensor]]
"""Per-token log-probs by loaded base, what the reference on it is, and completion: shared between runs."""

TOKEN_BUDGET = 4096
"""Padded tokens scored at once; without gradients this is far below what a training step holds."""


@final
class ReferenceLogps:
    """Scores completions with the model in its reference role and remembers them, per token.

    The values belong to one model: base weights, quantisation, dtype and starting adapter. They do not depend on the
    objective or on anything that training changes, so `known` serves every run that starts from that model.
    """

    def __init__(self, model: LanguageModel, known: References | None = None) -> None:
        """Score with `model`, adapters off or in the frozen starting adapter; remember in `known`."""
        self._model = model
        self._scored = ({} if known is None else known).setdefault((model.base, model.reference_is), {})
        self.computed = 0
        """Completions that went through the model, over the instance's life."""

    def prepare(self, keys: Iterable[Key], progress: bool = False) -> None:
        """Score what is not known yet, in batches of similar length."""
        missing = sorted({key for key in keys if key not in self._scored}, key=lambda key: -_tokens(key))
        if not missing:
            return
        with (
            tqdm(total=len(missing), desc="reference", unit="completion", disable=None if progress else True) as bar,
            self._model.reading("reference") as network,
        ):
            for batch in _batches(missing):
                groups = [Group(prompt, [completion]) for prompt, completion in batch]
                forest = Forest.padded(groups, self._model.pad_id)
                scored = completion_logps(network, forest.to(self._model.device))
                tokens = scored.tokens.cpu().split(scored.lengths.tolist())
                self._scored.update(zip(batch, tokens, strict=True))
                self.computed += len(batch)
                bar.update(len(batch))

    def sums(self, keys: Sequence[Key]) -> Float[Tensor, " keys"]:
        """Return the summed log-probs in nats, on the model's device; scores what is not known yet."""
        self.prepare(keys)
        return torch.stack([self._scored[key].sum() for key in keys]).to(self._model.device)


def _tokens(key: Key) -> int:
    return len(key[0]) + len(key[1])


def _batches(keys: Sequence[Key]) -> Iterable[list[Key]]:
    """Split keys, longest first, into batches whose padded size stays within the budget."""
    batch: list[Key] = []
    for key in keys:
        if batch and _tokens(batch[0]) * (len(batch) + 1) > TOKEN_BUDGET:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch
