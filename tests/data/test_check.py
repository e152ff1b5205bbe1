"""No row disappears: it is kept, or counted under a reason."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from dpo.data import DataConfig, Drop, check
from dpo.data.check import BadRow
from dpo.data.report import Tally
from dpo.errors import DataError

GOOD = [{"prompt": f"prompt {n}", "chosen": "a good answer", "rejected": "bad"} for n in range(12)]
GONE = {
    Drop.EMPTY_COMPLETION: {"prompt": "p", "chosen": "a", "rejected": " \n"},
    Drop.EMPTY_PROMPT: {"prompt": "  ", "chosen": "a", "rejected": "b"},
    Drop.IDENTICAL: {"prompt": "p", "chosen": "a", "rejected": " a\n"},
    Drop.TIE: {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 3},
    Drop.TURNS: {"prompt": [{"role": "assistant", "content": "p"}], "chosen": "a", "rejected": "b"},
    Drop.WRONG_ROLE: {"prompt": [{"role": "narrator", "content": "p"}], "chosen": "a", "rejected": "b"},
    Drop.WRONG_VALUE: {"prompt": "p", "chosen": "a", "rejected": 7},
    Drop.PROMPTS_DIFFER: {"prompt": "p", "chosen": [{"role": "user", "content": "q"}, {"role": "gpt", "content": "a"}]},
    Drop.CONTRADICTION: {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 3},
    Drop.DUPLICATE: GOOD[0],
}
GONE[Drop.PROMPTS_DIFFER]["rejected"] = "b"


class TestReasons:
    @pytest.mark.parametrize("reason", GONE, ids=lambda reason: reason.name)
    def test_a_bad_row_is_dropped_counted_and_shown(self, write_rows, reason):
        path = write_rows([*GOOD, GONE[reason]])
        report = check(DataConfig(train=path)).report
        assert (report.read, report.kept, report.dropped) == (13, 12, {reason: 1})
        assert report.examples[reason][0].startswith(f"{path}:13")

    @pytest.mark.parametrize("reason", GONE, ids=lambda reason: reason.name)
    def test_an_error_where_asked_for_names_place_reason_and_fix(self, write_rows, reason):
        config = DataConfig(train=write_rows([*GOOD, GONE[reason]]), on_bad_row="error")
        if reason in (Drop.TIE, Drop.DUPLICATE):
            assert check(config).report.dropped == {reason: 1}
            return
        with pytest.raises(DataError) as raised:
            check(config)
        assert str(raised.value).startswith(f"{config.train}:13: {reason.label}")
        assert reason.fix in str(raised.value)

    def test_null_completions_are_empty_ones(self, write_rows):
        path = write_rows([*GOOD, {"prompt": "p", "chosen": None, "rejected": "b"}])
        assert check(DataConfig(train=path)).report.dropped == {Drop.EMPTY_COMPLETION: 1}

    def test_two_turns_of_one_speaker_are_kept(self, write_rows):
        turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        path = write_rows([*GOOD, {"prompt": turns, "chosen": "a", "rejected": "b"}])
        assert check(DataConfig(train=path)).report.kept == 13

    def test_the_same_pair_from_another_annotator_is_no_duplicate(self, write_rows):
        path = write_rows([{**GOOD[0], "group": "x"}, {**GOOD[0], "group": "y"}, *GOOD[1:]])
        assert check(DataConfig(train=path)).report.kept == 13

    def test_leaks_into_the_evaluation_file_leave_training(self, write_rows):
        evaluation = write_rows([{**GOOD[0], "prompt": "PROMPT  3"}], "eval.jsonl")
        checked = check(DataConfig(train=write_rows(GOOD), eval=evaluation))
        assert checked.report.dropped == {Drop.LEAK: 1}
        assert (len(checked.train), len(checked.eval)) == (11, 1)
        assert checked.eval_report is not None
        assert (checked.eval_report.source, checked.eval_report.kept) == (evaluation, 1)


@settings(deadline=None)  # a file is written and read each time
@given(st.lists(st.sampled_from([*GOOD, *GONE.values()]), max_size=30))
def test_no_row_is_lost_without_a_reason(tmp_path_factory, rows):
    path: Path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*GOOD[:2], *rows]))
    checked = check(DataConfig(train=str(path), max_dropped_share=1))
    report = checked.report
    assert report.read == len(rows) + 2
    assert report.kept + report.total_dropped == report.read
    assert report.kept == len(checked.train) + len(checked.eval)
    assert all(len(shown) == min(3, report.dropped[reason]) for reason, shown in report.examples.items())


def test_three_rows_of_each_reason_are_held_however_many_are_dropped():
    tally = Tally()
    for row in range(5):
        tally.drop(BadRow(Drop.TIE), f"file:{row}")
    assert (tally.dropped[Drop.TIE], tally.examples) == (5, {Drop.TIE: ["file:0", "file:1", "file:2"]})


class TestTooManyDropped:
    def test_the_limit_is_enforced_with_the_table_and_the_fix(self, write_rows):
        rows = [*GOOD[:4], *[GONE[Drop.EMPTY_PROMPT]] * 3, *[GONE[Drop.IDENTICAL]] * 2]
        with pytest.raises(DataError) as raised:
            check(DataConfig(train=write_rows(rows)))
        message = str(raised.value)
        assert "5 of 9 rows were dropped (56%), expected at most 50%" in message
        assert message.index("3 empty prompt") < message.index("2 identical completions")
        assert Drop.EMPTY_PROMPT.fix in message
        assert check(DataConfig(train=write_rows(rows), max_dropped_share=0.6)).report.kept == 4

    def test_nothing_left_is_an_error_whatever_the_limit(self, write_rows):
        with pytest.raises(DataError, match="at least one row left"):
            check(DataConfig(train=write_rows([GONE[Drop.TIE]]), max_dropped_share=1))


class TestReport:
    def test_the_summary_by_hand(self, write_rows):
        rows = [
            {"prompt": "one two", "chosen": "a b c", "rejected": "a"},
            {"prompt": "one", "chosen": "a", "rejected": "b c"},
            {"prompt": "one", "chosen": "b c", "rejected": "a"},  # the row above, the other way round
        ]
        summary = check(DataConfig(train=write_rows(rows))).report.summary
        assert summary is not None
        assert (summary.prompt_words.median, summary.prompt_words.p95) == (1, 2)
        assert summary.completion_words is not None
        assert (summary.completion_words.median, summary.completion_words.p95) == (1.5, 3)  # 1 1 1 2 2 3
        assert summary.longer_wins == 2 / 3
        assert summary.desirable == 0.5
        assert summary.contradictions == 1

    def test_the_label_balance_of_thumbs(self, write_rows):
        rows = [{"prompt": f"p{n}", "completion": "a", "label": n < 3} for n in range(4)]
        report = check(DataConfig(train=write_rows(rows))).report
        assert report.summary is not None
        assert (report.summary.desirable, report.summary.longer_wins) == (0.75, None)

    def test_soft_labels_are_counted_with_their_mean_agreement(self, write_rows):
        # 0.6 and 0.9 are soft; 1 is a certain label, and so is none given.
        rows = [{**GOOD[n], "agreement": share} for n, share in enumerate((0.6, 0.9, 1))]
        report = check(DataConfig(train=write_rows([*rows, GOOD[3]]))).report
        assert report.summary is not None
        assert (report.summary.soft, report.summary.agreement) == (2, pytest.approx(0.75))
        assert "rows with a soft label: 2, mean agreement 0.75" in report.lines()
        certain = check(DataConfig(train=write_rows([rows[2], GOOD[3]]))).report
        assert certain.summary is not None
        assert (certain.summary.soft, certain.summary.agreement) == (0, None)
        assert "soft label" not in "".join(certain.lines())

    def test_lines_table_and_dict_say_the_same(self, write_rows):
        report = check(DataConfig(train=write_rows([*GOOD, GONE[Drop.WRONG_ROLE]]))).report
        lines = "\n".join(report.lines())
        console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        console.print(report)
        for text in (lines, console.export_text()):
            assert "chosen is preferred to rejected" in text
            assert "role 'narrator'" in text
            assert "1 wrong role" in text
        plain = json.loads(json.dumps(report.to_dict()))
        assert (plain["read"], plain["kept"], plain["dropped"]) == (13, 12, {"wrong role": 1})

    def test_markup_in_a_row_is_shown_as_it_is(self, write_rows):
        bad = {**GOOD[0], "prompt": [{"role": "[bold]x[/bold]", "content": "p"}]}
        report = check(DataConfig(train=write_rows([*GOOD, bad]))).report
        console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        console.print(report)
        assert "[bold]x[/bold]" in console.export_text()


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("eval_share", 1.0),
            ("eval_share", -0.1),
            ("max_length", 1),
            ("limit", 0),
            ("overlong", "cut"),
            ("on_bad_row", "skip"),
            ("train", ""),
            ("maxlength", 9),
        ],
    )
    def test_a_value_outside_its_range_is_refused(self, field, value):
        with pytest.raises(ValidationError, match=field):
            DataConfig.model_validate({"train": "x", field: value})

    def test_every_field_says_what_it_is(self):
        assert all(field.description for field in DataConfig.model_fields.values())

    def test_limit_reads_the_first_rows(self, write_rows):
        assert check(DataConfig(train=write_rows(GOOD), limit=5)).report.read == 5


class TestRealData:
    FILE = Path(__file__).parents[2] / ".." / "shared" / "data" / "hh_harmless_dev.jsonl.gz"

    @pytest.mark.skipif(not FILE.exists(), reason="needs the HH-RLHF file beside the checkout")
    def test_the_counts_of_human_data_agree_with_an_independent_count(self):
        import gzip

        expected: Counter[str] = Counter()
        seen = set()
        for line in gzip.decompress(self.FILE.read_bytes()).decode().splitlines():
            row = json.loads(line)
            sides = [row[name].split("\n\nAssistant:") for name in ("chosen", "rejected")]
            prompts = ["\n\nAssistant:".join(side[:-1]) for side in sides]
            answers = [side[-1].strip() for side in sides]
            if prompts[0] != prompts[1]:
                expected["prompts differ"] += 1
            elif "" in answers:
                expected["empty completion"] += 1
            elif answers[0] == answers[1]:
                expected["identical completions"] += 1
            elif (prompts[0], *answers) in seen:
                expected["duplicate"] += 1
            else:
                expected["kept"] += 1
                seen.add((prompts[0], *answers))
        checked = check(DataConfig(train=str(self.FILE)))
        report = checked.report
        assert report.format == "pair of transcripts"
        assert {"kept": report.kept, **{r.label: n for r, n in report.dropped.items()}} == expected
        assert expected["prompts differ"] > 0  # the file holds the quirks this test is for
        assert expected["empty completion"] > 0
        assert all(record.prompt[-1].role == "user" for record in checked.train)
        assert not any("\n\nAssistant:" in m.content for record in checked.train for m in record.prompt)
