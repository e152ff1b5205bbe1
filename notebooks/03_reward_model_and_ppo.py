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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpo-lab/dpo-lab/blob/main/notebooks/03_reward_model_and_ppo.ipynb)
#
# # A reward model, and PPO through it
#
# The loop of RLHF on one card: a reward model learns from the comparisons, then the policy writes answers, has them judged
# and learns from that. Policy, reference, reward and value are adapters on one base in memory.

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
# ## What it will take
#
# The plan is made before anything is loaded. A 135M model fits anywhere; try an 8B model in NF4 on a 24 GB card.

# %%
from importlib.resources import files

task = files("dpo.data") / "sentiment"
pairs = str(task / "pairs.jsonl")
plan = [sys.executable, "-m", "dpo.cli", "train", "reward_ppo", f"data.train={pairs}", "--plan", "--gpu", "16GB"]
print(subprocess.run(plan, capture_output=True, text=True, check=True).stdout)

# %% [markdown]
# ## Train both stages
#
# Settings under a stage's name (`reward`, `ppo`) go to it alone. PPO is watched by the gold reward as well, the true one
# here: a policy that only pleases the reward model would show.

# %%
from dpo.api import train

before = Machine.here()
ppo = train(
    "reward_ppo",
    data={"train": pairs, "eval_share": 0.1, "max_length": 192, "limit": 24 if SMOKE else None},
    evaluation={
        "gold": "dpo.data.gold:sentiment",
        "prompts": str(task / "eval_prompts.txt"),
        "max_prompts": 2 if SMOKE else 60,
        "max_new_tokens": 8 if SMOKE else 40,
        "sample_steps": 1 if SMOKE else 16,
    },
    reward={
        "optimiser": {"learning_rate": 5e-4},
        "loop": {"max_steps": 1 if SMOKE else 96, "num_train_epochs": 1000, "gradient_accumulation_steps": 1},
    },
    ppo={
        "optimiser": {"learning_rate": 3e-4},
        "objective": {"kl_coefficient": 0.02},
        "loop": {"max_steps": 2 if SMOKE else 64, "num_train_epochs": 1000, "gradient_accumulation_steps": 1},
        "rollout": {
            "prompts_per_rollout": 8 if SMOKE else 64,
            "epochs": 2,
            "max_new_tokens": 8 if SMOKE else 40,
        },
    },
    **keep,
)
print(before)
print(Machine.here())
print(f"peak memory of the second stage: {ppo.summary['memory_peak_bytes'] / 2**30:.2f} GiB")

# %% [markdown]
# ## Can the reward model be believed?
#
# Its accuracy on held-out pairs, with its interval. 0.5 is guessing.

# %%
import json

reward_folder = ppo.folder.parent / "1-reward"
judged = json.loads((reward_folder / "summary.json").read_text())["measures"]["eval/reward/accuracy"]
print(f"held-out accuracy {judged['value']:.3f}, 95 % interval {judged['low']:.3f} to {judged['high']:.3f}")

# %%
ppo

# %% [markdown]
# ## The path of the policy
#
# Left: what the policy is paid for in training. Right: the reward model's score of its answers (the proxy) and the gold
# reward of the same answers, against how far it moved. Where the proxy rises and gold falls, the reward model is being
# exploited ([Gao et al. 2023](https://arxiv.org/abs/2210.10760)).

# %%
import matplotlib.pyplot as plt

rows = [json.loads(line) for line in (ppo.folder / "metrics.jsonl").read_text().splitlines()]
sampled = [row for row in rows if "rollout/score" in row]
told = [row for row in rows if "eval/gold_reward" in row]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot([row["step"] for row in sampled], [row["rollout/score"] for row in sampled], marker=".")
left.set(xlabel="optimiser step", ylabel="score", title="Reward of the rollouts")
distance = [max(row["kl/policy_reference"], 0) ** 0.5 for row in told]
for name, label in (("eval/gold_reward", "gold"), ("eval/proxy_reward", "proxy (reward model)")):
    right.plot(distance, [row[name] for row in told], marker="o", label=label)
right.set(xlabel="square root of KL to the start, nats", ylabel="mean reward", title="Gold against proxy")
right.legend()
plt.show()

# %% [markdown]
# ## What it says

# %%
for prompt, answers in zip(ppo.achieved.spoken.prompts[:3], ppo.achieved.spoken.answers, strict=False):
    print(f"{prompt}\n  {answers[0].text!r}\n")
