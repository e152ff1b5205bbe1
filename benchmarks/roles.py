"""Peak memory of PPO's four roles on one base, beside DPO's on the same base, lengths and completions at once.

    python -m benchmarks.roles

Each run is a process of its own and trains the embedded model on the sentiment pairs that come with it. A step
is of 8 pairs, or of 16 completions with policy and value after sampling 64 with all four roles; both hold at most
TOKENS tokens at once (pairs share their prompt, sampled completions have one each). The peak is that of the
whole process since the stage began (on CUDA that of its tensors), the base included, as `memory/peak` has it.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from dpo.metrics import PERFORMANCE_FILE, read

STEPS = 8
NEW_TOKENS = 40
TOKENS = 800
COMMON = ["data.max_length=192", "data.eval_share=0", f"loop.max_steps={STEPS}", "evaluation.max_prompts=0"]
COMMON += [f"loop.per_device_max_tokens={TOKENS}"]
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Lets glibc give every larger tensor back when it is freed. By itself it keeps freed memory in pieces, and the peak of
a process is what was needed plus what could not be used again: it differs by a tenth from run to run."""


def peak(recipe: str, folder: Path, pairs: Path, given: Sequence[str]) -> float:
    """Train and return the peak of the last stage, in MiB."""
    arguments = ["train", recipe, f"data.train={pairs}", f"output.dir={folder}", *COMMON, *given]
    environment = {**os.environ, **GIVEN_BACK}
    subprocess.run(
        [sys.executable, "-m", "dpo.cli", *arguments], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    last = sorted(folder.rglob(PERFORMANCE_FILE))[-1]
    return max(float(row["memory/peak"]) for row in read(last)) / 2**20


def main() -> None:
    """Measure and print."""
    with (
        tempfile.TemporaryDirectory() as place,
        as_file(files("dpo.data") / "sentiment" / "pairs.jsonl") as pairs,
    ):
        root = Path(place)
        dpo = ["loop.per_device_train_batch_size=8", "loop.gradient_accumulation_steps=1"]
        ppo = [
            "loop.per_device_train_batch_size=16",
            "loop.gradient_accumulation_steps=1",
            "reward.loop.per_device_train_batch_size=8",
            f"evaluation.max_new_tokens={NEW_TOKENS}",
            f"rollout.max_new_tokens={NEW_TOKENS}",
            "rollout.prompts_per_rollout=64",
            "rollout.epochs=1",
        ]
        found = {"dpo": peak("dpo", root / "dpo", pairs, dpo), "ppo": peak("reward_ppo", root / "ppo", pairs, ppo)}
    print(f"At most {TOKENS} tokens at once. DPO: {found['dpo']:.0f} MiB. PPO: {found['ppo']:.0f} MiB.")
    print(f"PPO / DPO: {found['ppo'] / found['dpo']:.2f}")


if __name__ == "__main__":
    main()
