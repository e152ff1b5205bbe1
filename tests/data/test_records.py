"""Every view of a record, by hand and as laws."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.data import Message, Preference

PROMPT = (Message("user", "hello"),)


def record(scores: tuple[float, ...] | None, **more: object) -> Preference:
    texts = tuple("abcdefgh"[: len(scores or (0, 0))])
    return Preference(prompt=PROMPT, completions=texts, scores=scores, source="f:1", **more)  # type: ignore[arg-type]


scores_of = st.lists(st.sampled_from([-1.5, 0.0, 0.1, 0.3, 2.0, 7.0]), min_size=2, max_size=6).map(tuple)


class TestFields:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("scores", (1.0,)),
            ("scores", (1.0, math.nan)),
            ("agreement", 0.4),
            ("agreement", 1.1),
            ("agreement", math.nan),
            ("weight", -1.0),
            ("weight", math.inf),
        ],
    )
    def test_a_value_outside_its_range_is_refused_by_name(self, field, value):
        fields = {"scores": (1.0, 0.0), field: value}
        with pytest.raises(ValueError, match=f"Preference.{field}"):
            Preference(prompt=PROMPT, completions=("a", "b"), source="f:1", **fields)

    def test_an_unknown_role_is_refused(self):
        with pytest.raises(ValueError, match=r"Message\.role .* got 'human'"):
            Message("human", "hello")  # type: ignore[arg-type]


class TestPairs:
    def test_every_better_one_meets_every_worse_one_and_ties_do_not(self):
        # scores a=2, b=0, c=2, d=1: a and c beat b and d, d beats b, a and c are tied
        found = {(p.chosen, p.rejected) for p in record((2.0, 0.0, 2.0, 1.0)).pairs()}
        assert found == {("a", "b"), ("a", "d"), ("c", "b"), ("c", "d"), ("d", "b")}

    def test_agreement_is_the_soft_label_and_its_absence_is_certainty(self):
        assert record((1.0, 0.0), agreement=0.7, weight=2.0).pairs()[0].preference == 0.7
        assert record((1.0, 0.0)).pairs()[0].preference == 1.0
        assert record((1.0, 0.0), weight=2.0).pairs()[0].weight == 2.0

    def test_no_scores_no_pairs(self):
        assert record(None).pairs() == ()

    def test_the_same_text_is_never_both_sides_of_a_pair(self):
        same = Preference(prompt=PROMPT, completions=("a", " a ", "b"), scores=(3.0, 1.0, 2.0), source="f:1")
        assert {(p.chosen, p.rejected) for p in same.pairs()} == {("a", "b"), ("b", " a ")}

    @given(scores_of)
    def test_antisymmetric_and_complete(self, scores):
        found = {(p.chosen, p.rejected) for p in record(scores).pairs()}
        assert not any((worse, better) in found for better, worse in found)
        unequal = sum(a != b for i, a in enumerate(scores) for b in scores[:i])
        assert len(found) == unequal

    @given(scores_of, st.randoms(use_true_random=False))
    def test_the_order_of_the_completions_changes_nothing(self, scores, random):
        texts = tuple("abcdefgh"[: len(scores)])
        rows = list(zip(texts, scores, strict=True))
        random.shuffle(rows)
        shuffled = Preference(
            prompt=PROMPT, completions=tuple(t for t, _ in rows), scores=tuple(s for _, s in rows), source="f:1"
        )
        assert set(shuffled.pairs()) == set(record(scores).pairs())
        assert set(shuffled.judgements()) == set(record(scores).judgements())
        assert set(shuffled.demonstrations()) == set(record(scores).demonstrations())


class TestJudgements:
    @pytest.mark.parametrize(("score", "desirable"), [(1.0, True), (-1.0, False), (0.0, False)])
    def test_one_completion_is_judged_by_its_sign(self, score, desirable):
        one = Preference(prompt=PROMPT, completions=("a",), scores=(score,), source="f:1")
        assert [j.desirable for j in one.judgements()] == [desirable]

    def test_several_are_judged_against_their_mean(self):
        # mean (4 + 2 + 0) / 3 = 2: above, equal, below
        found = [(j.completion, j.desirable) for j in record((4.0, 2.0, 0.0)).judgements()]
        assert found == [("a", True), ("c", False)]

    def test_equal_scores_are_not_judged_although_their_float_mean_differs(self):
        assert (0.1 + 0.1 + 0.1) / 3 != 0.1
        assert record((0.1, 0.1, 0.1)).judgements() == ()


class TestDemonstrations:
    def test_the_best_all_unscored_and_no_thumb_down(self):
        assert [d.completion for d in record((1.0, 3.0, 3.0)).demonstrations()] == ["b", "c"]
        assert [d.completion for d in record(None).demonstrations()] == ["a", "b"]
        for score, count in ((1.0, 1), (0.0, 0), (-1.0, 0)):
            one = Preference(prompt=PROMPT, completions=("a",), scores=(score,), source="f:1")
            assert len(one.demonstrations()) == count


def test_ranking_is_best_first_and_needs_two_scores():
    ranking = record((1.0, 3.0, 2.0)).ranking()
    assert ranking is not None
    assert (ranking.completions, ranking.scores) == (("b", "c", "a"), (3.0, 2.0, 1.0))
    assert record(None).ranking() is None
    assert Preference(prompt=PROMPT, completions=("a",), scores=(1.0,), source="f:1").ranking() is None


def test_prompts_hold_the_messages():
    (prompt,) = Preference(prompt=PROMPT, source="f:9").prompts()
    assert (prompt.messages, prompt.source) == (PROMPT, "f:9")
