"""The command line: one clear message for each fault and nothing half-written; a killed run goes on bit for bit."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dpo import losses
from dpo.cli import app

COMMANDS = [[], ["train"], ["compare"], ["evaluate"], ["data"], ["data", "check"], ["objectives"], ["quickstart"]]
COMMANDS += [["export"], ["chat"], ["card"]]


def dpo(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def trial(
    tmp_path: Path, tiny_model_folder: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Settings of a run of a second on the tiny model, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    pairs_file(tmp_path / "pairs.jsonl")
    given = ["data.train=pairs.jsonl", "data.eval_share=0.2", f"model.name={tiny_model_folder}", "model.dtype=float32"]
    return [*given, "model.device=cpu", "evaluation.max_prompts=2", "evaluation.max_new_tokens=3"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- help ---


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command: list[str]) -> None:
    done = dpo(*command, "--help")
    assert done.exit_code == 0
    assert f"Example: dpo {' '.join(command)}".strip() in done.stdout.replace("\n", " ")


@pytest.mark.parametrize("command", [[], ["data"]], ids=" ".join)
def test_alone_it_shows_its_help(command: list[str]) -> None:
    done = dpo(*command)
    assert "Usage: dpo" in done.output.replace("root", "dpo")
    assert "Example: dpo" in done.output


# --- objectives ---


def test_objectives_are_listed_with_view_reference_and_one_line() -> None:
    shown = dpo("objectives").stdout
    for name in losses.names():
        (row,) = [line for line in shown.splitlines() if line.split("│")[1:2] == [f" {name:<15} "]]
        cells = [cell.strip() for cell in row.split("│")]
        objective = losses.find(name)()
        assert cells[2:4] == [objective.view, "yes" if objective.needs_reference else "no"]
        assert cells[4] in " ".join((losses.find(name).__doc__ or "").split())


def test_one_objective_is_shown_with_formula_paper_and_hyper_parameters() -> None:
    shown = " ".join(dpo("objectives", "ipo").stdout.replace("│", " ").split())
    for part in ("ipo: Regression of the log-ratio gap", "p (h - t)²", "Paper: arXiv:2310.12036, eq. 17.", "Differs: "):
        assert part in shown
    assert "Reads pairs, needs a reference." in shown
    assert "objective.tau 0.5 Strength of the pull" in shown
    assert "objective.reduction mean Compare" in shown


def test_an_unknown_objective_is_refused_with_the_nearest_one() -> None:
    done = dpo("objectives", "ipoo")
    assert done.exit_code == 2
    assert "Did you mean 'ipo'?" in done.stderr


# --- faults ---

BAD_ROWS = {
    "broken.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "cho\n',
    "columns.jsonl": "".join(f'{{"prompt": "p{i}", "chosen": "b{i}"}}\n' for i in range(4)),
    "is_a_file": "",
    "bad.yaml": "data: {train: [",
}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "dpo", "data.train=broken.jsonl"], ["broken.jsonl:2"]),
        (
            ["train", "dpo", "data.train=columns.jsonl"],
            ["columns.jsonl: got", "expected rows that hold pairs", "choose an objective"],
        ),
        (["train", "dpo", "data.train=nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
        (["train", "dpo", "data.train=folder"], ["folder: got a folder, expected a file"]),
        (["train", "dpo", "learning_rate=1"], ["'learning_rate'", "'optimiser.learning_rate'"]),
        (["train", "dpo", "objective=ipoo"], ["'ipoo'", "'ipo'"]),
        (["train", "dpo", "objective.beta=-1"], ["DPO.beta must be > 0, got -1"]),
        (["train", "dpo", "data.max_length=8"], ["pairs.jsonl", "over-long prompt", "max_length"]),
        (["train", "dpo", "output.dir=is_a_file"], ["output.dir: is_a_file is a file"]),
        (["train", "dpo", "output.dir=is_a_file/below"], ["output.dir: is_a_file/below", "cannot be written"]),
        (["train", "dpo", "model.name=./nowhere"], ["model.name='./nowhere'"]),
        (["train", "dpo", "model.adapter=folder"], ["model.adapter='folder'", "adapter_model.safetensors"]),
        (["train", "dpo", "nonsense"], ["'nonsense': expected key=value"]),
        (["train", "ipoo"], ["'ipoo' is neither a recipe", "'ipo'"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml: cannot be read"]),
        (["train", "bad.yaml"], ["bad.yaml: not YAML"]),
        (["evaluate", "folder"], ["folder: holds no finished run"]),
        (["data", "check", "nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
        (["data", "check", "pairs.jsonl", "max_lenght=5"], ["'max_lenght'", "'max_length'"]),
    ],
    ids=lambda given: " ".join(given) if given[0] in ("train", "evaluate", "data") else None,
)
def test_a_fault_is_one_message_with_a_fix_and_nothing_is_written(
    trial: list[str], tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    for name, content in BAD_ROWS.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "folder").mkdir()
    before = tree(tmp_path)
    settings = trial if arguments[:2] == ["train", "dpo"] else []
    done = dpo(*arguments[:2], *settings, *arguments[2:])
    assert isinstance(done.exception, SystemExit)  # a traceback would be another exception
    assert done.exit_code in (1, 2)
    assert done.stderr.count("error: ") == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in said), done.stderr
    assert tree(tmp_path) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.faults
def test_a_folder_that_may_not_be_written_is_refused(trial: list[str], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    place = "/proc/below" if os.access(tmp_path / "locked", os.W_OK) else "locked/below"  # root may write anywhere else
    done = dpo("train", "dpo", *trial, f"output.dir={place}")
    assert done.exit_code == 2
    assert f"error: output.dir: {place} cannot be written" in done.stderr


def test_debug_shows_the_traceback(trial: list[str]) -> None:
    done = dpo("train", "dpo", *trial, "objective=ipoo", "--debug")
    assert type(done.exception).__name__ == "ConfigError"
    assert done.exit_code != 0


# --- commands ---


def test_training_and_evaluating_print_what_was_achieved(trial: list[str], tmp_path: Path) -> None:
    done = dpo("train", "dpo", *trial, "--loop.max_steps=2", "output.dir=out")
    assert done.exit_code == 0, done.stderr
    assert "eval/reward/accuracy" in done.stdout
    assert "2 steps" in done.stdout
    again = dpo("evaluate", "out")
    assert again.exit_code == 0, again.stderr
    assert "kl/policy_reference" in again.stdout
    from_file = dpo("train", "out/run.yaml", "output.dir=copy")
    assert from_file.exit_code == 0, from_file.stderr
    first, second = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("out", "copy"))
    assert first.read_bytes() == second.read_bytes()


def test_checking_data_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad" if i else "good"} for i in range(4)]
    with gzip.open("prefs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    done = dpo("data", "check", "prefs.jsonl.gz", "eval_share=0")
    assert done.exit_code == 0, done.stderr
    assert "identical completions" in done.stdout


# --- in processes of its own ---


def started(arguments: list[str], folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dpo.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def goes_on_after_a_kill(command: list[str], folder: Path, stage: str) -> str:
    """Run a command unbroken, killed with signal 9, and again; compare `stage` to the byte. Return what it printed."""
    whole = started([*command, "output.dir=whole"], folder)
    broken = started([*command, "output.dir=broken"], folder)
    ledger, step = folder / "broken" / stage / "metrics.jsonl", random.randint(4, 30)
    deadline = time.monotonic() + 200
    while not ledger.exists() or ledger.read_bytes().count(b'"kind": "train"') < step:
        assert broken.poll() is None, broken.communicate()
        assert time.monotonic() < deadline, "no row was written"
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.2))
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    assert broken.returncode == -signal.SIGKILL
    assert not (folder / "broken" / stage / "summary.json").exists()
    resumed = started([*command, "output.dir=broken"], folder)  # the dead process's lock is no obstacle
    output = errors = ""
    for process in (whole, resumed):
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert "going on from step" in errors
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        ours, theirs = ((folder / one / stage / name).read_bytes() for one in ("whole", "broken"))
        assert ours == theirs, f"killed at step {step}: {name}"
    return output


@pytest.mark.faults
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(trial: list[str], tmp_path: Path) -> None:
    settings = ["loop.num_train_epochs=6", "loop.per_device_train_batch_size=2", "loop.gradient_accumulation_steps=2"]
    settings += ["loop.save_steps=3", "loop.eval_steps=10", "model.lora.dropout=0.1"]
    output = goes_on_after_a_kill(["train", "dpo", *trial, *settings], tmp_path, "")
    assert "eval/reward/accuracy" in output


@pytest.mark.faults
@pytest.mark.slow
def test_so_does_one_killed_while_it_samples_or_learns_from_rollouts(trial: list[str], tmp_path: Path) -> None:
    settings = ["reward.loop.max_steps=2", "ppo.loop.max_steps=48", "loop.save_steps=3", "rollout.epochs=2"]
    settings += ["loop.num_train_epochs=50"]  # max_steps is the limit, so that no kill comes too late
    settings += ["loop.per_device_train_batch_size=2", "loop.gradient_accumulation_steps=2"]
    settings += ["rollout.prompts_per_rollout=8", "rollout.max_new_tokens=12"]
    goes_on_after_a_kill(["train", "reward_ppo", *trial, *settings], tmp_path, "2-ppo")


@pytest.mark.faults
@pytest.mark.slow
def test_a_terminated_run_says_that_the_same_command_goes_on(trial: list[str], tmp_path: Path) -> None:
    settings = ["loop.num_train_epochs=500", "loop.save_steps=1000", "output.dir=out"]
    process = started(["train", "dpo", *trial, *settings], tmp_path)
    ledger = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not ledger.exists() or ledger.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no row was written"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, output) == (143, "")
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    step = ledger.read_bytes().count(b"\n")
    assert (
        last == f"stopped after step {step} of 1500, which is saved. The same command goes on from the last checkpoint."
    )
    assert [one.name for one in (tmp_path / "out/checkpoints").iterdir()] == [f"step-{step:08d}"]


def test_a_fault_of_a_real_process_is_one_message(tmp_path: Path) -> None:
    process = started(["train", "dpo", "data.train=nowhere.jsonl"], tmp_path)
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, output) == (1, "")
    assert errors.startswith("error: nowhere.jsonl: no such file")
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
