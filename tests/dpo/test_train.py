"""The loop: exact accumulation, order and schedule; exact resume; no update from numbers that are not finite."""

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, final

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dpo import checkpoint
from dpo import train as loop_module
from dpo.batches import Plan
from dpo.data import Example, prepare
from dpo.data.prepare import DataConfig
from dpo.errors import CheckpointError, TrainingError
from dpo.losses import MovesReference, Objective, PairObjective
from dpo.losses.bco import BCO
from dpo.losses.dpo import DPO
from dpo.losses.ipo import IPO
from dpo.losses.kto import KTO
from dpo.losses.reduce import log_ratios, pair_output
from dpo.losses.sft import SFT
from dpo.metrics import AXES, METRICS, Row, read
from dpo.model.base import Base, LanguageModel, LoRA, ModelConfig, load_base
from dpo.model.reference import ReferenceLogps
from dpo.sinks import Sink
from dpo.stop import Stopped
from dpo.train import Loop, Optimiser, Outcome, division, learning_rate, peak_memory, reset_peak_memory, train
from dpo.types import LossOutput, PairLogps

OPTIMISER = Optimiser(learning_rate=1e-3, warmup_ratio=0.2)
LOOP = Loop(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2, save_steps=2, seed=3)
IDENTITY = {"settings": "a", "data": "b"}


@pytest.fixture
def base(tiny_config: ModelConfig) -> Base:
    return load_base(tiny_config)


@dataclass(frozen=True)
class Lab:
    """One base and one file of pairs; every run starts anew on them."""

    base: Base
    config: ModelConfig
    file: Path

    def examples(self, objective: Objective, count: int) -> list[Example]:
        source = DataConfig.model_validate({"train": str(self.file), "eval_share": 0})
        view, mismatched = objective.view, objective.needs_mismatched
        return prepare(source, self.base.tokenizer, view, mismatched=mismatched).train[:count]

    @contextmanager
    def started(self, dropout: float = 0.0, moving: bool = False, **config: Any) -> Iterator[LanguageModel]:
        settings = self.config.model_copy(update={"lora": LoRA(r=4, dropout=dropout), **config})
        model = LanguageModel.start(self.base, settings, seed=3, moving=moving)
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
        optimiser: Optimiser = OPTIMISER,
        examples: int = 20,
        held_out: int = 0,
        dropout: float = 0.0,
        identity: Mapping[str, str] = IDENTITY,
        watch: Callable[[LanguageModel, Row], None] | None = None,
        **config: Any,
    ) -> Outcome:
        """Train; `watch` is called with the model at every row of the ledger. The adapter is saved at the end."""
        found = self.examples(objective, examples + held_out)
        with self.started(dropout, isinstance(objective, MovesReference), **config) as model:
            sinks: Sequence[Sink] = () if watch is None else (Watcher(model, watch),)
            outcome = train(
                model=model,
                reference=ReferenceLogps(model),
                objective=objective,
                train_examples=found[:examples],
                eval_examples=found[examples:],
                optimiser=optimiser,
                loop=loop,
                folder=folder,
                identity=identity,
                sinks=sinks,
            )
            model.save(folder)
        return outcome


@dataclass(frozen=True)
class Watcher:
    model: LanguageModel
    watch: Callable[[LanguageModel, Row], None]

    def log(self, row: Row) -> None:
        self.watch(self.model, row)

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        raise AssertionError("the loop leaves the summary to its caller")


@pytest.fixture
def lab(base: Base, tiny_config: ModelConfig, pairs_file: Callable[..., Path], tmp_path: Path) -> Lab:
    return Lab(base, tiny_config, pairs_file(tmp_path / "pairs.jsonl"))


@final
@dataclass(frozen=True, kw_only=True)
class Sorted(PairObjective):
    """Couples the examples of a step: the k-th smallest margin against the k-th smallest of the reference."""

    needs_reference = True
    needs_tokens = True
    batch_coupled = True
    paper = "nowhere"

    def __call__(self, logps: PairLogps) -> LossOutput:
        margin = logps.policy_chosen - logps.policy_rejected
        assert logps.chosen_tokens is not None
        assert logps.reference_chosen is not None
        assert logps.reference_rejected is not None
        of_reference = (logps.reference_chosen - logps.reference_rejected).sort().values
        gap = margin - of_reference[margin.argsort().argsort()]
        first = logps.chosen_tokens.policy[:, 0]  # and each example's first token against the mean of all
        losses = torch.nn.functional.softplus(-gap) + 0.1 * (first - first.mean()) ** 2
        return pair_output(logps, losses, torch.stack([margin, 0 * margin], 1))


@final
@dataclass(frozen=True, kw_only=True)
class Shifted(PairObjective):
    """Depends on the running mean of the log-ratios."""

    needs_reference = True
    needs_mean_log_ratio = True
    paper = "nowhere"

    def __call__(self, logps: PairLogps) -> LossOutput:
        assert logps.mean_log_ratio is not None
        chosen, rejected = log_ratios(logps)
        shift = logps.mean_log_ratio
        losses = torch.nn.functional.softplus(shift - chosen) + torch.nn.functional.softplus(rejected - shift)
        out = pair_output(logps, losses, torch.stack([chosen, rejected], 1))
        return replace(out, metrics={**out.metrics, "custom/shift": shift})


@final
@dataclass(frozen=True, kw_only=True)
class Following(PairObjective, MovesReference):
    """DPO against a reference that takes over a share of the policy every `every` steps."""

    part: float = 0.5
    every: int = 1
    needs_reference = True
    paper = "nowhere"

    def share(self, step: int) -> float:
        return self.part if step % self.every == 0 else 0.0

    def __call__(self, logps: PairLogps) -> LossOutput:
        return DPO()(logps)


class Killed(BaseException):
    """Stands for a kill between a row and whatever follows it."""


def kill_at(step: int) -> Callable[[LanguageModel, Row], None]:
    def watch(model: LanguageModel, row: Row) -> None:
        if row["step"] == step:
            raise Killed

    return watch


def rows(folder: Path, kind: str = "train") -> list[Row]:
    return [row for row in read(folder / "metrics.jsonl") if row["kind"] == kind]


def weights(model: LanguageModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same_bytes(first: Path, second: Path) -> None:
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


# --- which examples, at which rate ---


@pytest.mark.faults
def test_every_example_comes_once_an_epoch_in_an_order_of_seed_and_epoch_alone() -> None:
    plan = Plan.of(20, 6, epochs=3, max_steps=None, seed=5)
    assert (plan.batch, plan.steps) == (6, 12)
    epochs = [[i for step in range(4 * e, 4 * e + 4) for i in plan.indices(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(plan.indices(step)) for step in range(4)] == [6, 6, 6, 2]
    torch.manual_seed(99)  # the global generator has no say
    assert Plan.of(20, 20, epochs=9, max_steps=None, seed=5).indices(1) == epochs[1]
    assert replace(plan, seed=6).indices(0) != plan.indices(0)


def test_max_steps_ends_a_run_early() -> None:
    assert Plan.of(1000, 16, epochs=1, max_steps=2, seed=0).steps == 2
    assert Plan.of(32, 16, epochs=1, max_steps=2000, seed=0).steps == 2


@pytest.mark.parametrize(
    ("shape", "shares"),
    [
        # 10 steps, warm-up of 2: 1/3, 2/3, the peak at step 2, and 8 steps down to 0 at step 10, which is none.
        ("linear", [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("constant_with_warmup", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        # (1 + cos(pi k / 8)) / 2 for k = 0..7
        ("cosine", [1 / 3, 2 / 3, 1, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]),
    ],
)
def test_the_rate_rises_to_its_peak_falls_and_is_never_zero(shape: str, shares: list[float]) -> None:
    settings = Optimiser.model_validate({"learning_rate": 2.0, "lr_scheduler_type": shape, "warmup_ratio": 0.2})
    assert [learning_rate(settings, step, 10) for step in range(10)] == pytest.approx([2 * s for s in shares], abs=2e-6)


def test_a_run_of_one_step_takes_it_at_the_peak() -> None:
    assert learning_rate(Optimiser(learning_rate=0.5, warmup_ratio=0.9), 0, 1) == 0.5


def test_the_optimizer_sees_the_rate_of_the_ledger_and_a_gradient_clipped_to_max_grad_norm(
    lab: Lab, tmp_path: Path
) -> None:
    seen: list[tuple[float, float]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        (group,) = optimizer.param_groups
        norm = torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm().item()
        seen.append((group["lr"], norm))

    hook = register_optimizer_step_pre_hook(look)
    try:
        lab.run(tmp_path / "clipped", DPO(), optimiser=replaced(OPTIMISER, max_grad_norm=0.01))
    finally:
        hook.remove()
    ledger = rows(tmp_path / "clipped")
    assert [rate for rate, _ in seen] == [row["train/learning_rate"] for row in ledger]
    assert seen[0][0] == pytest.approx(5e-4)  # a warm-up of 1 of 6 steps: half the peak, not 0
    assert [norm for _, norm in seen] == pytest.approx([0.01] * 6, rel=1e-3)
    assert all(float(row["grad_norm"]) > 0.02 for row in ledger)  # as it was before clipping


def replaced(settings: Any, **changes: Any) -> Any:
    return type(settings).model_validate({**settings.model_dump(), **changes})


@pytest.mark.parametrize(
    "objective", [DPO(), IPO(), KTO(), SFT(), Sorted(), Shifted(), Following()], ids=lambda one: type(one).__name__
)
def test_accumulation_is_exact_also_in_a_last_smaller_batch(lab: Lab, tmp_path: Path, objective: Objective) -> None:
    portions = {"2 x 4": (2, 4), "8 x 1": (8, 1)}
    for name, (micro, times) in portions.items():
        loop = replaced(LOOP, per_device_train_batch_size=micro, gradient_accumulation_steps=times, num_train_epochs=1)
        lab.run(tmp_path / name, objective, loop=loop)  # 20 examples: batches of 8, 8 and 4
    assert_close(tmp_path / "2 x 4", tmp_path / "8 x 1")


@pytest.mark.parametrize(
    "objective", [DPO(), IPO(), KTO(), SFT(), Sorted(), Shifted(), Following()], ids=lambda one: type(one).__name__
)
def test_accumulation_is_exact_with_a_ragged_last_micro_batch(lab: Lab, tmp_path: Path, objective: Objective) -> None:
    for name, micro, times in (("3 and rest", 3, 3), ("9 x 1", 9, 1)):
        loop = replaced(LOOP, per_device_train_batch_size=micro, gradient_accumulation_steps=times, num_train_epochs=1)
        lab.run(tmp_path / name, objective, loop=loop, examples=17)  # 9, then 8 = 3 + 3 + 2
    assert_close(tmp_path / "3 and rest", tmp_path / "9 x 1")


def test_a_coupled_step_repeats_its_random_numbers(lab: Lab, tmp_path: Path) -> None:
    """With dropout, the factors of the first pass belong to what the second one computes; seen in step 2, as an adapter
    that is still zero drops nothing."""
    seen: list[Tensor] = []
    view = loop_module.view

    def watch(*args: Any) -> Any:
        record = view(*args)
        seen.append(record.policy_chosen.detach())
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "view", watch)
        lab.run(tmp_path, Sorted(), loop=replaced(LOOP, max_steps=2), dropout=0.5)
    first, second, again_first, again_second = seen[-4:]
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)
    assert not torch.equal(first, second)


def test_the_running_mean_is_that_of_the_steps_before(lab: Lab, tmp_path: Path) -> None:
    lab.run(tmp_path, Shifted())
    found, total, count = rows(tmp_path), 0.0, 0
    for row, batch in zip(found, [8, 8, 4] * 2, strict=True):
        assert float(row["custom/shift"]) == pytest.approx(total / max(1, count), abs=1e-5)
        total += batch * (float(row["reward/chosen"]) + float(row["reward/rejected"]))
        count += 2 * batch
    assert abs(float(found[-1]["custom/shift"])) > 1e-4  # it did move


def test_a_moving_reference_follows_the_policy_and_evaluation_keeps_the_start(lab: Lab, tmp_path: Path) -> None:
    loop, kept = replaced(LOOP, eval_steps=6), ("reward/margin", "eval/reward/margin")
    found: dict[str, list[list[float]]] = {}
    for name, objective in {
        "still": DPO(),
        "copied": Following(part=1.0),
        "never": Following(part=0.5, every=99),
    }.items():
        lab.run(tmp_path / name, objective, loop=loop, held_out=4)
        found[name] = [
            [float(row[key]) for row in rows(tmp_path / name, key.split("/")[0].replace("reward", "train"))]
            for key in kept
        ]
    assert found["never"] == [pytest.approx(found["still"][0], abs=1e-6), pytest.approx(found["still"][1], abs=1e-6)]
    assert found["copied"][0] == pytest.approx([0.0] * 6, abs=1e-5)  # the copy of the step before is the policy itself
    assert abs(found["still"][0][-1]) > 1e-3
    assert abs(found["copied"][1][-1]) > 1e-3  # held against the start, the policy has moved


@final
@dataclass(frozen=True, kw_only=True)
class Faulty(PairObjective):
    """Fails in the way that `how` says."""

    how: str
    needs_reference = True
    paper = "nowhere"

    def __call__(self, logps: PairLogps) -> LossOutput:
        if self.how == "raises":
            raise KeyError("beta")
        out = DPO()(logps)
        object.__setattr__(out, "losses", out.losses[:1])  # past the checks that only tests have
        return out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"^objective Faulty: its call failed with KeyError: 'beta'\. Mend it; dpo\.losses\.testing\.check"),
        ("too short", r"^objective Faulty: got loss and losses of shapes \(\) and \(1,\), expected \(\) and \(4,\)"),
    ],
)
def test_an_objective_s_own_fault_is_said_to_be_its_own(lab: Lab, tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        lab.run(tmp_path, Faulty(how=how))


def test_a_skipped_step_leaves_the_running_mean_and_not_the_moving_reference(lab: Lab, tmp_path: Path) -> None:
    """A copy that falls on a step without an update is not put off: the policy is what it was."""
    seen: list[float] = []

    @final
    @dataclass(frozen=True, kw_only=True)
    class Failing(PairObjective, MovesReference):
        needs_reference = True
        needs_mean_log_ratio = True
        paper = "nowhere"

        def share(self, step: int) -> float:
            return 1.0 if step == 2 else 0.0

        def __call__(self, logps: PairLogps) -> LossOutput:
            assert logps.mean_log_ratio is not None
            seen.append(logps.mean_log_ratio.item())
            out = DPO()(logps)
            return replace(out, loss=out.loss * math.nan) if len(seen) in (3, 4) else out  # step 2, both micro-batches

    loop = replaced(LOOP, max_steps=3, gradient_accumulation_steps=1, per_device_train_batch_size=8)
    lab.run(tmp_path, Failing(), loop=loop)
    first, second, third = rows(tmp_path)
    assert math.isnan(float(second["train/loss"]))
    assert abs(float(second["reward/margin"])) > 1e-4
    assert float(third["reward/margin"]) == pytest.approx(0, abs=1e-5)  # held against the copy of itself
    assert seen[2] == seen[4]  # nothing of the step that was skipped
    assert first["step"] == 1


def assert_close(first: Path, second: Path) -> None:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert any(tensor.abs().max() > 1e-4 for name, tensor in ours.items() if "lora_B" in name)  # it did move
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
    for kind in ("train", "eval"):
        for one, other in zip(rows(first, kind), rows(second, kind), strict=True):
            assert one.pop("kind") == other.pop("kind")
            if one["step"] == 1:  # every reward is 0 up to rounding: which is higher is a coin's
                one = {**one, "reward/accuracy": 0}
                other = {**other, "reward/accuracy": 0}
            assert one == pytest.approx(other, rel=1e-4, abs=2e-5)


@pytest.mark.faults
@pytest.mark.parametrize("objective", [DPO(), KTO()], ids=["dpo", "kto"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_step_is_the_same_however_it_is_divided(lab: Lab, tmp_path: Path, objective: Objective, layout: str) -> None:
    """By examples, by tokens, one by one, all at once, in either layout: one batch, one gradient, one metric."""
    loop = replaced(LOOP, num_train_epochs=1)
    examples, base = lab.examples(objective, 20), replace(lab.base, layout=layout)
    five = division(loop, 5, base, objective).largest(examples)
    ways = {
        "examples": loop,
        "all": replaced(loop, per_device_train_batch_size=8, gradient_accumulation_steps=1),
        "tokens": replaced(loop, per_device_max_tokens=five),
        "one": replaced(loop, per_device_max_tokens=1),
    }
    step = [examples[n] for n in Plan.of(20, 8, epochs=1, max_steps=None, seed=LOOP.seed).indices(0)]
    parts = division(ways["tokens"], 4, base, objective).micro_batches(step)
    assert len(set(map(len, parts))) > 1  # uneven, so that a mean of their means would be another
    for way, settings in ways.items():
        given = lab if way == "examples" else replace(lab, base=base)
        given.run(tmp_path / way, objective, loop=settings, held_out=5)
        assert_close(tmp_path / way, tmp_path / "examples")


@pytest.mark.faults
def test_out_of_memory_halves_the_micro_batch_and_nothing_else(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A card that holds two pairs: 4 at once fail in their second micro-batch, 2 at once go through, and stay."""
    lab.run(tmp_path / "roomy", DPO())
    sound = loop_module.view
    sizes: list[int] = []

    def cramped(model: LanguageModel, reference: Any, objective: Any, examples: Sequence[Example]) -> Any:
        if torch.is_grad_enabled():
            sizes.append(len(examples))
            if len(examples) > 2 and len(sizes) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return sound(model, reference, objective, examples)

    monkeypatch.setattr(loop_module, "view", cramped)
    with caplog.at_level(logging.WARNING, "dpo"):
        lab.run(tmp_path / "cramped", DPO())
    assert sizes == [4, 4, *[2] * 4, *[2] * 4, 2, 2, *[2] * 4, *[2] * 4, 2, 2]  # 8, 8 and 4 examples, twice
    assert [record.message for record in caplog.records if "memory" in record.message] == [
        "out of memory with 4 examples at once: from here on 2 at once, the optimiser step takes the same ones"
    ]
    assert_close(tmp_path / "cramped", tmp_path / "roomy")
    state = json.loads((tmp_path / "cramped/checkpoints/step-00000006/state.json").read_text())
    assert state["progress"]["parts"] == 2  # a resumed run does not try again what failed


def test_offloaded_activations_change_no_bit(lab: Lab, tmp_path: Path) -> None:
    lab.run(tmp_path / "kept", DPO(), dropout=0.1)
    lab.run(tmp_path / "away", DPO(), dropout=0.1, activation_offload=True)
    assert_same_bytes(tmp_path / "kept", tmp_path / "away")


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "rmsprop"])
def test_every_optimiser_learns_and_resumes(lab: Lab, tmp_path: Path, name: str) -> None:
    optimiser = replaced(OPTIMISER, name=name)
    lab.run(tmp_path / "whole", DPO(), optimiser=optimiser)
    with pytest.raises(Killed):
        lab.run(tmp_path / "broken", DPO(), optimiser=optimiser, watch=kill_at(4))
    lab.run(tmp_path / "broken", DPO(), optimiser=optimiser)
    assert_same_bytes(tmp_path / "broken", tmp_path / "whole")
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "whole")]
    assert losses[-1] < losses[0]


# --- the ledger and what is said on the way ---


@pytest.mark.parametrize("objective", [DPO(), KTO(), SFT()], ids=lambda one: type(one).__name__)
def test_every_row_has_every_axis_and_only_defined_names(lab: Lab, tmp_path: Path, objective: Objective) -> None:
    loop = replaced(LOOP, eval_steps=2, num_train_epochs=1)
    outcome = lab.run(tmp_path / "run", objective, loop=loop, held_out=4)
    kept, timed = (read(tmp_path / "run" / name) for name in ("metrics.jsonl", "performance.jsonl"))
    assert [(row["step"], row["kind"]) for row in kept] == [
        (1, "train"), (2, "train"), (2, "eval"), (3, "train"), (3, "eval"),
    ]  # fmt: skip
    for row, clock in zip(kept, timed, strict=True):
        assert set(AXES) <= row.keys() | clock.keys()
        assert (row.keys() | clock.keys()) - {"step", "kind"} <= METRICS.keys()
        assert not any(not METRICS[name].deterministic for name in row.keys() - {"step", "kind"})
        assert row["train/global_step"] == row["step"]
    assert [row["train/examples_seen"] for row in rows(tmp_path / "run")] == [8, 16, 20]
    assert rows(tmp_path / "run")[-1]["train/epoch"] == 1
    assert outcome.progress.examples_seen == 20
    assert outcome.evaluated is not None


def test_evaluation_changes_nothing(lab: Lab, tmp_path: Path) -> None:
    for name, every in (("often", 1), ("at the end", None)):
        loop = replaced(LOOP, eval_steps=every)
        lab.run(tmp_path / name, DPO(), loop=loop, held_out=4, dropout=0.1)
    assert rows(tmp_path / "often") == rows(tmp_path / "at the end")
    assert rows(tmp_path / "often", "eval")[-1] == rows(tmp_path / "at the end", "eval")[0]


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "dpo")
    loop = replaced(LOOP, max_steps=2)
    lab.run(tmp_path / "quiet", DPO(), loop=loop)
    assert not [text for text in caplog.messages if "left" in text]  # less than half a minute
    monkeypatch.setattr(loop_module, "SECONDS_BETWEEN_LINES", 0)
    lab.run(tmp_path / "told", DPO(), loop=loop)
    first, second = (text for text in caplog.messages if "left" in text)
    assert first.startswith("DPO: step 1 of 2, loss 0.693")
    assert "margin " in first
    assert second.endswith("about 0 s left")


# --- resume ---


@pytest.mark.parametrize(
    ("objective", "dropout"),
    [
        (DPO(), 0.1),
        (KTO(), 0.0),
        (SFT(), 0.1),
        (Shifted(), 0.0),
        (BCO(), 0.0),
        (Following(part=0.3, every=2), 0.1),
        (Sorted(), 0.1),
    ],
    ids=["DPO with dropout", "KTO", "SFT", "running mean", "BCO", "moving reference", "coupled"],
)
@pytest.mark.faults
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(
    lab: Lab, tmp_path: Path, objective: Objective, dropout: float
) -> None:
    loop = replaced(LOOP, eval_steps=3)
    settings: dict[str, Any] = {"loop": loop, "dropout": dropout, "held_out": 4}
    lab.run(tmp_path / "whole", objective, **settings)
    with pytest.raises(Killed):  # 6 steps; the row of step 5 is written, its checkpoint is not: back to step 4
        lab.run(tmp_path / "broken", objective, watch=kill_at(5), **settings)
    assert rows(tmp_path / "broken")[-1]["step"] == 5
    torch.manual_seed(12345)
    outcome = lab.run(tmp_path / "broken", objective, **settings)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")
    assert (outcome.progress.step, outcome.progress.examples_seen) == (6, 40)


@pytest.mark.faults
def test_a_damaged_newest_checkpoint_costs_time_only(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab.run(tmp_path / "whole", DPO(), dropout=0.1)
    with pytest.raises(Killed):
        lab.run(tmp_path / "broken", DPO(), dropout=0.1, watch=kill_at(5))
    newest = tmp_path / "broken" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    lab.run(tmp_path / "broken", DPO(), dropout=0.1)
    assert "skipped a damaged checkpoint" in caplog.text
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")


def test_full_weights_resume_as_well(lab: Lab, tmp_path: Path, tiny_config: ModelConfig) -> None:
    examples = lab.examples(DPO(), 8)
    plain = tiny_config.model_copy(update={"lora": None})
    loop = replaced(LOOP, save_steps=1)

    def go(folder: Path, watch: Callable[[LanguageModel, Row], None] | None = None) -> None:
        model = LanguageModel.start(load_base(plain), plain, seed=0)
        train(
            model=model, reference=ReferenceLogps(model), objective=DPO(), train_examples=examples, eval_examples=[],
            optimiser=OPTIMISER, loop=loop, folder=folder, identity=IDENTITY,
            sinks=() if watch is None else (Watcher(model, watch),),
        )  # fmt: skip
        model.save(folder)

    go(tmp_path / "whole")
    with pytest.raises(Killed):
        go(tmp_path / "broken", kill_at(2))
    go(tmp_path / "broken")
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_a_finished_run_is_only_evaluated_again(lab: Lab, tmp_path: Path) -> None:
    first = lab.run(tmp_path / "run", DPO(), held_out=4)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = lab.run(tmp_path / "run", DPO(), held_out=4)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert first.evaluated is not None
    assert again.evaluated is not None
    assert torch.equal(first.evaluated.policy_chosen, again.evaluated.policy_chosen)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_checkpoint_of_another_run_is_refused(lab: Lab, tmp_path: Path) -> None:
    lab.run(tmp_path / "run", DPO())
    with pytest.raises(CheckpointError, match=r"step-00000006: this checkpoint belongs to a run with other data"):
        lab.run(tmp_path / "run", DPO(), identity={**IDENTITY, "data": "c"})


# --- stops, and saves in time ---


def saved(folder: Path) -> list[int]:
    """The steps of which there is a checkpoint."""
    return sorted(int(one.name.removeprefix("step-")) for one in (folder / "checkpoints").glob("step-*"))


def send_at(step: int, *signals: signal.Signals) -> Callable[[LanguageModel, Row], None]:
    def watch(model: LanguageModel, row: Row) -> None:
        for one in signals if row["step"] == step and row["kind"] == "train" else ():
            os.kill(os.getpid(), one)

    return watch


@pytest.mark.faults
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_stops_and_the_run_goes_on_to_the_same_bits(
    lab: Lab, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    settings: dict[str, Any] = {"dropout": 0.1, "held_out": 4, "loop": replaced(LOOP, eval_steps=3, save_steps=4)}
    lab.run(tmp_path / "whole", DPO(), **settings)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"^stopped after step 3 of 6, which is saved\. The same command") as caught:
        lab.run(tmp_path / "broken", DPO(), watch=send_at(3, number), **settings)
    assert caught.value.exit_code == code
    assert not isinstance(caught.value, Exception)  # nothing that puts up with failures takes it for one
    assert signal.getsignal(number) is before
    assert saved(tmp_path / "broken") == [3]
    lab.run(tmp_path / "broken", DPO(), **settings)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.faults
def test_a_second_signal_stops_at_once_and_what_was_saved_stays(lab: Lab, tmp_path: Path) -> None:
    lab.run(tmp_path / "whole", DPO())
    with pytest.raises(Stopped, match="stopped at once") as caught:
        lab.run(tmp_path / "broken", DPO(), watch=send_at(3, signal.SIGINT, signal.SIGTERM))
    assert caught.value.exit_code == 143
    assert saved(tmp_path / "broken") == [2]
    lab.run(tmp_path / "broken", DPO())
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.faults
def test_in_a_thread_training_leaves_signals_alone(lab: Lab, tmp_path: Path) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []
    loop = replaced(LOOP, max_steps=1)

    def look(model: LanguageModel, row: Row) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=lambda: lab.run(tmp_path, DPO(), loop=loop, watch=look))
    thread.start()
    thread.join()
    assert seen == [before]
    assert saved(tmp_path) == [1]


@pytest.mark.faults
@pytest.mark.parametrize(("minutes", "steps"), [(10, [2, 4, 6]), (None, [6])])
def test_a_checkpoint_is_written_at_least_every_so_many_minutes_and_changes_no_bit(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float | None, steps: list[int]
) -> None:
    """A step takes 5 minutes; the clock on the wall goes backwards all the while, which no duration shows."""
    passed = [0.0]

    def monotonic() -> float:
        passed[0] += 1e-3
        return passed[0]

    def pass_time(model: LanguageModel, row: Row) -> None:
        passed[0] += 300

    loop = replaced(LOOP, save_steps=1000, save_total_limit=9)
    lab.run(tmp_path / "by steps", DPO(), loop=replaced(loop, save_minutes=None), dropout=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "time", SimpleNamespace(monotonic=monotonic, time=lambda: -passed[0]))
        timed = replaced(loop, save_minutes=minutes)
        lab.run(tmp_path / "by time", DPO(), loop=timed, watch=pass_time, dropout=0.1)
    assert saved(tmp_path / "by time") == steps
    assert_same_bytes(tmp_path / "by steps", tmp_path / "by time")
    seconds = [row["time/seconds"] for row in read(tmp_path / "by time" / "performance.jsonl")]
    assert seconds == pytest.approx([300 * n for n in range(6)], abs=1)


@pytest.mark.faults
def test_a_save_that_the_disk_refuses_costs_that_save_alone(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One checkpoint is kept, and the disk is full at step 4: the one of step 2 stays, the one of step 6 follows it."""
    loop, whole = replaced(LOOP, save_total_limit=1), checkpoint.save_file
    lab.run(tmp_path / "whole", DPO(), loop=loop)
    seen: dict[int, list[int]] = {}

    def full(tensors: Any, path: Path) -> None:
        if "step-00000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        whole(tensors, path)

    def look(model: LanguageModel, row: Row) -> None:
        seen[int(row["step"])] = saved(tmp_path / "run")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with caplog.at_level(logging.WARNING, "dpo"):
        outcome = lab.run(tmp_path / "run", DPO(), loop=loop, watch=look)
    assert seen == {1: [], 2: [], 3: [2], 4: [2], 5: [2], 6: [2]}
    assert saved(tmp_path / "run") == [6]
    assert [one.name for one in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"]
    (said,) = [one for one in caplog.messages if "No space left" in one]
    assert said.endswith("The training goes on, and saving is tried again.")
    assert outcome.unsaved is None
    assert_same_bytes(tmp_path / "whole", tmp_path / "run")


@pytest.mark.faults
def test_out_of_memory_in_evaluation_takes_smaller_batches_there_alone(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = replaced(LOOP, eval_steps=3, per_device_eval_batch_size=4)
    lab.run(tmp_path / "roomy", DPO(), loop=loop, held_out=6)
    sound, sizes = loop_module.view, {True: [], False: []}

    def cramped(model: LanguageModel, reference: Any, objective: Any, examples: Sequence[Example]) -> Any:
        trains = torch.is_grad_enabled()
        sizes[trains].append(len(examples))
        if not trains and len(examples) > 2 and len(sizes[False]) > 1:  # the first is the look at the start
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sound(model, reference, objective, examples)

    monkeypatch.setattr(loop_module, "view", cramped)
    lab.run(tmp_path / "cramped", DPO(), loop=loop, held_out=6)
    assert sizes[True] == [4] * 10  # 8, 8 and 4 examples, twice
    assert sizes[False] == [4, 4, 2, 2, 2, 2, 2, 2]  # found out once, kept
    assert_close(tmp_path / "cramped", tmp_path / "roomy")
    state = json.loads((tmp_path / "cramped/checkpoints/step-00000006/state.json").read_text())
    assert state["progress"]["parts"] == 1


# --- numbers that are not finite ---


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], None]:
    """Make the loss of the given optimiser steps (from 1) NaN, in every micro-batch of the step."""

    def at(steps: Sequence[int]) -> None:
        calls = iter(range(1000))
        sound = DPO.__call__

        def call(self: DPO, logps: Any) -> LossOutput:
            out = sound(self, logps)
            if not torch.is_grad_enabled():
                return out
            return replace(out, loss=out.loss * math.nan) if next(calls) // 2 + 1 in steps else out

        monkeypatch.setattr(DPO, "__call__", call)

    return at


@pytest.mark.faults
def test_a_nan_changes_no_weight_is_counted_and_the_run_goes_on(
    lab: Lab, tmp_path: Path, faulty: Callable[[Sequence[int]], None]
) -> None:
    faulty([2])
    after: dict[int, list[Tensor]] = {}

    def watch(model: LanguageModel, row: Row) -> None:
        after[int(row["step"])] = weights(model)

    outcome = lab.run(tmp_path / "run", DPO(), watch=watch)
    assert all(torch.equal(a, b) for a, b in zip(after[1], after[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after[2], after[3], strict=True))
    assert all(tensor.isfinite().all() for tensor in after[6])
    assert (outcome.progress.step, outcome.progress.skipped, outcome.progress.skipped_in_a_row) == (6, 1, 0)
    second = rows(tmp_path / "run")[1]
    assert math.isnan(float(second["train/loss"]))
    assert '"train/loss": "nan"' in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.faults
def test_an_infinite_gradient_changes_no_weight_and_names_the_rows(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss is a number, and its gradient is not."""
    after: dict[int, list[Tensor]] = {}

    def watch(model: LanguageModel, row: Row) -> None:
        after[int(row["step"])] = weights(model)
        first = next(iter(model.parameters()))
        if row["step"] == 1:
            handle.append(first.register_hook(lambda gradient: gradient * math.inf))
        elif handle:
            handle.pop().remove()

    handle: list[Any] = []
    outcome = lab.run(tmp_path / "run", DPO(), watch=watch)
    second = rows(tmp_path / "run")[1]
    assert math.isfinite(float(second["train/loss"]))
    assert not math.isfinite(float(second["grad_norm"]))
    assert all(torch.equal(a, b) for a, b in zip(after[1], after[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after[2], after[3], strict=True))
    assert all(tensor.isfinite().all() for tensor in after[6])
    assert outcome.progress.skipped == 1
    found = lab.examples(DPO(), 20)
    (said,) = [one for one in caplog.messages if "no update" in one]
    batch = Plan.of(20, 8, LOOP.num_train_epochs, None, LOOP.seed).indices(1)
    assert said.endswith("its rows: " + ", ".join(found[i].source for i in batch))


@pytest.mark.faults
def test_three_in_a_row_stop_the_run_and_name_the_rows(
    lab: Lab, tmp_path: Path, faulty: Callable[[Sequence[int]], None]
) -> None:
    faulty([2, 3, 4])
    last: list[list[Tensor]] = []
    with pytest.raises(TrainingError) as caught:
        lab.run(tmp_path / "run", DPO(), watch=lambda model, row: last.append(weights(model)))
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "3 optimiser steps in a row, up to step 4" in message
    found = lab.examples(DPO(), 20)
    size = LOOP.per_device_train_batch_size * LOOP.gradient_accumulation_steps
    batch = Plan.of(20, size, LOOP.num_train_epochs, None, LOOP.seed).indices(3)
    assert all(found[i].source in message for i in batch[:4])
    assert all(tensor.isfinite().all() for tensor in last[-1])
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_steps_in_a_row_are_counted_across_a_resume(
    lab: Lab, tmp_path: Path, faulty: Callable[[Sequence[int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = replaced(LOOP, save_steps=1)
    faulty([2, 3])
    with pytest.raises(Killed):
        lab.run(tmp_path / "run", DPO(), loop=loop, watch=kill_at(4))
    monkeypatch.undo()
    state = json.loads((tmp_path / "run/checkpoints/step-00000003/state.json").read_text())
    assert (state["progress"]["skipped"], state["progress"]["skipped_in_a_row"]) == (2, 2)


# --- the start ---


@pytest.mark.faults
def test_a_policy_that_is_not_its_reference_is_refused_before_the_first_update(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = LanguageModel.start

    def moved(*arguments: Any, **more: Any) -> LanguageModel:
        model = start(*arguments, **more)
        for parameter in model.parameters():
            parameter.data += 0.2
        return model

    monkeypatch.setattr(LanguageModel, "start", moved)
    with pytest.raises(TrainingError, match=r"At step 0 the policy differs from its reference by .* nats a token"):
        lab.run(tmp_path / "run", DPO())
    assert rows(tmp_path / "run") == []
    lab.run(tmp_path / "free", SFT())  # without a reference there is nothing to be equal to


def test_going_on_from_an_adapter_starts_at_it_or_openly_away_from_the_base(lab: Lab, tmp_path: Path) -> None:
    lab.run(tmp_path / "sft", SFT(), optimiser=replaced(OPTIMISER, learning_rate=1e-2))
    loop = replaced(LOOP, max_steps=1)
    adapter = str(tmp_path / "sft")
    lab.run(tmp_path / "start", DPO(), loop=loop, adapter=adapter)
    assert rows(tmp_path / "start")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    lab.run(tmp_path / "base", DPO(), loop=loop, adapter=adapter, reference="base")
    assert abs(float(rows(tmp_path / "base")[0]["train/loss"]) - math.log(2)) > 1e-3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can begin a new peak")
def test_a_runs_peak_does_not_hold_what_came_before_it() -> None:
    device = torch.device("cpu")
    ballast = torch.ones(50_000_000)  # 200 MB
    before = peak_memory(device)
    del ballast
    reset_peak_memory(device)
    assert peak_memory(device) < before - 100_000_000
