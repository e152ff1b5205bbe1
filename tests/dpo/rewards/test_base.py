"""A reward's numbers pass as they are; what is no judgement is refused with the row, what was got and the fix."""

from dataclasses import dataclass, replace
from fractions import Fraction

import pytest

from dpo.errors import ConfigError, ModelError, RewardError
from dpo.rewards import Answer, Reward, checked, find_reward, judge

ONE = Answer("What is 2 + 2?", "It is 4.", tokens=5, finished=True, reference=None, source="prompts.jsonl:7")
TWO = replace(ONE, prompt="And 3 + 3?", completion="6", source="prompts.jsonl:9")


@dataclass(frozen=True)
class Says(Reward):
    """Returns what it is told to, or raises it."""

    told: object

    def __call__(self, answers):
        if isinstance(self.told, Exception):
            raise self.told
        return self.told


class TestChecked:
    def test_numbers_pass_as_floats_in_order(self):
        found = checked(Says((3, -0.5)), [ONE, TWO])
        assert found == [3.0, -0.5]
        assert {type(value) for value in found} == {float}
        assert checked(Says([Fraction(1, 4), True]), [ONE, TWO]) == [0.25, 1.0]

    def test_no_answers_ask_for_nothing(self):
        assert checked(Says(RuntimeError("called")), []) == []

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None, "0.5", 10**400, 1j])
    def test_what_is_no_finite_number_names_the_row(self, value):
        with pytest.raises(RewardError) as caught:
            checked(Says([0.0, value]), [ONE, TWO])
        assert str(caught.value) == (
            f"prompts.jsonl:9: the reward Says returned {repr(value)[:60]} for the prompt 'And 3 + 3?' and the "
            "completion '6', expected a finite number. Return a low number for what cannot be judged."
        )

    @pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
    def test_a_wrong_count(self, values):
        with pytest.raises(RewardError) as caught:
            checked(Says(values), [ONE, TWO])
        assert str(caught.value) == (
            f"prompts.jsonl:7: the reward Says returned {len(values)} numbers for 2 answers, the first to the prompt "
            "'What is 2 + 2?' and the completion 'It is 4.', expected one for each. Return them in the order of the "
            "answers."
        )

    @pytest.mark.parametrize(
        ("told", "fault"), [(KeyError("lexicon"), "KeyError: 'lexicon'"), (None, "TypeError: 'NoneType' object")]
    )
    def test_a_reward_that_fails(self, told, fault):
        with pytest.raises(RewardError) as caught:
            checked(Says(told), [ONE, TWO])
        message = str(caught.value)
        assert message.startswith("prompts.jsonl:7: the reward Says failed on 2 answers, the first to the prompt 'What")
        assert fault in message
        assert message.endswith("a list of dpo.rewards.Answer and must return a list of as many numbers.")
        assert caught.value.__cause__ is not None

    def test_an_error_that_names_its_place_passes_as_it_is(self):
        own = ModelError("reward-0: too long")
        with pytest.raises(ModelError) as caught:
            checked(Says(own), [ONE])
        assert caught.value is own

    def test_long_text_is_cut(self):
        long = replace(ONE, prompt="p" * 500, completion="c" * 500)
        with pytest.raises(RewardError) as caught:
            checked(Says(["x" * 500]), [long])
        assert "'" + "p" * 60 + "' and the completion '" + "c" * 60 + "'," in str(caught.value)
        assert len(str(caught.value)) < 400


class TestJudge:
    def test_it_calls_with_prompt_and_completion(self):
        assert judge(lambda prompt, completion: f"{prompt}.{completion}", "1", "5", "gold") == 1.5

    def test_a_reward_that_fails(self):
        def fails(prompt: str, completion: str) -> float:
            raise KeyError("lexicon")

        place = r"^gold failed on the prompt 'hello' and the completion 'there': KeyError: 'lexicon'"
        with pytest.raises(RewardError, match=place + r".*\(prompt, completion\)"):
            judge(fails, "hello", "there", "gold")

    def test_a_reward_that_is_no_number(self):
        with pytest.raises(RewardError, match=r"^gold failed.* TypeError.*must return a number"):
            judge(lambda *_: None, "hello", "there", "gold")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_reward_that_is_not_finite(self, value):
        message = rf"^gold returned {value} for the prompt 'hello' and the completion 'there', expected a finite number"
        with pytest.raises(RewardError, match=message):
            judge(lambda *_: value, "hello", "there", "gold")


class TestFindReward:
    def test_a_function_by_its_path(self):
        assert find_reward("operator:countOf")("banana", "a") == 3

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("operator", "expected package.module:function"),
            ("no_such_module:reward", "No module named"),
            ("operator:no_such", "has no attribute"),
            ("math:pi", "the name of a callable"),
            (":reward", "Write package.module:function"),
        ],
    )
    def test_what_leads_nowhere_names_its_key(self, name, message):
        with pytest.raises(ConfigError, match=rf"^evaluation\.gold='{name}': .*{message}"):
            find_reward(name, "evaluation.gold")
