"""Workers do one step when told to, in turns; a worker that fails is reported with the end of its log."""

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.turns import BenchmarkError, Gate, Job, Memory, take_turns

JOB = Job(variant="fake", model="none", batch=4, warmup=2, rounds=3)

FAKE = """
import json, os, sys, time
job = json.loads(sys.stdin.readline())
log = open(sys.argv[1], "a")
def say(text):
    log.write(job["variant"] + " " + text + "\\n")
    log.flush()
def answer(**message):
    print(json.dumps(message), flush=True)
say("loads")
if job["variant"] == "broken":
    sys.exit("no such model")
answer(kind="ready", parameters=7, rows=9, examples=8, prepare_seconds=0.5, prepare_bytes=9)
if job["variant"] == "deaf":
    say(str(os.getpid()))
    time.sleep(600)
for step in range(job["rounds"]):
    assert sys.stdin.readline() == "next\\n"
    say("steps")
    answer(kind="turn", seconds=len(job["variant"]) + step)
answer(kind="done", loss=0.25, step_bytes=10)
"""


def fake(tmp_path: Path) -> tuple[list[str], Path]:
    diary = tmp_path / "diary"
    return [sys.executable, "-c", FAKE, str(diary)], diary


def test_the_workers_take_turns(tmp_path: Path):
    command, diary = fake(tmp_path)
    jobs = [replace(JOB, variant="a", rounds=2), replace(JOB, variant="bb", rounds=2)]
    first, second = take_turns(jobs, command, (11, 12), tmp_path, os.environ)
    # one is started after the other is ready, then each round gives every one a step
    assert diary.read_text().split("\n")[:-1] == ["a loads", "bb loads", "a steps", "bb steps", "a steps", "bb steps"]
    assert (first.variant, first.seconds, second.variant, second.seconds) == ("a", (1, 2), "bb", (2, 3))
    assert first.tokens == (11, 12)
    assert (first.parameters, first.rows, first.examples, first.prepare_seconds, first.prepare_bytes) == (
        7,
        9,
        8,
        0.5,
        9,
    )
    assert (first.loss, first.step_bytes) == (0.25, 10)


def test_a_worker_that_ends_is_reported_with_the_end_of_its_log(tmp_path: Path):
    command, _ = fake(tmp_path)
    with pytest.raises(BenchmarkError, match=r"broken: got 'nothing' .* expected 'ready'(.|\n)*no such model"):
        take_turns([replace(JOB, variant="broken")], command, (), tmp_path, os.environ)


def test_no_worker_outlives_a_failure(tmp_path: Path):
    command, diary = fake(tmp_path)
    with pytest.raises(BenchmarkError):
        take_turns([replace(JOB, variant=name) for name in ("deaf", "broken")], command, (), tmp_path, os.environ)
    pid = int(diary.read_text().splitlines()[1].removeprefix("deaf "))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_job_travels_as_json():
    job = replace(JOB, rows=[[[1], [2], [3]]], data={"train": "x", "limit": 3})
    assert Job.read(job.line()) == job


class Orders(io.StringIO):
    """Counts how often the gate was waited at."""

    waited = 0

    def readline(self, *arguments: int) -> str:
        self.waited += 1
        return super().readline(*arguments)


def test_the_gate_lets_warm_up_pass_and_then_one_step_an_order():
    orders, answers = Orders("next\n" * 3), io.StringIO()
    gate = Gate(JOB, orders, answers)
    gate.loaded(torch.nn.Linear(4, 3))
    gate.prepared(30, 20)
    waited = []
    for _ in range(JOB.steps):
        gate.step_done()
        waited.append(orders.waited)
    gate.finish(loss=0.5)
    assert waited == [0, 1, 2, 3, 3]  # the second step ends the warm-up; behind the last nothing is waited for
    said = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [one["kind"] for one in said] == ["ready", "turn", "turn", "turn", "done"]
    assert (said[0]["parameters"], said[0]["rows"], said[0]["examples"], said[-1]["loss"]) == (15, 30, 20, 0.5)


def test_only_the_time_between_opening_and_next_arrival_counts(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr("benchmarks.turns.time.perf_counter", lambda: clock[0])

    class Waiting(io.StringIO):
        def readline(self, *arguments: int) -> str:
            clock[0] += 100  # the others' turns
            return super().readline(*arguments)

    answers = io.StringIO()
    gate = Gate(JOB, Waiting("next\n" * 3), answers)
    gate.loaded(torch.nn.Linear(1, 1))
    gate.prepared(1, 1)
    for step in range(JOB.steps):
        clock[0] += step
        gate.step_done()
    turns = [one for one in map(json.loads, answers.getvalue().splitlines()) if one["kind"] == "turn"]
    assert [turn["seconds"] for turn in turns] == [2, 3, 4]


def test_a_worker_stops_when_its_parent_is_gone():
    gate = Gate(JOB, io.StringIO(""), io.StringIO())
    gate.loaded(torch.nn.Linear(1, 1))
    gate.prepared(1, 1)
    gate.step_done()
    with pytest.raises(BenchmarkError, match="parent is gone"):
        gate.step_done()


def test_memory_counts_above_its_start_and_begins_anew():
    memory = Memory(torch.device("cpu"))
    size = 64 * 2**20
    held = torch.ones(size, dtype=torch.uint8)
    del held  # the peak remembers it
    first = memory.peak()
    assert 0.9 * size < first < 2 * size
    assert memory.peak() < 0.5 * size
