"""Recipes: found by name, documented, and run end to end from the command line and as scripts."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo import losses, recipes
from dpo.cli import app
from dpo.data import DataConfig
from dpo.errors import ConfigError
from dpo.losses import Part
from dpo.losses.bcopair import BCOPair
from dpo.losses.dpo import DPO
from dpo.losses.ipo import IPO
from dpo.losses.kto import KTO
from dpo.losses.mixture import Mixture
from dpo.losses.sft import SFT
from dpo.settings import PREVIOUS

FOLDER = Path(__file__).parents[2] / "recipes"
DATA = DataConfig.model_validate({"train": "x"})
WITHIN = ("sft", "mixture", "bradleyterry", "kwise", "plackettluce", "ppo", "rloo", "grpo")
"""Objectives without a recipe of one stage and their own name."""
ONE_STAGE = [name for name in losses.names() if name not in WITHIN]
ON_POLICY = {
    "reward_ppo": ["1-reward", "2-ppo"],
    "rloo": ["1-reward", "2-rloo"],
    "grpo": ["1-reward", "2-grpo"],
    "online_dpo": ["1-reward", "2-online"],
    "rejection_sampling": ["1-reward", "2-sft"],
    "sft_reward_ppo_ptx": ["1-sft", "2-reward", "3-ppo"],
    "summarise": ["1-sft", "2-reward", "3-ppo"],
}
STAGES = {name: [""] for name in (*ONE_STAGE, "mpo", "reward")} | {"sft_dpo": ["1-sft", "2-dpo"]} | ON_POLICY


@pytest.fixture
def arguments(tmp_path: Path, tiny_model_folder: Path, pairs_file: Callable[..., Path]) -> list[str]:
    file = pairs_file(tmp_path / "pairs.jsonl")
    given = [
        f"data.train={file}",
        "data.eval_share=0.2",
        f"model.name={tiny_model_folder}",
        f"output.dir={tmp_path / 'out'}",
    ]
    return [*given, "loop.max_steps=2", "evaluation.max_prompts=2", "evaluation.max_new_tokens=3"]


def test_every_module_is_a_recipe_and_every_recipe_is_known_here() -> None:
    assert recipes.names() == tuple(sorted(STAGES))


@pytest.mark.parametrize("name", STAGES)
def test_a_recipe_is_a_function_of_its_module_s_name_with_a_docstring(name: str) -> None:
    module, recipe = import_module(f"dpo.recipes.{name}"), recipes.find(name)
    assert getattr(module, name) is recipe
    assert inspect.isfunction(recipe)
    assert len(inspect.getdoc(module) or "") > 30
    assert len(inspect.getdoc(recipe) or "") > 30


def test_recipes_choose_what_they_say() -> None:
    chosen = {name: [run.objective.build() for run in recipes.find(name)(DATA)] for name in STAGES}
    for name in ONE_STAGE:
        assert [type(objective) for objective in chosen[name]] == [losses.find(name)], name
        assert [run.name for run in recipes.find(name)(DATA)] == [name]
    assert chosen["dpo"] == [DPO(beta=0.1)]
    assert chosen["ipo"] == [IPO(tau=0.5, reduction="mean")]
    assert chosen["kto"] == [KTO(beta=0.1)]
    assert chosen["sft_dpo"] == [SFT(), DPO(beta=0.1)]
    parts = (Part(0.8, DPO(beta=0.1)), Part(0.2, BCOPair(beta=0.1)), Part(1.0, SFT()))
    assert chosen["mpo"] == [Mixture(parts=parts)]
    (first, second) = recipes.find("sft_dpo")(DATA)
    assert (first.model.adapter, second.model.adapter) == (None, PREVIOUS)


def test_an_unknown_recipe_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"'sft_dop' is neither a recipe .* nor a file\. Did you mean 'sft_dpo'\?"):
        recipes.find("sft_dop")
    for name in ("sft", "mixture"):
        with pytest.raises(ConfigError, match=rf"'{name}' is an objective without a recipe.*objective\.name={name}"):
            recipes.find(name)


QUICK = ("aot", "bco", "dpo", "ipo", "kto", "mpo", "sft_dpo", "simpo", "trdpo", "wpo")
"""Each takes another way through the loop; the others differ from these in their formula alone."""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in STAGES])
def test_a_recipe_runs_end_to_end(name: str, arguments: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", name, *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    for stage in STAGES[name]:
        folder = tmp_path / "out" / stage
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        assert (folder / "summary.json").is_file()
        assert f"metrics: {folder}" in done.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("dpo", False),  # this file's own name is the package's
        pytest.param("ipo", True, marks=pytest.mark.slow),
        pytest.param("kto", False, marks=pytest.mark.slow),
        pytest.param("sft_dpo", True, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_runs_as_a_script_from_any_folder(
    name: str, inside: bool, arguments: list[str], tmp_path: Path
) -> None:
    script = f"{name}.py" if inside else str(FOLDER / f"{name}.py")
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=FOLDER if inside else tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / "out" / stage / "summary.json").is_file() for stage in STAGES[name])


def test_a_script_says_what_it_is_and_names_its_faults_without_a_traceback() -> None:
    def run(*given: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "ipo.py", *given]
        return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False)

    helped = run("--help")
    assert helped.returncode == 0
    assert "One stage: IPO" in helped.stdout
    assert "Example: python recipes/ipo.py data.train=" in helped.stdout
    failed = run()
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: command line: data.train is missing.")
    assert "Traceback" not in failed.stderr
