"""How fast a short adverse fine-tune undoes what a run has learned.

Whoever holds a model's weights can train it further, and safety training has been found to yield to little: about 340
examples removed GPT-4's (Zhan et al. 2023, arXiv:2311.05553), about 100 those of open models (Yang et al. 2023, "Shadow
Alignment", arXiv:2310.02949), one GPU and under 200 dollars that of a 70B model (Lermen et al. 2023, arXiv:2310.20624).
Here the adversary is the plainest one: DPO on the run's own training pairs with chosen and rejected exchanged, one
pass, from the run's adapter. That is one attack of many: what withstands it is not thereby safe.

A run's folder then holds robustness/start (what the reference achieves), robustness/N (the adverse training on N pairs,
with achieved/ in it) and robustness/robustness.json.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, final

import numpy as np

from dpo.checkpoint import atomic_write_text
from dpo.data import Checked, Preference, check, held_out_pairs
from dpo.errors import ConfigError, DataError
from dpo.estimates import Estimate, mean
from dpo.evaluation.achieved import Achieved
from dpo.evaluation.titles import ACCURACY, GOLD, MARGIN
from dpo.measure import achieved_by
from dpo.model.base import Base, LanguageModel, load_base
from dpo.run import ADAPTER, SUMMARY_FILE, Result, execute, measure_start, only_process, prepared_for, read_result
from dpo.settings import Evaluation, ObjectiveConfig, Run, merged
from dpo.train import Loop

log = logging.getLogger("dpo")

ROBUSTNESS, START, ACHIEVED, RESULTS_FILE = "robustness", "start", "achieved", "robustness.json"

EXAMPLES = (0, 10, 50, 100, 340)
"""Adverse pairs to try: up to the number that is reported to undo the safety training of a large model."""

UNMOVED: Mapping[str, float] = {ACCURACY: 0.5, MARGIN: 0.0}
"""What a policy that has not moved from its reference has on held-out pairs."""

DRAW = 0
"""Seed of the choice of adverse pairs: fewer of them are the first of more."""


@final
@dataclass(frozen=True)
class Eroded:
    """The policy after one adverse training."""

    examples: int
    """Exchanged pairs that it learned from; 0 is the run itself."""
    measures: Mapping[str, Estimate]
    """As the run was measured: by the ledger's names, against the run's reference."""


@final
@dataclass(frozen=True)
class HalfLife:
    """When half of what the run gained is gone."""

    measure: str
    gain: Estimate
    """Of the run over its reference, unit by unit."""
    examples: int | None
    """The fewest tried that took half of it, by the means; None where none did, or where there was nothing to lose."""

    def __str__(self) -> str:
        if self.gain.low <= 0:
            return f"{self.measure}: no gain to lose ({self.gain})"
        gone = "not within those tried" if self.examples is None else f"after {self.examples} adverse examples"
        return f"{self.measure}: half of the gain of {self.gain} is gone {gone}"


@final
@dataclass(frozen=True)
class Erosion:
    """What adverse trainings of growing length leave of a run."""

    start: Mapping[str, Estimate]
    """The reference, on its own answers."""
    steps: tuple[Eroded, ...]
    """By number of examples, 0 first."""
    half_lives: tuple[HalfLife, ...]
    """Of gold reward, pair accuracy and pair margin, as far as they were measured."""


def erode(folder: Path, examples: Sequence[int] = EXAMPLES, settings: Mapping[str, Any] | None = None) -> Erosion:
    """Train fresh copies of a finished run's adapter adversely, and measure each as the run was measured.

    What is finished is not trained again.

    Args:
        folder: of a finished run that trained a policy's adapter.
        examples: numbers of adverse pairs; 0, the run itself, is always among them.
        settings: nested, of the adverse training: objective, optimiser and loop (None: DPO at its defaults in steps of
            16 pairs, with the run's own optimiser and learning rate).

    Raises:
        ConfigError: the folder holds no such run, or earlier adverse trainings with other settings.
        DataError: the run's data has changed, or has fewer training pairs that fit than asked for.
    """
    result = read_result(folder)
    wanted = sorted({0, *examples})
    if wanted[0] < 0:
        raise ConfigError(f"--adverse: got {wanted[0]}, expected numbers of examples such as 10,50,100,340.")
    _refuse_others(result)
    planned = {n: _adverse(result, n, settings or {}) for n in wanted[1:]}
    root = folder / ROBUSTNESS
    for n, run in planned.items():
        _refuse_other_settings(root / str(n), run)
    with only_process(root):
        if not all((root / str(n) / ACHIEVED).is_dir() for n in planned) or not (root / START).is_dir():
            _carry_out(result, planned, root)
        found = _read(result, wanted, root)
        atomic_write_text(root / RESULTS_FILE, json.dumps(asdict(found), indent=2) + "\n")
    return found


def exchanged(records: Sequence[Preference]) -> Iterator[Preference]:
    """Yield the pairs of all records, in an order drawn once for all, with chosen and rejected exchanged."""
    pairs = [(record, pair) for record in records for pair in record.pairs()]
    for n in np.random.default_rng(DRAW).permutation(len(pairs)):
        record, pair = pairs[n]
        yield replace(record, completions=(pair.rejected, pair.chosen), scores=(1.0, 0.0))


def _refuse_others(result: Result) -> None:
    """Refuse a run without an adapter of its policy.

    Raises:
        ConfigError: it trained a reward model, or all weights.
    """
    if result.run.trains_reward:
        raise ConfigError(
            f"{result.folder}: holds a reward model, expected a policy, whose behaviour can be undone. Name the folder "
            "of the stage that trained one."
        )
    if result.run.model.lora is None:
        raise ConfigError(
            f"{result.folder}: trained all weights (model.lora=null), expected an adapter to go on from. Train the run "
            "with model.lora."
        )


def _adverse(result: Result, examples: int, settings: Mapping[str, Any]) -> Run:
    """Return the adverse training on so many pairs; its samples would be measured against another reference.

    Raises:
        ConfigError: a setting is unknown, or changes more than the training.
    """
    if other := sorted(set(settings) - {"objective", "optimiser", "loop"}):
        raise ConfigError(
            f"{other[0]}: an adverse training cannot change it; objective.*, optimiser.* and loop.* can be given."
        )
    run = result.run
    start = {"adapter": str(result.folder / ADAPTER), "reference": "start"}
    adverse = Run(
        name="adverse",
        data=run.data,
        objective=ObjectiveConfig(name="dpo"),
        model=run.model.model_copy(update=start),
        optimiser=run.optimiser,
        loop=Loop(seed=run.loop.seed, per_device_max_tokens=run.loop.per_device_max_tokens),
        evaluation=Evaluation(max_prompts=0),
    )
    return adverse.override(merged(settings, {"output": {"dir": str(result.folder / ROBUSTNESS / str(examples))}}))


def _refuse_other_settings(folder: Path, run: Run) -> None:
    """Refuse to take a finished adverse training for another; an unfinished one is looked at when it goes on.

    Raises:
        ConfigError: names the first setting that differs.
    """
    if not (folder / SUMMARY_FILE).exists():
        return
    ours, theirs = run.decisive(), read_result(folder).run.decisive()
    for key in sorted({*ours, *theirs} - {"model.adapter"}):  # a place, which may be written in two ways
        if ours.get(key) != theirs.get(key):
            raise ConfigError(
                f"{folder}: holds an adverse training with {key}={theirs.get(key)!r}, got {ours.get(key)!r}. Move "
                f"{folder.parent} away, or give these settings."
            )


def _carry_out(result: Result, planned: Mapping[int, Run], root: Path) -> None:
    run = result.run
    checked = check(run.data)
    base = load_base(run.model)
    trained_on = result.summary["data_fingerprint"]
    if prepared_for(run, run.objective.build(), checked, base.tokenizer).fingerprint != trained_on:
        raise DataError(
            f"{result.folder}: {run.data.train} has changed since the run was trained, expected its own held-out rows. "
            "Put the data back as it was."
        )
    adverse = _fitting(checked, base, max(planned, default=0))
    if not (root / START).is_dir():
        _keep(measure_start(run, base, checked), root / START)
    for n, one in planned.items():
        folder = root / str(n)
        if not (folder / SUMMARY_FILE).exists():
            log.info("%s: adverse training on %d pairs", result.folder, n)
            execute([one], one.name, base=base, checked=replace(checked, train=tuple(adverse[:n]), eval=()))
        if not (folder / ACHIEVED).is_dir():
            _keep(_measured(run, folder / ADAPTER, base, checked), folder / ACHIEVED)


def _fitting(checked: Checked, base: Base, count: int) -> list[Preference]:
    """Return the first `count` exchanged pairs that are within data.max_length.

    Raises:
        DataError: there are fewer.
    """
    fits = (one for one in exchanged(checked.train) if held_out_pairs(replace(checked, eval=(one,)), base.tokenizer))
    found = list(islice(fits, count))
    if len(found) < count:
        raise DataError(
            f"{checked.config.train}: got {len(found)} training pairs to exchange, expected {count}. Give smaller "
            "numbers with --adverse."
        )
    return found


def _measured(run: Run, adapter: Path, base: Base, checked: Checked) -> Achieved:
    """Measure an adapter in the place of the run's own: same reference, prompts, seed of sampling and pairs."""
    model = LanguageModel.start(base, run.model, run.loop.seed)
    try:
        model.restore(adapter)
        return achieved_by(run, model, checked, held_out_pairs(checked, base.tokenizer))
    finally:
        model.release()


def _keep(achieved: Achieved, folder: Path) -> None:
    """Write into `folder`, which is there only once it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(exist_ok=True)
    achieved.write(part)
    part.rename(folder)


def _read(result: Result, wanted: Sequence[int], root: Path) -> Erosion:
    start = Achieved.read(root / START)
    achieved = {n: Achieved.read(root / str(n) / ACHIEVED) if n else result.achieved for n in wanted}
    steps = tuple(Eroded(n, one.estimates()) for n, one in achieved.items())
    before = {**{name: [value] for name, value in UNMOVED.items()}, **_units(start)}
    half_lives = [
        _half_life(measure, before[measure], after, steps)
        for measure, after in _units(result.achieved).items()
        if measure in before
    ]
    return Erosion(start.estimates(), steps, tuple(half_lives))


def _units(achieved: Achieved) -> dict[str, list[float]]:
    """Return the values of what training is to raise: of each prompt."""
    found: dict[str, list[float]] = {}
    if achieved.spoken is not None and achieved.spoken.gold is not None:
        found[GOLD] = [*achieved.spoken.gold]
    if achieved.held_out is not None:
        found |= {name: [*values.values()] for name, values in achieved.held_out.by_prompt().items()}
    return found


def _half_life(measure: str, before: Sequence[float], after: Sequence[float], steps: Sequence[Eroded]) -> HalfLife:
    """Compare unit by unit; a single `before` is that of every unit."""
    starts = np.broadcast_to(np.asarray(before, dtype=float), len(after))
    gain = mean((np.asarray(after) - starts).tolist())
    half = float(starts.mean()) + gain.value / 2
    gone = [one.examples for one in steps if one.measures[measure].value <= half]
    return HalfLife(measure, gain, gone[0] if gone and gain.low > 0 else None)


def show_erosion(found: Erosion) -> None:
    """Print what is left after each number of adverse examples, and when half of the gain is gone."""
    from rich.console import Console
    from rich.table import Table

    names = list(found.steps[0].measures)
    table = Table("adverse examples", *names, title="What an adverse fine-tune leaves")
    for examples, measures in (("start", found.start), *((str(one.examples), one.measures) for one in found.steps)):
        known = [measures.get(name) for name in names]
        table.add_row(examples, *("" if one is None else f"{one.value:.2f} ±{one.half_width:.2f}" for one in known))
    Console().print(table)
    for one in found.half_lives:
        print(f"- {one}")
