"""Several sources as one set: mixed, drawn from, filtered; evaluation rows are kept apart."""

import json
from collections import Counter

import pytest

from dpo.data import DataConfig, Drop, check
from dpo.errors import DataError

PAIRS = [{"prompt": f"prompt {n}", "chosen": f"good {n}", "rejected": "bad"} for n in range(200)]
THUMBS = [{"prompt": f"thumb {n}", "completion": f"answer {n}", "label": True} for n in range(50)]


def prompts(records) -> set[str]:
    return {record.prompt[-1].content for record in records}


class TestMixing:
    def test_sources_become_one_set_with_an_account_of_each(self, write_rows):
        config = DataConfig(
            train=write_rows(PAIRS, "a.jsonl"), mix=[{"train": write_rows(THUMBS, "b.jsonl")}], eval_share=0.2
        )
        checked = check(config)
        assert len(checked.train) + len(checked.eval) == 250
        assert prompts(checked.train) | prompts(checked.eval) == prompts_of(PAIRS) | prompts_of(THUMBS)
        assert [(one.format, one.read, one.kept) for one in checked.sources] == [("pair", 200, 200), ("thumbs", 50, 50)]
        assert (checked.report.read, checked.report.kept, checked.report.format) == (250, 250, "pair + thumbs")
        assert checked.report.source == f"{config.train} + {config.mix[0].train}"

    def test_a_row_of_an_earlier_source_is_a_duplicate_and_a_faulty_one_is_shown(self, write_rows):
        other = write_rows([PAIRS[3], {**PAIRS[4], "chosen": ""}, *THUMBS_AS_PAIRS], "b.jsonl")
        report = check(DataConfig(train=write_rows(PAIRS, "a.jsonl"), mix=[{"train": other}])).report
        assert report.dropped == {Drop.DUPLICATE: 1, Drop.EMPTY_COMPLETION: 1}
        assert report.examples[Drop.EMPTY_COMPLETION] == (f"{other}:2",)
        assert report.read == report.kept + report.total_dropped

    def test_each_source_has_its_own_columns_and_weight(self, write_rows):
        renamed = [{"frage": f"q {n}", "gut": "ja", "schlecht": "nein", "weight": 2} for n in range(10)]
        columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
        mixed = {"train": write_rows(renamed, "b.jsonl"), "columns": columns, "weight": 0.25}
        checked = check(DataConfig(train=write_rows(PAIRS, "a.jsonl"), mix=[mixed], eval_share=0))
        assert Counter(record.weight for record in checked.train) == {1.0: 200, 0.5: 10}

    def test_the_evaluation_rows_are_kept_out_of_every_source(self, write_rows):
        config = DataConfig(
            train=write_rows(PAIRS, "a.jsonl"),
            mix=[{"train": write_rows(THUMBS, "b.jsonl")}],
            eval=write_rows([{**PAIRS[0], "prompt": "PROMPT  7"}, {**PAIRS[0], "prompt": "Thumb 9\n"}], "e.jsonl"),
        )
        checked = check(config)
        assert checked.report.dropped == {Drop.LEAK: 2}
        assert not prompts(checked.train) & {"prompt 7", "thumb 9"}
        assert [one.dropped for one in checked.sources] == [{Drop.LEAK: 1}, {Drop.LEAK: 1}]


class TestShares:
    def test_a_share_of_the_prompts_is_drawn_and_the_rest_is_no_fault(self, write_rows):
        path = write_rows(PAIRS)
        small = check(DataConfig(train=path, share=0.2, eval_share=0, max_dropped_share=0))
        larger = check(DataConfig(train=path, share=0.4, eval_share=0, on_bad_row="error"))
        assert 20 < len(small.train) < 60  # binomial: mean 40, three deviations are 17
        assert prompts(small.train) < prompts(larger.train)
        assert small.report.dropped == {Drop.NOT_DRAWN: 200 - len(small.train)}
        other = check(DataConfig(train=path, share=0.2, eval_share=0, seed=1))
        assert prompts(other.train) != prompts(small.train)

    def test_it_does_not_depend_on_the_side(self, write_rows):
        checked = check(DataConfig(train=write_rows(PAIRS), share=0.5, eval_share=0.3))
        assert len(checked.eval) > 10
        assert len(checked.train) > 40

    def test_a_share_of_one_source_leaves_the_other_whole(self, write_rows):
        mixed = {"train": write_rows(THUMBS, "b.jsonl"), "share": 0.5}
        checked = check(DataConfig(train=write_rows(PAIRS, "a.jsonl"), mix=[mixed], eval_share=0))
        assert checked.sources[0].kept == 200
        assert 10 < checked.sources[1].kept < 40


class TestFilter:
    ROWS = (
        {"prompt": "a", "chosen": "one two three", "rejected": "one two", "score_chosen": 5, "score_rejected": 4.5},
        {"prompt": "b", "chosen": "one", "rejected": "one two", "score_chosen": 5, "score_rejected": 1},
        {"prompt": "c", "chosen": "x y", "rejected": "y x", "agreement": 0.6},
        {"prompt": "d", "chosen": "x y", "rejected": "y x", "agreement": 0.9},
        {"prompt": "e", "chosen": "x y", "rejected": "y x"},
    )

    @pytest.mark.parametrize(
        ("wanted", "left"),
        [
            ({}, "abcde"),
            ({"min_gap": 0.5}, "abcde"),
            ({"min_gap": 0.6}, "bcde"),
            ({"min_gap": 1.1}, "b"),
            ({"min_agreement": 0.9}, "abde"),
            ({"min_words": 2}, "acde"),
            ({"max_words": 2}, "bcde"),
            ({"min_words": 2, "max_words": 2}, "cde"),
        ],
    )
    def test_rows_that_are_not_wanted_are_counted(self, write_rows, wanted, left):
        checked = check(DataConfig(train=write_rows(list(self.ROWS)), filter=wanted, eval_share=0, max_dropped_share=0))
        assert "".join(sorted(prompts(checked.train))) == left
        assert checked.report.dropped == ({Drop.FILTERED: 5 - len(left)} if len(left) < 5 else {})

    def test_a_filter_that_leaves_nothing_says_so(self, write_rows):
        with pytest.raises(DataError, match=r"5 of 5 rows were dropped(.|\n)*filtered out(.|\n)*change data.filter"):
            check(DataConfig(train=write_rows(list(self.ROWS)), filter={"min_words": 9}))

    def test_an_evaluation_file_is_not_filtered(self, write_rows):
        config = DataConfig(
            train=write_rows(PAIRS, "a.jsonl"), eval=write_rows(list(self.ROWS), "e.jsonl"), filter={"max_words": 2}
        )
        assert len(check(config).eval) == 5


def test_columns_of_ones_own_hold_for_both_files(write_rows):
    rows = [{"q": f"q {n}", "yes": "ja", "no": "nein"} for n in range(8)]
    columns = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    config = DataConfig(train=write_rows(rows[:5], "a.jsonl"), eval=write_rows(rows[5:], "e.jsonl"), columns=columns)
    checked = check(config)
    assert (len(checked.train), len(checked.eval)) == (5, 3)
    assert checked.train[0].completions == ("ja", "nein")


def prompts_of(rows) -> set[str]:
    return {row["prompt"] for row in rows}


THUMBS_AS_PAIRS = [{"prompt": row["prompt"], "chosen": "a", "rejected": "b"} for row in THUMBS]


def test_the_account_survives_being_written(write_rows):
    report = check(DataConfig(train=write_rows([*PAIRS, PAIRS[0], {**PAIRS[1], "chosen": 7}]))).report
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report
