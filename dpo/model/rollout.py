"""Sampling completions from a role."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import final

from dpo.data import Renderer
from dpo.errors import ModelError
from dpo.model.base import LanguageModel, Role
from dpo.model.generation import Backend, Sampling
from dpo.model.halving import Halving
from dpo.progress import bar


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
    backend: Backend = Halving(),
) -> list[Sample]:
    """Sample one completion for every prompt, from the full distribution (no top-k, no top-p).

    A prompt that is named K times gets K completions, each drawn by itself. A completion depends on the model, the
    seed, its prompt and which of that prompt's it is; on the other prompts, their order and `batch_size` it depends no
    more than rounding does. torch's random generators are left alone, so sampling in the middle of training changes
    nothing.

    Args:
        model: the model and its roles.
        prompts: token ids, each at least one.
        role: who speaks.
        max_new_tokens: completion tokens at most.
        temperature: divides the logits; 0 takes the most likely token.
        seed: of the sampling.
        batch_size: prompts sampled side by side.
        progress: label of a progress bar, or none.
        backend: what writes.

    Raises:
        ModelError: where a prompt is empty.
        DataError: where the model has no end token.
    """
    if not all(prompts):
        raise ModelError("sample: got an empty prompt, expected at least one token in each.")
    ends = end_tokens(model)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, ends=ends, pad_id=model.pad_id)
    seeds = _seeds(prompts, seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of like length side by side
    samples: dict[int, Sample] = {}
    with (
        model.reading(role) as network,
        bar(total=len(prompts), name=progress or "", unit="answer", shown=progress is not None) as shown,
    ):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            written = backend.write(network, [prompts[i] for i in batch], [seeds[i] for i in batch], sampling)
            for i, row in zip(batch, written, strict=True):
                stop = next((n for n, token in enumerate(row) if token in ends), None)
                completion = tuple(row if stop is None else row[: stop + 1])
                text = model.tokenizer.decode(completion, skip_special_tokens=True)
                samples[i] = Sample(prompts[i], completion, text, finished=stop is not None)
            shown.update(len(batch))
    return [samples[i] for i in range(len(prompts))]


def _seeds(prompts: Sequence[tuple[int, ...]], seed: int) -> list[int]:
    """Return a seed for each prompt: of the whole sampling, the prompt, and how often it has been named before."""
    before: Counter[tuple[int, ...]] = Counter()
    found: list[int] = []
    for prompt in prompts:
        named = f"{seed} {before[prompt]} {list(prompt)}"
        found.append(int.from_bytes(sha256(named.encode()).digest()[:8], "big"))  # unlike hash(), the same everywhere
        before[prompt] += 1
    return found


def end_tokens(model: LanguageModel) -> frozenset[int]:
    """Return the ids that end a completion: the one training puts there, the tokenizer's, and the model's own.

    Raises:
        DataError: where there is none.
    """
    own = model.network.generation_config.eos_token_id
    known = frozenset(own if isinstance(own, list) else [own]) - {None}
    return known | Renderer(model.tokenizer, max_length=2).end_tokens
