"""Every general format by a small row, every reason for which one refuses a row, and columns of the user's own."""

import json
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data import DataConfig, check
from dpo.data.check import BadRow, Drop, inspect
from dpo.data.formats import FORMATS, GENERAL
from dpo.data.read import Row
from dpo.data.recognise import check_columns, recognise, rename
from dpo.data.records import Message, Preference
from dpo.data.split import prompt_key
from dpo.data.write import write
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
            ("rated", {"prompt": "hi", "completions": ["a", "b"], "scores": None}, (HI,), ("a", "b"), None),
            ("rated", {"prompt": "hi", "completions": ["a", "b"]}, (HI,), ("a", "b"), None),
            (
                "ranked",
                {"prompt": "hi", "completions": ["a", "b", "c"], "ranks": [2, 1, 1]},
                (HI,),
                ("a", "b", "c"),
                (0, 1, 1),
            ),
            (
                "voted",
                {"prompt": "hi", "completions": ["a", "b", "c"], "votes": [1, 0, 4]},
                (HI,),
                ("a", "b", "c"),
                (1, 0, 4),
            ),
            ("correction", {"prompt": "hi", "completion": "a", "correction": "b"}, (HI,), ("b", "a"), (1, 0)),
            (
                "correction",
                {"prompt": TURNS, "completion": [*TURNS, assistant("a")], "correction": [assistant("b")]},
                (HI,),
                ("b", "a"),
                (1, 0),
            ),
            ("demonstration", {"prompt": "hi", "completion": "a"}, (HI,), ("a",), None),
            ("prompts", {"prompt": "hi"}, (HI,), (), None),
        ],
    )
    def test_the_row_becomes_the_record(self, name, values, prompt, completions, scores):
        assert recognise([Row(values, "f:1")]).name == name
        record = convert(values)
        assert (record.prompt, record.completions, record.scores) == (prompt, completions, scores)
        assert record.source == "f:1"

    def test_every_general_format_is_tested_above(self):
        marks = [mark for mark in TestFormats.test_the_row_becomes_the_record.pytestmark if mark.name == "parametrize"]
        assert {case[0] for case in marks[0].args[1]} == {shape.name for shape in GENERAL}

    def test_no_two_formats_share_a_name(self):
        assert len({shape.name for shape in FORMATS}) == len(FORMATS)

    def test_columns_beside_the_format(self):
        pair = {"prompt": "hi", "chosen": "a", "rejected": "b"}
        record = convert({**pair, "agreement": 0.75, "weight": 2, "group": 7})
        assert (record.agreement, record.weight, record.group) == (0.75, 2.0, "7")

    @pytest.mark.parametrize(
        ("said", "feedback"),
        [("too long", ("too long",)), (["too long", "kind"], ("too long", "kind")), (" ", ()), (None, ()), ([], ())],
    )
    def test_what_people_said_is_kept_in_every_format(self, said, feedback):
        for values in ({"chosen": "a", "rejected": "b"}, {"completion": "a", "label": True}, {"completions": ["a"]}):
            assert convert({"prompt": "hi", **values, "feedback": said}).feedback == feedback

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
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "scores": [1, None]}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "ranks": [1]}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "ranks": [1, -1]}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "votes": [1, 2, 3]}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "votes": [1, -2]}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "votes": [1, 0.5]}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "completions": ["a", "b"], "votes": [1, 2], "agreement": 0.6}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "chosen": "a", "rejected": "b", "feedback": 3}),
            (Drop.WRONG_VALUE, {"prompt": "hi", "chosen": "a", "rejected": "b", "feedback": ["x", 3]}),
            (Drop.ALONE, {"prompt": "hi", "completions": ["a"], "ranks": [1]}),
            (Drop.ALONE, {"prompt": "hi", "completions": ["a"], "votes": [3]}),
            (Drop.IDENTICAL, {"prompt": "hi", "completion": "a", "correction": " a"}),
            (Drop.EMPTY_COMPLETION, {"prompt": "hi", "completion": "a", "correction": None}),
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
            (  # the one was asked of something else than the other
                Drop.PROMPTS_DIFFER,
                {
                    "prompt": "hi",
                    "chosen": [*TURNS, assistant("a")],
                    "rejected": [{"role": "system", "content": "be rude"}, *TURNS, assistant("b")],
                },
            ),
            (Drop.CONTRADICTION, {"prompt": "hi", "chosen": "a", "rejected": "b", "votes": [1, 2]}),
            (
                Drop.CONTRADICTION,
                {"prompt": "hi", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
            ),
        ],
    )
    def test_a_bad_row_has_a_named_reason(self, reason, values):
        correction = values.get("completion") or values.get("correction")
        row = Row(values, "f:1")
        head = row if reason is not Drop.EMPTY_COMPLETION else Row({**values, "correction": correction}, "f:1")
        with pytest.raises(BadRow) as raised:
            inspect(recognise([head]).convert(row))
        assert raised.value.reason is reason

    def test_unknown_columns_are_listed_with_the_shapes_and_the_nearest_name(self):
        with pytest.raises(DataError) as raised:
            recognise([Row({"choosen": "a", "rejected": "b", "note": "c"}, "f:1")])
        message = str(raised.value)
        assert message.startswith("f:1: got the columns choosen, note, rejected, expected those of a format. Nearest")
        assert "pair: prompt|question|instruction|input, chosen|chosen_response, rejected|rejected_response" in message
        assert "HelpSteer3" not in message
        assert "For the column 'choosen': Did you mean 'chosen'?" in message

    def test_texts_without_a_prompt_are_no_format(self):
        with pytest.raises(DataError, match="expected those of a format"):
            recognise([Row({"chosen": "a", "rejected": "b"}, "f:1")])


class TestVotes:
    def test_the_winners_share_is_the_agreement(self):
        assert convert({"prompt": "hi", "chosen": "a", "rejected": "b", "votes": [3, 1]}).agreement == 0.75
        assert convert({"prompt": "hi", "completions": ["a", "b"], "votes": [1, 4]}).agreement == 0.8

    def test_of_three_completions_no_share_holds_for_each_two(self):
        assert convert({"prompt": "hi", "completions": ["a", "b", "c"], "votes": [3, 1, 0]}).agreement is None

    @pytest.mark.parametrize("votes", [[2, 2], [0, 0]])
    @pytest.mark.parametrize("texts", [{"chosen": "a", "rejected": "b"}, {"completions": ["a", "b"]}])
    def test_as_many_for_either_are_a_tie(self, texts, votes):
        with pytest.raises(BadRow) as raised:
            inspect(convert({"prompt": "hi", **texts, "votes": votes}))
        assert raised.value.reason is Drop.TIE


class TestColumns:
    OWN = Row({"question": "hi", "good": "a", "bad": "b", "prompt": "number 7"}, "f:1", rows=2)
    NAMES = MappingProxyType({"prompt": "question", "chosen": "good", "rejected": "bad"})

    def test_a_named_column_is_read_and_one_of_that_name_is_hidden(self):
        row = rename(self.OWN, self.NAMES)
        assert row == Row({"prompt": "hi", "chosen": "a", "rejected": "b"}, "f:1", rows=2)
        assert recognise([row]).convert(row).completions == ("a", "b")

    def test_two_columns_can_change_places(self):
        row = rename(
            Row({"prompt": "hi", "chosen": "a", "rejected": "b"}, "f:1"), {"chosen": "rejected", "rejected": "chosen"}
        )
        assert row.values == {"prompt": "hi", "chosen": "b", "rejected": "a"}

    def test_a_column_that_a_later_row_lacks_stays_absent(self):
        assert rename(Row({"bad": "b", "chosen": "no preference"}, "f:2"), self.NAMES).values == {"rejected": "b"}

    def test_without_names_the_row_is_the_same(self):
        assert rename(self.OWN, {}) is self.OWN

    def test_good_names_pass(self):
        check_columns(
            [self.OWN], {**self.NAMES, "weight": "prompt", "votes": "good", "score_A": "bad", "feedback": "bad"}
        )

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"choosen": "good"}, r"f:1: got data\.columns\.choosen=good, expected a column .*Did you mean 'chosen'\?"),
            (
                {"chosen": "god"},
                r"f:1: got data\.columns\.chosen=god, expected one of the file's columns: bad, good, prompt, question\."
                r" Did you mean 'good'\?",
            ),
        ],
    )
    def test_a_wrong_name_is_refused_with_the_nearest(self, columns, message):
        with pytest.raises(DataError, match=message):
            check_columns([self.OWN], columns)


messages = st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), st.text(max_size=5))
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    completions = draw(st.lists(st.text(max_size=5), max_size=4).map(tuple))
    exactly = st.lists(finite, min_size=len(completions), max_size=len(completions)).map(tuple)
    return Preference(
        prompt=draw(st.lists(messages, max_size=3).map(tuple)),
        completions=completions,
        scores=draw(st.none() | exactly),
        agreement=draw(st.none() | st.floats(0.5, 1)),
        weight=draw(st.floats(0, 1e6)),
        group=draw(st.none() | st.text(max_size=5)),
        feedback=draw(st.lists(st.text(max_size=5), max_size=3).map(tuple)),
        source="f:1",
    )


@settings(max_examples=60, deadline=None)
@given(preferences())
def test_the_rated_format_holds_every_record(record):
    row = Row(
        {
            "prompt": [{"role": message.role, "content": message.content} for message in record.prompt],
            "completions": list(record.completions),
            "scores": None if record.scores is None else list(record.scores),
            "agreement": record.agreement,
            "weight": record.weight,
            "group": record.group,
            "feedback": list(record.feedback),
        },
        "f:1",
    )
    shape = recognise([row])
    assert shape.name == "rated"
    assert shape.convert(row) == record


class TestTools:
    CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Kiel"}}}  # noqa: RUF012
    TURNS = (
        user("Rain in Kiel?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "yes", "tool_call_id": "1", "name": "weather", "unknown": 3},
    )

    def test_calls_and_their_results_are_kept_for_the_template(self):
        record = convert(
            {"prompt": list(self.TURNS), "chosen": [assistant("It does.")], "rejected": [assistant("No.")]}
        )
        asked, call, result = record.prompt
        assert (asked.extra, call.content) == ("", "")
        assert json.loads(call.extra) == {"tool_calls": [self.CALL]}
        assert json.loads(result.extra) == {"tool_call_id": "1", "name": "weather"}

    def test_another_call_is_another_prompt(self):
        other = [self.TURNS[0], {**self.TURNS[1], "tool_calls": [{**self.CALL, "id": "2"}]}, self.TURNS[2]]
        keys = {
            prompt_key(convert({"prompt": list(turns), "chosen": "a", "rejected": "b"}).prompt)
            for turns in (self.TURNS, other)
        }
        assert len(keys) == 2

    def test_a_call_is_no_completion(self):
        row = {"prompt": "hi", "chosen": [{**self.TURNS[1], "content": "Let me see."}], "rejected": [assistant("No.")]}
        with pytest.raises(BadRow, match="chosen ends with a call of tools, expected text"):
            convert(row)

    def test_what_was_written_is_read_again(self, tmp_path):
        record = convert({"prompt": list(self.TURNS), "chosen": "a", "rejected": "b"})
        for name in ("out.jsonl", "out.parquet"):
            write([record], tmp_path / name)
            (again,) = check(DataConfig(train=str(tmp_path / name), eval_share=0)).train
            assert again.prompt == record.prompt
