"""Each view puts the right number in the right column."""

from dataclasses import fields, replace

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.kto import KTO
from dpo.losses.sft import SFT
from dpo.model.forest import Group
from dpo.model.reference import ReferenceLogps
from dpo.model.views import concatenate, keys, largest_drift, mismatched, score, tokens, view


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
    found = mismatched(model, ReferenceLogps(model), KTO(), examples, [[2, 0], [3, 1]])
    near(found["policy_mismatched"], one_by_one("policy", other))
    near(found["reference_mismatched"], one_by_one("reference", other))
    assert not found["policy_mismatched"].requires_grad
    assert mismatched(model, ReferenceLogps(model), DPO(), examples, [[0, 1, 2, 3]]) == {}


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


@pytest.mark.parametrize("objective", [DPO(), KTO()], ids=["pairs", "judgements"])
def test_concatenated_batches_are_the_whole(model, examples, objective):
    reference = ReferenceLogps(model)
    whole = view(model, reference, objective, examples)
    batches = [[3, 1], [0, 2]]
    parts = concatenate([view(model, reference, objective, [examples[n] for n in batch]) for batch in batches], batches)
    assert type(parts) is type(whole)
    for field in fields(whole):
        torch.testing.assert_close(getattr(parts, field.name), getattr(whole, field.name), rtol=0, atol=1e-5)


def test_what_is_absent_stays_absent(model, examples):
    record = view(model, ReferenceLogps(model), SFT(), examples)
    assert concatenate([record, record], [[0, 1, 2, 3], [4, 5, 6, 7]]).reference is None


class TestDrift:
    def test_it_is_the_largest_a_token_on_either_side(self, model, examples):
        record = view(model, ReferenceLogps(model), DPO(), examples)
        still = replace(record, policy_chosen=record.reference_chosen, policy_rejected=record.reference_rejected)
        assert largest_drift(still) == 0
        moved = torch.tensor([0.0, -5.0, 1.0, 0.0])
        assert largest_drift(replace(still, policy_chosen=record.reference_chosen + moved)) == pytest.approx(5 / 5)
        assert largest_drift(replace(still, policy_rejected=record.reference_rejected + moved)) == pytest.approx(5 / 4)

    def test_judgements(self, model, examples):
        record = view(model, ReferenceLogps(model), KTO(), examples)
        moved = replace(record, policy=record.reference + torch.tensor([0.0, 0.0, -3.0, 0.0]))
        assert largest_drift(moved) == pytest.approx(3 / 2)

    def test_without_a_reference_there_is_none(self, model, examples):
        assert largest_drift(view(model, ReferenceLogps(model), SFT(), examples)) == 0
