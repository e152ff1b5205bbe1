"""Kill a training process at random moments: is a save ever lost, does a start ever fail, do the bits stay the same?

    python -m benchmarks.kills --kills 200

A random model of some 45,000 weights is trained with a checkpoint after every optimiser step. One process imports
everything and forks a child for every start, which is killed with signal 9 while it starts, steps, saves or prunes.
Whenever a run comes to its end, it is compared with an unbroken one, byte for byte, and the next begins.
"""

import argparse
import logging
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPARED = ("adapter/adapter_model.safetensors", "metrics.jsonl")
"""And the optimizer of the last checkpoint."""

ENOUGH_FAILED = 5
"""Starts that fail before the rest is not tried any more."""

PATIENCE = 300
"""Seconds after which a start that is not over counts as failed."""


@dataclass
class Tally:
    """What was seen."""

    kills: int = 0
    finished: int = 0
    """Runs that came to their end."""
    lost: int = 0
    """Kills after which the newest checkpoint was an older one than before."""
    damaged: int = 0
    """Checkpoints that did not verify after a kill."""
    failed: int = 0
    """Starts that ended with an error."""
    unequal: int = 0
    """Finished runs whose bytes are not those of the unbroken one."""

    def lines(self) -> list[str]:
        """Say it."""
        return [
            f"{self.kills} kills over {self.finished} finished runs",
            f"checkpoints lost: {self.lost}; damaged: {self.damaged}; starts that failed: {self.failed}",
            f"finished runs that are not bit-equal to the unbroken one: {self.unequal}",
        ]

    @property
    def sound(self) -> bool:
        """Whether nothing was lost."""
        return not (self.lost or self.damaged or self.failed or self.unequal)


def start(work: Callable[[], object]) -> int:
    """Fork a child that does `work` and ends; return its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # whatever it is, the child must not go on as a second parent
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def ended(child: int, seconds: float) -> int | None:
    """Wait for a child at most so long; return its status, or None where it still runs."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def soak(train: Callable[[Path], object], home: Path, kills: int, longest: float, seed: int) -> Tally:
    """Kill starts of `train(folder)` until there were so many kills; each is left at most `longest` seconds."""
    whole, tally, draw = home / "whole", Tally(), random.Random(seed)
    if ended(start(lambda: train(whole)), PATIENCE) != 0:
        raise SystemExit("the unbroken run failed: nothing to compare with")
    while tally.kills < kills and tally.failed < ENOUGH_FAILED:
        _soak_one(train, home / f"run-{tally.finished + tally.failed}", whole, kills, longest, draw, tally)
        print(f"{tally.kills} kills, {tally.finished} runs finished", flush=True)
    return tally


def _soak_one(
    train: Callable[[Path], object], folder: Path, whole: Path, kills: int, longest: float, draw: random.Random,
    tally: Tally,
) -> None:  # fmt: skip
    """Bring one run to its end, killing it on the way."""
    from dpo import checkpoint

    step = -1
    while True:
        child = start(lambda: train(folder))
        enough = tally.kills >= kills
        status = ended(child, PATIENCE if enough else draw.uniform(0.02, longest))
        if status is None:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)  # it may have come to its end a moment before
        if status == 0:
            tally.finished += 1
            tally.unequal += not same(folder, whole)
            return
        if enough or not os.WIFSIGNALED(status):
            tally.failed += 1
            return
        tally.kills += 1
        found = checkpoint.newest(folder / "checkpoints")
        now = -1 if found is None else found.checkpoint.step
        tally.lost += now < step
        tally.damaged += 0 if found is None else len(found.skipped)
        step = now


def same(folder: Path, whole: Path) -> bool:
    """Compare what a run leaves, byte for byte."""
    (last,) = sorted(whole.glob("checkpoints/step-*"))[-1:]
    names = (*COMPARED, f"checkpoints/{last.name}/optimizer.safetensors")
    return all((folder / name).read_bytes() == (whole / name).read_bytes() for name in names)


def make_model(folder: Path) -> None:
    """Write a random Llama and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), bos_token_id=0, eos_token_id=1, **shape))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(home: Path, steps: int) -> Callable[[Path], Any]:
    """Make model and data, and return what trains in a folder; nothing but forks may follow a backward pass."""
    import json

    import accelerate  # noqa: F401  (imported once here, not in every child)
    import peft  # noqa: F401
    import torch

    from dpo import recipes
    from dpo.data import check
    from dpo.model.base import load_base
    from dpo.run import execute, quiet_libraries
    from dpo.settings import plan, read_overrides

    torch.set_num_threads(1)
    quiet_libraries()
    make_model(home / "model")
    rows = [{"prompt": f"Number {n}?", "chosen": f"It is {n}.", "rejected": f"Not {n + 1}."} for n in range(30)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = [f"data.train={home / 'pairs.jsonl'}", "data.eval_share=0", f"model.name={home / 'model'}"]
    given += ["model.dtype=float32", "model.device=cpu", "model.lora.dropout=0.1", "evaluation.max_prompts=0"]
    given += [f"loop.max_steps={steps}", "loop.num_train_epochs=1000000", "loop.save_steps=1"]
    given += ["loop.per_device_train_batch_size=2", "loop.gradient_accumulation_steps=1"]
    (run,) = plan(recipes.find("dpo"), read_overrides(given))
    base, checked = load_base(run.model), check(run.data)
    return lambda folder: execute([run.override({"output": {"dir": str(folder)}})], "kills", base, checked)


def main(arguments: Sequence[str] | None = None) -> None:
    """Soak and say what was seen; exit with 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of a run")
    parser.add_argument("--longest", type=float, default=1.2, help="seconds that a start is left at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(arguments)
    os.environ |= {"TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    logging.getLogger("dpo").setLevel(logging.ERROR)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        os.environ["DPO_LAB_CACHE"] = str(Path(place) / "cache")
        tally = soak(prepare(Path(place), given.steps), Path(place), given.kills, given.longest, given.seed)
    print("\n".join(tally.lines()))
    print(f"{time.monotonic() - began:.0f} s")
    raise SystemExit(0 if tally.sound else 1)


if __name__ == "__main__":
    main()
