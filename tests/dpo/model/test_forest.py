"""The packed batch: every completion token is found again, at the position that predicts it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from dpo.model.forest import Forest, Group, Tree

PAD = 99
GROUPS = [Group([10, 11], [[20, 21], [30]]), Group([12], [[40, 41, 42]])]

ids = st.lists(st.integers(0, 50), min_size=1, max_size=6)
some_groups = st.lists(st.builds(Group, ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=4)


class TestPaddedByHand:
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

    def test_the_last_token_is_the_completions_own(self):
        # 21 closes row 0 (column 3), 30 stands in row 1 before the padding (4 + 2), 42 closes row 2 (8 + 3).
        assert self.forest.last.tolist() == [3, 6, 11]


class TestPackedByHand:
    """The same two groups in one row of nine columns."""

    forest = Forest.packed(GROUPS)

    def test_every_prompt_stands_once_before_its_completions(self):
        assert self.forest.input_ids.tolist() == [[10, 11, 20, 21, 30, 12, 40, 41, 42]]
        assert self.forest.completions == 3

    def test_the_row_says_what_each_place_is(self):
        assert self.forest.group.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]
        assert self.forest.branch.tolist() == [[0, 0, 1, 1, 2, 0, 1, 1, 1]]
        assert self.forest.trees == (Tree(0, 2, (2, 1)), Tree(5, 1, (3,)))
        assert self.forest.attention_mask.all()

    def test_a_completion_continues_the_positions_of_its_prompt(self):
        assert self.forest.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 3]]

    def test_the_index_names_where_a_token_is_predicted(self):
        # Both 20 and 30 are predicted by the prompt's last token, at column 1; 30 does not stand behind it.
        assert self.forest.source.tolist() == [1, 2, 1, 5, 6, 7]
        assert self.forest.target.tolist() == [20, 21, 30, 40, 41, 42]
        assert self.forest.sequence.tolist() == [0, 0, 1, 2, 2, 2]
        assert self.forest.lengths.tolist() == [2, 1, 3]

    def test_the_last_token_is_the_completions_own(self):
        assert self.forest.last.tolist() == [3, 4, 8]  # 21, 30 and 42

    def test_a_device_keeps_the_trees(self):
        moved = self.forest.to(torch.device("meta"))
        assert moved.trees == self.forest.trees
        assert moved.source.device.type == moved.position_ids.device.type == "meta"


class TestPackedLaws:
    @settings(max_examples=50, deadline=None)
    @given(groups=some_groups)
    def test_both_layouts_ask_for_the_same(self, groups):
        packed, padded = Forest.packed(groups), Forest.padded(groups, PAD)
        assert torch.equal(packed.target, padded.target)
        assert torch.equal(packed.sequence, padded.sequence)
        assert packed.completions == padded.completions
        assert packed.trees
        assert not padded.trees
        for part in ("input_ids", "position_ids", "group", "branch"):  # a token is predicted at the same place
            ours, theirs = getattr(packed, part).flatten()[packed.source], getattr(padded, part).flatten()
            assert torch.equal(ours, theirs[padded.source]), part
            assert torch.equal(getattr(packed, part).flatten()[packed.last], theirs[padded.last]), part

    @settings(max_examples=50, deadline=None)
    @given(groups=some_groups)
    def test_the_last_token_ends_its_completion(self, groups):
        for forest in (Forest.packed(groups), Forest.padded(groups, PAD)):
            ends = [completion[-1] for group in groups for completion in group.completions]
            assert forest.input_ids.flatten()[forest.last].tolist() == ends
            depths = [len(group.prompt) + len(one) - 1 for group in groups for one in group.completions]
            assert forest.position_ids.flatten()[forest.last].tolist() == depths

    @settings(max_examples=50, deadline=None)
    @given(groups=some_groups)
    def test_the_row_holds_every_sequence_and_nothing_else(self, groups):
        forest = Forest.packed(groups)
        ids, group_of, branch, position = (
            getattr(forest, part)[0] for part in ("input_ids", "group", "branch", "position_ids")
        )
        assert len(ids) == sum(len(group.prompt) + sum(map(len, group.completions)) for group in groups)
        for g, group in enumerate(groups):
            for b, completion in enumerate(group.completions, start=1):
                path = (group_of == g) & ((branch == 0) | (branch == b))
                assert ids[path].tolist() == [*group.prompt, *completion]
                assert position[path].tolist() == list(range(len(group.prompt) + len(completion)))

    @settings(max_examples=50, deadline=None)
    @given(groups=some_groups)
    def test_the_trees_cover_the_row(self, groups):
        forest = Forest.packed(groups)
        end = 0
        for g, tree in enumerate(forest.trees):
            assert tree.start == end
            end += tree.prompt + sum(tree.completions)
            assert (forest.group[0, tree.start : end] == g).all()
            assert (forest.branch[0, tree.start : tree.start + tree.prompt] == 0).all()
        assert end == forest.input_ids.shape[1]


class TestPaddedLaws:
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


LAYOUTS = pytest.mark.parametrize("lay", [lambda groups: Forest.padded(groups, PAD), Forest.packed])


class TestRefusals:
    @LAYOUTS
    @pytest.mark.parametrize(
        ("group", "part"), [(Group([], [[1]]), "prompt of group 1"), (Group([1], [[2], []]), "completion 1 of group 1")]
    )
    def test_an_empty_part_is_named(self, lay, group, part):
        with pytest.raises(ValueError, match=rf"Forest\.pa(ck|dd)ed: {part} is empty, expected at least one token"):
            lay([Group([1], [[2]]), group])

    @LAYOUTS
    @pytest.mark.parametrize("groups", [[], [Group([1], [])]])
    def test_no_completions(self, lay, groups):
        with pytest.raises(ValueError, match="got no completions, expected at least one"):
            lay(groups)

    def test_shapes_are_executed(self):
        with pytest.raises(TypeCheckError):
            replace(Forest.padded(GROUPS, PAD), position_ids=torch.zeros(3, 5, dtype=torch.long))
        with pytest.raises(TypeCheckError):
            replace(Forest.padded(GROUPS, PAD), source=torch.zeros(2, dtype=torch.long))
        with pytest.raises(TypeCheckError):
            replace(Forest.padded(GROUPS, PAD), last=torch.zeros(2, 1, dtype=torch.long))
