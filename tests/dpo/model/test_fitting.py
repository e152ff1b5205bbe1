"""Saved weights with a tensor too many are another model's, and refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.errors import ModelError


@pytest.mark.parametrize("lora", [{}, None], ids=["adapter", "full weights"])
def test_a_tensor_too_many_is_refused(start, tmp_path: Path, lora) -> None:
    start(lora=lora).save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = load_file(file)
    name = sorted(key for key in state if "layers.0." in key)[0]
    save_file({**state, name.replace("layers.0.", "layers.9."): state[name].clone()}, file, {"format": "pt"})
    model = start(lora=lora)
    with pytest.raises(ModelError, match=r"do not fit this model \(.*layers\.9\."):
        model.restore(tmp_path)
    save_file(state, file, {"format": "pt"})
    model.restore(tmp_path)  # without it they fit
    assert all(torch.isfinite(one).all() for one in model.parameters())
