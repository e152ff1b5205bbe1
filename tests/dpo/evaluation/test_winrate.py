"""Win rates: their intervals, length taken out of them, and one scale for all."""

from itertools import combinations

import numpy as np
import pytest
from scipy.special import expit

from dpo.estimates import Estimate, share
from dpo.evaluation.records import START
from dpo.evaluation.statistics import SeedNoise, over_seeds, pooled_seed_noise
from dpo.evaluation.winrate import bradley_terry, length_controlled, preference_from_scores, verdict_noise, win_rate

NAN = float("nan")


def verdicts(rng, seeds, prompts, strength=0.0, bias=0.0, longer_by=0.0):
    """Verdicts of 0 and 1 with lengths: `bias` is the judge's taste for length, in nats per typical difference."""
    length = 40 * (rng.normal(size=(seeds, prompts)) + longer_by)
    typical = np.sqrt((length**2).mean())
    return (rng.random((seeds, prompts)) < expit(strength + bias * np.tanh(length / typical))).astype(float), length


class TestWinRate:
    def test_it_is_the_mean_over_seeds_and_prompts(self):
        table = np.array([[1.0, 0.5, 0.0, 1.0], [1.0, 1.0, 0.5, NAN]])  # prompts 1, 0.75, 0.25, 1
        estimate = win_rate(table, None)
        assert estimate.value == 0.75
        assert estimate.n == 4
        assert 0 <= estimate.low < 0.75 < estimate.high <= 1

    def test_exchange_turns_it_round(self):
        table, _ = verdicts(np.random.default_rng(0), 2, 60, strength=1)
        there, back = win_rate(table, None), win_rate(1 - table, None)
        assert (back.value, back.low, back.high) == pytest.approx((1 - there.value, 1 - there.high, 1 - there.low))

    def test_noise_of_seeds_widens_it_but_never_beyond_0_and_1(self):
        table, _ = verdicts(np.random.default_rng(0), 2, 60, strength=1)
        wide = win_rate(table, SeedNoise(0.02, 0.0, 100.0))
        # 1.96 sqrt(0.02 / 2) = 0.196 of the seeds
        assert wide.half_width == pytest.approx(np.hypot(0.196, win_rate(table, None).half_width), rel=0.05)
        assert win_rate(table, SeedNoise(1.0, 0.0, 1.0)) == Estimate(wide.value, 0.0, 1.0, 60)

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_unanimous_prompts_leave_a_doubt(self, value):
        estimate, wilson = win_rate(np.full((2, 20), value), None), share(20 * value, 20)
        assert (estimate.low, estimate.high) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
        assert estimate.value == value

    @pytest.mark.parametrize("table", [np.array([[1.5, 0.0]]), np.array([[-1.0, 0.0]]), np.array([1.0, 0.0])])
    def test_what_is_no_verdict(self, table):
        with pytest.raises(ValueError, match=r"expected \(seeds, prompts\) from 0 to 1"):
            win_rate(table, None)


class TestVerdictNoise:
    def test_each_against_each_has_the_freedom_of_its_entries(self):
        # 4 entries, 3 seeds: (4 - 1) (3 - 1) = 6, not 6 pairs times 2. The value: many draws agree with chi2_6, whose
        # relative variance is 2 / 6.
        rng, found = np.random.default_rng(0), []
        for _ in range(300):
            runs = rng.normal(size=(4, 3))
            tables = {
                (str(i), str(j)): np.tile((0.5 + 0.01 * (runs[i] - runs[j]))[:, None], 2)
                for i, j in combinations(range(4), 2)
            }
            noise = verdict_noise(tables)
            assert noise is not None
            assert noise.degrees == 6
            found.append(noise.between)
        assert np.mean(found) == pytest.approx(2e-4, rel=0.1)
        assert np.var(found) / np.mean(found) ** 2 == pytest.approx(2 / 6, rel=0.3)

    def test_pairs_against_the_start_are_independent(self):
        tables = {(name, START): verdicts(np.random.default_rng(i), 3, 20)[0] for i, name in enumerate("abc")}
        assert verdict_noise(tables) == pooled_seed_noise({name: table for (name, _), table in tables.items()})

    def test_one_seed_says_nothing(self):
        assert verdict_noise({("a", "b"): np.zeros((1, 5))}) is None

    def test_the_two_kinds_are_not_pooled(self):
        with pytest.raises(ValueError, match="with and without 'start'"):
            verdict_noise({("a", START): np.zeros((2, 5)), ("a", "b"): np.zeros((2, 5))})


class TestLengthControlled:
    def test_without_an_effect_of_length_it_is_the_plain_one(self):
        table, length = verdicts(np.random.default_rng(0), 3, 200, strength=0.8)
        plain, controlled = win_rate(table, None), length_controlled(table, length, None)
        assert controlled is not None
        assert controlled.value == pytest.approx(plain.value, abs=0.02)
        assert controlled.half_width == pytest.approx(plain.half_width, rel=0.15)
        assert controlled.n == 200

    def test_a_pure_taste_for_length_is_taken_out(self):
        table, length = verdicts(np.random.default_rng(0), 3, 200, bias=2, longer_by=1)
        plain, controlled = win_rate(table, None), length_controlled(table, length, None)
        assert controlled is not None
        assert plain.low > 0.6
        assert controlled.low < 0.5 < controlled.high
        assert controlled.value == pytest.approx(0.5, abs=0.06)

    def test_its_interval_covers_the_truth(self):
        rng, covered = np.random.default_rng(0), 0
        for _ in range(100):
            table, length = verdicts(rng, 1, 80, strength=0.5, bias=1, longer_by=0.5)
            estimate = length_controlled(table, length, None)
            covered += estimate.low <= expit(0.5) <= estimate.high
        assert 89 <= covered <= 99

    def test_exchange_turns_it_round(self):
        table, length = verdicts(np.random.default_rng(1), 2, 60, strength=1, bias=1, longer_by=0.5)
        there, back = length_controlled(table, length, None), length_controlled(1 - table, -length, None)
        assert (back.value, back.low, back.high) == pytest.approx((1 - there.value, 1 - there.high, 1 - there.low))

    def test_fractions_count_as_so_many_verdicts(self):
        # One judge's 3/4 is three verdicts of 1 and one of 0.
        rng = np.random.default_rng(0)
        votes = (rng.random((4, 60)) < 0.6).astype(float)
        length = np.tile(rng.normal(size=60), (4, 1))
        assert length_controlled(votes.mean(0, keepdims=True), length[:1], None).value == pytest.approx(
            length_controlled(votes, length, None).value
        )

    def test_seed_noise_widens_it(self):
        table, length = verdicts(np.random.default_rng(0), 2, 100)
        alone, noisy = length_controlled(table, length, None), length_controlled(table, length, SeedNoise(0.02, 0, 100))
        assert noisy.half_width == pytest.approx(np.hypot(0.196, alone.half_width), rel=0.05)

    def test_missing_values_are_left_out(self):
        table, length = verdicts(np.random.default_rng(0), 1, 60, strength=0.5)
        holes = table.copy(), length.copy()
        holes[0][0, :5] = NAN
        holes[1][0, 5:10] = NAN
        assert length_controlled(*holes, None) == length_controlled(table[:, 10:], length[:, 10:], None)

    @pytest.mark.parametrize(
        ("table", "length"),
        [
            (np.ones((1, 20)), np.arange(20.0)[None]),  # one outcome
            (np.arange(20.0)[None] > 9, np.arange(20.0)[None]),  # the longer always wins
            (np.arange(20.0)[None] < 9, np.arange(20.0)[None]),  # the shorter always wins
            (np.arange(20.0)[None] % 2, np.full((1, 20), 3.0)),  # nothing to tell lengths by
            (np.arange(8.0)[None] % 2, np.arange(8.0)[None]),  # too few
            (np.full((1, 20), NAN), np.full((1, 20), NAN)),
        ],
    )
    def test_what_cannot_be_fitted(self, table, length):
        assert length_controlled(np.asarray(table, dtype=float), length, None) is None

    def test_lengths_of_another_shape(self):
        with pytest.raises(ValueError, match=r"got lengths of shape \(1, 3\), expected \(1, 4\)"):
            length_controlled(np.zeros((1, 4)), np.zeros((1, 3)), None)


class TestPreferenceFromScores:
    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            ([1.0], [0.0], 1.0),
            ([1.0], [1.0], 0.5),
            ([3.0, 1.0], [2.0, 1.0], (1 + 1 + 0 + 0.5) / 4),
            ([0.0, 5.0, 5.0], [4.0], 2 / 3),
        ],
    )
    def test_hand_numbers(self, first, second, expected):
        assert preference_from_scores(first, second) == pytest.approx(expected)
        assert preference_from_scores(second, first) == pytest.approx(1 - expected)

    @pytest.mark.parametrize(("first", "second"), [([], [1.0]), ([1.0], []), ([NAN], [1.0]), ([1.0], [0.0, NAN])])
    def test_a_missing_score_is_a_missing_verdict(self, first, second):
        assert np.isnan(preference_from_scores(first, second))


class TestBradleyTerry:
    def test_two_names_are_the_log_odds_of_the_win_rate(self):
        # 15 of 20: ln(15 / 5) = ln 3
        table = np.array([[1.0] * 15 + [0.0] * 5])
        found = bradley_terry({("a", START): table})
        assert found["a"].value == pytest.approx(np.log(3))
        assert found[START] == Estimate(0.0, 0.0, 0.0, 20)
        # Of 20 prompts: sd of a mean sqrt(0.75 0.25 / 20), over the slope 0.75 0.25 of the logistic.
        rate = over_seeds(table, None)
        assert found["a"].half_width == pytest.approx(rate.half_width / (0.75 * 0.25), rel=1e-6)
        other_way = bradley_terry({(START, "a"): 1 - table})
        assert other_way["a"].value == pytest.approx(np.log(3))

    def test_it_finds_the_strengths_and_sorts_by_them(self):
        rng = np.random.default_rng(0)
        strength = {START: 0.0, "weak": -0.7, "good": 0.5, "best": 1.2}
        tables = {
            (i, j): (rng.random((2, 300)) < expit(strength[i] - strength[j])).astype(float)
            for i, j in combinations(strength, 2)
        }
        found = bradley_terry(tables)
        assert list(found) == ["best", "good", START, "weak"]
        for name in ("weak", "good", "best"):
            assert found[name].low < strength[name] < found[name].high
            assert found[name].half_width < 0.5

    def test_prompts_that_decide_all_pairs_alike_are_one_piece_of_evidence_each(self):
        # The same verdicts in every seed are no more evidence than those of one.
        table, _ = verdicts(np.random.default_rng(0), 1, 80, strength=0.5)
        once = bradley_terry({("a", START): table})["a"]
        thrice = bradley_terry({("a", START): np.tile(table, (3, 1))})["a"]
        assert thrice.value == pytest.approx(once.value)
        assert thrice.half_width == pytest.approx(once.half_width, rel=0.02)

    def test_seeds_that_differ_widen_it(self):
        rng = np.random.default_rng(0)
        lucky = (rng.random((2, 200)) < np.array([[0.9], [0.4]])).astype(float)
        alike = (rng.random((2, 200)) < 0.65).astype(float)
        assert (
            bradley_terry({("a", START): lucky})["a"].half_width
            > 3 * bradley_terry({("a", START): alike})["a"].half_width
        )

    @pytest.mark.parametrize(
        "tables",
        [
            {("a", START): np.ones((1, 20))},
            {("a", START): np.array([[1.0, 0.0] * 5]), ("b", "c"): np.array([[1.0, 0.0] * 5])},
            {("a", START): np.array([[1.0, 0.0] * 5]), ("b", START): np.zeros((1, 10)), ("a", "b"): np.ones((1, 10))},
        ],
    )
    def test_no_finite_strengths(self, tables):
        assert bradley_terry(tables) is None

    def test_without_the_start(self):
        with pytest.raises(ValueError, match="expected some against 'start'"):
            bradley_terry({("a", "b"): np.ones((1, 4))})
