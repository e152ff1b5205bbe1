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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpo-lab/dpo-lab/blob/main/notebooks/02_compare_objectives.ipynb)
#
# # An honest comparison of objectives
#
# Several objectives from one start, on one split, under one budget, over several seeds, and in the end one page that says
# which differences are real and which are noise.

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
# Where Google Drive is mounted (the folder symbol on the left), the comparison lies there: a session that Colab ends
# costs at most ten minutes, and running the notebook again goes on, finished runs are kept.

# %%
from pathlib import Path

from dpo.machine import Machine

print(Machine.here())

drive = Path("/content/drive/MyDrive")
place = (drive if drive.is_dir() else Path()) / "runs"

# %% [markdown]
# ## Weights & Biases
#
# With a key (a Colab secret or the environment variable `WANDB_API_KEY`) every run is shown there, under the same metric
# names for all objectives. Without one nothing is asked.

# %%
import os

trackers = ["wandb"] if os.environ.get("WANDB_API_KEY") else []
print(f"trackers: {trackers or 'none; every metric is kept in metrics.jsonl all the same'}")

# %% [markdown]
# ## Compare
#
# Without data it is the embedded task, controlled sentiment. With your own, give `data="prefs.jsonl"`. The budget is
# completions learned from, the same for every objective.

# %%
from dpo.api import compare

smoke = {
    "evaluation": {"max_prompts": 3, "max_new_tokens": 8, "samples_per_prompt": 1, "sample_steps": None},
    "data": {"limit": 30},
    "loop": {"gradient_accumulation_steps": 1},
}
found = compare(
    ["dpo", "ipo"] if SMOKE else ["dpo", "ipo", "kto", "simpo"],
    seeds=1 if SMOKE else 3,
    completions=16 if SMOKE else None,
    output=place / "comparison",
    **(smoke if SMOKE else {}),
    **{"output.report_to": trackers},
)

# %% [markdown]
# ## In words

# %%
for line in (*found.comparison.verdicts, *found.comparison.warnings):
    print(f"- {line}")

# %% [markdown]
# ## The page
#
# The same page lies in the folder as `report.html`; it needs no network and no script. `results.csv` and `results.json`
# hold the same for programs.

# %%
found

# %% [markdown]
# ## Your own plot
#
# Each entry holds its measures as estimates: value, low and high of the 95 % interval over prompts and seeds.

# %%
import matplotlib.pyplot as plt

shown = [one for one in (found.comparison.start, *found.comparison.entries) if "eval/gold_reward" in one.measures]
figure, axes = plt.subplots(figsize=(6, 0.5 * len(shown) + 1.2), layout="constrained")
for row, entry in enumerate(shown):
    gold = entry.measures["eval/gold_reward"]
    axes.errorbar(gold.value, row, xerr=[[gold.value - gold.low], [gold.high - gold.value]], fmt="o", capsize=4)
axes.set_yticks(range(len(shown)), [one.name for one in shown])
axes.invert_yaxis()
axes.set(xlabel="gold reward, -1 to 1", title="With 95 % intervals over prompts and seeds")
plt.show()

# %%
print(Machine.here())
print(f"The page: {found.folder / 'report.html'}")
