"""The quickstart on the tiny model: one start for all, one table, figures that are those of the runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo import quickstart
from dpo.embedded import embedded
from dpo.evaluation.samples import Answer, Spoken
from dpo.model.base import ModelConfig
from dpo.quickstart import ENTRIES, FAST, FULL, Size, gain, runs
from dpo.run import Result
from dpo.settings import check_stages

Go = Callable[[Path], dict[str, Result]]


@pytest.fixture
def go(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """Carry out the quickstart with the tiny model in place of the embedded one."""
    monkeypatch.setattr("dpo.model.base.fetch_embedded", lambda: tiny_model_folder)
    monkeypatch.setattr(quickstart, "FAST", Size(2, 2.0, 4, 2, 0.02, reward_steps=2, rollouts=1))
    monkeypatch.setattr(quickstart, "PROMPTS_PER_ROLLOUT", 16)
    monkeypatch.setattr(quickstart, "UPDATES_PER_ROLLOUT", 2)
    return lambda output: quickstart.quickstart(fast=True, output=output)


def spoken(*gold: float) -> Spoken:
    prompts = tuple(f"prompt {i}" for i in range(len(gold)))
    return Spoken(prompts, tuple((Answer("text", 1, finished=True, log_ratio=0.0, gold=one),) for one in gold))


def test_the_gain_is_taken_prompt_by_prompt() -> None:
    """Prompts differ far more than before and after do: +0.1 on each is +0.1 without doubt."""
    before, after = spoken(-0.9, 0.0, 0.4, 0.8), spoken(-0.8, 0.1, 0.5, 0.9)
    estimate = gain(before, after)
    assert estimate.value == pytest.approx(0.1)
    assert estimate.half_width < 1e-9


@pytest.mark.parametrize("size", [FULL, FAST])
def test_the_runs_differ_in_the_objective_alone(size: Size) -> None:
    with embedded() as task:
        planned = runs(size, task, Path("out"))
    assert list(planned) == [*ENTRIES, "reward_ppo"]
    offline = [run for name in ENTRIES for run in planned[name]]
    every = [run for stages in planned.values() for run in stages]
    assert [run.objective.name for run in every] == ["dpo", "ipo", "kto", "bradleyterry", "ppo"]
    for part in ("data", "model", "evaluation"):
        assert len({json.dumps(getattr(run, part).model_dump(mode="json")) for run in every}) == 1
    halves = ("kto", "ppo")
    completions = {run.loop.per_device_train_batch_size * (1 if run.name in halves else 2) for run in every}
    assert completions == {16}  # every objective reads as many completions a step
    assert {(run.loop.max_steps, run.loop.seed) for run in offline} == {(size.steps, 0)}
    check_stages(planned["reward_ppo"], "here")


def test_all_from_one_start_and_one_table(
    go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    loaded = []
    load = quickstart.load_base
    monkeypatch.setattr(quickstart, "load_base", lambda config: loaded.append(config) or load(config))
    results = go(tmp_path / "out")
    assert loaded == [ModelConfig()]  # one base for everything
    assert list(results) == ["dpo", "ipo", "kto", "reward_ppo"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(written["start"]) == {"eval/gold_reward", "eval/length", "kl/policy_reference"}
    for name, result in results.items():
        entry = written["runs"][name]
        assert entry["measures"] == json.loads((result.folder / "summary.json").read_text())["measures"]
        start = written["start"]["eval/gold_reward"]["value"]
        assert entry["gain"]["value"] == pytest.approx(entry["measures"]["eval/gold_reward"]["value"] - start)
        assert entry["reference"].endswith("with adapters off")
    shown = capsys.readouterr().out
    for wanted in (
        "gold reward",
        "KL, nats",
        "pair accuracy",
        "seconds",
        "GiB",
        "start",
        "reward_ppo",
        *map(str, ENTRIES),
    ):
        assert wanted in shown
    assert all(str(result.folder) in shown.replace("\n", "") for result in results.values())


def test_a_sample_that_looks_like_markup_is_shown_as_it_is(
    go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.decode", lambda *_, **__: "so [/bold] good and [red]fine")
    go(tmp_path / "out")
    assert "so [/bold] good and [red]fine" in capsys.readouterr().out
