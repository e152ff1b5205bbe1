"""Names and settings become the stages of each entry: what holds for all, what for one, and what is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dpo.embedded import COMPLETIONS, RATES
from dpo.entries import Entries, Wanted, planned
from dpo.errors import ConfigError
from dpo.settings import read_overrides

Plan = Callable[..., Entries]


@pytest.fixture
def entries(tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plan entries on a file of pairs, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    pairs_file(tmp_path / "pairs.jsonl")

    def made(*objectives: str, settings: Sequence[str] = (), **more: int) -> Entries:
        overrides = read_overrides(["data.train=pairs.jsonl", "data.eval_share=0.3", *settings])
        with planned(Wanted(objectives, completions=64, overrides=overrides, **more)) as found:
            return found

    return made


def test_a_setting_under_an_entry_s_name_is_that_entry_s_alone(entries: Plan) -> None:
    found = entries("dpo", "ipo", settings=["optimiser.learning_rate=1e-4", "ipo.optimiser.learning_rate=3e-4"])
    rates = {name: runs[0].optimiser.learning_rate for name, runs in found.stages.items()}
    assert rates == {"dpo": 1e-4, "ipo": 3e-4}
    (dpo,), (alone,) = found.stages["dpo"], entries("dpo").stages["dpo"]
    assert dpo.override({"optimiser": {"learning_rate": alone.optimiser.learning_rate}}) == alone


def test_a_stage_of_an_entry_is_reached_through_its_name(entries: Plan) -> None:
    settings = ["reward_ppo.ppo.objective.kl_coefficient=0.3", "reward_ppo.reward.loop.max_steps=7"]
    found = entries("dpo", "reward_ppo", settings=settings)
    reward, ppo = found.stages["reward_ppo"]
    assert (ppo.objective.model_extra or {})["kl_coefficient"] == 0.3
    assert (reward.loop.max_steps, ppo.loop.max_steps) == (7, 4)  # 64 completions, 16 a step
    assert found.stages["dpo"][0].loop.max_steps == 2  # 64 completions, 16 pairs a step
    assert any("given in steps or epochs" in line for line in found.warnings)


def test_the_embedded_task_has_rates_of_its_own_unless_an_entry_is_given_one() -> None:
    overrides = read_overrides(["ipo.optimiser.learning_rate=1e-6"])
    with planned(Wanted(("dpo", "ipo", "simpo"), overrides=overrides)) as found:
        rates = {name: runs[0].optimiser.learning_rate for name, runs in found.stages.items()}
        assert rates["dpo"] == RATES["dpo"]
        assert rates["ipo"] == 1e-6
        assert found.completions == COMPLETIONS
        assert Path(found.first.data.train).exists()


@pytest.mark.parametrize(
    ("objectives", "setting", "message"),
    [
        (("dpo", "ipo"), "ipo=0.5", r"ipo=0.5: ipo is an entry of this comparison, expected ipo.key=value"),
        (("dpo", "ipo"), "ipo.data.max_length=64", "ipo: data.max_length is 64, and 1024 in dpo, expected one dataset"),
        (("dpo", "ipo"), "ipo.evaluation.seed=3", "ipo: evaluation.seed is 3, and 0 in dpo, expected one"),
        (("dpo", "ipo"), "kto.loop.seed=1", "kto"),  # a name that is not compared is no room of settings
        (("dpo", "data.yaml"), "loop.seed=1", "got 'data', expected a name that .* is none of data, "),
    ],
)
def test_what_cannot_be_one_entry_s_alone_is_refused(
    entries: Plan, objectives: tuple[str, ...], setting: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        entries(*objectives, settings=[setting])
