"""Rewards as a run file writes them: short forms, every kind, what is refused, and what is built."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo.errors import ConfigError
from dpo.rewards import (
    Answer,
    FunctionTerm,
    LengthTerm,
    ModelTerm,
    RepetitionTerm,
    Reward,
    RewardTerm,
    RougeTerm,
    build,
    checked,
)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    rewards: tuple[RewardTerm, ...]


def read(*terms: Any) -> tuple[RewardTerm, ...]:
    return Settings.model_validate({"rewards": terms}).rewards


@dataclass(frozen=True)
class Constant(Reward):
    value: float

    def __call__(self, answers):
        return [self.value for _ in answers]


def test_every_kind_is_read_and_written_as_it_was():
    terms = read(
        {"kind": "function", "name": "operator:countOf", "weight": -2},
        {"kind": "model", "folders": ["previous", "stage:reward-1", "runs/a"], "combine": "min"},
        {"kind": "rouge", "variant": "rouge2"},
        {"kind": "length", "target": 64, "per_token": 0.01},
        {"kind": "repetition", "weight": 0.5},
    )
    assert terms == (
        FunctionTerm(name="operator:countOf", weight=-2.0),
        ModelTerm(folders=("previous", "stage:reward-1", "runs/a"), combine="min"),
        RougeTerm(variant="rouge2"),
        LengthTerm(target=64, per_token=0.01),
        RepetitionTerm(weight=0.5),
    )
    assert Settings.model_validate(Settings(rewards=terms).model_dump(mode="json")).rewards == terms
    assert Settings(rewards=terms).rewards == terms


def test_a_name_with_a_colon_is_short_for_a_function():
    assert read("operator:countOf") == (FunctionTerm(name="operator:countOf", weight=1.0),)


def test_the_defaults_are_a_plain_mean_of_members_with_weight_one():
    (term,) = read({"kind": "model", "folders": ["previous"]})
    assert (term.weight, term.combine, term.variance_weight) == (1.0, "mean", 0.1)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("repetition", "got 'repetition', expected package.module:function, or a mapping with kind: function, model, "
         "rouge, length, repetition"),
        ({"kind": "lenght", "target": 1}, "'lenght' found using 'kind' does not match any of the expected tags: "
         "'function', 'model', 'rouge', 'length', 'repetition'"),
        ({"target": 1, "per_token": 1}, "Unable to extract tag using discriminator 'kind'"),
        (7, "Input should be a valid dictionary"),
        ({"kind": "length", "target": 1, "per_token": 1, "per_tokn": 1}, "Extra inputs are not permitted"),
        ({"kind": "length", "target": 1}, "Field required"),
        ({"kind": "length", "target": -1, "per_token": 1}, "greater than or equal to 0"),
        ({"kind": "length", "target": 1, "per_token": 0}, "greater than 0"),
        ({"kind": "model", "folders": []}, "got none, expected one reward model or more"),
        ({"kind": "model", "folders": [""]}, "at least 1 character"),
        ({"kind": "model", "folders": ["a", "b", "a"]}, "got 'a' more than once, expected different members"),
        ({"kind": "model", "folders": ["a"], "combine": "max"}, "'mean', 'min' or 'mean_minus_variance'"),
        ({"kind": "model", "folders": ["a"], "variance_weight": -1}, "greater than or equal to 0"),
        ({"kind": "rouge", "variant": "rouge3"}, "'rouge1', 'rouge2' or 'rougeL'"),
        ({"kind": "repetition", "weight": float("nan")}, "finite number"),
    ],
)  # fmt: skip
def test_what_is_no_term_says_what_is_possible(term, message):
    with pytest.raises(ValidationError) as caught:
        read(term)
    assert message in str(caught.value)
    assert caught.value.error_count() == 1  # of one kind of term, not of all five


def test_a_function_that_is_not_there_is_said_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"^reward='nowhere:f': No module named 'nowhere'\. Write package"):
        read("nowhere:f")


def test_what_is_built_is_the_weighted_sum():
    terms = read(
        {"kind": "function", "name": "operator:eq", "weight": 2},
        {"kind": "model", "folders": ["previous"], "weight": 10},
        {"kind": "rouge", "variant": "rouge2", "weight": 100},
        {"kind": "length", "target": 1, "per_token": 0.5},
        {"kind": "repetition", "weight": 1000},
    )
    asked: list[ModelTerm] = []

    def learned(term: ModelTerm) -> Reward:
        asked.append(term)
        return Constant(0.25)

    # The function: eq("a a a a", "a a a a") is True: 2 * 1. The model: 10 * 0.25. Rouge of pairs: one of three is
    # found, P = 1/3, R = 1, F = 1/2: 100 * 1/2. Length: -0.5 * (5 - 1). Repetition: one of two trigrams repeats:
    # -1000 * 1/2.
    answer = Answer("a a a a", "a a a a", tokens=5, finished=True, reference="a a", source="prompts.jsonl:1")
    expected = 2 + 2.5 + 50 - 2 - 500
    assert checked(build(terms, learned), [answer]) == [pytest.approx(expected, abs=1e-9)]
    assert asked == [terms[1]]


def test_rewards_load_neither_torch_nor_the_word_lists():
    program = "import sys, dpo.rewards; print(sorted({'torch', 'transformers', 'nltk'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
