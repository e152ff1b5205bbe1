"""Which examples a step takes, how they are divided, and what happens when memory runs out."""

import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.batches import Division, Plan, within_memory
from dpo.data import Example
from dpo.errors import TrainingError


def example(prompt: int, *completions: int, source: str = "made:0") -> Example:
    return Example(
        prompt=(1,) * prompt,
        completions=tuple((2,) * length for length in completions),
        preference=1.0,
        desirable=True,
        weight=1.0,
        source=source,
        prompt_messages=(),
        texts=("",) * len(completions),
    )


lengths = st.integers(1, 30)
many = st.lists(st.builds(example, lengths, lengths, lengths), min_size=1, max_size=25)
divisions = st.builds(
    Division,
    size=st.integers(1, 8),
    max_tokens=st.none() | st.integers(1, 200),
    padded=st.booleans(),
    scored=st.sampled_from([1, 2]),
    parts=st.sampled_from([1, 2, 4]),
)


def held(division: Division, examples: list[Example]) -> int:
    """The most tokens of a forward pass that scores `division.scored` completions of each example, whichever."""
    if division.padded:
        return (
            len(examples) * division.scored * max(len(one.prompt) + max(map(len, one.completions)) for one in examples)
        )
    return sum(len(one.prompt) + sum(sorted(map(len, one.completions))[-division.scored :]) for one in examples)


class TestPlan:
    def test_an_epoch_takes_every_example_once(self):
        plan = Plan.of(examples=20, batch=8, epochs=3, max_steps=None, seed=5)
        assert plan.steps == 9  # batches of 8, 8 and 4
        drawn = [plan.indices(step) for step in range(plan.steps)]
        assert [len(batch) for batch in drawn] == [8, 8, 4] * 3
        for epoch in range(3):
            batches = drawn[3 * epoch : 3 * epoch + 3]
            assert sorted(n for batch in batches for n in batch) == list(range(20))

    def test_every_epoch_has_an_order_of_its_own(self):
        plan = Plan.of(examples=50, batch=50, epochs=4, max_steps=None, seed=0)
        orders = {tuple(plan.indices(step)) for step in range(4)}
        assert len(orders) == 4
        assert tuple(range(50)) not in orders

    def test_a_step_depends_on_the_seed_and_its_number_alone(self):
        plan = Plan.of(examples=50, batch=7, epochs=2, max_steps=None, seed=3)
        late = plan.indices(11)
        torch.manual_seed(99)
        again = Plan.of(examples=50, batch=7, epochs=9, max_steps=12, seed=3)
        assert again.indices(11) == late
        assert Plan.of(examples=50, batch=7, epochs=2, max_steps=None, seed=4).indices(11) != late

    def test_epochs_of_one_seed_are_not_those_of_the_next(self):
        first, second = (Plan.of(examples=50, batch=50, epochs=2, max_steps=None, seed=seed) for seed in (0, 1))
        assert first.indices(1) != second.indices(0)

    @pytest.mark.parametrize(("max_steps", "expected"), [(None, 6), (4, 4), (99, 6)])
    def test_fewer_steps(self, max_steps, expected):
        assert Plan.of(examples=20, batch=8, epochs=2, max_steps=max_steps, seed=0).steps == expected


class TestDivision:
    @settings(max_examples=150, deadline=None)
    @given(examples=many, division=divisions)
    def test_none_lost_none_doubled(self, examples, division):
        batches = division.micro_batches(examples)
        assert sorted(n for batch in batches for n in batch) == list(range(len(examples)))
        assert all(batches)

    @settings(max_examples=150, deadline=None)
    @given(examples=many, division=divisions)
    def test_no_micro_batch_is_larger_than_allowed(self, examples, division):
        for batch in division.micro_batches(examples):
            if division.max_tokens is None:
                assert len(batch) <= max(1, division.size // division.parts)
            elif len(batch) > 1:  # an example that is too long stands alone
                assert held(division, [examples[n] for n in batch]) <= division.max_tokens // division.parts

    @settings(max_examples=150, deadline=None)
    @given(examples=many, division=divisions)
    def test_largest_bounds_every_micro_batch_and_is_reached_by_some_draw(self, examples, division):
        division = replace(division, parts=1)
        largest = division.largest(examples)
        assert all(
            held(division, [examples[n] for n in batch]) <= largest for batch in division.micro_batches(examples)
        )
        if division.max_tokens is None and len(examples) >= division.size:
            worst = sorted(examples, key=lambda one: held(division, [one]), reverse=True)[: division.size]
            assert held(division, worst) == largest

    def test_a_judgement_counts_one_completion(self):
        examples = [example(6, 2, 4)] * 2  # its own and the mismatched one are scored apart: 10 tokens at most
        assert Division(1, 20, padded=False, scored=1).micro_batches(examples) == [[0, 1]]
        assert Division(1, 20, padded=False, scored=2).micro_batches(examples) == [[0], [1]]

    def test_packed_examples_keep_their_order(self):
        examples = [example(length, 1) for length in (3, 9, 1, 7, 5)]
        assert Division(2, None, padded=False, scored=2).micro_batches(examples) == [[0, 1], [2, 3], [4]]

    def test_padded_examples_stand_with_those_of_their_length(self):
        examples = [example(length, 1) for length in (3, 9, 1, 7, 5)]
        assert Division(2, None, padded=True, scored=2).micro_batches(examples) == [[1, 3], [4, 0], [2]]

    def test_a_budget_counts_a_shared_prompt_once(self):
        examples = [example(6, 2, 2)] * 2  # packed 10 tokens each; padded 2 rows of 8 each
        assert Division(1, 20, padded=False, scored=2).micro_batches(examples) == [[0, 1]]
        assert Division(1, 19, padded=False, scored=2).micro_batches(examples) == [[0], [1]]
        assert Division(1, 32, padded=True, scored=2).micro_batches(examples) == [[0, 1]]
        assert Division(1, 31, padded=True, scored=2).micro_batches(examples) == [[0], [1]]

    def test_a_budget_is_filled_from_the_longest(self):
        examples = [example(length - 1, 1) for length in (3, 6, 4, 7)]
        assert Division(1, 10, padded=False, scored=2).micro_batches(examples) == [[3, 0], [1, 2]]  # 7 + 3 and 6 + 4

    def test_padding_counts_against_the_budget(self):
        examples = [example(length - 1, 1) for length in (2, 10, 2, 2)]
        assert Division(1, 20, padded=True, scored=1).micro_batches(examples) == [[1, 0], [2, 3]]

    @pytest.mark.parametrize("padded", [False, True])
    def test_an_example_longer_than_the_budget_stands_alone(self, padded):
        examples = [example(2, 1), example(50, 1), example(2, 1)]
        assert Division(8, 10, padded, scored=1).micro_batches(examples) == [[1], [0, 2]]

    @pytest.mark.parametrize(("parts", "sizes"), [(1, [8, 8]), (2, [4] * 4), (4, [2] * 8), (32, [1] * 16)])
    @pytest.mark.parametrize("limits", [{"size": 8, "max_tokens": None}, {"size": 1, "max_tokens": 24}])
    def test_parts_divide_both_limits(self, limits, parts, sizes):
        examples = [example(1, 1, 1)] * 16
        batches = Division(**limits, padded=False, scored=2, parts=parts).micro_batches(examples)
        assert [len(batch) for batch in batches] == sizes


class Memory:
    """Work that holds so many examples at once; remembers what it was asked to do."""

    def __init__(self, holds: int, error: Exception | None = None) -> None:
        self.holds, self.error = holds, error or torch.OutOfMemoryError("CUDA out of memory.")
        self.tried: list[list[list[int]]] = []

    def __call__(self, batches: list[list[int]]) -> str:
        self.tried.append(batches)
        if max(map(len, batches)) > self.holds:
            raise self.error
        return "done"


class TestWithinMemory:
    examples = tuple(example(n + 1, 1, source=f"made.jsonl:{n}") for n in range(8))

    def test_what_fits_is_done_once(self, caplog):
        work, division = Memory(holds=8), Division(8, None, padded=False, scored=2)
        assert within_memory(work, self.examples, division) == ("done", division)
        assert len(work.tried) == 1
        assert caplog.messages == []

    def test_what_does_not_is_halved_until_it_does(self, caplog):
        work = Memory(holds=2)
        with caplog.at_level(logging.WARNING, "dpo"):
            result, division = within_memory(work, self.examples, Division(8, None, padded=False, scored=2))
        assert result == "done"
        assert division == Division(8, None, padded=False, scored=2, parts=4)
        assert [max(map(len, batches)) for batches in work.tried] == [8, 4, 2]
        for batches in work.tried:  # from the beginning, with the same examples
            assert Counter(n for batch in batches for n in batch) == Counter(range(8))
        assert ["8 examples at once" in caplog.messages[0], "4 examples at once" in caplog.messages[1]] == [True, True]
        assert ["4 at once" in caplog.messages[0], "2 at once" in caplog.messages[1]] == [True, True]
        assert len(caplog.messages) == 2

    def test_a_smaller_division_is_taken_from_the_start(self):
        work = Memory(holds=2)
        _, division = within_memory(work, self.examples, Division(8, None, padded=False, scored=2))
        work.tried.clear()
        assert within_memory(work, self.examples, division) == ("done", division)
        assert len(work.tried) == 1

    @pytest.mark.parametrize("padded", [False, True])
    def test_a_budget_shrinks_until_fewer_are_together(self, padded):
        work = Memory(holds=1)
        _, division = within_memory(work, self.examples, Division(1, 10_000, padded, scored=2))
        largest = [max(map(len, batches)) for batches in work.tried]
        assert largest == sorted(set(largest), reverse=True)  # nothing is tried twice
        assert largest[-1] == 1
        assert division.parts > 1

    def test_a_size_beyond_the_examples(self):
        work = Memory(holds=4)
        within_memory(work, self.examples, Division(64, None, padded=False, scored=2))
        assert [max(map(len, batches)) for batches in work.tried] == [8, 4]

    def test_a_single_example_too_large_is_named(self):
        work = Memory(holds=0)
        expected = (
            r"made\.jsonl:7: memory does not hold a single example \(a row of 9 tokens\)\. Use model\.gradient_check"
        )
        with pytest.raises(TrainingError, match=expected) as caught:
            within_memory(work, self.examples, Division(2, None, padded=False, scored=2))
        assert [max(map(len, batches)) for batches in work.tried] == [2, 1]
        assert caught.value.__cause__ is work.error

    @pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("x"), KeyboardInterrupt()])
    def test_any_other_error_passes(self, error, caplog):
        work = Memory(holds=1, error=error)
        with pytest.raises(type(error)) as caught:
            within_memory(work, self.examples, Division(8, None, padded=False, scored=2))
        assert caught.value is error
        assert len(work.tried) == 1
        assert caplog.messages == []

    def test_a_cpu_allocator_that_fails(self):
        work = Memory(2, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
        assert within_memory(work, self.examples, Division(8, None, padded=False, scored=2))[1].parts == 4

    def test_a_failed_attempt_leaves_nothing_behind(self):
        """The second attempt must find the memory of the first one free."""
        from weakref import ref

        held: list[ref[torch.Tensor]] = []

        def work(batches: list[list[int]]) -> bool:
            if held:
                return held[0]() is None
            tensor = torch.zeros(3)
            held.append(ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory.")

        assert within_memory(work, self.examples, Division(8, None, padded=False, scored=2))[0] is True
