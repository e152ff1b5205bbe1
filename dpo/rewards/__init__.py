"""What scores a sampled completion: rules, references and reward models, alone or added up.

A reward maps answers to numbers and knows no model; a reward model comes in through `build`'s `learned`.
"""

from dpo.rewards.base import Answer, Reward, TextReward, checked, find_reward, judge
from dpo.rewards.config import (
    FunctionTerm,
    LengthTerm,
    ModelTerm,
    RepetitionTerm,
    RewardTerm,
    RougeTerm,
    build,
)
from dpo.rewards.ensemble import Combination, Combined, combined
from dpo.rewards.function import Function
from dpo.rewards.length import LengthPenalty
from dpo.rewards.repetition import RepetitionPenalty
from dpo.rewards.rouge import Rouge
from dpo.rewards.weighted import Weighted, WeightedSum

__all__ = [
    "Answer",
    "Combination",
    "Combined",
    "Function",
    "FunctionTerm",
    "LengthPenalty",
    "LengthTerm",
    "ModelTerm",
    "RepetitionPenalty",
    "RepetitionTerm",
    "Reward",
    "RewardTerm",
    "Rouge",
    "RougeTerm",
    "TextReward",
    "Weighted",
    "WeightedSum",
    "build",
    "checked",
    "combined",
    "find_reward",
    "judge",
]
