"""Each view puts the right number in the right column."""

from dataclasses import dataclass, fields, replace
from typing import final

import pytest
import torch

from dpo.losses import PairObjective
from dpo.losses.dpo import DPO
from dpo.losses.kto import KTO
from dpo.losses.sft import SFT
from dpo.model.forest import Group
from dpo.model.logprobs import Spread
from dpo.model.reference import ReferenceLogps
from dpo.model.views import (
    FreshReference,
    concatenate,
    drift,
    keys,
    policy_logps,
    score,
    step_fields,
    tokens,
    view,
    with_policy_logps,
)
from dpo.types import TokenLogps

PAIR_FIELDS = ("policy_chosen", "policy_rejected", "chosen_tokens", "rejected_tokens")


@final
@dataclass(frozen=True, kw_only=True)
class Tokenwise(PairObjective):
    """Asks for all that a pair's record can hold."""

    needs_reference = True
    needs_tokens = True
    needs_collision = True
    needs_mean_log_ratio = True
    paper = "nowhere"

    def __call__(self, logps):
        raise AssertionError("only its needs are read")


TOKENWISE = Tokenwise()


@pytest.fixture
def model(start, perturb):
    model = start()
    perturb(model)
    return model


@pytest.fixture
def one_by_one(model, naive):
    """Sums of every completion on its own: `one_by_one(role, [(prompt, completion)])`."""

    def sums(role, wanted):
        with model.reading(role) as network:
            return torch.stack([naive(network, *key).sum() for key in wanted])

    return sums


def near(ours, expected):
    torch.testing.assert_close(ours.detach(), expected, rtol=0, atol=1e-5)


def side(examples, number):
    return [(example.prompt, example.completions[number]) for example in examples]


@pytest.mark.parametrize(
    ("objective", "number", "policy", "reference", "length", "lengths"),
    [
        (DPO(), 0, "policy_chosen", "reference_chosen", "chosen_length", [3, 5, 2, 7]),
        (DPO(), 1, "policy_rejected", "reference_rejected", "rejected_length", [2, 4, 6, 2]),
        (KTO(), 0, "policy", "reference", "length", [3, 5, 2, 7]),
    ],
    ids=["chosen", "rejected", "judged"],
)
def test_each_side_is_in_its_own_column(
    model, examples, one_by_one, objective, number, policy, reference, length, lengths
):
    record = view(model, ReferenceLogps(model), objective, examples)
    near(getattr(record, policy), one_by_one("policy", side(examples, number)))
    near(getattr(record, reference), one_by_one("reference", side(examples, number)))
    assert getattr(record, policy).requires_grad
    assert not getattr(record, reference).requires_grad
    assert getattr(record, length).tolist() == lengths
    near(record.weight, torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_pairs_hold_the_soft_labels(model, examples):
    record = view(model, ReferenceLogps(model), DPO(), examples)
    near(record.preference, torch.tensor([1.0, 0.9, 0.8, 0.7]))


def test_judgements_hold_the_labels_and_no_mismatched_completions(model, examples):
    record = view(model, ReferenceLogps(model), KTO(), examples)
    assert record.desirable.tolist() == [True, False, True, False]
    assert record.policy_mismatched is None
    assert record.reference_mismatched is None


def test_mismatched_completions_are_scored_without_gradient_in_the_order_of_the_examples(model, examples, one_by_one):
    other = side(examples, 1)
    found = step_fields(model, ReferenceLogps(model), KTO(), examples, [[2, 0], [3, 1]], 0.0)
    near(found["policy_mismatched"], one_by_one("policy", other))
    near(found["reference_mismatched"], one_by_one("reference", other))
    assert not found["policy_mismatched"].requires_grad
    assert step_fields(model, ReferenceLogps(model), DPO(), examples, [[0, 1, 2, 3]], 0.5) == {}


def test_the_running_mean_is_told_to_those_who_ask(model, examples):
    found = step_fields(model, ReferenceLogps(model), TOKENWISE, examples, [[0, 1, 2, 3]], 0.5)
    assert found == {"mean_log_ratio": torch.tensor(0.5)}


def test_tokens_are_those_of_each_completion_padded_on_the_right(model, examples):
    record = view(model, ReferenceLogps(model), TOKENWISE, examples)
    for number, (tokens_of_side, sums) in enumerate(
        [(record.chosen_tokens, record.policy_chosen), (record.rejected_tokens, record.policy_rejected)]
    ):
        assert tokens_of_side.completion_mask.sum(1).tolist() == [len(c) for _, c in side(examples, number)]
        assert not tokens_of_side.policy[~tokens_of_side.completion_mask].any()
        near(tokens_of_side.policy.sum(1), sums.detach())
        assert tokens_of_side.policy.requires_grad
        assert not tokens_of_side.reference.requires_grad
        for row, (prompt, completion) in enumerate(side(examples, number)):
            ids = torch.tensor([[*prompt, *completion]])
            place = slice(len(prompt) - 1, ids.shape[1] - 1)
            for role, got in (("policy", tokens_of_side.policy), ("reference", tokens_of_side.reference)):
                with model.reading(role) as network:
                    full = network(input_ids=ids).logits[0, place].log_softmax(-1)
                near(got[row, : len(completion)], full.gather(1, torch.tensor([completion]).T).squeeze(1))
                if role == "policy":
                    likely = tokens_of_side.log_collision
                    near(likely[row, : len(completion)], full.exp().square().sum(1).log())
    assert not record.chosen_tokens.log_collision.requires_grad


def test_what_costs_more_is_computed_for_those_who_ask(model, examples):
    record = view(model, ReferenceLogps(model), DPO(), examples)
    assert (record.chosen_tokens, record.rejected_tokens, record.mean_log_ratio) == (None, None, None)


def test_a_moving_reference_is_scored_as_it_stands(start, perturb, examples, one_by_one):
    model = start(moving=True)
    reference = FreshReference(model, "moving")
    wanted = side(examples, 0)
    begin = reference.sums(wanted)
    near(begin, ReferenceLogps(model).sums(wanted))
    perturb(model)
    assert torch.equal(reference.sums(wanted), begin)
    model.follow(1.0)
    near(reference.sums(wanted), score(model, wanted).sums.detach())
    assert not reference.tokens(wanted)[0].requires_grad


def test_the_gradient_s_leaves_are_put_back_where_they_were(model, examples):
    for objective in (TOKENWISE, KTO()):
        record = view(model, ReferenceLogps(model), objective, examples)
        moved = with_policy_logps(record, {name: one + 1 for name, one in policy_logps(record).items()})
        names = set(policy_logps(record))
        assert names == ({"policy"} if objective == KTO() else {*PAIR_FIELDS})
        for name, one in policy_logps(moved).items():
            assert torch.equal(one, policy_logps(record)[name] + 1)


def test_what_is_asked_for_twice_is_scored_once(model, examples, monkeypatch):
    """Six pairs of one prompt with four completions are one group of four, however often each completion is named."""
    four = [(20, 3), (21, 3), (22, 23, 3), (24, 3)]
    pairs = [(a, b) for i, a in enumerate(four) for b in four[i + 1 :]]
    ranked = [replace(examples[0], completions=pair) for pair in pairs] + [examples[1]]
    laid: list[list[Group]] = []
    forest = type(model).forest

    def watch(self, groups):
        laid.append(list(groups))
        return forest(self, groups)

    monkeypatch.setattr(type(model), "forest", watch)
    found = score(model, keys(ranked))
    assert [len(group.completions) for group in laid[0]] == [4, 2]
    alone = torch.stack([score(model, [key]).sums[0] for key in keys(ranked)])
    near(found.sums, alone.detach())
    assert found.lengths.tolist() == [len(completion) for _, completion in keys(ranked)]


def test_scores_at_a_temperature(model, examples):
    wanted = keys(examples)
    found = score(model, wanted, spread=Spread(entropy=True, collision=True), temperature=0.7)
    for n, (prompt, completion) in enumerate(wanted):
        logits = model.network(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        full = (logits / 0.7).log_softmax(-1).detach()
        near(found.tokens[n].detach(), full[torch.arange(len(completion)), torch.tensor(completion)])
        near(found.entropies[n], -(full.exp() * full).sum(-1))
        near(found.collisions[n], full.exp().square().sum(-1).log())
    near(found.sums.detach(), torch.stack([one.detach().sum() for one in found.tokens]))
    plain = score(model, wanted)
    assert plain.entropies is None
    assert (plain.sums - found.sums).abs().max() > 0.1


def test_demonstrations(model, examples, one_by_one):
    single = [replace(example, completions=example.completions[:1]) for example in examples]
    reference = ReferenceLogps(model)
    record = view(model, reference, SFT(), single)
    near(record.policy, one_by_one("policy", side(examples, 0)))
    assert record.reference is None
    assert record.policy_mismatched is None
    assert record.reference_mismatched is None
    assert reference.computed == 0


def test_the_policy_is_scored_from_any_role(model, examples):
    reference = ReferenceLogps(model)
    expected = view(model, reference, DPO(), examples).policy_chosen
    with model.role("reference"):
        assert torch.equal(view(model, reference, DPO(), examples).policy_chosen, expected)


def test_keys_are_the_completions_in_order(examples):
    assert keys(examples)[:3] == [((5, 6, 7), (20, 21, 3)), ((5, 6, 7), (30, 3)), ((12,), (40, 41, 42, 43, 3))]
    assert len(keys(examples)) == 8


def test_tokens_count_a_prompt_once(examples):
    assert tokens(examples[:2]) == (3 + 3 + 2) + (1 + 5 + 4)


def assert_same(parts, whole):
    for field in fields(whole):
        ours, expected = getattr(parts, field.name), getattr(whole, field.name)
        if isinstance(expected, TokenLogps):
            assert_same(ours, expected)
        else:
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", [DPO(), KTO(), TOKENWISE], ids=["pairs", "judgements", "tokens"])
def test_concatenated_batches_are_the_whole(model, examples, objective):
    reference = ReferenceLogps(model)
    whole = view(model, reference, objective, examples)
    batches = [[3, 1], [0, 2]]
    parts = concatenate([view(model, reference, objective, [examples[n] for n in batch]) for batch in batches], batches)
    assert type(parts) is type(whole)
    assert_same(parts, whole)


def test_what_is_absent_stays_absent(model, examples):
    record = view(model, ReferenceLogps(model), SFT(), examples)
    assert concatenate([record, record], [[0, 1, 2, 3], [4, 5, 6, 7]]).reference is None


class TestDrift:
    def test_it_is_the_mean_a_token_over_both_sides(self, model, examples):
        record = view(model, ReferenceLogps(model), DPO(), examples)
        still = replace(record, policy_chosen=record.reference_chosen, policy_rejected=record.reference_rejected)
        assert drift(still) == 0
        moved = torch.tensor([0.0, -5.0, 1.0, 0.0])
        tokens = (record.chosen_length.sum() + record.rejected_length.sum()).item()
        assert drift(replace(still, policy_chosen=record.reference_chosen + moved)) == pytest.approx(6 / tokens)
        assert drift(replace(still, policy_rejected=record.reference_rejected + moved)) == pytest.approx(6 / tokens)

    def test_judgements(self, model, examples):
        record = view(model, ReferenceLogps(model), KTO(), examples)
        moved = replace(record, policy=record.reference + torch.tensor([0.0, 0.0, -3.0, 0.0]))
        assert drift(moved) == pytest.approx(3 / record.length.sum().item())

    def test_without_a_reference_there_is_none(self, model, examples):
        assert drift(view(model, ReferenceLogps(model), SFT(), examples)) == 0
