"""Writing in halves where memory runs out: every prompt gets what it would have got beside the others."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

from dpo.errors import ModelError
from dpo.model.generation import Backend, Generate, Sampling


@final
@dataclass(frozen=True)
class Halving(Backend):
    """Another backend, asked again for each half of the prompts where it runs out of memory, down to a single one."""

    backend: Backend = field(default_factory=Generate)

    def write(
        self, network: Any, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """See `Backend.write`.

        Raises:
            ModelError: memory does not hold a single prompt.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        try:
            return self.backend.write(network, prompts, seeds, sampling)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(prompts) == 1:
                raise ModelError(
                    f"sampling: memory does not hold one prompt of {len(prompts[0])} tokens with "
                    f"{sampling.max_new_tokens} new ones. Use a smaller max_new_tokens, a smaller data.max_length, "
                    "model.quantization=nf4, or a smaller model."
                ) from error
        # Outside the handler: the exception's traceback would keep the failed call's tensors alive.
        clear_device_cache(garbage_collection=True)
        half = len(prompts) // 2
        return [
            row
            for part in (slice(None, half), slice(half, None))
            for row in self.write(network, prompts[part], seeds[part], sampling)
        ]
