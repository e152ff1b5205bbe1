"""The embedded sentiment task: the gold reward resists cheap cheating, and the shipped data is what it claims."""

import json
import subprocess
import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import dpo.data
from dpo.data.gold import MINIMUM_SENTIMENT, sentiment

FOLDER = Path(dpo.data.__file__).parent / "sentiment"


def read_prompts(name: str) -> list[str]:
    return (FOLDER / name).read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """The script, which is no module of the package."""
    spec = spec_from_file_location("sentiment_make", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestGold:
    def test_orders_positive_neutral_negative(self) -> None:
        good, plain, bad = (
            sentiment("", f"The soup was {word} today.") for word in ("delicious", "brown", "disgusting")
        )
        assert good > 0.4
        assert plain == 0.0
        assert bad < -0.4

    def test_hand_number(self) -> None:
        # VADER's lexicon gives "good" 1.9; compound = s / sqrt(s^2 + 15)
        assert sentiment("", "The soup was good.") == pytest.approx(1.9 / (1.9**2 + 15) ** 0.5, abs=1e-4)

    @pytest.mark.parametrize(
        "completion", ["", "  \n", "Great!", "Great great great great.", "Good, good day!", "1 2 3"]
    )
    def test_fewer_than_three_distinct_words_are_no_answer(self, completion: str) -> None:
        assert sentiment("", completion) == MINIMUM_SENTIMENT

    def test_repeating_a_word_adds_nothing(self) -> None:
        assert sentiment("", "A great and great, really GREAT day") == pytest.approx(
            sentiment("", "A great and, really day")
        )

    def test_shouting_adds_nothing(self) -> None:
        calm = sentiment("", "The film was good")
        assert sentiment("", "The film was GOOD!!! :) 😀") == calm

    def test_every_negated_word_stays_negated(self) -> None:
        # Counting each word once would delete the second "not" and leave "nice" positive.
        negated = sentiment("", "Not good, and I must say it once more: not nice")
        assert negated < 0 < sentiment("", "Not good, and I must say it once more: it is very nice")
        assert sentiment("", "It isn’t good at all") == sentiment("", "It isn't good at all") < 0

    def test_more_good_words_score_higher_within_the_bounds(self) -> None:
        one = sentiment("", "The day was good.")
        three = sentiment("", "The day was good, sunny and happy, with lovely friends.")
        assert -1 <= one < three <= 1

    def test_importing_the_module_does_not_load_the_lexicon(self) -> None:
        code = "import dpo.data.gold, sys; sys.exit(any(name.startswith('vaderSentiment') for name in sys.modules))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestPrompts:
    def test_prompts_are_distinct_and_held_out_ones_are_not_trained_on(self) -> None:
        train, held_out = read_prompts("prompts.txt"), read_prompts("eval_prompts.txt")
        assert len(set(train)) == len(train) >= 360
        assert len(set(held_out)) == len(held_out) == 60
        assert not set(train) & set(held_out)
        assert all(prompt == prompt.strip() and prompt for prompt in train + held_out)


class TestPairs:
    def test_enough_pairs_over_enough_training_prompts(self, rows: list[dict]) -> None:
        prompts = {row["prompt"] for row in rows}
        assert len(rows) >= 500
        assert len(prompts) >= 300
        assert prompts <= set(read_prompts("prompts.txt"))
        assert max(Counter(row["prompt"] for row in rows).values()) <= 2

    def test_fields_and_scores_are_the_gold_reward(self, rows: list[dict]) -> None:
        for row in rows:
            assert set(row) == {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}
            for side in ("chosen", "rejected"):
                assert row[f"score_{side}"] == pytest.approx(sentiment(row["prompt"], row[side]), abs=1e-4)

    def test_the_chosen_text_is_clearly_better_and_different(self, rows: list[dict]) -> None:
        for row in rows:
            assert row["chosen"] != row["rejected"]
            assert row["score_chosen"] - row["score_rejected"] >= 0.3 - 1e-4

    def test_length_does_not_tell_which_is_chosen(self, rows: list[dict]) -> None:
        lengths = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in rows]
        assert all(abs(chosen - rejected) <= 6 for chosen, rejected in lengths)
        longer = sum(chosen > rejected for chosen, rejected in lengths)
        shorter = sum(chosen < rejected for chosen, rejected in lengths)
        assert 0.4 < longer / (longer + shorter) < 0.6

    def test_no_pair_stands_twice_and_no_text_is_empty_or_marked(self, rows: list[dict]) -> None:
        assert len({(row["prompt"], row["chosen"], row["rejected"]) for row in rows}) == len(rows)
        for row in rows:
            for side in ("chosen", "rejected"):
                assert row[side].strip()
                assert "<|" not in row[side]
                assert len(row[side]) < 400  # 40 tokens


class TestMake:
    GOOD, BAD = "It was a lovely day.", "It was a horrible day."

    def texts(self, make: ModuleType, *samples: tuple[str, bool]) -> list[tuple[str, str]]:
        made = make.pairs("How was it?", [make.Sample(text, finished) for text, finished in samples])
        return [(pair.chosen, pair.rejected) for pair in made]

    def test_the_better_text_is_chosen_whatever_the_order(self, make: ModuleType) -> None:
        expected = [(self.GOOD, self.BAD)]
        assert self.texts(make, (self.GOOD, True), (self.BAD, True)) == expected
        assert self.texts(make, (self.BAD, True), (self.GOOD, True), (self.GOOD, True)) == expected

    def test_a_completion_that_was_cut_off_is_left_out(self, make: ModuleType) -> None:
        assert self.texts(make, (self.GOOD, False), (self.BAD, True)) == []

    def test_a_narrow_gap_and_unequal_lengths_make_no_pair(self, make: ModuleType) -> None:
        assert self.texts(make, (self.GOOD, True), ("It was a lovely warm day.", True)) == []
        assert self.texts(make, (self.GOOD, True), (self.BAD + " We sat on a bench and on a chair.", True)) == []

    def test_two_pairs_at_most_widest_first_and_no_completion_in_both(self, make: ModuleType) -> None:
        good = [(f"It was a {word} day.", True) for word in ("nice", "wonderful", "good")]
        bad = [(f"It was a {word} day.", True) for word in ("dull", "horrible", "terrible")]
        assert self.texts(make, *good, *bad) == [
            ("It was a wonderful day.", "It was a horrible day."),
            ("It was a good day.", "It was a terrible day."),
        ]

    def test_the_interval_holds_the_mean_and_narrows_with_more_prompts(self, make: ModuleType) -> None:
        low, high = make.interval([0.0, 1.0] * 8)
        narrow_low, narrow_high = make.interval([0.0, 1.0] * 128)
        assert low < narrow_low < 0.5 < narrow_high < high


class TestReadme:
    def test_its_counts_are_those_of_the_files(self, rows: list[dict]) -> None:
        text = (FOLDER / "README.md").read_text(encoding="utf-8")
        assert f"{len(rows)} pairs over {len({row['prompt'] for row in rows})} prompts" in text
        assert f"{len(read_prompts('prompts.txt'))} training prompts" in text
        assert f"{len(read_prompts('eval_prompts.txt'))} evaluation prompts" in text
