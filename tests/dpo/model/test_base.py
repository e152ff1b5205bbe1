"""Loading says what is wrong; the roles on one base never leak into one another."""

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dpo.errors import ModelError
from dpo.model.base import LanguageModel, ModelConfig, check_adapter, choose_device, choose_dtype, load_base
from dpo.model.forest import Forest, Group
from dpo.model.logprobs import completion_logps

IDS = torch.tensor([[5, 6, 7, 20, 21, 3], [50, 51, 52, 60, 61, 3]])
FOREST = Forest.padded([Group((5, 6, 7), ((20, 21, 3), (30, 3))), Group((12,), ((40, 41, 42, 3),))], 0)


def logits(model: LanguageModel, role: str) -> torch.Tensor:
    with model.reading(role) as network:
        return network(input_ids=IDS).logits


def weights(model: LanguageModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(some: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(some, other, strict=True))


def comes_back(model: LanguageModel, perturb: Callable[[LanguageModel], None], folder: Path) -> None:
    """What was saved is restored, whatever became of the weights since."""
    perturb(model)
    before = weights(model)
    model.save(folder)
    perturb(model)
    assert not equal(weights(model), before)
    model.restore(folder)
    assert equal(weights(model), before)


@contextmanager
def rewriting(adapter: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The adapter's saved weights by name, written back as they are left."""
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    yield state
    save_file(state, file)


@pytest.fixture(scope="module")
def tiny_gpt2(tiny_model_folder, tmp_path_factory) -> Path:
    """A head tied to the embeddings, a bias everywhere, and dropout of 0.1 at three places."""
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copytree(tiny_model_folder, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=313, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, eos_token_id=3
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(start, perturb, tmp_path) -> Path:
    """A trained adapter of the tiny model."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    model = start()
    perturb(model)
    model.save(folder)
    return folder


class TestDevice:
    def test_an_absent_device_is_refused(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ModelError, match=r"model.device: got 'cuda'.*Use model.device=auto"):
            choose_device("cuda")
        assert choose_device("cpu") == torch.device("cpu")

    @pytest.mark.parametrize(
        ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
    )
    def test_a_t4_computes_in_float16_although_it_claims_bfloat16(self, monkeypatch, capability, dtype):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        assert choose_dtype("auto", torch.device("cuda")) == dtype

    @pytest.mark.parametrize(
        ("capabilities", "dtype"),
        [
            ({"amx_bf16": True}, torch.bfloat16),
            ({"avx512_bf16": True}, torch.bfloat16),
            ({"avx2": True, "amx_bf16": False}, torch.float32),
        ],
    )
    def test_a_processor_uses_bfloat16_where_it_has_instructions_for_it(self, monkeypatch, capabilities, dtype):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert choose_dtype("auto", torch.device("cpu")) == dtype

    def test_a_named_dtype_is_taken(self):
        assert choose_dtype("float16", torch.device("cpu")) == torch.float16


class TestConfig:
    @pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq", "eva"])
    def test_inits_that_rewrite_the_base_cannot_be_asked_for(self, init):
        with pytest.raises(ValidationError, match="'default', 'gaussian' or 'orthogonal'"):
            ModelConfig.model_validate({"lora": {"init": init}})

    @pytest.mark.parametrize("change", [{"adapter": "x"}, {"quantization": "nf4"}])
    def test_full_weights_exclude_adapters_and_four_bits(self, change):
        with pytest.raises(ValidationError, match=r"needs model\.lora"):
            ModelConfig.model_validate({"lora": None, **change})


class TestLoad:
    def test_an_absent_folder(self, tmp_path):
        with pytest.raises(ModelError, match=r"model.name='.*/none'.*Expected a local folder"):
            load_base(ModelConfig(name=str(tmp_path / "none"), device="cpu"))

    def test_damaged_weights(self, tiny_model_folder, tmp_path):
        shutil.copytree(tiny_model_folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
        with pytest.raises(ModelError, match="could not load it"):
            load_base(ModelConfig(name=str(tmp_path), device="cpu"))

    def test_an_attention_kernel_that_is_not_installed(self, tiny_config):
        with pytest.raises(ModelError, match="could not load it"):
            load_base(tiny_config.model_copy(update={"attn_implementation": "flash_attention_2"}))

    def test_a_head_it_does_not_know(self, tiny_config, monkeypatch):
        forward = LlamaForCausalLM.forward

        def doubled(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = out.logits * 2
            return out

        monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
        with pytest.raises(ModelError, match="transforms its logits"):
            load_base(tiny_config)

    def test_the_base_is_frozen_and_as_asked(self, tiny_config):
        base = load_base(tiny_config)
        assert not base.network.training
        assert not any(parameter.requires_grad for parameter in base.network.parameters())
        assert {parameter.dtype for parameter in base.network.parameters()} == {torch.float32}

    def test_dropout_of_the_base_is_off(self, tiny_gpt2):
        network = load_base(ModelConfig(name=str(tiny_gpt2), dtype="float32", device="cpu")).network.train()
        assert torch.equal(network(input_ids=IDS).logits, network(input_ids=IDS).logits)

    def test_a_tokenizer_without_padding_gets_one(self, tiny_model_folder, make_tokenizer, tmp_path):
        shutil.copytree(tiny_model_folder, tmp_path, dirs_exist_ok=True)
        make_tokenizer().save_pretrained(tmp_path)
        tokenizer = load_base(ModelConfig(name=str(tmp_path), dtype="float32", device="cpu")).tokenizer
        assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


class TestRoles:
    def test_adapters_off_is_the_bare_base_bit_for_bit(self, tiny_config, perturb):
        base = load_base(tiny_config)
        with torch.no_grad():
            bare = base.network(input_ids=IDS).logits
        model = LanguageModel.start(base, tiny_config, seed=0)
        perturb(model)
        assert torch.equal(logits(model, "reference"), bare)
        assert (logits(model, "policy") - bare).abs().max() > 0.01
        assert "adapters off" in model.reference_is

    def test_a_role_lasts_as_long_as_its_context(self, start, perturb):
        model = start()
        perturb(model)
        policy = logits(model, "policy")
        with model.role("reference"), model.role("policy") as network:
            assert torch.equal(network(input_ids=IDS).logits, policy)
        with pytest.raises(KeyError), model.role("reference"):
            raise KeyError
        assert torch.equal(model.network(input_ids=IDS).logits, policy)

    def test_switching_leaves_requires_grad_and_gradients(self, start, adapter):
        for model in (start(), start(adapter=str(adapter))):
            trained = [(name, p.requires_grad) for name, p in model.network.named_parameters()]
            assert all(on == (".policy." in name) for name, on in trained)
            completion_logps(model.network, FOREST).sums.sum().backward()
            for role in ("reference", "policy", "reference"):
                with model.role(role):
                    assert [(name, p.requires_grad) for name, p in model.network.named_parameters()] == trained
            assert all(parameter.grad is not None for parameter in model.parameters())

    def test_reading_takes_no_gradient_and_no_dropout_and_gives_the_mode_back(self, start, perturb):
        model = start(lora={"dropout": 0.5})
        perturb(model)
        model.training()
        assert not torch.equal(model.network(input_ids=IDS).logits, model.network(input_ids=IDS).logits)
        with model.reading("policy") as network:
            assert not network(input_ids=IDS).logits.requires_grad
            assert torch.equal(network(input_ids=IDS).logits, network(input_ids=IDS).logits)
        assert model.network.training
        model.training(False)
        logits(model, "reference")
        assert not model.network.training

    def test_offloading_copies_activations_and_no_weights(self, start, perturb, monkeypatch):
        model = start(activation_offload=True)
        copied = []
        empty_like = torch.empty_like
        monkeypatch.setattr(torch, "empty_like", lambda one, **more: copied.append(one) or empty_like(one, **more))
        layer = model.network.model.layers[0].mlp.down_proj.get_base_layer()
        x = torch.randn(2, layer.in_features, requires_grad=True)
        with model.keeping():
            y = (layer(x) * x.sum()).square().sum()
        assert (2, layer.out_features) in {tuple(one.shape) for one in copied}
        storage = layer.weight.untyped_storage().data_ptr()
        assert storage not in {one.untyped_storage().data_ptr() for one in copied}
        x.data.zero_()  # what the backward pass reads is the copy
        y.backward()
        assert x.grad.abs().sum() > 0

    def test_gradient_checkpointing_changes_no_gradient(self, start, perturb, monkeypatch):
        found = []
        for on in (False, True):
            model = start(gradient_checkpointing=on)
            perturb(model)
            model.training()
            ran = []
            model.network.model.layers[0].mlp.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
            found.append(torch.autograd.grad(completion_logps(model.network, FOREST).sums.sum(), model.parameters()))
            assert len(ran) == (2 if on else 1)  # once more in the backward pass
        assert equal(*found)


class TestHalfPrecision:
    """Adapters of a half-precision base compute in half precision, from float32 weights."""

    @pytest.fixture
    def found(self, start, perturb):
        """Gradients and kept bytes of one pass, by dtype."""

        def measured(**changes):
            model = start(**changes)
            perturb(model)
            model.training()
            kept = {}

            def pack(tensor):
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), model.role("policy") as network:
                scored = completion_logps(network, FOREST).sums.sum()
            gradient = torch.autograd.grad(scored, model.parameters())
            assert all(one.dtype == torch.float32 for one in (*gradient, *model.parameters()))
            return torch.cat([one.flatten() for one in gradient]), sum(kept.values())

        return measured

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_gradients_are_those_of_float32_up_to_rounding_and_half_as_much_is_kept(self, found, dtype, monkeypatch):
        exact, _ = found(dtype="float32")
        ours, lean = found(dtype=dtype)
        assert (ours - exact).norm() / exact.norm() < 0.02
        monkeypatch.setattr("dpo.model.base._mix_precision", lambda *_: False)  # as PEFT does it by itself
        cast, copied = found(dtype=dtype)
        assert (cast - exact).norm() / exact.norm() < 0.02
        assert lean < 0.75 * copied

    def test_full_weights_in_float16_are_refused(self, tiny_config):
        config = tiny_config.model_copy(update={"dtype": "float16", "lora": None})
        with pytest.raises(ModelError, match=r"model\.lora=null in float16: .* Use model\.dtype=float32"):
            load_base(config)

    def test_dora_is_left_in_float32(self, start):
        model = start(dtype="bfloat16", lora={"dora": True})
        with model.role("policy"):
            assert not torch.is_autocast_enabled("cpu")


class TestInits:
    @pytest.mark.parametrize(
        ("lora", "drift"),
        [
            ({}, 0),
            ({"init": "gaussian"}, 0),
            ({"init": "orthogonal"}, 1e-5),  # B A is zero up to rounding only
            ({"dora": True}, 0),
            ({"rank_stabilised": True}, 0),
            ({"r": 4, "alpha": 64, "target_modules": ("q_proj", "v_proj")}, 0),
        ],
    )
    def test_the_policy_starts_as_the_reference(self, start, lora, drift):
        model = start(lora=lora)
        assert model.starts_at_reference
        assert (logits(model, "policy") - logits(model, "reference")).abs().max() <= drift

    def test_each_setting_reaches_the_adapter(self, start):
        config = {"r": 4, "alpha": 8, "dropout": 0.25, "target_modules": ("q_proj",), "rank_stabilised": True}
        layer = start(lora=config).network.model.layers[0].self_attn.q_proj
        assert layer.lora_A["policy"].weight.shape == (4, 32)
        assert layer.scaling["policy"] == pytest.approx(8 / math.sqrt(4))
        assert layer.lora_dropout["policy"].p == 0.25
        assert not hasattr(start(lora=config).network.model.layers[0].self_attn.k_proj, "lora_A")
        assert start(lora={"dora": True}).network.model.layers[0].self_attn.q_proj.use_dora["policy"]

    def test_the_seed_draws_the_adapter(self, start):
        assert equal(weights(start(seed=3)), weights(start(seed=3)))
        assert not equal(weights(start(seed=3)), weights(start(seed=4)))

    def test_a_layer_that_is_not_there(self, start):
        with pytest.raises(ModelError, match=r"model.lora: .* cannot carry this adapter \(.*c_attn"):
            start(lora={"target_modules": ("c_attn",)})

    def test_a_torchao_that_peft_refuses(self, start, monkeypatch):
        def refuses(*_, **__):
            raise ImportError("Found an incompatible version of torchao")

        monkeypatch.setattr(peft, "get_peft_model", refuses)
        with pytest.raises(ModelError, match=r"incompatible version of torchao\. Run `pip uninstall -y torchao`"):
            start()


class TestNF4:
    @pytest.fixture
    def model(self, start, wide_model_folder) -> LanguageModel:
        return start(name=str(wide_model_folder), quantization="nf4")

    def test_the_base_is_quantised_and_starts_at_its_reference(self, model, start, wide_model_folder):
        assert type(model.network.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
        assert torch.equal(logits(model, "policy"), logits(model, "reference"))
        assert not torch.allclose(
            logits(model, "reference"), logits(start(name=str(wide_model_folder)), "reference"), atol=1e-3
        )

    def test_gradients_reach_every_adapter(self, model, perturb):
        perturb(model)
        gradients = torch.autograd.grad(completion_logps(model.network, FOREST).sums.sum(), model.parameters())
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


class TestStartingAdapter:
    def test_the_reference_is_a_frozen_copy_of_it(self, start, perturb, adapter):
        model = start(adapter=str(adapter))
        begin = logits(model, "policy")
        assert torch.equal(logits(model, "reference"), begin)
        assert (begin - logits(start(), "policy")).abs().max() > 0.01
        perturb(model)
        assert torch.equal(logits(model, "reference"), begin)
        assert (logits(model, "policy") - begin).abs().max() > 0.01
        assert model.starts_at_reference
        assert "frozen" in model.reference_is

    def test_the_reference_may_be_the_base(self, start, adapter):
        model, bare = start(adapter=str(adapter), reference="base"), start()
        assert torch.equal(logits(model, "reference"), logits(bare, "reference"))
        assert torch.equal(logits(model, "policy"), logits(start(adapter=str(adapter)), "policy"))
        assert not model.starts_at_reference
        assert "WITHOUT" in model.reference_is

    def test_it_is_saved_as_the_policy_alone(self, start, perturb, adapter, tmp_path):
        model = start(adapter=str(adapter))
        perturb(model)
        model.save(tmp_path)
        assert torch.equal(logits(start(adapter=str(tmp_path)), "policy"), logits(model, "policy"))

    def test_an_adapter_from_elsewhere_makes_no_noise(self, start, adapter):
        edit(adapter, base_model_name_or_path="someone/else")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            start(adapter=str(adapter))

    def test_a_pickle_is_refused_unopened(self, start, adapter, monkeypatch):
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
        with pytest.raises(ModelError, match=r"pickled \.bin adapters are refused"):
            start(adapter=str(adapter))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_values_that_are_not_finite(self, start, adapter, value):
        with rewriting(adapter) as state:
            key = sorted(state)[-1]
            state[key][0, 0] = value
        with pytest.raises(ModelError, match=f"{key} holds values that are not finite"):
            start(adapter=str(adapter))

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    def test_a_damaged_file(self, adapter, name):
        (adapter / name).write_bytes((adapter / name).read_bytes()[:40])
        with pytest.raises(ModelError, match="it is damaged"):
            check_adapter(str(adapter))

    def test_another_size_of_base(self, start, adapter, wide_model_folder):
        with pytest.raises(ModelError, match=r"do not fit this model \(.*size mismatch"):
            start(name=str(wide_model_folder), adapter=str(adapter))

    def test_another_kind_of_base(self, start, adapter, tiny_gpt2):
        with pytest.raises(ModelError, match=r"model.adapter='.*': .* cannot carry this adapter"):
            start(name=str(tiny_gpt2), adapter=str(adapter))

    def test_a_base_is_bare_again_after_an_adapter_that_does_not_fit(self, tiny_config, adapter):
        base = load_base(tiny_config)
        before = set(base.network.state_dict())
        with rewriting(adapter) as state:
            del state[sorted(state)[0]]
        with pytest.raises(ModelError, match="do not fit this model"):
            LanguageModel.start(base, tiny_config.model_copy(update={"adapter": str(adapter)}), seed=0)
        assert set(base.network.state_dict()) == before

    def test_missing_weights(self, start, adapter):
        with rewriting(adapter) as state:
            del state[sorted(state)[0]]
        with pytest.raises(ModelError, match=r"do not fit this model \(missing \["):
            start(adapter=str(adapter))

    @pytest.mark.parametrize(
        "settings",
        [
            {"init_lora_weights": "pissa"},
            {"init_lora_weights": "pissa_niter_4"},
            {"bias": "all"},
            {"modules_to_save": ["lm_head"]},
            {"trainable_token_indices": [1, 2]},
            {"peft_type": "IA3"},
        ],
    )
    def test_what_the_base_would_not_survive(self, adapter, settings):
        edit(adapter, **settings)
        with pytest.raises(ModelError, match=f"got {next(iter(settings))}=.*expected a plain LoRA"):
            check_adapter(str(adapter))


def edit(adapter: Path, **settings: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def moving(model: LanguageModel) -> torch.Tensor:
    return logits(model, "moving")


class TestMovingReference:
    @pytest.fixture(params=["lora", "dora", "full weights"])
    def model(self, request, start) -> LanguageModel:
        settings = {"lora": {}, "dora": {"lora": {"dora": True}}, "full weights": {"lora": None}}
        return start(moving=True, **settings[request.param])

    def test_it_starts_as_the_policy_and_follows_when_told(self, model, perturb):
        begin = logits(model, "policy")
        assert torch.equal(moving(model), begin)
        assert model.reference_is.endswith("in training one that starts as the policy and follows it)")
        perturb(model)
        assert torch.equal(moving(model), begin)
        assert torch.equal(logits(model, "reference"), begin)
        model.follow(0.25)
        mixed, policy = moving(model), logits(model, "policy")
        assert (mixed - begin).abs().max() > 1e-3
        assert (mixed - policy).abs().max() > 1e-3
        model.follow(1.0)
        assert torch.equal(moving(model), policy)
        assert torch.equal(logits(model, "reference"), begin)

    def test_its_weights_are_the_weighted_mean(self, model, perturb, tmp_path):
        before = saved(model, tmp_path / "before", "moving")
        perturb(model)
        model.follow(0.25)
        after, policy = saved(model, tmp_path / "after", "moving"), saved(model, tmp_path / "policy", "policy")
        assert before.keys() == after.keys() == policy.keys()
        for name, one in after.items():
            torch.testing.assert_close(one, 0.25 * policy[name] + 0.75 * before[name])

    def test_it_is_not_trained(self, start):
        model, plain = start(moving=True), start()
        assert len(model.parameters()) == len(plain.parameters())
        with model.role("moving") as network:
            assert not any(p.requires_grad for name, p in network.named_parameters() if ".moving" in name)

    def test_it_is_saved_and_restored_apart(self, model, perturb, tmp_path):
        perturb(model)
        model.follow(0.5)
        before, policy = moving(model), logits(model, "policy")
        model.save(tmp_path, "moving")
        model.follow(1.0)
        model.restore(tmp_path, "moving")
        assert torch.equal(moving(model), before)
        assert torch.equal(logits(model, "policy"), policy)

    def test_full_weights_in_half_precision_are_refused(self, start):
        """One lerp of 0.3 from 1 to the next bfloat16 rounds back to 1, however often it is repeated."""
        with pytest.raises(ModelError, match=r"model\.lora=null in bfloat16 with a reference that follows"):
            start(moving=True, lora=None, dtype="bfloat16")

    def test_it_starts_at_a_starting_adapter(self, start, adapter):
        model = start(adapter=str(adapter), moving=True)
        assert torch.equal(moving(model), logits(model, "reference"))
        away = start(adapter=str(adapter), reference="base", moving=True)
        assert torch.equal(moving(away), logits(away, "policy"))
        assert not torch.equal(moving(away), logits(away, "reference"))


def saved(model: LanguageModel, folder: Path, role: str) -> dict[str, torch.Tensor]:
    folder.mkdir()
    model.save(folder, role)
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


class TestFullWeights:
    @pytest.fixture(params=["llama", "tied"])
    def model(self, request, start, tiny_gpt2) -> LanguageModel:
        return start(lora=None, **({"name": str(tiny_gpt2)} if request.param == "tied" else {}))

    def test_the_reference_is_a_frozen_copy(self, model, perturb):
        begin = logits(model, "reference")
        assert torch.equal(logits(model, "policy"), begin)
        perturb(model)
        assert torch.equal(logits(model, "reference"), begin)
        assert (logits(model, "policy") - begin).abs().max() > 0.01
        with model.role("reference") as network:
            assert not any(parameter.requires_grad for parameter in network.parameters())

    def test_what_was_saved_comes_back(self, model, perturb, tmp_path):
        comes_back(model, perturb, tmp_path)

    def test_the_base_cannot_be_given_back(self, model):
        with pytest.raises(ModelError, match="load it again for the next run"):
            model.release()

    def test_weights_of_another_model(self, start, adapter):
        with pytest.raises(ModelError, match="do not fit this model"):
            start(lora=None).restore(adapter)


class TestSave:
    @pytest.mark.parametrize("lora", [{}, {"dora": True}])
    def test_what_was_saved_comes_back(self, start, perturb, tmp_path, lora):
        comes_back(start(lora=lora), perturb, tmp_path)

    def test_another_rank_is_refused(self, start, adapter):
        with pytest.raises(ModelError, match=r"do not fit this model \(.*size mismatch"):
            start(lora={"r": 8}).restore(adapter)

    @pytest.mark.parametrize("lora", [{}, {"dora": True, "rank_stabilised": True}])
    def test_plain_transformers_and_peft_load_it(self, start, perturb, naive, tiny_model_folder, tmp_path, lora):
        model = start(lora=lora)
        perturb(model)
        model.save(tmp_path)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), tmp_path).eval()
        with torch.no_grad():
            theirs = naive(plain, (5, 6, 7), (20, 21, 3))
            ours = completion_logps(model.network, Forest.padded([Group((5, 6, 7), ((20, 21, 3),))], 0)).tokens
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


class TestRelease:
    def test_the_base_is_as_it_was_loaded(self, tiny_config, perturb, adapter):
        base = load_base(tiny_config)
        begin = {name: value.clone() for name, value in base.network.state_dict().items()}
        with torch.no_grad():
            bare = base.network(input_ids=IDS).logits
        config = tiny_config.model_copy(update={"gradient_checkpointing": True, "adapter": str(adapter)})
        model = LanguageModel.start(base, config, seed=0)
        perturb(model)
        model.training()
        assert model.release() is base
        after = base.network.state_dict()
        assert list(after) == list(begin)
        assert all(torch.equal(after[name], begin[name]) for name in begin)
        assert not base.network.training
        assert not base.network.model.layers[0].gradient_checkpointing
        assert not any(parameter.requires_grad for parameter in base.network.parameters())
        assert not base.network.get_input_embeddings()._forward_hooks
        assert torch.equal(base.network(input_ids=IDS).logits, bare)

    def test_runs_in_a_row_start_alike(self, tiny_config, perturb):
        base = load_base(tiny_config)
        found = []
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # PEFT's "a second time"
                model = LanguageModel.start(base, tiny_config, seed=5)
            found.append(weights(model))
            perturb(model)
            model.release()
        assert equal(*found)
