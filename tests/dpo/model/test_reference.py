"""A reference log-prob is the reference's, is computed once for everyone who needs it, and for nobody else."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dpo.cache import cache_folder
from dpo.errors import ModelError
from dpo.losses.dpo import DPO
from dpo.losses.ipo import IPO
from dpo.losses.kto import KTO
from dpo.model import reference as module
from dpo.model.base import LanguageModel, ModelConfig, load_base
from dpo.model.reference import ReferenceLogps, identity
from dpo.model.store import Store
from dpo.model.views import keys, view

KEYS = [
    ((5, 6, 7), (20, 21, 3)),
    ((5, 6, 7), (30, 3)),
    ((12,), (40, 41, 42, 43, 3)),
    ((50, 51, 52, 53), (60, 3)),
    ((50, 51), (52, 53, 60, 3)),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own."""
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("references/*/*.safetensors"))


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of every batch that is scored."""
    seen: list[torch.Size] = []
    score = module.completion_logps
    monkeypatch.setattr(
        module, "completion_logps", lambda n, forest: seen.append(forest.input_ids.shape) or score(n, forest)
    )
    return seen


# --- what it returns ---


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_values_are_the_references_in_the_order_of_the_keys(start, perturb, naive, layout):
    model = start(layout=layout)
    perturb(model)
    reference, asked = ReferenceLogps(model), [*KEYS[::-1], KEYS[0]]
    sums, tokens = reference.sums(asked), reference.tokens(asked)
    with model.reading("reference") as network:
        expected = [naive(network, *key) for key in asked]
    torch.testing.assert_close(sums, torch.stack([one.sum() for one in expected]), rtol=0, atol=1e-5)
    for got, wanted in zip(tokens, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    with model.reading("policy") as network:
        assert (naive(network, *KEYS[0]).sum() - sums[-1]).abs() > 0.01
    assert not sums.requires_grad
    assert reference.computed == len(KEYS)


def test_it_outlives_training(start, perturb):
    model = start()
    reference = ReferenceLogps(model)
    before = reference.sums(KEYS[:2])
    perturb(model)
    assert torch.equal(reference.sums(KEYS[:2]), before)


def test_the_model_keeps_its_role_and_mode(start, perturb):
    model = start(lora={"dropout": 0.3})
    perturb(model)
    model.training()
    first = ReferenceLogps(model).sums(KEYS)
    assert model.network.training
    assert torch.equal(ReferenceLogps(model, cache_folder() / "other").sums(KEYS), first)  # no dropout in the reference
    model.training(False)
    policy = model.network(input_ids=torch.tensor([[5, 6, 7]])).logits
    ReferenceLogps(model, cache_folder() / "third").prepare(KEYS)
    assert not model.network.training
    assert torch.equal(model.network(input_ids=torch.tensor([[5, 6, 7]])).logits, policy)


# --- batches ---


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("budget", [1, 12, 4096])
def test_batching_changes_nothing(start, monkeypatch, tmp_path, budget, layout):
    model = start(layout=layout)
    alone = ReferenceLogps(model, tmp_path / "alone")
    expected = torch.cat([alone.sums([key]) for key in KEYS])
    monkeypatch.setattr(module, "TOKEN_BUDGET", budget)
    together = ReferenceLogps(model, tmp_path / "together")
    torch.testing.assert_close(together.sums(KEYS[::-1]).flip(0), expected, rtol=0, atol=1e-5)
    assert together.computed == alone.computed == len(KEYS)


@pytest.mark.parametrize(("layout", "batches"), [("padded", 3), ("packed", 2)])
def test_a_batch_stays_within_the_budget(start, monkeypatch, shapes, layout, batches):
    monkeypatch.setattr(module, "TOKEN_BUDGET", 16)
    model = start(layout=layout)
    ReferenceLogps(model).prepare(KEYS)
    assert max(rows * time for rows, time in shapes) <= 16
    assert len(shapes) == batches
    if layout == "packed":  # prompt once for both completions: 8 of 26 positions instead of 11 of 29
        assert sum(rows * time for rows, time in shapes) == 26


def test_a_prompt_with_more_completions_than_the_budget_holds(start, monkeypatch, shapes):
    monkeypatch.setattr(module, "TOKEN_BUDGET", 16)
    many = [((5, 6, 7), (20 + n, 3)) for n in range(20)]
    reference = ReferenceLogps(start(layout="packed"))
    reference.prepare(many)
    assert reference.computed == 20
    assert [rows * time for rows, time in shapes] == [15, 15, 15, 7]


# --- once for everyone ---


def test_a_key_is_computed_once(start, shapes):
    reference = ReferenceLogps(start())
    reference.prepare([*KEYS, *KEYS])
    assert reference.computed == len(KEYS)
    first = reference.sums(KEYS)
    assert torch.equal(reference.sums(KEYS[::-1]), first.flip(0))
    assert len(shapes) == 1
    reference.sums([*KEYS, ((1,), (2,))])
    assert reference.computed == len(KEYS) + 1


def test_dpo_then_ipo_then_kto_compute_each_completion_once(start, perturb, examples, tiny_config):
    """Each in a process of its own, as far as the cache can tell: base, policy and reference are made anew."""
    computed, known = [], []
    for seed, objective in enumerate([DPO(beta=0.1), IPO(tau=0.5), KTO(), DPO(beta=0.5)]):
        model = start(seed=seed)
        perturb(model)
        reference = ReferenceLogps(model)
        reference.prepare(keys(examples))
        view(model, reference, objective, examples)
        computed.append(reference.computed)
        known.append(reference.sums(keys(examples)))
    assert computed == [2 * len(examples), 0, 0, 0]
    assert all(torch.equal(one, known[0]) for one in known)


def test_runs_on_one_base_share_even_without_a_disk(tiny_config, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "file"))
    base, sums = load_base(tiny_config), []
    for seed, computed in enumerate([len(KEYS), 0]):
        model = LanguageModel.start(base, tiny_config, seed)
        reference = ReferenceLogps(model)
        sums.append(reference.sums(KEYS))
        assert reference.computed == computed
        model.release()
    assert torch.equal(*sums)
    assert [record.getMessage().count("kept in memory") for record in caplog.records] == [1]


def test_an_interruption_keeps_what_is_written(start, monkeypatch, cache):
    monkeypatch.setattr(module, "SHARD", 2)
    monkeypatch.setattr(module, "TOKEN_BUDGET", 1)
    score, calls = module.completion_logps, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*args)

    with monkeypatch.context() as broken:
        broken.setattr(module, "completion_logps", breaks)
        with pytest.raises(KeyboardInterrupt):
            ReferenceLogps(start()).prepare(KEYS)
    assert len(shards(cache)) == 1
    reference = ReferenceLogps(start())
    reference.prepare(KEYS)
    assert reference.computed == len(KEYS) - 2
    assert len(shards(cache)) == 3


def test_nothing_is_opened_before_it_is_needed(start, cache, monkeypatch):
    monkeypatch.setattr(module, "_weights", lambda *_: pytest.fail("the weights were read"))
    ReferenceLogps(start())
    assert not cache.exists()


def test_it_says_what_is_known(start, caplog):
    caplog.set_level(logging.INFO, logger="dpo")
    reference = ReferenceLogps(start())
    reference.prepare(KEYS[:2])
    reference.prepare(KEYS, progress=True)
    assert "reference log-probs: 2 known, 3 to compute" in caplog.text


# --- and for nobody else ---


def test_other_tokens_are_other_completions(start):
    model = start()
    ReferenceLogps(model).prepare(KEYS)
    (prompt, completion) = KEYS[0]
    others = [
        (prompt, (*completion[:-1], 4)),
        ((*prompt[:-1], 8), completion),
        ((*prompt, completion[0]), completion[1:]),  # the same tokens, divided elsewhere
        (prompt, completion[:-1]),
    ]
    reference = ReferenceLogps(model)
    reference.prepare(others)
    assert reference.computed == len(others)


def test_another_reference_shares_nothing(start, perturb, wide_model_folder, tmp_path, naive):
    name = str(wide_model_folder)
    folders = {}
    for seed in (1, 2):
        trained = start(name=name, seed=seed)
        perturb(trained)
        folders[seed] = tmp_path / f"adapter-{seed}"
        folders[seed].mkdir()
        trained.save(folders[seed])
    starts = [{}, {"quantization": "nf4"}, {"dtype": "bfloat16"}, *({"adapter": str(one)} for one in folders.values())]
    for changes in starts:
        model = start(name=name, **changes)
        reference = ReferenceLogps(model)
        sums = reference.sums(KEYS)
        assert reference.computed == len(KEYS), changes
        with model.reading("reference") as network:
            expected = torch.stack([naive(network, *key).sum() for key in KEYS])
        torch.testing.assert_close(sums, expected.float(), rtol=0, atol=0.2 if "dtype" in changes else 1e-4)


def test_one_flipped_bit_of_the_weights_is_another_model(start, tiny_model_folder, tmp_path):
    ReferenceLogps(start()).prepare(KEYS)
    folder = tmp_path / "flipped"
    shutil.copytree(tiny_model_folder, folder)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    reference = ReferenceLogps(start(name=str(folder)))
    reference.prepare(KEYS)
    assert reference.computed == len(KEYS)


def test_the_scales_of_4_bit_weights_count(start, wide_model_folder, tmp_path):
    """Twice the weight has the same 4-bit codes."""
    folder = tmp_path / "doubled"
    shutil.copytree(wide_model_folder, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    first, doubled = (start(name=str(one), quantization="nf4") for one in (wide_model_folder, folder))
    codes = [model.network.model.layers[0].mlp.up_proj.get_base_layer().weight for model in (first, doubled)]
    assert torch.equal(*(one.detach().as_subclass(torch.Tensor) for one in codes))
    assert identity(first) != identity(doubled)


@pytest.mark.parametrize("setting", [("rms_norm_eps", 1e-3), ("hidden_act", "gelu")], ids=lambda one: one[0])
def test_the_same_weights_in_another_architecture_are_another_model(start, tiny_model_folder, tmp_path, setting):
    network = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    setattr(network.config, *setting)
    shutil.copytree(tiny_model_folder, tmp_path / "changed")
    network.config.save_pretrained(tmp_path / "changed")
    assert identity(start(name=str(tmp_path / "changed"))) != identity(start())


@pytest.mark.parametrize("lora", [{"r": 4}, {"alpha": 8}, {"rank_stabilised": True}, {"dora": True}], ids=str)
def test_a_starting_adapter_counts_with_its_settings(start, perturb, tmp_path, lora):
    """The same tensors under another scale are another reference."""
    found = set()
    for number, changes in enumerate([{}, lora]):
        trained = start(lora=changes)
        perturb(trained)
        (tmp_path / str(number)).mkdir()
        trained.save(tmp_path / str(number))
        found.add(identity(start(adapter=str(tmp_path / str(number)))))
    assert len(found | {identity(start())}) == 3


def test_the_version_of_the_values_counts(start, monkeypatch):
    ReferenceLogps(start()).prepare(KEYS)
    monkeypatch.setattr(module, "VERSION", 2)
    reference = ReferenceLogps(start())
    reference.prepare(KEYS)
    assert reference.computed == len(KEYS)


# --- what does not matter ---


@pytest.mark.parametrize("changes", [{}, {"quantization": "nf4"}, {"lora": {"dora": True}}], ids=["", "nf4", "dora"])
def test_injecting_and_training_leave_the_weights_as_they_are(start, perturb, wide_model_folder, tiny_config, changes):
    """The bare network's digest, computed anew each time."""
    name = str(wide_model_folder)
    config = ModelConfig.model_validate({**tiny_config.model_dump(), **changes, "name": name})
    digests = [module._sha256("", module._weights(load_base(config).network))]
    model = start(name=name, gradient_checkpointing=True, **changes)
    digests.append(module._sha256("", module._weights(model.network)))
    model.training()
    model.network(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    model.training(False)
    model.network(input_ids=torch.tensor([[5, 6, 7]]))
    perturb(model)
    digests.append(module._sha256("", module._weights(model.network)))
    digests.append(module._sha256("", module._weights(model.release().network)))
    assert len(set(digests)) == 1
    with torch.no_grad():
        model.network.model.norm.weight[0] += 1
    assert module._sha256("", module._weights(model.network)) != digests[0]


def test_neither_path_nor_seed_nor_policy_nor_layout_matters(start, perturb, tiny_model_folder, tmp_path):
    expected = identity(start())
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny_model_folder, elsewhere)
    changes = [{"name": str(elsewhere)}, {"seed": 1}, {"lora": {"r": 4, "dropout": 0.1}}, {"lora": None}]
    changes += [{"layout": "padded"}, {"attn_implementation": "eager"}, {"gradient_checkpointing": True}]
    for change in changes:
        model = start(**change)
        perturb(model)
        assert identity(model) == expected, change
    trained = start()
    perturb(trained)
    found = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        trained.save(tmp_path / place)
        found.add(identity(start(adapter=str(tmp_path / place))))
        assert identity(start(adapter=str(tmp_path / place), reference="base")) == expected
    assert len(found) == 1


def test_full_weights_are_held_against_their_start(start, perturb, naive):
    model = start(lora=None)
    reference = ReferenceLogps(model)
    perturb(model)
    late = identity(model)
    perturb(model)
    assert identity(model) == late == identity(start())
    with model.reading("reference") as network:
        expected = torch.stack([naive(network, *key).sum() for key in KEYS])
    torch.testing.assert_close(reference.sums(KEYS), expected, rtol=0, atol=1e-5)


def test_the_weights_are_read_once(start, monkeypatch, tiny_config):
    reads, settings = [], module._settings
    monkeypatch.setattr(module, "_settings", lambda network: reads.append(1) or settings(network))
    base = load_base(tiny_config)
    for seed in range(3):
        model = LanguageModel.start(base, tiny_config, seed)
        ReferenceLogps(model).sums(KEYS)
        model.release()
    assert len(reads) == 1


# --- what is kept ---


def test_values_that_are_not_finite_are_refused_and_not_kept(start, cache):
    model = start()
    with torch.no_grad():
        model.network.get_input_embeddings().weight[42] = float("nan")
    text = model.tokenizer.decode(list(KEYS[2][1]))
    with pytest.raises(ModelError, match=r"got nan for a token of the completion .* expected finite") as caught:
        ReferenceLogps(model).prepare(KEYS)
    assert repr(text) in str(caught.value)
    assert "a wider model.dtype" in str(caught.value)
    assert not shards(cache)
    sound = ReferenceLogps(model)
    sound.prepare([key for key in KEYS if 42 not in key[1]])
    assert sound.computed == len(KEYS) - 1


def test_it_lies_where_the_model_says_as_float32(start, cache):
    model = start(dtype="bfloat16")
    reference = ReferenceLogps(model)
    expected = reference.tokens(KEYS)
    (shard,) = shards(cache)
    assert shard.parent == cache / "references" / identity(model)[:16]
    held = load_file(shard)
    assert {name: tensor.dtype for name, tensor in held.items()} == {
        "addresses": torch.uint8,
        "offsets": torch.int64,
        "values": torch.float32,
    }
    assert held["addresses"].shape == (len(KEYS), 32)
    assert held["values"].numel() == sum(len(completion) for _, completion in KEYS)
    assert sorted(held["values"].tolist()) == sorted(torch.cat(expected).tolist())


def test_damage_is_said_and_computed_again(start, cache, caplog):
    expected = ReferenceLogps(start()).sums(KEYS)
    (shard,) = shards(cache)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    reference = ReferenceLogps(start())
    torch.testing.assert_close(reference.sums(KEYS), expected, rtol=0, atol=1e-5)
    assert reference.computed == len(KEYS)
    assert str(shard) in caplog.text
    third = ReferenceLogps(start())
    assert torch.equal(third.sums(KEYS), reference.sums(KEYS))
    assert third.computed == 0


def test_what_another_process_wrote_meanwhile_is_found(start):
    mine, other = ReferenceLogps(start()), ReferenceLogps(start())
    mine.prepare(KEYS[:1])
    expected = other.sums(KEYS)
    assert other.computed == len(KEYS) - 1
    assert torch.equal(mine.sums(KEYS), expected)
    assert mine.computed == 1


def test_values_are_mapped(start):
    model = start()
    ReferenceLogps(model).prepare(KEYS)
    store = Store(cache_folder() / "references" / identity(model)[:16], identity(model))
    assert all(isinstance(one, np.memmap) for one in store.read([module._address(key) for key in KEYS]))
