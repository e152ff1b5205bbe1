"""Learning from the policy's own completions: what is sampled, judged, credited and handed out, and exact resume."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo.data import Example, prepare
from dpo.data.prepare import DataConfig
from dpo.errors import RewardError, TrainingError
from dpo.losses import Objective
from dpo.losses.dpo import DPO
from dpo.losses.grpo import GRPO
from dpo.losses.ppo import PPO
from dpo.losses.rloo import RLOO
from dpo.losses.sft import SFT
from dpo.metrics import METRICS, Row, read
from dpo.model.base import Base, LanguageModel, LoRA, ModelConfig, ScalarRole, load_base
from dpo.model.episodes import Episode, pack, unpack
from dpo.model.reference import ReferenceLogps
from dpo.model.views import score
from dpo.rewards import Answer, Reward
from dpo.sources import Judges, RolloutConfig, Rollouts, refuse_drift
from dpo.train import Loop, OnPolicy, Optimiser, Outcome, division, train

LOOP = Loop(per_device_train_batch_size=3, gradient_accumulation_steps=2, save_steps=2, seed=3, max_steps=8)
OPTIMISER = Optimiser(learning_rate=1e-2, lr_scheduler_type="constant_with_warmup", warmup_ratio=0)
CONFIG: dict[str, Any] = {
    "rewards": ("dpo.data.gold:sentiment",),
    "prompts_per_rollout": 6,
    "completions_per_prompt": 2,
    "epochs": 2,
    "max_new_tokens": 5,
    "sampling_batch_size": 5,
}
EVERY = {
    "ppo": PPO(ptx_coefficient=0.2, kl_target=1.0),
    "rloo": RLOO(),
    "grpo": GRPO(kl_coefficient=0.1),
    "online dpo": DPO(),
    "rejection sampling": SFT(),
}


@dataclass(frozen=True)
class Vowels(Reward):
    """Likes completions whose token ids are even: quick, deterministic, and nothing a random model says is all one."""

    seen: list[Answer] | None = None

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        if self.seen is not None:
            self.seen.extend(answers)
        return [sum(token % 2 == 0 for token in one.key[1]) / len(one.key[1]) for one in answers]


class KilledError(Exception):
    """Stands for a kill between a row and whatever follows it."""


@dataclass(frozen=True)
class Watcher:
    model: LanguageModel
    watch: Callable[[LanguageModel, Row], None]

    def log(self, row: Row) -> None:
        self.watch(self.model, row)

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        raise AssertionError("the loop leaves the summary to its caller")


@dataclass(frozen=True)
class Lab:
    base: Base
    config: ModelConfig
    file: Path

    def examples(self, view: Any) -> list[Example]:
        source = DataConfig.model_validate({"train": str(self.file), "eval_share": 0})
        return prepare(source, self.base.tokenizer, view).train

    @contextmanager
    def started(self, objective: Objective, **config: Any) -> Iterator[LanguageModel]:
        settings = self.config.model_copy(update={"lora": LoRA(r=4), **config})
        scalars = [ScalarRole("reward", None, False)]
        if objective.needs_values:
            scalars.append(ScalarRole("value", None, True))
        model = LanguageModel.start(self.base, settings, seed=3, scalars=scalars)
        try:
            yield model
        finally:
            model.release()

    def run(
        self,
        folder: Path,
        objective: Objective,
        *,
        loop: Loop = LOOP,
        reward: Reward | None = None,
        gold: Reward | None = None,
        watch: Callable[[LanguageModel, Row], None] | None = None,
        model: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Outcome:
        config = RolloutConfig.model_validate({**CONFIG, **changes})
        with self.started(objective, **(model or {})) as started:
            outcome = train(
                model=started,
                reference=ReferenceLogps(started),
                objective=objective,
                train_examples=self.examples("prompts"),
                eval_examples=[],
                optimiser=OPTIMISER,
                loop=loop,
                folder=folder,
                identity={"settings": "a"},
                sinks=() if watch is None else (Watcher(started, watch),),
                on_policy=OnPolicy(config, Judges(reward or Vowels(), gold), self.examples("demonstrations")),
            )
            for role in started.trained:
                (folder / role).mkdir(exist_ok=True)
                started.save(folder / role, role)
        return outcome


@pytest.fixture
def base(tiny_config: ModelConfig) -> Base:
    return load_base(tiny_config)


@pytest.fixture
def lab(base: Base, tiny_config: ModelConfig, pairs_file: Callable[..., Path], tmp_path: Path) -> Lab:
    return Lab(base, tiny_config, pairs_file(tmp_path / "pairs.jsonl", prompts=20))


def rows(folder: Path) -> list[Row]:
    return read(folder / "metrics.jsonl")


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.name}/{name}": one
        for file in sorted(folder.glob("*/*.safetensors"))
        for name, one in load_file(file).items()
    }


def kill_at(step: int) -> Callable[[LanguageModel, Row], None]:
    def watch(_: LanguageModel, row: Row) -> None:
        if row["step"] == step:
            raise KilledError

    return watch


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("step", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(lab: Lab, tmp_path: Path, name: str, step: int) -> None:
    """A rollout is 12 completions (6 pairs, or 6 best ones), a step takes 6: two passes are 4 (2) steps. The checkpoint
    at step 2 lies in the middle of the first rollout (for pairs at its end), that at 4 behind it."""
    lab.run(tmp_path / "whole", EVERY[name])
    with pytest.raises(KilledError):
        lab.run(tmp_path / "broken", EVERY[name], watch=kill_at(step))
    lab.run(tmp_path / "broken", EVERY[name])
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, broken[key]), key
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "broken/metrics.jsonl").read_bytes()


def test_a_kill_while_sampling_costs_the_rollout_only(lab: Lab, tmp_path: Path) -> None:
    class Stopping(Reward):
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, answers: Sequence[Answer]) -> list[float]:
            self.calls += 1
            if self.calls == 2:
                raise KilledError
            return Vowels()(answers)

    lab.run(tmp_path / "whole", RLOO())
    with pytest.raises(RewardError, match="KilledError"):
        lab.run(tmp_path / "broken", RLOO(), reward=Stopping())
    lab.run(tmp_path / "broken", RLOO())
    for key, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "broken")[key]), key


@pytest.mark.parametrize("name", EVERY)
def test_every_name_is_defined_and_the_rollout_is_told_once(lab: Lab, tmp_path: Path, name: str) -> None:
    lab.run(tmp_path, EVERY[name], gold=Vowels())
    found = rows(tmp_path)
    told = [row["step"] for row in found if "rollout/score" in row]
    assert told == ([1, 5] if EVERY[name].view == "rollouts" else [1, 3, 5, 7])
    for row in found:
        assert set(row) - {"step", "kind"} <= set(METRICS)
    first = found[0]
    assert first["rollout/score"] == pytest.approx(first["rollout/gold_reward"])
    assert first["kl/policy_reference"] == pytest.approx(0, abs=1e-4)
    assert 0 < float(first["rollout/length"]) <= 5
    assert float(first["rollout/entropy"]) > 0


@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo"])
@pytest.mark.parametrize(("size", "steps"), [(1, 6), pytest.param(2, 3, marks=pytest.mark.slow), (6, 1)])
def test_a_step_is_the_same_however_it_is_divided(lab: Lab, tmp_path: Path, name: str, size: int, steps: int) -> None:
    loop = LOOP.model_copy(update={"max_steps": 3})
    lab.run(tmp_path / "whole", EVERY[name], loop=loop)
    other = loop.model_copy(update={"per_device_train_batch_size": size, "gradient_accumulation_steps": steps})
    lab.run(tmp_path / "other", EVERY[name], loop=other)
    moved = 0.0
    for key, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(
            tensor, weights(tmp_path / "other")[key], rtol=0, atol=1e-5
        )  # a thousandth of a step: Adam divides rounding by small gradients
        moved = max(moved, tensor.abs().max().item())
    assert moved > 1e-3
    for ours, theirs in zip(rows(tmp_path / "whole"), rows(tmp_path / "other"), strict=True):
        assert ours == {
            key: pytest.approx(value, abs=2e-4) if key != "kind" else value for key, value in theirs.items()
        }


def test_gradient_checkpointing_finds_each_role_again(lab: Lab, tmp_path: Path) -> None:
    """It runs the forward pass again in the backward pass, when policy and value have both been turned on since."""
    loop = LOOP.model_copy(update={"max_steps": 2})
    lab.run(tmp_path / "plain", PPO(), loop=loop, model={"gradient_checkpointing": False})
    lab.run(tmp_path / "again", PPO(), loop=loop, model={"gradient_checkpointing": True})
    for key, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "again")[key], rtol=0, atol=1e-6)


def test_training_leaves_every_other_role_as_it_was(lab: Lab, tmp_path: Path) -> None:
    kept: dict[str, Tensor] = {}

    def watch(model: LanguageModel, row: Row) -> None:
        now = {
            name: one
            for name, one in model.network.named_parameters()
            if ".policy" not in name and ".value" not in name
        }
        now |= {f"head.{name}": one for name, one in model.heads["reward"].named_parameters()}
        if not kept:
            kept.update({name: one.detach().clone() for name, one in now.items()})
        assert any(".reward." in name for name in kept)
        assert all(torch.equal(one, kept[name]) for name, one in now.items())

    lab.run(tmp_path, PPO(), watch=watch)
    assert (
        max(one.abs().max() for name, one in weights(tmp_path).items() if "value" in name and "lora_B" in name) > 1e-4
    )


def test_the_base_is_in_memory_once(lab: Lab) -> None:
    with lab.started(PPO()) as model:
        own = {name: one.numel() for name, one in model.network.named_parameters() if "lora_" not in name}
        adapters = {
            role: sum(p.numel() for n, p in model.network.named_parameters() if f".{role}." in n)
            for role in ("policy", "reward", "value")
        }
        total = sum(p.numel() for p in model.network.parameters())
        assert total == sum(own.values()) + sum(adapters.values())
        assert adapters["policy"] == adapters["reward"] == adapters["value"] > 0
        assert sum(p.numel() for p in model.parameters()) == 2 * adapters["policy"] + 33  # and the head of the value


RISING = {"ppo": PPO(kl_coefficient=0), "rloo": RLOO(kl_coefficient=0), "grpo": GRPO(), "online dpo": DPO()}


@pytest.mark.parametrize("name", [pytest.param(one, marks=() if one == "ppo" else pytest.mark.slow) for one in RISING])
def test_the_reward_rises(lab: Lab, tmp_path: Path, name: str) -> None:
    """It likes half of the vocabulary, told by a sign in the head: a hidden state can lean that way, so far as its norm
    allows: to about 0.7."""
    liked = set((lab.base.network.lm_head.weight[:, 0] > 0).nonzero().flatten().tolist())

    class Half(Reward):
        def __call__(self, answers: Sequence[Answer]) -> list[float]:
            return [sum(token in liked for token in one.key[1]) / len(one.key[1]) for one in answers]

    objective = RISING[name]
    pairs = objective.view == "pairs"
    loop = Loop(per_device_train_batch_size=20 if pairs else 80, gradient_accumulation_steps=1, num_train_epochs=20)
    lab.run(
        tmp_path,
        objective,
        reward=Half(),
        loop=loop.model_copy(update={"max_steps": 24, "save_steps": 100}),
        prompts_per_rollout=20,
        completions_per_prompt=4,
        missing_end="keep",
        sampling_batch_size=80,
    )
    scores = [float(row["rollout/score"]) for row in rows(tmp_path) if "rollout/score" in row]
    assert len(scores) == 12
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.1, scores


@pytest.mark.parametrize(("how", "expected"), [("keep", 0.5), ("subtract", -1.5), ("replace", -2.0)])
def test_a_missing_end_costs_what_was_said(lab: Lab, how: str, expected: float) -> None:
    config = RolloutConfig.model_validate(
        {**CONFIG, "missing_end": how, **({} if how == "keep" else {"missing_end_penalty": 2.0})}
    )
    with lab.started(RLOO()) as model:
        source = rollouts(lab, model, RLOO(), config)
        source.batch(0)
        for one in source._items:
            assert isinstance(one, Episode)
            finished = one.key[1][-1] in (2, 3)
            plain = Vowels()([Answer("", "", 0, True, None, "", one.key)])[0]
            assert one.score == pytest.approx(
                plain if finished else plain + expected - 0.5 if how != "replace" else expected
            )


def rollouts(
    lab: Lab, model: LanguageModel, objective: Objective, config: RolloutConfig, reward: Reward | None = None
) -> Rollouts:
    return Rollouts(
        model,
        objective,
        config,
        lab.examples("prompts"),
        lab.examples("demonstrations"),
        Judges(reward or Vowels()),
        batch=6,
        epochs=3,
        max_steps=None,
        seed=5,
        division=replace(division(LOOP, 4, lab.base, objective), scored=1),
    )


def test_every_prompt_comes_once_in_every_pass(lab: Lab) -> None:
    config = RolloutConfig.model_validate({**CONFIG, "completions_per_prompt": 1})
    with lab.started(PPO()) as model:
        source = rollouts(lab, model, PPO(), config)
        assert source.steps == 10 * 2  # 3 passes over 20 prompts, 6 a rollout; two passes of one step each on it
        drawn = [i for rollout in range(10) for i in source._drawn(rollout)]
    assert sorted(drawn[:20]) == sorted(drawn[20:40]) == list(range(20))
    assert drawn[:20] != drawn[20:40]


def test_the_roles_speak_at_the_temperature_of_sampling(lab: Lab) -> None:
    config = RolloutConfig.model_validate({**CONFIG, "temperature": 0.5})
    with lab.started(RLOO()) as model:
        source = rollouts(lab, model, RLOO(), config)
        source.batch(0)
        one = source._items[0]
        assert isinstance(one, Episode)
        assert one.reference is not None
        with model.reading("reference"):
            tempered = score(model, [one.key], "reference", temperature=0.5).tokens[0]
            plain = score(model, [one.key], "reference").tokens[0]
    torch.testing.assert_close(one.reference, tempered, rtol=0, atol=1e-5)
    assert (tempered - plain).abs().max() > 0.01


def test_pairs_are_the_best_against_the_worst_and_a_tie_weighs_nothing(lab: Lab) -> None:
    class Flat(Reward):
        def __call__(self, answers: Sequence[Answer]) -> list[float]:
            return [0.0] * len(answers)

    config = RolloutConfig.model_validate({**CONFIG, "completions_per_prompt": 4, "missing_end": "keep"})
    with lab.started(DPO()) as model:
        source = rollouts(lab, model, DPO(), config)
        batch, _ = source.batch(0)
        judged = [
            Vowels()([Answer("", "", 0, True, None, "", (one.prompt, c)) for c in one.completions]) for one in batch
        ]
        assert all(best > worst or one.weight == 0 for (best, worst), one in zip(judged, batch, strict=True))
        assert any(one.weight == 1 for one in batch)
        flat, _ = rollouts(lab, model, DPO(), config, Flat()).batch(0)
        assert [one.weight for one in flat] == [0.0] * 6


def test_a_limit_on_the_kl_ends_the_updates_on_a_rollout(lab: Lab, tmp_path: Path) -> None:
    lab.run(tmp_path, RLOO(), kl_limit=1e-9)
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps[0] == 1 or steps[0] == 4
    assert len(steps) < 8  # the first update of a rollout moves, the second finds that out and is the last
    assert rows(tmp_path)[-1]["step"] == 8
    used = [row["rollout/updates"] for row in rows(tmp_path) if "rollout/updates" in row]
    assert used
    assert all(one < 4 for one in used)


def test_a_budget_of_kl_ends_the_training(lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcome = lab.run(tmp_path, RLOO(kl_coefficient=0.0), kl_budget=1e-3)
    assert outcome.stopped_early
    assert outcome.progress.step == 4
    assert "the training ends at step 4 of 8" in caplog.text
    again = lab.run(tmp_path, RLOO(kl_coefficient=0.0), kl_budget=1e-3)
    assert again.progress.step == 4


def test_the_adaptive_coefficient_follows_the_kl(lab: Lab, tmp_path: Path) -> None:
    lab.run(tmp_path, PPO(kl_coefficient=0.1, kl_target=1.0, kl_horizon=100))
    first, second = [row for row in rows(tmp_path) if "rollout/kl_coefficient" in row]
    assert first["rollout/kl_coefficient"] == 0.1
    # KL 0 against a target of 1: the error is cut at -0.2; 12 completions of a horizon of 100.
    assert second["rollout/kl_coefficient"] == pytest.approx(0.1 * (1 - 0.2 * 12 / 100))


def test_a_reward_that_is_no_number_names_the_row_and_trains_nothing(lab: Lab, tmp_path: Path) -> None:
    class Broken(Reward):
        def __call__(self, answers: Sequence[Answer]) -> list[float]:
            return [math.nan] * len(answers)

    with pytest.raises(RewardError, match=r"pairs\.jsonl:\d+: the reward Broken returned nan"):
        lab.run(tmp_path, PPO(), reward=Broken())
    assert rows(tmp_path) == []


def test_a_policy_that_is_not_its_reference_is_refused(lab: Lab) -> None:
    with lab.started(RLOO()) as model, pytest.raises(TrainingError, match=r"differs from its reference by 0\.5 nats"):
        refuse_drift(model, 0.5)


@pytest.mark.parametrize("name", ["ppo", "online dpo"])
def test_what_a_checkpoint_holds_of_a_rollout_is_all_of_it(lab: Lab, name: str) -> None:
    objective = EVERY[name]
    with lab.started(objective) as model:
        source = rollouts(lab, model, objective, RolloutConfig.model_validate(CONFIG))
        source.batch(0)
        tensors, plain = pack(source._items)
        again = unpack(tensors, plain, model.device)
        assert len(again) == len(source._items)
        for ours, theirs in zip(source._items, again, strict=True):
            if not isinstance(ours, Episode):
                assert ours == theirs
                continue
            assert isinstance(theirs, Episode)
            for field in ("example", "score", "prompt_index", "temperature", "demonstration"):
                assert getattr(ours, field) == getattr(theirs, field)
            for field in ("sampler", "reference", "sampler_value", "advantage", "value_target"):
                assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
