# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,-widgets
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpo-lab/dpo-lab/blob/main/notebooks/05_your_own_objective.ipynb)
#
# # Your own objective
#
# A loss is one small class. Before it trains anything it is held to the laws that the objectives of this package keep, and
# then compared with them on the same footing.

# %% tags=["parameters"]
SMOKE = False  # True: a few steps of everything, under a minute on a CPU

# %% [markdown]
# ## Install
#
# On Colab this takes a minute. It replaces nothing that is already there but removes torchao: the version that Colab
# ships is refused by PEFT, and nothing here needs it.

# %% tags=["install"]
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dpo") is None:
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchao"], check=True)
    subprocess.run([*pip, "install", "--quiet", "dpo-lab @ git+https://github.com/dpo-lab/dpo-lab"], check=True)

# %% [markdown]
# ## The machine
#
# A T4 has no bfloat16 in hardware, so models load in float16 there; newer cards take bfloat16. Nothing needs to be set.
# Where Google Drive is mounted (the folder symbol on the left), the comparison lies there, and running the notebook again
# goes on.

# %%
from pathlib import Path

from dpo.machine import Machine

print(Machine.here())

drive = Path("/content/drive/MyDrive")
place = (drive if drive.is_dir() else Path()) / "runs"

# %% [markdown]
# ## Write it
#
# It reads a batch of log-probabilities and returns a loss for each example, in a file of its own that is imported by name.
# This one is a squared hinge on the margin of the implicit reward: pairs beyond the margin teach nothing more.

# %%
# %%writefile squared_hinge.py
"""The squared hinge on preference pairs."""

from dataclasses import dataclass
from typing import final

import torch
from torch.nn.functional import relu

from dpo.losses.objective import Number, PairObjective, require_number
from dpo.losses.reduce import expected_loss, log_ratios, pair_output
from dpo.types import LossOutput, PairLogps


@final
@dataclass(frozen=True, kw_only=True)
class SquaredHinge(PairObjective):
    """A pair stops counting once its margin is reached, and pulls the harder the farther it is from it.

    loss = p max(0, 1 - z)² + (1 - p) max(0, 1 + z)²,  z = β (r_w - r_l),  r = log π(y|x) - log π_ref(y|x),
    p = P(w preferred). Where the policy equals the reference, the loss is 1.

    Paper: arXiv:2402.05749.
    Differs: the paper's labels are certain (p = 1).
    """

    beta: Number = 0.05
    """One over the margin, in 1 / nats (> 0): larger asks for a smaller margin."""

    needs_reference = True
    paper = "arXiv:2402.05749"

    def __post_init__(self) -> None:
        require_number(self, "beta", above=0)

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Map a batch of pairs to its loss; the rewards are β r."""
        chosen, rejected = (self.beta * r for r in log_ratios(logps))
        z = chosen - rejected
        losses = expected_loss(logps, relu(1 - z).square(), relu(1 + z).square())
        return pair_output(logps, losses, torch.stack([chosen, rejected], dim=1))


# %% [markdown]
# ## Hold it to the laws
#
# Gradients of the right sign, none into the reference, weights and soft labels honoured, invariance to order and padding,
# exact accumulation. A broken objective is told which law it broke.

# %%
import importlib

sys.path.insert(0, str(Path.cwd()))
squared_hinge = importlib.import_module("squared_hinge")
from dpo.losses.testing import check as check_laws

check_laws(squared_hinge.SquaredHinge())
print("keeps every law")

# %% [markdown]
# ## See it
#
# The loss of one pair over the log-ratio margin, beside DPO's.

# %%
import matplotlib.pyplot as plt
import torch

from dpo import PairLogps
from dpo.losses import find

margin = torch.linspace(-40, 60, 200, dtype=torch.float64)
zero = torch.zeros_like(margin)
length = torch.ones_like(margin, dtype=torch.long)
logps = PairLogps(margin, zero, zero, zero, length, length)  # policy and reference, chosen and rejected
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.plot(margin, squared_hinge.SquaredHinge(beta=0.05)(logps).losses, label="squared hinge, beta 0.05")
axes.plot(margin, find("dpo")(beta=0.1)(logps).losses, label="DPO, beta 0.1")
axes.set(xlabel="log-ratio of chosen minus that of rejected, nats", ylabel="loss")
axes.legend()
plt.show()

# %% [markdown]
# ## Compare it
#
# `package.module:Class` stands wherever a name does. The learning rate is the task's; the page says that nothing was
# tuned, and with one seed that a difference may be one between two trained models only.

# %%
from dpo.api import compare

smoke = {
    "evaluation": {"max_prompts": 3, "max_new_tokens": 8, "samples_per_prompt": 1, "sample_steps": None},
    "data": {"limit": 30},
    "loop": {"gradient_accumulation_steps": 1},
}
print(Machine.here())
found = compare(
    ["dpo", "squared_hinge:SquaredHinge"],
    seeds=1 if SMOKE else 2,
    completions=16 if SMOKE else None,
    output=place / "own-objective",
    **(smoke if SMOKE else {}),
    **{"optimiser.learning_rate": 5e-4},
)
print(Machine.here())
for line in found.comparison.verdicts:
    print(f"- {line}")

# %%
found
