"""The pages of docs/: every command, snippet, setting, metric, message, figure, test and link in them holds."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

import dpo
import dpo.losses
from dpo.data import Row, recognise
from dpo.data.check import Drop
from dpo.metrics import METRICS
from dpo.model.memory import Activations, MemoryPlan
from dpo.recipes import find as find_recipe
from dpo.settings import Run, merged, plan, read_overrides, read_run

_spec = spec_from_file_location("documents", Path(__file__).with_name("documents.py"))
assert _spec is not None
assert _spec.loader is not None
documents = module_from_spec(_spec)
sys.modules.setdefault("documents", documents)  # its dataclass looks for its own module
_spec.loader.exec_module(documents)

ROOT = documents.ROOT
DOCS = ROOT / "docs"
SITE = ROOT / "mkdocs.yml"
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = ("experiments.md", "reproductions.md", "reliability.md")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")) if path.name not in EVIDENCE}
"""What explains; the other pages report what was measured."""

OF_TRL = "from-trl.md"
"""Names settings and metrics of TRL beside ours."""

FILE = re.compile(r"`(\w+\.py)`[^\n]*(?:\n(?!\n)[^\n]*)*\n\n$")
"""The end of a text that names the file the next block is."""

FIGURE = re.compile(r"[-+]?\d+\.\d+ (?:\[[^\]]+\]|± \d+\.\d+)")

COMMANDS = list(
    dict.fromkeys(
        command
        for text in PAGES.values()
        for command in (*documents.commands(text), *documents.inline_commands(text))
        if command not in documents.commands(README)
    )
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> Iterator[Path]:
    """A working folder that holds what the pages name: rows, runs, and the modules of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("dpo.model.base.fetch_embedded", lambda: tiny_model_folder)
    counted = MemoryPlan("tiny", {}, Activations(0, 1), Activations(0, 1))
    monkeypatch.setattr("dpo.model.memory.plan_memory", lambda *_: counted)  # README's commands count in earnest
    documents.working_folder(tmp_path, README, *PAGES.values())
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/model").symlink_to(tiny_model_folder)
    modules = {name: source for text in PAGES.values() for name, source in python_blocks(text) if name is not None}
    for name, source in modules.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(documents.blocks(PAGES["custom.md"], "yaml")[0], encoding="utf-8")
    yield tmp_path
    for name in modules:
        sys.modules.pop(name.removesuffix(".py"), None)


def python_blocks(text: str) -> Iterator[tuple[str | None, str]]:
    """Each block of Python with the file that it is said to be, or None."""
    for found in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        file = FILE.search(text[: found.start()])
        yield (file[1] if file else None), found[1]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Any:
    instead = documents.StandIn()
    instead.install(monkeypatch)
    return instead


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_accepted(command: str, folder: Path, done: Any):
    documents.invoke(command, done)


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_the_python_of_a_page_runs(page: str, folder: Path):
    """In order, in one space; the embedded model is a tiny one, and `__name__` is not `__main__`."""
    space: dict[str, Any] = {"__name__": "docs"}
    for _, source in python_blocks(PAGES[page]):
        exec(compile(source, page, "exec"), space)


def test_the_rows_of_the_pages_are_recognised():
    shown = [row for text in PAGES.values() for block in documents.blocks(text, "json") for row in block.splitlines()]
    assert shown
    ours = {"question": "prompt", "good": "chosen", "bad": "rejected"}
    for row in map(json.loads, shown):
        named: dict[str, Any] = {ours.get(key) or key: value for key, value in row.items()}
        read = Row(named, "docs:1")
        assert recognise([read]).convert(read).completions


def test_the_yaml_of_the_pages_is_taken(folder: Path):
    found = [block for text in PAGES.values() for block in documents.blocks(text, "yaml")]
    assert len(found) >= 3
    for block in found:
        given = yaml.safe_load(block)
        if "parameters" not in given:
            (folder / "shown.yaml").write_text(block, encoding="utf-8")
            assert read_run(folder / "shown.yaml", {})
            continue
        for key, one in given["parameters"].items():  # of a wandb sweep
            for value in one["values"]:
                assert plan(find_recipe("dpo"), merged({"data": {"train": "x"}}, read_overrides([f"--{key}={value}"])))


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_of_a_page_exists(page: str):
    for setting in documents.settings(PAGES[page]):
        if not setting.startswith(("judge.", "second.")):  # an endpoint's, and a stage of the page's own recipe
            assert (reason := documents.refused(setting)) is None, f"{setting}: {reason}"


@pytest.mark.parametrize("page", PAGES)
def test_every_metric_of_a_page_is_defined(page: str):
    rooms = {name.partition("/")[0] for name in METRICS if "/" in name}
    named = set(re.findall(r"`([a-z]+(?:/[a-z_0-9]+)+)`", PAGES[page]))
    for name in named:
        if name.partition("/")[0] in rooms and not (page == "tracking.md" and name == "eval/win_rate"):
            assert name in METRICS, name


def test_the_names_of_objectives_recipes_and_reasons_are_the_packages():
    known = {*dpo.losses.names(), *dpo.recipes.names()}
    first = PAGES["choosing.md"].partition("## By what you fear")[0]
    begin = [row.strip("| ").split(" | ")[1] for row in re.findall(r"^\| .*\|$", first, flags=re.MULTILINE)[2:]]
    named = {name for cell in begin for name in re.findall(r"`(\w+)`", cell)}
    assert named
    assert named <= known
    assert {drop.label for drop in Drop} <= set(re.split(r", | \| |\| ", PAGES["data.md"]))


@cache
def messages() -> str:
    """The fixed parts of every text in the package's source, one a line, white space made single."""
    texts = []
    for folder in (ROOT / "dpo", ROOT / "data"):
        for path in folder.rglob("*.py"):  # does not follow the links inside dpo/
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            texts += [one.value for one in tree if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return "\n".join(" ".join(text.split()) for text in texts)


def test_the_messages_that_are_shown_are_those_of_the_source():
    shown = [line for text in PAGES.values() for block in documents.blocks(text, "text") for line in block.splitlines()]
    assert len(shown) > 10
    for line in shown:
        parts = [part.strip(" .:,();") for part in line.split("...")]
        fixed = [part for part in parts if len(part) > 3]
        assert fixed, line
        for part in fixed:
            assert part in messages(), f"no message holds {part!r}"


def test_the_tests_that_are_named_exist():
    named = {name for text in PAGES.values() for name in re.findall(r"`(tests/[\w/.:]+)`", text)}
    assert len(named) > 8
    for name in named:
        file, _, test = name.partition("::")
        assert (ROOT / file).exists(), name
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_every_figure_with_an_interval_stands_in_the_evidence():
    evidence = [*(DOCS / name for name in EVIDENCE[:2]), *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("docs/adr/*.md")]
    measured = " ".join(" ".join(path.read_text(encoding="utf-8").split()) for path in evidence)
    figures = {(page, figure) for page, text in PAGES.items() for figure in FIGURE.findall(" ".join(text.split()))}
    assert len(figures) > 15
    for page, figure in figures:
        assert figure in measured, f"{page}: {figure}"


def test_every_install_command_names_an_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for text in PAGES.values():
        for names in re.findall(r"""(?:dpo-lab|-e "\.)\[(\w+)\]""", text):
            assert names in extras


def navigation(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values():
                yield from navigation(inner if isinstance(inner, list) else [inner])


def test_every_page_is_in_the_navigation_once():
    listed = list(navigation(yaml.safe_load(SITE.read_text(encoding="utf-8"))["nav"]))
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_front_page_leads_to_every_other():
    led = {file for file, _ in documents.links(PAGES["index.md"])}
    assert set(PAGES) - {"index.md"} <= led
    assert set(EVIDENCE) <= led


def test_the_reference_holds_every_public_name():
    shown = set(re.findall(r"^::: dpo\.(\w+)$", PAGES["reference.md"], flags=re.MULTILINE))
    assert shown - {"api"} == set(dpo.__all__)
    (members,) = re.findall(r"members: \[(.*)\]", PAGES["reference.md"])
    assert set(import_module("dpo.api").__all__) <= {*members.split(", "), *dpo.__all__}


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")],
        cwd=folder, capture_output=True, text=True, check=False, env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""},
    )  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository without what is not documentation's."""
    for name in ("docs", "dpo", "losses", "data", "recipes", "benchmarks", "tests", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (SITE, *ROOT.glob("*.md")):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_site_is_built_strictly(copy: Path):
    built = build(copy)
    assert built.returncode == 0, built.stderr
    page = (copy / "site/reference/index.html").read_text(encoding="utf-8")
    assert "What a number means" not in page  # private rooms stay out
    assert "Carry out a recipe's runs in order" in page
    loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\"\s>]+)", page)
    assert not loaded, "the site asks another server"
    assert 'data-md-component="source"' not in page, "the theme asks GitHub for the repository's stars"


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken", ["[x](nowhere.md)", "[x](data.md#no-such-heading)", "[x](../no_such_file.py)", "::: dpo.no_such_name"]
)
def test_a_broken_link_fails_the_build(copy: Path, broken: str):
    with (copy / "docs/memory.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{broken}\n")
    assert build(copy).returncode != 0


@pytest.mark.slow
def test_an_orphan_fails_the_build(copy: Path):
    (copy / "docs/orphan.md").write_text("# Orphan\n", encoding="utf-8")
    assert build(copy).returncode != 0


def test_a_run_of_the_pages_is_one_of_the_package(folder: Path):
    """The YAML run of custom.md resolves to itself."""
    (run,) = read_run(folder / "mine.yaml", {})
    assert Run.of(yaml.safe_load(run.to_yaml()), "again") == run
