"""Every format by a small row, and every reason for which a format refuses one."""

import pytest

from dpo.data import FORMATS, BadRow, Drop, Message, Preference, Row, recognise
from dpo.errors import DataError

HI = Message("user", "hi")
TURNS = [{"role": "user", "content": "hi"}]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def convert(values: dict) -> Preference:
    row = Row(values, "f:1")
    return recognise([row]).convert(row)


class TestFormats:
    @pytest.mark.parametrize(
        ("name", "values", "prompt", "completions", "scores"),
        [
            ("pair", {"prompt": "hi", "chosen": "a", "rejected": "b"}, (HI,), ("a", "b"), (1.0, 0.0)),
            ("pair", {"question": "hi", "chosen": "a", "rejected": "b"}, (HI,), ("a", "b"), (1.0, 0.0)),
            ("pair", {"input": "hi", "chosen": "a", "rejected": "b"}, (HI,), ("a", "b"), (1.0, 0.0)),
            (
                "pair",
                {"instruction": "hi", "input": "you", "chosen": "a", "rejected": "b"},
                (Message("user", "hi\n\nyou"),),
                ("a", "b"),
                (1.0, 0.0),
            ),
            (
                "pair",
                {"system": "be kind", "question": "hi", "chosen": "a", "rejected": "b"},
                (Message("system", "be kind"), HI),
                ("a", "b"),
                (1.0, 0.0),
            ),
            (
                "pair",
                {"prompt": TURNS, "chosen": [assistant("a")], "rejected": [assistant("b")]},
                (HI,),
                ("a", "b"),
                (1.0, 0.0),
            ),
            (  # the prompt stands in all three columns, once as a text
                "pair",
                {"prompt": "hi", "chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]},
                (HI,),
                ("a", "b"),
                (1.0, 0.0),
            ),
            (  # roles as ShareGPT writes them, a single message per completion
                "pair",
                {
                    "prompt": [{"from": "human", "value": "hi"}],
                    "chosen": {"from": "gpt", "value": "a"},
                    "rejected": {"from": "gpt", "value": "b"},
                },
                (HI,),
                ("a", "b"),
                (1.0, 0.0),
            ),
            (
                "pair",
                {"prompt": "hi", "chosen": "a", "rejected": "b", "score_chosen": 8, "score_rejected": "7.5"},
                (HI,),
                ("a", "b"),
                (8.0, 7.5),
            ),
            (
                "pair",
                {"prompt": "hi", "chosen": "a", "rejected": "b", "chosen-rating": 4.0, "rejected-rating": 4.0},
                (HI,),
                ("a", "b"),
                (4.0, 4.0),
            ),
            (
                "pair of transcripts",
                {
                    "chosen": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: and?\n\nAssistant: a",
                    "rejected": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: and?\n\nAssistant: b",
                },
                (HI, Message("assistant", "yo"), Message("user", "and?")),
                ("a", "b"),
                (1.0, 0.0),
            ),
            (
                "pair of conversations",
                {"chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]},
                (HI,),
                ("a", "b"),
                (1.0, 0.0),
            ),
            ("thumbs", {"prompt": "hi", "completion": "a", "label": True}, (HI,), ("a",), (1.0,)),
            ("thumbs", {"prompt": "hi", "completion": "a", "label": "False"}, (HI,), ("a",), (-1.0,)),
            ("thumbs", {"prompt": TURNS, "completion": [assistant("a")], "label": 0}, (HI,), ("a",), (-1.0,)),
            ("rated", {"prompt": "hi", "completions": ["a", "b"], "scores": [1, 2.5]}, (HI,), ("a", "b"), (1.0, 2.5)),
            ("demonstration", {"prompt": "hi", "completion": "a"}, (HI,), ("a",), None),
            ("prompts", {"prompt": "hi"}, (HI,), (), None),
        ],
    )
    def test_the_row_becomes_the_record(self, name, values, prompt, completions, scores):
        assert recognise([Row(values, "f:1")]).name == name
        record = convert(values)
        assert (record.prompt, record.completions, record.scores) == (prompt, completions, scores)
        assert record.source == "f:1"

    def test_every_format_is_tested_above(self):
        marks = [mark for mark in TestFormats.test_the_row_becomes_the_record.pytestmark if mark.name == "parametrize"]
        assert {case[0] for case in marks[0].args[1]} == {shape.name for shape in FORMATS}

    def test_columns_beside_the_format(self):
        pair = {"prompt": "hi", "chosen": "a", "rejected": "b"}
        record = convert({**pair, "agreement": 0.75, "weight": 2, "group": 7})
        assert (record.agreement, record.weight, record.group) == (0.75, 2.0, "7")

    def test_a_column_may_be_null_in_the_first_row(self):
        rows = [Row({"prompt": "hi", "completion": "a", "label": label}, "f:1") for label in (None, True)]
        assert recognise(rows).name == "thumbs"

    def test_a_column_of_nulls_is_no_column(self):
        assert recognise([Row({"prompt": "hi", "completion": "a", "label": None}, "f:1")]).name == "demonstration"

    def test_a_label_that_comes_late_is_not_taken_for_a_demonstration(self):
        shape = recognise([Row({"prompt": "hi", "completion": "a"}, "f:1")])
        with pytest.raises(BadRow, match="label is False in a file whose first rows have no label"):
            shape.convert(Row({"prompt": "hi", "completion": "b", "label": False}, "f:30"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("reason", "values"),
        [
            (Drop.WRONG_VALUE, {"prompt": "hi", "chosen": 3, "rejected": "b"}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "chosen": ["a"], "rejected": "b"}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "chosen": "a", "rejected": "b", "agreement": 0.2}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "chosen": "a", "rejected": "b", "weight": "heavy"}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completion": "a", "label": "maybe"}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "scores": [1]}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "scores": [1, "N/A"]}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "scores": [1, float("nan")]}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "scores": [1, True]}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": "ab", "scores": [1, 2]}),
            (Drop.WRONG_ROLE, {"prompt": [{"role": "narrator", "content": "hi"}], "chosen": "a", "rejected": "b"}),
            (Drop.WRONG_ROLE, {"prompt": "hi", "chosen": [user("a")], "rejected": "b"}),
            (Drop.WRONG_ROLE, {"chosen": [*TURNS, user("a")], "rejected": [*TURNS, assistant("b")]}),
            (
                Drop.WRONG_ROLE,
                {"chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: x", "rejected": "\n\nHuman: hi\n\nAssistant: b"},
            ),
            (
                Drop.PROMPTS_DIFFER,
                {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: ho\n\nAssistant: b"},
            ),
            (Drop.PROMPTS_DIFFER, {"chosen": [*TURNS, assistant("a")], "rejected": [user("ho"), assistant("b")]}),
            (Drop.PROMPTS_DIFFER, {"prompt": "ho", "chosen": [*TURNS, assistant("a")], "rejected": "b"}),
            (
                Drop.PROMPTS_DIFFER,
                {"prompt": TURNS, "chosen": [user("ho"), assistant("a")], "rejected": [assistant("b")]},
            ),
            (
                Drop.CONTRADICTION,
                {"prompt": "hi", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
            ),
        ],
    )
    def test_a_bad_row_has_a_named_reason(self, reason, values):
        with pytest.raises(BadRow) as raised:
            convert(values)
        assert raised.value.reason is reason

    def test_unknown_columns_are_listed_with_the_shapes_and_the_nearest_name(self):
        with pytest.raises(DataError) as raised:
            recognise([Row({"choosen": "a", "rejected": "b", "note": "c"}, "f:1")])
        message = str(raised.value)
        assert message.startswith("f:1: got the columns choosen, note, rejected, expected one of")
        assert "pair: prompt|question|instruction|input, chosen, rejected" in message
        assert "For the column 'choosen': Did you mean 'chosen'?" in message

    def test_texts_without_a_prompt_are_no_format(self):
        with pytest.raises(DataError, match="expected one of"):
            recognise([Row({"chosen": "a", "rejected": "b"}, "f:1")])
