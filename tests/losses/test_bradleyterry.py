"""The reward model of pairs in hand numbers and in closed form."""

import math

import pytest
import torch

from dpo.losses.bradleyterry import BradleyTerry
from dpo.types import RankingScores


def pairs(scores, rank=None, *, margin=None, preference=None, weight=None) -> RankingScores:
    """Two scores a prompt, the better one first where no rank says otherwise."""
    tensor = lambda values: None if values is None else torch.tensor(values, dtype=torch.float64)  # noqa: E731
    rank = torch.tensor([0, 1] * (len(scores) // 2) if rank is None else rank)
    index = torch.arange(len(scores)) // 2
    return RankingScores(
        tensor(scores).requires_grad_(), rank, index, tensor(margin), tensor(preference), tensor(weight)
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_equal_scores_give_ln_2_and_half_a_pull():
    scores = pairs([3.0, 3.0, -700.0, -700.0])
    out = BradleyTerry()(scores)
    out.losses.sum().backward()
    torch.testing.assert_close(out.losses, torch.full((2,), math.log(2), dtype=torch.float64), rtol=1e-15, atol=0)
    assert scores.scores.grad.tolist() == [-0.5, 0.5, -0.5, 0.5]


def test_hand_numbers():
    # Gap 1 - (-0.5) = 1.5: -log sigma(1.5) = ln(1 + e^-1.5), slope -sigma(-1.5) by the better score.
    # The second pair holds the better completion last: gap 2 - 3 = -1.
    scores = pairs([1.0, -0.5, 3.0, 2.0], rank=[0, 1, 1, 0], weight=[1.0, 2.0])
    out = BradleyTerry()(scores)
    out.loss.backward()
    assert out.losses.tolist() == pytest.approx([math.log1p(math.exp(-1.5)), 2 * math.log1p(math.e)], rel=1e-14)
    first, second = sigmoid(-1.5) / 2, sigmoid(1.0)  # the mean over 2 pairs, the second of weight 2
    assert scores.scores.grad.tolist() == pytest.approx([-first, first, second, -second], rel=1e-14)
    assert out.rewards.tolist() == [1, -0.5, 3, 2]
    assert out.metrics["reward/margin"].item() == 0.25  # (1.5 - 1) / 2
    assert out.metrics["reward/accuracy"].item() == 0.5


def test_margin_is_asked_for_in_proportion_to_the_ratings():
    # k = 0.5, ratings 5 and 1: m = 2. Gap 3: -log sigma(3 - 2). With a gap of 2 the loss is that of equal scores.
    scores = pairs([3.0, 0.0, 2.0, 0.0], margin=[5.0, 1.0, 5.0, 1.0])
    losses = BradleyTerry(margin_weight=0.5)(scores).losses
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log(2)], rel=1e-14)
    assert BradleyTerry()(scores).losses.tolist() == pytest.approx(
        [math.log1p(math.exp(-gap)) for gap in (3, 2)], rel=1e-14
    )


def test_reversed_label_asks_for_no_margin():
    # p = 0.75, m = 1, gap 2: -0.75 log sigma(2 - 1) - 0.25 log sigma(-2).
    scores = pairs([2.0, 0.0], margin=[1.0, 0.0], preference=[0.75])
    loss = BradleyTerry(margin_weight=1)(scores).loss.item()
    assert loss == pytest.approx(0.75 * math.log1p(math.exp(-1)) + 0.25 * math.log1p(math.exp(2)), rel=1e-14)


def test_soft_label_is_met_where_the_gap_is_its_log_odds():
    # d loss / d gap = (1 - p) sigma(gap) - p sigma(-gap) = sigma(gap) - p.
    gap = math.log(0.8 / 0.2)
    scores = pairs([gap, 0.0, gap + 1, 0.0], preference=[0.8, 0.8])
    BradleyTerry()(scores).losses.sum().backward()
    assert scores.scores.grad.tolist()[:2] == pytest.approx([0, 0], abs=1e-15)
    assert scores.scores.grad[2].item() == pytest.approx(sigmoid(gap + 1) - 0.8, rel=1e-13)


def test_centring_adds_the_squared_sum():
    # c = 0.1: 0.1 (2 + 1)^2 = 0.9, slope 2 * 0.1 * 3 = 0.6 on both scores; 0 where they are opposite.
    scores = pairs([2.0, 1.0, 0.5, -0.5])
    plain = BradleyTerry()(scores).losses
    centred = BradleyTerry(centring_weight=0.1)(scores).losses
    added = centred - plain
    added.sum().backward()
    assert added.tolist() == pytest.approx([0.9, 0], abs=1e-15)
    assert scores.scores.grad.tolist() == pytest.approx([0.6, 0.6, 0, 0], abs=1e-15)


def test_extreme_gaps_stay_finite_in_float32():
    scores = torch.tensor([1e4, -1e4, -1e4, 1e4], requires_grad=True)
    record = RankingScores(scores, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    out = BradleyTerry()(record)
    out.losses.sum().backward()
    assert out.losses.tolist() == [0, 2e4]
    assert scores.grad.tolist() == [0, 0, -1, 1]


@pytest.mark.parametrize(
    ("scores", "rank", "index"),
    [
        ([1.0, 0.0, 0.5], [0, 1, 2], [0, 0, 0]),
        ([1.0, 0.0, 0.5], [0, 1, 0], [0, 0, 1]),
        ([1.0, 0.0], [0, 0], [0, 0]),
        ([1.0, 0.0, 1.0, 0.0], [0, 0, 0, 1], [0, 0, 1, 1]),
    ],
    ids=["three", "one", "a tie", "a tie before a pair"],
)
def test_other_than_two_unequal_completions_are_refused(scores, rank, index):
    record = RankingScores(torch.tensor(scores), torch.tensor(rank), torch.tensor(index))
    with pytest.raises(ValueError, match=r"two completions of unequal rank for each prompt, got .* or choose KWise"):
        BradleyTerry()(record)


def test_margin_without_ratings_is_refused():
    with pytest.raises(ValueError, match=r"RankingScores\.margin must hold values, got None: .* margin_weight above 0"):
        BradleyTerry(margin_weight=1)(pairs([1.0, 0.0]))


@pytest.mark.parametrize("name", ["margin_weight", "centring_weight"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True])
def test_bad_weights_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^BradleyTerry\.{name} must be"):
        BradleyTerry(**{name: value})
