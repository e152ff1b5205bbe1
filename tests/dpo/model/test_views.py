"""Each view puts the right number in the right column."""

from dataclasses import fields, replace

import pytest
import torch

from dpo.losses.dpo import DPO
from dpo.losses.kto import KTO
from dpo.losses.sft import SFT
from dpo.model.reference import ReferenceLogps
from dpo.model.views import concatenate, keys, largest_drift, tokens, view


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


def test_pairs(model, examples, one_by_one):
    record = view(model, ReferenceLogps(model), DPO(), examples)
    chosen, rejected = ([(example.prompt, example.completions[side]) for example in examples] for side in (0, 1))
    near(record.policy_chosen, one_by_one("policy", chosen))
    near(record.policy_rejected, one_by_one("policy", rejected))
    near(record.reference_chosen, one_by_one("reference", chosen))
    near(record.reference_rejected, one_by_one("reference", rejected))
    assert record.chosen_length.tolist() == [3, 5, 2, 7]
    assert record.rejected_length.tolist() == [2, 4, 6, 2]
    near(record.preference, torch.tensor([1.0, 0.9, 0.8, 0.7]))
    near(record.weight, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert record.policy_chosen.requires_grad
    assert record.policy_rejected.requires_grad
    assert not record.reference_chosen.requires_grad


def test_judgements(model, examples, one_by_one):
    record = view(model, ReferenceLogps(model), KTO(), examples)
    own, other = ([(example.prompt, example.completions[side]) for example in examples] for side in (0, 1))
    near(record.policy, one_by_one("policy", own))
    near(record.reference, one_by_one("reference", own))
    near(record.policy_mismatched, one_by_one("policy", other))
    near(record.reference_mismatched, one_by_one("reference", other))
    assert record.desirable.tolist() == [True, False, True, False]
    assert record.length.tolist() == [3, 5, 2, 7]
    near(record.weight, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert record.policy.requires_grad
    assert not record.policy_mismatched.requires_grad


def test_demonstrations(model, examples, one_by_one):
    single = [replace(example, completions=example.completions[:1]) for example in examples]
    reference = ReferenceLogps(model)
    record = view(model, reference, SFT(), single)
    near(record.policy, one_by_one("policy", [(example.prompt, example.completions[0]) for example in single]))
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
    parts = concatenate([view(model, reference, objective, examples[i : i + 3]) for i in (0, 3)])
    assert type(parts) is type(whole)
    for field in fields(whole):
        torch.testing.assert_close(getattr(parts, field.name), getattr(whole, field.name), rtol=0, atol=1e-5)


def test_what_is_absent_stays_absent(model, examples):
    record = view(model, ReferenceLogps(model), SFT(), examples)
    assert concatenate([record, record]).reference is None


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
