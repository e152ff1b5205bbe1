"""What the notebooks install goes beside what Colab has: nothing under the running kernel is replaced."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
COLAB = Path(__file__).with_name("colab.txt")
PYTHON = "3.13"
"""Colab's."""

NEW = {"bitsandbytes", "gguf", "jaxtyping", "rensa", "rouge-score", "sacrebleu", "vadersentiment"}
"""Our requirements that Colab lacks."""

THEIRS = {"colorama", "portalocker", "wadler-lindig"}
"""Of these, the requirements that it lacks: pure Python as well."""


def there() -> dict[str, str]:
    lines = COLAB.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(one) for one in project["dependencies"]]


def test_every_floor_admits_what_colab_has() -> None:
    colab = there()
    for one in requirements():
        name = canonicalize_name(one.name)
        assert (name in colab) != (name in NEW), f"{one}: is it new to Colab, or not?"
        if name in colab:
            assert one.specifier.contains(colab[name]), f"{one}: Colab has {colab[name]}"


@pytest.mark.slow
@pytest.mark.network
def test_a_resolver_replaces_nothing_that_colab_has() -> None:
    uv = shutil.which("uv")
    assert uv is not None, "the extra `test` installs it"
    command = [uv, "pip", "compile", "pyproject.toml", "-c", str(COLAB), "--python-version", PYTHON]
    command += ["--python-platform", "x86_64-manylinux_2_28", "--quiet", "--no-header", "--no-annotate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    resolved = dict(line.split("==") for line in done.stdout.splitlines())
    colab = there()
    assert {name: colab[name] for name in resolved if name in colab} == {
        name: one for name, one in resolved.items() if name in colab
    }
    cuda = {name for name in resolved if name.startswith(("nvidia-", "cuda-"))}  # of torch, which is there with its own
    assert {*resolved} - {*colab} - cuda == NEW | THEIRS
