"""The notebooks: paired with their text, ready for Colab, and run from top to bottom in smoke mode."""

import re
import tomllib
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
CELL_SECONDS = 300
"""At most for one cell; a smoke run takes about a minute as a whole."""

by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def read(source: Path) -> Any:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def tagged(notebook: Any, tag: str) -> list[int]:
    return [n for n, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]


def test_there_are_five() -> None:
    assert [source.stem for source in SOURCES] == [
        "01_first_run",
        "02_compare_objectives",
        "03_reward_model_and_ppo",
        "04_your_own_data",
        "05_your_own_objective",
    ]
    assert {one.stem for one in FOLDER.glob("*.ipynb")} == {source.stem for source in SOURCES}


@by_name
def test_the_notebook_is_its_text_without_outputs(source: Path) -> None:
    """`jupytext --sync notebooks/*.py` makes one of the other."""
    notebook, text = read(source), jupytext.read(source)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in text.cells
    ]
    assert [cell.metadata.get("tags", []) for cell in notebook.cells] == [
        cell.metadata.get("tags", []) for cell in text.cells
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@by_name
def test_it_opens_on_colab_with_a_card(source: Path) -> None:
    notebook = read(source)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    place = repository.removeprefix("https://github.com/")
    assert f"](https://colab.research.google.com/github/{place}/blob/main/notebooks/{source.stem}.ipynb)" in (
        notebook.cells[0].source
    )
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.colab["gpuType"] == "T4"
    (parameters,) = tagged(notebook, "parameters")
    assert re.match(r"SMOKE = False\b", notebook.cells[parameters].source)
    (install,) = tagged(notebook, "install")
    assert '"uninstall", "--quiet", "--yes", "torchao"' in notebook.cells[install].source
    assert f"git+{repository}" in notebook.cells[install].source


@pytest.mark.slow
@pytest.mark.network  # between this process and the kernel's
@pytest.mark.enable_socket
@by_name
def test_it_runs_from_top_to_bottom(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = read(source)
    (parameters,) = tagged(notebook, "parameters")
    notebook.cells.insert(parameters + 1, nbformat.v4.new_code_cell("SMOKE = True"))
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, tmp_path / "executed.ipynb")  # to be looked at
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    assert any("image/png" in one for one in data)
    if source.stem != "04_your_own_data":
        assert any("text/html" in one for one in data)
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert printed.count("models load in") >= 2  # memory before and after
    assert not [output for output in outputs if output.output_type == "error"]
