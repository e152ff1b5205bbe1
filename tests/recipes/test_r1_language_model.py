"""R1 on a language model, the tiny one in place of the embedded one: every method has its points and a figure."""

import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo.errors import TrainingError
from dpo.estimates import Estimate
from dpo.evaluation.bestofn import best_of, kl_bound
from dpo.evaluation.samples import Spoken
from dpo.recipes.reproductions import r1_language_model
from dpo.recipes.reproductions.r1_language_model import (
    BEST_OF_N,
    OBJECTIVES,
    SAMPLES_FILE,
    Curve,
    Measured,
    Point,
    measure,
    report,
)

SCRIPT = Path(__file__).parents[2] / "recipes" / "reproductions" / "r1_language_model.py"
SMALL: dict[str, Any] = {
    "data": {"limit": 60},
    "loop": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "evaluation": {"max_prompts": 3, "samples_per_prompt": 1, "max_new_tokens": 3},
}
Measure = Callable[..., Measured]


@pytest.fixture
def go(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    monkeypatch.setattr("dpo.model.base.fetch_embedded", lambda: tiny_model_folder)
    small = {"seeds": 1, "completions": 16, "samples": 6, "counts": (1, 3), "overrides": SMALL}
    return lambda **changes: measure(tmp_path / "out", **{**small, **changes})


def test_every_method_has_its_points(go: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = go()
    curves = {one.method: one.points for one in found.curves}
    assert [*curves] == [*OBJECTIVES, BEST_OF_N]
    assert found.prompts == 3
    starts = {curves[name][0].gold for name in OBJECTIVES}
    assert len(starts) == 1  # one start for all
    for name in OBJECTIVES:
        first, *_, last = curves[name]
        assert (first.at, first.kl, first.interval) == ("0 steps", 0.0, None)
        assert len(curves[name]) > 2  # on the way as well
        assert last.kl != 0
        assert last.interval is not None
        assert last.interval.value == last.gold
    start = Spoken.read(tmp_path / "out" / SAMPLES_FILE)
    assert {len(row) for row in start.answers} == {6}
    assert [(one.at, one.kl, one.interval) for one in curves[BEST_OF_N]] == [
        ("n = 1", 0.0, best_of(start, 1).gold),
        ("n = 3", kl_bound(3), best_of(start, 3).gold),
    ]
    # Told again, nothing is trained and nothing is sampled.
    monkeypatch.setattr(r1_language_model, "measure_start", lambda *_: pytest.fail("the samples are kept"))
    monkeypatch.setattr("dpo.compare.load_base", lambda _: pytest.fail("no model is needed"))
    assert go() == found


def test_a_run_that_fails_stops_it(go: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the card fell off")

    monkeypatch.setattr("dpo.compare.execute", failing)
    with pytest.raises(TrainingError, match=r"these runs failed: dpo, seed 0: RuntimeError: the card fell off; ipo"):
        go()


def test_the_report_holds_every_point(tmp_path: Path) -> None:
    end = Estimate(0.5, 0.4, 0.6, 60)
    trained = (Point("0 steps", 0.0, 0.25, None), Point("11 steps", 2.0, 0.375, None), Point("32 steps", 4.0, 0.5, end))
    chosen = (Point("n = 1", 0.0, 0.25, replace(end, value=0.25)), Point("n = 2", kl_bound(2), 0.375, end))
    curves = (*(Curve(name, trained) for name in OBJECTIVES), Curve(BEST_OF_N, chosen))
    made = report(Measured(curves, {"model": "tiny", "seeds": "0, 1, 2"}, samples=32, prompts=60))
    assert len(made.rows) == 3 * len(OBJECTIVES) + 2
    assert {len(row) for row in made.rows} == {len(made.header)}
    assert made.rows[1] == ("dpo", "11 steps", "2.00", "0.375", "")
    assert made.rows[2] == ("dpo", "32 steps", "4.00", "0.500", "0.400 to 0.600")
    assert made.rows[-1] == (BEST_OF_N, "n = 2", "0.19", "0.375", "0.400 to 0.600")
    assert "model: tiny; seeds: 0, 1, 2." in made.protocol
    assert "32 answers of the start to each of 60 prompts" in made.protocol
    (ax,) = made.figure.axes
    assert len(ax.lines) == len(curves)
    assert len(ax.collections) == len(OBJECTIVES) + 2  # the intervals
    for name in ("first.svg", "second.svg"):
        made.save(tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_the_script_says_what_it_is_and_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = " ".join(capsys.readouterr().out.split())
    assert "usage: r1_language_model.py" in said
    assert "R1: " in said
    assert "tens of minutes" in said
    assert all(option in said for option in ("--out FOLDER", "--runs FOLDER", "--seeds", "--completions"))


def test_main_passes_on_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[tuple[Any, ...]] = []
    curve = Curve(BEST_OF_N, (Point("n = 1", 0.0, 0.25, None),))
    found = Measured((curve,), {}, samples=32, prompts=60)
    monkeypatch.setattr(r1_language_model, "measure", lambda *given: asked.append(given) or found)
    r1_language_model.main(["--seeds", "2", "--completions", "64", "--runs", "here", "--out", str(tmp_path)])
    assert asked == [(Path("here"), 2, 64)]
    assert "| best-of-n | n = 1 | 0.00 | 0.250 |" in capsys.readouterr().out
    assert (tmp_path / "r1_language_model.svg").is_file()
