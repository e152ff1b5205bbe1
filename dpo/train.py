"""The one loop: examples in, an objective's loss down, checkpoints and a ledger out. It knows no particular loss.

What an optimiser step does is a function of the settings and the step's number: the order of examples comes from
`(seed, epoch)` alone, so that a run resumed from any checkpoint goes on exactly as it would have.
"""

import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field
from tqdm.auto import tqdm

from dpo import checkpoint
from dpo.data import Example
from dpo.errors import TrainingError
from dpo.losses import Objective
from dpo.metrics import Ledger, Row, Sink
from dpo.model.base import LanguageModel
from dpo.model.reference import ReferenceLogps
from dpo.model.views import concatenate, keys, largest_drift, tokens, view
from dpo.types import LossInput, LossOutput

log = logging.getLogger("dpo")

MAX_SKIPPED = 3
"""Optimiser steps in a row without a finite gradient before the run stops."""


class Optimiser(BaseModel):
    """How the trained parameters move."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "rmsprop"] = "adamw"
    """The 8-bit ones are bitsandbytes'."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Shape of the rate after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the optimiser steps in which the rate rises from 0."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient is scaled down to this Euclidean norm."""


class Loop(BaseModel):
    """How long, in which portions, and what is kept on the way."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_train_epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the training examples."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many optimiser steps (null: after the epochs)."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 4
    """Examples (pairs, judgements, ...) in memory at once."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 4
    """Micro-batches in one optimiser step; every example weighs the same, also in a last, smaller batch."""
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples scored at once in evaluation."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Evaluate every so many optimiser steps, and always after the last (null: only then)."""
    save_steps: Annotated[int, Field(ge=1)] = 50
    """Write a checkpoint every so many optimiser steps, and always after the last."""
    save_total_limit: Annotated[int, Field(ge=1)] = 2
    """Checkpoints to keep."""
    seed: int = 0
    """Of the adapter's start, the order of examples and dropout."""


@dataclass(frozen=True)
class Plan:
    """Which examples each optimiser step takes."""

    examples: int
    batch: int
    steps: int

    @classmethod
    def of(cls, loop: Loop, examples: int) -> "Plan":
        """Lay out the steps over `examples` training examples."""
        batch = loop.per_device_train_batch_size * loop.gradient_accumulation_steps
        steps = math.ceil(examples / batch) * loop.num_train_epochs
        return cls(examples, batch, min(steps, loop.max_steps or steps))

    def indices(self, step: int, seed: int) -> list[int]:
        """Return the examples of optimiser step `step` (from 0): a seeded order, drawn anew for every epoch."""
        epoch, within = divmod(step, math.ceil(self.examples / self.batch))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(self.examples, generator=generator).tolist()
        return order[within * self.batch : (within + 1) * self.batch]


@dataclass
class Progress:
    """How far the run is: all that a checkpoint holds beside weights, optimiser and random generators."""

    step: int = 0
    examples_seen: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Optimiser steps without an update, because loss or gradient were not finite."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves in memory."""

    progress: Progress
    evaluated: LossInput | None
    """The log-probs of all held-out examples at the end, or None without any."""


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process.

    Raises:
        TrainingError: another process trains there. A killed one holds nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        with lock:
            yield
    except Timeout as error:
        raise TrainingError(
            f"{folder}: another process is training there. Wait for it, or give another folder with output.dir=."
        ) from error


def train(
    *,
    model: LanguageModel,
    reference: ReferenceLogps,
    objective: Objective,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example],
    optimiser: Optimiser,
    loop: Loop,
    folder: Path,
    identity: Mapping[str, str],
    sinks: Sequence[Sink] = (),
) -> Outcome:
    """Train the policy of `model`, going on from the newest checkpoint in `folder` where there is one.

    Args:
        model: the policy and what stands with it on one base.
        reference: its reference log-probs, shared by all runs from the same start.
        objective: maps a batch's log-probs to its loss.
        train_examples: in the view that `objective` names.
        eval_examples: likewise, held out; may be empty.
        optimiser: how parameters move.
        loop: how long and in which portions.
        folder: of this run: metrics.jsonl, performance.jsonl, checkpoints/.
        identity: what a checkpoint must agree in to be gone on from (hashes of settings and data).
        sinks: where rows are shown beside the ledger.

    Raises:
        CheckpointError: the checkpoints there belong to another run, or are all damaged.
        TrainingError: the policy does not start at its reference, or the numbers stay not finite.
    """
    run = _Run(model, reference, objective, optimiser, loop, folder, identity, Plan.of(loop, len(train_examples)))
    return run.go(train_examples, eval_examples, sinks)


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        model: LanguageModel,
        reference: ReferenceLogps,
        objective: Objective,
        optimiser: Optimiser,
        loop: Loop,
        folder: Path,
        identity: Mapping[str, str],
        plan: Plan,
    ) -> None:
        from accelerate import Accelerator
        from transformers import get_scheduler

        self.model, self.reference, self.objective = model, reference, objective
        self.loop, self.plan, self.folder, self.identity = loop, plan, folder, identity
        self.max_grad_norm = optimiser.max_grad_norm
        self.checkpoints = folder / "checkpoints"
        self.accelerator = Accelerator(
            cpu=model.device.type == "cpu", mixed_precision="fp16" if model.dtype == torch.float16 else "no"
        )
        self.optimizer = self.accelerator.prepare(_build_optimizer(optimiser, model.parameters()))
        self.scheduler = get_scheduler(
            optimiser.lr_scheduler_type,
            self.optimizer.optimizer,
            num_warmup_steps=math.ceil(optimiser.warmup_ratio * plan.steps),
            num_training_steps=plan.steps,
        )
        self.progress = Progress()

    def go(self, train_examples: Sequence[Example], eval_examples: Sequence[Example], sinks: Sequence[Sink]) -> Outcome:
        ledger = Ledger(self.folder)
        if self.objective.needs_reference:
            self.reference.prepare(keys([*train_examples, *eval_examples]), progress=True)
        self._resume()
        ledger.rewind(self.progress.step if self.progress.step else -1)
        if self.progress.step == 0 and self.objective.needs_reference:
            self._check_start(train_examples)
        started = time.monotonic() - self.progress.seconds
        evaluated, skipped_in_a_row = None, 0

        def report(kind: Literal["train", "eval"], values: Mapping[str, float]) -> None:
            self.progress.seconds = time.monotonic() - started
            row = ledger.append(self.progress.step, kind, {**values, **self._axes()})
            _show(row, sinks)

        with tqdm(
            total=self.plan.steps,
            initial=self.progress.step,
            desc=type(self.objective).__name__,
            unit="step",
            disable=None,
        ) as bar:
            while self.progress.step < self.plan.steps:
                began = time.monotonic()
                batch = [train_examples[i] for i in self.plan.indices(self.progress.step, self.loop.seed)]
                values, updated = self._step(batch)
                seconds = time.monotonic() - began
                self.progress.step += 1
                self.progress.examples_seen += len(batch)
                self.progress.tokens_seen += tokens(batch)
                self.progress.skipped += not updated
                skipped_in_a_row = 0 if updated else skipped_in_a_row + 1
                values["train/epoch"] = self.progress.examples_seen / self.plan.examples
                values["time/step_seconds"] = seconds
                values["tokens_per_second"] = tokens(batch) / seconds
                values["memory/peak"] = peak_memory(self.model.device)
                report("train", values)
                bar.set_postfix(
                    loss=f"{values['train/loss']:.4f}", margin=f"{values.get('reward/margin', math.nan):.3f}"
                )
                bar.update()
                if skipped_in_a_row >= MAX_SKIPPED:
                    ledger.close()
                    raise TrainingError(
                        f"{self.folder}: loss or gradient were not finite in {MAX_SKIPPED} optimiser steps in a row up "
                        f"to step {self.progress.step}; none of them changed the weights. The last batch was "
                        f"{', '.join(example.source for example in batch[:4])}, ... Lower optimiser.learning_rate, use "
                        "model.dtype=bfloat16 or float32, or look at these rows."
                    )
                last = self.progress.step == self.plan.steps
                if eval_examples and (
                    last or (self.loop.eval_steps and self.progress.step % self.loop.eval_steps == 0)
                ):
                    evaluated = score(self.model, self.reference, self.objective, eval_examples, self._eval_batch)
                    report("eval", eval_metrics(self.objective(evaluated)))
                if last or self.progress.step % self.loop.save_steps == 0:
                    ledger.sync()  # every row of a step is on disk before its checkpoint
                    self._save()
        ledger.close()
        if eval_examples and evaluated is None:  # resumed behind the last evaluation
            evaluated = score(self.model, self.reference, self.objective, eval_examples, self._eval_batch)
        return Outcome(self.progress, evaluated)

    @property
    def _eval_batch(self) -> int:
        return self.loop.per_device_eval_batch_size

    def _axes(self) -> dict[str, float]:
        return {
            "train/global_step": self.progress.step,
            "train/examples_seen": self.progress.examples_seen,
            "train/tokens_seen": self.progress.tokens_seen,
            "time/seconds": self.progress.seconds,
        }

    def _step(self, batch: Sequence[Example]) -> tuple[dict[str, float], bool]:
        """Do one optimiser step; return its metrics and whether the weights moved."""
        size = self.loop.per_device_train_batch_size
        values: dict[str, float] = {}
        shares: dict[str, float] = {}
        self.model.training(True)
        for start in range(0, len(batch), size):
            micro = batch[start : start + size]
            share = len(micro) / len(batch)  # every example weighs the same, whatever its micro-batch
            out = self.objective(view(self.model, self.reference, self.objective, micro))
            self.accelerator.backward(out.loss * share)
            for name, value in {"train/loss": out.loss.detach(), **out.metrics}.items():
                values[name] = values.get(name, 0.0) + share * value.item()
                shares[name] = shares.get(name, 0.0) + share
        values = {name: value / shares[name] for name, value in values.items()}
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        values["grad_norm"] = math.nan if norm is None else float(norm)
        values["train/learning_rate"] = float(self.scheduler.get_last_lr()[0])
        scaled = self.accelerator.scaler is not None  # float16: an overflow lowers the scale, and is no fault
        updated = scaled or (math.isfinite(values["grad_norm"]) and math.isfinite(values["train/loss"]))
        if updated:
            self.optimizer.step()
        else:
            log.warning(
                "step %d: loss %s, gradient norm %s: no update", self.progress.step + 1, values["train/loss"], norm
            )
        self.optimizer.zero_grad()
        self.scheduler.step()
        return values, updated and math.isfinite(values["train/loss"])

    def _check_start(self, examples: Sequence[Example]) -> None:
        """Refuse a policy that is not its reference before the first update: every objective would start wrong."""
        if not self.model.starts_at_reference:
            return
        batch = [examples[i] for i in self.plan.indices(0, self.loop.seed)][: self.loop.per_device_train_batch_size]
        self.model.training(False)
        with torch.no_grad():
            drift = largest_drift(view(self.model, self.reference, self.objective, batch))
        tolerance = START_TOLERANCE[self.model.dtype]
        log.info("reference: %s; at step 0 within %.1e nats a token", self.model.reference_is, drift)
        if not drift <= tolerance:
            raise TrainingError(
                f"At step 0 the policy differs from its reference by {drift:.3g} nats a token, expected at most "
                f"{tolerance:g}. The reference is {self.model.reference_is}. Something makes them different models: an "
                "adapter that does not start at zero, dropout in the base, or weights changed after loading."
            )

    def _save(self) -> None:
        optimizer, layout = checkpoint.optimizer_tensors(self.optimizer.optimizer)
        state: dict[str, Any] = {
            "progress": vars(self.progress),
            "identity": dict(self.identity),
            "optimizer": layout,
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }
        checkpoint.save(
            self.checkpoints,
            self.progress.step,
            tensors={"optimizer": optimizer, "random": checkpoint.rng_tensors(self.model.device)},
            state=state,
            files=self.model.save,
            keep=self.loop.save_total_limit,
        )

    def _resume(self) -> None:
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            return
        for skipped in found.skipped:
            log.warning("skipped a damaged checkpoint: %s", skipped.reason)
        point = found.checkpoint
        state: Any = point.state
        if different := [key for key in self.identity if state["identity"].get(key) != self.identity[key]]:
            raise checkpoint.CheckpointError(
                f"{point.path}: this checkpoint belongs to a run with other {' and '.join(different)}. Give the "
                "settings and data it was started with, or another folder with output.dir=."
            )
        self.model.restore(point.path)
        checkpoint.restore_optimizer(self.optimizer.optimizer, point.tensors("optimizer"), state["optimizer"])
        self.scheduler.load_state_dict(dict(state["scheduler"]))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(state["scaler"]))
        checkpoint.restore_rng(point.tensors("random"), self.model.device)
        self.progress = Progress(**state["progress"])
        log.info("going on from step %d of %d (%s)", self.progress.step, self.plan.steps, point.path)


START_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest |policy - reference| a token at step 0, in nats: the rounding of different batch shapes, no more."""


def score(
    model: LanguageModel,
    reference: ReferenceLogps,
    objective: Objective,
    examples: Sequence[Example],
    batch_size: int,
) -> LossInput:
    """Score all examples without dropout or gradient, as one record."""
    model.training(False)
    with torch.no_grad():
        parts: list[Any] = [
            view(model, reference, objective, examples[start : start + batch_size])
            for start in range(0, len(examples), batch_size)
        ]
    return concatenate(parts)


def eval_metrics(out: LossOutput) -> dict[str, float]:
    """Return an objective's numbers over held-out examples under their ledger names."""
    return {f"eval/{name}": value.item() for name, value in {"loss": out.loss, **out.metrics}.items()}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by tensors on an accelerator, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _build_optimizer(settings: Optimiser, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)
    if settings.name == "rmsprop":
        return torch.optim.RMSprop(parameters, **common)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    return {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[settings.name](parameters, **common)


def _show(row: Row, sinks: Sequence[Sink]) -> None:
    for sink in sinks:
        sink.log(row)
