"""Reward models and RL carried out from settings: stages on one base, what is reported, refused and kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo.cli import app
from dpo.errors import ConfigError, DataError, ModelError, RewardError
from dpo.evaluate import evaluate_run
from dpo.metrics import read
from dpo.recipes import find
from dpo.run import execute
from dpo.settings import Run, plan, read_overrides

Planned = Callable[..., tuple[Run, ...]]


@pytest.fixture
def file(tmp_path: Path, pairs_file: Callable[..., Path]) -> Path:
    return pairs_file(tmp_path / "pairs.jsonl")


@pytest.fixture
def planned(file: Path, tiny_model_folder: Path, tmp_path: Path) -> Planned:
    def made(recipe: str, *given: str, out: str = "out") -> tuple[Run, ...]:
        common = [
            f"data.train={file}",
            "data.eval_share=0.2",
            f"model.name={tiny_model_folder}",
            "model.device=cpu",
            f"output.dir={tmp_path / out}",
            "loop.max_steps=3",
            "evaluation.max_prompts=2",
            "evaluation.max_new_tokens=3",
        ]
        sampling = ["rollout.max_new_tokens=4", "rollout.prompts_per_rollout=8"] if recipe != "reward" else []
        return plan(find(recipe), read_overrides([*common, *sampling, *given]))

    return made


def even(prompt: str, completion: str) -> float:
    """A reward of one's own, named by its import path."""
    return float(len(completion) % 2)


def flawed(prompt: str, completion: str) -> float:
    """Returns no number that can be trained on."""
    return float("nan")


def test_a_reward_model_reports_accuracy_calibration_and_its_scale(planned: Planned, tmp_path: Path) -> None:
    (result,) = execute(planned("reward", "loop.max_steps=30", "optimiser.learning_rate=3e-3"), "reward")
    assert result.achieved.spoken is None
    accuracy = result.summary["measures"]["eval/reward/accuracy"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert accuracy["n"] == sum(one["observed"]["n"] for one in result.summary["calibration"]) > 0
    assert 0 <= result.summary["calibration_error"] <= 1
    assert accuracy["value"] > 0.8  # "It is good and blue" against "A bad answer"
    assert result.summary["normalised_on_reference"]["deviation"] > 0
    assert "accuracy_by_agreement" not in result.summary  # the labels are certain
    assert {"head.safetensors", "adapter_model.safetensors"} <= {
        one.name for one in (tmp_path / "out/adapter").iterdir()
    }
    again = evaluate_run(tmp_path / "out", {}).summary
    assert again["measures"] == {"eval/reward/accuracy": accuracy}


def test_accuracy_is_told_by_agreement_where_the_data_has_it(planned: Planned, file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    soft = [row | {"agreement": 0.6 if n % 2 else 0.9} for n, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in soft))
    (result,) = execute(planned("reward"), "reward")
    found = result.summary["accuracy_by_agreement"]
    assert set(found) == {"0.6", "0.9"}
    assert sum(one["n"] for one in found.values()) == result.summary["measures"]["eval/reward/accuracy"]["n"]


@pytest.mark.parametrize("name", ["kwise", "plackettluce"])
def test_rankings_train_a_reward_model(planned: Planned, file: Path, name: str) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ranked = [
        {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"], f"Well {n}."], "scores": [1, 3, 2]}
        for n, row in enumerate(rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in ranked))
    more = ("loop.max_steps=30", "optimiser.learning_rate=3e-3", f"objective.name={name}")
    (result,) = execute(planned("reward", *more), "reward")
    accuracy = result.summary["measures"]["eval/reward/accuracy"]
    assert accuracy["value"] > 0.8
    assert sum(one["observed"]["n"] for one in result.summary["calibration"]) == 3 * accuracy["n"]


def test_two_stages_share_one_base_and_the_second_learns_through_the_first(planned: Planned, tmp_path: Path) -> None:
    reward, ppo = execute(planned("reward_ppo", "evaluation.gold=dpo.data.gold:sentiment"), "reward_ppo")
    assert (reward.folder.name, ppo.folder.name) == ("1-reward", "2-ppo")
    settings = (tmp_path / "out/2-ppo/run.yaml").read_text()
    assert settings.count(str(tmp_path / "out/1-reward/adapter")) == 2  # the reward, and the value's start
    first = read(ppo.folder / "metrics.jsonl")[0]
    assert {"rollout/score", "rollout/gold_reward", "kl/policy_reference", "value/loss", "policy/loss"} <= set(first)
    sampled = {"eval/gold_reward", "eval/proxy_reward", "kl/policy_reference", "eval/length"}
    assert {*sampled, "eval/pair/accuracy", "eval/pair/margin"} == set(ppo.summary["measures"])
    assert ppo.summary["reference"].endswith("with adapters off")
    assert "value" not in {one.name for one in (ppo.folder / "adapter").iterdir()}
    again = evaluate_run(ppo.folder, {}).summary
    assert again["measures"] == ppo.summary["measures"]


def test_a_finished_reward_model_is_not_trained_again(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    import dpo.run as module

    train, trained = module.train, []
    monkeypatch.setattr(
        module, "train", lambda **given: trained.append(type(given["objective"]).__name__) or train(**given)
    )
    execute(planned("reward", out="out/1-reward"), "reward")
    execute(planned("reward_ppo"), "reward_ppo")
    assert trained == ["BradleyTerry", "PPO"]


def test_a_reward_of_ones_own_leaves_the_reward_model_out(planned: Planned) -> None:
    own = f"rollout.rewards=[{__name__}:even]" if ":" not in __name__ else ""
    runs = planned("rloo", own)
    assert [run.name for run in runs] == ["rloo"]
    (result,) = execute(runs, "rloo")
    assert "rollout/score" in read(result.folder / "metrics.jsonl")[0]
    kept = planned("reward_ppo", own)  # its value role still starts as the reward model
    assert [run.name for run in kept] == ["reward", "ppo"]
    assert [run.name for run in planned("reward_ppo", own, "rollout.value=null")] == ["ppo"]


def test_watched_rewards_and_an_ensemble_are_in_the_metrics(planned: Planned, tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        (result,) = execute(planned("reward", f"loop.seed={seed}", out=f"reward{seed}"), "reward")
        folders.append(str(result.folder / "adapter"))
    ensemble = f"rollout.rewards=[{{kind: model, folders: [{', '.join(folders)}], combine: mean_minus_variance}}]"
    (result,) = execute(planned("rloo", ensemble, "rollout.watch=[{kind: rouge}]"), "rloo")
    first = read(result.folder / "metrics.jsonl")[0]
    assert float(first["rollout/disagreement"]) > 0
    assert 0 <= float(first["custom/reward_rouge"]) <= 1


def test_a_reward_model_of_another_base_is_refused_before_anything_is_written(planned: Planned, tmp_path: Path) -> None:
    (result,) = execute(planned("reward", out="reward"), "reward")
    adapter = result.folder / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    given = f"rollout.rewards=[{{kind: model, folders: [{adapter}]}}]"
    with pytest.raises(ModelError, match="was trained on the base 'elsewhere', expected"):
        execute(planned("rloo", given), "rloo")
    assert not (tmp_path / "out").exists()


def test_a_reward_that_returns_nan_names_the_row(planned: Planned) -> None:
    with pytest.raises(RewardError, match=r"pairs\.jsonl:\d+: .*returned nan"):
        execute(planned("rloo", f"rollout.rewards=[{__name__}:flawed]"), "rloo")


def test_a_model_without_an_end_token_is_refused(planned: Planned, tiny_model_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "endless"
    shutil.copytree(tiny_model_folder, folder)
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            (folder / name).write_text(
                json.dumps(settings | {"eos_token": None, "eos_token_id": None, "pad_token": "<s>"})
            )
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(DataError, match="no end-of-sequence token"):
        execute(planned("rloo", f"rollout.rewards=[{__name__}:even]", f"model.name={folder}"), "rloo")


def test_empty_prompts_are_dropped_by_reason_and_none_left_is_an_error(planned: Planned, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in ("", "Hi there", "  ", "And you")))
    own = (f"rollout.rewards=[{__name__}:even]", f"rollout.prompts={prompts}")
    (result,) = execute(planned("rloo", *own), "rloo")
    assert json.loads((result.folder / "data.json").read_text())["train"]["kept"] == 2
    prompts.write_text('{"prompt": ""}\n{"prompt": " "}\n')
    with pytest.raises(DataError, match="empty"):
        execute(planned("rloo", *own, out="other"), "rloo")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("dpo", ["objective=ppo"], r"rollout is missing: ppo learns from sampled completions"),
        (
            "kto",
            ["rollout={rewards: ['dpo.data.gold:sentiment']}"],
            r"rollout: kto reads judgements, which are not sampled",
        ),
        (
            "rloo",
            ["rloo.rollout.completions_per_prompt=1"],
            r"rloo compares completions of one prompt and needs at least 2",
        ),
        ("rloo", ["rloo.rollout.value=previous"], r"rollout\.value: rloo has no value role"),
        ("rloo", ["rloo.rollout.rewards=[]"], r"rewards: got none, expected at least one"),
        (
            "rloo",
            ["rloo.rollout.rewards=[{kind: model, folders: ['stage:rewards']}]"],
            r"no stage of that name comes before",
        ),
        ("rloo", ["rloo.model.lora.dropout=0.1"], r"model\.lora\.dropout: rloo compares the policy with itself"),
        ("reward_ppo", ["ppo.model.lora=null"], r"model\.lora: ppo trains a value role beside the policy"),
        (
            "rloo",
            ["rloo.rollout.missing_end=keep", "rloo.rollout.missing_end_penalty=2"],
            r"missing_end_penalty is not used",
        ),
        (
            "rloo",
            ["rloo.rollout.temprature=2"],
            r"unknown key 'rollout\.temprature'\. Did you mean 'rollout\.temperature'",
        ),
        ("sft_dpo", ["dpo.model.adapter=stage:nothing"], r"starts from an earlier stage|no stage of that name"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    planned: Planned, recipe: str, given: list[str], message: str
) -> None:
    overrides = read_overrides(["data.train=x.jsonl", *given])
    with pytest.raises(ConfigError, match=message):
        plan(find(recipe), overrides)


def test_the_command_line_names_a_fault_in_one_line(
    planned: Planned, file: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    arguments: list[Any] = [
        "train",
        "rloo",
        f"data.train={file}",
        f"model.name={tiny_model_folder}",
        f"output.dir={tmp_path / 'out'}",
    ]
    done = CliRunner().invoke(app, [*arguments, f"rloo.rollout.rewards=[{__name__}:absent]"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: command line: reward=")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
