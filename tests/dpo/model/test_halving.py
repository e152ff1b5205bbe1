"""A card that holds few prompts writes what one that holds them all writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import pytest
import torch

from dpo.errors import ModelError
from dpo.model.base import LanguageModel
from dpo.model.generation import Backend, Generate, Sampling
from dpo.model.halving import Halving
from dpo.model.rollout import sample


@final
@dataclass(frozen=True)
class Cramped(Backend):
    """Memory for `holds` prompts; or another fault."""

    holds: int
    error: RuntimeError = field(default_factory=lambda: torch.OutOfMemoryError("CUDA out of memory."))
    asked: list[int] = field(default_factory=list)

    def write(
        self, network: Any, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        self.asked.append(len(prompts))
        if len(prompts) > self.holds:
            raise self.error
        return Generate().write(network, prompts, seeds, sampling)


PROMPTS = [tuple(range(5, 8 + n)) for n in range(7)]


@pytest.mark.faults
def test_sampling_out_of_memory_goes_on_in_halves_and_says_the_same(start: Callable[..., LanguageModel]) -> None:
    model, cramped = start(), Cramped(2)
    roomy = sample(model, PROMPTS, max_new_tokens=6)
    assert sample(model, PROMPTS, max_new_tokens=6, backend=Halving(cramped)) == roomy
    assert cramped.asked == [7, 3, 1, 2, 4, 2, 2]


def test_a_single_prompt_that_does_not_fit_is_said_with_a_way_out(start: Callable[..., LanguageModel]) -> None:
    with pytest.raises(ModelError, match=r"one prompt of 3 tokens with 6 new ones\. Use a smaller max_new_tokens"):
        sample(start(), PROMPTS, max_new_tokens=6, backend=Halving(Cramped(0)))


def test_another_fault_is_not_tried_again(start: Callable[..., LanguageModel]) -> None:
    broken = Cramped(0, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        sample(start(), PROMPTS, max_new_tokens=6, backend=Halving(broken))
    assert broken.asked == [7]


def test_it_is_how_sampling_works_unless_told_otherwise(
    start: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = start()
    roomy = sample(model, PROMPTS, max_new_tokens=6)
    whole = Generate.write

    def cramped(self: Generate, network: Any, prompts: Sequence[Any], *more: Any) -> list[list[int]]:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, network, prompts, *more)

    monkeypatch.setattr(Generate, "write", cramped)
    assert sample(model, PROMPTS, max_new_tokens=6) == roomy
