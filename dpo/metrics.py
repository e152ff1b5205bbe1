"""Every metric's name, unit and estimator, once; the ledger that keeps them; the sinks that show them.

The names are the same whatever the objective, so that all runs lie on one chart. The ledger is the truth: two files of
one JSON row per event, `metrics.jsonl` with what a repeated run repeats byte for byte and `performance.jsonl` with
what it does not (seconds, bytes). Sinks such as Weights & Biases are copies: one that fails costs the run nothing.

In the estimators below, "the step's batch" is every example of one optimiser step, all its micro-batches together,
scored by the policy as it was BEFORE that step's update; "the evaluation set" is every held-out example, scored without
dropout. A mean over examples gives each example the same weight. For judgements (KTO) read "desirable" for chosen and
"undesirable" for rejected: a mean is then over the examples with that label, and is absent where there are none; over
several micro-batches it is the mean of their values, weighted by their examples.
Log-probs are sums over completion tokens, in nats, and lengths are counted in completion tokens, EOS included.
"""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias, final
from urllib.parse import urlsplit

from dpo.errors import ConfigError, DataError, DPOError, nearest

Kind: TypeAlias = Literal["train", "eval"]
Row: TypeAlias = dict[str, int | float | str]
"""One event: `step` (optimiser steps done), `kind`, and the values by metric name."""
Mode: TypeAlias = Literal["online", "offline", "disabled"]

METRICS_FILE = "metrics.jsonl"
PERFORMANCE_FILE = "performance.jsonl"
CUSTOM = "custom/"
"""Prefix of the names that a user's own objective may emit; they must be deterministic."""

_WANDB_SERVERS = {"api.wandb.ai", "api.forge.coreweave.com"}  # wandb's own, before and since version 0.31
_log = logging.getLogger(__name__)


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
            f"KTO's z: over each micro-batch of {examples}, the mean policy-reference log-ratio of completions paired "
            "with other examples' prompts, floored at 0; then the mean over micro-batches by their examples.",
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
            "eval/loss",
            "objective's own",
            "Mean over the evaluation set of the objective's loss per example, the example's weight applied.",
            better="lower",
        ),
        *_preference_metrics("eval/", "the evaluation set"),
        Metric(
            "eval/gold_reward",
            "task's own",
            "Mean over the evaluation prompts of the known true reward of one completion sampled from the policy.",
            better="higher",
        ),
        Metric(
            "eval/length",
            "tokens",
            "Mean length over the evaluation prompts of one completion sampled from the policy.",
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
            "Monotonic clock since the run's start, the time between a stop and its resume left out.",
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


class Sink(Protocol):
    """Somewhere to show the rows. It may raise: `SafeSink` keeps that away from the run."""

    def log(self, row: Row) -> None:
        """Show one event, the return value of `Ledger.append`."""
        ...

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Add the run's final numbers and close."""
        ...


@final
class SafeSink:
    """A sink that cannot fail: the first exception is reported once, and the sink is closed and left alone."""

    def __init__(self, name: str, build: Callable[[], Sink]) -> None:
        """Build the sink; also a failing `build` is only reported."""
        self._name = name
        self._sink: Sink | None = None
        try:
            self._sink = build()
        except Exception as error:
            self._report(error)

    def log(self, row: Row) -> None:
        """Show one event, or do nothing once the sink has failed."""
        self._attempt(lambda sink: sink.log(row))

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Close the sink, or do nothing once it has failed."""
        self._attempt(lambda sink: sink.finish(summary))

    def _attempt(self, action: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            action(self._sink)
        except Exception as error:
            broken, self._sink = self._sink, None
            self._report(error)
            try:
                broken.finish({})
            except Exception as again:
                _log.debug("%s could not be closed either: %r", self._name, again)

    def _report(self, error: Exception) -> None:
        _log.warning(
            "%s failed and is off for the rest of the run; the run goes on and %s is complete: %s: %s",
            self._name,
            METRICS_FILE,
            type(error).__name__,
            redact_text(str(error)),
        )


@final
class WandbSink:
    """Weights & Biases: one log call per event, never its own step, offline where there is no key.

    `train/global_step` is in every row and is the x-axis, so that the parts of a resumed run join. Of the evaluation
    metrics that have a better direction the summary holds the last value and the best one.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        name: str,
        group: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
        mode: Mode | None = None,
    ) -> None:
        """Start a wandb run.

        Args:
            folder: where wandb puts its own `wandb` folder.
            project: the project, shared by everything that is to be compared.
            name: this run's name.
            group: the comparison it belongs to.
            tags: objective, model and seed.
            config: the resolved run; redacted before wandb sees it.
            mode: None takes WANDB_MODE, else online where there is a key (environment or netrc), else offline.
        """
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            dir=folder.resolve(),  # its service process may stand in another folder
            project=redact_text(project),
            name=redact_text(name),
            group=redact_text(group),
            tags=[redact_text(tag) for tag in tags],
            config=redact(config),
            job_type="train",
            reinit="create_new",  # a run the user has open in the same process is not ours to end
            mode=mode or _wandb_mode(),
            # Without these wandb stores the console, the code, the command line and the host.
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, save_code=False, x_disable_machine_info=True
            ),
        )
        self._run.define_metric("*", step_metric="train/global_step")
        for axis in AXES:
            self._run.define_metric(axis)
        for metric in METRICS.values():
            if metric.better is not None and metric.name.startswith("eval/"):
                best = "max" if metric.better == "higher" else "min"
                self._run.define_metric(metric.name, step_metric="train/global_step", summary=f"last,{best}")

    def log(self, row: Row) -> None:
        """Send one event in one call."""
        values = {name: value for name, value in row.items() if name not in ("step", "kind")}
        self._run.log({**values, "train/global_step": row["step"]})

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Add the final numbers to the summary and close the run; blocks until wandb has written them."""
        self._run.summary.update(redact(summary))
        self._run.finish()


def sinks(
    report_to: Sequence[str],
    *,
    folder: Path,
    project: str,
    name: str,
    group: str,
    tags: Sequence[str],
    config: Mapping[str, Any],
    mode: Mode | None = None,
) -> tuple[Sink, ...]:
    """Build the sinks that `report_to` names ("wandb"; "none" is no sink), each wrapped so that it cannot stop a run.

    Raises:
        ConfigError: an unknown name; the message holds the nearest one that exists.
    """
    builders: dict[str, Callable[[], Sink] | None] = {
        "wandb": lambda: WandbSink(folder, project, name, group, tags, config, mode),
        "none": None,
    }
    for wanted in report_to:
        if wanted not in builders:
            raise ConfigError(
                f"report_to: got {wanted!r}, expected some of {', '.join(builders)}.{nearest(wanted, builders)}"
            )
    return tuple(SafeSink(wanted, build) for wanted in report_to if (build := builders[wanted]) is not None)


_HIDDEN = "[redacted]"
# A key that names a secret. A tokenizer is none, nor is a number under a plural such as max_tokens.
_SECRET_KEY = re.compile(r"tokens?(?!i[sz])|secret|api[_-]?key|password", re.IGNORECASE)
# Hugging Face tokens; the sk-... keys of model vendors; 40 hex digits, as wandb's keys are.
_SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{4,}|sk-[A-Za-z0-9_-]{4,}|[0-9a-f]{40}(?![A-Za-z0-9]))", re.IGNORECASE
)


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy as plain data (dicts, lists, numbers, text) in which every secret reads "[redacted]".

    A value is a secret when its key says so (token, secret, api key, password) unless it is None or a truth value, and
    text is one where it looks like a key. Rather a harmless value too many than a secret too few: a 40-digit commit
    hash goes as well.
    """
    return {str(key): _HIDDEN if _is_secret(str(key), value) else _redacted(value) for key, value in mapping.items()}


def redact_text(text: str) -> str:
    """Return the text with every part that looks like a key replaced by "[redacted]"."""
    return _SECRET_VALUE.sub(_HIDDEN, text)


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(one) for one in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact_text(str(value))


def _is_secret(key: str, value: Any) -> bool:
    named = _SECRET_KEY.search(key)
    if named is None or value is None or isinstance(value, bool):
        return False
    return not (named[0].lower() == "tokens" and isinstance(value, int | float))


def _wandb_mode() -> Mode:
    """WANDB_MODE, else online where there is a key in the environment or in netrc, else offline.

    wandb is not asked: its login answers only after writing the user's settings file and calling its server.
    """
    given = os.environ.get("WANDB_MODE")
    if given in ("online", "offline", "disabled"):
        return given
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname
    try:
        known = netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts
    except (OSError, NetrcParseError) as error:
        _log.debug("no wandb key in netrc: %s", error)
        return "offline"
    return "online" if known.keys() & ({server} if server else _WANDB_SERVERS) else "offline"


def _find(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    if name.startswith(CUSTOM) and len(name) > len(CUSTOM):
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
