"""The quickstart on the tiny model: one start for all, one table, figures that are those of the runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo import quickstart
from dpo.evaluation.samples import Spoken
from dpo.model.base import ModelConfig
from dpo.model.rollout import Sample
from dpo.quickstart import ENTRIES, FAST, FULL, Size, gain, runs
from dpo.run import Result

Go = Callable[[Path], list[Result]]


@pytest.fixture
def go(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """Carry out the quickstart with the tiny model in place of the embedded one."""
    monkeypatch.setattr("dpo.model.base.fetch_embedded", lambda: tiny_model_folder)
    monkeypatch.setattr(quickstart, "FAST", Size(steps=2, rate=2.0, prompts=4, samples_per_prompt=2, eval_share=0.02))
    return lambda output: quickstart.quickstart(fast=True, output=output)


def spoken(*gold: float) -> Spoken:
    prompts = tuple(f"prompt {i}" for i in range(len(gold)))
    samples = tuple((Sample((1,), (2,), "text", finished=True),) for _ in gold)
    return Spoken(prompts=prompts, samples=samples, gold=gold, kl=gold, length=gold)


def test_the_gain_is_taken_prompt_by_prompt() -> None:
    """Prompts differ far more than before and after do: +0.1 on each is +0.1 without doubt."""
    before, after = spoken(-0.9, 0.0, 0.4, 0.8), spoken(-0.8, 0.1, 0.5, 0.9)
    estimate = gain(before, after)
    assert estimate.value == pytest.approx(0.1)
    assert estimate.half_width < 1e-9


@pytest.mark.parametrize("size", [FULL, FAST])
def test_the_runs_differ_in_the_objective_alone(size: Size) -> None:
    planned = runs(size, Path("pairs.jsonl"), Path("prompts.txt"), Path("out"))
    assert [run.objective.name for run in planned] == list(ENTRIES) == ["dpo", "ipo", "kto"]
    for part in ("data", "model", "evaluation"):
        assert len({json.dumps(getattr(run, part).model_dump(mode="json")) for run in planned}) == 1
    completions = {run.loop.per_device_train_batch_size * (1 if run.name == "kto" else 2) for run in planned}
    assert completions == {16}  # every objective reads as many completions a step
    assert {(run.loop.max_steps, run.loop.seed) for run in planned} == {(size.steps, 0)}


def test_three_objectives_from_one_start_and_one_table(
    go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    loaded = []
    load = quickstart.load_base
    monkeypatch.setattr(quickstart, "load_base", lambda config: loaded.append(config) or load(config))
    results = go(tmp_path / "out")
    assert loaded == [ModelConfig()]  # one base for everything
    assert [result.run.name for result in results] == ["dpo", "ipo", "kto"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(written["start"]) == {"eval/gold_reward", "eval/length", "kl/policy_reference"}
    for result in results:
        entry = written["runs"][result.run.name]
        assert entry["measures"] == json.loads((result.folder / "summary.json").read_text())["measures"]
        start = written["start"]["eval/gold_reward"]["value"]
        assert entry["gain"]["value"] == pytest.approx(entry["measures"]["eval/gold_reward"]["value"] - start)
        assert entry["reference"].endswith("with adapters off")
    shown = capsys.readouterr().out
    for wanted in ("gold reward", "KL, nats", "pair accuracy", "seconds", "GiB", "start", *map(str, ENTRIES)):
        assert wanted in shown
    assert all(str(result.folder) in shown.replace("\n", "") for result in results)


def test_a_sample_that_looks_like_markup_is_shown_as_it_is(
    go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.decode", lambda *_, **__: "so [/bold] good and [red]fine")
    go(tmp_path / "out")
    assert "so [/bold] good and [red]fine" in capsys.readouterr().out
