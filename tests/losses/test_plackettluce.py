"""The likelihood of an order in hand numbers, as a distribution, with ties, and on a population."""

import math
from itertools import permutations

import pytest
import torch

from dpo.losses.bradleyterry import BradleyTerry
from dpo.losses.plackettluce import PlackettLuce
from dpo.types import RankingScores


def ranking(*prompts, preference=None, weight=None) -> RankingScores:
    """Prompts as lists of (score, rank)."""
    tensor = lambda values: None if values is None else torch.tensor(values, dtype=torch.float64)  # noqa: E731
    rows = [(score, rank, n) for n, prompt in enumerate(prompts) for score, rank in prompt]
    scores, rank, index = zip(*rows, strict=True)
    return RankingScores(
        tensor(scores).requires_grad_(),
        torch.tensor(rank),
        torch.tensor(index),
        preference=tensor(preference),
        weight=tensor(weight),
    )


def test_equal_scores_give_the_log_of_the_number_of_orders():
    # Every one of the K! orders is as likely as the others.
    out = PlackettLuce()(ranking(*[[(0.7, rank) for rank in range(k)] for k in (2, 3, 5)]))
    assert out.losses.tolist() == pytest.approx([math.log(math.factorial(k)) for k in (2, 3, 5)], rel=1e-14)


def test_hand_numbers_of_three_in_any_order():
    # e^s = 4, 2, 1, best first: 4/7 for the first place, 2/3 for the second, 1 for the last: -ln(8/21).
    for order in permutations([(math.log(4), 0), (math.log(2), 1), (0.0, 2)]):
        out = PlackettLuce()(ranking(list(order), weight=[3.0]))
        assert out.loss.item() == pytest.approx(3 * math.log(21 / 8), rel=1e-14)
        assert out.rewards.tolist() == [score for score, _ in order]


def test_gradient_is_the_share_of_each_place_less_the_places_taken():
    # e^s = 2, 1, 1: softmax over all three (1/2, 1/4, 1/4), over the last two (1/2, 1/2).
    scores = ranking([(math.log(2), 0), (0.0, 1), (0.0, 2)])
    PlackettLuce()(scores).loss.backward()
    assert scores.scores.grad.tolist() == pytest.approx([1 / 2 - 1, 1 / 4 + 1 / 2 - 1, 1 / 4 + 1 / 2], rel=1e-14)


def test_probabilities_of_all_orders_add_up_to_one():
    values = (0.3, -1.2, 2.0, 0.5)
    prompts = [list(zip(values, order, strict=True)) for order in permutations(range(4))]
    losses = PlackettLuce()(ranking(*prompts)).losses
    assert torch.exp(-losses).sum().item() == pytest.approx(1, rel=1e-14)


def test_two_completions_are_bradley_terry():
    scores = ranking([(0.4, 0), (1.0, 1)], [(-2.0, 1), (0.5, 0)], weight=[2.0, 0.5])
    torch.testing.assert_close(PlackettLuce()(scores).losses, BradleyTerry()(scores).losses)


def test_tied_last_places_leave_the_probability_of_what_was_ranked():
    # Only the best of three is known: 4/7. Whatever the order of the others, summed over both: 4/7 as well.
    values = (math.log(4), math.log(2), 0.0)
    tied = PlackettLuce()(ranking(list(zip(values, (0, 1, 1), strict=True)))).loss
    orders = [list(zip(values, order, strict=True)) for order in ((0, 1, 2), (0, 2, 1))]
    assert math.exp(-tied.item()) == pytest.approx(4 / 7, rel=1e-14)
    assert torch.exp(-PlackettLuce()(ranking(*orders)).losses).sum().item() == pytest.approx(4 / 7, rel=1e-14)


def test_tied_first_places_do_not_compete_with_each_other():
    # e^s = 4, 2, 1 with the first two tied: 4 / (4 + 1) and 2 / (2 + 1).
    scores = ranking([(math.log(4), 0), (math.log(2), 0), (0.0, 1)])
    assert PlackettLuce()(scores).loss.item() == pytest.approx(-math.log(4 / 5 * 2 / 3), rel=1e-14)


def test_a_prompt_without_an_order_has_the_loss_0():
    scores = ranking([(1.0, 0), (4.0, 0)], [(1.0, 0), (0.0, 1)], [(3.0, 0)])
    out = PlackettLuce()(scores)
    out.loss.backward()
    assert out.losses.tolist() == pytest.approx([0, math.log1p(math.exp(-1)), 0], abs=1e-15)
    assert scores.scores.grad[[0, 1, 4]].tolist() == [0, 0, 0]


def test_the_gradient_vanishes_at_the_scores_that_the_orders_were_drawn_by():
    # Each order of a population weighs as much as its probability under the scores.
    values = (0.3, -1.2, 2.0)
    prompts = [list(zip(values, order, strict=True)) for order in permutations(range(3))]
    share = torch.exp(-PlackettLuce()(ranking(*prompts)).losses.detach())
    scores = ranking(*prompts, weight=share.tolist())
    PlackettLuce()(scores).losses.sum().backward()
    by_completion = scores.scores.grad.view(6, 3).sum(0)
    torch.testing.assert_close(by_completion, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    elsewhere = ranking(*[[(score + 0.1 * (n == 0), rank) for n, (score, rank) in enumerate(p)] for p in prompts])
    (PlackettLuce()(elsewhere).losses * share).sum().backward()
    assert elsewhere.scores.grad.view(6, 3).sum(0)[0].item() > 1e-3


def test_certain_labels_are_taken_and_others_refused():
    rows = [(1.0, 0), (0.0, 1)]
    certain = PlackettLuce()(ranking(rows, rows, preference=[1.0, 1.0])).losses
    torch.testing.assert_close(certain, PlackettLuce()(ranking(rows, rows)).losses, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"preference must be 1 for every prompt, got 0\.7 for prompt 1: .* KWise"):
        PlackettLuce()(ranking(rows, rows, preference=[1.0, 0.7]))
