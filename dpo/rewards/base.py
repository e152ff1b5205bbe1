"""What a reward is: it reads answers and says one number for each."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from numbers import Real
from typing import TypeAlias, final

from dpo.errors import ConfigError, DPOError, RewardError

TextReward: TypeAlias = Callable[[str, str], float]
"""Maps (prompt, completion), both plain text, to a finite number; higher is better."""


@final
@dataclass(frozen=True)
class Answer:
    """A completion to be judged, and what is known of it."""

    prompt: str
    """The text it answers: the last message of the prompt."""
    completion: str
    """Its own text, without special tokens."""
    tokens: int
    """Completion tokens, the end token included where there is one."""
    finished: bool
    """Whether the policy ended it itself; False where it was cut off at the longest length."""
    reference: str | None
    """An answer that people gave to the same prompt; None where the data has none."""
    source: str
    """file:row of the prompt, for messages."""
    key: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Prompt ids and completion ids, for rewards that are models; empty where there was no tokenizer."""


class Reward(ABC):
    """Judges answers. Call it through `checked`, which refuses what is no judgement."""

    @abstractmethod
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return one finite number for each answer, in the same order; higher is better."""


def checked(reward: Reward, answers: Sequence[Answer]) -> list[float]:
    """Return what a reward says of each answer.

    Raises:
        RewardError: where it fails, or does not return one finite number for each answer; names the row, the prompt
            and the completion.
    """
    if not answers:
        return []
    first, name = answers[0], type(reward).__name__
    batch = f"{len(answers)} answers, the first to {_excerpt(first.prompt, first.completion)}"
    try:
        values = list(reward(answers))
    except DPOError:  # it names the place itself
        raise
    except Exception as error:
        raise RewardError(
            f"{first.source}: the reward {name} failed on {batch}: {type(error).__name__}: {error}. It is called with "
            "a list of dpo.rewards.Answer and must return a list of as many numbers."
        ) from error
    if len(values) != len(answers):
        raise RewardError(
            f"{first.source}: the reward {name} returned {len(values)} numbers for {batch}, expected one for each. "
            "Return them in the order of the answers."
        )
    for answer, value in zip(answers, values, strict=True):
        if not _is_finite(value):
            raise RewardError(
                f"{answer.source}: the reward {name} returned {value!r:.60} for "
                f"{_excerpt(answer.prompt, answer.completion)}, expected a finite number. Return a low number for "
                "what cannot be judged."
            )
    return [float(value) for value in values]


def judge(reward: TextReward, prompt: str, completion: str, place: str) -> float:
    """Call a reward over text on one completion; `place` begins the message of an error.

    Raises:
        RewardError: where it raises, or returns no finite number.
    """
    try:
        value = float(reward(prompt, completion))
    except Exception as error:
        raise RewardError(
            f"{place} failed on {_excerpt(prompt, completion)}: {type(error).__name__}: {error}. It is called with "
            "(prompt, completion) as text and must return a number."
        ) from error
    if not _is_finite(value):
        raise RewardError(
            f"{place} returned {value} for {_excerpt(prompt, completion)}, expected a finite number. Return a low "
            "number for what cannot be judged."
        )
    return value


def find_reward(name: str, place: str = "reward") -> TextReward:
    """Return the reward that `module:function` names; `place` is the key under which it is written.

    Raises:
        ConfigError: where it cannot be imported or called.
    """
    module, colon, function = name.partition(":")
    try:
        found = getattr(import_module(module), function) if colon else None
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # TypeError: a relative import
        raise ConfigError(f"{place}={name!r}: {error}. Write package.module:function.") from error
    if not callable(found):
        raise ConfigError(f"{place}={name!r}: expected package.module:function, the name of a callable.")
    return found  # pyright: ignore[reportReturnType]  (what it returns is checked at every call)


def _excerpt(prompt: str, completion: str) -> str:
    return f"the prompt {prompt[:60]!r} and the completion {completion[:60]!r}"


def _is_finite(value: object) -> bool:
    """Tell whether it is a number that a float can hold; every comparison with NaN is false."""
    return isinstance(value, Real) and bool(abs(value) <= sys.float_info.max)  # pyright: ignore[reportOperatorIssue]
