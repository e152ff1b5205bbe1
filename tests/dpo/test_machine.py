"""What is said of the machine is what a run does on it."""

import psutil
import pytest
import torch

from dpo.machine import Machine, versions
from dpo.model.base import choose_device, choose_dtype


def test_it_says_what_auto_becomes_here() -> None:
    found = Machine.here()
    device = choose_device("auto")
    assert found.device == device.type
    assert getattr(torch, found.dtype) == choose_dtype("auto", device)
    assert 0 < found.free <= found.total
    if device.type != "cuda":
        assert found.total == psutil.virtual_memory().total
    assert f"models load in {found.dtype}\n{versions()}" in str(found)
    assert f"torch {torch.__version__}" in versions()


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 9), "bfloat16")])
def test_a_card_without_bfloat16_is_told(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    """torch says that a T4 has it, by emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 15 * 2**30))
    shown = str(Machine.here()).splitlines()[0]
    sm = "".join(map(str, capability))
    assert shown == f"cuda: A card (sm_{sm}), 3.0 of 15.0 GiB free, models load in {dtype}"
