"""Comparisons on the tiny model: one budget, one split, safe to stop, and one failure costs nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo import compare as module
from dpo.compare import Wanted, rebuild, run_comparison
from dpo.errors import ConfigError, DataError, DPOError
from dpo.evaluation.judges import Judge, Question, Verdict
from dpo.evaluation.records import Comparison
from dpo.metrics import read
from dpo.model.base import ModelConfig
from dpo.settings import merged, read_overrides

Compare = Callable[..., Comparison]

LEFT = {"report.html", "results.json", "results.csv", "differences.csv", "comparison.json", "start", "runs"}


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture
def go(
    tmp_path: Path, tiny_config: ModelConfig, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Compare:
    """Compare on the tiny model in an empty current folder; the report lies in `out`."""
    monkeypatch.chdir(tmp_path)
    pairs_file(tmp_path / "pairs.jsonl")
    (tmp_path / "my_gold.py").write_text("def remainder(prompt, completion): return float(len(completion) % 7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = ["data.train=pairs.jsonl", "data.eval_share=0.3", "data.limit=30", f"model.name={tiny_config.name}"]
    given += ["model.dtype=float32", "model.device=cpu", "loop.gradient_accumulation_steps=1"]
    given += ["evaluation.max_prompts=4", "evaluation.max_new_tokens=3", "evaluation.gold=my_gold:remainder"]

    def carried_out(*objectives: str, settings: Sequence[str] = (), **more: Any) -> Comparison:
        overrides = read_overrides([*given, *settings])
        wanted = Wanted(**{"objectives": objectives, "completions": 16, "overrides": overrides, **more})
        return run_comparison(wanted, Path("out"))[0]

    return carried_out


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the entries that are trained from here on."""
    trained: list[str] = []
    real = module.execute

    def execute(runs: Any, name: str, **more: Any) -> Any:
        trained.append(f"{name}-{runs[-1].loop.seed}")
        return real(runs, name, **more)

    monkeypatch.setattr(module, "execute", execute)
    return trained


def lasting(folder: Path) -> dict[str, Any]:
    """Return the results without what no two trainings share: seconds and bytes."""
    found = json.loads((folder / "results.json").read_text())
    for entry in found["entries"]:
        entry["cost"] = {
            key: value for key, value in entry["cost"].items() if key in ("steps", "completions", "tokens")
        }
    return found


def test_every_entry_and_seed_is_trained_under_one_budget(go: Compare) -> None:
    found = go("dpo", "kto", seeds=2, settings=["kto.objective.beta=0.2"])
    assert found.facts["of one entry alone"] == "kto: objective.beta=0.2"
    assert [one.settings["objective.beta"] for one in found.entries] == [0.1, 0.2]
    assert {file.name for file in Path("out").iterdir()} - {".lock"} == LEFT
    assert {one.name for one in Path("out/runs").iterdir()} == {"dpo-seed0", "dpo-seed1", "kto-seed0", "kto-seed1"}
    assert [one.name for one in found.entries] == ["dpo", "kto"]
    costs = [one.cost for one in found.entries]
    assert [one.completions for one in costs if one] == [16, 16]
    assert [one.steps for one in costs if one] == [2, 2]  # four pairs, or eight judgements, at once
    assert {one.name for one in found.measures} >= {"eval/gold_reward", "eval/pair/accuracy", "kl/policy_reference"}
    assert not found.partial
    assert found.entries[0].measures["eval/gold_reward"].n == 4


def test_the_budget_may_be_time(go: Compare) -> None:
    found = go("dpo", "kto", completions=None, seconds=1.5)
    costs = [one.cost for one in found.entries if one.cost]
    assert all(1.5 <= one.seconds < 15 and one.steps > 1 for one in costs)
    assert found.facts["budget"] == "1.5 seconds of training a stage"
    for name in ("dpo", "kto"):
        rows = [row for row in read(Path("out/runs") / f"{name}-seed0" / "metrics.jsonl") if row["kind"] == "train"]
        rates = [float(row["train/learning_rate"]) for row in rows]
        assert rates[-1] < 0.5 * max(rates)  # the shape of the rate ended with the time
    with pytest.raises(ConfigError, match="--completions and --seconds: got two budgets"):
        go("dpo", seconds=5.0)


def same_start(first: str, second: str) -> bool:
    """Tell whether two runs that hardly moved began with the same random matrices."""
    one, other = (load_file(Path("out/runs") / name / "adapter/adapter_model.safetensors") for name in (first, second))
    names = [name for name in one if "lora_A" in name]
    assert names
    return all(torch.allclose(one[name], other[name], atol=1e-6) for name in names)


def test_seeds_share_order_and_start_across_entries(go: Compare) -> None:
    go("dpo", "ipo", seeds=2, settings=["optimiser.learning_rate=1e-12"])

    def texts(folder: Path) -> list[list[str]]:
        rows = (folder / "samples.jsonl").read_text().splitlines()
        return [[answer["text"] for answer in json.loads(row)["answers"]] for row in rows]

    def order(name: str) -> list[Any]:
        return [row["train/tokens_seen"] for row in read(Path("out/runs") / name / "metrics.jsonl")]

    assert order("dpo-seed0") == order("ipo-seed0")
    assert order("dpo-seed0") != order("dpo-seed1")
    assert same_start("dpo-seed0", "ipo-seed0")
    assert not same_start("dpo-seed0", "dpo-seed1")
    # Untrained, and asked with the same seed of sampling:
    assert texts(Path("out/runs/dpo-seed0")) == texts(Path("out/runs/ipo-seed1")) == texts(Path("out/start"))


@pytest.mark.parametrize("at", [1, 3])
def test_a_comparison_that_was_killed_goes_on_and_ends_the_same(
    go: Compare, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    go("dpo", "ipo", seeds=2)
    whole = lasting(Path("out"))
    Path("out").rename("whole")
    real = module.execute
    calls: list[str] = []

    def killed(runs: Any, name: str, **more: Any) -> Any:
        calls.append(name)
        if len(calls) == at + 1:
            raise Killed
        return real(runs, name, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "execute", killed)
        with pytest.raises(Killed):
            go("dpo", "ipo", seeds=2)
    assert not Path("out/report.html").exists()
    trained = counted(monkeypatch)
    go("dpo", "ipo", seeds=2)
    assert trained == ["dpo-0", "ipo-0", "dpo-1", "ipo-1"][at:]
    assert lasting(Path("out")) == whole


def test_a_run_that_fails_costs_no_other_and_is_tried_again(go: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.execute

    def failing(runs: Any, name: str, **more: Any) -> Any:
        if name == "ipo":
            raise RuntimeError("the card fell off")
        return real(runs, name, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "execute", failing)
        found = go("dpo", "ipo", "kto")
    assert found.partial
    assert found.entries[1].failed == {0: "RuntimeError: the card fell off"}
    assert found.entries[1].measures == {}
    assert [bool(one.measures) for one in found.entries] == [True, False, True]
    assert any("missing: ipo, seed 0" in line for line in found.warnings)
    assert "the card fell off" in Path("out/report.html").read_text()
    trained = counted(monkeypatch)
    again = go("dpo", "ipo", "kto")
    assert trained == ["ipo-0"]
    assert not again.partial
    assert again.entries[1].failed == {}


def test_more_seeds_and_entries_join_what_is_there(go: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    go("dpo")
    trained = counted(monkeypatch)
    found = go("dpo", "ipo", seeds=2)
    assert trained == ["ipo-0", "dpo-1", "ipo-1"]
    assert [one.seeds for one in found.entries] == [(0, 1), (0, 1)]


def test_other_settings_in_the_same_folder_are_refused(go: Compare) -> None:
    go("dpo")
    with pytest.raises(
        ConfigError, match=r"holds a finished run with objective\.beta=0\.1, got 0\.5\. Give another --out"
    ):
        go("dpo", settings=["objective.beta=0.5"])
    with pytest.raises(ConfigError, match=r"holds a finished run with loop\.max_steps=2, got 4"):
        go("dpo", completions=32)


def test_data_that_has_changed_is_refused(go: Compare) -> None:
    go("dpo")
    text = Path("pairs.jsonl").read_text().splitlines()
    Path("pairs.jsonl").write_text("\n".join([*text[1:], text[0]]) + "\n")
    with pytest.raises(ConfigError, match=r"out: was begun with other data\."):
        go("dpo")


@pytest.mark.parametrize(
    ("objectives", "more", "message"),
    [
        (("dop",), {}, r"--objectives: 'dop' is neither a recipe, an objective nor a YAML file\. Did you mean"),
        (("dpo", "dpo"), {}, r"--objectives: got 'dpo' twice"),
        ((), {}, r"--objectives: got none"),
        (("dpo", "ipo"), {"settings": ["objective.beta=0.1"]}, r"IPO has no such hyper-parameter"),
        (("dpo",), {"settings": ["data.train=nowhere.jsonl"]}, r"nowhere\.jsonl"),
        (("dpo",), {"settings": ["evaluation.reward_model=nowhere"]}, r"evaluation\.reward_model"),
        (("dpo",), {"settings": ["evaluation.harness=nowhere.yaml"]}, r"evaluation\.harness: there is no file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    go: Compare, objectives: tuple[str, ...], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(DPOError, match=message):
        go(*objectives, **more)
    assert not Path("out").exists()


def test_another_evaluation_is_refused_also_before_anything_is_trained(
    go: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "execute", killed)
        with pytest.raises(Killed):
            go("dpo")
    with pytest.raises(ConfigError, match=r"was begun with other evaluation prompts or settings"):
        go("dpo", settings=["evaluation.max_new_tokens=5"])


def test_a_start_that_was_cut_off_is_measured_again(go: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "measure_start", killed)
        with pytest.raises(Killed):
            go("dpo")
    found = go("dpo")
    assert "eval/gold_reward" in found.start.measures


def test_entries_that_cannot_be_set_beside_one_another_are_refused(go: Compare, tmp_path: Path) -> None:
    go("dpo")
    text = (Path("out/runs/dpo-seed0") / "run.yaml").read_text()
    (tmp_path / "other.yaml").write_text(text.replace("max_new_tokens: 3", "max_new_tokens: 9"))
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "start.yaml").write_text(text)
    Path("out").rename("kept")
    with pytest.raises(ConfigError, match=r"other: evaluation\.max_new_tokens is 9, and 3 in dpo, expected one"):
        run_comparison(Wanted(("mine.yaml", "other.yaml")), Path("out"))
    with pytest.raises(ConfigError, match=r"--objectives: got 'start', expected a name"):
        run_comparison(Wanted(("start.yaml",)), Path("out"))
    with pytest.raises(ConfigError, match=r"reward trains a reward model, expected a policy"):
        go("reward")
    assert not Path("out").exists()


def test_nothing_held_out_is_refused(go: Compare) -> None:
    with pytest.raises(
        DataError, match=r"no held-out examples and no evaluation prompts.*Give data\.eval_share above 0"
    ):
        go("dpo", settings=["data.eval_share=0"])
    assert not Path("out").exists()


def test_a_file_of_a_run_is_an_entry_too(go: Compare, tmp_path: Path) -> None:
    go("dpo")
    (tmp_path / "mine.yaml").write_text((Path("out/runs/dpo-seed0") / "run.yaml").read_text())
    found = go("dpo", "mine.yaml")
    assert [one.name for one in found.entries] == ["dpo", "mine"]
    first, second = (one.measures["eval/gold_reward"].value for one in found.entries)
    assert first == second  # the same settings


def test_the_report_of_runs_that_were_trained_one_by_one(go: Compare) -> None:
    go("dpo", "ipo")
    found = rebuild([Path("out/runs/dpo-seed0"), Path("out/runs/ipo-seed0")], Path("apart"))
    assert [one.name for one in found.entries] == ["dpo", "ipo"]
    assert any("nobody saw to equal budgets" in line for line in found.warnings)
    assert Path("apart/report.html").is_file()
    same = lasting(Path("out"))["entries"][0]["measures"]["eval/pair/accuracy"]
    assert lasting(Path("apart"))["entries"][0]["measures"]["eval/pair/accuracy"] == same
    with pytest.raises(ConfigError, match=r"nowhere: holds neither a comparison"):
        rebuild([Path("nowhere")], Path("apart"))


def test_a_finished_comparison_is_told_again_without_a_model(go: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    go("dpo", "ipo")
    before = Path("out/report.html").read_bytes()
    monkeypatch.setattr(module, "load_base", lambda _: pytest.fail("no model is needed"))
    rebuild([Path("out")], Path("out"))
    assert Path("out/report.html").read_bytes() == before
    go("dpo", "ipo")
    assert Path("out/report.html").read_bytes() == before


# --- trackers ---


@pytest.mark.network  # wandb's own service process listens on a socket of this machine
@pytest.mark.enable_socket
def test_wandb_holds_the_common_metrics_of_every_run_under_the_same_names(
    go: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(Path.cwd()))
    go("dpo", "kto", "simpo", settings=["output.report_to=wandb", "evaluation.sample_steps=1"])
    names: dict[str, set[str]] = {}
    groups = set()
    for stored in sorted(Path("out/runs").glob("*/wandb/offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(stored)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        records = [json.loads(line) for line in shown.stdout.splitlines()]
        items = [one["history"]["item"] for one in records if one["type"] == "history"]
        names[stored.parts[2]] = {name for item in items for name in item}
        groups |= {one["run"]["run_group"] for one in records if one["type"] == "run"}
    assert set(names) == {"dpo-seed0", "kto-seed0", "simpo-seed0"}
    assert groups == {"out"}  # one comparison, one group
    common = {
        "train/loss", "train/learning_rate", "train/examples_seen", "train/tokens_seen", "train/global_step",
        "reward/chosen", "reward/rejected", "reward/margin", "reward/accuracy", "logp/chosen", "logp/rejected",
        "length/chosen", "length/rejected", "grad_norm", "tokens_per_second", "memory/peak", "time/seconds",
        "eval/loss", "eval/reward/accuracy", "eval/gold_reward", "eval/length", "kl/policy_reference",
    }  # fmt: skip
    for run, found in names.items():
        assert common <= found, f"{run}: {common - found}"
        assert any(name.startswith("samples") for name in found), run  # the table of the same prompts


# --- judges ---


class Fussy(Judge):
    """Likes the longer answer, and gives no verdict on the first question."""

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        longer = [Verdict(float(len(one.first) > len(one.second)), "longer") for one in questions]
        return [Verdict(None, "timed out"), *longer[1:]]


class Broken(Judge):
    """Cannot be asked."""

    def judge(self, questions: Sequence[Question]) -> list[Verdict]:
        raise ConfigError("judge: nothing listens there")


def test_a_judge_that_fails_on_some_prompts_leaves_a_partial_comparison(
    go: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_judges", lambda *_: [Fussy("fussy")])
    found = go("dpo", "ipo")
    by = {one.judge: one.rates for one in found.wins}
    assert {(one.first, one.second) for one in by["fussy"]} == {("dpo", "start"), ("ipo", "start"), ("dpo", "ipo")}
    assert [(one.judged, one.missing) for one in by["fussy"]] == [(3, 1)] * 3
    assert all(one.missing == 0 for one in by["gold reward"])
    assert found.partial
    assert any("no verdict on 3 questions" in line for line in found.warnings)


def test_a_judge_that_cannot_be_asked_costs_its_win_rates_only(go: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_judges", lambda *_: [Broken("broken")])
    found = go("dpo", "ipo")
    assert [one.judge for one in found.wins] == ["gold reward"]
    assert found.partial
    assert "nothing listens there" in found.warnings[0]


# --- tuning ---


def test_tuning_tries_settings_on_a_part_of_the_training_prompts(go: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    found = go("dpo", tune=3)
    trials = sorted(Path("out/tuning/dpo").glob("trial-*"))  # one folder each, named by its settings
    assert len(trials) == 3
    settings = [json.loads((one / "data.json").read_text())["fingerprint"] for one in trials]
    final = json.loads(Path("out/runs/dpo-seed0/data.json").read_text())["fingerprint"]
    assert len(set(settings)) == 1
    assert settings[0] != final  # other prompts are held out
    best = json.loads(Path("out/tuning/dpo/best.json").read_text())["best"]
    assert set(best) == {"optimiser.learning_rate", "objective.beta"}
    entry = found.entries[0]
    assert entry.tuned == best
    run = Path("out/runs/dpo-seed0/run.yaml").read_text()
    assert f"beta: {best['objective.beta']}" in run
    assert not any("Untuned" in line for line in found.warnings)
    trained = counted(monkeypatch)
    monkeypatch.setattr("dpo.tune.execute", lambda *_, **__: pytest.fail("no trial is trained twice"))
    assert go("dpo", tune=3).entries[0].tuned == best
    assert trained == []


def test_overrides_keep_their_place(go: Compare) -> None:
    found = go("dpo", settings=["loop.max_steps=3", "optimiser.learning_rate=3e-4"])
    assert found.settings["optimiser.learning_rate"] == 3e-4
    assert [one.cost.steps for one in found.entries if one.cost] == [3]
    assert any("length of the training was given in steps" in line for line in found.warnings)
    assert merged({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
