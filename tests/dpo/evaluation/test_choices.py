"""Choices are scored as they read; files that are no questions are named by row."""

import json
import math

import pytest

from dpo.errors import DataError, ModelError
from dpo.estimates import share
from dpo.evaluation.choices import ChoiceItem, TextLogp, checked, choose, read_choices


def item(right=0, category="c", choices=("short", "a longer one"), prompt="q"):
    return ChoiceItem(prompt, choices, tuple(float(n == right) for n in range(len(choices))), category, "f:1")


def likes(nats, tokens=None):
    """A model that holds of each answer what the two tables say."""

    def logps(prompt, completions):
        return [TextLogp(nats[one], (tokens or {}).get(one, 1)) for one in completions]

    return logps


class TestChoose:
    def test_the_most_probable_answer_is_chosen(self):
        logps = likes({"short": -2.0, "a longer one": -3.0})
        result = choose([item(0), item(0), item(1)], logps)
        assert result.plain == (1.0, 1.0, 0.0)
        assert result.overall.plain == share(2, 3)

    def test_a_token_is_the_unit_where_length_is_to_count_for_nothing(self):
        """-2 / 1 = -2 nats a token against -3 / 4 = -0.75."""
        result = choose([item(0), item(1)], likes({"short": -2.0, "a longer one": -3.0}, {"a longer one": 4}))
        assert result.plain == (1.0, 0.0)
        assert result.per_token == (0.0, 1.0)
        assert (result.overall.plain, result.overall.per_token) == (share(1, 2), share(1, 2))

    def test_each_category_has_its_own_accuracy(self):
        logps = likes({"short": -2.0, "a longer one": -3.0})
        result = choose([item(0, "b"), item(1, "a"), item(0, "a")], logps)
        assert list(result.categories) == ["b", "a"]
        assert result.categories["b"].plain == share(1, 1)
        assert result.categories["a"].per_token == share(1, 2)
        assert result.overall.plain == share(2, 3)

    def test_a_model_that_knows_nothing_earns_chance_level(self):
        three = item(2, choices=("a", "b", "c"))
        result = choose([item(0), three], likes(dict.fromkeys(["short", "a longer one", "a", "b", "c"], -1.0)))
        assert result.plain == pytest.approx((1 / 2, 1 / 3))

    def test_an_answer_may_be_partly_right(self):
        half = ChoiceItem("q", ("a", "b"), (0.25, 0.75), "c", "f:1")
        assert choose([half], likes({"a": -1.0, "b": -2.0})).plain == (0.25,)

    def test_the_prompt_and_all_answers_are_scored_together(self):
        seen = []

        def logps(prompt, completions):
            seen.append((prompt, tuple(completions)))
            return [TextLogp(-1.0, 1) for _ in completions]

        choose([item(prompt="one"), item(prompt="two")], logps)
        assert seen == [("one", ("short", "a longer one")), ("two", ("short", "a longer one"))]

    def test_no_items(self):
        with pytest.raises(ValueError, match="got no items"):
            choose([], likes({}))


class TestChecked:
    @pytest.mark.parametrize(
        "found",
        [
            [TextLogp(-1.0, 1)],
            [TextLogp(-1.0, 1), TextLogp(math.nan, 1)],
            [TextLogp(-1.0, 1), TextLogp(-math.inf, 1)],
            [TextLogp(-1.0, 1), TextLogp(0.0, 0)],
        ],
    )
    def test_a_broken_log_probability_is_named_rather_than_ranked(self, found):
        with pytest.raises(ModelError, match=r"^f:1: got .* expected a finite log-probability"):
            choose([item()], lambda prompt, completions: found)
        with pytest.raises(ModelError, match=r"^here: "):
            checked(lambda prompt, completions: found, "q", ("a", "b"), "here")


def task(folder, examples, **more):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "task.json"
    path.write_text(json.dumps({"name": "t", "examples": examples, **more}, indent=1), encoding="utf-8")
    return path


GOOD = {"input": "Is water wet?", "target_scores": {"Yes, it is.": 1, "No.": 0}}


class TestTaskFiles:
    def test_an_example_is_an_item_of_its_folders_category(self, tmp_path):
        (only,) = read_choices(task(tmp_path / "honest", [GOOD]))
        path = tmp_path / "honest" / "task.json"
        assert only == ChoiceItem("Is water wet?", ("Yes, it is.", "No."), (1.0, 0.0), "honest", f"{path}: example 1")

    def test_a_folder_is_read_whole(self, tmp_path):
        for name in ("honest", "harmless"):
            task(tmp_path / name, [GOOD, GOOD])
        (tmp_path / "task.json").write_text('{"name": "hhh", "subtasks": ["honest"]}')
        assert [one.category for one in read_choices(str(tmp_path))] == ["harmless"] * 2 + ["honest"] * 2

    @pytest.mark.parametrize(
        ("example", "message"),
        [
            ({"input": "q"}, "expected input, and target_scores"),
            ("text", "expected input, and target_scores"),
            ({"input": "q", "target_scores": {"a": 1}}, "two texts or more"),
            ({"input": "q", "target_scores": {"a": 1, " ": 0}}, "none of them empty"),
            ({"input": " ", "target_scores": {"a": 1, "b": 0}}, "got the prompt"),
            ({"input": ["q"], "target_scores": {"a": 1, "b": 0}}, "got the prompt"),
            ({"input": "q", "target_scores": {"a": 1, "b": 1}}, "of which one is the highest"),
            ({"input": "q", "target_scores": {"a": 1, "b": -1}}, "numbers from 0 to 1"),
            ({"input": "q", "target_scores": {"a": True, "b": 0}}, "numbers from 0 to 1"),
            ({"input": "q", "target_scores": {"a": "1", "b": 0}}, "numbers from 0 to 1"),
        ],
    )
    def test_a_bad_example_is_named(self, tmp_path, example, message):
        path = task(tmp_path, [GOOD, example])
        with pytest.raises(DataError, match=message) as caught:
            read_choices(path)
        assert str(caught.value).startswith(f"{path}: example 2: got ")

    def test_a_file_that_is_no_task(self, tmp_path):
        path = tmp_path / "task.json"
        path.write_text('{\n "examples": [\n')
        with pytest.raises(DataError, match=r"task\.json:3:1: "):
            read_choices(path)
        path.write_text('{"name": "t"}')
        with pytest.raises(DataError, match="got no list of examples"):
            read_choices(path)
        path.write_bytes(b'{"examples": "\xff"}')
        with pytest.raises(DataError, match="no UTF-8"):
            read_choices(path)

    def test_nothing_to_read(self, tmp_path):
        with pytest.raises(DataError, match="got no questions"):
            read_choices(tmp_path)
        with pytest.raises(DataError, match=r"no such file|cannot be read"):
            read_choices(tmp_path / "task.json")


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class TestRowFiles:
    def test_a_row_is_an_item(self, tmp_path):
        path = lines(
            tmp_path / "quiz.jsonl",
            {"prompt": "1 + 1?", "choices": ["1", "2", "3"], "label": 1},
            {"prompt": "The sea?", "choices": ["wet", "dry"], "label": 0, "category": "world"},
        )
        assert read_choices(path) == [
            ChoiceItem("1 + 1?", ("1", "2", "3"), (0.0, 1.0, 0.0), "quiz", f"{path}:1"),
            ChoiceItem("The sea?", ("wet", "dry"), (1.0, 0.0), "world", f"{path}:2"),
        ]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label": 2}, "label 2, expected a list of texts, and the index"),
            ({"label": -1}, "label -1"),
            ({"label": "0"}, "label '0'"),
            ({"label": True}, "label True"),
            ({"label": None}, "label None"),
            ({"choices": "ab"}, "choices 'ab'"),
            ({"choices": ["a", "a"]}, "a choice twice"),
            ({"choices": ["a", 1]}, "two texts or more"),
            ({"choices": ["a"]}, "two texts or more"),
            ({"prompt": None}, "the prompt None, expected text"),
            ({"category": 3}, "the category 3, expected text"),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path, change, message):
        good = {"prompt": "q", "choices": ["a", "b"], "label": 0}
        path = lines(tmp_path / "quiz.jsonl", good, good | change)
        with pytest.raises(DataError, match=message) as caught:
            read_choices(path)
        assert str(caught.value).startswith(f"{path}:2: got ")
