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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpo-lab/dpo-lab/blob/main/notebooks/01_first_run.ipynb)
#
# # One preference set, three objectives
#
# DPO, IPO and KTO learn from the same preferences, from the same start. The task is controlled sentiment, the first
# experiment of the [DPO paper](https://arxiv.org/abs/2305.18290): the preferences come from a known reward, so what each
# objective truly achieved can be measured. The model is SmolLM2-135M-Instruct.

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
# ## The preferences
#
# One row is a prompt and two answers, one of them preferred. `dpo data check` reads every row, says what is wrong with
# which, and what a dataset looks like before anything trains on it.

# %%
import json
from importlib.resources import files

task = files("dpo.data") / "sentiment"
pairs = str(task / "pairs.jsonl")
print(json.dumps(json.loads(Path(pairs).read_text().splitlines()[0]), indent=2))

# %%
from dpo.data import DataConfig, check

checked = check(DataConfig(train=pairs, eval_share=0.1))
print("\n".join(checked.report.lines()))
print(f"{len(checked.train)} rows to train on, {len(checked.eval)} held out by prompt")

# %% [markdown]
# ## Train
#
# Every objective gets the same rows in the same order, the same number of completions a step, the same evaluation:
# answers to held-out prompts, whose sentiment the gold reward measures from -1 to 1.

# %%
from dpo.api import train

rates = {"dpo": 5e-4, "ipo": 5e-4, "kto": 2.5e-4}
settings = {
    "data": {"train": pairs, "eval_share": 0.1, "max_length": 192, "limit": 24 if SMOKE else None},
    "loop": {"max_steps": 1 if SMOKE else 32, "num_train_epochs": 1000, "gradient_accumulation_steps": 1},
    "evaluation": {
        "gold": "dpo.data.gold:sentiment",
        "prompts": str(task / "eval_prompts.txt"),
        "max_prompts": 2 if SMOKE else 60,
        "samples_per_prompt": 1 if SMOKE else 2,
        "max_new_tokens": 8 if SMOKE else 40,
    },
}
results = {}
for name, rate in rates.items():
    batch = 16 if name == "kto" else 8  # KTO judges single completions: 16 of them are as many as 8 pairs
    own = {"optimiser.learning_rate": rate, "loop.per_device_train_batch_size": batch}
    results[name] = train(name, **settings, **own, **keep)

# %% [markdown]
# A result shows its measures with their 95 % intervals.

# %%
results["dpo"]

# %%
print(Machine.here())
for name, result in results.items():
    print(
        f"{name}: {result.summary['seconds']:.0f} s, peak memory {result.summary['memory_peak_bytes'] / 2**30:.2f} GiB"
    )

# %% [markdown]
# ## What each achieved
#
# More gold reward is better; how far the model moved from its start (KL) is what it cost. The bars are 95 % intervals
# over prompts: where they overlap widely, no objective was shown to be better. One seed and untuned settings decide
# nothing; the next notebook compares in earnest.

# %%
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, result in results.items():
    measures = result.summary["measures"]
    gold, kl = measures["eval/gold_reward"], measures["kl/policy_reference"]
    error = [[gold["value"] - gold["low"]], [gold["high"] - gold["value"]]]
    left.errorbar(kl["value"], gold["value"], yerr=error, fmt="o", capsize=4, label=name)
    accuracy = measures["eval/pair/accuracy"]
    error = [[accuracy["value"] - accuracy["low"]], [accuracy["high"] - accuracy["value"]]]
    right.errorbar(name, accuracy["value"], yerr=error, fmt="o", capsize=4)
left.set(xlabel="KL to the start, nats", ylabel="gold reward", title="What it achieved, and what it cost")
right.axhline(0.5, color="grey", linewidth=0.8)
right.set(ylabel="share", title="Held-out pairs whose better answer became likelier")
left.legend()
plt.show()

# %% [markdown]
# ## What they say

# %%
for n in range(2):
    print(f"\n{results['dpo'].achieved.spoken.prompts[n]}")
    for name, result in results.items():
        print(f"  {name}: {result.achieved.spoken.answers[n][0].text!r}")

# %% [markdown]
# Everything lies in `runs/`: the adapter, all settings (`run.yaml`), every metric (`metrics.jsonl`), a model card
# (`README.md`). `!dpo chat FOLDER` talks to a run beside its start, `!dpo export FOLDER --to my-model` takes it away.

# %%
for name, result in results.items():
    print(f"{name}: {result.folder}")
