"""A reference log-prob is computed once, is the reference's, and does not depend on its company."""

import pytest
import torch

from dpo.model import reference as module
from dpo.model.base import LanguageModel, load_base
from dpo.model.reference import ReferenceLogps

KEYS = [
    ((5, 6, 7), (20, 21, 3)),
    ((5, 6, 7), (30, 3)),
    ((12,), (40, 41, 42, 43, 3)),
    ((50, 51, 52, 53), (60, 3)),
    ((50, 51), (52, 53, 60, 3)),
]


def test_sums_are_the_references_in_the_order_of_the_keys(start, perturb, naive):
    model = start()
    perturb(model)
    sums = ReferenceLogps(model).sums([*KEYS, KEYS[0]])
    with model.reading("reference") as network:
        expected = torch.stack([naive(network, *key).sum() for key in [*KEYS, KEYS[0]]])
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-5)
    with model.reading("policy") as network:
        assert (naive(network, *KEYS[0]).sum() - sums[0]).abs() > 0.01
    assert not sums.requires_grad


def test_a_key_is_computed_once(start, monkeypatch):
    calls = []
    score = module.completion_logps
    monkeypatch.setattr(module, "completion_logps", lambda *args: calls.append(1) or score(*args))
    reference = ReferenceLogps(start())
    reference.prepare([*KEYS, *KEYS])
    assert reference.computed == len(KEYS)
    first = reference.sums(KEYS)
    assert torch.equal(reference.sums(KEYS[::-1]), first.flip(0))
    assert len(calls) == 1
    reference.sums([*KEYS, ((1,), (2,))])
    assert reference.computed == len(KEYS) + 1


def test_runs_on_one_base_share_what_is_known(tiny_config):
    base, known = load_base(tiny_config), {}
    model = LanguageModel.start(base, tiny_config, seed=0)
    first = ReferenceLogps(model, known).sums(KEYS)
    model.release()
    second = ReferenceLogps(LanguageModel.start(base, tiny_config, seed=1), known)
    assert torch.equal(second.sums(KEYS), first)
    assert second.computed == 0


def test_another_reference_shares_nothing(start, perturb, wide_model_folder, tmp_path):
    name, known = str(wide_model_folder), {}
    trained = start(name=name)
    perturb(trained)
    trained.save(tmp_path)
    starts = [{}, {"quantization": "nf4"}, {"lora": None}, {"adapter": str(tmp_path)}]
    for changes in starts:
        reference = ReferenceLogps(start(name=name, **changes), known)
        torch.testing.assert_close(reference.sums(KEYS), ReferenceLogps(start(name=name, **changes)).sums(KEYS))
        assert reference.computed == len(KEYS)


def test_it_outlives_training(start, perturb):
    model = start()
    reference = ReferenceLogps(model)
    before = reference.sums(KEYS[:2])
    perturb(model)
    assert torch.equal(reference.sums(KEYS[:2]), before)
    torch.testing.assert_close(ReferenceLogps(model).sums(KEYS[:2]), before)


@pytest.mark.parametrize("budget", [1, 12, 4096])
def test_batching_changes_nothing(start, monkeypatch, budget):
    model = start()
    expected = torch.cat([ReferenceLogps(model).sums([key]) for key in KEYS])
    monkeypatch.setattr(module, "TOKEN_BUDGET", budget)
    torch.testing.assert_close(ReferenceLogps(model).sums(KEYS[::-1]).flip(0), expected, rtol=0, atol=1e-5)


def test_a_batch_stays_within_the_budget(start, monkeypatch):
    monkeypatch.setattr(module, "TOKEN_BUDGET", 14)
    shapes = []
    score = module.completion_logps
    monkeypatch.setattr(
        module, "completion_logps", lambda n, forest: shapes.append(forest.input_ids.shape) or score(n, forest)
    )
    ReferenceLogps(start()).prepare(KEYS)
    assert sum(rows for rows, _ in shapes) == len(KEYS)
    assert max(rows * time for rows, time in shapes) <= 14
    assert len(shapes) < len(KEYS)


def test_the_model_keeps_its_role_and_mode(start, perturb):
    model = start(lora={"dropout": 0.3})
    perturb(model)
    model.training()
    first = ReferenceLogps(model).sums(KEYS)
    assert model.network.training
    assert torch.equal(ReferenceLogps(model).sums(KEYS), first)  # no dropout in the reference
    model.training(False)
    policy = model.network(input_ids=torch.tensor([[5, 6, 7]])).logits
    ReferenceLogps(model).prepare(KEYS)
    assert not model.network.training
    assert torch.equal(model.network(input_ids=torch.tensor([[5, 6, 7]])).logits, policy)
