"""The soak test sees what it is there to see: a child that dies, one that ends, and one that leaves other bytes."""

import os
import time
from pathlib import Path

import pytest

from benchmarks.kills import ENOUGH_FAILED, soak
from dpo import checkpoint


def write(folder: Path, content: bytes) -> None:
    """Leave what a finished run leaves."""
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if not (folder / "checkpoints/step-00000001").exists():
        checkpoint.save(folder / "checkpoints", 1, {"optimizer": {}}, {})


@pytest.mark.parametrize(("fault", "wanted"), [("", (0, 0, 0)), ("other bytes", (0, 0, 1)), ("lost", (1, 0, 0))])
def test_faults_are_counted(tmp_path: Path, fault: str, wanted: tuple[int, int, int]) -> None:
    """A start that is killed is one that sleeps; the third goes through."""

    def train(folder: Path) -> None:
        starts = folder.with_name(f"{folder.name}.starts")
        starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
        count = 3 if folder.name == "whole" else len(starts.read_text())
        if count < 3:
            if fault != "lost" or count == 1:
                checkpoint.save(folder / "checkpoints", 1, {"optimizer": {}}, {})
            else:
                (folder / "checkpoints/step-00000001").rename(folder / "gone")
            time.sleep(60)
        write(folder, b"other" if fault == "other bytes" and folder.name != "whole" else b"same")

    tally = soak(train, tmp_path, kills=2, longest=1.0, seed=0)
    assert (tally.kills, tally.finished) == (2, 1)
    assert (tally.lost, tally.failed, tally.unequal) == wanted
    assert tally.sound is (not fault)


def test_starts_that_fail_are_counted_and_end_it(tmp_path: Path) -> None:
    def train(folder: Path) -> None:
        if folder.name != "whole":
            os._exit(3)
        write(folder, b"same")

    tally = soak(train, tmp_path, kills=2, longest=30.0, seed=0)
    assert (tally.failed, tally.kills, tally.finished) == (ENOUGH_FAILED, 0, 0)
    assert not tally.sound
