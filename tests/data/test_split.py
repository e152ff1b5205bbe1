"""No prompt is ever on both sides."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dpo.data import Message, Preference, split
from dpo.data.split import prompt_key
from dpo.errors import DataError


def record(prompt: str, source: str = "f:1") -> Preference:
    return Preference(prompt=(Message("user", prompt),), completions=("a", "b"), scores=(1.0, 0.0), source=source)


prompts_of = st.lists(st.sampled_from([f"{word} {n}" for word in ("Sea", "sea", "SEA  ", "hill") for n in range(6)]))


def keys(records) -> set[str]:
    return {prompt_key(r.prompt) for r in records}


@given(prompts_of, st.integers(0, 99))
def test_no_prompt_on_both_sides_no_row_lost_and_no_side_empty(texts, seed):
    records = [record(text, f"f:{i}") for i, text in enumerate(texts)]
    assume(len(keys(records)) > 1)
    train, evaluation = split(records, 0.3, seed)
    assert not keys(train) & keys(evaluation)
    assert train
    assert evaluation
    assert sorted(r.source for r in (*train, *evaluation)) == sorted(r.source for r in records)


@given(st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_no_side(random):
    records = [record(f"prompt {n}", f"f:{n}") for n in range(40)]
    shuffled = random.sample(records, len(records))
    assert keys(split(records, 0.2, 0)[1]) == keys(split(shuffled, 0.2, 0)[1])


def test_rows_added_later_move_no_prompt():
    records = [record(f"prompt {n}") for n in range(400)]
    before, after = split(records[:200], 0.2, 0)[1], split(records, 0.2, 0)[1]
    assert keys(before) == keys(after) & keys(records[:200])


def test_the_share_is_about_right_and_the_seed_matters():
    records = [record(f"prompt {n}") for n in range(1000)]
    share = len(split(records, 0.2, 0)[1]) / 1000
    assert 0.16 < share < 0.24  # three standard deviations of a binomial with n = 1000, p = 0.2
    assert split(records, 0.2, 0)[1] != split(records, 0.2, 1)[1]
    assert split(records, 0.0, 0) == (tuple(records), ())


def test_one_prompt_cannot_be_split():
    with pytest.raises(DataError, match=r"f:1: .* 1 different prompts, expected at least 2.*eval_share=0"):
        split([record("hi"), record(" HI ")], 0.1, 0)
