"""From a file to examples: views, truncation, mismatched completions, the fingerprint."""

import json
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data import DataConfig, Drop, Message, check, prepare
from dpo.data.examples import Example
from dpo.data.mismatch import with_mismatched
from dpo.errors import DataError

PAIRS = [{"prompt": f"prompt {n}", "chosen": f"good {n}", "rejected": "bad", "agreement": 0.8} for n in range(12)]
THUMBS = [{"prompt": f"prompt {n}", "completion": f"answer {n}", "label": n % 2 == 0} for n in range(12)]
RATED = [{"prompt": f"prompt {n}", "completions": ["a", "b", "c"], "scores": [2, 1, 1]} for n in range(4)]
END = "<|im_end|>"


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


class TestViews:
    def test_pairs(self, write_rows, chatml):
        path = write_rows([{**PAIRS[0], "weight": 3}, *PAIRS[1:]])
        prepared = prepare(DataConfig(train=path, eval_share=0), chatml, "pairs")
        first = prepared.train[0]
        assert (len(prepared.train), prepared.eval) == (12, ())
        assert [decode(chatml, ids) for ids in first.completions] == [f"good 0{END}", f"bad{END}"]
        assert decode(chatml, first.prompt) == "<|im_start|>user\nprompt 0<|im_end|>\n<|im_start|>assistant\n"
        assert (first.preference, first.weight, first.source) == (0.8, 3.0, f"{path}:1")
        assert (first.prompt_messages, first.texts) == ((Message("user", "prompt 0"),), ("good 0", "bad"))

    def test_every_pair_of_a_rated_row_shares_its_prompt(self, write_rows, chatml):
        prepared = prepare(DataConfig(train=write_rows(RATED), eval_share=0), chatml, "pairs")
        assert [example.texts for example in prepared.train] == [("a", "b"), ("a", "c")] * 4
        assert prepared.train[0].prompt == prepared.train[1].prompt
        assert prepared.report.kept == 4

    def test_judgements(self, write_rows, chatml):
        prepared = prepare(DataConfig(train=write_rows(THUMBS), eval_share=0), chatml, "judgements")
        assert [example.desirable for example in prepared.train] == [True, False] * 6
        assert decode(chatml, prepared.train[1].completions[0]) == f"answer 1{END}"
        assert all(len(example.completions) == 1 for example in prepared.train)

    def test_demonstrations_leave_thumbs_down_unused_and_say_so(self, write_rows, chatml):
        prepared = prepare(DataConfig(train=write_rows(THUMBS), eval_share=0), chatml, "demonstrations")
        assert [example.texts for example in prepared.train] == [(f"answer {n}",) for n in range(0, 12, 2)]
        report = prepared.report
        assert (report.read, report.kept, report.unused, report.total_dropped) == (12, 6, 6, 0)
        assert "rows without an example in this view: 6" in report.lines()

    @pytest.mark.parametrize(
        ("rows", "view", "held"),
        [
            (THUMBS, "pairs", "judgements and demonstrations"),
            ([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}], "judgements", "demonstrations"),
            ([{"prompt": "a"}, {"prompt": "b"}], "demonstrations", "prompts only"),
        ],
    )
    def test_an_empty_view_says_what_the_file_holds(self, write_rows, chatml, rows, view, held):
        with pytest.raises(DataError, match=f"expected rows that hold {view}. They hold {held}:"):
            prepare(DataConfig(train=write_rows(rows)), chatml, view)


class TestRankings:
    def prepared(self, write_rows, chatml, rows, view="rankings", **more):
        return prepare(DataConfig(train=write_rows(rows), **{"eval_share": 0, **more}), chatml, view)

    def test_comparisons_are_the_pairs_with_their_scores(self, write_rows, chatml):
        rows = [*RATED, {"prompt": "p", "completions": ["x", "y"], "scores": [-1, 3.5], "agreement": 0.7, "weight": 2}]
        pairs = self.prepared(write_rows, chatml, rows, "pairs").train
        found = self.prepared(write_rows, chatml, rows, "comparisons").train
        assert [replace(example, scores=()) for example in found] == list(pairs)
        assert [example.scores for example in found] == [(2, 1), (2, 1)] * 4 + [(3.5, -1)]
        assert (found[-1].texts, found[-1].preference, found[-1].weight) == (("y", "x"), 0.7, 2)

    def test_pairs_that_nobody_scored_count_as_one_and_zero(self, write_rows, chatml):
        rows = [{**PAIRS[0], "chosen_score": 9, "rejected_score": 4}, *PAIRS[1:]]
        for view in ("comparisons", "rankings"):
            found = self.prepared(write_rows, chatml, rows, view).train
            assert [example.scores for example in found[:2]] == [(9, 4), (1, 0)]

    def test_rankings_hold_all_completions_best_first(self, write_rows, chatml):
        rows = [{"prompt": "p", "completions": ["low", "top", "mid", "also mid"], "scores": [0, 9, 4, 4], "weight": 3}]
        (one,) = self.prepared(write_rows, chatml, [{**rows[0], "agreement": 0.8}]).train
        assert one.texts == ("top", "mid", "also mid", "low")
        assert one.scores == (9, 4, 4, 0)
        assert [decode(chatml, ids) for ids in one.completions] == [f"{text}{END}" for text in one.texts]
        assert (one.preference, one.weight, one.prompt_messages) == (0.8, 3, (Message("user", "p"),))

    def test_other_views_hold_no_scores(self, write_rows, chatml):
        for view in ("pairs", "judgements", "demonstrations"):
            assert all(example.scores == () for example in self.prepared(write_rows, chatml, RATED, view).train)

    def test_equal_completions_count_once_at_their_best_place_and_are_counted(self, write_rows, make_tokenizer):
        template = "{% for m in messages %}{{ m['content'] | lower + '</s>' }}{% endfor %}"  # no text is stripped
        rows = [
            {"prompt": "p", "completions": ["b", "a", " a", "A"], "scores": [2, 1, 3, 0]},
            {"prompt": "q", "completions": ["b", "a", "c"], "scores": [2, 1, 3]},
        ]
        prepared = self.prepared(write_rows, make_tokenizer(template), rows)
        assert [(e.texts, e.scores) for e in prepared.train] == [
            ((" a", "b"), (3, 2)),  # " a" and "a" are one text, "a" and "A" the same tokens
            (("c", "b", "a"), (3, 2, 1)),
        ]
        assert (prepared.report.kept, prepared.report.merged) == (2, 1)
        assert "rankings with equal completions, counted once: 1" in prepared.report.lines()
        assert prepared.report.to_dict()["merged"] == 1

    def test_a_ranking_that_merging_leaves_without_an_order_is_dropped(self, write_rows, make_tokenizer):
        template = "{% for m in messages %}{{ m['content'] | lower + '</s>' }}{% endfor %}"
        rows = [
            {"prompt": "p", "completions": ["X", "x"], "scores": [2, 1]},
            {"prompt": "q", "completions": ["a", "b", "A"], "scores": [2, 2, 1]},
            *RATED,
        ]
        report = self.prepared(write_rows, make_tokenizer(template), rows).report
        assert report.dropped == {Drop.IDENTICAL: 1, Drop.TIE: 1}
        assert (report.kept, report.merged) == (4, 0)

    def test_fewer_than_two_completions_are_unused(self, write_rows, chatml):
        rows = [*RATED, {"prompt": "p", "completions": ["a"], "scores": [1]}]
        report = self.prepared(write_rows, chatml, rows).report
        assert (report.kept, report.unused, report.total_dropped) == (4, 1, 0)

    @pytest.mark.parametrize("view", ["comparisons", "rankings"])
    def test_thumbs_hold_neither(self, write_rows, chatml, view):
        with pytest.raises(
            DataError, match=f"expected rows that hold {view}. They hold judgements and demonstrations:"
        ):
            self.prepared(write_rows, chatml, THUMBS, view)


class TestPrompts:
    def prepared(self, write_rows, chatml, rows, **more):
        return prepare(DataConfig(train=write_rows(rows), **{"eval_share": 0, **more}), chatml, "prompts")

    def test_one_example_a_prompt_with_the_answer_people_gave(self, write_rows, chatml):
        prepared = self.prepared(write_rows, chatml, [*PAIRS[:2], {"prompt": "open", "chosen": "x", "rejected": "y"}])
        assert [example.texts for example in prepared.train] == [("good 0",), ("good 1",), ("x",)]
        assert all(example.completions == () == example.scores for example in prepared.train)
        assert decode(chatml, prepared.train[2].prompt) == "<|im_start|>user\nopen<|im_end|>\n<|im_start|>assistant\n"
        assert prepared.train[0].preference == 1

    def test_prompts_without_an_answer_hold_none(self, write_rows, chatml):
        prepared = self.prepared(write_rows, chatml, [{"prompt": "a"}, {"prompt": "b"}])
        assert [example.texts for example in prepared.train] == [(), ()]

    def test_a_repeated_prompt_appears_once_with_the_first_answer_any_row_has(self, write_rows, chatml):
        rows = [
            {"prompt": "p", "completion": "poor", "label": False},
            {"prompt": "q", "completion": "fine", "label": True},
            {"prompt": "p", "completion": "good", "label": True},
            {"prompt": "p", "completion": "better", "label": True},
        ]
        prepared = self.prepared(write_rows, chatml, rows)
        assert [(e.prompt_messages[0].content, e.texts) for e in prepared.train] == [("p", ("good",)), ("q", ("fine",))]
        assert prepared.train[0].source.endswith(":3")
        assert (prepared.report.read, prepared.report.kept, prepared.report.unused) == (4, 2, 2)

    def test_a_prompt_on_both_sides_of_the_split_is_on_neither_twice(self, write_rows, chatml):
        rows = [{**row, "prompt": f"question {n % 6}"} for n, row in enumerate(THUMBS)]
        prepared = self.prepared(write_rows, chatml, rows, eval_share=0.4)
        ids = [example.prompt for example in (*prepared.train, *prepared.eval)]
        assert len(ids) == len(set(ids)) == 6
        assert prepared.eval

    def test_a_prompt_that_leaves_no_room_is_dropped_and_a_long_answer_is_no_reason(self, write_rows, make_tokenizer):
        rows = [
            {"prompt": "BCDEFG", "completion": "X"},  # six tokens: room for one of a completion
            {"prompt": "BCDEFGH", "completion": "X"},
            {"prompt": "BCD", "completion": "XYZQXYZQXYZQ"},
        ]
        config = {"max_length": 7, "max_dropped_share": 0.9}
        prepared = self.prepared(write_rows, make_tokenizer(), rows, **config)
        assert [len(example.prompt) for example in prepared.train] == [6, 3]
        assert prepared.report.dropped == {Drop.OVERLONG_PROMPT: 1}
        cut = self.prepared(write_rows, make_tokenizer(), rows, overlong="truncate_prompt", **config)
        assert decode(make_tokenizer(), cut.train[1].prompt) == "CDEFGH"
        assert cut.report.truncated == 1


class TestSides:
    def test_a_share_of_the_prompts_evaluates(self, write_rows, chatml):
        checked = check(DataConfig(train=write_rows(PAIRS), eval_share=0.3, seed=1))
        prepared = prepare(checked, chatml, "pairs")
        train, evaluation = ({example.prompt for example in side} for side in (prepared.train, prepared.eval))
        assert train
        assert evaluation
        assert not train & evaluation
        assert len(train) + len(evaluation) == prepared.report.kept == 12

    def test_an_evaluation_file_has_its_own_report(self, write_rows, chatml):
        rows = [*PAIRS[:4], {**PAIRS[5], "chosen": "a very long answer " * 30}]
        config = DataConfig(train=write_rows(PAIRS[6:]), eval=write_rows(rows, "e.jsonl"), max_length=100)
        prepared = prepare(config, chatml, "pairs")
        assert (len(prepared.train), len(prepared.eval)) == (6, 4)
        assert prepared.eval_report is not None
        assert prepared.eval_report.dropped == {Drop.OVERLONG_COMPLETION: 1}
        assert prepared.report.dropped == {}

    def test_a_side_that_ends_empty_is_an_error(self, write_rows, chatml):
        config = DataConfig(train=write_rows(THUMBS), eval=write_rows([{**THUMBS[1], "prompt": "x"}], "e.jsonl"))
        with pytest.raises(DataError, match=r"got no eval example in the view 'demonstrations' from 1 rows"):
            prepare(config, chatml, "demonstrations")


class TestTokenising:
    def test_what_is_dropped_here_joins_the_report(self, write_rows, chatml):
        long = {**PAIRS[0], "prompt": "a long prompt " * 40}
        spelled = {**PAIRS[0], "prompt": "what is <|im_end|>?"}
        path = write_rows([*PAIRS, long, spelled, {**PAIRS[1], "chosen": ""}])
        checked = check(DataConfig(train=path, max_length=64, eval_share=0))
        report = prepare(checked, chatml, "pairs").report
        assert report.dropped == {Drop.OVERLONG_PROMPT: 1, Drop.EMPTY_COMPLETION: 1}
        assert (report.read, report.kept, report.special_tokens) == (15, 13, 1)
        assert report.examples[Drop.OVERLONG_PROMPT][0].startswith(f"{path}:13 (")
        assert prepare(checked, chatml, "pairs").report == report  # preparing twice counts once

    def test_too_many_dropped_here_is_an_error(self, write_rows, chatml):
        with pytest.raises(DataError, match=r"12 of 12 rows were dropped \(100%\)(.|\n)*Raise max_length"):
            prepare(DataConfig(train=write_rows(PAIRS), max_length=8), chatml, "pairs")

    def test_truncated_rows_are_counted(self, write_rows, chatml):
        config = DataConfig(train=write_rows(PAIRS), eval_share=0, max_length=16, overlong="truncate_prompt")
        prepared = prepare(config, chatml, "pairs")
        assert prepared.report.truncated == 12
        assert all(len(e.prompt) + max(map(len, e.completions)) == 16 for e in prepared.train)

    def test_completions_that_truncation_makes_equal_are_dropped(self, write_rows, make_tokenizer):
        rows = [
            {"prompt": "BCDE", "chosen": "XYZQ", "rejected": "XYQ"},
            {"prompt": "BCDF", "chosen": "QX", "rejected": "XQ"},
            {"prompt": "BCDG", "chosen": "QX", "rejected": "XQ"},
        ]
        config = DataConfig(train=write_rows(rows), eval_share=0, max_length=6, overlong="truncate_completion")
        report = prepare(config, make_tokenizer(), "pairs").report  # two tokens are left: "XY" and "XY"
        assert report.dropped == {Drop.IDENTICAL_TOKENS: 1}
        assert report.kept == 2

    def test_completions_that_a_template_makes_equal_are_identical(self, write_rows, make_tokenizer):
        template = "{% for m in messages %}{{ m['content'] | lower + '</s>' }}{% endfor %}"
        rows = [{"prompt": "a", "chosen": "X", "rejected": "x"}, *PAIRS[:2]]
        report = prepare(DataConfig(train=write_rows(rows), eval_share=0), make_tokenizer(template), "pairs").report
        assert report.dropped == {Drop.IDENTICAL: 1}

    def test_a_long_rejected_answer_does_not_drop_the_demonstration(self, write_rows, chatml):
        path = write_rows([{**row, "rejected": "a very long answer " * 30} for row in PAIRS])
        config = DataConfig(train=path, eval_share=0, max_length=64)
        assert prepare(config, chatml, "demonstrations").report.kept == 12


class TestMismatched:
    @settings(deadline=None)
    @given(st.lists(st.integers(0, 5), min_size=2, max_size=30).filter(lambda ps: len(set(ps)) > 1), st.integers(0, 9))
    def test_the_partner_always_answers_another_prompt(self, prompts, seed):
        examples = [
            Example((7, prompt), ((prompt, n),), 1.0, True, 1.0, f"f:{n}", (Message("user", f"P {prompt}"),), (str(n),))
            for n, prompt in enumerate(prompts)
        ]
        found = list(with_mismatched(examples, examples, "train", DataConfig(train="x", seed=seed)))
        assert [e.completions[0] for e in found] == [e.completions[0] for e in examples]
        assert all(len(e.completions) == len(e.texts) == 2 for e in found)
        assert all(e.completions[1][0] != e.completions[0][0] for e in found)
        if len({prompts.count(prompt) for prompt in prompts}) == 1:  # a rotation uses every completion once
            assert len({e.completions[1] for e in found}) == len(examples)

    def test_it_is_deterministic_in_the_seed_and_stays_on_its_side(self, write_rows, chatml):
        path = write_rows([{**row, "prompt": f"question {n}"} for n, row in enumerate(THUMBS * 4)])

        def run(seed: int) -> tuple[list, list]:
            config = DataConfig(train=path, eval_share=0.3, seed=seed)
            prepared = prepare(config, chatml, "judgements", mismatched=True)
            return prepared.train, prepared.eval

        train, evaluation = run(0)
        assert run(0) == (train, evaluation)
        for side in (train, evaluation):
            assert {e.texts[1] for e in side} <= {e.texts[0] for e in side}
        partners = {e.source: e.texts[1] for e in train}
        assert any(partners.get(e.source, e.texts[1]) != e.texts[1] for e in run(1)[0])

    def test_a_partner_is_cut_to_the_room_its_new_prompt_leaves(self, write_rows, make_tokenizer):
        rows = [
            {"prompt": "BCDEFG", "completion": "X", "label": True},
            {"prompt": "B", "completion": "XYZQXY", "label": False},
        ]
        config = DataConfig(train=write_rows(rows), eval_share=0, max_length=9)
        long_prompt, short_prompt = prepare(config, make_tokenizer(), "judgements", mismatched=True).train
        assert [len(ids) for ids in long_prompt.completions] == [2, 3]
        assert [len(ids) for ids in short_prompt.completions] == [7, 2]

    def test_one_prompt_alone_is_an_error(self, write_rows, chatml):
        path = write_rows([{**row, "prompt": "same"} for row in THUMBS])
        with pytest.raises(DataError, match=r"all 12 train examples have one prompt, expected at least two"):
            prepare(DataConfig(train=path, eval_share=0), chatml, "judgements", mismatched=True)

    def test_other_views_have_none(self, write_rows, chatml):
        with pytest.raises(ValueError, match="belong to the view 'judgements', got 'pairs'"):
            prepare(DataConfig(train=write_rows(PAIRS)), chatml, "pairs", mismatched=True)


class TestFingerprint:
    def fingerprint(self, write_rows, chatml, rows, **more) -> str:
        return prepare(DataConfig(train=write_rows(rows), **{"eval_share": 0, **more}), chatml, "pairs").fingerprint

    def test_the_same_data_has_the_same_one(self, write_rows, chatml):
        assert self.fingerprint(write_rows, chatml, PAIRS) == self.fingerprint(write_rows, chatml, PAIRS)

    @pytest.mark.parametrize(
        "change",
        [
            {"prompt": "another"},
            {"chosen": "better"},
            {"rejected": "worse"},
            {"agreement": 0.9},
            {"weight": 2},
            {"chosen": "bad", "rejected": "good 0"},
        ],
        ids=str,
    )
    def test_any_change_changes_it(self, write_rows, chatml, change):
        changed = [{**PAIRS[0], **change}, *PAIRS[1:]]
        assert self.fingerprint(write_rows, chatml, PAIRS) != self.fingerprint(write_rows, chatml, changed)

    def test_order_and_sides_change_it(self, write_rows, chatml):
        straight = self.fingerprint(write_rows, chatml, PAIRS)
        assert straight != self.fingerprint(write_rows, chatml, PAIRS[::-1])
        assert straight != self.fingerprint(write_rows, chatml, PAIRS, eval_share=0.3)

    @pytest.mark.parametrize(
        ("rows", "view"), [(PAIRS, "pairs"), (RATED, "pairs"), (THUMBS, "judgements"), (RATED, "demonstrations")]
    )
    def test_it_is_what_finished_runs_have_recorded(self, write_rows, chatml, rows, view):
        prepared = prepare(DataConfig(train=write_rows(rows), eval_share=0), chatml, view)
        digest = sha256()
        for e in prepared.train:
            values = ["train", e.prompt, e.completions, e.preference, e.desirable, e.weight]
            digest.update(json.dumps(values).encode() + b"\n")
        assert prepared.fingerprint == digest.hexdigest()

    @pytest.mark.parametrize("view", ["comparisons", "rankings"])
    def test_scores_change_it_where_they_are_read(self, write_rows, chatml, view):
        changed = [{**RATED[0], "scores": [3, 1, 1]}, *RATED[1:]]
        first, second, pairs, changed_pairs = (
            prepare(DataConfig(train=write_rows(rows), eval_share=0), chatml, of).fingerprint
            for rows, of in ((RATED, view), (changed, view), (RATED, "pairs"), (changed, "pairs"))
        )
        assert first != second
        assert pairs == changed_pairs != first

    def test_the_answer_that_goes_with_a_prompt_changes_it(self, write_rows, chatml):
        changed = [{**PAIRS[0], "chosen": "another"}, *PAIRS[1:]]
        first, second = (
            prepare(DataConfig(train=write_rows(rows), eval_share=0), chatml, "prompts").fingerprint
            for rows in (PAIRS, changed)
        )
        assert first != second

    def test_a_label_changes_it(self, write_rows, chatml):
        flipped = [{**THUMBS[0], "label": False}, *THUMBS[1:]]
        first, second = (
            prepare(DataConfig(train=write_rows(rows), eval_share=0), chatml, "judgements").fingerprint
            for rows in (THUMBS, flipped)
        )
        assert first != second


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, dpo.data; print({'torch', 'transformers', 'datasets', 'pyarrow', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
