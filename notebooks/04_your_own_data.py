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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpo-lab/dpo-lab/blob/main/notebooks/04_your_own_data.ipynb)
#
# # Your own data
#
# From rows in any of the known formats to a trained model: what is recognised, what is wrong with which row, and how several
# sets are mixed.

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
# Where Google Drive is mounted (the folder symbol on the left), everything is kept there as well: a session that
# Colab ends costs at most ten minutes, and running the notebook again goes on.

# %%
from pathlib import Path

from dpo.machine import Machine

print(Machine.here())

drive = Path("/content/drive/MyDrive")
keep = {}
if drive.is_dir():
    (drive / "dpo-lab").mkdir(exist_ok=True)
    keep = {"output.mirror": str(drive / "dpo-lab")}

# %% [markdown]
# ## Rows
#
# Put your file beside the notebook and name it here. Without one, a small file is written, with the faults that real
# data has.

# %%
import json

mine = Path("my_preferences.jsonl")
if not mine.exists():
    colours = [
        "red",
        "blue",
        "green",
        "yellow",
        "white",
        "black",
        "grey",
        "brown",
        "orange",
        "pink",
        "violet",
        "golden",
    ]
    rows = [
        {
            "prompt": f"Say something kind about the colour {colour}.",
            "chosen": f"{colour.capitalize()} is warm and lovely, I could look at it all day.",
            "rejected": f"{colour.capitalize()} is an ugly colour.",
        }
        for colour in colours
    ]
    rows.append({"prompt": "Say something.", "chosen": "Well said.", "rejected": "Well said."})  # no difference
    rows.append({"prompt": "Say nothing.", "chosen": "", "rejected": "No."})  # nothing to learn from
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% [markdown]
# ## Check
#
# Every row that is dropped is counted under a reason, with its place. `!dpo data check FILE --html page.html` makes a
# page of it.

# %%
from dpo.data import DataConfig, check

config = DataConfig(train=str(mine), eval_share=0.2, max_dropped_share=0.5)
checked = check(config)
print("\n".join(checked.report.lines()))
print(checked.train[0])

# %% [markdown]
# Columns of other names are named: `data={"train": ..., "columns": {"prompt": "question", "chosen": "good"}}`. Several
# sets are mixed by weight: `data={"train": ..., "mix": [...]}`. README tells all of it.
#
# ## What is in it
#
# Length is the first thing a model learns where the better answer is always the longer one.

# %%
import matplotlib.pyplot as plt

pairs = [pair for record in checked.train for pair in record.pairs()]
chosen = [len(pair.chosen) for pair in pairs]
rejected = [len(pair.rejected) for pair in pairs]
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.hist([chosen, rejected], bins=12, label=["chosen", "rejected"])
axes.set(xlabel="characters", ylabel="completions", title=f"Lengths of {len(pairs)} pairs")
axes.legend()
plt.show()
longer = sum(a > b for a, b in zip(chosen, rejected, strict=True)) / len(pairs)
print(f"the chosen answer is the longer one in {longer:.0%} of the pairs")

# %% [markdown]
# ## Train
#
# The same file trains DPO, which takes pairs, and KTO, which takes judgements: views are made from the records.

# %%
from dpo.api import train

print(Machine.here())
result = train(
    "dpo",
    data={"train": str(mine), "eval_share": 0.2, "max_dropped_share": 0.5},
    loop={"max_steps": 2 if SMOKE else 20, "num_train_epochs": 1000, "gradient_accumulation_steps": 1},
    evaluation={"max_prompts": 2, "max_new_tokens": 8 if SMOKE else 40},
    **{"optimiser.learning_rate": 5e-4},
    **keep,
)
print(Machine.here())
result

# %%
for prompt, answers in zip(result.achieved.spoken.prompts, result.achieved.spoken.answers, strict=True):
    print(f"{prompt}\n  {answers[0].text!r}")
