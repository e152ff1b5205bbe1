"""What is installed: one top-level name, every module, the data files; and the layout that makes it so."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = {"losses": "dpo/losses", "data": "dpo/data", "recipes": "dpo/recipes"}
"""Real folder at the root -> where the link stands, and where the wheel has it."""
OFFLINE = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=OFFLINE, capture_output=True, text=True, check=False)


def modules() -> set[str]:
    """Every module file of the repository, by its path in the wheel."""
    found: set[str] = set()
    for folder, place in {"dpo": "dpo", **FOLDERS}.items():
        for package in (ROOT / folder).rglob("__init__.py"):  # does not follow the links inside dpo/
            inside = place / package.parent.relative_to(ROOT / folder)
            found |= {str(inside / file.name) for file in package.parent.glob("*.py")}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the checkout stays clean and nothing stale gets in."""
    source = tmp_path_factory.mktemp("source") / "dpo-lab"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dpo", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    built = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source), cwd=target
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = target.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_only_top_level_name_is_dpo(contents: set[str]):
    assert {name.partition("/")[0] for name in contents if ".dist-info/" not in name} == {"dpo"}


def test_every_module_of_the_repository_is_in_the_wheel_once(contents: set[str]):
    # A new package that pyproject.toml does not list is missing here.
    assert {name for name in contents if name.endswith(".py")} == modules()


def test_the_wheel_holds_the_data_files_the_type_marker_and_the_licence(contents: set[str]):
    for name in ("pairs.jsonl", "prompts.txt", "eval_prompts.txt", "README.md"):
        assert f"dpo/data/sentiment/{name}" in contents
    assert "dpo/py.typed" in contents
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in contents)


def test_the_command_is_installed(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "dpo = dpo.cli:main" in archive.read(name).decode()


IMPORT_ALL = """
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path

target = Path(sys.argv[1])
sys.path.insert(0, str(target))
for name in sys.argv[2:]:
    file = Path(import_module(name).__file__)
    assert file.is_relative_to(target), f"{name} comes from {file}, expected below {target}"
assert files("dpo.data").joinpath("sentiment", "pairs.jsonl").is_file()
"""


def test_every_module_imports_from_an_installed_wheel(wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    pip = run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel),
        cwd=tmp_path,
    )  # fmt: skip
    assert pip.returncode == 0, pip.stderr
    names = sorted(file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in modules())
    imported = run(sys.executable, "-c", IMPORT_ALL, str(target), *names, cwd=Path(ROOT.anchor))
    assert imported.returncode == 0, imported.stderr


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bare_import_from_the_root_is_refused_with_the_fix(name: str):
    done = run(sys.executable, "-c", f"import {name}", cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: Import dpo.{name}, not {name}" in done.stderr


@pytest.mark.parametrize(("folder", "link"), FOLDERS.items())
def test_the_links_are_committed_as_links(folder: str, link: str):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    mode, blob, *_ = run("git", "ls-files", "--stage", link, cwd=ROOT).stdout.split()
    assert mode == "120000"
    assert run("git", "cat-file", "blob", blob, cwd=ROOT).stdout == f"../{folder}"


def test_the_constraints_pin_every_requirement_at_or_above_its_floor():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in map(Requirement, settings["dependencies"]):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{requirement}: constraints.txt does not pin it"
        assert requirement.specifier.contains(pins[name]), f"{requirement}: constraints.txt pins {pins[name]}"
