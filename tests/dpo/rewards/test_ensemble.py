"""Ensembles by hand: the mean, the most critical member, and the mean less the disagreement."""

import math

import pytest

from dpo.rewards import combined

SCORES = [[1.0, 4.0, 2.0], [2.0, 4.0, -4.0], [6.0, 4.0, 2.0]]
"""[member][answer]. First answer: mean 3, squared distances 4, 1, 9, population variance 14/3 (of a sample it would be
7). Second: all agree. Third: mean 0, distances 4, 16, 4, variance 8."""
DEVIATIONS = [math.sqrt(14 / 3), 0.0, math.sqrt(8)]


@pytest.mark.parametrize(
    ("how", "variance_weight", "expected"),
    [
        ("mean", 0.0, [3, 4, 0]),
        ("min", 0.0, [1, 4, -4]),
        ("mean_minus_variance", 0.5, [3 - 7 / 3, 4, -4]),
        ("mean_minus_variance", 0.0, [3, 4, 0]),
    ],
)
def test_by_hand(how, variance_weight, expected):
    scores, disagreement = combined(SCORES, how, variance_weight)
    assert scores == pytest.approx(expected, abs=1e-12)
    assert disagreement == pytest.approx(DEVIATIONS, abs=1e-12)


def test_only_the_one_that_names_it_reads_the_variance_weight():
    assert combined(SCORES, "min", 9.0).scores == [1, 4, -4]
    assert combined(SCORES, "mean", 9.0).scores == [3, 4, 0]


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_variance"])
def test_a_single_member_is_itself_and_agrees_with_itself(how):
    assert combined([[0.1, -7.3]], how, 5.0) == ([0.1, -7.3], [0, 0])


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_variance"])
def test_agreement_changes_nothing_and_the_careful_ones_never_exceed_the_mean(how):
    assert combined([[2.5], [2.5]], how, 1.0) == ([2.5], [0])
    mean, found = combined(SCORES).scores, combined(SCORES, how, 0.1).scores
    assert all(one <= average for one, average in zip(found, mean, strict=True))


def test_no_answers_have_no_scores():
    assert combined([[], []]) == ([], [])


@pytest.mark.parametrize(
    ("scores", "how", "weight", "message"),
    [
        ([], "mean", 0.0, r"one member or more must score every answer, got \[\] scores"),
        ([[1.0], [1.0, 2.0]], "mean", 0.0, r"must score every answer, got \[1, 2\] scores"),
        ([[1.0]], "max", 0.0, "how must be one of mean, min, mean_minus_variance, got 'max'"),
        ([[1.0]], "mean_minus_variance", -1.0, "variance_weight must be >= 0, got -1.0"),
        ([[1.0]], "mean_minus_variance", math.nan, "variance_weight must be >= 0, got nan"),
    ],
)
def test_what_cannot_be_combined(scores, how, weight, message):
    with pytest.raises(ValueError, match=rf"^combined: .*{message}"):
        combined(scores, how, weight)
