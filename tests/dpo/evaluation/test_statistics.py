"""Differences are found when they are there, and are not when they are not, at the stated rates."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from dpo.estimates import Estimate, mean
from dpo.evaluation.statistics import SeedNoise, corrected, difference, over_seeds, pooled_seed_noise


def gold(rng, entries, seeds, prompts, seed_sd, effect=0.0):
    """Skewed rewards in [-1, 1] of one objective trained entries x seeds times; `effect` goes to the first entry."""
    prompt = rng.normal(size=prompts)
    run = seed_sd * rng.normal(size=(entries, seeds, 1))
    run[0] += effect
    answer = rng.exponential(size=(entries, seeds, prompts)) - 1
    return {str(i): np.tanh(0.6 + 0.7 * (prompt + row)) for i, row in enumerate(run + answer)}


def wins(rng, entries, seeds, prompts, seed_sd):
    """0 or 1 for each prompt."""
    logits = 1 + rng.normal(size=prompts) + seed_sd * rng.normal(size=(entries, seeds, 1))
    return {
        str(i): row.astype(float)
        for i, row in enumerate(rng.random((entries, seeds, prompts)) < stats.logistic.cdf(logits))
    }


def found(values):
    """The corrected p of every pair of entries."""
    noise = pooled_seed_noise(values)
    return corrected([difference(a, b, noise)[1] for a, b in combinations(values.values(), 2)])


class TestAnObjectiveAgainstItself:
    # Any difference found is a false one, and at most 5 % of comparisons may hold one. Over the grid of 2 to 6 entries,
    # 2 to 5 seeds, 24 to 200 prompts and seeds' sd up to half the prompts', 2 % do (5 % in the worst cell).
    @pytest.mark.slow
    @pytest.mark.parametrize("make", [gold, wins])
    @pytest.mark.parametrize(
        ("entries", "seeds", "prompts", "seed_sd"),
        [(2, 2, 24, 0.2), (3, 2, 60, 0.5), (4, 3, 40, 0.1), (2, 5, 100, 0.0)],
    )
    def test_a_comparison_finds_no_difference(self, make, entries, seeds, prompts, seed_sd):
        rng = np.random.default_rng(0)
        false = sum(min(found(make(rng, entries, seeds, prompts, seed_sd))) < 0.05 for _ in range(20))
        assert false <= 2  # at least 18 of 20

    def test_single_intervals_cover_0(self):
        rng, covered = np.random.default_rng(1), 0
        for _ in range(120):
            values = gold(rng, 2, 3, 40, 0.2)
            estimate, p = difference(values["0"], values["1"], pooled_seed_noise(values))
            assert (estimate.low <= 0 <= estimate.high) == (p > 0.05)
            covered += p > 0.05
        assert covered >= 108  # 114 expected, sd 2.4

    def test_without_the_seeds_noise_it_would_find_many(self):
        rng = np.random.default_rng(0)
        values = [gold(rng, 2, 3, 100, 0.3) for _ in range(20)]
        assert sum(difference(v["0"], v["1"], None)[1] < 0.05 for v in values) >= 8
        assert sum(difference(v["0"], v["1"], pooled_seed_noise(v))[1] < 0.05 for v in values) <= 2

    def test_against_the_start_one_side_alone_is_noisy(self):
        rng = np.random.default_rng(0)
        start, trained = rng.normal(size=(1, 100)), rng.normal(size=(3, 100))
        noise = SeedNoise(1.0, 0.0, 1000.0)
        once = difference(trained, start, noise, against_start=True)[0].half_width
        twice = difference(trained, start, noise)[0].half_width
        # Seeds: 1.96 sqrt(1/3) = 1.13 and 1.96 sqrt(1/3 + 1) = 2.26; prompts: 1.96 sqrt(1/3 + 1) / 10 = 0.23.
        assert once == pytest.approx(np.hypot(1.13, 0.23), rel=0.05)
        assert twice == pytest.approx(np.hypot(2.26, 0.23), rel=0.05)


class TestAKnownEffect:
    def test_it_is_found(self):
        rng = np.random.default_rng(0)
        values = [gold(rng, 3, 3, 100, 0.05, effect=0.6) for _ in range(20)]
        ps = np.array([found(one) for one in values])  # pairs 0-1, 0-2, 1-2
        assert (ps[:, :2] < 0.05).mean() >= 0.9
        assert (ps[:, 2] < 0.05).sum() <= 2

    def test_its_interval_covers_it(self):
        rng, covered = np.random.default_rng(2), 0
        for _ in range(120):
            prompt, own = rng.normal(size=40), 0.5 * rng.normal(size=40)  # 0.5: prompts differ in the effect as well
            runs = 0.2 * rng.normal(size=(2, 3, 1)) + rng.normal(size=(2, 3, 40)) + prompt
            runs[0] += 0.7 + own
            values = {"first": runs[0], "second": runs[1]}
            estimate, _ = difference(runs[0], runs[1], pooled_seed_noise(values))
            covered += estimate.low <= 0.7 <= estimate.high
        assert covered >= 108

    def test_pairing_takes_out_what_prompts_share(self):
        rng = np.random.default_rng(0)
        prompt = 10 * rng.normal(size=50)
        first, second = prompt + rng.normal(size=(1, 50)) + 1, prompt + rng.normal(size=(1, 50))
        estimate, p = difference(first, second, None)
        assert p < 0.01
        assert estimate.half_width < 0.2 * over_seeds(first, None).half_width  # sqrt(2) / 10 of it


class TestDifference:
    def test_prompts_alone_are_students_t(self):
        # Normal values, one seed each: the bootstrap with its factor is t with P - 1 degrees of freedom.
        values = np.random.default_rng(0).normal(0.5, 1, (1, 12))
        expected = stats.ttest_1samp(values[0], 0)
        interval = expected.confidence_interval(0.95)
        estimate, p = difference(values, np.zeros((1, 12)), None)
        assert estimate.value == pytest.approx(values.mean())
        assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high), abs=0.1)
        assert estimate.half_width == pytest.approx((interval.high - interval.low) / 2, rel=0.08)
        assert p == pytest.approx(expected.pvalue, abs=0.03)
        assert estimate.n == 12

    def test_seeds_alone_are_students_t(self):
        # All prompts alike, 2 entries x 2 seeds: the t-test of the runs' means, with 2 degrees of freedom.
        first, second = np.array([[0.0], [2.0]]), np.array([[5.0], [6.0]])
        noise = pooled_seed_noise({"a": first, "b": second})
        # ((1 + 1) + (0.25 + 0.25)) / 2 = 1.25
        assert noise == SeedNoise(1.25, 0.0, 2.0)
        expected = stats.ttest_ind(first[:, 0], second[:, 0])
        interval = expected.confidence_interval(0.95)
        estimate, p = difference(np.tile(first, 30), np.tile(second, 30), noise)
        assert estimate.value == -4.5
        assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high), abs=0.3)  # of +- 4.8
        assert p == pytest.approx(expected.pvalue, rel=0.1)

    def test_what_sampling_explains_is_not_counted_twice(self):
        # The prompts' spread has it already: runs that differ by sampling alone add nothing.
        rng = np.random.default_rng(0)
        first, second = rng.normal(size=(2, 3, 50))
        same = difference(first, second, SeedNoise(1.0, 1.0, 1e8))[0]
        assert same.half_width == pytest.approx(difference(first, second, None)[0].half_width, rel=0.01)
        more = difference(first, second, SeedNoise(1.0, 0.0, 1e8))[0]
        assert more.half_width > 2 * same.half_width

    def test_exchange_turns_the_sign(self):
        rng = np.random.default_rng(0)
        values = gold(rng, 2, 2, 30, 0.2)
        noise = pooled_seed_noise(values)
        (there, p), (back, q) = difference(values["0"], values["1"], noise), difference(values["1"], values["0"], noise)
        assert back.value == -there.value
        assert (back.low, back.high) == pytest.approx((-there.high, -there.low), rel=0.1)
        assert p == pytest.approx(q, rel=0.1)

    def test_equal_calls_are_equal(self):
        values = gold(np.random.default_rng(0), 2, 2, 30, 0.2)
        noise = pooled_seed_noise(values)
        assert difference(values["0"], values["1"], noise) == difference(values["0"], values["1"], noise)
        assert difference(values["0"], values["1"], noise) != difference(values["0"], values["1"], noise, seed=1)

    def test_identical_models_do_not_differ(self):
        values = np.random.default_rng(0).normal(size=(1, 30))
        assert difference(values, values, None) == (Estimate(0.0, 0.0, 0.0, 30), 1.0)

    def test_p_is_never_0(self):
        _, p = difference(np.ones((1, 30)), np.zeros((1, 30)), None)
        assert p == pytest.approx(2 / 10_001)

    def test_missing_values_are_left_out_in_pairs(self):
        nan = float("nan")
        first = np.array([[1.0, 2.0, nan, 4.0], [3.0, nan, nan, 4.0], [nan, nan, nan, nan]])  # means 2, 2, -, 4
        second = np.array([[1.0, 1.0, 1.0, nan]])
        estimate, _ = difference(first, second, None)
        assert estimate.value == 1.0
        assert estimate.n == 2
        # The empty third row is no run: seeds count as two.
        wide = difference(first, second, SeedNoise(1.0, 0.0, 1e6), against_start=True)[0]
        assert wide.half_width == pytest.approx(1.96 * np.sqrt(1 / 2), rel=0.03)

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            (np.zeros((1, 3)), np.zeros((1, 4)), "got 3 and 4 prompts"),
            (np.zeros(3), np.zeros((1, 3)), r"first: got an array of shape \(3,\)"),
            (np.zeros((1, 3)), np.full((1, 3), np.inf), "second: .* finite"),
            (np.array([[1.0, np.nan]]), np.array([[np.nan, 1.0]]), "no prompt that both"),
            (np.full((1, 2), np.nan), np.zeros((1, 2)), "no prompt that both"),
        ],
    )
    def test_what_cannot_be_compared(self, first, second, message):
        with pytest.raises(ValueError, match=message):
            difference(first, second, None)


class TestSeedNoise:
    def test_it_finds_the_variance_of_training_under_that_of_sampling(self):
        rng = np.random.default_rng(0)
        values = {
            str(i): rng.normal(size=100) + 0.2 * rng.normal(size=(5, 1)) + rng.normal(size=(5, 100)) for i in range(60)
        }
        noise = pooled_seed_noise(values)
        assert noise is not None
        assert noise.degrees == 240
        assert noise.within == pytest.approx(0.01, rel=0.05)  # 1 / 100
        assert noise.variance == pytest.approx(0.04, rel=0.25)

    def test_hand_numbers(self):
        # Run means 2 and 4: (1 + 1) / 1 = 2. Prompt means 3 and 3, so the residuals are -1, 1 and 1, -1: their squares'
        # sum 4 over (2 - 1) (2 - 1), over 2 prompts = 2.
        assert pooled_seed_noise({"a": np.array([[1.0, 3.0], [5.0, 3.0]])}) == SeedNoise(2.0, 2.0, 1.0)

    def test_sampling_alone_leaves_no_variance(self):
        assert SeedNoise(1.0, 3.0, 4.0).variance == 0.0

    def test_one_seed_each_says_nothing(self):
        assert pooled_seed_noise({"a": np.zeros((1, 5)), "b": np.array([[1.0], [np.nan]])}) is None

    def test_entries_of_one_seed_are_left_out_of_the_pool(self):
        pair = np.array([[1.0, 3.0], [5.0, 3.0]])
        assert pooled_seed_noise({"a": pair, "b": np.ones((1, 2))}) == pooled_seed_noise({"a": pair})

    def test_prompts_that_a_run_lacks_do_not_look_like_noise(self):
        prompt = np.array([0.0, 0.0, 100.0])
        values = np.stack([prompt, prompt + 1])
        values[0, 2] = np.nan
        assert pooled_seed_noise({"a": values}) == SeedNoise(0.5, 0.0, 1.0)


class TestOverSeeds:
    def test_without_seed_noise_it_is_near_the_bootstrap_over_prompts(self):
        values = np.random.default_rng(0).exponential(size=(1, 200))
        estimate, plain = over_seeds(values, None), mean(list(values[0]))
        assert estimate.value == plain.value
        assert estimate.n == 200
        assert (estimate.low, estimate.high) == pytest.approx((plain.low, plain.high), abs=0.02)

    @pytest.mark.parametrize("make", [gold, wins])
    def test_it_covers_the_mean_over_prompts_and_seeds(self, make):
        truth = np.mean([make(np.random.default_rng(i), 1, 1, 1, 0.2)["0"] for i in range(20_000)])
        rng, covered = np.random.default_rng(3), 0
        for _ in range(120):
            values = make(rng, 3, 3, 40, 0.2)
            estimate = over_seeds(values["0"], pooled_seed_noise(values))
            covered += estimate.low <= truth <= estimate.high
        assert covered >= 107

    def test_more_seeds_make_it_shorter(self):
        noise = SeedNoise(1.0, 0.0, 1000.0)
        assert over_seeds(np.zeros((4, 9)), noise).half_width == pytest.approx(1.96 / 2, rel=0.03)
        assert over_seeds(np.zeros((1, 9)), noise).half_width == pytest.approx(1.96, rel=0.03)

    def test_a_single_prompt_has_an_interval_over_seeds(self):
        estimate = over_seeds(np.array([[1.0], [3.0]]), SeedNoise(2.0, 0.0, 1.0))
        # t with 1 degree of freedom: 12.7 sqrt(2 / 2)
        assert estimate.value == 2.0
        assert estimate.half_width == pytest.approx(12.7, rel=0.1)
        assert over_seeds(np.array([[1.0]]), None) == Estimate(1.0, 1.0, 1.0, 1)

    def test_no_values(self):
        with pytest.raises(ValueError, match="got no values"):
            over_seeds(np.full((2, 3), np.nan), None)


class TestCorrected:
    def test_holm(self):
        # Sorted 0.01, 0.02, 0.03: times 3, 2, 1 = 0.03, 0.04, 0.03; never below the one before: 0.03, 0.04, 0.04.
        assert corrected([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
        assert corrected([0.9, 0.8]) == [1.0, 1.0]
        assert corrected([]) == []
