"""Taking turns: fresh processes that each do one step when told to, so that noise falls on all alike.

The parent starts a worker for every variant and waits until it is loaded and warm; then it hands out turns, one step
each, round after round, while the other workers are blocked reading a pipe. Both ends speak JSON, a message a line.
"""

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, final

import torch

from benchmarks.report import Result
from dpo.errors import DPOError
from dpo.train import reset_peak_memory

NEXT = "next\n"
"""The only order there is: do one step."""


class BenchmarkError(DPOError):
    """A measurement that could not be made."""


@final
@dataclass(frozen=True)
class Job:
    """What one worker measures."""

    variant: str
    """A name in `benchmarks.workers.VARIANTS`."""
    model: str
    """Folder of a model in transformers' format."""
    batch: int
    """Examples in an optimiser step (>= 1)."""
    warmup: int
    """Steps before the first turn (>= 1)."""
    rounds: int
    """Steps that are timed (>= 1)."""
    rows: Sequence[Sequence[Sequence[int]]] = ()
    """For every example the prompt's token ids, then those of each completion."""
    data: Mapping[str, Any] | None = None
    """Instead of `rows`: settings of a `dpo.data.DataConfig`, which the worker checks and prepares itself."""

    @property
    def steps(self) -> int:
        """Optimiser steps altogether."""
        return self.warmup + self.rounds

    def line(self) -> str:
        """Return the message that `Job.read` reads."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> "Job":
        """Return the job that a parent sent."""
        return cls(**json.loads(line))


@final
class Memory:
    """The most bytes held above what was held at the start: by tensors on CUDA, by the whole process on Linux."""

    def __init__(self, device: torch.device) -> None:
        """Start here: what is held now is not counted."""
        self._device = device
        reset_peak_memory(device)
        self._start = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident("VmRSS")

    def peak(self) -> int:
        """Return the peak since the last call, in bytes above the start, and begin a new one."""
        cuda = self._device.type == "cuda"
        highest = torch.cuda.max_memory_allocated(self._device) if cuda else _resident("VmHWM")
        reset_peak_memory(self._device)
        return max(0, highest - self._start)


def _resident(name: str) -> int:
    """Return a field of /proc/self/status in bytes; unlike getrusage's peak, it does not remember the parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise BenchmarkError(f"{status}: absent, expected for measuring memory without CUDA. Run on Linux.")
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@final
class Gate:
    """A worker's end. What is timed lies between the gate's opening and the next arrival at it: one whole iteration.

    An iteration is all that the training loop does for a step: taking and collating the batch, forward and backward
    pass, clipping, update, and its own book-keeping.
    """

    def __init__(self, job: Job, orders: TextIO, answers: TextIO) -> None:
        """Read orders from one stream and answer on the other."""
        self._job, self._orders, self._answers = job, orders, answers
        self._steps = 0

    def loaded(self, network: torch.nn.Module) -> None:
        """Tell that the bare model is in memory, used once, and nothing else: memory is counted from here."""
        self._parameters = sum(parameter.numel() for parameter in network.parameters())
        self._memory = Memory(next(network.parameters()).device)
        self._began = time.perf_counter()

    def prepared(self, rows: int, examples: int) -> None:
        """Tell that so many rows are read, and tokenised into so many examples."""
        self._rows, self._examples = rows, examples
        self._prepare_seconds = time.perf_counter() - self._began

    def step_done(self) -> None:
        """Tell that an optimiser step is done; returns when the next one may start.

        Raises:
            BenchmarkError: the parent is gone.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._steps += 1
        if self._steps < self._job.warmup:
            return
        if self._steps == self._job.warmup:
            self._answer(
                "ready",
                parameters=self._parameters,
                rows=self._rows,
                examples=self._examples,
                prepare_seconds=self._prepare_seconds,
                prepare_bytes=self._memory.peak(),
            )
        else:
            self._answer("turn", seconds=now - self._began)
        if self._steps == self._job.steps:
            self._step_bytes = self._memory.peak()
            return
        if self._orders.readline() != NEXT:
            raise BenchmarkError("worker: the parent is gone, expected its next order. Start the benchmark again.")
        self._began = time.perf_counter()

    def finish(self, loss: float) -> None:
        """Tell the mean loss of all steps; nothing is timed any more."""
        self._answer("done", loss=loss, step_bytes=self._step_bytes)

    def _answer(self, kind: str, **values: float) -> None:
        self._answers.write(json.dumps({"kind": kind, **values}) + "\n")
        self._answers.flush()


@final
class Worker:
    """The parent's end: one fresh process."""

    def __init__(self, name: str, command: Sequence[str], job: Job, log: Path, env: Mapping[str, str]) -> None:
        """Start `command`, which reads the job; what it prints on stderr goes to `log`."""
        self.name = name
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(env)
            )
        self._send(job.line())

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    def turn(self) -> float:
        """Let the worker do one step, and return its seconds."""
        self._send(NEXT)
        return self.receive("turn")["seconds"]

    def receive(self, kind: str) -> dict[str, Any]:
        """Wait for the worker's next answer.

        Raises:
            BenchmarkError: it ended, or said something else; the message holds the end of its log.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"kind": "nothing"}
        if answer["kind"] != kind:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise BenchmarkError(
                f"{self.name}: got {answer['kind']!r} from the worker, expected {kind!r}. The end of its log:\n{tail}"
            )
        return answer

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            self.receive("an open pipe")  # the log says why it ended


def take_turns(
    jobs: Sequence[Job], command: Sequence[str], tokens: Sequence[int], logs: Path, env: Mapping[str, str]
) -> list[Result]:
    """Measure all jobs side by side: one is started after the other, then each round gives every worker one step.

    Args:
        jobs: of the variants; all with the same number of rounds.
        command: starts a worker.
        tokens: of the batch in each round, a shared prompt counted once; empty where it is not known.
        logs: folder for what the workers print.
        env: their environment.

    Raises:
        BenchmarkError: a worker failed.
    """
    (rounds,) = {job.rounds for job in jobs}
    with ExitStack() as stack:
        workers: list[Worker] = []
        ready: list[dict[str, Any]] = []
        for number, job in enumerate(jobs):
            log = logs / f"{number}-{job.variant}.log"
            workers.append(stack.enter_context(Worker(job.variant, command, job, log, env)))
            ready.append(workers[-1].receive("ready"))
        seconds = [[worker.turn() for worker in workers] for _ in range(rounds)]
        done = [worker.receive("done") for worker in workers]
    return [
        Result(
            variant=worker.name,
            seconds=tuple(taken),
            tokens=tuple(tokens),
            loss=end["loss"],
            parameters=start["parameters"],
            rows=start["rows"],
            examples=start["examples"],
            prepare_seconds=start["prepare_seconds"],
            prepare_bytes=start["prepare_bytes"],
            step_bytes=end["step_bytes"],
        )
        for worker, start, taken, end in zip(workers, ready, zip(*seconds, strict=True), done, strict=True)
    ]
