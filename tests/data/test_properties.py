"""Laws of the data layer over arbitrary records and rows, each against a statement of it in plain words."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpo.data import DataConfig, Message, Preference, check, prepare, split
from dpo.errors import DataError

few = settings(max_examples=40, deadline=None)
fewer = settings(max_examples=15, deadline=None)  # files are written and read each time

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
score = st.integers(-4, 4)  # whole numbers, so that the laws below need no rounding


@st.composite
def records(draw) -> Preference:
    completions = draw(st.lists(st.sampled_from(["a", " a", "b", "c", "d\n", "e"]), max_size=5))
    scored = draw(st.booleans())
    return Preference(
        prompt=(Message("user", "hi"),),
        completions=tuple(completions),
        scores=tuple(float(draw(score)) for _ in completions) if scored else None,
        agreement=draw(st.sampled_from([None, 0.5, 0.8, 1.0])),
        weight=draw(st.sampled_from([0.0, 1.0, 2.5])),
        source="f:1",
    )


class TestViews:
    """What each view holds of a record, counted place by place."""

    @few
    @given(records())
    def test_pairs_are_all_two_places_of_which_one_scores_higher_and_whose_texts_differ(self, record):
        expected: Counter[tuple[str, str]] = Counter()
        for i, better in enumerate(record.completions):
            for j, worse in enumerate(record.completions):
                if record.scores and record.scores[i] > record.scores[j] and better.strip() != worse.strip():
                    expected[better, worse] += 1
        found = record.pairs()
        assert Counter((pair.chosen, pair.rejected) for pair in found) == expected
        for pair in found:
            assert pair.preference == (1.0 if record.agreement is None else record.agreement)
            assert (pair.prompt, pair.weight, pair.source) == (record.prompt, record.weight, "f:1")
            assert pair.scores[0] > pair.scores[1]

    @few
    @given(records())
    def test_judgements_are_the_sign_of_one_score_and_the_side_of_the_mean_of_several(self, record):
        scores = record.scores or ()
        found = [(j.completion, j.desirable, j.weight) for j in record.judgements()]
        if len(scores) == 1:
            assert found == [(record.completions[0], scores[0] > 0, record.weight)]
            return
        share = [score * len(scores) - sum(scores) for score in scores]  # its distance from the mean, times their count
        expected = [(c, s > 0, record.weight) for c, s in zip(record.completions, share, strict=False) if s]
        assert Counter(found) == Counter(expected)

    @few
    @given(records())
    def test_a_ranking_is_the_same_places_best_first(self, record):
        found = record.ranking()
        if record.scores is None or len(record.scores) < 2:
            assert found is None
            return
        assert found is not None
        places = list(zip(found.completions, found.scores, strict=True))
        assert Counter(places) == Counter(zip(record.completions, record.scores, strict=True))
        assert all(first >= second for first, second in zip(found.scores, found.scores[1:], strict=False))

    @few
    @given(records())
    def test_demonstrations_are_those_that_nothing_beats_but_for_one_thumb_down(self, record):
        scores = record.scores
        expected = list(record.completions)
        if scores is not None:
            worthy = [not any(other > own for other in scores) for own in scores]
            expected = [c for c, good in zip(record.completions, worthy, strict=True) if good]
            if len(scores) == 1 and scores[0] <= 0:
                expected = []
        assert [d.completion for d in record.demonstrations()] == expected

    @few
    @given(records())
    def test_every_record_holds_its_prompt_once(self, record):
        assert [(p.messages, p.source) for p in record.prompts()] == [(record.prompt, "f:1")]


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


def write(folder: Path, ending: str, rows: list[dict]) -> str:
    path = folder / f"rows.{ending}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if ending == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif ending == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif ending == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, list(rows[0]), quoting=csv.QUOTE_ALL)
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text(lines, encoding="utf-8", newline="")
    return str(path)


class TestRoundTrip:
    @pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
    @fewer
    @given(
        pairs=st.lists(st.tuples(text, text, text, st.sampled_from([0.5, 0.75, 1.0])), min_size=1, max_size=6),
        weight=st.sampled_from([0.5, 1.0, 3.0]),
    )
    def test_pairs_written_out_and_read_again_are_the_same_pairs(self, folder, ending, pairs, weight):
        named = {(p, c, r): (p, c, r, a, weight) for p, c, r, a in pairs if c.strip() != r.strip()}
        assume(named)
        columns = ("prompt", "chosen", "rejected", "agreement", "weight")
        rows = [dict(zip(columns, values, strict=True)) for values in named.values()]
        checked = check(DataConfig(train=write(folder, ending, rows), eval_share=0))
        found = [pair for record in checked.train for pair in record.pairs()]
        assert [(p.prompt[-1].content, p.chosen, p.rejected, p.preference, p.weight) for p in found] == list(
            named.values()
        )
        assert all(pair.prompt == (Message("user", pair.prompt[0].content),) for pair in found)


# --- whole files ----------------------------------------------------------------------------------------------------

GOOD = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt in ("sea", "Sea ", "hill", "a  wood", "A wood")
    for chosen, rejected in (("x", "y"), ("y", "x"), ("x", "z"))
]
ROTTEN = [
    {"prompt": "", "chosen": "a", "rejected": "b"},
    {"prompt": None, "chosen": "a", "rejected": "b"},
    {"prompt": "p", "chosen": "a", "rejected": " a "},
    {"prompt": "p", "chosen": "a", "rejected": None},
    {"prompt": "p", "chosen": 7, "rejected": "b"},
    {"prompt": "p", "chosen": "a"},
    {"prompt": ["p"], "chosen": "a", "rejected": "b"},
    {"prompt": [{"role": "owl", "content": "p"}], "chosen": "a", "rejected": "b"},
    {"prompt": [{"role": "assistant", "content": "p"}], "chosen": "a", "rejected": "b"},
    {"prompt": "p", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"},
    {"prompt": "p", "chosen": "a", "rejected": "b", "weight": -1},
    {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 0, "score_rejected": 1},
    {"prompt": "p", "chosen": "a", "rejected": "b", "agreement": {"a": 1}},
]
some_rows = st.lists(st.sampled_from([*GOOD, *ROTTEN]), max_size=30).map(lambda rows: [GOOD[0], GOOD[6], *rows])


def content(record: Preference) -> tuple:
    return record.prompt, record.completions, record.scores, record.group


def plainly(prompt) -> str:
    """Return what makes two prompts one: the words of their turns in lower case."""
    return " / ".join(" ".join(turn.content.lower().split()) for turn in prompt)


def sides(checked) -> dict[str, set[str]]:
    return {name: {plainly(r.prompt) for r in getattr(checked, name)} for name in ("train", "eval")}


class TestWholeFiles:
    @fewer
    @given(rows=some_rows)
    def test_every_row_is_kept_or_counted_and_every_record_comes_from_one_of_them(self, folder, chatml, rows):
        path = write(folder, "jsonl", rows)
        checked = check(DataConfig(train=path, max_dropped_share=1, eval_share=0.3))
        prepared = prepare(checked, chatml, "demonstrations")
        for report in (checked.report, prepared.report):
            assert report.read == len(rows) == report.kept + report.total_dropped + report.unused + report.joined
            assert sum(report.dropped.values()) == report.total_dropped
        kept = [*checked.train, *checked.eval]
        assert len(kept) == checked.report.kept
        places = [record.source for record in kept]
        assert len(set(places)) == len(places)
        for record in kept:
            row = rows[int(record.source.removeprefix(f"{path}:")) - 1]  # lines count from 1
            assert (record.prompt[-1].content, *record.completions) == (row["prompt"], row["chosen"], row["rejected"])
        wanted = {tuple(row.values()) for row in rows if row in GOOD}
        assert {(r.prompt[-1].content, *r.completions) for r in kept} == wanted

    @fewer
    @given(rows=some_rows, random=st.randoms(use_true_random=False))
    def test_the_order_of_the_rows_changes_neither_what_is_kept_nor_any_side(self, folder, rows, random):
        config = {"max_dropped_share": 1, "eval_share": 0.3}
        first = check(DataConfig(train=write(folder, "jsonl", rows), **config))
        shuffled = random.sample(rows, len(rows))
        second = check(DataConfig(train=write(folder, "jsonl", shuffled), **config))
        for name in ("train", "eval"):
            before, after = getattr(first, name), getattr(second, name)
            assert Counter(map(content, before)) == Counter(map(content, after))
        assert first.report.dropped == second.report.dropped
        where = [shuffled.index(dict(zip(("prompt", "chosen", "rejected"), _of(r), strict=True))) for r in second.train]
        assert where == sorted(where)  # each side in the order of its file

    @fewer
    @given(rows=some_rows, seed=st.integers(0, 99))
    def test_no_prompt_is_on_both_sides(self, folder, rows, seed):
        path = write(folder, "jsonl", rows)
        found = sides(check(DataConfig(train=path, max_dropped_share=1, eval_share=0.4, seed=seed)))
        assert not found["train"] & found["eval"]
        assert found["train"]
        assert found["eval"]

    @few
    @given(st.lists(st.integers(0, 400), max_size=60), st.integers(0, 9))
    def test_rows_added_later_move_no_earlier_prompt(self, added, seed):
        def record(n: int) -> Preference:
            return Preference(prompt=(Message("user", f"prompt {n}"),), source=f"f:{n}")

        early = [record(n) for n in range(60)]  # enough that the hash alone fills both sides
        before = split(early, 0.3, seed)
        after = split([record(n) for n in added] + early, 0.3, seed)
        for old, new in zip(before, after, strict=True):
            assert {r.prompt for r in old} == {r.prompt for r in new} & {r.prompt for r in early}

    @fewer
    @given(rows=some_rows.filter(lambda rows: any(row in ROTTEN for row in rows)))
    def test_an_error_where_asked_for_names_the_first_bad_row(self, folder, rows):
        path = write(folder, "jsonl", rows)
        with pytest.raises(DataError) as raised:
            check(DataConfig(train=path, on_bad_row="error"))
        line = next(n for n, row in enumerate(rows, start=1) if row in ROTTEN)
        assert str(raised.value).startswith(f"{path}:{line}: ")

    def test_and_every_rotten_row_has_a_reason_of_its_own_file(self, folder):
        for row in ROTTEN:
            report = check(DataConfig(train=write(folder, "jsonl", [GOOD[0], GOOD[6], row]))).report
            assert report.total_dropped == 1
            assert not any(reason.harmless for reason in report.dropped)

    @fewer
    @given(rows=some_rows)
    def test_a_second_reading_finds_the_same(self, folder, rows):
        config = DataConfig(train=write(folder, "jsonl", rows), max_dropped_share=1, eval_share=0.3)
        first, second = check(config), check(config)
        assert list(first.train) == list(second.train)
        assert list(first.eval) == list(second.eval)
        assert first.report == second.report


def _of(record: Preference) -> tuple[str, str, str]:
    return record.prompt[-1].content, record.completions[0], record.completions[1]
