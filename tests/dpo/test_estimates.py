"""Intervals cover what they promise."""

import numpy as np
import pytest
from scipy.stats import binomtest

from dpo.estimates import Estimate, auc, mean, share


class TestMean:
    @pytest.mark.parametrize("skewed", [False, True])
    def test_the_interval_covers_the_truth(self, skewed):
        rng = np.random.default_rng(0)
        draws = rng.exponential(2.0, (200, 30)) if skewed else rng.normal(2.0, 3.0, (200, 30))
        estimates = [mean(list(draw)) for draw in draws]
        covered = sum(one.low <= 2.0 <= one.high for one in estimates)
        assert 180 <= covered <= 198  # 95 % nominal, n = 30; wider intervals than need be are wrong as well

    def test_its_width_is_that_of_the_normal_interval(self):
        values = np.random.default_rng(0).normal(0, 3, 400)
        expected = 1.96 * values.std(ddof=1) / 20
        assert mean(list(values)).half_width == pytest.approx(expected, rel=0.05)

    def test_the_value_is_the_mean_and_n_the_count(self):
        estimate = mean([1.0, 2.0, 6.0])
        assert estimate.value == 3.0
        assert estimate.n == 3
        assert 1.0 <= estimate.low < 3.0 < estimate.high <= 6.0

    def test_equal_calls_are_equal(self):
        values = list(np.random.default_rng(1).normal(size=20))
        assert mean(values) == mean(values)
        assert mean(values, seed=1) != mean(values, seed=2)

    @pytest.mark.parametrize("values", [[4.0], [4.0, 4.0, 4.0]])
    def test_values_without_spread(self, values):
        assert mean(values) == Estimate(4.0, 4.0, 4.0, len(values))

    @pytest.mark.parametrize("values", [[0.0, 1.0], [0.0] * 9 + [1.0], [1e-9, 2e-9, 1.0]])
    def test_tiny_samples_have_finite_intervals(self, values):
        estimate = mean(values)
        assert np.isfinite([estimate.low, estimate.high]).all()
        assert estimate.low < estimate.value < estimate.high

    def test_no_values(self):
        with pytest.raises(ValueError, match="got no values"):
            mean([])


class TestShare:
    @pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (50, 1000)])
    def test_whole_hits_have_wilsons_interval(self, hits, n):
        expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
        estimate = share(hits, n)
        assert estimate.value == hits / n
        assert estimate.n == n
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)

    def test_half_a_hit_lies_between_its_neighbours(self):
        below, between, above = share(7, 20), share(7.5, 20), share(8, 20)
        assert below.low < between.low < above.low
        assert below.high < between.high < above.high

    @pytest.mark.parametrize(("hits", "n"), [(-1, 5), (6, 5), (0, 0), (float("nan"), 5)])
    def test_impossible_counts(self, hits, n):
        with pytest.raises(ValueError, match="expected 0 <= hits <= n"):
            share(hits, n)


class TestArea:
    def test_the_interval_is_that_of_the_paper(self):
        # A = 0.75, 3 against 2: Q1 = 0.75 / 1.25 = 0.6, Q2 = 1.125 / 1.75 = 9/14;
        # variance (0.1875 + 2 (0.6 - 0.5625) + (9/14 - 0.5625)) / 6
        half = 1.959964 * ((0.1875 + 0.075 + 9 / 14 - 0.5625) / 6) ** 0.5
        found = auc(0.75, 3, 2)
        assert (found.value, found.high, found.n) == (0.75, 1.0, 5)
        assert found.low == pytest.approx(0.75 - half, abs=1e-6)

    def test_a_perfect_one_has_no_width(self):
        assert auc(1.0, 30, 40) == Estimate(1.0, 1.0, 1.0, 70)

    def test_more_cases_are_narrower(self):
        assert auc(0.7, 300, 300).half_width < auc(0.7, 30, 30).half_width / 3


def test_an_estimate_reads_well():
    estimate = Estimate(0.5, 0.25, 0.65, 10)
    assert str(estimate) == "0.500 [0.250, 0.650]"
    assert estimate.half_width == pytest.approx(0.2)
