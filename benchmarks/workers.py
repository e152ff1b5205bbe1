"""The measured side: `python -m benchmarks.workers` reads one job and does its steps, one for every order.

The parent starts it, see `benchmarks.turns`. Every variant trains the same rows in the same order with the same LoRA,
dtype, optimiser and constant learning rate; only what carries out the step differs.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, final

import torch

from benchmarks.scenarios import SEED, batches, from_rows
from benchmarks.turns import Gate, Job
from dpo.data import DataConfig, Example, prepare
from dpo.losses.dpo import DPO
from dpo.metrics import Row
from dpo.model.base import LanguageModel, LoRA, ModelConfig, load_base
from dpo.model.forest import Group
from dpo.model.logprobs import completion_logps
from dpo.model.reference import ReferenceLogps
from dpo.train import Loop, Optimiser, train

RATE = 2e-4
BETA = 0.1
LORA = LoRA(r=16, alpha=32, dropout=0.0, target_modules="all-linear")
DTYPE = "bfloat16"

TRL_BEST: Mapping[str, Any] = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}


def _config(job: Job, layout: str) -> ModelConfig:
    return ModelConfig.model_validate({"name": job.model, "dtype": DTYPE, "lora": LORA, "layout": layout})


def ours(job: Job, gate: Gate, layout: str) -> float:
    """Train with `dpo.train.train`; return the mean loss."""
    config = _config(job, layout)
    base = load_base(config)
    gate.loaded(base.network)
    if job.data is None:
        examples, read = from_rows(job.rows), len(job.rows)
    else:
        prepared = prepare(DataConfig.model_validate(job.data), base.tokenizer, "pairs")
        examples, read = prepared.train, prepared.report.read
    gate.prepared(read, len(examples))
    model = LanguageModel.start(base, config, SEED)
    sink = _TurnSink(gate)
    with tempfile.TemporaryDirectory() as folder:
        train(
            model=model,
            reference=ReferenceLogps(model, Path(folder) / "references"),  # not those of an earlier run
            objective=DPO(beta=BETA),
            train_examples=examples,
            eval_examples=(),
            optimiser=Optimiser(learning_rate=RATE, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.0),
            loop=Loop(
                max_steps=job.steps,
                per_device_train_batch_size=job.batch,
                gradient_accumulation_steps=1,
                save_steps=job.steps + 1,  # only at the end, behind the last turn
                seed=SEED,
            ),
            folder=Path(folder),
            identity={},
            sinks=[sink],
        )
    return sum(sink.losses) / len(sink.losses)


@final
class _TurnSink:
    """Holds the loop at every row of the ledger until it may go on."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.losses: list[float] = []

    def log(self, row: Row) -> None:
        self.losses.append(float(row["train/loss"]))
        self._gate.step_done()

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Nothing to close."""


def ranking(job: Job, gate: Gate, layout: str) -> float:
    """Do forward and backward passes of a K-wise (Plackett-Luce) loss, without an update; return the mean loss."""
    config = _config(job, layout)
    base = load_base(config)
    gate.loaded(base.network)
    examples = from_rows(job.rows)
    gate.prepared(len(job.rows), len(examples))
    model = LanguageModel.start(base, config, SEED)
    model.training(True)
    losses: list[float] = []
    for batch in batches(examples, job.batch):
        loss = _ranking_loss(model, batch)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        losses.append(loss.item())
        gate.step_done()
    return sum(losses) / len(losses)


def _ranking_loss(model: LanguageModel, batch: list[Example]) -> torch.Tensor:
    """Return the mean over prompts of -log P(the order of its completions), best first."""
    groups = [Group(example.prompt, example.completions) for example in batch]
    with model.role("policy") as network:
        scores = BETA * completion_logps(network, model.forest(groups)).sums
    per_prompt = scores.split([len(group.completions) for group in groups])
    return torch.stack([(one.flip(0).logcumsumexp(0).flip(0) - one).sum() for one in per_prompt]).mean()


def trl(job: Job, gate: Gate, settings: Mapping[str, Any]) -> float:
    """Train with the installed TRL's DPOTrainer, its defaults overridden by `settings`; return the mean loss."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Tokenised(DPOTrainer):
        """Takes rows that are token ids already, so that both sides train the very same ones."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.step_done()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, DTYPE), device_map=device)
    with torch.no_grad():  # weights mapped from the file enter memory when they are first read
        network(input_ids=torch.tensor([[1, 2, 3]], device=device))
    gate.loaded(network)
    ordered = list(chain.from_iterable(batches(from_rows(job.rows), job.batch)))
    columns = {
        "prompt_ids": [list(example.prompt) for example in ordered],
        "chosen_ids": [list(example.completions[0]) for example in ordered],
        "rejected_ids": [list(example.completions[1]) for example in ordered],
    }
    gate.prepared(len(job.rows), len(ordered))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Tokenised(
            model=network,
            args=DPOConfig(
                output_dir=folder,
                beta=BETA,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                per_device_train_batch_size=job.batch,
                max_steps=job.steps,
                train_sampling_strategy="sequential",  # the rows stand in the order of our steps
                save_strategy="no",
                use_cpu=device == "cpu",
                report_to="none",
                disable_tqdm=True,
                seed=SEED,
                **settings,
            ),
            train_dataset=Dataset.from_dict(columns),
            processing_class=AutoTokenizer.from_pretrained(job.model),
            peft_config=LoraConfig(
                r=LORA.r,
                lora_alpha=int(LORA.alpha),
                lora_dropout=LORA.dropout,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            callbacks=[Turns()],
        )
        return trainer.train().training_loss


Variant = Callable[[Job, Gate], float]

PAIR_VARIANTS: Mapping[str, Variant] = {
    "ours": partial(ours, layout="auto"),
    "ours-padded": partial(ours, layout="padded"),
    "trl-default": partial(trl, settings={}),
    "trl-best": partial(trl, settings={**TRL_BEST, "bf16": False}),
    "trl-best-autocast": partial(trl, settings={**TRL_BEST, "bf16": True}),
}
"""What can carry out a step on pairs."""

RANKING_VARIANTS: Mapping[str, Variant] = {
    "ours": partial(ranking, layout="auto"),
    "ours-padded": partial(ranking, layout="padded"),
}
"""What can carry out a step on rankings of more than two completions."""


def main() -> None:
    """Do the job that stands in the first line of stdin; answers go to stdout, everything printed to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = Job.read(sys.stdin.readline())
    gate = Gate(job, sys.stdin, answers)
    variants = RANKING_VARIANTS if any(len(row) > 3 for row in job.rows) else PAIR_VARIANTS
    gate.finish(variants[job.variant](job, gate))


if __name__ == "__main__":
    main()
