"""The rewards that need no model: hand numbers, and what is refused."""

import math
from dataclasses import dataclass, replace

import pytest

from dpo.data.gold import sentiment
from dpo.errors import ConfigError, RewardError
from dpo.rewards import (
    Answer,
    Function,
    LengthPenalty,
    RepetitionPenalty,
    Reward,
    Rouge,
    Weighted,
    WeightedSum,
    checked,
)
from dpo.rewards.repetition import repetition

ANSWER = Answer("banana", "a", tokens=4, finished=True, reference="a pear", source="prompts.jsonl:3")


def says(completion: str, **known) -> Answer:
    return replace(ANSWER, completion=completion, **known)


class TestFunction:
    def test_it_is_called_with_prompt_and_completion_of_each_answer(self):
        # countOf("banana", x): three a, two n, no z.
        answers = [says("a"), says("n"), says("z")]
        assert checked(Function(name="operator:countOf"), answers) == [3.0, 2.0, 0.0]

    def test_the_gold_lexicon_is_one(self):
        text = "what a lovely and happy day"
        assert checked(Function(name="dpo.data.gold:sentiment"), [says(text)]) == [sentiment("banana", text)]
        assert sentiment("banana", text) > 0.5

    def test_a_failure_names_row_function_prompt_and_completion(self):
        # indexOf("banana", "x") raises: there is no x.
        with pytest.raises(RewardError) as caught:
            checked(Function(name="operator:indexOf"), [says("b"), says("x", source="prompts.jsonl:8")])
        message = str(caught.value)
        assert message.startswith(
            "prompts.jsonl:8: the reward operator:indexOf failed on the prompt 'banana' and the completion 'x': "
        )
        assert "ValueError" in message

    def test_one_that_is_not_there_cannot_be_built(self):
        with pytest.raises(ConfigError, match=r"^reward='operator:no_such': .*has no attribute"):
            Function(name="operator:no_such")


class TestRouge:
    # Reference "the cat sat on the mat", 6 words; answer "the cat lay on a mat", 6 words.
    # rouge1: in common the (once), cat, on, mat: 4, so P = R = F = 4/6.
    # rouge2: of 5 pairs each, "the cat" alone is in both: P = R = F = 1/5.
    # rougeL: the longest common sequence is the, cat, on, mat: F = 4/6.
    @pytest.mark.parametrize(("variant", "expected"), [("rouge1", 4 / 6), ("rouge2", 1 / 5), ("rougeL", 4 / 6)])
    def test_by_hand(self, variant, expected):
        answer = says("The cat lay on a mat!", reference="the cat sat on the mat.")
        assert checked(Rouge(variant=variant), [answer]) == [pytest.approx(expected, abs=1e-12)]

    def test_order_counts_for_the_longest_sequence_alone(self):
        # "c b a" holds every word of "a b c" and no pair of it; in order they have one word in common: F = 1/3.
        answer = [says("c b a", reference="a b c")]
        found = [Rouge(variant=variant)(answer)[0] for variant in ("rouge1", "rouge2", "rougeL")]
        assert found == pytest.approx([1, 0, 1 / 3], abs=1e-12)

    def test_a_longer_answer_loses_precision(self):
        # Two words of two are found, among the answer's four: P = 1/2, R = 1, F = 2/3; the other way round the same.
        answers = [says("a pear and milk"), says("a pear", reference="a pear and milk")]
        assert Rouge()(answers) == pytest.approx([2 / 3, 2 / 3], abs=1e-12)

    def test_each_answer_is_held_against_its_own_reference(self):
        assert Rouge()([says("a pear"), says("a pear", reference="six"), says("")]) == [1.0, 0.0, 0.0]

    @pytest.mark.parametrize(("reference", "got"), [(None, "none"), ("", "''"), ("груша!", "'груша!'")])
    def test_an_answer_without_a_reference_names_its_row(self, reference, got):
        answers = [says("a pear"), says("a pear", reference=reference, source="prompts.jsonl:8")]
        with pytest.raises(RewardError) as caught:
            checked(Rouge(), answers)
        message = str(caught.value)
        assert message.startswith("prompts.jsonl:8: the reward Rouge compares")
        assert f"to the prompt 'banana': got {got}, expected text with words of a-z and 0-9" in message

    def test_an_unknown_variant(self):
        with pytest.raises(ValueError, match=r"^Rouge\.variant must be one of rouge1, rouge2, rougeL, got 'rouge3'$"):
            Rouge(variant="rouge3")


class TestLengthPenalty:
    def test_only_tokens_beyond_the_target_cost(self):
        # target 10, 0.5 a token: 9 and 10 tokens cost nothing, 11 cost 0.5, 30 cost 10.
        answers = [says("", tokens=tokens) for tokens in (9, 10, 11, 30)]
        assert checked(LengthPenalty(target=10, per_token=0.5), answers) == [0, 0, -0.5, -10]

    @pytest.mark.parametrize("target", [-1, 2.5, True, None])
    def test_a_bad_target(self, target):
        with pytest.raises(ValueError, match=r"^LengthPenalty\.target must be a number of tokens >= 0, got"):
            LengthPenalty(target=target, per_token=1)

    @pytest.mark.parametrize("per_token", [0, -0.1, math.nan, math.inf])
    def test_a_bad_price(self, per_token):
        with pytest.raises(ValueError, match=r"^LengthPenalty\.per_token must be a finite number > 0, got"):
            LengthPenalty(target=0, per_token=per_token)


class TestRepetition:
    @pytest.mark.parametrize(
        ("text", "share"),
        [
            ("", 0),
            ("so so", 0),
            ("one two three", 0),
            ("a a a a", 1 / 2),  # two trigrams, one of them new
            ("a b c a b c", 1 / 4),  # abc bca cab abc: one of four
            ("A b\nC   a B c", 1 / 4),  # whatever the case and the white space
            ("ha " * 50, 47 / 48),
            ("a b c d e a b", 0),  # a pair that comes again is no trigram
        ],
    )
    def test_by_hand(self, text, share):
        assert repetition(text) == pytest.approx(share, abs=1e-15)
        assert checked(RepetitionPenalty(), [says(text)]) == [-repetition(text)]


class TestWeightedSum:
    def test_weights_and_adds(self):
        # 2 * countOf("banana", x) - 3 * 0.5 * tokens beyond 3: a: 2 * 3 - 1.5 * 1; n: 2 * 2 - 1.5 * 4.
        both = WeightedSum(
            terms=(Weighted(2, Function(name="operator:countOf")), Weighted(3, LengthPenalty(target=3, per_token=0.5)))
        )
        assert checked(both, [says("a"), says("n", tokens=7)]) == [4.5, -2.0]

    def test_a_negative_weight_turns_a_reward_round(self):
        assert WeightedSum(terms=(Weighted(-0.5, Function(name="operator:countOf")),))([ANSWER]) == [-1.5]

    def test_the_one_that_fails_is_named(self):
        both = WeightedSum(terms=(Weighted(1.0, RepetitionPenalty()), Weighted(1.0, Rouge())))
        with pytest.raises(RewardError, match=r"^prompts\.jsonl:3: the reward Rouge compares"):
            checked(both, [says("a", reference=None)])

    def test_a_number_that_is_not_finite_is_laid_to_its_own_reward(self):
        @dataclass(frozen=True)
        class Silent(Reward):
            def __call__(self, answers):
                return [math.nan for _ in answers]

        both = WeightedSum(terms=(Weighted(1.0, RepetitionPenalty()), Weighted(1.0, Silent())))
        with pytest.raises(RewardError, match=r"^prompts\.jsonl:3: the reward Silent returned nan"):
            checked(both, [ANSWER])

    def test_none_or_a_weight_that_is_no_number(self):
        with pytest.raises(ValueError, match=r"^WeightedSum\.terms must be one Weighted or more, got none"):
            WeightedSum(terms=())
        with pytest.raises(ValueError, match=r"^WeightedSum\.terms\[1\]\.weight must be a finite number, got nan"):
            WeightedSum(terms=(Weighted(1.0, Rouge()), Weighted(math.nan, Rouge())))
