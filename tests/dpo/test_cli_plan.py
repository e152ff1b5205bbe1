"""`dpo train --plan`: the parts and what fits are printed, and nothing is trained, loaded or written."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

from dpo import recipes
from dpo.cli import app
from dpo.data import DataConfig
from dpo.recipes.reward_ppo import reward_ppo
from dpo.settings import Run


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


def test_a_reward_model_and_ppo_through_it_have_their_plans(bare_model: str) -> None:
    done = planned(
        bare_model,
        "--gpu=24GB",
        "model.quantization=nf4",
        "data.max_length=512",
        "ppo.rollout.max_new_tokens=128",
        "loop.per_device_train_batch_size=4",
        recipe="reward_ppo",
    )
    assert done.exit_code == 0, done.stderr
    reward, ppo = done.stdout.split("Memory plan: bare")[1:]
    assert "reward adapter and head" in reward
    assert "4 comparisons, 4,096 tokens" in reward  # two completions each
    for said in ("│ head ", "adapter weights", "value adapter", "sampling"):
        assert said not in reward
    for said in (
        "adapter weights",
        "value adapter and head",
        "reward adapters and heads (1)",
        "│ head ",
        "this run: 64 at once",
        "this run: 4 completions, 2,560 tokens",
    ):
        assert said in ppo
    for stage in (reward, ppo):
        assert "It fits 24GB; gradient checkpointing is not needed" in stage
    assert "frozen reference adapter" not in done.stdout  # PPO starts from the base, and is held against it


@pytest.mark.slow
def test_demonstrations_beside_completions_are_counted(bare_model: str) -> None:
    arguments = ["data.max_length=512", "ppo.rollout.max_new_tokens=128", "ppo.loop.per_device_max_tokens=2600"]
    done = planned(bare_model, "--gpu=24GB", *arguments, "ppo.objective.ptx_coefficient=27.8", recipe="reward_ppo")
    assert done.exit_code == 0, done.stderr
    assert "4 completions, 4,608 tokens" in done.stdout  # 4 x 640 within the limit, and 4 x 512 beside them


@pytest.mark.slow
def test_no_more_is_sampled_at_once_than_a_rollout_has(bare_model: str) -> None:
    few = ["ppo.rollout.prompts_per_rollout=5", "ppo.rollout.completions_per_prompt=2"]
    done = planned(bare_model, "--gpu=24GB", *few, recipe="reward_ppo")
    assert done.exit_code == 0, done.stderr
    assert "this run: 10 at once" in done.stdout


@pytest.mark.slow
def test_a_stage_takes_the_shape_of_the_stage_it_names(bare_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT of rank 32, a reward model of rank 16, then PPO from the first: of rank 32 as well."""

    def three(data: DataConfig) -> tuple[Run, ...]:
        reward, ppo = reward_ppo(data)
        sft = Run.of({"name": "sft", "data": data, "objective": "sft", "model": {"lora": {"r": 32}}}, "test")
        return sft, reward, ppo.override({"model": {"adapter": "stage:sft"}})

    monkeypatch.setattr(recipes, "find", lambda _: three)
    done = planned(bare_model, "--gpu=24GB", recipe="three")
    assert done.exit_code == 0, done.stderr
    ppo = done.stdout.split("Memory plan: bare")[3]
    for part in ("adapter weights", "frozen reference adapter"):
        (line,) = (one for one in ppo.splitlines() if part in one)
        assert "128.00 KiB" in line  # 4 bytes x 32 ranks x the 1,024 numbers of one in this model


@pytest.mark.slow
def test_ppo_of_8b_parameters_fits_24_gb(tmp_path: Path) -> None:
    """Of Llama 3.1's shape, in 4 bits, with all four roles, prompts of 512 and completions of 128 tokens.

    An adapter of rank 16 takes 4 x 16 x 32 x (2 x 8192 + 2 x 5120 + 3 x 18432) bytes, 160 MiB; keys and values of a
    completion take 640 x 32 layers x 2 x 8 heads x 128 x 2 bytes, 80 MiB.
    """
    LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=131072,
    ).save_pretrained(tmp_path / "8b")
    done = planned(
        "8b",
        "--gpu=24GB",
        "model.quantization=nf4",
        "data.max_length=512",
        "loop.per_device_train_batch_size=4",
        "ppo.rollout.max_new_tokens=128",
        "ppo.rollout.sampling_batch_size=4",
        recipe="reward_ppo",
    )
    assert done.exit_code == 0, done.stderr
    reward, ppo = done.stdout.split("Memory plan: 8b")[1:]
    assert "It fits 24GB with model.gradient_checkpointing=true only" in " ".join(reward.split())
    assert "It fits 24GB" in " ".join(ppo.split())
    for part, least, most in (
        ("adapter weights", 160 / 1024, 160 / 1024),
        ("held whatever the micro-batch", 7.0, 7.4),
        ("each completion written", 80 / 1024, 200 / 1024),
        ("this run: 4 at once", 7.8, 9.2),
        ("this run: 4 completions, 2,560 tokens", 8.0, 9.2),  # the last of them, with checkpointing: as the sampling
    ):
        size, unit = [line for line in ppo.splitlines() if part in line][-1].split()[-3:-1]
        assert least <= float(size) / {"GiB": 1, "MiB": 1024}[unit] <= most


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


def test_a_reward_model_that_scores_the_answers_is_counted(bare_model: str) -> None:
    done = planned(bare_model, "--gpu=12GB", "evaluation.reward_model=runs/reward/adapter")
    assert done.exit_code == 0, done.stderr
    without = planned(bare_model, "--gpu=12GB")
    assert "reward adapter" in done.stdout
    assert "reward adapter" not in without.stdout
