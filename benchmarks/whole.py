"""A whole comparison beside the peer's way to it: three separate runs of TRL's trainers.

    python -m benchmarks.whole --data PAIRS.jsonl

Wall-clock, in one run, of `dpo compare --objectives dpo,ipo,kto` (load, reference, training, held-out measures, report)
and of three scripts with TRL's DPOTrainer (sigmoid and IPO) and KTOTrainer (load, training, held-out loss), each a
process of its own, on the same pairs, split, steps, LoRA and batch. TRL has its best settings for the machine: no
gradient checkpointing, weights in bfloat16 without autocast, reference log-probs precomputed where it can.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scenarios import SEED
from benchmarks.step import DATA
from benchmarks.workers import BETA, LORA, RATE
from dpo.data import DataConfig, check
from dpo.model.embedded import fetch_embedded

STEPS = 12
PAIRS_A_STEP = 4
MAX_LENGTH = 512
ROWS = 240
PEER = ("dpo", "ipo", "kto")


def ours(train: Path, held_out: Path, model: str, steps: int, folder: Path) -> None:
    """Compare with this package, on the command line."""
    given = [
        f"data.train={train}",
        f"data.eval={held_out}",
        f"data.max_length={MAX_LENGTH}",
        f"model.name={model}",
        "model.dtype=bfloat16",
        f"model.lora.r={LORA.r}",
        f"model.lora.alpha={LORA.alpha}",
        f"optimiser.learning_rate={RATE}",
        "optimiser.lr_scheduler_type=constant_with_warmup",
        "optimiser.warmup_ratio=0",
        "loop.gradient_accumulation_steps=1",
        "evaluation.max_prompts=0",
    ]
    completions = 2 * PAIRS_A_STEP * steps
    command = ["-m", "dpo.cli", "compare", "--objectives", ",".join(PEER), "--completions", str(completions)]
    _run([*command, "--output", str(folder), *given])


def peer(objective: str, train: Path, held_out: Path, model: str, steps: int) -> None:
    """Train one objective with TRL and score the held-out part, as a script of a user would."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    shared = {
        "beta": 0.5 if objective == "ipo" else BETA,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "max_length": MAX_LENGTH,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "bf16": False,
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }
    lora = LoraConfig(
        r=LORA.r, lora_alpha=int(LORA.alpha), lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    sides = [[json.loads(line) for line in file.read_text().splitlines()] for file in (train, held_out)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        if objective == "kto":
            from trl.trainer.kto_config import KTOConfig
            from trl.trainer.kto_trainer import KTOTrainer

            rows = [[_judged(row, key) for row in side for key in ("chosen", "rejected")] for side in sides]
            config: Any = KTOConfig(output_dir=folder, per_device_train_batch_size=2 * PAIRS_A_STEP, **shared)
            kind: Any = KTOTrainer
        else:
            from trl.trainer.dpo_config import DPOConfig
            from trl.trainer.dpo_trainer import DPOTrainer

            rows = sides
            loss = ["ipo"] if objective == "ipo" else ["sigmoid"]
            config = DPOConfig(output_dir=folder, per_device_train_batch_size=PAIRS_A_STEP, loss_type=loss, **shared)
            kind = DPOTrainer
        trainer = kind(
            model=network,
            args=config,
            train_dataset=Dataset.from_list(rows[0]),
            eval_dataset=Dataset.from_list(rows[1]),
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.train()
        print(objective, trainer.evaluate())


def _judged(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}


def _write_pairs(data: str, folder: Path, steps: int) -> tuple[Path, Path]:
    """Write the same pairs for both sides, in the conversational form that TRL documents: one epoch of `steps` steps.

    More pairs than are trained on would cost TRL reference log-probs that nobody reads.
    """
    checked = check(DataConfig.model_validate({"train": data, "eval_share": 0.1, "limit": ROWS}))
    files = []
    for name, records in (("train", checked.train[: steps * PAIRS_A_STEP]), ("held_out", checked.eval)):
        rows = [
            {
                "prompt": [{"role": turn.role, "content": turn.content} for turn in pair.prompt],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
            for record in records
            for pair in record.pairs()
        ]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files.append(file)
    return files[0], files[1]


def _run(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="pairs (default: the HH-RLHF pairs in ../shared/data)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of each run")
    parser.add_argument("--peer", nargs=3, metavar=("OBJECTIVE", "TRAIN", "HELD_OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    model = str(fetch_embedded())
    if given.peer:
        objective, train, held_out = given.peer
        peer(objective, Path(train), Path(held_out), model, given.steps)
        return
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        train, held_out = _write_pairs(given.data or str(DATA), Path(place), given.steps)
        for objective in PEER:
            began = time.monotonic()
            steps = ["--steps", str(given.steps)]
            _run(["-m", "benchmarks.whole", *steps, "--peer", objective, str(train), str(held_out)])
            seconds[f"TRL {objective}"] = time.monotonic() - began
        began = time.monotonic()
        ours(train, held_out, model, given.steps, Path(place) / "comparison")
        seconds["dpo compare"] = time.monotonic() - began
    total = sum(value for name, value in seconds.items() if name.startswith("TRL"))
    for name, value in seconds.items():
        print(f"{name:12} {value:7.1f} s")
    print(f"TRL, all three: {total:.1f} s; ours / TRL: {seconds['dpo compare'] / total:.3f}")


if __name__ == "__main__":
    main()
