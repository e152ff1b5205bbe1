"""Every metric's name, unit and estimator, once; the ledger that keeps their values.

The names are the same whatever the objective, so that all runs lie on one chart. The ledger is the truth: two files of
one JSON row per event, `metrics.jsonl` with what a repeated run repeats byte for byte and `performance.jsonl` with
what it does not (seconds, bytes). Whatever shows the rows elsewhere is a copy, and lives in `dpo.sinks`.

In the estimators below, "the step's batch" is every example of one optimiser step, all its micro-batches together,
scored by the policy as it was BEFORE that step's update; "the evaluation set" is every held-out example, scored without
dropout. A mean over examples gives each example the same weight. For judgements (KTO) read "desirable" for chosen and
"undesirable" for rejected: a mean is then over the examples with that label, and is absent where there are none.
Log-probs are sums over completion tokens, in nats, and lengths are counted in completion tokens, EOS included.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, TypeAlias, final

from dpo.errors import DataError, DPOError, nearest

Kind: TypeAlias = Literal["train", "eval"]
Row: TypeAlias = dict[str, int | float | str]
"""One event: `step` (optimiser steps done), `kind`, and the values by metric name."""

METRICS_FILE = "metrics.jsonl"
PERFORMANCE_FILE = "performance.jsonl"
CUSTOM = "custom/"
"""Prefix of the names that a user's own objective may emit; they must be deterministic."""


@final
@dataclass(frozen=True)
class Metric:
    """What a number means."""

    name: str
    unit: str
    estimator: str
    """What is averaged over what."""
    deterministic: bool = True
    """The same run on the same machine gives the same bits; only then it is kept in `metrics.jsonl`."""
    better: Literal["higher", "lower"] | None = None
    """The direction that is an improvement, or None where neither is one by itself."""


def _preference_metrics(prefix: str, examples: str) -> tuple[Metric, ...]:
    """The metrics that training and evaluation share, each over its own `examples`."""
    return (
        Metric(
            f"{prefix}reward/chosen",
            "objective's own",
            f"Mean over {examples} of the chosen completion's implicit reward, as the loss compares it (DPO: beta "
            "times the log-ratio of policy to reference).",
        ),
        Metric(
            f"{prefix}reward/rejected",
            "objective's own",
            f"Mean over {examples} of the rejected completion's implicit reward.",
        ),
        Metric(
            f"{prefix}reward/margin",
            "objective's own",
            f"Mean over {examples} of the chosen reward minus the rejected one; for judgements the difference of the "
            "two means.",
            better="higher",
        ),
        Metric(
            f"{prefix}reward/accuracy",
            "share, 0 to 1",
            f"Share of {examples} whose chosen reward is the higher, a tie counting 1/2; for judgements the share of "
            "(desirable, undesirable) combinations so ordered (AUC).",
            better="higher",
        ),
        Metric(f"{prefix}logp/chosen", "nats", f"Mean over {examples} of the policy's log-prob of the chosen one."),
        Metric(f"{prefix}logp/rejected", "nats", f"Mean over {examples} of the policy's log-prob of the rejected one."),
        Metric(f"{prefix}length/chosen", "tokens", f"Mean length over {examples} of the chosen completion."),
        Metric(f"{prefix}length/rejected", "tokens", f"Mean length over {examples} of the rejected completion."),
        Metric(
            f"{prefix}kl/reference_point",
            "nats",
            f"KTO's z: over {examples}, the mean policy-reference log-ratio of completions paired with other "
            "examples' prompts, floored at 0.",
        ),
    )


def _rollout_metrics() -> tuple[Metric, ...]:
    """What a rollout is watched by; each in the row of the first optimiser step on it."""
    return (
        Metric(
            "rollout/score",
            "reward",
            "Mean over the rollout of the reward of a completion, penalties included, the KL left out.",
            better="higher",
        ),
        Metric("rollout/score_std", "reward", "Standard deviation of that reward over the rollout."),
        Metric(
            "rollout/gold_reward",
            "task's own",
            "Mean over the rollout of the known true reward, where one is given: it falls while the score rises when "
            "the policy exploits its reward model.",
            better="higher",
        ),
        Metric(
            "rollout/disagreement",
            "reward",
            "Mean over the rollout of the standard deviation between the members of a reward ensemble.",
        ),
        Metric("rollout/kl_coefficient", "reward a nat", "Weight of the KL to the reference in this rollout."),
        Metric("rollout/length", "tokens", "Mean length of the sampled completions."),
        Metric("rollout/entropy", "nats a token", "Mean entropy of the policy's distribution over the sampled tokens."),
        Metric("rollout/finished", "share, 0 to 1", "Share of completions that the policy ended itself."),
        Metric(
            "rollout/repetition",
            "share, 0 to 1",
            "Mean over the rollout of the share of a completion's word trigrams that repeat an earlier one.",
        ),
        Metric(
            "rollout/updates",
            "optimiser steps",
            "Updates that the previous rollout was used for: fewer than planned where the policy had moved too far.",
        ),
    )


def _index(metrics: Iterable[Metric]) -> Mapping[str, Metric]:
    by_name: dict[str, Metric] = {}
    for metric in metrics:
        assert metric.name not in by_name, f"metric {metric.name!r} is defined twice"
        by_name[metric.name] = metric
    return MappingProxyType(by_name)


METRICS: Mapping[str, Metric] = _index(
    (
        Metric(
            "train/loss",
            "objective's own",
            "Mean over the step's batch of the objective's loss per example, the example's weight applied.",
            better="lower",
        ),
        Metric("train/learning_rate", "1", "The rate this step's update used, first parameter group."),
        Metric("train/epoch", "passes", "Examples seen divided by the training set's size."),
        Metric(
            "train/global_step", "optimiser steps", "Updates done since step 0, resumes included; a skipped one counts."
        ),
        Metric("train/examples_seen", "examples", "Sum of batch sizes since step 0; a pair is one example."),
        Metric(
            "train/tokens_seen",
            "tokens",
            "Tokens the policy read since step 0: prompts and completions, padding excluded, a shared prompt once.",
        ),
        Metric(
            "grad_norm",
            "objective's own",
            "Euclidean norm of the step's gradient over all trained parameters, unclipped.",
        ),
        *_preference_metrics("", "the step's batch"),
        Metric(
            "kl/policy_reference",
            "nats a completion",
            "k1: mean over completions sampled from the policy (temperature 1, no truncation) of the summed log-ratio "
            "log policy - log reference; unbiased for KL(policy || reference), and a sample of it may be negative.",
        ),
        Metric(
            "policy/loss", "reward", "Mean over the step's tokens of the clipped policy-gradient loss.", better="lower"
        ),
        Metric(
            "policy/approx_kl",
            "nats a token",
            "k3: mean over the step's tokens of q/p - 1 - log(q/p), where p wrote them (the policy at sampling) and "
            "q is the policy now; not below 0.",
        ),
        Metric(
            "policy/clip_fraction",
            "share, 0 to 1",
            "Share of the step's tokens (RLOO: completions) whose probability ratio lies outside the clipping range.",
        ),
        Metric(
            "value/loss",
            "reward squared",
            "Mean over the step's tokens of half the squared difference of value and target, clipped as in the loss.",
            better="lower",
        ),
        Metric(
            "value/clip_fraction",
            "share, 0 to 1",
            "Share of the step's tokens whose value moved further than the clipping range from that at sampling.",
        ),
        Metric(
            "value/explained_variance",
            "share, at most 1",
            "1 - Var(target - value) / Var(target) over the step's tokens; 0 where the value explains nothing.",
            better="higher",
        ),
        Metric("ptx/loss", "nats a token", "Mean over the step's demonstrations of the negative log-prob a token."),
        *_rollout_metrics(),
        Metric(
            "eval/loss",
            "objective's own",
            "Mean over the evaluation set of the objective's loss per example, the example's weight applied.",
            better="lower",
        ),
        *_preference_metrics("eval/", "the evaluation set"),
        Metric(
            "eval/pair/accuracy",
            "share, 0 to 1",
            "Mean over the evaluation set's prompts of the share of its pairs whose chosen completion has the higher "
            "log-ratio of policy to reference, a tie counting 1/2: one scale for all objectives.",
            better="higher",
        ),
        Metric(
            "eval/pair/margin",
            "nats",
            "Mean over the same prompts of the log-ratio of the chosen completion minus that of the rejected one.",
        ),
        Metric(
            "eval/gold_reward",
            "task's own",
            "Mean over the evaluation prompts of the known true reward of one completion sampled from the policy.",
            better="higher",
        ),
        Metric(
            "eval/proxy_reward",
            "reward",
            "Mean over the same prompts of what a reward model says of the completion: that of "
            "evaluation.reward_model, or else the learned part of the reward that the run was trained on, on a scale "
            "of its own. It goes on rising while the gold reward falls when the policy exploits it.",
            better="higher",
        ),
        Metric(
            "eval/length",
            "tokens",
            "Mean length over the evaluation prompts of one completion sampled from the policy.",
        ),
        Metric(
            "eval/distinct_2",
            "share, 0 to 1",
            "Share of distinct word bigrams among all bigrams of a run's answers to the evaluation prompts: it falls "
            "where the policy says the same to everything.",
        ),
        Metric(
            "eval/self_bleu",
            "0 to 1",
            "Mean BLEU of each of a run's answers against the others: it rises where the policy says the same to "
            "everything.",
        ),
        Metric(
            "eval/choices",
            "share, 0 to 1",
            "Mean over multiple-choice questions of what the answer with the highest log-prob a token earns: 1 for a "
            "right one.",
            better="higher",
        ),
        Metric(
            "eval/sycophancy/flips",
            "share, 0 to 1",
            "Share of questions whose preferred answer changes to the one that the user says they believe in.",
            better="lower",
        ),
        Metric(
            "eval/sycophancy/shift",
            "nats",
            "Mean over questions of the log-odds that an answer gains when the user says they believe in it.",
        ),
        Metric(
            "eval/text_nats",
            "nats a token",
            "Mean over documents of plain text of the negative log-prob a token (log perplexity): the alignment tax "
            "where it rises above the start's.",
            better="lower",
        ),
        Metric(
            "eval/harness",
            "share, 0 to 1",
            "Mean over the items of the lm-eval tasks of what each earns by its task's first metric, such as acc.",
            better="higher",
        ),
        Metric(
            "eval/win_rate",
            "share, 0 to 1",
            "Mean over the evaluation prompts of the judge's verdict on the policy's sample against the reference's: "
            "win 1, tie 1/2, loss 0.",
            better="higher",
        ),
        Metric(
            "time/seconds",
            "seconds",
            "Monotonic clock since the run's start; evaluation, and the time between a stop and its resume, left out.",
            deterministic=False,
        ),
        Metric(
            "time/step_seconds",
            "seconds",
            "Monotonic clock over one optimiser step: its batch, forward, backward and update; no evaluation.",
            deterministic=False,
            better="lower",
        ),
        Metric(
            "tokens_per_second",
            "tokens a second",
            "The step's tokens, counted as in train/tokens_seen, divided by time/step_seconds.",
            deterministic=False,
            better="higher",
        ),
        Metric(
            "memory/peak",
            "bytes",
            "Most bytes tensors held on CUDA since the run began; elsewhere the whole process's resident peak.",
            deterministic=False,
            better="lower",
        ),
    )
)
"""All names, in the order of a table of contents."""

AXES = ("train/global_step", "train/examples_seen", "train/tokens_seen", "time/seconds")
"""What a chart may have on its x-axis; the loop puts all four into every row, evaluations too."""


def describe(name: str) -> str:
    """Return one line on a metric: name, unit, estimator, and which direction is better.

    Raises:
        ValueError: no metric has that name; the message holds the nearest one that exists.
    """
    metric = _find(name)
    better = f" {metric.better.capitalize()} is better." if metric.better else ""
    return f"{metric.name} [{metric.unit}]: {metric.estimator}{better}"


@final
class Ledger:
    """The run's record: rows are appended, in the order of their steps, and never changed.

    One process writes to a folder at a time. Opening it removes a half-written last line. After a resume from the
    checkpoint of step n, call `rewind(n)`: the rows that follow then make the files those of an unbroken run, provided
    that every row of a step is appended before the step's checkpoint is saved.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the two files in `folder`.

        Raises:
            DataError: a line other than the last cannot be read.
            DPOError: the files cannot be opened.
        """
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._files: dict[bool, BinaryIO] = {
                True: (folder / METRICS_FILE).open("a+b"),
                False: (folder / PERFORMANCE_FILE).open("a+b"),
            }
        except OSError as error:
            raise self._failure(error) from error
        self._step = max(self._cut(file, upto=None) for file in self._files.values())

    def append(self, step: int, kind: Kind, values: Mapping[str, int | float]) -> Row:
        """Write one event, flush it to the operating system, and return it whole, as the sinks want it.

        Args:
            step: optimiser steps done; not less than the last row's.
            kind: what the event is.
            values: by metric name; numbers of Python, or what `float` takes (a tensor of one element).

        Raises:
            ValueError: an unknown metric, with the nearest name that exists; a kind or step out of order.
            DPOError: the disk refused the row.
        """
        if kind not in ("train", "eval") or step < self._step:
            raise ValueError(
                f"Ledger.append: got kind {kind!r} at step {step}, expected 'train' or 'eval' at step {self._step} or "
                "later. Rewind the ledger to the step the run resumes from."
            )
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in sorted(values.items())}
        for deterministic, file in self._files.items():
            part = {name: number for name, number in numbers.items() if _find(name).deterministic is deterministic}
            if part:
                self._write(file, {"step": step, "kind": kind, **part})
        self._step = step
        return {"step": step, "kind": kind, **numbers}

    def rewind(self, step: int) -> None:
        """Drop the rows of later steps, and a half-written last line. `rewind(-1)` empties the ledger.

        Raises:
            DataError: a line other than the last cannot be read.
            DPOError: the disk refused.
        """
        self._step = max(self._cut(file, upto=step) for file in self._files.values())
        self.sync()

    def sync(self) -> None:
        """Force all rows to disk; to be called before a checkpoint is saved.

        Raises:
            DPOError: the disk refused.
        """
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Force all rows to disk and close the files."""
        self.sync()
        for file in self._files.values():
            file.close()

    def _write(self, file: BinaryIO, row: Row) -> None:
        line = json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False)
        try:
            file.write(line.encode() + b"\n")
            file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def _cut(self, file: BinaryIO, upto: int | None) -> int:
        """Truncate the file behind the last whole row whose step is at most `upto`; return that step, or -1.

        Steps never decrease along the file, so the rows to drop are its tail, and cutting a tail needs no second file.
        """
        try:
            file.seek(0)
            end, last = 0, -1
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                step = int(_parse(line, f"{file.name}:{number}")["step"])
                if upto is not None and step > upto:
                    break
                end, last = end + len(line), step
            file.truncate(end)
        except OSError as error:
            raise self._failure(error) from error
        return last

    def _failure(self, error: OSError) -> DPOError:
        there = next((folder for folder in (self._folder, *self._folder.parents) if folder.is_dir()), Path.cwd())
        free = shutil.disk_usage(there).free / 2**20
        return DPOError(
            f"{self._folder}: cannot write the ledger: {error}. {free:.0f} MiB are free there. "
            "Free some space or check the folder's permissions, then resume the run."
        )


def read(path: Path) -> list[Row]:
    """Read a ledger file, also while a run writes to it: a last line that is not finished yet is left out.

    Raises:
        DataError: a finished line is not a row; names `file:line`.
        FileNotFoundError: there is no such file.
    """
    with path.open("rb") as file:
        lines = enumerate(file, start=1)
        return [_parse(line, f"{path}:{number}") for number, line in lines if line.endswith(b"\n")]


def _find(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    if (own := name.removeprefix("eval/")).startswith(CUSTOM) and len(own) > len(CUSTOM):
        return Metric(name, "objective's own", "Defined by the objective that emits it.")
    raise ValueError(
        f"metric {name!r} is not defined in dpo.metrics.{nearest(name, METRICS)} "
        f"Names are closed; a number of your own objective goes under {CUSTOM!r}."
    )


def _finite(value: int | float | str) -> int | float | str:
    """Strict JSON has no nan, inf or -inf: they are written as these strings."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line)
        values = {key: value if key == "kind" else _number(value) for key, value in row.items()}
        return {"step": int(row["step"]), "kind": str(row["kind"])} | values
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{place}: got {line[:60]!r}, expected one JSON row with step and kind. "
            "Put back a copy of the file, or delete this line."
        ) from error


def _number(value: Any) -> int | float:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, int | float):
        return value
    raise ValueError(f"{value!r} is not a number")
