"""What only the model's tests need."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpo.data import Example
from dpo.model.tree_attention import needs_eager

MakeNetwork = Callable[..., Any]
Adapt = Callable[[Any], list[torch.nn.Parameter]]

SIZE: Mapping[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"]
PACKABLE: Mapping[str, Mapping[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "Gemma3Text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 4, "layer_types": MIXED},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "GptOss": {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0, "attention_multiplier": 0.1, "residual_multiplier": 0.7},
}
"""Families whose completions can branch, and what makes each of them special."""

PADDED_ONLY: Mapping[str, Mapping[str, Any]] = {
    "Lfm2": {"conv_L_cache": 3, "full_attn_idxs": [1]},
    "Mamba": {"state_size": 8},
}
"""Families that mix neighbouring columns: a hybrid and a state-space model."""

FAMILIES: Mapping[str, Mapping[str, Any]] = {**PACKABLE, **PADDED_ONLY}


@pytest.fixture(scope="session")
def make_network() -> MakeNetwork:
    """A tiny frozen network of a family, with random weights so large that attention is far from uniform.

    At the usual standard deviation of 0.02 every key gets the same weight, and a wrong rule hardly shows.
    """

    def make(family: str, **changes: object) -> Any:
        config = getattr(transformers, f"{family}Config")(**{**SIZE, **FAMILIES[family], **changes})
        for name, value in config.to_dict().items():
            if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
                setattr(config, name, 0.0)
        eager = needs_eager(config) or family == "Mamba"
        with torch.random.fork_rng(devices=[]):
            network = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if eager else "sdpa")
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if parameter.ndim > 1 or name.endswith(("bias", "sinks")):
                    parameter.normal_(0, 1 if name.endswith("sinks") else 0.3, generator=draw)
        return network.float().eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def adapt() -> Adapt:
    """Put adapters on every linear layer, moved away from their start where they do nothing; returns their weights."""

    def adapted(network: Any) -> list[torch.nn.Parameter]:
        targets = ["in_proj", "x_proj"] if network.config.model_type == "mamba" else "all-linear"  # PEFT refuses others
        fan_in_fan_out = network.config.model_type == "gpt2"
        inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, fan_in_fan_out=fan_in_fan_out), network)
        draw = torch.Generator().manual_seed(1)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(0, 0.1, generator=draw)
        return parameters

    return adapted


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor made under it."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.fixture
def largest() -> Largest:
    return Largest()


@pytest.fixture(scope="module", params=list(PACKABLE))
def packable(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def wide_model_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model twice as wide: 4-bit weights come in blocks of 64."""
    folder = tmp_path_factory.mktemp("wide-llama")
    shutil.copytree(tiny_model_folder, folder, dirs_exist_ok=True)
    settings = LlamaConfig.from_pretrained(tiny_model_folder)
    settings.hidden_size, settings.intermediate_size, settings.head_dim = 64, 128, 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Four examples of two completions each, no two alike in length, label or weight."""
    ids = [
        ((5, 6, 7), (20, 21, 3), (30, 3)),
        ((12,), (40, 41, 42, 43, 3), (44, 45, 46, 3)),
        ((50, 51, 52, 53), (60, 3), (61, 62, 63, 64, 65, 3)),
        ((70, 71), (80, 81, 82, 83, 84, 85, 3), (90, 3)),
    ]
    return [
        Example(
            prompt=prompt,
            completions=(first, second),
            preference=1.0 - 0.1 * i,
            desirable=i % 2 == 0,
            weight=1.0 + i,
            source=f"made:{i}",
            prompt_messages=(),
            texts=("", ""),
        )
        for i, (prompt, first, second) in enumerate(ids)
    ]
