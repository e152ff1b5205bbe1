"""What the documents say is so: every command, setting, row, table, path and example in them."""

import json
import logging
import math
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import dpo.losses
from dpo.cli import app
from dpo.data import FORMATS, BadRow, DataConfig, Row, check, recognise
from dpo.data.formats import GENERAL, PUBLISHED
from dpo.evaluate import evaluate_run
from dpo.losses.testing import check as check_objective
from dpo.losses.testing import example_batch
from dpo.recipes import find as find_recipe
from dpo.recipes import names as recipe_names
from dpo.run import execute
from dpo.settings import plan
from dpo.types import RankingScores

ROOT = Path(__file__).parents[1]
_spec = spec_from_file_location("documents", Path(__file__).with_name("documents.py"))
assert _spec is not None
assert _spec.loader is not None
documents = module_from_spec(_spec)
sys.modules.setdefault("documents", documents)  # its dataclass looks for its own module
_spec.loader.exec_module(documents)
blocks = documents.blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/**/*.md")])


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without the header rows."""
    below = README.partition(f" {heading}\n")[2]
    assert below, f"README has no heading {heading!r}"
    rows = re.search(r"^(?:\|.*\n)+", below, flags=re.MULTILINE)
    assert rows is not None
    cells = [[cell.strip() for cell in re.split(r" \| ", row.strip("|\n "))] for row in rows[0].splitlines()]
    return cells[2:]


DPO_COMMANDS = documents.commands(README)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds what the commands name."""
    monkeypatch.chdir(tmp_path)
    documents.working_folder(tmp_path, README)
    return tmp_path


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What commands would carry out, in place of carrying it out."""
    instead = documents.StandIn()
    instead.install(monkeypatch)
    return instead


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    log = logging.getLogger("dpo")
    level = log.level
    yield
    log.setLevel(level)


def test_the_two_commands_of_a_fresh_machine_are_there():
    first_lines = [line for block in blocks(README, "sh") for line in block.splitlines()]
    assert "pip install -c constraints.txt -e . && dpo quickstart" in first_lines
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in first_lines


def test_the_cpu_build_of_torch_is_the_tested_version():
    (version,) = re.findall(r"pip install torch==(\S+) --index-url", README)
    assert f"torch=={version}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("command", DPO_COMMANDS)
def test_a_command_is_accepted(
    command: str, folder: Path, done: Any, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dpo.model.base.fetch_embedded", lambda: tiny_model_folder)
    documents.invoke(command, done)


def test_every_recipe_and_every_command_is_shown():
    shown = {shlex.split(command)[2] for command in DPO_COMMANDS if command.startswith("dpo train")}
    shown |= {re.sub(r"\[(.*)\]\(.*\)", r"\1", row[0]) for row in table("Objectives")}
    shown |= {name for row in table("A reward model, then PPO") for name in re.findall(r"`(\w+)`", row[0])}
    assert set(recipe_names()) <= shown
    help_text = CliRunner().invoke(app, ["--help"]).output
    for name in ("train", "compare", "evaluate", "objectives", "quickstart", "data", "export", "chat", "card"):
        assert name in help_text
        assert any(command.split()[1] == name for command in DPO_COMMANDS)


def test_every_setting_in_the_text_exists():
    settings = documents.settings(README + CONTRIBUTING)
    assert len(settings) > 20
    for setting in settings - {"objective.name=my_package.losses:SquaredHinge"}:
        assert (reason := documents.refused(setting)) is None, f"{setting}: {reason}"


def test_the_tree_exists_and_names_every_package():
    (tree,) = blocks(README, "text")
    parents: list[str] = []
    paths = []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # pyright: ignore[reportOptionalMemberAccess]
        parents = [*parents[: len(indent) // 2], name]
        paths.append("".join(parents))
    for path in paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in packages["packages"]:
        real = packages["package-dir"].get(package, package.replace(".", "/"))
        assert f"{real}/" in paths, f"the tree lacks {real}/"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_links_lead_somewhere(document: Path):
    for file, fragment in documents.links(document.read_text(encoding="utf-8")):
        target = document.parent / file if file else document
        assert target.exists(), file
        if fragment:
            assert fragment in documents.anchors(target.read_text(encoding="utf-8")), f"{file}#{fragment}"


def test_the_objective_table_is_the_package():
    rows = {re.sub(r"\[(.*)\]\((.*)\)", r"\1", row[0]): row for row in table("Objectives")}
    assert tuple(sorted(rows)) == dpo.losses.names()
    for name, (_, _, view, reference, start, _, _) in rows.items():
        elsewhere = {"sft": "sft_dpo", "mixture": "mpo", "bradleyterry": "reward", "ppo": "reward_ppo"}
        kind = dpo.losses.find(name)
        if name in ("kwise", "plackettluce"):  # one word away from the recipe `reward`
            objective = kind()
        else:
            runs = plan(find_recipe(elsewhere.get(name, name)), {"data": {"train": "x.jsonl"}})
            (objective,) = (one for one in (run.objective.build() for run in runs) if type(one) is kind)
        assert view == objective.view
        assert reference == ("yes" if objective.needs_reference else "no")
        at_start = {objective(example_batch(objective, seed=seed, drift=0.0)).loss.item() for seed in (0, 1)}
        if name == "plackettluce":
            four = RankingScores(torch.zeros(4), torch.arange(4), torch.zeros(4, dtype=torch.long))
            assert start == "log K!"
            assert math.isclose(objective(four).loss.item(), math.log(24), rel_tol=1e-6)
        elif max(at_start) - min(at_start) < 1e-9:  # a constant, whatever the data
            assert math.isclose(float(start), at_start.pop(), abs_tol=5e-4), name
        else:
            assert start == "-", name


def test_the_format_tables_are_the_recogniser():
    rows = {name: (json.loads(row.strip("`")), views) for name, row, views in table("Data formats")}
    assert list(rows) == [known.name for known in GENERAL]
    for name, (row, views) in rows.items():
        record = recognise([Row(row, "README:1")]).convert(Row(row, "README:1"))
        assert recognise([Row(row, "README:1")]).name == name
        held = [view for view in ("pairs", "judgements", "demonstrations") if getattr(record, view)()]
        assert views.partition(":")[0] == (", ".join(held) or "none")
    shown = table("Public datasets")
    assert [(name, rule) for name, _, rule in shown] == [(known.name, known.rule) for known in PUBLISHED]
    for known, (_, names, _) in zip(PUBLISHED, shown, strict=True):
        assert (f"data.label={known.label}" in names) == (known.label is not None)
        assert ("to evaluate on only" in names) == bool(known.evaluation_only)


def test_the_first_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    _, example, _ = blocks(README, "python")
    space: dict[str, Any] = {}
    exec(example, space)
    assert math.isclose(space["out"].loss.item(), math.log(2), rel_tol=1e-6)
    assert "0.6931" in capsys.readouterr().out
    assert "0.6931" in example


def test_a_run_leaves_the_files_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, pairs_file: Any
):
    """The second example trains a tiny model in the embedded one's place, and the run is evaluated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpo.model.base.fetch_embedded", lambda: tiny_model_folder)
    pairs_file(tmp_path / "prefs.jsonl", prompts=12)
    *_, example = blocks(README, "python")
    small = '{"train": "prefs.jsonl"}, "loop": {"max_steps": 1}, "evaluation": {"max_prompts": 2, "max_new_tokens": 4}'
    shortened = example.replace('{"train": "prefs.jsonl"}', small)
    assert shortened != example
    space: dict[str, Any] = {}
    exec(shortened, space)
    folder = space["result"].folder
    evaluate_run(folder, {"evaluation": {"max_prompts": 1, "max_new_tokens": 4}})
    left = {f"`{path.name}/`" if path.is_dir() else f"`{path.name}`" for path in folder.glob("[!.]*")}
    assert left | {"`wandb/`"} == {row[0] for row in table("What a run leaves")}
    assert folder.parent.name == "runs"
    assert folder.name.startswith("ipo-")


def test_a_reward_model_is_read_without_this_package_as_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model_folder: Path,
    pairs_file: Any,
    capsys: pytest.CaptureFixture[str],
):
    from dpo.model.base import LanguageModel, ScalarRole, load_base
    from dpo.model.scalar import scores

    monkeypatch.chdir(tmp_path)
    data = {"train": str(pairs_file(tmp_path / "prefs.jsonl", prompts=12))}
    model = {"name": str(tiny_model_folder), "dtype": "float32", "device": "cpu"}
    given = {"data": data, "model": model, "loop": {"max_steps": 2}, "output": {"dir": "runs/reward-1a2b3c4d"}}
    (result,) = execute(plan(find_recipe("reward"), given), "reward")
    example = blocks(README, "python")[0].replace("path/to/base", str(tiny_model_folder))
    space: dict[str, Any] = {}
    exec(example, space)
    shown = float(capsys.readouterr().out.splitlines()[-1])
    loaded = ScalarRole("reward", str(result.folder / "adapter"), False)
    ours = LanguageModel.start(load_base(result.run.model), result.run.model, 0, scalars=[loaded])
    ids = tuple(space["inputs"]["input_ids"][0].tolist())
    with ours.reading("reward"):
        assert shown == pytest.approx(scores(ours, [(ids[:-4], ids[-4:])], "reward").item(), abs=1e-4)


@pytest.fixture
def objective_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The worked example as one more file of dpo.losses, without an edit elsewhere."""
    source = blocks(CONTRIBUTING, "python")[0]
    (tmp_path / "squaredhinge.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(dpo.losses, "__path__", [*dpo.losses.__path__, str(tmp_path)])
    yield "squaredhinge"
    sys.modules.pop("dpo.losses.squaredhinge", None)
    dpo.losses.__dict__.pop("squaredhinge", None)


def test_the_guides_objective_obeys_the_laws_and_is_found_by_its_name(objective_of_the_guide: str):
    assert objective_of_the_guide in dpo.losses.names()
    check_objective(dpo.losses.find(objective_of_the_guide)())
    with pytest.raises(ValueError, match=r"SquaredHinge\.beta must be > 0, got 0"):
        dpo.losses.find(objective_of_the_guide)(beta=0)  # pyright: ignore[reportCallIssue]


def test_the_guides_test_passes_and_finds_a_wrong_margin(
    objective_of_the_guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    space: dict[str, Any] = {}
    exec(blocks(CONTRIBUTING, "python")[1], space)
    tests = [value for name, value in space.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    module = import_module("dpo.losses.squaredhinge")
    monkeypatch.setattr(module, "relu", lambda z: torch.relu(z + 1))
    with pytest.raises(AssertionError):
        space["test_hand_numbers"]()


def test_the_guides_objective_can_be_trained_with(objective_of_the_guide: str, folder: Path, done: Any):
    (command,) = re.findall(r"`(dpo train .*?)`", CONTRIBUTING)
    documents.invoke(command, done)
    assert type(done.runs[0].objective.build()).__name__ == "SquaredHinge"


def test_the_guides_format_is_recognised_once_it_is_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = import_module("dpo.data.recognise")
    space: dict[str, Any] = {}
    exec(blocks(CONTRIBUTING, "python")[2], space)
    duel = space["DUEL"]
    (shown,) = re.findall(r"`(\{.*\"winner\".*\})`", CONTRIBUTING)
    row = json.loads(shown)
    assert recognise([Row(row, "x:1")]).name != "duel"
    monkeypatch.setattr(module, "FORMATS", (duel, *FORMATS))
    assert recognise([Row(row, "x:1")]).name == "duel"
    tie, wrong = {**row, "winner": "tie", "prompt": "B"}, {**row, "winner": "c"}
    other = {**row, "winner": "b", "prompt": "C"}
    path = tmp_path / "duels.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (row, tie, other, wrong)), encoding="utf-8")
    checked = check(DataConfig.model_validate({"train": str(path), "eval_share": 0}))
    assert [(pair.chosen, pair.rejected) for record in checked.train for pair in record.pairs()] == [
        ("Hello!", "What?"),
        ("What?", "Hello!"),
    ]
    with pytest.raises(BadRow, match="winner is 'c', not a, b or tie"):
        duel.convert(Row(wrong, "x:4"))


def test_pre_commit_runs_the_commands_of_the_guide():
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in settings["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in settings["repos"]} == {"local"}
    assert all(hook["language"] == "system" for hook in hooks)
    lines = blocks(CONTRIBUTING, "sh")[0].splitlines()[1:]
    assert [hook["entry"] for hook in hooks] == [part.strip() for line in lines for part in line.split("&&")]
