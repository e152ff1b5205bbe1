"""`dpo train --plan`: the parts and what fits are printed, and nothing is trained, loaded or written."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dpo.cli import app


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def bare_model(tiny_model_folder: Path, tmp_path: Path) -> str:
    """A model's configuration alone: no weights, no tokenizer; and no data either."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny_model_folder / "config.json").read_bytes())
    return "bare"


def planned(model: str, *arguments: str, recipe: str = "dpo") -> Result:
    given = ["train", recipe, "data.train=pairs.jsonl", f"model.name={model}", "model.device=cpu", "--plan"]
    return CliRunner().invoke(app, [*given, *arguments])


def test_the_plan_is_printed_and_nothing_else_happens(bare_model: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = planned(bare_model, "--gpu", "24GB", "data.max_length=512", "loop.per_device_train_batch_size=2")
    assert done.exit_code == 0, done.stderr
    for said in (
        "base weights (bfloat16)",  # what model.dtype=auto is on a card
        "adapter weights",
        "gradients",
        "optimiser state (adamw)",
        "CUDA context (an assumption)",
        "this run: 2 pairs, 2,048 tokens",  # two completions for each of two pairs
        "largest micro-batch",
        "It fits 24GB; gradient checkpointing is not needed",
    ):
        assert said in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_every_stage_has_its_plan_and_the_second_a_frozen_adapter(bare_model: str) -> None:
    done = planned(bare_model, "--gpu=12GB", "model.quantization=nf4", recipe="sft_dpo")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("Memory plan: bare") == 2
    assert done.stdout.count("frozen reference adapter") == 1
    assert done.stdout.count("base weights (nf4)") == 2
    assert "demonstrations, 4,096 tokens" in done.stdout  # one completion each


def test_without_a_card_it_plans_for_this_machine(bare_model: str) -> None:
    done = planned(bare_model, "model.dtype=float32")
    assert done.exit_code == 0, done.stderr
    assert "left for the run on this machine (cpu)" in done.stdout
    assert "base weights (float32)" in done.stdout
    assert "CUDA context" not in done.stdout


def test_a_run_file_is_planned(bare_model: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(f"data: {{train: pairs.jsonl}}\nmodel: {{name: {bare_model}, device: cpu}}\n")
    done = CliRunner().invoke(app, ["train", "my.yaml", "--plan", "--gpu", "16GB"])
    assert done.exit_code == 0, done.stderr
    assert "It fits 16GB" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "big"], "--gpu: got 'big', expected the size of a card"),
        (["--gpu", "24"], "24GB"),
        (["model.name=nowhere"], "model.name='nowhere'"),
    ],
    ids=str,
)
def test_a_fault_is_one_message(bare_model: str, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = planned(bare_model, *arguments)
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code in (1, 2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert said in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_card_without_a_plan_is_refused(pairs_file: Callable[..., Path], bare_model: str, tmp_path: Path) -> None:
    pairs_file(tmp_path / "pairs.jsonl")
    arguments = ["train", "dpo", "data.train=pairs.jsonl", f"model.name={bare_model}", "--gpu", "24GB"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "--gpu: got '24GB' without --plan" in done.stderr
