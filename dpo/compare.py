"""Several objectives, one start, one frozen split, one budget, several seeds, one report.

A comparison's folder holds comparison.json (what was asked), start/ (what the model achieves before training),
runs/NAME-seedN (a run's folder each, as `dpo train` leaves it), tuning/, verdicts.jsonl (of a judge that is a model)
and, in the end, report.html, results.json, results.csv and differences.csv.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.resources import as_file, files
from itertools import chain
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from dpo import losses, recipes
from dpo.checkpoint import atomic_write_text
from dpo.data import Checked, check
from dpo.errors import CheckpointError, ConfigError, DataError, DPOError, TrainingError, nearest
from dpo.estimates import Estimate
from dpo.evaluation import report
from dpo.evaluation.achieved import Achieved
from dpo.evaluation.comparison import Asked, compare
from dpo.evaluation.judges import Judge, JudgeConfig, ModelJudge, Verdicts
from dpo.evaluation.records import START, Comparison, Cost, Trained
from dpo.metrics import METRICS_FILE, read
from dpo.model.base import Base, load_base
from dpo.redact import redact, redact_text
from dpo.run import SUMMARY_FILE, execute, measure_start, only_process, read_result, stage_folders
from dpo.settings import BASE_SETTINGS, NAME, PREVIOUS, STAGE, Run, explained, flat, merged, plan, read_run
from dpo.sinks import check_available

log = logging.getLogger("dpo")

ASKED_FILE, RUNS, FAILED_FILE, VERDICTS_FILE = "comparison.json", "runs", "failed.txt", "verdicts.jsonl"

ENDLESS = 10**6
"""Epochs, where a budget of completions is the limit."""

MANY_STEPS = 50_000
"""Optimiser steps, where a budget of seconds is the limit."""

POINTS = 3
"""Places along a run, its end included, at which it is sampled for the reward-KL frontier."""

SENTIMENT: Mapping[str, Any] = {
    "data": {"eval_share": 0.1, "max_length": 192},
    "loop": {"gradient_accumulation_steps": 2},
    "evaluation": {
        "gold": "dpo.data.gold:sentiment",
        "max_prompts": 60,
        "samples_per_prompt": 2,
        "max_new_tokens": 40,
        "seed": 1,
    },
}
"""Settings of the embedded task."""

SENTIMENT_COMPLETIONS = 512
"""Its budget: 32 optimiser steps of 8 pairs."""

SENTIMENT_RATES = {"dpo": 5e-4, "ipo": 5e-4, "kto": 2.5e-4, "bradleyterry": 5e-4, "ppo": 3e-4}
"""Learning rates for so few steps, by objective (docs/experiments.md); the recipes' are for hundreds."""

SENTIMENT_RATE = 5.0
"""Multiplies the recipe's rate of every other objective there."""


@final
@dataclass(frozen=True)
class Wanted:
    """What is to be compared."""

    objectives: tuple[str, ...]
    """Recipes, objectives without a recipe of their own, or YAML files of a run."""
    seeds: int = 1
    """Trainings of each: loop.seed 0, 1, ..."""
    completions: int | None = None
    """Completions that every stage learns from, each time it does (None: one pass over the training pairs)."""
    seconds: float | None = None
    """Training time of every stage in place of the completions."""
    tune: int = 0
    """Settings of learning rate and strength to try for each entry, on a validation part (0: the recipes' defaults)."""
    judge: JudgeConfig | None = None
    """A language model that compares the answers."""
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Nested settings for all runs."""


@final
@dataclass(frozen=True)
class Planned:
    """One training of one entry."""

    entry: str
    seed: int
    runs: tuple[Run, ...]
    """Its stages."""
    folder: Path


def run_comparison(wanted: Wanted, output: Path | None) -> tuple[Comparison, Path]:
    """Train what is not trained yet, measure, and write the report; the same call goes on after a stop.

    A run that fails is reported and does not keep the others from finishing; it is tried again next time.

    Args:
        wanted: what is to be compared.
        output: folder (None: runs/compare-HASH, where the hash is of all settings).

    Raises:
        DPOError: settings or data are wrong, or the disk refuses. Nothing has been trained then.
    """
    names = _names(wanted.objectives)
    if wanted.seconds is not None and wanted.completions is not None:
        raise ConfigError("--completions and --seconds: got two budgets, expected one. Leave one out.")
    with _data(wanted) as overrides:
        checked = check(_first(wanted.objectives[0], overrides).data)
        if not checked.eval and "prompts" not in overrides.get("evaluation", {}):
            raise DataError(
                f"{checked.config.train}: got no held-out examples and no evaluation prompts, expected something to "
                "compare on. Give data.eval_share above 0, data.eval=FILE or evaluation.prompts=FILE."
            )
        embedded = overrides is not wanted.overrides
        completions = wanted.completions or (SENTIMENT_COMPLETIONS if embedded else _one_pass(checked))
        entries = {
            name: tuple(
                _budgeted(run, completions, wanted.seconds, overrides)
                for run in _first_stages(what, overrides, embedded)
            )
            for name, what in zip(names, wanted.objectives, strict=True)
        }
        for name, stages in entries.items():
            _refuse_entry(name, stages, next(iter(entries.values()))[0])
        root = output or Path("runs") / f"compare-{_digest(entries, wanted)}"
        with only_process(root):
            return _carry_out(wanted, entries, completions, checked, root), root


def _carry_out(
    wanted: Wanted, entries: Mapping[str, tuple[Run, ...]], completions: int, checked: Checked, root: Path
) -> Comparison:
    first = next(iter(entries.values()))[0]
    judges = _judges(wanted.judge, root)
    frame = _frame(first, checked)
    _refuse_another_frame(root, frame)
    asked = {
        "title": f"{', '.join(entries)} on {Path(checked.config.train).name}",
        "entries": {name: _described(stages) for name, stages in entries.items()},
        "stages": {name: len(stages) for name, stages in entries.items()},
        "seeds": list(range(wanted.seeds)),
        "frame": frame,
        "facts": _facts(first, checked, completions, wanted),
        "warnings": _beforehand(wanted, entries, completions),
        "tuned": {},
        "judge": None if wanted.judge is None else wanted.judge.model_dump(mode="json"),
    }
    if not (root / ASKED_FILE).exists():  # says what the folder is for before anything is measured in it
        _keep(root, asked)
    base = _Lazy(first)
    tuned: dict[str, Mapping[str, Any]] = {}
    untuned: dict[str, str] = {}
    if wanted.tune:
        from dpo.tune import tune

        for name, stages in entries.items():
            try:
                tuned[name] = tune(name, stages, checked, base.get, wanted.tune, root / "tuning" / name)
            except TrainingError as error:
                untuned[name] = redact_text(str(error))
        entries = {name: _with(stages, tuned.get(name, {})) for name, stages in entries.items()}
    planned = [
        Planned(name, seed, _placed(stages, seed, root, name), root / RUNS / f"{name}-seed{seed}")
        for seed in range(wanted.seeds)
        for name, stages in entries.items()
    ]
    _refuse_other_settings(planned)
    _keep(root, {**asked, "tuned": tuned})
    if not (root / START).is_dir():
        unfinished = root / f"{START}.part"  # renamed once it is whole
        unfinished.mkdir(exist_ok=True)
        measure_start(first, base.get(), checked).write(unfinished)
        unfinished.rename(root / START)
    for n, one in enumerate(planned, start=1):
        if _is_finished(one.folder, one.runs):
            log.info("%d of %d: %s, seed %d is finished: %s", n, len(planned), one.entry, one.seed, one.folder)
            continue
        log.info("%d of %d: %s, seed %d", n, len(planned), one.entry, one.seed)
        if one.entry in untuned:
            _fail(one, untuned[one.entry])
            continue
        _train(one, base.get(), checked)
    return _reported([root], root, judges)


def _keep(root: Path, asked: Mapping[str, Any]) -> None:
    atomic_write_text(root / ASKED_FILE, json.dumps(redact(asked), indent=2, ensure_ascii=False) + "\n")


def _refuse_entry(name: str, stages: Sequence[Run], first: Run) -> None:
    """Refuse an entry that cannot be set beside the first one.

    Raises:
        ConfigError: it trains no policy or the base itself, names a tracker that is not installed, or differs in data,
            base or evaluation.
    """
    if stages[-1].trains_reward:
        raise ConfigError(f"--objectives: {name} trains a reward model, expected a policy. Leave it out.")
    for run in stages:
        check_available(run.output.report_to)
        if run.model.lora is None:
            raise ConfigError(f"{name}: model.lora=null trains the base, which all entries share. Use model.lora.")
        ours, theirs = _framing(first), _framing(run)
        for key in ours:
            if ours[key] != theirs.get(key):
                raise ConfigError(
                    f"{name}: {key} is {theirs.get(key)!r}, and {ours[key]!r} in {first.name}, expected one dataset, "
                    f"base and evaluation for all. Give {key}= for all of them."
                )


def _framing(run: Run) -> dict[str, Any]:
    """Return the settings that all entries of a comparison share, by dotted key."""
    settings = flat(run.model_dump(mode="json", include={"data", "model", "evaluation"}))
    base = {f"model.{name}" for name in BASE_SETTINGS}
    return {
        key: value
        for key, value in settings.items()
        if (key.startswith(("data.", "evaluation.")) or key in base) and key != "evaluation.sample_steps"
    }


def _judges(config: JudgeConfig | None, folder: Path) -> list[Judge]:
    return [] if config is None else [ModelJudge(config.model, config, Verdicts(folder / VERDICTS_FILE))]


def read_judge(given: Any) -> JudgeConfig | None:
    """Return the judge that `judge.key=value` settings name, or None without any.

    Raises:
        ConfigError: a setting is missing, unknown or wrong.
    """
    if given is None:
        return None
    try:
        return JudgeConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError(explained(error, JudgeConfig, prefix="judge")) from error


@final
class _Lazy:
    """The base of all runs, loaded when the first one needs it: a finished comparison needs none."""

    def __init__(self, run: Run) -> None:
        self._run, self._base = run, None

    def get(self) -> Base:
        if self._base is None:
            self._base: Base | None = load_base(self._run.model)
        return self._base


def _train(one: Planned, base: Base, checked: Checked) -> None:
    """Carry out one training; what goes wrong is kept beside it, and the others go on."""
    try:
        execute(one.runs, one.entry, base=base, checked=checked)
        (one.folder / FAILED_FILE).unlink(missing_ok=True)
    except Exception as error:  # whatever it is, it must not cost the other runs their results
        log.debug("%s, seed %d", one.entry, one.seed, exc_info=True)
        _fail(one, redact_text(f"{type(error).__name__}: {error}"))


def _fail(one: Planned, message: str) -> None:
    log.error("%s, seed %d failed: %s", one.entry, one.seed, message)
    one.folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(one.folder / FAILED_FILE, message + "\n")


def rebuild(folders: Sequence[Path], output: Path, judge: JudgeConfig | None = None) -> Comparison:
    """Compare finished runs and write the report into `output`.

    Args:
        folders: one comparison's folder, or the folders of runs that `dpo train` left.
        output: may be the first of them.
        judge: a language model that compares the answers, beside the gold reward.

    Raises:
        ConfigError: a folder holds neither, or runs that cannot be set beside one another.
    """
    with only_process(output):
        if judge is None and len(folders) == 1 and (folders[0] / ASKED_FILE).exists():
            judge = read_judge(_asked(folders[0]).get("judge"))  # the one that was asked before
        return _reported(folders, output, _judges(judge, output))


def _asked(root: Path) -> dict[str, Any]:
    """Return what a comparison's folder was begun for.

    Raises:
        CheckpointError: its file is damaged.
    """
    file = root / ASKED_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        missing = {"title", "entries", "stages", "seeds", "frame", "facts", "warnings", "tuned"} - {*found}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: is damaged ({error}). Delete it and give the same command again.") from error
    if missing:
        raise CheckpointError(f"{file}: lacks {', '.join(sorted(missing))}. Delete it and give the same command again.")
    return found


def _reported(folders: Sequence[Path], output: Path, judges: Sequence[Judge]) -> Comparison:
    of_comparison = [folder for folder in folders if (folder / ASKED_FILE).exists()]
    if of_comparison and len(folders) > 1:
        raise ConfigError(f"{of_comparison[0]}: a comparison stands alone, got {len(folders)} folders. Name it alone.")
    asked, runs = _of_comparison(folders[0]) if of_comparison else _of_runs(folders)
    try:
        found = compare(asked, runs, judges)
    except DPOError as error:  # the judge's: what needs no judge is still said
        if not judges:
            raise
        log.error("the judge failed: %s", error)
        found = compare(asked, runs)
        told = f"Partial: the judge failed, and its win rates are missing: {redact_text(str(error))}"
        found = replace(found, partial=True, warnings=(told, *found.warnings))
    report.write(found, output)
    return found


def show_comparison(found: Comparison, folder: Path) -> None:
    """Print the verdict, the warnings and where the page lies."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("", title=Text(found.title))
    for measure in found.measures:
        table.add_column(measure.title, justify="right")
    for entry in (found.start, *found.entries):
        known = [entry.measures.get(measure.name) for measure in found.measures]
        table.add_row(Text(entry.name), *("" if one is None else _short(one) for one in known))
    console.print(table)
    for line in found.verdicts:
        console.print(Text(f"- {line}"))
    for line in found.warnings:
        console.print(Text(f"! {line}", style="yellow"))
    print(f"The page: {folder / report.PAGE_FILE}")


def _short(one: Estimate) -> str:
    """Fit a terminal; a number without other units behind it has no interval."""
    return f"{one.value:.2f} ±{one.half_width:.2f}" if one.half_width else f"{one.value:.2f}"


def _of_comparison(root: Path) -> tuple[Asked, list[Trained]]:
    settings = _asked(root)
    runs, failed = [], {}
    for name in settings["entries"]:
        for seed in settings["seeds"]:
            folder = root / RUNS / f"{name}-seed{seed}"
            stages = stage_folders(folder)
            if len(stages) == settings["stages"][name] and (stages[-1] / SUMMARY_FILE).exists():
                try:
                    runs.append(_trained(name, seed, folder, stages))
                except (DPOError, KeyError, TypeError) as error:  # one damaged folder must not cost the others
                    failed[name, seed] = f"cannot be read: {redact_text(str(error))}"
            elif (folder / FAILED_FILE).exists():
                failed[name, seed] = (folder / FAILED_FILE).read_text(encoding="utf-8").strip()
    asked = Asked(
        settings["title"],
        settings["entries"],
        tuple(settings["seeds"]),
        Achieved.read(root / START),
        settings["facts"],
        tuple(settings["warnings"]),
        failed,
        settings["tuned"],
    )
    return asked, runs


def _of_runs(folders: Sequence[Path]) -> tuple[Asked, list[Trained]]:
    """Make a comparison of runs that were trained one by one."""
    runs: list[Trained] = []
    frames: list[dict[str, Any]] = []
    known: dict[str, dict[str, Any]] = {}
    taken: set[tuple[str, int]] = set()
    for folder in folders:
        stages = stage_folders(folder)
        if not stages or not (stages[-1] / SUMMARY_FILE).exists():
            raise ConfigError(
                f"{folder}: holds neither a comparison ({ASKED_FILE}) nor a finished run ({SUMMARY_FILE}). Name "
                "folders that `dpo compare` or `dpo train` left."
            )
        last = read_result(stages[-1]).run
        if last.trains_reward:
            raise ConfigError(f"{folder}: its last stage trains a reward model, expected a policy. Leave it out.")
        frames.append(_framing(last))
        for key in (key for key in frames[0] if not key.startswith("data.")):
            if frames[0][key] != frames[-1].get(key):
                raise ConfigError(
                    f"{folder}: {key} is {frames[-1].get(key)!r}, and {frames[0][key]!r} in {folders[0]}, expected one "
                    "base and one evaluation. Leave one of them out."
                )
        settings = {key: value for key, value in last.decisive().items() if key != "loop.seed"}
        name = last.name
        while known.setdefault(name, settings) != settings or (name, last.loop.seed) in taken:
            name = f"{name}*"  # the same recipe with other settings, or trained twice
        taken.add((name, last.loop.seed))
        runs.append(_trained(name, last.loop.seed, folder, stages))
    warnings = ["These runs were trained one by one: nobody saw to equal budgets. See the cost."]
    of_data = {key: {repr(one.get(key)) for one in frames} for key in frames[0] if key.startswith("data.")}
    warnings += [f"The runs differ in {key}: {', '.join(sorted(one))}." for key, one in of_data.items() if len(one) > 1]
    return (
        Asked(
            f"{len(runs)} runs",
            {one.entry: f"from {one.folder}" for one in runs},
            tuple(sorted({one.seed for one in runs})),
            Achieved(),
            {"runs": ", ".join(one.folder for one in runs)},
            tuple(warnings),
        ),
        runs,
    )


def _trained(entry: str, seed: int, folder: Path, stages: Sequence[Path]) -> Trained:
    """Return a finished run as the comparison reads it."""
    results = [read_result(stage) for stage in stages]
    last = results[-1]
    seconds = sum(one.summary["seconds"] for one in results)
    settings = [
        flat(one.run.model_dump(mode="json", exclude={"output", "name"}), "" if one is last else f"{one.run.name}.")
        for one in results
    ]
    return Trained(
        entry=entry,
        seed=seed,
        folder=str(folder),
        achieved=last.achieved,
        cost=Cost(
            seconds=seconds,
            memory_peak_bytes=max(one.summary["memory_peak_bytes"] for one in results),
            steps=sum(one.summary["steps"] for one in results),
            completions=sum(one.summary["examples_seen"] * _completions(one.run) for one in results),
            tokens=sum(one.summary["tokens_seen"] for one in results),
            gpu_hours=seconds / 3600 if last.summary["device"] == "cuda" else None,
        ),
        rows=read(stages[-1] / METRICS_FILE),
        settings={key: value for one in settings for key, value in one.items()},
    )


def _names(objectives: Sequence[str]) -> tuple[str, ...]:
    """Return the entries' names.

    Raises:
        ConfigError: fewer than one, the same twice, or one that is neither a recipe, an objective nor a file.
    """
    found: list[str] = []
    for what in objectives:
        name = Path(what).stem if Path(what).suffix in (".yaml", ".yml") else what
        known = (*recipes.names(), *losses.names())
        if name == what and ":" not in what and what not in known:
            raise ConfigError(
                f"--objectives: {what!r} is neither a recipe, an objective nor a YAML file.{nearest(what, known)} "
                "`dpo objectives` lists them."
            )
        name = name.rpartition(":")[2]  # of package.module:Class
        if name in found:
            raise ConfigError(f"--objectives: got {name!r} twice, expected each once. Compare seeds with --seeds.")
        if not NAME.fullmatch(name) or name == START:
            raise ConfigError(
                f"--objectives: got {name!r}, expected a name that matches {NAME.pattern}, not {START!r}."
            )
        found.append(name)
    if not found:
        raise ConfigError("--objectives: got none, expected some, for instance --objectives dpo,ipo,kto.")
    return tuple(found)


@contextmanager
def _data(wanted: Wanted) -> Iterator[Mapping[str, Any]]:
    """Yield the overrides; where they name no data, those of the embedded task."""
    a_file = any(Path(one).suffix in (".yaml", ".yml") for one in wanted.objectives)
    if a_file or "train" in wanted.overrides.get("data", {}):
        yield wanted.overrides
        return
    folder = files("dpo.data") / "sentiment"
    with as_file(folder / "pairs.jsonl") as pairs, as_file(folder / "eval_prompts.txt") as prompts:
        places = {"data": {"train": str(pairs)}, "evaluation": {"prompts": str(prompts)}}
        yield merged(merged(SENTIMENT, places), wanted.overrides)


def _first(what: str, overrides: Mapping[str, Any]) -> Run:
    return _first_stages(what, overrides, embedded=False)[0]


def _first_stages(what: str, overrides: Mapping[str, Any], embedded: bool) -> tuple[Run, ...]:
    """Return an entry's stages of seed 0, before the budget.

    Raises:
        ConfigError: as `plan` and `read_run`.
    """
    if Path(what).suffix in (".yaml", ".yml"):
        return read_run(Path(what), overrides)
    recipe = what if what in recipes.names() else "dpo"
    own = {} if recipe == what else {"objective": {"name": what}}
    stages = plan(recipes.find(recipe), merged(own, overrides))
    if recipe != what:
        stages = tuple(one.override({"name": what.rpartition(":")[2]}) for one in stages)
    if not embedded:
        return stages
    return tuple(
        one
        if "learning_rate" in _given("optimiser", one, overrides)
        else one.override(
            {
                "optimiser": {
                    "learning_rate": SENTIMENT_RATES.get(
                        one.objective.name, SENTIMENT_RATE * one.optimiser.learning_rate
                    )
                }
            }
        )
        for one in stages
    )


def _given(room: str, run: Run, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the overrides say of a room of settings, for all runs or under the stage's own name."""
    return {**overrides.get(room, {}), **overrides.get(run.name, {}).get(room, {})}


def _one_pass(checked: Checked) -> int:
    """Return the completions of one pass over the training pairs, or over the judgements where there are no pairs."""
    pairs = sum(len(record.pairs()) for record in checked.train)
    return 2 * pairs or sum(len(record.judgements()) for record in checked.train) or len(checked.train)


def _completions(run: Run) -> int:
    """Return the completions of one example that a run learns from."""
    return {"pairs": 2, "comparisons": 2, "rankings": 2}.get(run.objective.build().view, 1)


def _budgeted(run: Run, completions: int, seconds: float | None, overrides: Mapping[str, Any]) -> Run:
    """Return the run with as many optimiser steps as the budget pays for, and samples on the way, unless overridden."""
    own = _given("loop", run, overrides)
    if seconds is not None:
        steps = own.get("max_steps", MANY_STEPS)
        return run.override({"loop": {"max_steps": steps, "num_train_epochs": ENDLESS, "max_seconds": seconds}})
    if "max_steps" not in own and "num_train_epochs" not in own:
        steps = max(1, round(completions / (_completions(run) * run.loop.batch)))
        run = run.override({"loop": {"max_steps": steps, "num_train_epochs": ENDLESS}})
    if run.evaluation.gold is not None and "sample_steps" not in overrides.get("evaluation", {}) and run.loop.max_steps:
        run = run.override({"evaluation": {"sample_steps": -(-run.loop.max_steps // POINTS)}})
    return run


def _placed(stages: Sequence[Run], seed: int, root: Path, name: str) -> tuple[Run, ...]:
    folder = str(root / RUNS / f"{name}-seed{seed}")
    group = stages[0].output.group or root.name
    return tuple(one.override({"loop": {"seed": seed}, "output": {"dir": folder, "group": group}}) for one in stages)


def _with(stages: Sequence[Run], settings: Mapping[str, Any]) -> tuple[Run, ...]:
    """Return the stages with the last one's settings changed, by dotted key."""
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        room, _, leaf = key.partition(".")
        changes = merged(changes, {room: {leaf: value}})
    return (*stages[:-1], stages[-1].override(changes)) if changes else tuple(stages)


def _is_finished(folder: Path, runs: Sequence[Run]) -> bool:
    stages = stage_folders(folder)
    return len(stages) == len(runs) and all((one / SUMMARY_FILE).exists() for one in stages)


def _refuse_other_settings(planned: Sequence[Planned]) -> None:
    """Refuse a folder whose finished runs had other settings; an unfinished one is looked at when it goes on.

    Raises:
        ConfigError: names the first setting that differs.
    """
    for one in planned:
        if not _is_finished(one.folder, one.runs):
            continue
        for run, folder in zip(one.runs, stage_folders(one.folder), strict=True):
            there = read_result(folder).run
            resolved = _resolved_later(run)
            ours, theirs = (flat(one.model_dump(mode="json", exclude={"output"})) for one in (run, there))
            for key in sorted({*ours, *theirs} - resolved, key=lambda key: (key.startswith("evaluation."), key)):
                if ours.get(key) != theirs.get(key):
                    raise ConfigError(
                        f"{folder}: holds a finished run with {key}={theirs.get(key)!r}, got {ours.get(key)!r}. Give "
                        "another --output, or these settings."
                    )


def _resolved_later(run: Run) -> set[str]:
    """Return the keys that a finished run holds otherwise: places of earlier stages' adapters, and of data, which is
    compared by its content; and how often it is saved.
    """
    settings = flat(run.model_dump(mode="json"))
    waiting = {key for key, value in settings.items() if value == PREVIOUS or STAGE in str(value)}
    return waiting | {"data.train", "data.eval", "evaluation.prompts", "loop.save_steps", "loop.save_total_limit"}


def _refuse_another_frame(root: Path, frame: Mapping[str, str]) -> None:
    """Refuse to go on with other data, another base or another evaluation than the folder was begun with.

    Raises:
        ConfigError: names what differs.
    """
    if not (root / ASKED_FILE).exists():
        return
    there = _asked(root)["frame"]
    for part in frame:
        if frame[part] != there.get(part):
            raise ConfigError(f"{root}: was begun with other {part}. Put it back as it was, or give another --output.")


def _frame(run: Run, checked: Checked) -> dict[str, str]:
    """Return hashes of what everything in a comparison's folder was measured with, by what it is."""
    asked = run.evaluation
    named = (asked.prompts, asked.choices, asked.sycophancy, asked.text)
    contents = [file.read_bytes().hex() for one in named if one is not None and (file := Path(one)).is_file()]
    rows = hashlib.sha256()
    for record in chain(checked.train, checked.eval):
        rows.update(repr((record.prompt, record.completions, record.scores, record.agreement)).encode())
    framing = {key: value for key, value in _framing(run).items() if key not in _resolved_later(run)}
    groups = {
        "data": [len(checked.train), rows.hexdigest(), {k: v for k, v in framing.items() if k.startswith("data.")}],
        "evaluation prompts or settings": [contents, {k: v for k, v in framing.items() if k.startswith("evaluation.")}],
        "base model": [run.model.adapter, {k: v for k, v in framing.items() if k.startswith("model.")}],
    }
    return {name: hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest() for name, one in groups.items()}


def _digest(entries: Mapping[str, Sequence[Run]], wanted: Wanted) -> str:
    parts = [name + run.digest() for name, stages in entries.items() for run in stages]
    return hashlib.sha256("".join([*parts, f"{wanted.seeds} {wanted.tune}"]).encode()).hexdigest()[:8]


def _described(stages: Sequence[Run]) -> str:
    return ", then ".join(
        f"{run.objective.name} ({', '.join(f'{k}={v}' for k, v in (run.objective.model_extra or {}).items())})"
        for run in stages
    )


def _beforehand(wanted: Wanted, entries: Mapping[str, Sequence[Run]], completions: int) -> list[str]:
    """Return what is known before anything is trained."""
    found = []
    if not wanted.tune:
        found.append(
            "Untuned: every entry used its recipe's settings. An objective that does worse here may only need another "
            "learning rate or beta; --tune N tries N settings of each under an equal budget."
        )
    batches = {name: stages[-1].loop.batch * _completions(stages[-1]) for name, stages in entries.items()}
    if len(set(batches.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in batches.items())
        found.append(f"Completions of one optimiser step differ: {told}. The budget counts completions, not steps.")
    if wanted.seconds is None:
        for name, stages in entries.items():
            for run in stages:
                learned = (run.loop.max_steps or 0) * run.loop.batch * _completions(run)
                if run.loop.max_steps is not None and abs(learned - completions) > 0.05 * completions:
                    found.append(
                        f"{name}: stage {run.name} learns from {learned} completions, not {completions}, as its steps "
                        f"are whole and take {run.loop.batch * _completions(run)} each."
                    )
    for name, stages in entries.items():
        if len(stages) > 1:
            found.append(f"{name} has {len(stages)} stages, each with the whole budget. The cost counts them all.")
        if stages[-1].model.adapter is not None and stages[-1].model.reference == "start":
            found.append(f"{name} ends with a stage whose KL and margins are measured from the adapter it starts from.")
    given = "max_steps" in wanted.overrides.get("loop", {}) or "num_train_epochs" in wanted.overrides.get("loop", {})
    if given:
        found.append("The length of the training was given in steps or epochs: completions may differ. See the cost.")
    return found


def _facts(first: Run, checked: Checked, completions: int, wanted: Wanted) -> dict[str, str]:
    data = checked.config
    held = f"{data.eval}" if data.eval else f"{data.eval_share:.0%} of the prompts, split with seed {data.seed}"
    lora, said = first.model.lora, first.evaluation
    return {
        "model": first.model.name,
        "trained weights": "all" if lora is None else f"LoRA, rank {lora.r}",
        "data": f"{Path(data.train).name}: {len(checked.train)} training rows, {len(checked.eval)} held out ({held})",
        "budget": f"{completions} completions a stage, each time one is learned from"
        if wanted.seconds is None
        else f"{wanted.seconds:g} seconds of training a stage",
        "seeds": ", ".join(map(str, range(wanted.seeds))),
        "evaluation": f"{said.samples_per_prompt} answers to each of at most {said.max_prompts} prompts at temperature "
        f"1, at most {said.max_new_tokens} tokens",
        "gold reward": said.gold or "none",
        "tuning": f"{wanted.tune} settings an entry" if wanted.tune else "none",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("dpo-lab", "torch", "transformers", "peft")),
        "machine": f"{platform.system()}, {platform.machine()}",
    }
