"""How a network writes on from prompts: the one interface that sampling needs, and transformers behind it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to write."""

    max_new_tokens: int
    """Completion tokens at most (>= 1)."""
    temperature: int | float
    """Divides the logits; 0 takes the most likely token."""
    ends: frozenset[int]
    """Token ids that end a completion (at least one)."""
    pad_id: int
    """Fills rows up; always masked."""


class Backend(ABC):
    """Writes completions, from the full distribution whatever the model's own settings say (no top-k, no top-p)."""

    @abstractmethod
    def write(
        self, network: Any, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """Return token ids that follow each prompt; those behind the first end token are not looked at.

        A completion depends on the network, its own prompt, its own seed and `sampling`; on the prompts beside it no
        more than rounding does.
        """


@final
@dataclass(frozen=True)
class Generate(Backend):
    """transformers' `generate`: all prompts side by side, padded on the left, until the last of them has ended."""

    def write(
        self, network: Any, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """See `Backend.write`."""
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        rows = [[sampling.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        config = GenerationConfig(
            do_sample=False,  # takes the token that `_Draw` leaves, or else the most likely one
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(sampling.ends),
            pad_token_id=sampling.pad_id,
        )
        drawing = [_Draw(seeds, sampling, width)] if sampling.temperature > 0 else []
        with _generating_by(network, config):
            written = network.generate(
                input_ids=torch.tensor(rows, device=network.device),
                attention_mask=torch.tensor(real, device=network.device),
                logits_processor=drawing,
            )
        return written[:, width:].tolist()


@final
class _Draw:
    """Leaves one token a row possible, drawn with a number of the row's own: what else is in the batch cannot matter.

    `generate`'s own drawing takes its numbers from one stream for all rows.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, width: int) -> None:
        streams = map(Random, seeds)
        numbers = [[stream.random() for _ in range(sampling.max_new_tokens)] for stream in streams]
        self._uniform = torch.tensor(numbers, dtype=torch.float64)
        self._temperature, self._width = sampling.temperature, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Map the logits of the next token to 0 for the one that is drawn and minus infinity for all others."""
        uniform = self._uniform[:, input_ids.shape[1] - self._width]
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64  # the widest there is
        drawn = inverse_cdf(scores / self._temperature, uniform.to(scores.device, dtype))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.unsqueeze(1), 0)


def inverse_cdf(logits: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Return each row's first token whose cumulative probability exceeds its number in [0, 1).

    With uniform numbers these are draws from softmax(logits). The sum runs in the dtype of `uniform`; a token of
    probability 0 is never drawn.
    """
    weight = (logits - logits.amax(1, keepdim=True)).exp_()
    total = weight.cumsum(1, dtype=uniform.dtype)
    wanted = uniform.unsqueeze(1) * total[:, -1:]
    return torch.searchsorted(total, wanted, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


@contextmanager
def _generating_by(network: Any, config: Any) -> Iterator[None]:
    """Put `config` in the place of the model's own, whose top_k, min_p or penalties would fill what `config` leaves.

    And hand the head whole rows. `generate` slices each prompt's last hidden state out of all of them, and where such
    a slice meets a frozen weight, torch multiplies row by row, with a copy of the weight for each row: on a CPU in
    bfloat16 64 prompts of a vocabulary of 49,152 took 3.4 GiB and 11 s that way, and 7 MiB and 0.02 s as whole rows.
    """
    shipped = network.generation_config
    network.generation_config = config
    hook = network.get_output_embeddings().register_forward_pre_hook(lambda _head, given: (given[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()
        network.generation_config = shipped
