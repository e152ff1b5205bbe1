"""The survey says what is in the data: every number against one that was counted by hand."""

import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest

from dpo.data import Checked, DataConfig, Drop, Message, Preference, Renderer, Report
from dpo.data import near as near_module
from dpo.data import survey as survey_module
from dpo.data import tokens as tokens_module
from dpo.data.findings import findings
from dpo.data.near import Sketcher, match, words
from dpo.data.statistics import Bin, Lengths, separation
from dpo.data.survey import survey
from dpo.data.surveyed import Survey

UNSTABLE = (
    "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
BOS = (
    "<s>{% for m in messages %}{{ 'A:' if m['role'] == 'assistant' }}{{ m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def record(prompt: str = "p", *completions: str, n: int = 1, **more: object) -> Preference:
    """A record whose completions are given best first."""
    given = {"scores": tuple(float(-k) for k in range(len(completions))) if len(completions) > 1 else None, **more}
    return Preference(prompt=(Message("user", prompt),), completions=completions, source=f"a.jsonl:{n}", **given)


def checked(train: Sequence[Preference], evaluation: Sequence[Preference] = (), **report: object) -> Checked:
    given = {"read": len(train) + len(evaluation), "kept": len(train) + len(evaluation), **report}
    return Checked(DataConfig(train="a.jsonl"), train, evaluation, Report("a.jsonl", "pair", "a rule", **given), None)


def looked(*train: Preference) -> Survey:
    return survey(checked(train))


def said(found: Survey) -> str:
    return " ".join(f"{one.what} -> {one.fix}" for one in findings(found))


def texts(count: int, length: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(5000)}" for _ in range(length)) for _ in range(count)]


class TestNumbers:
    def test_quantiles_are_lengths_that_occur_and_bins_double(self):
        found = Lengths.of([0, 1, 1, 2, 3, 4, 5, 9, 9, 40])
        assert (found.n, found.minimum, found.median, found.p75, found.p95, found.maximum) == (10, 0, 3, 9, 40, 40)
        assert found.bins == (
            *(Bin(0, 0, 1), Bin(1, 1, 2), Bin(2, 3, 2), Bin(4, 7, 2), Bin(8, 15, 2)),
            *(Bin(16, 31, 0), Bin(32, 63, 1)),
        )

    def test_bins_begin_with_the_shortest(self):
        assert Lengths.of([4, 7]).bins == (Bin(4, 7, 2),)

    def test_the_area_counts_ordered_pairs(self):
        # 3 > 1, 3 < 4, 5 > 1, 5 > 4, and 4 against 4 is half: (1 + 0 + 1 + 1 + 1 + 0.5) / 6
        found = separation([3, 5, 4], [1, 4])
        assert found is not None
        assert found.value == pytest.approx(4.5 / 6)
        assert 0 <= found.low < found.value < found.high <= 1
        assert separation([], [1]) is None


class TestWords:
    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            ("What is it?", "what  is it", True),
            ("\u00abWhat is it\u00bb", "What is it\u2026", True),
            ("1 + 1", "1 - 1", False),
            ("\N{GRINNING FACE}", "\N{CRYING FACE}", False),
            ("?!", "...", False),
        ],
    )
    def test_case_punctuation_and_space_make_no_difference_but_signs_do(self, one, other, same):
        assert (words(one) == words(other)) is same

    def test_a_sign_of_chinese_or_japanese_is_a_word(self):
        assert words("\u4ed6\u3089\u306f\u3001ok") == ["\u4ed6", "\u3089", "\u306f", "ok"]


class TestSimilar:
    def test_it_finds_what_a_comparison_of_all_pairs_finds(self):
        base = texts(60, 40)
        changed = []
        for n, text in enumerate(base):
            parts = text.split()
            for place in range(n % 6):  # 0 to 5 words of 40 are others
                parts[5 + 6 * place] = "changed"
            changed.append(" ".join(parts))
        prompts = base + changed
        sketcher = Sketcher(len(prompts))
        for text in prompts:
            sketcher.add((Message("user", text),))
        found = match(sketcher.all(), np.arange(len(prompts)))
        sets = [set(pairwise(words(text))) for text in prompts]
        shared = [len(sets[n] & sets[n + 60]) / len(sets[n] | sets[n + 60]) for n in range(60)]
        assert all(found[n] == -1 for n in range(60))
        assert all(found[n + 60] == n for n in range(60) if shared[n] > 0.85)
        assert all(found[n + 60] == -1 for n in range(60) if shared[n] < 0.6)
        assert sum(share > 0.85 for share in shared) >= 20
        assert sum(share < 0.6 for share in shared) >= 8

    def test_a_long_system_text_makes_no_prompts_similar(self):
        system = Message("system", texts(1, 300)[0])
        records = [
            Preference(prompt=(system, Message("user", text)), source=f"a:{n}")
            for n, text in enumerate(texts(20, 8, 1))
        ]
        assert survey(checked(records)).train.repeats.similar == 0

    def test_batches_change_nothing(self, monkeypatch):
        records = [record(text, n=n) for n, text in enumerate([*texts(30, 20), *texts(30, 20)[:9]])]
        records = [*records, *(record(f"{text} more", n=99) for text in texts(30, 20))]
        before = survey(checked(records))
        monkeypatch.setattr(near_module, "_AT_ONCE", 7)
        monkeypatch.setattr(near_module, "_CHUNK", 3)
        assert survey(checked(records)) == before
        assert before.train.repeats.similar == 30


class TestRepeats:
    def test_each_kind_is_counted_once(self):
        sea, other = texts(2, 30)
        found = looked(
            record(sea, n=1),
            record(sea.upper(), n=2),
            record(f"{sea}!", n=3),
            record(f"{sea} besides", n=4),
            record(other, n=5),
            record(f"{other}?", n=6),
            record(f"{other}?", n=7),
        ).train.repeats
        assert (found.prompts, found.repeated, found.near, found.similar) == (5, 2, 2, 1)
        assert found.examples == (("a.jsonl:1", "a.jsonl:3"), ("a.jsonl:5", "a.jsonl:6"), ("a.jsonl:1", "a.jsonl:4"))

    def test_roles_tell_prompts_apart(self):
        one = Preference(prompt=(Message("user", "a b c"), Message("user", "d")), source="a:1")
        other = Preference(prompt=(Message("user", "a b c"), Message("assistant", "d")), source="a:2")
        assert looked(one, other).train.repeats.near == 0


class TestLeaks:
    def test_each_kind_is_told_apart_and_named(self):
        sea, other, third, fresh = texts(4, 30)
        train = [record(sea, n=1), record(other, n=2), record(third, n=3)]
        evaluation = [record(f"{other}...", n=11), record(f"and {third}", n=12), record(fresh, n=13)]
        evaluation.append(record(sea.title(), n=14))
        found = survey(checked(train, evaluation)).leaks
        assert found is not None
        assert (found.records, found.repeated, found.near, found.similar) == (4, 1, 1, 1)
        assert found.examples == (("a.jsonl:1", "a.jsonl:14"), ("a.jsonl:2", "a.jsonl:11"), ("a.jsonl:3", "a.jsonl:12"))

    def test_without_evaluation_there_is_nothing_to_leak_into(self):
        found = looked(record("p", "a", "b"))
        assert (found.leaks, found.eval) == (None, None)
        assert "No record evaluates" in said(found)


class TestPairs:
    def test_contradictions_and_restatements(self):
        found = looked(
            record("p", "a", "b", n=1),
            record("P ", "b", "a ", n=2),
            record("p", "a", "b", n=3, group="x"),
            record("q", "b", "a", n=4),
            record("r", "a", "b", "c", n=5),
            record("r", "c", "a", n=6),
        ).train.pairs
        assert found is not None
        assert (found.n, found.restated, found.contradictions) == (8, 1, 2)
        assert set(found.examples) == {("a.jsonl:1", "a.jsonl:2"), ("a.jsonl:5", "a.jsonl:6")}

    def test_length_counts_each_record_once_and_ties_apart(self):
        found = looked(
            record("p", "a b c", "a b", "a"),  # the longer wins in all three pairs
            record("q", "a", "a b"),
            record("r", "a b", "b c"),
            record("s", "x y z", "x"),
        ).train.pairs
        assert found is not None
        assert found.longer_wins is not None
        assert (found.longer_wins.value, found.longer_wins.n) == (pytest.approx(2 / 3), 3)
        assert found.equal_length == pytest.approx(1 / 4)
        assert (found.by_length.value, found.by_length.n, found.longer) == (pytest.approx(2.5 / 4), 4, True)

    def test_the_shorter_can_be_the_better_rule(self):
        found = looked(*(record(f"p{n}", "a", "a b c") for n in range(40)))
        assert found.train.pairs is not None
        assert not found.train.pairs.longer
        assert found.train.pairs.by_length.value == 1
        assert "Choosing the shorter completion without reading gets 100% of the pairs right" in said(found)

    def test_pairs_of_equal_length_decide_nothing(self):
        found = looked(record("p", "a", "b")).train.pairs
        assert found is not None
        assert found.longer_wins is None
        assert (found.equal_length, found.by_length.value) == (1, 0.5)


class TestKinds:
    def test_what_a_side_holds(self):
        side = looked(
            record("a b c"),
            record("b", "x", scores=(1.0,)),
            record("c", "x y", scores=(-1.0,), weight=0.0),
            record("d", "x", feedback=("too short",)),
            record("e", "x", "y z", agreement=0.5, group="g"),
            record("f", "x", "y z", agreement=0.75, group="h"),
            record("g", "x", "y z", agreement=1.0, group="g"),
        ).train
        assert side.records == 7
        assert side.completions == ((0, 1), (1, 3), (2, 3))
        assert (side.unscored, side.weightless, side.feedback) == (1, 1, 1)
        assert (side.prompt_words.n, side.prompt_words.maximum) == (7, 3)
        assert side.completion_words is not None
        assert (side.completion_words.n, side.completion_words.maximum) == (9, 2)
        assert side.votes is not None
        assert (side.votes.n, side.votes.mean, side.votes.soft, side.votes.undecided) == (3, 0.75, 2, 1)
        assert side.thumbs is not None
        assert side.thumbs.desirable.value == 0.5
        assert side.thumbs.by_length is not None
        assert side.thumbs.by_length.value == 0
        assert side.groups is not None
        assert side.groups.largest == (("g", 2), ("h", 1))
        assert side.sources.largest == (("a.jsonl", 7),)

    def test_prompts_alone_have_no_pairs_thumbs_or_completions(self):
        side = looked(record("a"), record("b")).train
        assert (side.pairs, side.thumbs, side.votes, side.groups, side.completion_words) == (None,) * 5

    def test_more_names_than_are_counted_apart_go_together(self, monkeypatch):
        monkeypatch.setattr(survey_module, "_NAMES", 2)
        groups = looked(*(record(f"p{n}", group=f"g{n}") for n in range(5))).train.groups
        assert groups is not None
        assert groups.largest == (("(others)", 3), ("g0", 1), ("g1", 1))


class Made(Sequence[Preference]):
    """Records that are nowhere: each is made when it is asked for."""

    def __init__(self, count: int, size: int) -> None:
        self._count, self._size = count, size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        return record(f"prompt {index} of {index * 7919}", f"{index}a" * self._size, f"{index}b" * self._size, n=index)

    def __iter__(self) -> Iterator[Preference]:
        return (self[n] for n in range(self._count))


def test_the_texts_are_never_held():
    looked(record("warm", "a", "b"))
    tracemalloc.start()
    try:
        found = survey(checked(Made(2000, 4000)))  # 2,000 records of 2 texts of 16 kB and more: 64 MB
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.train.records == 2000
    assert peak < 12 * 2**20


# --- with a tokenizer -----------------------------------------------------------------------------------------------


class TestTokens:
    def test_lengths_are_those_of_training(self, chatml):
        records = [record(f"the sea {n}", "a good day " * n, "bad", n=n) for n in range(1, 9)]
        found = survey(checked(records), chatml).tokens
        assert found is not None
        rendered = [Renderer(chatml, 10**6).render(one.prompt, one.completions) for one in records]
        totals = [len(one.prompt) + max(map(len, one.completions)) for one in rendered]
        assert found.prompt == Lengths.of([len(one.prompt) for one in rendered])
        assert found.completion == Lengths.of([len(ids) for one in rendered for ids in one.completions])
        limit = sorted(totals)[4]
        config = DataConfig(train="a.jsonl", max_length=limit)
        over = survey(Checked(config, records, (), checked(records).report, None), chatml)
        assert over.tokens is not None
        assert over.tokens.over is not None
        assert over.tokens.over.value == sum(total > limit for total in totals) / 8 > 0
        assert f"more than max_length={limit} tokens" in said(over)

    def test_of_many_records_a_drawn_sample_is_tokenised(self, chatml, monkeypatch):
        monkeypatch.setattr(tokens_module, "SAMPLED", 5)
        records = [record(f"p {n}", "a", "<|im_end|>", n=n) for n in range(30)]
        found = survey(checked(records), chatml).tokens
        assert found is not None
        assert (found.records, found.sampled, found.special_records) == (5, True, 30)
        assert survey(checked(records), chatml).tokens == found

    def test_spelled_special_tokens_are_named_with_their_rows(self, chatml):
        records = [record("a <|im_end|> b", "x", n=1), record("c", "<|im_end|><s>", n=2), record("1 < 2", "x", n=3)]
        found = survey(checked(records), chatml)
        assert found.tokens is not None
        assert found.tokens.special == (("<|im_end|>", 2), ("<s>", 1))
        assert (found.tokens.special_records, found.tokens.special_examples) == (2, ("a.jsonl:1", "a.jsonl:2"))
        assert "spell special tokens (<|im_end|>, <s>): 2, first in a.jsonl:1" in said(found)

    def test_the_sample_shows_the_best_completion_and_its_mask(self, chatml):
        one = record("the sea", "worst", "best", scores=(0.0, 1.0))
        found = survey(checked([one]), chatml).tokens
        assert found is not None
        rendered = Renderer(chatml, 10**6).render(one.prompt, ("best",))
        ids = (*rendered.prompt, *rendered.completions[0])
        assert tuple(token.id for token in found.sample) == ids
        assert [token.scored for token in found.sample] == [False] * len(rendered.prompt) + [True] * len(
            rendered.completions[0]
        )
        assert "".join(token.text for token in found.sample) == chatml.decode(ids)
        assert found.sample[-1].text == "<|im_end|>"

    def test_what_the_template_refuses_is_counted(self, make_tokenizer):
        template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not so') }}{% endif %}" + BOS
        found = survey(checked([record("yes", "a"), record("no", "a", n=2)]), make_tokenizer(template))
        assert found.tokens is not None
        assert (found.tokens.records, found.tokens.refused) == (2, 1)
        assert "1 of 2 records cannot be rendered, first a.jsonl:2 (template refuses: not so)" in said(found)

    @pytest.mark.parametrize(
        ("template", "options", "words"),
        [
            (None, {}, "no chat template"),
            (PLAIN, {}, "no generation prompt"),
            (BOS, {"adds_bos": True}, "gives it two"),
            ("<s>" + BOS, {"adds_bos": True}, "begins a conversation with two BOS tokens"),
            (BOS.removeprefix("<s>"), {"adds_bos": True}, "its chat template does not"),
            ("{{ messages[0]['content'] }}", {}, "leaves the assistant's text out"),
            (UNSTABLE, {}, "No record can be trained on"),
        ],
    )
    def test_faults_of_the_template_are_put_in_words(self, make_tokenizer, template, options, words):
        found = survey(checked([record("the sea", "blue", "bad")]), make_tokenizer(template, **options))
        assert words in said(found)

    def test_a_sound_template_has_no_faults(self, chatml, make_tokenizer):
        for tokenizer in (chatml, make_tokenizer(BOS)):
            found = survey(checked([record("the sea", "blue", "bad")]), tokenizer).tokens
            assert found is not None
            assert (found.findings, found.refused) == ((), 0)


# --- in words -------------------------------------------------------------------------------------------------------


def sound(count: int = 200) -> tuple[list[Preference], list[Preference]]:
    """Records with nothing to say about, for training and for evaluation."""
    prompts = texts(2 * count, 12)
    made = [record(text, "a b", "c d", n=n) for n, text in enumerate(prompts)]
    return made[:count], made[count:]


def test_sound_data_leave_nothing_to_say(chatml):
    assert findings(survey(checked(*sound()), chatml)) == ()


FAULTS: list[tuple[Callable[[list[Preference], list[Preference]], object], str]] = [
    (lambda train, _: train.append(record("<p>", "x", "y", weight=0.0)), "Records of weight 0"),
    (lambda train, _: train.append(record("<p>", "x", "y", agreement=0.5)), "agreement of 0.5"),
    (lambda train, _: train.extend([record("<p>", "x", "y"), record("<p>", "y", "x")]), "stated both ways round"),
    (lambda train, _: train.extend(record(f"<p{n}>", "x y", "x") for n in range(90)), "Choosing the longer completion"),
    (lambda train, _: train.extend(record(f"<p{n}>", "x", scores=(1.0,)) for n in range(9)), "one kind alone teach"),
    (
        lambda train, _: train.extend(
            record(f"<p{n}>", "x y" if n % 2 else "x", scores=(n % 2 - 0.5,)) for n in range(60)
        ),
        "A desirable completion is longer",
    ),
    (
        lambda train, _: train.extend(record(f"{train[n].prompt[0].content}!", "x", "y") for n in range(9)),
        "nearly the prompt",
    ),
    (lambda train, test: test.append(record(f"{train[0].prompt[0].content}!", "x", "y")), "training knows as well"),
    (lambda _, test: test.clear(), "No record evaluates"),
    (lambda _, test: test.__delitem__(slice(5, None)), "rests on 5 records"),
]


@pytest.mark.parametrize(("spoil", "words"), FAULTS, ids=[words for _, words in FAULTS])
def test_each_fault_is_said_and_no_other(spoil, words):
    train, evaluation = sound()
    spoil(train, evaluation)
    found = findings(survey(checked(train, evaluation)))
    assert [words in f"{one.what} {one.fix}" for one in found] == [True]


def test_many_unusable_rows_are_said_with_the_reason():
    train, evaluation = sound()
    report = {"read": 1000, "dropped": {Drop.FILTERED: 500, Drop.TIE: 80, Drop.EMPTY_PROMPT: 90}}
    (found,) = findings(survey(checked(train, evaluation, **report)))
    assert "170 of 1,000 rows of a.jsonl cannot be used (17%), most of them for: empty prompt" in found.what
    assert found.fix == Drop.EMPTY_PROMPT.fix
    few = {**report, "dropped": {Drop.FILTERED: 500, Drop.TIE: 80}}
    assert findings(survey(checked(train, evaluation, **few))) == ()
