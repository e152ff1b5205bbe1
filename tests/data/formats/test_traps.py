"""The signs, indices and ties in which published data sets differ, and rows spread over a file, each by itself."""

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from dpo.data.check import BadRow, Drop, inspect
from dpo.data.formats import FORMATS
from dpo.data.read import Row
from dpo.data.recognise import recognise
from dpo.data.records import Preference
from dpo.errors import DataError

FILES = sorted((Path(__file__).parent / "golden").iterdir())
GOLDEN = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
ROTTEN = (None, True, 3, -1.5, "", "x", [], ["x"], [None], [[]], {}, {"x": 1}, [{}])


def first(name: str, label: str | None = None, **changed: Any) -> Preference:
    """Convert the first row of a golden file, with some columns changed."""
    case = GOLDEN[name]
    row = Row({**case["rows"][0], **changed}, "f:1")
    return recognise([row], label or case.get("label")).convert(row)


def chosen(record: Preference) -> str:
    (pair,) = record.pairs()
    return pair.chosen


class TestSignsAndIndices:
    @pytest.mark.parametrize(
        ("name", "column", "for_first", "for_second"),
        [
            ("helpsteer3", "overall_preference", -1, 1),
            ("helpsteer2_preference", "preference_strength", -1, 1),
            ("pku_helpfulness", "better_response_id", 0, 1),
            ("pku_harmlessness", "safer_response_id", 0, 1),
            ("summaries", "choice", 0, 1),
            ("arena_conversations", "winner", "model_a", "model_b"),
        ],
    )
    def test_which_value_is_for_which_completion(self, name, column, for_first, for_second):
        one, other = (first(name, **{column: value}) for value in (for_first, for_second))
        assert (chosen(one), chosen(other)) == one.completions == other.completions

    def test_shp_counts_its_labels_the_other_way_round(self):
        a, b = first("shp", labels=1, score_A=9, score_B=2), first("shp", labels=0, score_A=2, score_B=9)
        assert chosen(a) == GOLDEN["shp"]["rows"][0]["human_ref_A"]
        assert chosen(b) == GOLDEN["shp"]["rows"][0]["human_ref_B"]

    @pytest.mark.parametrize("labels", [0, 1])
    def test_shp_scores_that_deny_the_label_are_a_contradiction(self, labels):
        with pytest.raises(BadRow) as raised:
            first("shp", labels=labels, score_A=9 - 7 * labels, score_B=2 + 7 * labels)
        assert raised.value.reason is Drop.CONTRADICTION

    @pytest.mark.parametrize("start", [0, 1])
    def test_ranks_mean_the_same_from_0_and_from_1(self, start):
        answers = [{"answer": text, "rank": float(rank + start)} for rank, text in enumerate("abc")]
        assert first("nectar", answers=answers).scores == (2, 1, 0)
        own = Row({"prompt": "p", "completions": list("abc"), "ranks": [start + 1, start, start]}, "f:1")
        assert recognise([own]).convert(own).scores == (0, 1, 1)

    @pytest.mark.parametrize(
        ("name", "tie"),
        [
            ("helpsteer3", {"overall_preference": 0}),
            ("helpsteer2_preference", {"preference_strength": 0}),
            ("shp", {"score_A": 7, "score_B": 7}),
            ("arena_conversations", {"winner": "tie"}),
            ("arena_conversations", {"winner": "tie (bothbad)"}),
            ("arena_conversations", {"winner": "both_bad"}),
            ("arena_55k", {"winner_model_a": 0, "winner_tie": 1}),
            ("ultrafeedback_binarized", {"score_rejected": 8.5}),
            ("distilabel_orca", {"status": "tie"}),
            ("nectar", {"answers": [{"answer": text, "rank": 1.0} for text in "ab"]}),
        ],
    )
    def test_a_tie_is_no_preference(self, name, tie):
        with pytest.raises(BadRow) as raised:
            inspect(first(name, **tie))
        assert raised.value.reason is Drop.TIE

    def test_ratings_are_texts_and_the_best_mean_wins_not_the_overall_score(self):
        record = first("ultrafeedback")
        # Six.: (1 + 2 + 2 + 1) / 4, Eight.: (5 + 5 + 4 + 5) / 4, Many.: (3 + 2) / 2, Legs.: not rated
        assert record.scores == (1.5, 4.75, 2.5)
        assert [one.completion for one in record.demonstrations()] == ["Eight."]

    @pytest.mark.parametrize(
        ("overall", "people", "agreement"),
        [
            (2, [3, 1, 1], 1.0),
            (-1, [-1, -2, 0], 2.5 / 3),  # the neutral one is half on either side
            (-1, [-1, None, 1, -3], 2 / 3),  # who gave no score is not counted
            (-1, [1, 1, -3], 0.5),  # a minority outweighs by its strength: no less than half
        ],
    )
    def test_agreement_is_the_share_of_annotators_on_the_side_of_the_whole(self, overall, people, agreement):
        held = [{"score": score, "reasoning": "", "feedback1": "", "feedback2": ""} for score in people]
        record = first("helpsteer3", overall_preference=overall, individual_preference=held)
        assert record.agreement == pytest.approx(agreement)

    def test_mt_bench_keeps_turns_behind_the_one_that_was_judged(self):
        assert first("mt_bench").completions == ("First A.", "First B.")


class TestLabels:
    def test_rows_with_two_labels_ask_which_and_say_what_they_mean(self):
        rows = [Row(GOLDEN["pku_helpfulness"]["rows"][0], "f:1")]
        for label, got in ((None, "null"), ("helpfullness", "helpfullness")):
            with pytest.raises(DataError) as raised:
                recognise(rows, label)
            message = str(raised.value)
            assert message.startswith(f"f:1: got data.label={got}, expected one of the labels")
            assert "helpfulness: better_response_id is" in message
            assert "harmlessness: safer_response_id is" in message
            assert "Set data.label=helpfulness or data.label=harmlessness." in message
        assert "Did you mean 'helpfulness'?" in message

    def test_the_label_decides(self):
        assert chosen(first("pku_helpfulness", "helpfulness")) != chosen(first("pku_helpfulness", "harmlessness"))

    def test_a_label_for_rows_that_hold_one_is_refused(self):
        with pytest.raises(DataError, match=r"got data.label=helpfulness, expected none.*'SHP' hold one label"):
            first("shp", "helpfulness")


class TestGathering:
    def test_helpsteer2_is_read_as_a_stream(self):
        def endless() -> Iterator[Row]:
            for n in count():
                yield Row({"prompt": str(n // 3), "response": str(n), "helpfulness": n % 3}, f"f:{n + 1}")

        shape = recognise(list(islice(endless(), 3)))
        records = [shape.convert(row) for row in islice(shape.gather(endless()), 2)]
        assert [record.completions for record in records] == [("0", "1", "2"), ("3", "4", "5")]
        assert [record.source for record in records] == ["f:1", "f:4"]

    def test_a_tree_needs_no_order(self):
        rows = [Row(values, f"f:{n}") for n, values in enumerate(GOLDEN["oasst1"]["rows"][:6])]
        shape = recognise(rows)

        def content(held: list[Row]) -> set[tuple]:
            records = [shape.convert(row) for row in shape.gather(held)]
            return {(r.prompt, *sorted(zip(r.completions, r.scores or r.completions, strict=True))) for r in records}

        assert content(rows) == content(rows[::-1])

    @pytest.mark.parametrize(
        ("places", "texts"), [((0, 2), ["Oxide of iron."]), ((0, 2, 6), ["Oxide of iron.", "New and unranked."])]
    )
    def test_a_reply_ranked_alone_is_not_judged_bad(self, places, texts):
        rows = [Row(GOLDEN["oasst1"]["rows"][n], f"f:{n}") for n in places]
        (row,) = recognise(rows).gather(rows)
        record = recognise(rows).convert(row)
        assert (list(record.completions), record.scores, row.rows) == (texts, None, len(places))

    def test_what_hangs_below_a_deleted_message_is_not_used(self):
        rows = [Row(values, f"f:{n}") for n, values in enumerate(GOLDEN["oasst1"]["rows"][:5])]
        gone = [Row({**row.values, "deleted": row.values["message_id"] == "a1"}, row.source) for row in rows]
        shape = recognise(gone)
        marked = []
        for row in shape.gather(gone):
            try:
                shape.convert(row)
            except BadRow as bad:
                marked.append((row.source, row.rows, bad.reason))
        assert marked == [("f:3", 2, Drop.MARKED), ("f:1", 1, Drop.MARKED)]


def test_benchmarks_say_why_nothing_is_trained_on_them():
    assert {shape.name for shape in FORMATS if shape.evaluation_only} == {"RewardBench", "RewardBench 2"}
    assert all("reward models" in shape.evaluation_only for shape in FORMATS if shape.evaluation_only)


def rotten(value: Any) -> Iterator[Any]:
    """Yield the value with one place in it rotten, for every place and kind of rot."""
    yield from ROTTEN
    places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for place, inner in places:
        for worse in rotten(inner):
            copy = value.copy()
            copy[place] = worse
            yield copy


@pytest.mark.parametrize("name", GOLDEN)
def test_a_rotten_value_anywhere_is_a_bad_row_and_never_a_crash(name):
    case = GOLDEN[name]
    rows = [Row(values, f"f:{n}") for n, values in enumerate(case["rows"][:5])]
    shape = recognise(rows, case.get("label"))
    for number, worse in ((n, worse) for n in range(min(2, len(rows))) for worse in rotten(dict(rows[n].values))):
        if not isinstance(worse, dict):
            continue
        changed = [*rows[:number], Row(worse, "f:rotten"), *rows[number + 1 :]]
        gathered = list(shape.gather(changed))
        assert sum(row.rows for row in gathered) == len(changed)
        for row in gathered:
            with suppress(BadRow):
                inspect(shape.convert(row))
