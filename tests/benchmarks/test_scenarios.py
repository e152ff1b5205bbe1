"""The timed rows are the same every time, real where there are enough, and as long as the scenario says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.scenarios import SHAPES, WIDTH, Shape, batches, derive, from_rows, in_pairs, read_pairs, to_rows
from dpo.data import Example


def pair(number: int, prompt: int = 30, completion: int = 12) -> Example:
    first = 1000 * number
    return Example(
        prompt=tuple(range(first, first + prompt)),
        completions=(tuple(range(first, first + completion)), tuple(range(first + 500, first + 500 + completion))),
        preference=1.0,
        desirable=True,
        weight=1.0,
        source=f"file:{number}",
        prompt_messages=(),
        texts=(),
    )


PAIRS = [pair(number) for number in range(40)]


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape is not None])
def test_made_rows_have_the_lengths_of_their_scenario(name: str):
    shape = SHAPES[name]
    assert shape is not None
    made = derive(PAIRS, shape, 64)
    assert len(made) == 64
    assert {len(example.completions) for example in made} == {shape.completions}
    for lengths, wanted in (
        ([len(example.prompt) for example in made], shape.prompt),
        ([len(ids) for example in made for ids in example.completions], shape.completion),
    ):
        assert mean(lengths) == pytest.approx(wanted, rel=0.03)
        assert (1 - WIDTH) * wanted - 1 <= min(lengths) < max(lengths) <= (1 + WIDTH) * wanted + 1
        assert max(lengths) - min(lengths) > WIDTH * wanted  # else padding would cost nothing


def test_made_rows_are_of_the_pairs_own_tokens_in_their_order():
    prompts = [token for example in PAIRS for token in example.prompt]
    made = [token for example in derive(PAIRS, Shape(50, 20), 10) for token in example.prompt]
    assert made == prompts[: len(made)]


@pytest.mark.parametrize("shape", [None, Shape(50, 20), Shape(20, 9, completions=4)])
def test_deriving_twice_gives_the_same(shape: Shape | None):
    assert derive(PAIRS, shape, 16) == derive(list(PAIRS), shape, 16)


def test_the_pairs_as_they_are_come_from_the_whole_file():
    assert [example.source for example in derive(PAIRS, None, 4)] == ["file:0", "file:10", "file:20", "file:30"]


def test_real_pairs_of_the_length_are_taken_where_there_are_enough():
    fitting = [pair(number, prompt=100, completion=40) for number in range(50, 54)]
    shape = Shape(prompt=110, completion=40)
    assert derive([*PAIRS, *fitting], shape, 4) == fitting
    assert not {example.prompt for example in derive([*PAIRS, *fitting], shape, 5)} & {e.prompt for e in fitting}


def test_a_pair_whose_one_completion_is_too_long_does_not_fit():
    fitting = [pair(number, prompt=100, completion=40) for number in range(50, 54)]
    fitting[2] = replace(fitting[2], completions=(fitting[2].completions[0], tuple(range(99))))
    assert derive(fitting, Shape(110, 40), 4) != fitting


def test_rows_travel_as_json():
    made = derive(PAIRS, Shape(20, 9, completions=4), 3)
    back = from_rows(json.loads(json.dumps(to_rows(made))))
    assert [(one.prompt, one.completions) for one in back] == [(one.prompt, one.completions) for one in made]


def test_an_epoch_is_dealt_out_in_the_order_of_the_loop():
    dealt = batches(PAIRS, 4)
    assert [len(batch) for batch in dealt] == [4] * 10
    assert sorted(example.source for batch in dealt for example in batch) == sorted(one.source for one in PAIRS)
    assert [example.source for batch in dealt for example in batch] != [one.source for one in PAIRS]


def test_a_step_holds_all_pairs_of_its_prompts():
    four = [replace(one, completions=(*one.completions, (1, number), (2, number))) for number, one in enumerate(PAIRS)]
    placed = in_pairs(four, 5)
    assert len(placed) == 80
    seen = []
    for batch in batches(placed, 10):
        prompts = {one.source for one in batch}
        assert (len(batch), len(prompts)) == (10, 5)
        for source in prompts:
            (whole,) = [one for one in four if one.source == source]
            assert {one.completions for one in batch if one.source == source} == {
                whole.completions[:2],
                whole.completions[2:],
            }
        seen += prompts
    assert sorted(seen) == sorted(one.source for one in PAIRS)


def test_pairs_are_read_from_a_file(tmp_path: Path, pairs_file: Callable[..., Path], chatml: PreTrainedTokenizerBase):
    found = read_pairs(str(pairs_file(tmp_path / "pairs.jsonl", prompts=7)), chatml, 512)
    assert len(found) == 7  # none is held out
