"""The estimate of best-of-n is the mean over all subsets, and unbiased; the KL is the known formula."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from dpo.estimates import mean
from dpo.evaluation.bestofn import best_of, expected_best, kl_bound
from dpo.evaluation.samples import Answer, Spoken


def spoken(*rows: Sequence[float | None]) -> Spoken:
    answers = [tuple(Answer("text", 1, finished=True, log_ratio=0.0, gold=one) for one in row) for row in rows]
    return Spoken(tuple(f"prompt {n}" for n in range(len(rows))), tuple(answers))


def over_all_subsets(scores: list[float], values: list[float], n: int) -> float:
    """Choose from every subset; answers that share the best score are chosen alike often."""
    found = []
    for subset in combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        found.append(np.mean([values[i] for i in subset if scores[i] == best]))
    return float(np.mean(found))


class TestExpectedBest:
    def test_by_hand(self):
        # Pairs of 1, 2, 6: (1, 2) gives 2, (1, 6) and (2, 6) give 6.
        assert expected_best([6, 1, 2], [6, 1, 2], 2) == pytest.approx(14 / 3)
        # Chosen by another score, which likes the first and then the third: values 6, 6, 2.
        assert expected_best([9, 0, 5], [6, 1, 2], 2) == pytest.approx(14 / 3)
        assert expected_best([0, 9, 5], [6, 1, 2], 2) == pytest.approx((1 + 1 + 2) / 3)

    def test_of_one_is_the_mean_and_of_all_the_best(self):
        assert expected_best([3, 1, 2], [0.5, 0.1, 0.9], 1) == pytest.approx(0.5)
        assert expected_best([3, 1, 2], [0.5, 0.1, 0.9], 3) == pytest.approx(0.5)

    @pytest.mark.parametrize("n", range(1, 9))
    @pytest.mark.parametrize("levels", [1, 3, 1000])  # few levels: many ties
    def test_it_is_the_mean_over_all_subsets(self, n: int, levels: int):
        rng = np.random.default_rng(levels)
        scores, values = rng.integers(0, levels, 8).tolist(), rng.normal(size=8).tolist()
        assert expected_best(scores, values, n) == pytest.approx(over_all_subsets(scores, values, n), abs=1e-12)

    def test_the_order_of_the_answers_does_not_matter(self):
        scores, values = [1.0, 1.0, 0.0, 2.0, 1.0], [5.0, 1.0, 7.0, 0.0, 3.0]
        turned = expected_best(scores[::-1], values[::-1], 2)
        assert turned == pytest.approx(expected_best(scores, values, 2), abs=1e-12)

    def test_it_is_unbiased_where_the_best_of_what_was_drawn_is_not(self):
        """The best of 4 uniform numbers is 4 / 5 in the mean."""
        draws = np.random.default_rng(0).uniform(size=(4000, 8)).tolist()
        found = np.array([expected_best(row, row, 4) for row in draws])
        assert found.mean() == pytest.approx(0.8, abs=4 * found.std() / len(found) ** 0.5)
        assert found.std() < np.array([max(row[:4]) for row in draws]).std()

    def test_many_answers_do_not_overflow(self):
        scores = np.linspace(0, 1, 4001).tolist()
        assert expected_best(scores, scores, 1000) == pytest.approx(1000 / 1001, abs=1e-3)

    @pytest.mark.parametrize("n", [0, 4])
    def test_impossible_counts(self, n: int):
        with pytest.raises(ValueError, match=rf"got n = {n} of 3 answers, expected 1 <= n <= 3\. Sample more"):
            expected_best([1, 2, 3], [1, 2, 3], n)

    def test_unequal_lengths(self):
        with pytest.raises(ValueError, match="got 2 scores of 3 values"):
            expected_best([1, 2], [1, 2, 3], 1)


class TestBestOf:
    def test_prompts_are_the_units(self):
        rows = [[0.0, 1.0, 0.5], [0.2, 0.2, 0.8], [-1.0, 0.0, 1.0]]
        found = best_of(spoken(*rows), 2)
        assert found.gold == mean([expected_best(row, row, 2) for row in rows])
        assert found.gold.value == pytest.approx(np.mean([over_all_subsets(row, row, 2) for row in rows]))
        assert found.gold.n == 3
        assert found.score == found.gold
        assert (found.n, found.kl_bound) == (2, kl_bound(2))

    def test_chosen_by_one_score_and_measured_by_gold(self):
        rows, proxy = [[0.0, 1.0, 0.5], [0.2, 0.3, 0.8]], [[9.0, 1.0, 2.0], [1.0, 2.0, 3.0]]
        found = best_of(spoken(*rows), 3, proxy)
        assert found.gold.value == pytest.approx((0.0 + 0.8) / 2)
        assert found.score.value == pytest.approx((9.0 + 3.0) / 2)

    def test_of_one_is_what_the_samples_say(self):
        said = spoken([0.0, 1.0, 0.5], [0.2, 0.3, 0.8])
        assert best_of(said, 1).gold.value == pytest.approx(said.estimates()["eval/gold_reward"].value)

    def test_more_to_choose_from_is_better(self):
        rng = np.random.default_rng(0)
        said = spoken(*rng.normal(size=(10, 16)).tolist())
        values = [best_of(said, n).gold.value for n in (1, 2, 4, 8, 16)]
        assert values == sorted(values)
        assert values[-1] > values[0] + 1

    def test_answers_without_a_gold_reward(self):
        with pytest.raises(ValueError, match=r"got answers without a gold reward.*Set evaluation\.gold"):
            best_of(spoken([0.0, None]), 1)


class TestKL:
    def test_known_values(self):
        assert [kl_bound(n) for n in (1, 2, 4, 16)] == pytest.approx([0.0, 0.1931472, 0.6362944, 1.8350887], abs=1e-7)

    def test_it_is_exact_for_improbable_answers(self):
        """Over the quantiles of the score, best-of-n has the density n u^(n - 1)."""
        u = (np.arange(200_000) + 0.5) / 200_000
        for n in (2, 5):
            density = n * u ** (n - 1)
            assert kl_bound(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)

    def test_it_bounds_a_coin_from_above(self):
        """Of two answers of probability 1/2 the better one is missing from n draws with probability 2^-n."""
        for n in (2, 3, 8):
            worse = 0.5**n
            exact = worse * math.log(2 * worse) + (1 - worse) * math.log(2 * (1 - worse))
            assert exact < kl_bound(n)

    def test_impossible_counts(self):
        with pytest.raises(ValueError, match=r"got n = 0, expected n >= 1"):
            kl_bound(0)
