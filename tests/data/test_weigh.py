"""What a prompt may have and what a group weighs."""

from collections import Counter

import pytest
from pydantic import ValidationError

from dpo.data import DataConfig, Drop, prepare
from dpo.errors import DataError

RATED = [{"prompt": f"prompt {n % 4}", "completions": ["a", "b", f"c {n}"], "scores": [3, 2, 1]} for n in range(8)]
GROUPED = [
    {"prompt": f"prompt {n}", "chosen": "good", "rejected": "bad", "group": "few" if n < 3 else "many", "weight": w}
    for n, w in zip(range(12), [1, 2, 3] * 4, strict=True)
]


class TestCap:
    def prepared(self, write_rows, chatml, rows, **settings):
        return prepare(DataConfig(train=write_rows(rows), **{"eval_share": 0, **settings}), chatml, "pairs")

    def test_no_prompt_has_more_and_rows_that_lose_all_are_counted(self, write_rows, chatml):
        prepared = self.prepared(write_rows, chatml, RATED, per_prompt=2)
        counts = Counter(example.prompt for example in prepared.train)
        assert set(counts.values()) == {2}
        assert len(counts) == 4
        lost = 8 - len({example.source for example in prepared.train})
        assert prepared.report.dropped == ({Drop.CAPPED: lost} if lost else {})
        assert prepared.report.kept == 8 - lost

    def test_a_cap_of_one_drops_no_more_rows_than_the_limit_allows(self, write_rows, chatml):
        prepared = self.prepared(write_rows, chatml, RATED, per_prompt=1, max_dropped_share=0)
        assert (len(prepared.train), prepared.report.dropped) == (4, {Drop.CAPPED: 4})

    def test_the_order_of_the_rows_changes_nothing_and_the_seed_does(self, write_rows, chatml):
        def drawn(rows, seed=0):
            prepared = self.prepared(write_rows, chatml, rows, per_prompt=1, seed=seed)
            return {(example.prompt, example.texts) for example in prepared.train}

        assert drawn(RATED) == drawn(RATED[::-1])
        assert len({frozenset(drawn(RATED, seed)) for seed in range(5)}) > 1

    def test_held_out_rows_are_not_capped(self, write_rows, chatml):
        config = DataConfig(train=write_rows(GROUPED), eval=write_rows(RATED, "e.jsonl"), per_prompt=1)
        without = prepare(config.model_copy(update={"per_prompt": None}), chatml, "pairs")
        assert len(prepare(config, chatml, "pairs").eval) == len(without.eval) == 24


class TestGroups:
    def weights(self, write_rows, chatml, given):
        config = DataConfig(train=write_rows(GROUPED), eval_share=0, group_weights=given)
        return [(example.group, example.weight) for example in prepare(config, chatml, "pairs").train]

    def test_a_weight_multiplies_that_of_the_row(self, write_rows, chatml):
        found = self.weights(write_rows, chatml, {"few": 10})
        assert found[:4] == [("few", 10), ("few", 20), ("few", 30), ("many", 1)]

    def test_equal_groups_count_the_same_in_total_and_the_mean_stays(self, write_rows, chatml):
        found = self.weights(write_rows, chatml, "equal")
        total = {name: sum(weight for group, weight in found if group == name) for name in ("few", "many")}
        assert total["few"] == pytest.approx(total["many"], rel=1e-12)
        assert sum(total.values()) == pytest.approx(sum(row["weight"] for row in GROUPED), rel=1e-12)
        assert found[1][1] == pytest.approx(2 * found[0][1])

    def test_rows_without_a_group_are_one_of_them(self, write_rows, chatml):
        rows = [*GROUPED[:3], *({**row, "group": None} for row in GROUPED[3:])]
        config = DataConfig(train=write_rows(rows), eval_share=0, group_weights="equal")
        found = prepare(config, chatml, "pairs").train
        assert sum(e.weight for e in found if e.group is None) == pytest.approx(12)
        named = DataConfig(train=write_rows(rows), eval_share=0, group_weights={"none": 0})
        assert [e.weight for e in prepare(named, chatml, "pairs").train] == [1, 2, 3] + [0] * 9

    def test_an_unknown_group_is_an_error(self, write_rows, chatml):
        with pytest.raises(DataError, match=r"got the group 'fwe', expected one of few, many\. Did you mean 'few'"):
            self.weights(write_rows, chatml, {"fwe": 2})

    def test_a_weight_below_0_cannot_be_set(self):
        with pytest.raises(ValidationError, match="greater than or equal to 0"):
            DataConfig(train="x", group_weights={"few": -1})

    def test_the_weights_are_part_of_what_a_run_depends_on(self, write_rows, chatml):
        path = write_rows(GROUPED)
        prints = {
            prepare(DataConfig(train=path, eval_share=0, group_weights=given), chatml, "pairs").fingerprint
            for given in ({}, {"few": 2}, "equal")
        }
        assert len(prints) == 3
