"""The second copy: what it holds, when it is whole, and that a disk which fails costs nothing else."""

import logging
from pathlib import Path

import pytest
import torch

from dpo import checkpoint
from dpo.checkpoint import newest
from dpo.errors import CheckpointError, ConfigError
from dpo.mirror import Mirror

LAST = ("run.yaml", "summary.json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, named from the current one; "drive" is there for the copy."""
    monkeypatch.chdir(tmp_path)
    Path("drive").mkdir()
    run = Path("runs/dpo-1a2b3c4d")
    run.mkdir(parents=True)
    (run / ".lock").touch()
    (run / "run.yaml").write_text("name: dpo\n")
    return run


def mirror(folder: Path, keep: int = 1) -> Mirror:
    return Mirror(folder, Path("drive"), keep, LAST)


def save(folder: Path, step: int, keep: int = 1) -> None:
    (folder / "metrics.jsonl").write_text("row\n" * step)
    checkpoint.save(
        folder / "checkpoints", step, {"w": {"w": torch.full((4,), float(step))}}, {"step": step}, keep=keep
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.faults
def test_the_copy_holds_what_the_folder_holds_and_fills_an_empty_one(folder: Path) -> None:
    (folder / "wandb").mkdir()
    (folder / "wandb" / "log").touch()
    own = mirror(folder)
    assert own.place == Path("drive/runs/dpo-1a2b3c4d")
    for step in (2, 4):
        save(folder, step)
        own.update()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "summary.json").write_text("{}")
    own.update()
    wanted = {name: content for name, content in tree(folder).items() if name not in (".lock", "wandb/log")}
    assert tree(own.place) == wanted  # step 2 is pruned there as well
    elsewhere = Mirror(Path("runs/other"), Path("drive"), 1, LAST)
    assert not elsewhere.restore()
    folder.rename("runs/gone")
    assert own.restore()
    assert tree(folder) == wanted


@pytest.mark.faults
def test_a_disk_that_fails_is_told_of_and_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = mirror(folder)
    save(folder, 2)
    own.update()
    save(folder, 4)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "dpo"):
        patch.setattr(checkpoint.shutil, "copyfile", full)
        own.update()
    assert "output.mirror: " in caplog.text
    assert "No space left" in caplog.text
    assert sorted(one.name for one in own.place.rglob("*") if "tmp" in one.name) == []
    found = newest(own.place / "checkpoints")
    assert found is not None
    assert found.checkpoint.step == 2
    own.update()
    found = newest(own.place / "checkpoints")
    assert found is not None
    assert found.checkpoint.step == 4


@pytest.mark.faults
def test_a_copy_that_arrives_damaged_is_no_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 2)
    (source,) = (folder / "checkpoints").glob("step-*")

    def lying(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:-1] + b"x")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "copyfile", lying)
        with pytest.raises(CheckpointError, match=r"cannot be read|has changed"):
            checkpoint.copy(source, Path("drive/checkpoints"))
    assert list(Path("drive/checkpoints").iterdir()) == []
    checkpoint.copy(source, Path("drive/checkpoints"))
    assert newest(Path("drive/checkpoints")) is not None


@pytest.mark.faults
def test_a_copy_whose_checkpoints_are_all_damaged_is_not_begun_anew(folder: Path) -> None:
    own = mirror(folder)
    save(folder, 2)
    own.update()
    (own.place / "checkpoints/step-00000002/state.json").unlink()
    folder.rename("runs/gone")
    with pytest.raises(CheckpointError, match=r"drive/runs/dpo-1a2b3c4d/checkpoints: all 1 checkpoints are damaged"):
        own.restore()


@pytest.mark.parametrize(
    ("place", "root", "message"),
    [
        (
            "runs/a",
            "nowhere",
            r"got nowhere, which is no folder, expected one that is there\. Make it, mount its drive",
        ),
        ("runs/a", ".", r"got \., which copies runs/a onto itself\. Give another folder"),
    ],
)
def test_a_place_that_cannot_be_a_mirror_is_refused(folder: Path, place: str, root: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mirror(Path(place), Path(root), 1, LAST)


def test_an_absolute_folder_and_one_above_stay_below_the_mirror(folder: Path) -> None:
    root = Path("drive")
    assert Mirror(Path("/content/run"), root, 1, LAST).place == root / "content/run"
    assert Mirror(Path("../up/run"), root, 1, LAST).place == root / "up/run"
