"""What only the model's tests need."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo.data import Example


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
