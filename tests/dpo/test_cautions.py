"""What is allowed but seldom meant is warned of, and nothing else is."""

from itertools import permutations

import pytest

from dpo.cautions import FEWEST_COUPLED, cautions
from dpo.data import Example
from dpo.losses import Objective, Part
from dpo.losses.aot import AOT
from dpo.losses.bco import BCO
from dpo.losses.dpo import DPO
from dpo.losses.kto import KTO
from dpo.losses.mixture import Mixture
from dpo.losses.sft import SFT


def examples(*labels: bool) -> list[Example]:
    return [
        Example(
            prompt=(1,),
            completions=((2,),),
            preference=1.0,
            desirable=label,
            weight=1.0,
            source="made:0",
            prompt_messages=(),
            texts=("",),
        )
        for label in labels
    ]


@pytest.mark.parametrize("objective", [KTO(), BCO()], ids=repr)
@pytest.mark.parametrize(("label", "word"), [(True, "desirable"), (False, "undesirable")])
def test_thumbs_of_one_label_only_are_warned_of(objective: Objective, label: bool, word: str) -> None:
    (said,) = cautions(objective, examples(label, label, label), batch=16)
    assert said.startswith(f"{type(objective).__name__}: all 3 training examples are {word}, expected both labels")
    assert "Add rows with the other label" in said


def test_both_labels_are_no_matter_nor_is_one_where_labels_are_not_read() -> None:
    assert cautions(KTO(), examples(True, True, False), batch=16) == []
    assert cautions(SFT(), examples(True, True), batch=16) == []
    assert cautions(DPO(), examples(True, True), batch=16) == []


@pytest.mark.parametrize("objective", [AOT(), Mixture(parts=(Part(1, AOT()), Part(1, SFT())))], ids=["aot", "mixture"])
def test_few_pairs_to_sort_are_warned_of(objective: Objective) -> None:
    (said,) = cautions(objective, examples(*[True] * 100), batch=7)
    assert "an optimiser step holds 7 examples, expected 8 or more" in said
    assert "loop.gradient_accumulation_steps" in said
    assert cautions(objective, examples(*[True] * 100), batch=8) == []
    (few,) = cautions(objective, examples(*[True] * 5), batch=64)  # the data hold no more
    assert "holds 5 examples" in few


def test_pairs_that_are_not_compared_with_each_other_may_come_one_by_one() -> None:
    assert cautions(DPO(), examples(True), batch=1) == []


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_the_reason_for_8_one_place_of_a_random_order_is_kept_whatever_its_length(n: int) -> None:
    kept = [sum(place == one for place, one in enumerate(order)) for order in permutations(range(n))]
    assert sum(kept) == len(kept)  # one each, on average: a share of 1/n
    assert (1 / n <= 1 / 8) == (n >= FEWEST_COUPLED)
