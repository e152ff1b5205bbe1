"""What a run finds here: the device, the dtype that models load in, free memory, versions."""

from dataclasses import dataclass
from importlib.metadata import version
from typing import final

import psutil
import torch

from dpo.model.base import choose_device, choose_dtype

PACKAGES = ("dpo-lab", "torch", "transformers", "peft")
"""Whose versions decide a run's numbers."""


@final
@dataclass(frozen=True)
class Machine:
    """The machine that this process runs on."""

    device: str
    """cuda, mps or cpu: what model.device=auto becomes."""
    name: str
    dtype: str
    """What model.dtype=auto becomes: bfloat16 where it is computed in hardware, otherwise float16 on cards and float32
    on processors."""
    free: int
    """Bytes of memory that nobody holds, of the card, or of the system."""
    total: int
    """Bytes of memory."""
    versions: str

    @classmethod
    def here(cls) -> "Machine":
        """Look at the machine as it is now."""
        device = choose_device("auto")
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
            free, total = torch.cuda.mem_get_info(device)
        else:
            memory = psutil.virtual_memory()
            name, free, total = f"no CUDA card ({torch.get_num_threads()} threads)", memory.available, memory.total
        dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
        return cls(device.type, name, dtype, free, total, versions())

    def __str__(self) -> str:
        """Say it in two lines."""
        return (
            f"{self.device}: {self.name}, {self.free / 2**30:.1f} of {self.total / 2**30:.1f} GiB free, models load in "
            f"{self.dtype}\n{self.versions}"
        )


def versions() -> str:
    """Return the versions of the packages that decide a run's numbers, in a line."""
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)
