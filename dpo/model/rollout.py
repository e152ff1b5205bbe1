"""Sampling completions from a role."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from tqdm.auto import tqdm

from dpo.data import Renderer
from dpo.errors import ModelError
from dpo.model.base import LanguageModel, Role


@final
@dataclass(frozen=True)
class Sample:
    """One sampled completion."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    """Token ids, the end token included where the model wrote it."""
    text: str
    """The completion without special tokens."""
    finished: bool
    """Whether the model ended by itself before `max_new_tokens`."""


def sample(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    role: Role = "policy",
    max_new_tokens: int,
    temperature: int | float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[Sample]:
    """Sample one completion for every prompt, from the full distribution (no top-k, no top-p).

    The state of torch's random generators is as before afterwards, so sampling in the middle of training changes
    nothing. Equal arguments give equal samples on one machine.

    Args:
        model: the model and its roles.
        prompts: token ids, each at least one.
        role: who speaks.
        max_new_tokens: completion tokens at most.
        temperature: divides the logits; 0 takes the most likely token.
        seed: of the sampling.
        batch_size: prompts sampled side by side.
        progress: label of a progress bar, or none.

    Raises:
        ModelError: where a prompt is empty.
        DataError: where the model has no end token.
    """
    from transformers import GenerationConfig

    if not all(prompts):
        raise ModelError("sample: got an empty prompt, expected at least one token in each.")
    ends = end_tokens(model)
    pad = model.pad_id
    drawing = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), pad_token_id=pad, top_k=0, **drawing
    )
    # Prompts of like length side by side; the order is part of what a seed means.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    samples: dict[int, Sample] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        model.reading(role) as network,
        _generating_by(network, config),
        tqdm(total=len(prompts), desc=progress, unit="answer", disable=None if progress else True) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in batch)
            rows = [[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in batch]
            real = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
            written = network.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(real, device=model.device),
            )[:, width:].tolist()
            for i, row in zip(batch, written, strict=True):
                stop = next((n for n, token in enumerate(row) if token in ends), None)
                completion = tuple(row if stop is None else row[: stop + 1])
                text = model.tokenizer.decode(completion, skip_special_tokens=True)
                samples[i] = Sample(prompts[i], completion, text, finished=stop is not None)
            bar.update(len(batch))
    return [samples[i] for i in range(len(prompts))]


@contextmanager
def _generating_by(network: Any, config: Any) -> Iterator[None]:
    """Put `config` in the place of the model's own, whose top_k, min_p or penalties would fill what `config` leaves."""
    shipped = network.generation_config
    network.generation_config = config
    try:
        yield
    finally:
        network.generation_config = shipped


def end_tokens(model: LanguageModel) -> frozenset[int]:
    """Return the ids that end a completion: the one training puts there, the tokenizer's, and the model's own.

    Raises:
        DataError: where there is none.
    """
    own = model.network.generation_config.eos_token_id
    known = frozenset(own if isinstance(own, list) else [own]) - {None}
    return known | Renderer(model.tokenizer, max_length=2).end_tokens
