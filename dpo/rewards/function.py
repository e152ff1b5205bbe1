"""A function of the prompt and the completion as a reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from dpo.rewards.base import Answer, Reward, find_reward, judge


@final
@dataclass(frozen=True, kw_only=True)
class Function(Reward):
    """Any importable function that maps (prompt, completion), both plain text, to a number.

    A reward needs no training where a rule knows what is good: `dpo.data.gold:sentiment` for the tone, a function of
    your own for a format or a correct result.
    """

    name: str
    """Its path, package.module:function."""

    def __post_init__(self) -> None:
        find_reward(self.name)

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return what the function says of each answer."""
        function = find_reward(self.name)
        return [judge(function, one.prompt, one.completion, f"{one.source}: the reward {self.name}") for one in answers]
