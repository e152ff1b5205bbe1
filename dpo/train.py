"""The one loop: examples in, an objective's loss down, checkpoints and a ledger out. It knows no particular loss.

What an optimiser step does is a function of the settings and the step's number: the order of examples comes from
`(seed, epoch)` alone, so that a run resumed from any checkpoint goes on exactly as it would have.
"""

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dpo import checkpoint
from dpo.batches import Division, Plan, within_memory
from dpo.data import Example
from dpo.errors import CheckpointError, DPOError, TrainingError
from dpo.losses import MovesReference, Objective
from dpo.metrics import Ledger
from dpo.mirror import Mirror
from dpo.model.base import Base, LanguageModel, Role
from dpo.model.episodes import Item
from dpo.model.reference import Reference, ReferenceLogps
from dpo.model.views import (
    FreshReference,
    by_role,
    concatenate,
    drift,
    examples_in,
    keys,
    log_ratios,
    policy_logps,
    step_fields,
    tokens,
    view,
    with_policy_logps,
)
from dpo.progress import bar
from dpo.sinks import Sink
from dpo.sources import Dataset, Judges, RolloutConfig, Rollouts, Source, refuse_drift
from dpo.stop import Stop, Stopped
from dpo.types import LossInput, LossOutput

log = logging.getLogger("dpo")

MAX_SKIPPED = 3
"""Optimiser steps in a row without a finite gradient before the run stops."""

MAX_SKIPPED_SCALED = 20
"""The same in float16, where overflows are how the loss scale finds its height: 20 halvings of 65,536 end below 1."""

MOVING: Role = "moving"

ROLLOUT = "rollout"
"""The tensors and the state, in a checkpoint, of the rollout that is being learned from."""

STEPS_UNTIL_TIMED = 20
"""Steps that a run of so many seconds is taken for before its first step has shown the pace."""

SECONDS_BETWEEN_LINES = 30
"""Where there is no terminal for a progress bar, a line of the log says so often how far the run is."""


class Optimiser(BaseModel):
    """How the trained parameters move."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "rmsprop"] = "adamw"
    """The 8-bit ones are bitsandbytes'."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    """Peak rate."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Decoupled weight decay."""
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Shape of the rate after warm-up: it falls towards 0, or stays."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the optimiser steps in which the rate rises to its peak."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient is scaled down to this Euclidean norm (.inf: never)."""


class Loop(BaseModel):
    """How long, in which portions, and what is kept on the way."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_train_epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the training examples."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many optimiser steps (null: after the epochs)."""
    max_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Stop after so many seconds of training, evaluation left out (null: after the steps). The rate follows the share
    of the time that is used; how many steps that is depends on the machine, and a resumed run is not the same to the
    bit."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 4
    """Examples (pairs, judgements, ...) in memory at once."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 4
    """Micro-batches in one optimiser step; every example weighs the same, also in a last, smaller batch."""
    per_device_max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Fill memory by tokens instead: micro-batches of at most so many, training and evaluation alike. An optimiser
    step keeps its batch size times accumulation steps examples (null: by the batch sizes)."""
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples scored at once in evaluation."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Evaluate every so many optimiser steps, and always after the last (null: only then)."""
    save_steps: Annotated[int, Field(ge=1)] = 50
    """Write a checkpoint every so many optimiser steps, and always after the last."""
    save_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 10
    """Also write one at the end of the optimiser step in which the last save is so many minutes ago: no more than that
    is lost where a machine is taken away (null: by the steps alone)."""
    save_total_limit: Annotated[int, Field(ge=1)] = 2
    """Checkpoints to keep."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the adapter's start, the order of examples, sampling and dropout."""

    @property
    def batch(self) -> int:
        """Examples of one optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def learning_rate(settings: Optimiser, step: int, steps: int) -> float:
    """Return the rate of optimiser step `step` (from 0) of `steps`.

    A warm-up of w steps takes the shares 1/(w+1), ..., w/(w+1) of the peak, the step after it the peak, and a falling
    shape reaches 0 one step behind the last. The schedulers in common use give the first step a rate of 0: a whole
    batch is computed and nothing learned, in a run of 30 steps as much as 3 % of it.
    """
    warmup = min(round(settings.warmup_ratio * steps), steps - 1)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    passed = (step - warmup) / (steps - warmup)
    shapes = {"cosine": (1 + math.cos(math.pi * passed)) / 2, "linear": 1 - passed, "constant_with_warmup": 1.0}
    return settings.learning_rate * shapes[settings.lr_scheduler_type]


@dataclass
class Progress:
    """How far the run is: all that a checkpoint holds beside weights, optimiser and random generators."""

    step: int = 0
    examples_seen: int = 0
    tokens_seen: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Optimiser steps without an update, because loss or gradient were not finite."""
    skipped_in_a_row: int = 0
    """Of these, the ones that the last step ended with."""
    parts: int = 1
    """What micro-batches are divided by since memory ran out."""
    log_ratio_sum: float = 0.0
    """Sum of the log-ratios of all completions seen, in nats; kept where the objective asks for their mean."""
    log_ratio_count: int = 0
    """Completions in that sum."""

    @property
    def mean_log_ratio(self) -> float:
        """Mean log-ratio of all completions seen, in nats; 0 before the first."""
        return self.log_ratio_sum / max(1, self.log_ratio_count)


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves in memory."""

    progress: Progress
    evaluated: LossInput | None
    """The log-probs of all held-out examples at the end, or None without any."""
    stopped_early: bool = False
    """Whether the KL budget ended the training."""
    unsaved: str | None = None
    """Why not a single checkpoint could be written; None where there is one."""


@final
@dataclass(frozen=True)
class OnPolicy:
    """What a run needs that learns from the policy's own completions."""

    config: RolloutConfig
    judges: Judges
    demonstrations: Sequence[Example] = ()
    """For objectives that ask for them."""


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
    on_policy: OnPolicy | None = None,
    listen: Callable[[], Mapping[str, float]] | None = None,
    listen_steps: int | None = None,
    mirror: Mirror | None = None,
) -> Outcome:
    """Train the policy of `model`, going on from the newest checkpoint in `folder` where there is one.

    Args:
        model: the policy and what stands with it on one base.
        reference: its reference log-probs, shared by all runs from the same start.
        objective: maps a batch's log-probs to its loss.
        train_examples: in the view that `objective` names; with `on_policy` the prompts to sample for.
        eval_examples: in that view, held out; may be empty.
        optimiser: how parameters move.
        loop: how long and in which portions.
        folder: of this run: metrics.jsonl, performance.jsonl, checkpoints/.
        identity: what a checkpoint must agree in to be gone on from (hashes of settings and data).
        sinks: where rows are shown beside the ledger.
        on_policy: how completions are sampled and judged; None trains on the examples themselves.
        listen: measures the policy's own samples, by the ledger's names.
        listen_steps: it is asked every so many optimiser steps, never after the last.
        mirror: told after every save.

    Raises:
        Stopped: SIGTERM or SIGINT came; the step it came in is finished and saved. Not in a thread of its own.
        CheckpointError: the checkpoints there belong to another run, or are all damaged.
        TrainingError: the policy does not start at its reference, or the numbers stay not finite.
    """
    read: list[Example] = []
    if on_policy is None:
        plan = Plan.of(len(train_examples), loop.batch, loop.num_train_epochs, loop.max_steps, loop.seed)
        source: Source = Dataset(train_examples, plan)
        # All that the WHOLE run reads, also after a resume: values depend in their last bits on what was scored
        # together, and a resumed run must find the same ones.
        read = [train_examples[i] for i in sorted({i for step in range(plan.steps) for i in plan.indices(step)})]
    else:
        source = Rollouts(
            model,
            objective,
            on_policy.config,
            train_examples,
            on_policy.demonstrations,
            on_policy.judges,
            batch=loop.batch,
            epochs=loop.num_train_epochs,
            max_steps=loop.max_steps,
            seed=loop.seed,
            division=replace(division(loop, loop.per_device_eval_batch_size, model.base, objective), scored=1),
        )
    run = _Run(model, reference, objective, optimiser, loop, folder, identity, source, listen, listen_steps, mirror)
    return run.go(read, eval_examples, sinks)


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
        source: Source,
        listen: Callable[[], Mapping[str, float]] | None,
        listen_steps: int | None,
        mirror: Mirror | None,
    ) -> None:
        from accelerate import Accelerator

        self.model, self.reference, self.objective = model, reference, objective
        self.settings, self.loop, self.source = optimiser, loop, source
        self.folder, self.identity = folder, identity
        self._listen, self._listen_steps, self._mirror = listen, listen_steps, mirror
        self.checkpoints = folder / "checkpoints"
        self.accelerator = Accelerator(
            cpu=model.device.type == "cpu", mixed_precision="fp16" if model.dtype == torch.float16 else "no"
        )
        self.optimizer = self.accelerator.prepare(_build_optimizer(optimiser, model.parameters()))
        self.progress = Progress()
        self._tried = time.monotonic()
        """When a checkpoint was last written, or could not be."""
        self._unsaved: str | None = None
        """Why the last one could not be."""
        self._kept = False
        """Whether there is a checkpoint to go on from."""
        self._eval_parts = 1
        self._scaled = self.accelerator.scaler is not None  # float16: an overflow lowers the scale, and is no fault
        self._moves = objective if isinstance(objective, MovesReference) else None
        self._compared: Reference = reference
        """Whom training compares the policy with. Evaluation compares it with the reference, as for all objectives."""
        if self._moves is not None:
            self._compared = FreshReference(model, MOVING)
        elif isinstance(source, Rollouts):
            self._compared = FreshReference(model, "reference")

    def go(self, read: Sequence[Example], eval_examples: Sequence[Example], sinks: Sequence[Sink]) -> Outcome:
        """Train; `read` are the examples that are known beforehand."""
        with closing(Ledger(self.folder)) as ledger:
            self._resume()
            ledger.rewind(self.progress.step)
            if scored := [*([] if self._moves else read), *eval_examples] if self.objective.needs_reference else []:
                self.reference.prepare(keys(scored), progress=True)
            if self.progress.step == 0 and self.objective.needs_reference and read:
                self._check_start()
            evaluated = self._advance(eval_examples, ledger, sinks)
        if evaluated is None and eval_examples:  # resumed behind the last evaluation
            evaluated = self._score(eval_examples)
        return Outcome(self.progress, evaluated, self.source.spent, None if self._kept else self._unsaved)

    def _advance(
        self,
        eval_examples: Sequence[Example],
        ledger: Ledger,
        sinks: Sequence[Sink],
    ) -> LossInput | None:
        """Do the steps that are left; return the log-probs of the last evaluation, if there was one."""
        progress, evaluated = self.progress, None
        started, self._tried = time.monotonic() - progress.seconds, time.monotonic()

        def report(kind: Literal["train", "eval"], values: Mapping[str, float]) -> None:
            progress.seconds = time.monotonic() - started
            row = ledger.append(progress.step, kind, {**values, **self._axes()})
            for sink in sinks:
                sink.log(row)

        name, limit = type(self.objective).__name__, self.loop.max_seconds
        with closing(_Voice(name, progress.step, self.source.steps, limit)) as voice, Stop() as stop:
            while progress.step < self.source.steps and not self._time_is_up():
                before = progress.step
                batch, told = self.source.batch(before)
                if self.source.spent:
                    log.warning(
                        "the training ends at step %d of %d: the KL to the reference is %.1f nats a completion, above "
                        "rollout.kl_budget", before, self.source.steps, told["kl/policy_reference"],
                    )  # fmt: skip
                    break
                values = {**told, **self._timed_step(batch)}
                progress.step = self.source.after(before, values.get("policy/approx_kl"))
                report("train", values)
                voice.say(progress.step, progress.seconds, values)
                self._stop_if_stuck(batch)
                last = progress.step == self.source.steps or self._time_is_up()
                measured: dict[str, float] = {}
                began = time.monotonic()
                if eval_examples and (last or _every(self.loop.eval_steps, before, progress.step)):
                    evaluated = self._score(eval_examples)
                    measured |= eval_metrics(self.objective(evaluated))
                if self._listen is not None and not last and _every(self._listen_steps, before, progress.step):
                    measured |= self._listen()
                started += time.monotonic() - began  # the clock is of training
                if measured:
                    report("eval", measured)
                asked = stop.asked  # once: a signal that comes from here on is obeyed after the next step
                if last or asked is not None or self._save_is_due(before):
                    ledger.sync()  # every row of a step is on disk before its checkpoint
                    self._save_if_possible()
                if asked is not None:
                    how = "which is saved" if self._unsaved is None else "which could not be saved"
                    raise Stopped(
                        asked,
                        f"stopped after step {progress.step} of {self.source.steps}, {how}. The same command goes on "
                        "from the last checkpoint.",
                    )
        return evaluated

    def _save_is_due(self, before: int) -> bool:
        minutes = self.loop.save_minutes
        late = minutes is not None and time.monotonic() - self._tried >= 60 * minutes
        return late or _every(self.loop.save_steps, before, self.progress.step)

    def _save_if_possible(self) -> None:
        """Save; a disk that refuses costs this save alone: those before it stay, and the next one is tried in time."""
        try:
            self._save()
        except CheckpointError as error:
            self._unsaved = str(error)
            log.warning("%s The training goes on, and saving is tried again.", error)
        else:
            self._unsaved, self._kept = None, True
            if self._mirror is not None:
                self._mirror.update()
        self._tried = time.monotonic()

    def _time_is_up(self) -> bool:
        return self.loop.max_seconds is not None and self.progress.seconds >= self.loop.max_seconds

    def _steps_expected(self) -> int:
        """Return the steps of the whole run: the plan's, or as many as the time will hold at the pace so far."""
        done, planned = self.progress.step, self.source.steps
        if self.loop.max_seconds is None:
            return planned
        held = round(done * self.loop.max_seconds / self.progress.seconds) if done else STEPS_UNTIL_TIMED
        return min(planned, max(held, done + 1))

    def _timed_step(self, batch: Sequence[Item]) -> dict[str, float]:
        """Do one optimiser step and count what it read; return its metrics."""
        began = time.monotonic()
        values, updated = self._step(batch)
        seconds = time.monotonic() - began
        self.progress.examples_seen += len(batch)
        self.progress.tokens_seen += tokens(batch)
        self.progress.skipped += not updated
        self.progress.skipped_in_a_row = 0 if updated else self.progress.skipped_in_a_row + 1
        return values | {
            "train/epoch": self.progress.examples_seen / self.source.examples,
            "time/step_seconds": seconds,
            "tokens_per_second": tokens(batch) / seconds,
            "memory/peak": peak_memory(self.model.device),
        }

    def _stop_if_stuck(self, batch: Sequence[Item]) -> None:
        limit = MAX_SKIPPED_SCALED if self._scaled else MAX_SKIPPED
        if self.progress.skipped_in_a_row < limit:
            return
        rows = ", ".join(example.source for example in batch[:4])
        raise TrainingError(
            f"{self.folder}: loss or gradient were not finite in {limit} optimiser steps in a row, up to step "
            f"{self.progress.step}; none of them changed the weights. The last batch held {rows}"
            f"{', ...' if len(batch) > 4 else ''}. Look at these rows, lower optimiser.learning_rate, or use "
            "model.dtype=bfloat16 or float32."
        )

    def _score(self, examples: Sequence[Example]) -> LossInput:
        size = self.loop.per_device_eval_batch_size
        limits = division(self.loop, size, self.model.base, self.objective, self._eval_parts)
        mean = self.progress.mean_log_ratio
        record, limits = score(self.model, self.reference, self.objective, examples, limits, mean)
        self._eval_parts = limits.parts
        return record

    def _axes(self) -> dict[str, float]:
        return {
            "train/global_step": self.progress.step,
            "train/examples_seen": self.progress.examples_seen,
            "train/tokens_seen": self.progress.tokens_seen,
            "time/seconds": self.progress.seconds,
        }

    def _step(self, batch: Sequence[Item]) -> tuple[dict[str, float], bool]:
        """Do one optimiser step; return its metrics and whether its numbers were finite."""
        rate = learning_rate(self.settings, self.progress.step, self._steps_expected())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.training(True)
        size = self.loop.per_device_train_batch_size
        limits = division(self.loop, size, self.model.base, self.objective, self.progress.parts)
        (loss, record), limits = within_memory(partial(self._accumulate, batch), batch, limits)
        self.progress.parts = limits.parts
        with torch.no_grad():
            metrics = self.objective(record).metrics  # over the whole step, whatever its micro-batches
        values = {"train/loss": loss, **{name: value.item() for name, value in metrics.items()}}
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        values["grad_norm"] = math.nan if norm is None else float(norm)
        values["train/learning_rate"] = rate
        finite = math.isfinite(values["train/loss"]) and math.isfinite(values["grad_norm"])
        if finite or self._scaled:  # with a scaler, step is what lowers the scale; it leaves the weights by itself
            self.optimizer.step()
        if self._moves and (share := self._moves.share(self.progress.step + 1)):
            self.model.follow(share)
        if finite and self.objective.needs_mean_log_ratio:
            ratios = log_ratios(record)
            self.progress.log_ratio_sum += sum(one.double().sum().item() for one in ratios)
            self.progress.log_ratio_count += sum(map(len, ratios))
        if not finite and not self._scaled:
            log.warning(
                "step %d: loss %s, gradient norm %s: no update; its rows: %s",
                self.progress.step + 1, values["train/loss"], norm, ", ".join(example.source for example in batch),
            )  # fmt: skip
        self.optimizer.zero_grad()
        return values, finite

    def _accumulate(self, batch: Sequence[Item], micro_batches: list[list[int]]) -> tuple[float, LossInput]:
        """Add up the gradient of an optimiser step; return its loss and its record."""
        self.optimizer.zero_grad()
        mean = self.progress.mean_log_ratio
        whole = step_fields(self.model, self._compared, self.objective, batch, micro_batches, mean)
        if self.objective.batch_coupled and len(micro_batches) > 1:
            return self._accumulate_coupled(batch, micro_batches, whole)
        loss, lost, records = 0.0, 0.0, []
        for indices in micro_batches:
            share = len(indices) / len(batch)  # every example weighs the same, whatever its micro-batch
            record: Any = None
            for role, record in self._parts(batch, indices):
                out = self._lose(replace(record, **whole))
                with self.model.role(role):  # with gradient checkpointing, backward runs the role's forward again
                    self.accelerator.backward(out.loss * share)
                lost = share * out.loss.item()
            records.append(record)
            loss += lost
        return loss, replace(concatenate(records, micro_batches), **whole)

    def _parts(self, batch: Sequence[Item], indices: Sequence[int]) -> Iterator[tuple[Role, LossInput]]:
        """Yield each role that learns with the record that carries its gradient; the last record is whole."""
        if self.objective.needs_values:
            yield from by_role(self.model, self.objective, [batch[n] for n in indices])  # pyright: ignore[reportArgumentType]
        else:
            yield self.model.trained[0], self._view(batch, indices)

    def _accumulate_coupled(
        self, batch: Sequence[Item], micro_batches: list[list[int]], whole: Mapping[str, Tensor]
    ) -> tuple[float, LossInput]:
        """Do the same where an example's loss depends on the others: exactly, with a second forward pass.

        The first pass gives the log-probs of all examples, and with them d loss / d log-prob of each; the second
        takes these factors into the weights, one micro-batch at a time (Gao et al., arXiv:2101.06983). Random numbers
        are repeated, so that dropout is the same in both.
        """
        random = checkpoint.rng_tensors(self.model.device)
        with torch.no_grad():
            records = [self._view(batch, indices) for indices in micro_batches]
        record = replace(concatenate(records, micro_batches), **whole)
        leaves = {name: one.clone().requires_grad_() for name, one in policy_logps(record).items()}
        out = self._lose(with_policy_logps(record, leaves))
        factors = dict(
            zip(leaves, torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True), strict=True)
        )
        checkpoint.restore_rng(random, self.model.device)
        for indices in micro_batches:
            again = policy_logps(self._view(batch, indices))
            parts = [
                (logps * factor[indices, : logps.shape[1]] if logps.ndim == 2 else logps * factor[indices]).sum()
                for name, logps in again.items()
                if (factor := factors[name]) is not None
            ]
            self.accelerator.backward(torch.stack(parts).sum())
        return out.loss.item(), record

    def _lose(self, record: LossInput) -> LossOutput:
        """Call the objective, which may be a user's own.

        Raises:
            TrainingError: the call failed, or did not return a scalar and one loss an example.
        """
        from accelerate.utils.memory import should_reduce_batch_size

        name = type(self.objective).__name__
        try:
            out = self.objective(record)
        except DPOError:
            raise
        except Exception as error:
            if should_reduce_batch_size(error):
                raise
            raise TrainingError(
                f"objective {name}: its call failed with {type(error).__name__}: {error}. Mend it; "
                f"dpo.losses.testing.check({name}()) says more, and --debug shows where."
            ) from error
        size = examples_in(record)
        if (got := (tuple(out.loss.shape), tuple(out.losses.shape))) != ((), (size,)):
            raise TrainingError(
                f"objective {name}: got loss and losses of shapes {got[0]} and {got[1]}, expected () and ({size},): "
                f"one loss an example, and their mean. dpo.losses.testing.check({name}()) says more."
            )
        return out

    def _view(self, batch: Sequence[Item], indices: Sequence[int]) -> Any:
        return view(self.model, self._compared, self.objective, [batch[n] for n in indices])

    def _check_start(self) -> None:
        """Refuse a policy that is not its reference before the first update, as far as examples are known by then."""
        if not self.model.starts_at_reference:
            return
        batch: Any = self.source.batch(0)[0][: self.loop.per_device_train_batch_size]
        refuse_drift(self.model, drift(self._score(batch)))

    def _save(self) -> None:
        optimizer, layout = checkpoint.optimizer_tensors(self.optimizer.optimizer)
        sampled, rollout = self.source.state()
        state: dict[str, Any] = {
            "progress": asdict(self.progress),
            "identity": dict(self.identity),
            "optimizer": layout,
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            ROLLOUT: rollout,
        }
        tensors = {"optimizer": optimizer, "random": checkpoint.rng_tensors(self.model.device)}

        def save_policy(folder: Path) -> None:
            for name in self._kept_roles():
                (folder / name).mkdir()
                self.model.save(folder / name, name)

        checkpoint.save(
            self.checkpoints,
            self.progress.step,
            tensors=tensors | ({ROLLOUT: sampled} if sampled else {}),
            state=state,
            files=save_policy,
            keep=self.loop.save_total_limit,
        )

    def _kept_roles(self) -> tuple[Role, ...]:
        return (*self.model.trained, *(() if self._moves is None else (MOVING,)))

    def _resume(self) -> None:
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            return
        for skipped in found.skipped:
            log.warning("skipped a damaged checkpoint: %s", skipped.reason)
        point = found.checkpoint
        state: Any = point.state
        if different := [key for key in self.identity if state["identity"].get(key) != self.identity[key]]:
            raise CheckpointError(
                f"{point.path}: this checkpoint belongs to a run with other {' and '.join(different)}. Give the "
                "settings and data it was started with, or another folder with output.dir=."
            )
        for name in self._kept_roles():
            self.model.restore(point.path / name, name)
        checkpoint.restore_optimizer(self.optimizer.optimizer, point.tensors("optimizer"), state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(state["scaler"]))
        checkpoint.restore_rng(point.tensors("random"), self.model.device)
        if state[ROLLOUT] is not None:
            self.source.restore(point.tensors(ROLLOUT) if ROLLOUT in point.names else {}, state[ROLLOUT])
        self.progress, self._kept = Progress(**state["progress"]), True
        log.info("going on from step %d of %d (%s)", self.progress.step, self.source.steps, point.path)


def division(loop: Loop, size: int, base: Base, objective: Objective, parts: int = 1) -> Division:
    """Return how examples are divided: `size` at once, or by the loop's tokens."""
    scored = {"pairs": 2, "comparisons": 2, "rankings": None}.get(objective.view, 1)
    return Division(size, loop.per_device_max_tokens, base.layout == "padded", scored, parts)


def score(
    model: LanguageModel,
    reference: Reference,
    objective: Objective,
    examples: Sequence[Example],
    limits: Division,
    mean_log_ratio: float,
) -> tuple[LossInput, Division]:
    """Score all examples without dropout or gradient; `mean_log_ratio` is that of the training so far, in nats.

    Returns:
        One record in their order, and the division that memory held.
    """

    def work(batches: list[list[int]]) -> LossInput:
        with torch.no_grad():
            records: list[Any] = [view(model, reference, objective, [examples[n] for n in batch]) for batch in batches]
        whole = step_fields(model, reference, objective, examples, batches, mean_log_ratio)
        return replace(concatenate(records, batches), **whole)

    model.training(False)
    return within_memory(work, examples, limits)


def eval_metrics(out: LossOutput) -> dict[str, float]:
    """Return an objective's numbers over held-out examples under their ledger names."""
    return {f"eval/{name}": value.item() for name, value in {"loss": out.loss, **out.metrics}.items()}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held since the last reset: by tensors on CUDA, by the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak, where the system can: on CUDA and on Linux; elsewhere the peak is the whole process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        try:
            clear.write_text("5")  # proc(5): resets the process's resident peak
        except OSError as error:
            log.debug("the resident peak cannot be reset: %s", error)


def _build_optimizer(settings: Optimiser, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)
    if settings.name == "rmsprop":
        return torch.optim.RMSprop(parameters, **common)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    return {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}[settings.name](parameters, **common)


def _every(steps: int | None, before: int, after: int) -> bool:
    """Tell whether a multiple of `steps` was reached or passed on the way from `before` to `after`."""
    return steps is not None and after // steps > before // steps


@final
class _Voice:
    """Says how far the run is: with a bar on a terminal, else with a line of the log now and then."""

    def __init__(self, name: str, done: int, total: int, seconds: float | None) -> None:
        self._seconds = math.inf if seconds is None else seconds
        self._bar = bar(total=total, done=done, name=name, unit="step")
        self._name, self._done, self._total = name, done, total
        self._began = self._spoke = time.monotonic()
        self._watched: dict[str, float] = {}

    def say(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        loss = values["train/loss"]
        self._watched |= {name: values[name] for name in ("reward/margin", "rollout/score") if name in values}
        name, watched = next(reversed(self._watched.items()), ("reward/margin", math.nan))
        name = name.partition("/")[2]
        if not self._bar.disable:
            self._bar.set_postfix({"loss": f"{loss:.4f}", name: f"{watched:.3f}"})
            self._bar.update(step - self._bar.n)
        elif (now := time.monotonic()) - self._spoke >= SECONDS_BETWEEN_LINES:
            self._spoke = now
            left = (now - self._began) / (step - self._done) * (self._total - step)
            left = max(0.0, min(left, self._seconds - seconds))
            log.info(
                "%s: step %d of %d, loss %.4f, %s %.3f, about %.0f s left",
                self._name, step, self._total, loss, name, watched, left,
            )  # fmt: skip

    def close(self) -> None:
        self._bar.close()
