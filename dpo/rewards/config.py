"""How rewards are written in a run file, and how they are built from it."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeAlias, final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from dpo.rewards.base import Reward, find_reward
from dpo.rewards.ensemble import Combination
from dpo.rewards.function import Function
from dpo.rewards.length import LengthPenalty
from dpo.rewards.repetition import RepetitionPenalty
from dpo.rewards.rouge import Rouge, Variant
from dpo.rewards.weighted import Weighted, WeightedSum

Weight: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]


@final
class FunctionTerm(BaseModel):
    """A function of yours; `package.module:function` alone is short for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["function"] = "function"
    name: str
    """package.module:function over (prompt, completion), both text."""
    weight: Weight = 1.0
    """What its numbers are multiplied by."""

    @field_validator("name")
    @classmethod
    def _found(cls, name: str) -> str:
        find_reward(name)
        return name


@final
class ModelTerm(BaseModel):
    """A reward model, or an ensemble of several."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["model"] = "model"
    folders: tuple[Annotated[str, Field(min_length=1)], ...]
    """The members, one or more: "previous" (the stage before), "stage:NAME" (an earlier stage), or the folder of an
    adapter."""
    combine: Combination = "mean"
    """What an ensemble says: the mean of its members, the lowest ("min"), or the mean less their disagreement."""
    variance_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Reward lost per unit of variance between the members (>= 0), in 1 / reward; higher is more careful. Only
    "mean_minus_variance" reads it."""
    weight: Weight = 1.0
    """As above."""

    @field_validator("folders")
    @classmethod
    def _different(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        if not folders:
            raise ValueError("got none, expected one reward model or more")
        for folder in folders:
            if folders.count(folder) > 1:
                raise ValueError(f"got {folder!r} more than once, expected different members: name it once")
        return folders


@final
class RougeTerm(BaseModel):
    """Overlap of words with an answer that people gave; every row needs one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["rouge"] = "rouge"
    variant: Variant = "rougeL"
    """Single words, pairs of words, or the longest sequence in common."""
    weight: Weight = 1.0
    """As above."""


@final
class LengthTerm(BaseModel):
    """A price on tokens beyond a target."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["length"] = "length"
    target: Annotated[int, Field(ge=0)]
    """Completion tokens that cost nothing (>= 0)."""
    per_token: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Reward lost with each token beyond it (> 0)."""
    weight: Weight = 1.0
    """As above."""


@final
class RepetitionTerm(BaseModel):
    """A price on word trigrams that repeat an earlier one: their share, 0 to 1, is taken off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["repetition"] = "repetition"
    weight: Weight = 1.0
    """As above."""


_KINDS = ("function", "model", "rouge", "length", "repetition")


def _written_out(given: Any) -> Any:
    """Read package.module:function as the term that it is short for."""
    if not isinstance(given, str):
        return given
    if ":" not in given:
        raise ValueError(
            f"got {given!r}, expected package.module:function, or a mapping with kind: {', '.join(_KINDS)}; for "
            "instance {kind: length, target: 64, per_token: 0.01}"
        )
    return {"kind": "function", "name": given}


RewardTerm: TypeAlias = Annotated[
    FunctionTerm | ModelTerm | RougeTerm | LengthTerm | RepetitionTerm,
    Field(discriminator="kind"),
    BeforeValidator(_written_out),
]
"""One reward of a run with its weight; which one is said by `kind`."""


def build(terms: Sequence[RewardTerm], learned: Callable[[ModelTerm], Reward]) -> Reward:
    """Return the weighted sum of what is written.

    Args:
        terms: One or more.
        learned: Returns the reward of a model's term; the caller knows the model that its folders belong to.
    """

    def reward_of(term: RewardTerm) -> Reward:
        match term:
            case FunctionTerm():
                return Function(name=term.name)
            case ModelTerm():
                return learned(term)
            case RougeTerm():
                return Rouge(variant=term.variant)
            case LengthTerm():
                return LengthPenalty(target=term.target, per_token=term.per_token)
            case RepetitionTerm():
                return RepetitionPenalty()

    return WeightedSum(terms=tuple(Weighted(term.weight, reward_of(term)) for term in terms))
