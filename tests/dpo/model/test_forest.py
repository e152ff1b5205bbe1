"""The packed batch: every completion token is found again, at the position that predicts it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from dpo.model.forest import Forest, Group

PAD = 99
GROUPS = [Group([10, 11], [[20, 21], [30]]), Group([12], [[40, 41, 42]])]

ids = st.lists(st.integers(0, 50), min_size=1, max_size=6)
some_groups = st.lists(st.builds(Group, ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=4)


class TestHandExample:
    """Two groups, three completions, four columns."""

    forest = Forest.padded(GROUPS, PAD)

    def test_every_completion_has_a_row_that_repeats_its_prompt(self):
        assert self.forest.input_ids.tolist() == [[10, 11, 20, 21], [10, 11, 30, PAD], [12, 40, 41, 42]]
        assert self.forest.completions == 3

    def test_rows_say_what_each_place_is(self):
        assert self.forest.group.tolist() == [[0, 0, 0, 0], [0, 0, 0, -1], [1, 1, 1, 1]]
        assert self.forest.branch.tolist() == [[0, 0, 1, 1], [0, 0, 2, 0], [0, 1, 1, 1]]
        assert self.forest.position_ids.tolist() == [[0, 1, 2, 3]] * 3

    def test_the_mask_is_true_at_real_tokens(self):
        assert self.forest.attention_mask.tolist() == [[True] * 4, [True, True, True, False], [True] * 4]

    def test_the_index_names_where_a_token_is_predicted(self):
        # Row 0 starts at 0, row 1 at 4, row 2 at 8; a token at column c is predicted at c - 1.
        assert self.forest.source.tolist() == [1, 2, 5, 8, 9, 10]
        assert self.forest.target.tolist() == [20, 21, 30, 40, 41, 42]
        assert self.forest.sequence.tolist() == [0, 0, 1, 2, 2, 2]
        assert self.forest.lengths.tolist() == [2, 1, 3]


class TestLaws:
    @settings(max_examples=50, deadline=None)
    @given(groups=some_groups)
    def test_the_label_is_shifted_once(self, groups):
        forest = Forest.padded(groups, PAD)
        assert torch.equal(forest.input_ids.flatten()[forest.source + 1], forest.target)
        assert forest.target.tolist() == [token for g in groups for completion in g.completions for token in completion]

    @settings(max_examples=50, deadline=None)
    @given(groups=some_groups)
    def test_the_prompts_last_position_predicts_the_first_token_of_every_branch(self, groups):
        forest = Forest.padded(groups, PAD)
        first = [forest.sequence.tolist().index(completion) for completion in range(forest.completions)]
        prompts = [len(group.prompt) for group in groups for _ in group.completions]
        assert forest.position_ids.flatten()[forest.source[first]].tolist() == [length - 1 for length in prompts]
        assert forest.branch.flatten()[forest.source[first]].tolist() == [0] * forest.completions

    @settings(max_examples=50, deadline=None)
    @given(groups=some_groups, extra=st.integers(1, 5))
    def test_padding_changes_no_real_token(self, groups, extra):
        longest = max(len(group.prompt) + max(map(len, group.completions)) for group in groups)
        alone = Forest.padded(groups, PAD)
        beside = Forest.padded([*groups, Group([1] * longest, [[2] * extra])], PAD)
        count = len(alone.target)
        wide = beside.input_ids.shape[1]
        row, column = alone.source // alone.input_ids.shape[1], alone.source % alone.input_ids.shape[1]
        assert beside.source[:count].tolist() == (row * wide + column).tolist()
        assert torch.equal(beside.target[:count], alone.target)
        assert torch.equal(beside.sequence[:count], alone.sequence)
        assert torch.equal(beside.input_ids[: alone.completions][:, :longest], alone.input_ids)
        assert not beside.attention_mask[: alone.completions, longest:].any()


class TestRefusals:
    @pytest.mark.parametrize(
        ("group", "part"), [(Group([], [[1]]), "prompt of group 1"), (Group([1], [[2], []]), "completion 1 of group 1")]
    )
    def test_an_empty_part_is_named(self, group, part):
        with pytest.raises(ValueError, match=f"{part} is empty"):
            Forest.padded([Group([1], [[2]]), group], PAD)

    def test_no_completions(self):
        with pytest.raises(ValueError, match="no completions"):
            Forest.padded([], PAD)

    def test_shapes_are_executed(self):
        with pytest.raises(TypeCheckError):
            replace(Forest.padded(GROUPS, PAD), position_ids=torch.zeros(3, 5, dtype=torch.long))
        with pytest.raises(TypeCheckError):
            replace(Forest.padded(GROUPS, PAD), source=torch.zeros(2, dtype=torch.long))
