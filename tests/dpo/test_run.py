"""Recipes carried out: folders, stages, refusals before anything is written, and measuring again."""

import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dpo import checkpoint, recipes
from dpo import run as run_module
from dpo import sinks as sinks_module
from dpo.data import check
from dpo.errors import CheckpointError, ConfigError, DataError, ModelError, TrainingError
from dpo.evaluate import evaluate_run
from dpo.measure import by_own_reward
from dpo.metrics import Ledger, read
from dpo.model.base import ModelConfig, load_base
from dpo.run import Result, execute, measure_start, only_process, show, speaking
from dpo.settings import Run, plan, read_overrides, read_run

RunRecipe = Callable[..., list[Result]]


@pytest.fixture
def run(
    tmp_path: Path, tiny_config: ModelConfig, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> RunRecipe:
    """Carry out a recipe on the tiny model in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    pairs_file(tmp_path / "pairs.jsonl")

    def go(name: str, *arguments: str, **more: Any) -> list[Result]:
        return execute(runs(name, tiny_config, *arguments), name, **more)

    return go


def runs(name: str, config: ModelConfig, *arguments: str) -> tuple[Run, ...]:
    given = ["data.train=pairs.jsonl", "data.eval_share=0.2", "data.limit=30", f"model.name={config.name}"]
    given += [
        "model.dtype=float32",
        "model.device=cpu",
        "loop.max_steps=3",
        "loop.save_steps=2",
        "loop.gradient_accumulation_steps=2",
    ]
    given += ["evaluation.max_prompts=3", "evaluation.max_new_tokens=3"]
    return plan(recipes.find(name), read_overrides([*given, *arguments]))


def adapter(result: Result) -> bytes:
    return (result.folder / "adapter" / "adapter_model.safetensors").read_bytes()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Killed(BaseException):
    """Stands for a kill."""


# --- folders ---


def test_a_run_leaves_its_settings_its_data_its_numbers_and_its_adapter(run: RunRecipe) -> None:
    (result,) = run("dpo")
    assert result.folder.parent == Path("runs")
    assert result.folder.name.startswith("dpo-")
    names = {file.name for file in result.folder.iterdir()} - {".lock"}
    files = {"run.yaml", "data.json", "summary.json", "metrics.jsonl", "performance.jsonl", "README.md"}
    assert names == files | {"adapter", "checkpoints", "samples.jsonl", "pairs.jsonl"}
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary == result.summary
    assert (summary["steps"], summary["reference"][:14]) == (3, "the base model")
    on_pairs = {"eval/reward/accuracy", "eval/pair/accuracy", "eval/pair/margin"}
    assert summary["measures"].keys() == on_pairs | {"kl/policy_reference", "eval/length"}
    assert json.loads((result.folder / "data.json").read_text())["fingerprint"] == summary["data_fingerprint"]


@pytest.mark.faults
def test_a_finished_run_is_trained_again_beside_the_first_to_the_same_bits(run: RunRecipe) -> None:
    (first,) = run("dpo", "model.lora.dropout=0.1")
    (again,) = run("dpo", "model.lora.dropout=0.1")
    assert again.folder == first.folder.with_name(f"{first.folder.name}-2")
    assert adapter(again) == adapter(first)
    assert (again.folder / "metrics.jsonl").read_bytes() == (first.folder / "metrics.jsonl").read_bytes()
    (other,) = run("dpo", "model.lora.dropout=0.1", "loop.seed=1")
    assert other.folder.name[:10] != first.folder.name[:10]
    assert adapter(other) != adapter(first)


def test_run_yaml_trains_again_as_it_is(run: RunRecipe) -> None:
    (first,) = run("ipo", "output.dir=mine")
    assert first.folder == Path("mine")
    (again,) = execute(read_run(first.folder / "run.yaml", {}), "again")
    assert again.folder == Path("mine-2")
    assert adapter(again) == adapter(first)


def test_a_stage_s_run_yaml_trains_again_beside_it(run: RunRecipe) -> None:
    _, second = run("sft_dpo", "output.dir=mine")
    assert second.folder == Path("mine/2-dpo")
    (again,) = execute(read_run(second.folder / "run.yaml", {}), "again")
    assert again.folder == Path("mine/2-dpo-2")
    assert adapter(again) == adapter(second)


@pytest.mark.faults
def test_a_folder_with_other_settings_is_refused_and_left_as_it_is(run: RunRecipe) -> None:
    stopped_before_training(run, "output.dir=mine")
    before = tree(Path("mine"))
    with pytest.raises(ConfigError) as caught:
        run("dpo", "output.dir=mine", "objective.beta=0.3", "loop.seed=4", "loop.save_steps=9")
    assert str(caught.value).startswith(
        "mine: holds a run with other settings: loop.seed (0 there, 4 here); objective.beta (0.1 there, 0.3 here). "
    )
    assert tree(Path("mine")) == before


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def stopped_before_training(run: RunRecipe, *arguments: str, **more: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "train", killed)
        with pytest.raises(Killed):
            run("dpo", *arguments, **more)


@pytest.mark.faults
def test_other_content_of_the_data_is_refused_and_nothing_overwritten(
    run: RunRecipe,
) -> None:
    stopped_before_training(run, "output.dir=mine")
    before = tree(Path("mine"))
    rows = Path("pairs.jsonl").read_text().replace("good and blue", "good and green")
    Path("pairs.jsonl").write_text(rows)
    with pytest.raises(CheckpointError, match=r"mine: holds a run on other data: pairs\.jsonl has changed"):
        run("dpo", "output.dir=mine")
    assert tree(Path("mine")) == before


@pytest.mark.faults
def test_one_process_at_a_time_trains_in_a_folder(run: RunRecipe) -> None:
    with (
        only_process(Path("mine")),
        pytest.raises(TrainingError, match=rf"mine: process {os.getpid()} on .* is training there"),
    ):
        run("dpo", "output.dir=mine")
    (result,) = run("dpo", "output.dir=mine")  # the lock file is still there and holds nobody
    assert result.folder == Path("mine")


@pytest.mark.faults
@pytest.mark.parametrize("place", ["pairs.jsonl", "pairs.jsonl/below", "/dev/null/below"])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run: RunRecipe, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load_base", killed)
    with pytest.raises(ConfigError, match=rf"output\.dir: .*{place}.* Give another output\.dir"):
        run("dpo", f"output.dir={place}")


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        ("model.adapter=nowhere", ModelError),
        ("model.name=./nowhere", ModelError),
        ("data.max_length=8", DataError),
        ("data.train=nowhere.jsonl", DataError),
        ("evaluation.gold=nowhere:f", ConfigError),
    ],
)
def test_nothing_is_written_before_model_name_adapter_and_data_are_checked(
    run: RunRecipe, argument: str, kind: type[Exception]
) -> None:
    before = tree(Path.cwd())
    with pytest.raises(kind):
        run("dpo", argument)
    assert tree(Path.cwd()) == before
    assert not Path("runs").exists()


def test_nothing_is_left_where_the_tokenizer_loads_and_the_weights_do_not(
    run: RunRecipe, tiny_model_folder: Path
) -> None:
    shutil.copytree(tiny_model_folder, "damaged")
    weights = Path("damaged/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    before = tree(Path.cwd())
    with pytest.raises(ModelError, match=r"model\.name='damaged': .* could not load it"):
        run("dpo", "model.name=damaged", "output.dir=deep/mine")
    assert tree(Path.cwd()) == before
    assert not Path("deep").exists()


@pytest.mark.parametrize("needed", [True, False])
def test_checkpointing_is_turned_on_where_memory_needs_it(
    run: RunRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, needed: bool
) -> None:
    asked: list[int] = []
    seen: list[bool] = []

    def must(base: Any, config: ModelConfig, optimiser: str, tokens: int, moving: bool) -> bool:
        asked.append(tokens)
        return needed

    def watched(**given: Any) -> Any:
        seen.append(given["model"].network.is_gradient_checkpointing)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "must_checkpoint", must)
    monkeypatch.setattr(run_module, "train", watched)
    with caplog.at_level(logging.INFO, "dpo"), pytest.raises(KeyboardInterrupt):
        run("dpo", "output.dir=mine")
    assert seen == [needed]
    assert ("gradient checkpointing is on" in caplog.text) is needed
    assert 0 < asked[0] < 10_000
    with pytest.raises(KeyboardInterrupt):
        run("dpo", "output.dir=other", "model.activation_offload=true")
    assert len(asked) == 1  # what is offloaded need not be computed again


# --- what a machine may do to a run ---


@pytest.mark.faults
def test_spaces_and_umlauts_in_a_folder_s_name_are_no_obstacle(run: RunRecipe) -> None:
    Path("in ü y").mkdir()
    Path("pairs.jsonl").rename("in ü y/rows ß.jsonl")
    place = ["data.train=in ü y/rows ß.jsonl", "output.dir=dir ü x"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "achieved_by", killed)
        with pytest.raises(Killed):
            run("dpo", *place)
    (result,) = run("dpo", *place)
    assert result.folder == Path("dir ü x")
    assert adapter(result)


@pytest.mark.faults
def test_a_run_goes_on_with_its_own_settings_only_and_saving_and_showing_are_free(run: RunRecipe) -> None:
    stopped_before_training(run, "output.dir=mine")
    for key in ("optimiser.learning_rate=1e-3", "loop.seed=4", "data.max_length=99"):
        with pytest.raises(ConfigError, match=rf"^mine: holds a run with other settings: {key.partition('=')[0]} \("):
            run("dpo", "output.dir=mine", key)
    Path("drive").mkdir()
    free = ["loop.save_steps=1", "loop.save_minutes=null", "loop.save_total_limit=5", "output.mirror=drive"]
    (result,) = run("dpo", "output.dir=mine", *free, "output.group=other", "evaluation.max_prompts=1")
    (alone,) = run("dpo", "output.dir=alone")
    assert adapter(result) == adapter(alone)


@pytest.mark.faults
def test_a_run_whose_folder_is_gone_goes_on_from_its_mirror_to_the_same_bits(
    run: RunRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    Path("drive").mkdir()
    asked = ["loop.max_steps=5", "loop.num_train_epochs=2", "model.lora.dropout=0.1", "output.dir=mine"]
    (whole,) = run("dpo", *asked[:-1], "output.dir=whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "append", dying_at(5, Ledger.append))
        with pytest.raises(Killed):
            run("dpo", *asked, "output.mirror=drive")
    shutil.rmtree("mine")  # with the machine
    with caplog.at_level(logging.INFO, "dpo"):
        (result,) = run("dpo", *asked, "output.mirror=drive")
    assert "mine holds no run: going on from its copy in drive/mine" in caplog.text
    assert "going on from step 4 of 5" in caplog.text
    assert adapter(result) == adapter(whole)
    assert (result.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    own = {name: content for name, content in tree(Path("mine")).items() if name != ".lock"}
    assert tree(Path("drive/mine")) == own
    shutil.rmtree("mine")
    (again,) = run("dpo", *asked, "output.mirror=drive")  # finished: nothing is trained
    assert again.summary == result.summary
    shutil.rmtree("mine")
    with pytest.raises(ConfigError, match=r"drive/mine: holds a run with other settings: loop\.seed \(0 there, 1 here"):
        run("dpo", *asked, "output.mirror=drive", "loop.seed=1")


def dying_at(step: int, honest: Callable[..., Any]) -> Callable[..., Any]:
    def append(ledger: Ledger, at: int, *arguments: Any) -> Any:
        row = honest(ledger, at, *arguments)
        if at == step:
            raise Killed
        return row

    return append


@pytest.mark.faults
def test_without_a_single_checkpoint_the_results_are_there_and_the_end_is_an_error(
    run: RunRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise CheckpointError("mine/checkpoints: cannot save the checkpoint: no space.")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(CheckpointError, match=r"adapter and results are written, but not one .*: no space") as caught:
        run("dpo", "output.dir=mine")
    assert caught.value.exit_code == 3
    assert (Path("mine") / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((Path("mine") / "summary.json").read_text())["steps"] == 3


@pytest.mark.faults
def test_all_checkpoints_damaged_is_an_error_and_no_start_from_zero(run: RunRecipe) -> None:
    (result,) = run("dpo", "output.dir=mine")
    (result.folder / "summary.json").unlink()
    for state in result.folder.glob("checkpoints/*/state.json"):
        state.unlink()
    before = tree(Path("mine"))
    with pytest.raises(CheckpointError, match=r"mine/checkpoints: all 2 checkpoints are damaged") as caught:
        run("dpo", "output.dir=mine")
    assert caught.value.exit_code == 3
    assert tree(Path("mine")) == before


@pytest.mark.faults
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_weights_that_are_no_numbers_are_refused_by_name(run: RunRecipe, tiny_model_folder: Path, where: str) -> None:
    if where == "base":
        folder, wanted = Path(shutil.copytree(tiny_model_folder, "base")), "model.embed_tokens.weight"
        file, asked = folder / "model.safetensors", "model.name=base"
    else:
        (result,) = run("dpo", "output.dir=first")
        file, asked = result.folder / "adapter/adapter_model.safetensors", "model.adapter=first/adapter"
        wanted = sorted(load_file(file))[0]
    state = load_file(file)
    state[wanted][0, 0] = math.nan
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{re.escape(wanted)} holds values that are not finite"):
        run("dpo", "output.dir=mine", asked)
    assert not Path("mine").exists()


@pytest.mark.faults
def test_a_tracker_that_fails_anywhere_changes_nothing(run: RunRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails as it is built, or at its second row, at a table, at the end: the run's bytes are the same."""
    (alone,) = run("dpo", "output.dir=alone")
    for failing in ("__init__", "log", "table", "finish"):
        with monkeypatch.context() as patch:
            for name in ("__init__", "log", "table", "finish"):
                patch.setattr(sinks_module.WandbSink, name, refuse if name == failing else nothing)
            (result,) = run("dpo", f"output.dir={failing}", "output.report_to=wandb")
        assert adapter(result) == adapter(alone)
        assert (result.folder / "metrics.jsonl").read_bytes() == (alone.folder / "metrics.jsonl").read_bytes()


def refuse(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route to host")


def nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


# --- stages ---


def test_a_finished_stage_is_not_trained_again_and_is_the_reference_of_the_next(
    run: RunRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("sft_dpo", "output.dir=whole")
    loads: list[str] = []
    trained: list[str] = []

    def counted_load(config: ModelConfig) -> Any:
        loads.append(config.name)
        return load_base(config)

    real = run_module.train

    def watched(**given: Any) -> Any:
        trained.append(type(given["objective"]).__name__)
        if trained == ["SFT", "DPO"]:
            raise Killed
        return real(**given)

    monkeypatch.setattr(run_module, "load_base", counted_load)
    monkeypatch.setattr(run_module, "train", watched)
    with pytest.raises(Killed):
        run("sft_dpo", "output.dir=mine")
    assert len(loads) == 1  # one base for both
    stamp = (Path("mine/1-sft/adapter/adapter_model.safetensors")).stat().st_mtime_ns
    first, second = run("sft_dpo", "output.dir=mine")
    assert trained == ["SFT", "DPO", "DPO"]
    assert (first.folder / "adapter/adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert second.summary["reference"] == "the starting adapter mine/1-sft/adapter, frozen"
    assert read(second.folder / "metrics.jsonl")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first.summary["measures"] == whole[0].summary["measures"]
    assert (adapter(first), adapter(second)) == (adapter(whole[0]), adapter(whole[1]))


def test_a_shared_base_is_given_back_as_it_was_also_after_a_failure(run: RunRecipe, tiny_config: ModelConfig) -> None:
    base = load_base(tiny_config)
    before = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
    stopped_before_training(run, base=base)
    assert base.network.state_dict().keys() == before.keys()
    (shared,) = run("dpo", "output.dir=shared", base=base)
    assert all(tensor.equal(before[name]) for name, tensor in base.network.state_dict().items())
    (alone,) = run("dpo", "output.dir=alone")
    assert adapter(shared) == adapter(alone)
    with pytest.raises(ConfigError, match=r"model\.lora=null trains the base itself, which is shared here"):
        run("dpo", "model.lora=null", base=base)


def test_full_weights_train_and_are_measured_again(run: RunRecipe) -> None:
    (result,) = run("dpo", "model.lora=null", "output.dir=full")
    assert result.summary["reference"] == "a frozen copy of the starting weights"
    assert evaluate_run(Path("full"), {}).summary["measures"] == result.summary["measures"]


# --- measures ---


@pytest.mark.parametrize("recipe", ["aot", "bco", "mpo", "trdpo", "wpo"])
def test_evaluating_needs_nothing_that_training_alone_had(run: RunRecipe, recipe: str) -> None:
    (result,) = run(recipe, "optimiser.learning_rate=1e-2")
    assert evaluate_run(result.folder, {}).summary["measures"] == result.summary["measures"]
    assert ("mean_log_ratio" in result.summary) == (recipe in ("bco", "mpo"))


def test_soft_labels_are_refused_before_training_by_what_cannot_honour_them(run: RunRecipe) -> None:
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    rows[4]["agreement"] = 0.75
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = "objective.parts=[{weight: 1, name: aot}, {weight: 1, name: sft}]"
    for recipe, given in (("aot", ()), ("mpo", (parts,))):
        with pytest.raises(
            DataError, match=r"pairs\.jsonl:5: agreement 0\.75, expected 1: (AOT|Mixture) takes certain"
        ):
            run(recipe, *given)
        assert not Path("runs").exists()
    run("dpo")


def test_evaluating_gives_the_numbers_of_the_training_again(run: RunRecipe, caplog: pytest.LogCaptureFixture) -> None:
    (result,) = run("dpo", "optimiser.learning_rate=1e-2")
    before = tree(result.folder)
    again = evaluate_run(result.folder, {})
    assert again.summary["measures"] == result.summary["measures"]
    after = tree(result.folder)
    found = {name: after.pop(f"evaluation/{name}") for name in ("evaluation.json", "samples.jsonl", "pairs.jsonl")}
    assert json.loads(found["evaluation.json"])["measures"] == result.summary["measures"]
    assert found["samples.jsonl"] == before["samples.jsonl"]
    assert after == before
    longer = evaluate_run(result.folder, read_overrides(["evaluation.max_new_tokens=6"]))
    assert longer.summary["measures"]["eval/length"] != result.summary["measures"]["eval/length"]
    assert "has changed" not in caplog.text
    Path("pairs.jsonl").write_text(Path("pairs.jsonl").read_text().replace("bad", "wrong"))
    evaluate_run(result.folder, {})
    assert "pairs.jsonl has changed since the run was trained" in caplog.text


def test_groups_are_measured_apart(run: RunRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    grouped = [{**row, "group": ("old", "young", None)[n % 3]} for n, row in enumerate(rows)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in grouped))
    (result,) = run("dpo", "data.eval_share=0.5", "evaluation.max_prompts=20", "data.group_weights=equal")
    groups = result.summary["groups"]
    assert list(groups) == ["old", "young"]
    held_out = [json.loads(line) for line in (result.folder / "pairs.jsonl").read_text().splitlines()]
    for name, measures in groups.items():
        own = [one["chosen"] - one["rejected"] for one in held_out if one["group"] == name]
        assert measures["eval/pair/margin"]["n"] == len(own) >= 2
        assert measures["eval/pair/margin"]["value"] == pytest.approx(sum(own) / len(own), abs=1e-6)
        assert measures["eval/length"]["n"] == len(own)
    assert result.summary["measures"]["eval/pair/margin"]["n"] > sum(one["eval/length"]["n"] for one in groups.values())
    show(result)
    assert "group young" in capsys.readouterr().out
    assert evaluate_run(result.folder, {}).summary["groups"] == groups


def test_an_evaluation_set_is_not_trained_on(run: RunRecipe) -> None:
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    bench = [
        {**row, "chosen_model": "a", "rejected_model": "b", "subset": "chat", "id": n} for n, row in enumerate(rows)
    ]
    Path("bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bench))
    with pytest.raises(DataError, match=r"^bench\.jsonl: .*Give it as data\.eval, and train on other data"):
        run("dpo", "data.train=bench.jsonl", "model.name=absent/model")
    others = [{"prompt": f"other {n}", "chosen": "good", "rejected": "bad"} for n in range(20)]
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    (result,) = run("dpo", "data.eval=bench.jsonl", "data.train=other.jsonl")
    assert result.summary["measures"]["eval/pair/accuracy"]["n"] > 10


def test_evaluating_uses_the_trained_adapter(run: RunRecipe) -> None:
    (result,) = run("dpo", "optimiser.learning_rate=1e-2")
    file = result.folder / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)
    assert evaluate_run(result.folder, {}).summary["measures"]["kl/policy_reference"]["value"] == 0
    assert result.summary["measures"]["kl/policy_reference"]["value"] != 0


def test_evaluating_refuses_other_folders_and_other_settings(run: RunRecipe) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: holds no finished run"):
        evaluate_run(Path("nowhere"), {})
    (result,) = run("dpo")
    with pytest.raises(ConfigError, match=r"objective: evaluating cannot change it; evaluation\.\*"):
        evaluate_run(result.folder, {"objective": "ipo"})


def test_the_start_is_sampled_with_the_same_seed(run: RunRecipe, tiny_config: ModelConfig) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "What of tea?"}\n{"prompt": "What of the sea?"}\n')
    gold = "evaluation.gold=dpo.data.gold:sentiment"
    (settings,) = runs("dpo", tiny_config, "evaluation.prompts=prompts.jsonl", gold)
    base = load_base(tiny_config)
    before = measure_start(settings, base, check(settings.data)).spoken
    assert before is not None
    assert before.prompts == ("What of tea?", "What of the sea?")
    assert before.gold is not None
    assert before.kl == (0, 0)
    (result,) = run("dpo", "optimiser.learning_rate=1e-12", "evaluation.prompts=prompts.jsonl", gold)
    assert result.achieved.spoken is not None
    texts = [[[one.text for one in row] for row in said.answers] for said in (result.achieved.spoken, before)]
    assert texts[0] == texts[1]  # a policy that has hardly moved says the same
    assert result.summary["measures"]["eval/gold_reward"]["n"] == 2


def test_without_held_out_examples_there_is_nothing_to_measure(run: RunRecipe) -> None:
    (result,) = run("sft_dpo", "data.eval_share=0")[1:]
    assert result.summary["measures"] == {}
    assert by_own_reward(None, None) == {}


def test_kto_has_an_interval_around_its_ranking(run: RunRecipe) -> None:
    (result,) = run("kto")
    one = result.summary["measures"]["eval/reward/accuracy"]
    assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1
    last = read(result.folder / "metrics.jsonl")[-2]
    trained = round(float(last["train/examples_seen"]) / float(last["train/epoch"]))
    assert one["n"] + trained == 60  # two judgements from each of 30 pairs


# --- sinks ---


@pytest.mark.network  # wandb's own service process listens on a socket of this machine
@pytest.mark.enable_socket
def test_wandb_holds_every_row_of_the_ledger(run: RunRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(Path.cwd()))
    (result,) = run("dpo", "output.report_to=wandb", "output.group=trial")
    (stored,) = (result.folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(stored)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    sent = [one["history"]["item"] for one in records if one["type"] == "history"]
    kept = read(result.folder / "metrics.jsonl")
    assert len(sent) == len(kept) + 1 == 5
    assert any(name.startswith("samples") for name in sent[-1])  # the table
    for item, row in zip(sent[:-1], kept, strict=True):
        for name in ("train/loss", "reward/margin", "eval/reward/margin", "train/global_step"):
            assert item.get(name) == row.get(name)
    assert all({"train/loss", "reward/margin"} <= item.keys() for item in sent[:3])


# --- failures are told, not shown ---


def test_a_failure_is_one_message_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((TrainingError("stuck"), 4), (CheckpointError("stuck"), 3), (OSError("stuck"), 1)):
        with pytest.raises(SystemExit) as caught, speaking():
            raise error
        assert caught.value.code == code
        assert capsys.readouterr().err == "error: stuck\n"
    with pytest.raises(SystemExit) as caught, speaking():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught, speaking():
        os.kill(os.getpid(), signal.SIGTERM)  # also before and after the training
    assert caught.value.code == 143
    assert "goes on from the last checkpoint" in capsys.readouterr().err
    with pytest.raises(TrainingError), speaking(debug=True):
        raise TrainingError("stuck")


def test_a_secret_in_a_message_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), speaking():
        raise ConfigError("output.project='hf_PlantedAbCdEfGhIjKlMnOpQrStUvWxYz12'")
    assert capsys.readouterr().err == "error: output.project='[redacted]'\n"


def test_an_objective_of_the_current_folder_can_be_named(
    run: RunRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_objectives.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import final\n"
        "from dpo.losses import PairObjective\n"
        "from dpo.losses.reduce import pair_output\n"
        "import torch\n"
        "@final\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Margin(PairObjective):\n"
        "    scale: float = 2.0\n"
        "    needs_reference = False\n"
        "    paper = 'none'\n"
        "    def __call__(self, logps):\n"
        "        margin = self.scale * (logps.policy_chosen - logps.policy_rejected)\n"
        "        rewards = torch.stack([logps.policy_chosen, logps.policy_rejected], dim=1)\n"
        "        return pair_output(logps, -margin, rewards)\n"
    )
    with speaking():
        (result,) = run("dpo", "objective=my_objectives:Margin", "objective={name: my_objectives:Margin, scale: 3}")
    assert result.summary["objective"] == {"name": "my_objectives:Margin", "scale": 3.0}
    assert result.summary["reference"] == "none"
    assert str(tmp_path) not in sys.path


def test_log_level_follows_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("dpo")
    monkeypatch.setattr(logger, "level", logger.level)
    with speaking(debug=True):
        assert logger.level == logging.DEBUG
    with speaking():
        assert logger.level == logging.INFO
