"""A reward model beside the gold reward: who it is, what it scores, and that measuring with it changes nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dpo.run
from dpo import recipes
from dpo.data import check
from dpo.errors import ConfigError, DPOError, ModelError
from dpo.evaluate import evaluate, evaluate_run
from dpo.evaluation.samples import Spoken
from dpo.measure import proxy_roles, reward_roles
from dpo.metrics import read
from dpo.model.base import HEAD_FILE, LanguageModel, ModelConfig, ScalarRole, load_base
from dpo.model.scalar import scores
from dpo.run import Result, execute, measure_start
from dpo.settings import Run, plan, read_overrides

Planned = Callable[..., tuple[Run, ...]]
MakeReward = Callable[[str, int], Path]


@pytest.fixture
def make_reward(tiny_config: ModelConfig, tmp_path: Path) -> MakeReward:
    """Write a reward model with random weights."""

    def made(name: str, seed: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        role = ScalarRole("reward", None, True)
        model = LanguageModel.start(load_base(tiny_config), tiny_config, seed, scalars=[role], policy=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save(folder, "reward")
        return folder

    return made


@pytest.fixture
def planned(tmp_path: Path, tiny_model_folder: Path, pairs_file: Callable[..., Path]) -> Planned:
    file = pairs_file(tmp_path / "pairs.jsonl")

    def made(recipe: str, *given: str, out: str = "out") -> tuple[Run, ...]:
        common = [
            f"data.train={file}",
            "data.eval_share=0.3",
            f"model.name={tiny_model_folder}",
            "model.device=cpu",
            "model.dtype=float32",
            f"output.dir={tmp_path / out}",
            "loop.max_steps=2",
            "optimiser.learning_rate=0.05",
            "evaluation.max_prompts=3",
            "evaluation.max_new_tokens=4",
        ]
        sampling = ["rollout.max_new_tokens=4", "rollout.prompts_per_rollout=8"] if recipe == "rloo" else []
        return plan(recipes.find(recipe), read_overrides([*common, *sampling, *given]))

    return made


def said_by(result: Result, reward: Path, role: str = "policy") -> list[float]:
    """Return what the reward model in a folder says of a run's answers, or of its reference's, loaded and sampled anew:
    means by prompt.
    """
    from dpo.data import Renderer
    from dpo.model.rollout import sample

    run = result.run
    base = load_base(run.model)
    judge = ScalarRole("judge", str(reward), False)
    model = LanguageModel.start(base, run.model, 7, scalars=[judge])
    model.restore(result.folder / "adapter")
    renderer = Renderer(base.tokenizer, run.data.max_length, run.data.overlong)
    prompts = list(dict.fromkeys(record.prompt for record in check(run.data).eval))[:3]
    ids = [renderer.prompt(one) for one in prompts]
    samples = sample(model, ids, role=role, max_new_tokens=4, seed=run.evaluation.seed)
    with model.reading("judge"):
        return scores(model, [(one.prompt, one.completion) for one in samples], "judge").tolist()


def weights(result: Result) -> dict[str, torch.Tensor]:
    return load_file(result.folder / "adapter/adapter_model.safetensors")


def test_a_run_that_learns_from_a_reward_model_is_scored_by_its_own(planned: Planned, make_reward: MakeReward) -> None:
    folder = make_reward("judge", 1)
    rewards = (
        f"rollout.rewards=[{{kind: model, folders: [{folder}], weight: 2}}, {{kind: length, target: 0, per_token: 9}}]"
    )
    gold = ("evaluation.gold=dpo.data.gold:sentiment", "evaluation.sample_steps=1")
    (result,) = execute(planned("rloo", rewards, *gold), "rloo")
    spoken = result.achieved.spoken
    assert spoken is not None
    assert spoken.proxy == pytest.approx([2 * one for one in said_by(result, folder)], abs=1e-4)  # and no length
    assert spoken.reference_proxy == pytest.approx([2 * one for one in said_by(result, folder, "reference")], abs=1e-4)
    assert spoken.proxy != spoken.reference_proxy
    (heard,) = [row for row in read(result.folder / "metrics.jsonl") if "eval/gold_reward" in row]
    assert "eval/proxy_reward" in heard
    assert result.summary["measures"]["eval/proxy_reward"]["n"] == 3
    assert evaluate_run(result.folder, {}).summary["measures"] == result.summary["measures"]
    shutil.rmtree(folder)
    without = evaluate_run(result.folder, {}).summary["measures"]
    assert set(result.summary["measures"]) - set(without) == {"eval/proxy_reward"}


def test_a_reward_model_that_is_named_scores_runs_and_their_start_and_changes_no_weight(
    planned: Planned, make_reward: MakeReward, tiny_config: ModelConfig
) -> None:
    folder = make_reward("judge", 1)
    given, dropping = f"evaluation.reward_model={folder}", "model.lora.dropout=0.2"
    (plain,) = execute(planned("dpo", dropping, out="plain"), "dpo")
    (result,) = execute(planned("dpo", dropping, given), "dpo")
    assert "eval/proxy_reward" not in plain.summary["measures"]
    spoken = result.achieved.spoken
    assert spoken is not None
    assert spoken.proxy == pytest.approx(said_by(result, folder), abs=1e-4)
    assert spoken.reference_proxy == ()
    assert {name: one.tolist() for name, one in weights(result).items()} == {
        name: one.tolist() for name, one in weights(plain).items()
    }
    start = measure_start(result.run, load_base(tiny_config), check(result.run.data)).spoken
    assert start is not None
    assert start.proxy == pytest.approx(said_by(result, folder, "reference"), abs=1e-4)
    assert start.proxy_by == spoken.proxy_by
    again = Spoken.read(result.folder / "samples.jsonl")
    assert again == spoken


def test_who_scored_is_known_by_content(planned: Planned, make_reward: MakeReward, tmp_path: Path) -> None:
    first = make_reward("judge", 1)
    shutil.copytree(first, tmp_path / "copy")
    folders = {"judge": first, "copy": tmp_path / "copy", "other": make_reward("other", 2)}
    (result,) = execute(planned("dpo"), "dpo")
    by = {}
    for name, folder in folders.items():
        spoken = evaluate_run(result.folder, {"evaluation": {"reward_model": str(folder)}}).achieved.spoken
        assert spoken is not None
        by[name] = spoken.proxy_by
    assert by["judge"] == by["copy"] != by["other"]


def test_an_adapter_from_elsewhere_is_scored_as_well(
    planned: Planned, make_reward: MakeReward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (result,) = execute(planned("dpo"), "dpo")
    given = {
        "data": {"train": result.run.data.train},
        "model": {"dtype": "float32", "device": "cpu"},
        "evaluation": {"max_prompts": 3, "max_new_tokens": 3, "reward_model": str(make_reward("judge", 1))},
        "output": {"dir": "found"},
    }
    found = evaluate(str(result.folder / "adapter"), given)
    assert found.summary["measures"]["eval/proxy_reward"]["n"] == 3


def test_its_role_is_in_the_plan_of_memory(
    planned: Planned, make_reward: MakeReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    monkeypatch.setattr(dpo.run, "must_checkpoint", lambda *given: held.append(given[-1].rewards) or False)
    given = f"evaluation.reward_model={make_reward('judge', 1)}"
    execute(planned("dpo"), "dpo")
    execute(planned("dpo", given, out="scored"), "dpo")
    assert held == [0, 1]
    reward, ppo = planned("reward_ppo", given)
    assert reward_roles(reward) == {}
    assert list(reward_roles(ppo)) == ["reward", "proxy"]
    assert list(proxy_roles(ppo)) == ["proxy"]


def no_head(folder: Path) -> None:
    (folder / HEAD_FILE).unlink()


def damaged_head(folder: Path) -> None:
    (folder / HEAD_FILE).write_bytes(b"x")


def damaged_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def another_base(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, r"evaluation\.reward_model='.*judge': expected a folder with"),
        (damaged_adapter, r"evaluation\.reward_model='.*judge': it is damaged"),
        (no_head, r"judge: got an adapter without head\.safetensors, expected a reward model"),
        (damaged_head, r"head\.safetensors: cannot be loaded .* expected the head of a reward model"),
        (another_base, r"judge: this reward model was trained on the base 'elsewhere', expected"),
    ],
)
def test_a_reward_model_that_cannot_score_is_refused_before_anything_is_loaded_or_written(
    planned: Planned,
    make_reward: MakeReward,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    message: str,
) -> None:
    folder = make_reward("judge", 1)
    harm(folder)
    monkeypatch.setattr(dpo.run, "load_base", lambda _: pytest.fail("weights were loaded"))
    with pytest.raises(ModelError, match=message):
        execute(planned("dpo", f"evaluation.reward_model={folder}"), "dpo")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DPOError, match=message):
        evaluate("anything", {"data": {"train": "x.jsonl"}, **nested(folder, planned)})


def nested(folder: Path, planned: Planned) -> dict[str, dict[str, str]]:
    name = planned("dpo")[0].model.name
    return {"model": {"name": name}, "evaluation": {"reward_model": str(folder)}}


def test_full_weights_have_no_place_for_it(planned: Planned) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation\.reward_model: got 'judge' with model\.lora=null, expected an ada"
    ):
        planned("dpo", "model.lora=null", "evaluation.reward_model=judge")
