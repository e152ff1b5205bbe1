"""Reference log-probs: each completion scored once, however many epochs or objectives read it."""

from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dpo.model.base import LanguageModel
from dpo.model.forest import Forest, Group
from dpo.model.logprobs import completion_logps

Key = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt ids and completion ids: what a reference log-prob depends on, for one model."""

TOKEN_BUDGET = 4096
"""Padded tokens scored at once; without gradients this is far below what a training step holds."""


@final
class ReferenceLogps:
    """Scores completions with the model in its reference role and remembers them, per token.

    The values belong to one model: base weights, quantisation, dtype and starting adapter. They do not depend on the
    objective or on anything that training changes, so one instance serves every run that starts from that model.
    """

    def __init__(self, model: LanguageModel) -> None:
        """Score with `model`, adapters off or in the frozen starting adapter."""
        self._model = model
        self._scored: dict[Key, Tensor] = {}
        self.computed = 0
        """Completions that went through the model, over the instance's life."""

    def prepare(self, keys: Iterable[Key], progress: bool = False) -> None:
        """Score what is not known yet, in batches of similar length."""
        missing = sorted({key for key in keys if key not in self._scored}, key=lambda key: -_tokens(key))
        if not missing:
            return
        with (
            tqdm(total=len(missing), desc="reference", unit="completion", disable=None if progress else True) as bar,
            self._model.role("reference") as network,
            torch.no_grad(),
        ):
            was_training = network.training
            network.eval()
            for batch in _batches(missing):
                forest = Forest.padded([Group(prompt, [completion]) for prompt, completion in batch], self._pad)
                scored = completion_logps(network, forest.to(self._model.device))
                tokens = scored.tokens.cpu().split(scored.lengths.tolist())
                self._scored.update(zip(batch, tokens, strict=True))
                self.computed += len(batch)
                bar.update(len(batch))
            network.train(was_training)

    def sums(self, keys: Sequence[Key]) -> Tensor:
        """Return the summed log-probs (len(keys),) in nats, on the model's device; scores what is not known yet."""
        self.prepare(keys)
        return torch.stack([self._scored[key].sum() for key in keys]).to(self._model.device)

    @property
    def _pad(self) -> int:
        return self._model.tokenizer.pad_token_id or 0


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
