"""From seconds and bytes to tables: medians of per-round ratios, and the machine they were taken on."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import final

import torch

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""

PACKAGES = ("dpo-lab", "trl", "torch", "transformers", "peft", "accelerate")

FLOPS_PER_PARAMETER = 6
"""Per token, by convention: 2 forward, 4 backward. LoRA skips the base weights' gradients, so it needs about 4."""

Row = Sequence[str]


@final
@dataclass(frozen=True)
class Result:
    """What one worker did; equal places in the tuples of several workers are the same round."""

    variant: str
    seconds: tuple[float, ...]
    """Of each timed optimiser step."""
    tokens: tuple[int, ...]
    """Of each timed step's batch, a shared prompt counted once; empty where they are not known."""
    loss: float
    """Mean over all steps, warm-up included; variants that do the same work agree."""
    parameters: int
    """Of the model without adapters."""
    rows: int
    """Rows that were read."""
    examples: int
    """What was kept of them."""
    prepare_seconds: float
    """Checking and tokenising, where the worker did it itself."""
    prepare_bytes: int
    """Most memory above the loaded model before the first timed step: data, reference log-probs, warm-up steps."""
    step_bytes: int
    """The same in the timed steps."""


@final
@dataclass(frozen=True)
class Quartiles:
    """The middle half of some numbers."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Return first quartile, median and third quartile of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(low, median(values), high)

    def __str__(self) -> str:
        return f"{self.middle:.3g} [{self.low:.3g}, {self.high:.3g}]"


def ratios(ours: Result, other: Result) -> Quartiles:
    """Return ours over the other's seconds, round by round: what slows a whole round down cancels."""
    return Quartiles.of([mine / theirs for mine, theirs in zip(ours.seconds, other.seconds, strict=True)])


def tokens_per_second(result: Result) -> float:
    """Return the median over rounds."""
    return median(count / seconds for count, seconds in zip(result.tokens, result.seconds, strict=True))


def utilisation(result: Result, peak_tflops: float) -> float:
    """Return the share of the device's peak that useful tokens account for (model FLOP utilisation)."""
    return tokens_per_second(result) * FLOPS_PER_PARAMETER * result.parameters / (peak_tflops * 1e12)


def step_table(results: Sequence[Result], peak_tflops: float | None = None) -> list[Row]:
    """Return a scenario's table, heading first; the first result is the one that the others are compared with."""
    first = results[0]
    heading = ["variant", "seconds a step", f"{first.variant} / it", "tokens a second"]
    heading += ["MiB above model: before", "in steps", f"{first.variant} / it, MiB", "mean loss"]
    rows: list[Row] = [heading + (["FLOP utilisation"] if peak_tflops is not None else [])]
    for result in results:
        row = [
            result.variant,
            str(Quartiles.of(result.seconds)),
            "1" if result is first else str(ratios(first, result)),
            f"{tokens_per_second(result):.0f}",
            mebibytes(result.prepare_bytes),
            mebibytes(result.step_bytes),
            f"{first.step_bytes / result.step_bytes:.2f}" if result.step_bytes else "-",
            f"{result.loss:.3f}",
        ]
        rows.append(row + ([f"{utilisation(result, peak_tflops):.1%}"] if peak_tflops is not None else []))
    return rows


def mebibytes(count: int) -> str:
    """Return bytes in MiB."""
    return f"{count / 2**20:.0f}"


def markdown(rows: Sequence[Row]) -> str:
    """Return a table with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]

    def line(row: Row) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return f"| {' | '.join([first.strip().ljust(widths[0]), *others])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(line(row) for row in (rows[0], rule, *rows[1:]))


@final
@dataclass(frozen=True)
class Machine:
    """Where the numbers come from."""

    processor: str
    cores: int
    memory_gib: float
    gpu: str | None

    @classmethod
    def here(cls) -> "Machine":
        """Describe this machine (Linux; elsewhere the processor is what Python calls it)."""
        info = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
        return cls(
            processor=found[1] if found else platform.processor() or platform.machine(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        )

    @property
    def slug(self) -> str:
        """A short name for a file."""
        return re.sub(r"[^a-z0-9]+", "-", (self.gpu or self.processor).lower()).strip("-")[:40].rstrip("-")

    def lines(self) -> list[str]:
        """Return the machine as Markdown list items."""
        gpu = self.gpu or "none: the GPU rows are missing from this file"
        return [
            f"- Processor: {self.processor}, {self.cores} cores, {self.memory_gib:.0f} GiB of memory",
            f"- GPU: {gpu}",
        ]


def document(title: str, machine: Machine, command: str, sections: Sequence[str]) -> str:
    """Return the dated Markdown file: machine, versions, commit, command, and the sections."""
    settings = {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "OMP_", "PYTORCH_"))}
    lines = [
        f"# {title}, {datetime.now(UTC):%Y-%m-%d}",
        "",
        *machine.lines(),
        f"- Python {platform.python_version()}, {', '.join(_versions())}",
        f"- Commit: {_commit()}",
        f"- Threads: {torch.get_num_threads()}; environment: {settings or 'nothing set'}",
        f"- Command: `{command}`",
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(sections) + "\n"


def _versions() -> list[str]:
    found: list[str] = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown (no git checkout)"
    return f"{head} with uncommitted changes" if git("status", "--porcelain") else head
