"""The reward model of rankings in hand numbers, with ties, and beside that of pairs."""

import math
from itertools import combinations

import pytest
import torch

from dpo.losses.bradleyterry import BradleyTerry
from dpo.losses.kwise import KWise
from dpo.types import RankingScores


def ranking(*prompts, margin=None, preference=None, weight=None) -> RankingScores:
    """Prompts as lists of (score, rank)."""
    tensor = lambda values: None if values is None else torch.tensor(values, dtype=torch.float64)  # noqa: E731
    rows = [(score, rank, n) for n, prompt in enumerate(prompts) for score, rank in prompt]
    scores, rank, index = zip(*rows, strict=True)
    return RankingScores(
        tensor(scores).requires_grad_(),
        torch.tensor(rank),
        torch.tensor(index),
        tensor(margin),
        tensor(preference),
        tensor(weight),
    )


def loss_of(*gaps: float) -> float:
    """Mean of ln(1 + e^-gap)."""
    return sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps)


def test_equal_scores_give_ln_2_whatever_the_number_of_completions():
    out = KWise()(ranking(*[[(0.7, rank) for rank in range(k)] for k in (2, 3, 9)]))
    torch.testing.assert_close(out.losses, torch.full((3,), math.log(2), dtype=torch.float64), rtol=1e-14, atol=0)


def test_hand_numbers_of_three_in_any_order():
    # Best 2, middle 0, worst -1: gaps 2, 3 and 1, a third of a loss each.
    for rows in ([(2.0, 0), (0.0, 1), (-1.0, 2)], [(-1.0, 2), (2.0, 0), (0.0, 1)]):
        scores = ranking(rows)
        out = KWise()(scores)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(loss_of(2, 3, 1), rel=1e-14)
        best = -(1 / (1 + math.exp(2)) + 1 / (1 + math.exp(3))) / 3  # -(sigma(-2) + sigma(-3)) / 3
        assert scores.scores.grad[scores.rank == 0].item() == pytest.approx(best, rel=1e-13)
        assert out.rewards.tolist() == [score for score, _ in rows]


def test_a_prompt_weighs_the_same_however_many_comparisons_it_holds():
    # The mean over prompts: half of the pair's loss and half of the mean over the four's six comparisons.
    scores = ranking([(1.0, 0), (0.0, 1)], [(0.0, rank) for rank in range(4)])
    out = KWise()(scores)
    assert out.loss.item() == pytest.approx((loss_of(1) + math.log(2)) / 2, rel=1e-14)
    assert out.losses.tolist() == pytest.approx([loss_of(1), math.log(2)], rel=1e-14)


def test_ties_are_not_compared():
    # Ranks 0, 1, 1 with scores 2, 0, -5: gaps 2 and 7, two comparisons; the tied ones do not pull at each other.
    out = KWise()(ranking([(2.0, 0), (0.0, 1), (-5.0, 1)]))
    assert out.loss.item() == pytest.approx(loss_of(2, 7), rel=1e-14)


def test_a_prompt_without_a_comparison_has_the_loss_0_and_counts_as_a_prompt():
    scores = ranking([(1.0, 0), (4.0, 0)], [(1.0, 0), (0.0, 1)], [(3.0, 0)])
    out = KWise()(scores)
    out.loss.backward()
    assert out.losses.tolist() == pytest.approx([0, loss_of(1), 0], rel=1e-14)
    assert out.loss.item() == pytest.approx(loss_of(1) / 3, rel=1e-14)
    assert scores.scores.grad[[0, 1, 4]].tolist() == [0, 0, 0]
    assert out.metrics["reward/accuracy"].item() == 1


def test_soft_labels_weights_margin_and_centring_are_those_of_pairs():
    settings = {"margin_weight": 0.3, "centring_weight": 0.05}
    prompts = [[(0.4, 0), (1.0, 1)], [(-2.0, 1), (0.5, 0)]]
    scores = ranking(*prompts, margin=[4.0, 1.0, 2.0, 2.5], preference=[0.9, 0.6], weight=[2.0, 0.5])
    torch.testing.assert_close(KWise(**settings)(scores).losses, BradleyTerry(**settings)(scores).losses)


def test_three_way_soft_label_margin_and_centring_by_hand():
    # p = 0.8; each comparison: -0.8 log sigma(gap - m) - 0.2 log sigma(-gap) + 0.05 (sum)^2, m = 0.3 of the ratings'.
    values, ratings = (0.4, 1.0, -2.0), (4.0, 1.0, 0.5)
    scores = ranking([(value, rank) for rank, value in enumerate(values)], margin=ratings, preference=[0.8])
    expected = 0.0
    for i, j in combinations(range(3), 2):
        gap, m = values[i] - values[j], 0.3 * (ratings[i] - ratings[j])
        soft = 0.8 * math.log1p(math.exp(m - gap)) + 0.2 * math.log1p(math.exp(gap))
        expected += (soft + 0.05 * (values[i] + values[j]) ** 2) / 3
    loss = KWise(margin_weight=0.3, centring_weight=0.05)(scores).loss.item()
    assert loss == pytest.approx(expected, rel=1e-14)


def test_margin_without_ratings_is_refused():
    with pytest.raises(ValueError, match=r"RankingScores\.margin must hold values, got None"):
        KWise(margin_weight=1)(ranking([(1.0, 0), (0.0, 1)]))


@pytest.mark.parametrize("name", ["margin_weight", "centring_weight"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True])
def test_bad_weights_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^KWise\.{name} must be"):
        KWise(**{name: value})
