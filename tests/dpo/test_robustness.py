"""Adverse trainings on the tiny model: what is exchanged, what it undoes, how it is measured, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo import recipes, robustness
from dpo.data import Message, Preference, check
from dpo.errors import ConfigError, DataError
from dpo.estimates import Estimate
from dpo.model.base import ModelConfig
from dpo.robustness import Eroded, HalfLife, erode, exchanged, show_erosion
from dpo.run import Result, execute
from dpo.settings import plan, read_overrides

Train = Callable[..., Result]


@pytest.fixture
def train(
    tmp_path: Path, tiny_config: ModelConfig, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Train:
    """Train a recipe on the tiny model in an empty current folder, and return its last stage."""
    monkeypatch.chdir(tmp_path)
    pairs_file(tmp_path / "pairs.jsonl")
    (tmp_path / "my_gold.py").write_text("def remainder(prompt, completion): return float(len(completion) % 7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = ["data.train=pairs.jsonl", "data.eval_share=0.3", f"model.name={tiny_config.name}", "model.dtype=float32"]
    given += ["model.device=cpu", "loop.max_steps=6", "loop.gradient_accumulation_steps=1", "output.dir=out"]
    given += ["loop.num_train_epochs=10", "optimiser.learning_rate=5e-3"]
    given += ["evaluation.max_prompts=3", "evaluation.max_new_tokens=3"]

    def go(name: str = "dpo", *arguments: str) -> Result:
        runs = plan(recipes.find(name), read_overrides([*given, *arguments]))
        return execute(runs, name)[-1]

    return go


def measures(one: Eroded) -> dict[str, Any]:
    return {name: vars(value) for name, value in one.measures.items()}


def of_policy(result: Result) -> dict[str, Any]:
    """Return the run's measures without that by the objective's own reward."""
    return {name: one for name, one in result.summary["measures"].items() if name != "eval/reward/accuracy"}


def record(**changes: Any) -> Preference:
    settings: dict[str, Any] = {"prompt": (Message("user", "Hi"),), "completions": ("a", "b", "c"), "source": "f:1"}
    return Preference(**{**settings, "scores": (3.0, 1.0, 2.0), **changes})


# --- what is trained on ---


def test_every_pair_is_exchanged() -> None:
    records = [record(agreement=0.8, weight=2.0), record(completions=("x", "y"), scores=(0.0, 5.0))]
    found = [one.pairs() for one in exchanged(records)]
    assert all(len(pairs) == 1 for pairs in found)
    turned = {(pair.chosen, pair.rejected, pair.preference, pair.weight) for (pair,) in found}
    first = {("b", "a", 0.8, 2.0), ("c", "a", 0.8, 2.0), ("b", "c", 0.8, 2.0)}
    assert turned == first | {("x", "y", 1.0, 1.0)}


def test_fewer_examples_are_the_first_of_more(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Preference]] = {}
    real = robustness.execute

    def execute(runs: Any, name: str, **more: Any) -> Any:
        seen[Path(runs[0].output.dir).name] = [*more["checked"].train]
        assert more["checked"].eval == ()
        return real(runs, name, **more)

    result = train()
    folder = result.folder
    monkeypatch.setattr(robustness, "execute", execute)
    erode(folder, (4, 9))
    assert [len(seen["4"]), len(seen["9"])] == [4, 9]
    assert seen["9"][:4] == seen["4"]
    ours = [pair for one in check(result.run.data).train for pair in one.pairs()]
    assert {(p.prompt, p.rejected, p.chosen) for one in seen["9"] for p in one.pairs()} < {
        (p.prompt, p.chosen, p.rejected) for p in ours
    }
    summary = json.loads((folder / "robustness/9/summary.json").read_text())
    assert (summary["examples_seen"], summary["steps"]) == (9, 1)  # one pass, in steps of 16
    assert summary["reference"].startswith(f"the starting adapter {folder / 'adapter'}")


# --- what comes of it ---


def test_none_is_the_run_itself_and_needs_no_training(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train()
    monkeypatch.setattr(robustness, "execute", lambda *_, **__: pytest.fail("nothing is to be trained"))
    found = erode(result.folder, (0,))
    assert [one.examples for one in found.steps] == [0]
    assert measures(found.steps[0]) == of_policy(result)
    assert set(found.start) == {"kl/policy_reference", "eval/length"}


@pytest.mark.parametrize("recipe", ["dpo", "sft_dpo", "kto"])
def test_it_is_measured_as_the_run_was(train: Train, recipe: str) -> None:
    """An adverse training that moves nothing leaves the run's numbers, whatever its objective and its reference."""
    result = train(recipe, "evaluation.gold=my_gold:remainder")
    found = erode(result.folder, (3,), {"optimiser": {"learning_rate": 1e-12}})
    assert [one.examples for one in found.steps] == [0, 3]
    expected = of_policy(result)
    assert set(measures(found.steps[1])) == set(expected) > {"eval/gold_reward", "eval/pair/margin"}
    for name, one in measures(found.steps[1]).items():
        assert one == pytest.approx(expected[name], abs=1e-4), name


def test_exchanged_pairs_undo_what_was_learned(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    result = train()
    more = {"loop": {"num_train_epochs": 4, "gradient_accumulation_steps": 1}}
    found = erode(result.folder, (2, 24), more)
    accuracy = [one.measures["eval/pair/accuracy"].value for one in found.steps]
    margin = [one.measures["eval/pair/margin"].value for one in found.steps]
    assert accuracy[0] > 0.9
    assert accuracy[2] < 0.3
    assert margin[0] > margin[1] > 0 > margin[2]
    by = {one.measure: one for one in found.half_lives}
    assert set(by) == {"eval/pair/accuracy", "eval/pair/margin"}
    assert by["eval/pair/margin"].gain.value == pytest.approx(margin[0])
    assert by["eval/pair/accuracy"].gain.value == pytest.approx(accuracy[0] - 0.5)
    assert by["eval/pair/accuracy"].examples == 24
    assert by["eval/pair/margin"].examples == (2 if margin[1] <= margin[0] / 2 else 24)
    written = json.loads((result.folder / "robustness/robustness.json").read_text())
    assert [one["examples"] for one in written["steps"]] == [0, 2, 24]
    show_erosion(found)
    said = capsys.readouterr().out
    assert "adverse examples" in said
    assert "is gone after 24 adverse examples" in said


def half_life(gained: list[float], left: list[float]) -> HalfLife:
    steps = [Eroded(10 * n, {"m": Estimate(one, one, one, 3)}) for n, one in enumerate(left)]
    return robustness._half_life("m", [0.2, 0.0, 0.4], gained, steps)


def test_half_of_the_gain_over_the_start() -> None:
    # Start 0.2 in the mean, gain 0.6 for every prompt: half is gone at 0.5.
    gained = [0.8, 0.6, 1.0]
    found = half_life(gained, [0.8, 0.7, 0.49, 0.6, 0.1])
    assert found.gain.value == pytest.approx(0.6)
    assert found.examples == 20
    assert str(found).endswith("is gone after 20 adverse examples")
    never = half_life(gained, [0.8, 0.7, 0.51])
    assert never.examples is None
    assert str(never).endswith("is gone not within those tried")


def test_where_nothing_was_gained_nothing_is_lost() -> None:
    found = half_life([0.0, 0.1, 0.5], [0.2, 0.1])
    assert found.examples is None
    assert str(found).startswith("m: no gain to lose")


# --- going on ---


def test_what_is_finished_is_not_trained_again(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train("dpo", "evaluation.gold=my_gold:remainder")
    first = erode(result.folder, (2, 5))
    trained: list[str] = []
    real = robustness.execute

    def counted(runs: Any, name: str, **more: Any) -> Any:
        trained.append(Path(runs[0].output.dir).name)
        return real(runs, name, **more)

    monkeypatch.setattr(robustness, "execute", counted)
    again = erode(result.folder, (2, 5, 7))
    assert trained == ["7"]
    assert again.steps[:3] == first.steps
    monkeypatch.setattr(robustness, "load_base", lambda _: pytest.fail("no model is needed"))
    assert erode(result.folder, (2, 5)) == first


def test_a_kill_between_training_and_measuring_loses_nothing(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train()

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(robustness, "_measured", killed)
        with pytest.raises(Killed):
            erode(result.folder, (4,))
    monkeypatch.setattr(robustness, "execute", lambda *_, **__: pytest.fail("it is trained"))
    assert [one.examples for one in erode(result.folder, (4,)).steps] == [0, 4]


# --- refusals ---


def test_other_settings_are_refused(train: Train) -> None:
    result = train()
    erode(result.folder, (2,))
    with pytest.raises(
        ConfigError, match=r"robustness/2: holds an adverse training with optimiser\.learning_rate=0\.0"
    ):
        erode(result.folder, (2,), {"optimiser": {"learning_rate": 1e-2}})
    with pytest.raises(ConfigError, match=r"^data: an adverse training cannot change it"):
        erode(result.folder, (2,), {"data": {"limit": 3}})


def test_a_reward_models_folder_is_refused(train: Train) -> None:
    result = train("reward")
    with pytest.raises(ConfigError, match=r"^out: holds a reward model, expected a policy"):
        erode(result.folder, (2,))
    assert not (result.folder / "robustness").exists()


def test_a_run_of_all_weights_is_refused(train: Train) -> None:
    result = train("dpo", "model.lora=null")
    with pytest.raises(ConfigError, match=r"^out: trained all weights \(model\.lora=null\)"):
        erode(result.folder, (2,))


def test_no_finished_run_and_no_such_number(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished run"):
        erode(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"^--adverse: got -1, expected numbers of examples"):
        erode(train().folder, (-1, 5))


def test_too_few_pairs_are_refused(train: Train) -> None:
    result = train()
    with pytest.raises(DataError, match=r"^pairs\.jsonl: got 25 training pairs to exchange, expected 340\. Give"):
        erode(result.folder)
    assert not (result.folder / "robustness" / "10").exists()


def test_data_without_pairs_is_refused(train: Train, tmp_path: Path) -> None:
    rows = [{"prompt": f"What {n}?", "completion": f"It is {n}.", "label": n % 2 == 0} for n in range(40)]
    (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train("kto", "data.train=thumbs.jsonl")
    with pytest.raises(DataError, match=r"^thumbs\.jsonl: got 0 training pairs to exchange, expected 5"):
        erode(result.folder, (5,))


def test_data_that_has_changed_is_refused(train: Train) -> None:
    result = train()
    lines = Path("pairs.jsonl").read_text().splitlines()
    Path("pairs.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    with pytest.raises(DataError, match=r"^out: pairs\.jsonl has changed since the run was trained"):
        erode(result.folder, (2,))
