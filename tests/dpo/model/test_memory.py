"""The memory plan: by hand on a tiny Llama, and held against what the real model keeps."""

import inspect
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import BloomConfig, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.base import get_keys_to_not_convert

from dpo.errors import ConfigError, ModelError
from dpo.model import memory
from dpo.model.base import LanguageModel, LoRA, ModelConfig, ScalarRole, load_base
from dpo.model.forest import Forest, Group
from dpo.model.logprobs import Head, token_scores
from dpo.model.memory import (
    Activations,
    Card,
    MemoryPlan,
    Roles,
    Sampled,
    SamplingSize,
    count_pass,
    head_bytes,
    must_checkpoint,
    needs_checkpointing,
    plan_memory,
)
from dpo.model.rollout import sample
from dpo.model.scalar import LearnedReward
from dpo.model.tree_attention import SHORT, Branches, _tree_sdpa

GIB = 2**30
CARD = Card("a card", "cpu", 10 * GIB, 0, torch.float32)

# The tiny Llama: hidden 32, intermediate 64, 2 layers, 4 heads and 2 key-value heads of 8, an untied head.
LINEAR = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)  # q, k and v, o, MLP
NORMS = 2 * 2 * 32 + 32
RANK_1 = 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))  # adapter weights for each unit of rank


def vocabulary(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


@pytest.fixture
def counted(tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LanguageModel]:
    """Load a model with its real weights and the attention that the plan counts with."""

    def loaded(**changes: object) -> LanguageModel:
        config = ModelConfig.model_validate({**tiny_config.model_dump(), "layout": "padded", **changes})
        base = load_base(config)
        memory._start(config, base.network.config, base.dtype)  # makes the attention known to transformers
        base.network.set_attn_implementation(memory.ATTENTION)
        return LanguageModel.start(base, config, seed=0)

    return loaded


def saved_by_autograd(model: LanguageModel, tokens: int) -> int:
    """Return the bytes of the distinct storages that autograd saves in a forward pass, parameters aside."""
    model.training(True)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.network.parameters(), *model.network.buffers())}
    seen: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), model.role("policy") as network:
        out = network.base_model(
            input_ids=torch.zeros(1, tokens, dtype=torch.long),
            position_ids=torch.arange(tokens).unsqueeze(0),
            use_cache=False,
        ).last_hidden_state
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


# --- what is held whatever the micro-batch ---


def test_parts_by_hand(tiny_config: ModelConfig, tiny_model_folder: Path) -> None:
    config = tiny_config.model_copy(update={"lora": LoRA(r=8)})
    words = vocabulary(tiny_model_folder)
    assert plan_memory(config, "adamw", CARD).parts == {
        "base weights (float32)": 4 * (2 * words * 32 + LINEAR + NORMS),
        "adapter weights": 4 * 8 * RANK_1,
        "gradients": 4 * 8 * RANK_1,
        "optimiser state (adamw)": 8 * 8 * RANK_1 + 4 * 28,  # 2 layers x 7 adapters x A and B, a step count each
        "head": head_bytes(words, 32, dtype=torch.float32, device="cpu", trained=False),
    }


def test_adapters_stay_in_float32_on_a_bfloat16_base(tiny_config: ModelConfig, tiny_model_folder: Path) -> None:
    parts = plan_memory(tiny_config.model_copy(update={"dtype": "bfloat16"}), "adamw", CARD).parts
    assert parts["base weights (bfloat16)"] == 2 * (2 * vocabulary(tiny_model_folder) * 32 + LINEAR + NORMS)
    assert parts["adapter weights"] == 4 * 16 * RANK_1


def test_full_weights_have_a_reference_copy(tiny_config: ModelConfig, tiny_model_folder: Path) -> None:
    parts = plan_memory(tiny_config.model_copy(update={"lora": None}), "rmsprop", CARD).parts
    weights = 4 * (2 * vocabulary(tiny_model_folder) * 32 + LINEAR + NORMS)
    assert parts["frozen reference copy"] == parts["gradients"] == parts["base weights (float32)"] == weights
    assert parts["optimiser state (rmsprop)"] == weights + 4 * (2 * 9 + 3)
    assert "adapter weights" not in parts


@pytest.mark.parametrize("lora", [LoRA(), None], ids=["adapter", "full weights"])
def test_a_moving_reference_is_held_beside(tiny_config: ModelConfig, lora: LoRA | None) -> None:
    config = tiny_config.model_copy(update={"lora": lora})
    still, moving = (plan_memory(config, "adamw", CARD, Roles(moving=moving)) for moving in (False, True))
    weights = still.parts["gradients"]  # in float32, one for each trained weight
    assert moving.held - still.held == moving.parts["moving reference"] == weights
    assert "moving reference" not in still.parts


def test_a_starting_adapter_is_held_twice(
    start: Callable[..., LanguageModel], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    start(lora={"r": 4}).save(tmp_path)
    config = tiny_config.model_copy(update={"adapter": str(tmp_path)})
    parts = plan_memory(config, "adamw", CARD).parts
    assert parts["adapter weights"] == parts["frozen reference adapter"] == 4 * 4 * RANK_1  # its rank, not lora.r
    assert (
        "frozen reference adapter"
        not in plan_memory(config.model_copy(update={"reference": "base"}), "adamw", CARD).parts
    )
    continued = plan_memory(tiny_config, "adamw", CARD, Roles(frozen_adapter=True)).parts
    assert continued["frozen reference adapter"] == continued["adapter weights"] == 4 * 16 * RANK_1


ROLE = 4 * (16 * RANK_1 + 33)  # an adapter of rank 16 and a head of 32 + 1 numbers, in float32
PPO_ROLES = Roles(rewards=3, value=True)


def test_roles_by_hand(tiny_config: ModelConfig) -> None:
    alone, ppo, reward = (
        plan_memory(tiny_config, "rmsprop", CARD, roles).parts for roles in (Roles(), PPO_ROLES, Roles(reward=True))
    )
    assert ppo == {
        **alone,
        "value adapter and head": ROLE,
        "reward adapters and heads (3)": 3 * ROLE,  # frozen: no gradients, no optimiser state
        "gradients": alone["gradients"] + ROLE,
        "optimiser state (rmsprop)": alone["optimiser state (rmsprop)"] + ROLE + 4 * (28 + 2),
    }
    assert reward == {
        "base weights (float32)": alone["base weights (float32)"],
        "reward adapter and head": ROLE,
        "gradients": ROLE,
        "optimiser state (rmsprop)": ROLE + 4 * (28 + 2),  # and no head of the vocabulary
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("roles", [PPO_ROLES, Roles(reward=True), Roles(rewards=1)], ids=str)
def test_roles_are_held_as_the_real_model_holds_them(tiny_config: ModelConfig, roles: Roles, dtype: str) -> None:
    from dpo.train import Optimiser, _build_optimizer

    config = ModelConfig.model_validate({**tiny_config.model_dump(), "dtype": dtype})
    rewards = [ScalarRole(f"reward-{n}", None, False) for n in range(1, roles.rewards + 1)]
    trained = [
        ScalarRole(name, None, True) for name, there in (("value", roles.value), ("reward", roles.reward)) if there
    ]
    real = LanguageModel.start(load_base(config), config, 0, scalars=[*trained, *rewards], policy=not roles.reward)
    held = [parameter for name, parameter in real.network.named_parameters() if "lora_" in name]
    held += [parameter for head in real.heads.values() for parameter in head.parameters()]
    for parameter in real.parameters():
        parameter.grad = torch.ones_like(parameter)
    built = _build_optimizer(Optimiser(), real.parameters())
    built.step()
    state = [one for states in built.state.values() for one in states.values() if isinstance(one, torch.Tensor)]
    grads = [parameter.grad for parameter in real.parameters() if parameter.grad is not None]
    parts = plan_memory(config, "adamw", CARD, roles).parts
    assert sum(size for name, size in parts.items() if "adapter" in name) == nbytes(held)
    assert parts["gradients"] == nbytes(grads)
    assert parts["optimiser state (adamw)"] == nbytes(state)


def nbytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def test_a_role_that_says_a_number_needs_an_adapter(tiny_config: ModelConfig) -> None:
    with pytest.raises(ModelError, match=r"model\.lora=null with the role 'value'"):
        plan_memory(tiny_config.model_copy(update={"lora": None}), "adamw", CARD, Roles(value=True))


def test_an_adapter_that_does_not_fit_is_refused(
    start: Callable[..., LanguageModel], wide_model_folder: Path, tmp_path: Path
) -> None:
    start().save(tmp_path)
    with pytest.raises(ModelError, match="the weights do not fit this model"):
        plan_memory(ModelConfig(name=str(wide_model_folder), adapter=str(tmp_path), device="cpu"), "adamw", CARD)


def test_4_bit_weights_take_what_bitsandbytes_takes(wide_model_folder: Path) -> None:
    config = ModelConfig(name=str(wide_model_folder), quantization="nf4", dtype="float32", device="cpu")
    real = load_base(config).network
    state_bytes = 0
    for module in real.modules():
        if isinstance(module, Linear4bit):
            weight, state = quantize_4bit(torch.ones(module.out_features, module.in_features), compress_statistics=True)
            tensors = [weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            state_bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert state_bytes > 0
    planned = plan_memory(config, "adamw", CARD)
    assert planned.parts["base weights (nf4)"] == state_bytes
    assert planned.parts["one layer's weights, dequantised"] == 4 * 64 * 128
    plain = plan_memory(config.model_copy(update={"quantization": "none", "dtype": "bfloat16"}), "adamw", CARD)
    assert planned.parts["base weights (nf4)"] < plain.parts["base weights (bfloat16)"]
    assert len(get_keys_to_not_convert(real)) == 1  # the head is left as it is
    head = 4 * 2 * vocabulary(wide_model_folder) * 64 + 4 * (2 * 2 * 64 + 64)
    assert planned.parts["base weights (float32)"] == head


def test_the_share_of_4_bit_weights() -> None:
    """Half a byte, 1/64 for a block's scale, 4/(64 * 256) for the scale of scales: 0.5159 bytes a number."""
    assert memory.nf4_bytes(2**24) / 2**24 == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), abs=1e-4)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adamw_8bit"])
def test_optimiser_state_is_what_the_optimiser_makes(name: str) -> None:
    from dpo.train import Optimiser, _build_optimizer

    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (5, 4095, 4096, 5000)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    built = _build_optimizer(Optimiser(name=name), parameters)  # pyright: ignore[reportArgumentType]
    built.step()
    made = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for state in built.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    assert memory.optimiser_bytes(name, parameters) == sum(made.values())


def test_an_unknown_optimiser_is_refused(tiny_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="optimiser 'sgd': expected adamw"):
        plan_memory(tiny_config, "sgd", CARD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("words", [1000, 12_000])
def test_the_head_works_in_what_is_said(dtype: torch.dtype, trained: bool, words: int) -> None:
    """Counted on the real head; 1,000 words are one tile, 12,000 are several."""
    tokens, width = 1024, 64
    weight = torch.zeros(words, width, dtype=dtype, requires_grad=trained)
    hidden = torch.zeros(tokens, width, dtype=dtype, requires_grad=True)
    target = torch.zeros(tokens, dtype=torch.long)
    weight.grad, hidden.grad = torch.zeros_like(weight) if trained else None, torch.zeros_like(hidden)
    given = [tensor for tensor in (weight, weight.grad, hidden, hidden.grad, target) if tensor is not None]
    with memory._Live(given) as live:
        token_scores(hidden, target, Head(weight)).logprobs.sum().backward()
    grown = 2 * tokens * width * dtype.itemsize  # counted with the activations
    said = head_bytes(words, width, dtype=dtype, device="cpu", trained=trained)
    assert 0.9 * live.peak <= said + grown <= 1.3 * live.peak


# --- what grows with the micro-batch ---


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": "bfloat16"}, {"lora": {"dropout": 0.1, "r": 4}}, {"lora": {"dora": True}}, {"lora": None}],
    ids=str,
)
def test_the_count_without_weights_is_that_of_the_real_model(
    counted: Callable[..., LanguageModel], tiny_config: ModelConfig, changes: dict[str, object], checkpointing: bool
) -> None:
    """The same pass on real weights holds the same bytes, at its highest point and between forward and backward."""
    tokens = 96
    real = counted(**changes, gradient_checkpointing=checkpointing)
    config = ModelConfig.model_validate(
        {**tiny_config.model_dump(), **changes, "gradient_checkpointing": checkpointing}
    )
    built, _, _ = memory._start(config, real.network.config, real.dtype)
    assert {parameter.device.type for parameter in built.network.parameters()} == {"meta"}
    if not real.mixed:
        assert count_pass(built, tokens) == count_pass(real, tokens)
        return
    memory._cast_adapters(built)  # autocast casts them once a pass, which the longer pass does not hold twice
    assert count_pass(built, 2 * tokens).kept - count_pass(built, tokens).kept == (
        count_pass(real, 2 * tokens).kept - count_pass(real, tokens).kept
    )


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"lora": {"dropout": 0.1}}, {"lora": None}], ids=str)
def test_what_is_kept_is_what_autograd_saves(counted: Callable[..., LanguageModel], changes: dict[str, object]) -> None:
    """Beside the hidden states that the pass returns."""
    tokens, real = 96, counted(**changes)
    returned = tokens * 32 * real.dtype.itemsize
    assert count_pass(real, tokens).kept - returned == pytest.approx(saved_by_autograd(real, tokens), rel=0.02)


def test_the_counted_attention_holds_what_a_fused_kernel_holds(
    counted: Callable[..., LanguageModel], start: Callable[..., LanguageModel]
) -> None:
    """torch's own, on rows without padding."""
    assert count_pass(counted(), 96).kept == pytest.approx(count_pass(start(layout="padded"), 96).kept, rel=0.002)


def test_4_bit_layers_keep_what_plain_ones_keep(counted: Callable[..., LanguageModel], wide_model_folder: Path) -> None:
    config = ModelConfig(name=str(wide_model_folder), quantization="nf4", dtype="bfloat16", device="cpu")
    real = counted(**config.model_dump(exclude={"layout"}))
    built, _, _ = memory._start(config, LlamaConfig.from_pretrained(wide_model_folder), torch.bfloat16)
    memory._cast_adapters(built)
    more = count_pass(built, 192).kept - count_pass(built, 96).kept
    assert more == pytest.approx(saved_by_autograd(real, 192) - saved_by_autograd(real, 96), rel=0.05)


def test_dropout_masks_are_counted_and_a_pass_leaves_no_gradient(counted: Callable[..., LanguageModel]) -> None:
    dry, wet = counted(), counted(lora={"dropout": 0.1})
    assert count_pass(wet, 64).kept > count_pass(dry, 64).kept
    assert all(parameter.grad is None for parameter in wet.parameters())


def test_the_line_tells_other_lengths(tiny_config: ModelConfig) -> None:
    for checkpointing in (False, True):
        config = tiny_config.model_copy(update={"gradient_checkpointing": checkpointing})
        built, _, _ = memory._start(config, LlamaConfig.from_pretrained(config.name), torch.float32)
        planned = plan_memory(config, "adamw", replace(CARD, device="cuda"))
        grown = planned.checkpointed if checkpointing else planned.plain
        assert grown.fixed + (grown.per_token - 2 * 32 * 4) * 700 == pytest.approx(
            count_pass(built, 700).peak, rel=0.02
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_value_role_takes_its_turn(tiny_config: ModelConfig, checkpointing: bool) -> None:
    """On the real model: each role forward and back before the next, as an update does it."""
    config = tiny_config.model_copy(update={"gradient_checkpointing": checkpointing, "layout": "padded"})
    base, tokens = load_base(config), 700
    memory._start(config, base.network.config, base.dtype)  # makes the attention known to transformers
    base.network.set_attn_implementation(memory.ATTENTION)
    real = LanguageModel.start(base, config, 0, scalars=Roles(value=True).scalars())
    real.training(True)
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids, positions = memory._row(real.network, tokens)
    grads = [parameter.grad for parameter in real.parameters() if parameter.grad is not None]
    with memory._Live([*real.network.parameters(), *real.network.buffers(), *grads]) as live:
        for role in real.trained:
            with real.role(role) as network:
                hidden = network.base_model(input_ids=ids, position_ids=positions).last_hidden_state
                hidden.backward(torch.zeros_like(hidden))
            del hidden
    head = 2 * 32 * 4  # a copy of the hidden states and its gradient
    plans = [plan_memory(config, "adamw", replace(CARD, device="cuda"), Roles(value=value)) for value in (True, False)]
    both, alone = (plan.checkpointed if checkpointing else plan.plain for plan in plans)
    assert real.trained == ("policy", "value")
    assert both.fixed + (both.per_token - head) * tokens == pytest.approx(live.peak, rel=0.02)
    assert both.per_token == alone.per_token


@pytest.mark.slow
@pytest.mark.parametrize("size", [SamplingSize(3, 150, 50), SamplingSize(3, 2, 2)], ids=["layers", "logits"])
def test_sampling_holds_what_is_said(tiny_config: ModelConfig, size: SamplingSize) -> None:
    """On the real model: a long prompt, where the layers take most, and a short one, where the logits do."""
    config = tiny_config.model_copy(update={"layout": "padded"})
    real = LanguageModel.start(load_base(config), config, 0)
    prompts = [tuple(range(5, 5 + size.prompt - n % 2)) for n in range(size.rows)]  # of two lengths: one is padded
    own = [*real.network.parameters(), *real.network.buffers()]
    with memory._Live(own) as live:
        sample(real, prompts, max_new_tokens=size.new, batch_size=size.rows)
    said = plan_memory(config, "adamw", CARD, Roles(), size).sampled
    assert (said.rows, said.size) == (size.rows, size.rows * said.per_row)
    assert 0.7 * said.size <= live.peak <= 1.1 * said.size


def test_keys_and_values_of_a_row_by_hand(tiny_config: ModelConfig) -> None:
    """Every further token of a completion takes 2 layers x (key + value) x 2 heads x 8 numbers of 4 bytes."""
    short, long = (
        plan_memory(tiny_config, "adamw", CARD, Roles(), SamplingSize(1, 100, new)).sampled.size for new in (100, 200)
    )
    assert long - short == pytest.approx(100 * 2 * 2 * 2 * 8 * 4, rel=0.02)


def test_judging_is_counted_where_a_reward_was_learned(tiny_config: ModelConfig) -> None:
    size = SamplingSize(1, 100, 50)
    gold, learned = (plan_memory(tiny_config, "adamw", CARD, Roles(rewards=n), size).sampled for n in (0, 2))
    assert gold.judging == 0
    assert gold.per_row == learned.per_row
    assert learned.size == learned.judging > gold.size  # sixteen rows are judged, one is sampled
    assert inspect.signature(LearnedReward).parameters["batch_size"].default == memory.JUDGED


def test_the_scores_that_a_processor_keeps_are_counted(tiny_config: ModelConfig) -> None:
    """As many as the longest block keeps that is written out: more than a shorter one, and none of a longer one."""
    ours, fused = (plan_memory(tiny_config, "adamw", replace(CARD, device=device)) for device in ("cpu", "cuda"))
    longest = math.isqrt(SHORT)
    assert ours.plain.per_token - fused.plain.per_token == 2 * 4 * longest * 4  # layers, heads, keys, bytes
    assert ours.checkpointed.per_token - fused.checkpointed.per_token == 4 * longest * 4

    def kept(queries: int) -> int:
        forest = Forest.packed([Group([1], [[1] * (queries - 1)])])
        query, key, value = (torch.randn(1, heads, queries, 8, requires_grad=True) for heads in (4, 2, 2))
        saved: dict[int, int] = {}
        given = {tensor.untyped_storage()._cdata for tensor in (query, key, value)}

        def save(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in given and tensor.is_floating_point():
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            out, _ = _tree_sdpa(None, query, key, value, None, branches=Branches(forest))
        assert out.requires_grad
        return sum(saved.values())

    beside = 2 * 4 * 8 * 4  # bytes a token of the scaled queries, and of the output
    assert 4 * longest * 4 <= kept(longest) / longest <= 4 * longest * 4 + beside
    assert kept(2 * longest) / (2 * longest) <= beside


def test_more_tokens_take_more_and_checkpointing_takes_less(tiny_config: ModelConfig) -> None:
    planned = plan_memory(tiny_config, "adamw", CARD)
    assert planned.total(100, False) < planned.total(101, False)
    assert planned.total(100, True) < planned.total(101, True)
    assert planned.total(100, True) < planned.total(100, False)
    assert planned.activation_bytes_per_token(True) < planned.activation_bytes_per_token(False)
    assert planned.total(0, False) >= planned.held == sum(planned.parts.values())
    assert planned.notes == ()


def test_planning_reads_no_weights(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = (tiny_model_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    alone = plan_memory(ModelConfig(name=str(tmp_path), dtype="float32"), "adamw", CARD)
    beside = plan_memory(ModelConfig(name=str(tiny_model_folder), dtype="float32"), "adamw", CARD)
    assert (alone.parts, alone.plain, alone.checkpointed) == (beside.parts, beside.plain, beside.checkpointed)


def test_a_tied_head_is_counted_once(tiny_model_folder: Path, tmp_path: Path) -> None:
    settings = LlamaConfig.from_pretrained(tiny_model_folder)
    settings.tie_word_embeddings = True
    settings.save_pretrained(tmp_path)
    parts = plan_memory(ModelConfig(name=str(tmp_path), dtype="float32"), "adamw", CARD).parts
    real = LlamaForCausalLM(settings)
    assert parts["base weights (float32)"] == sum(4 * parameter.numel() for parameter in real.parameters())


def test_a_family_that_cannot_be_counted_is_said_to_be_guessed(tmp_path: Path) -> None:
    BloomConfig(hidden_size=64, n_layer=3, n_head=4, vocab_size=300).save_pretrained(tmp_path)
    planned = plan_memory(ModelConfig(name=str(tmp_path), dtype="bfloat16"), "adamw", CARD)
    assert "rule of thumb, 48 vectors" in planned.notes[0]
    assert "BloomForCausalLM does not take" in planned.notes[0]
    assert planned.plain == Activations(0, 3 * 48 * 64 * 2)
    assert planned.checkpointed == Activations(0, (48 + 3) * 64 * 2)
    ppo = plan_memory(
        ModelConfig(name=str(tmp_path), dtype="bfloat16"),
        "adamw",
        CARD,
        Roles(rewards=1, value=True),
        SamplingSize(4, 20, 10),
    )
    assert ppo.plain.per_token == planned.plain.per_token
    cache, prompt = 30 * 2 * 3 * 64 * 2, 20 * 48 * 64 * 2  # both as wide as the hidden state
    assert ppo.sampled == Sampled(4, cache + prompt, 16 * 30 * 48 * 64 * 2)


def test_eager_attention_is_said_to_be_uncounted(tiny_config: ModelConfig) -> None:
    planned = plan_memory(tiny_config.model_copy(update={"attn_implementation": "eager"}), "adamw", CARD)
    assert planned.notes[0].startswith("Eager attention keeps")


# --- what fits ---

PLAN = MemoryPlan("m", {"weights": 1000, "head": 24}, plain=Activations(10, 7), checkpointed=Activations(3, 2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_micro_batch_is_the_inverse_of_the_total(checkpointing: bool) -> None:
    for free in range(1030, 1200):
        most = PLAN.largest_tokens(free, checkpointing)
        assert most == 0 or PLAN.total(most, checkpointing) <= free
        assert PLAN.total(most + 1, checkpointing) > free
    assert PLAN.largest_tokens(1034 + 7 * 20, False) == 20
    assert PLAN.largest_tokens(5, checkpointing) == 0


def test_checkpointing_is_needed_beyond_what_fits_without() -> None:
    assert not needs_checkpointing(PLAN, 1034 + 7 * 20, 20)
    assert needs_checkpointing(PLAN, 1034 + 7 * 20, 21)


SAMPLING = replace(PLAN, sampled=Sampled(rows=4, per_row=50, judging=120))


def test_sampling_and_updates_take_turns() -> None:
    assert SAMPLING.sampling() == 1024 + 4 * 50
    assert SAMPLING.total(10, False) == 1024 + 4 * 50  # more than the 1034 + 7 * 10 of an update
    assert SAMPLING.total(40, False) == PLAN.total(40, False) == 1034 + 7 * 40
    assert replace(PLAN, sampled=Sampled(1, 50, 120)).sampling() == 1024 + 120  # judging one takes more than writing it
    for free in range(1200, 1400):
        most = SAMPLING.largest_tokens(free, False)
        assert most == (0 if free < 1224 else PLAN.largest_tokens(free, False))


def test_checkpointing_is_no_cure_for_sampling() -> None:
    assert not needs_checkpointing(SAMPLING, 1034 + 7 * 20, 20)
    assert needs_checkpointing(SAMPLING, 1034 + 7 * 20, 21)


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (1224, "It fits c; gradient checkpointing is not needed"),
        (1223, "It does not fit c: sampling 4 completions at once. Use rollout.sampling_batch_size=3 at most"),
        (1144, "Use rollout.sampling_batch_size=2 at most"),
        (1143, "not even one of the completions"),  # what was written could not be judged
    ],
)
def test_the_verdict_on_sampling(free: int, said: str) -> None:
    card = Card("c", "cuda", free, 0, torch.bfloat16)
    assert said in SAMPLING.verdict(card, examples=2, tokens_each=10, unit="completions")


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (1034 + 7 * 40, "It fits c; gradient checkpointing is not needed"),
        (1034 + 7 * 40 - 1, "It fits c with model.gradient_checkpointing=true only"),
        (1027 + 2 * 39, "Use loop.per_device_train_batch_size=3 at most, with model.gradient_checkpointing=true"),
        (1027 + 2 * 9, "not even one of the pairs"),
    ],
)
def test_the_verdict_says_what_to_do(free: int, said: str) -> None:
    assert said in PLAN.verdict(Card("c", "cuda", free, 0, torch.bfloat16), examples=4, tokens_each=10, unit="pairs")


@pytest.mark.parametrize(
    ("size", "total"), [("24GB", 24 * 10**9), ("80GiB", 80 * GIB), ("1.5 gib", 1.5 * GIB), (" 12gb ", 12 * 10**9)]
)
def test_card_sizes(size: str, total: float) -> None:
    card = Card.named(size)
    assert card.free + card.context == total
    assert card.context == memory.CUDA_CONTEXT
    assert (card.device, card.dtype) == ("cuda", torch.bfloat16)


@pytest.mark.parametrize("size", ["", "24", "24MB", "GB", "-3GB", "0GB", "0.5GiB", "a 24GB", "nanGB", "24GBs"])
def test_other_sizes_are_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=r"--gpu: got .*, expected the size of a card.*24GB"):
        Card.named(size)


def test_this_machine_is_a_card_without_a_context() -> None:
    card = Card.here(torch.device("cpu"))
    assert card.free == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (card.context, card.device) == (0, "cpu")


# --- the decision at load ---


@pytest.mark.parametrize(
    ("lora", "roles"),
    [(LoRA(), Roles()), (None, Roles()), (LoRA(), PPO_ROLES), (LoRA(), Roles(reward=True))],
    ids=["adapter", "full weights", "ppo", "reward"],
)
def test_checkpointing_is_needed_exactly_where_the_plan_exceeds_what_is_free(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, lora: LoRA | None, roles: Roles
) -> None:
    """The base is loaded already, so its weights are not asked for again."""
    base, tokens = load_base(tiny_config), 500
    config = tiny_config.model_copy(update={"lora": lora})
    plan = plan_memory(config, "adamw", CARD, roles)
    need = plan.total(tokens, checkpointing=False) - plan.parts["base weights (float32)"]

    def free(size: int) -> None:
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=size, total=10 * GIB))

    free(need)
    assert not must_checkpoint(base, config, "adamw", tokens, roles)
    free(need - 1)
    assert must_checkpoint(base, config, "adamw", tokens, roles)


def test_where_memory_is_plentiful_no_pass_is_counted(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "plan_memory", None)
    assert not must_checkpoint(load_base(tiny_config), tiny_config, "adamw", 500)
