"""Several objectives, one start, one frozen split, one budget, several seeds, one report.

A comparison's folder holds comparison.json (what was asked), start/ (what the model achieves before training),
runs/NAME-seedN (a run's folder each, as `dpo train` leaves it), tuning/, verdicts.jsonl (of a judge that is a model)
and, in the end, report.html, results.json, results.csv and differences.csv.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from dpo.checkpoint import atomic_write_text
from dpo.data import Checked
from dpo.entries import Entries, Wanted, framing, planned
from dpo.errors import ConfigError, DPOError, TrainingError
from dpo.estimates import Estimate
from dpo.evaluation import report
from dpo.evaluation.comparison import compare
from dpo.evaluation.judges import Judge, JudgeConfig, ModelJudge, Verdicts
from dpo.evaluation.records import START, Comparison
from dpo.finished import ASKED_FILE, FAILED_FILE, RUNS, of_comparison, of_runs, read_asked
from dpo.machine import versions
from dpo.model.base import Base, load_base
from dpo.model.scalar import fingerprint
from dpo.redact import redact, redact_text
from dpo.run import SUMMARY_FILE, execute, measure_start, only_process, read_result, stage_folders
from dpo.settings import PREVIOUS, SAVING, STAGE, Run, explained, flat, merged

log = logging.getLogger("dpo")

VERDICTS_FILE = "verdicts.jsonl"


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
    with planned(wanted) as entries:
        root = output or Path("runs") / f"compare-{_digest(entries, wanted)}"
        with only_process(root):
            return _carry_out(wanted, entries, root), root


def _carry_out(wanted: Wanted, entries: Entries, root: Path) -> Comparison:
    judges = _judges(wanted.judge, root)
    asked = _ask(wanted, entries)
    _refuse_another_frame(root, asked["frame"])
    if not (root / ASKED_FILE).exists():  # says what the folder is for before anything is measured in it
        _keep(root, asked)
    base = _Lazy(entries.first)
    tuned, untuned = _tune(wanted, entries, base, root)
    trainings = [
        Planned(name, seed, _placed(stages, seed, root, name), root / RUNS / f"{name}-seed{seed}")
        for seed in range(wanted.seeds)
        for name, stages in ((name, _with(stages, tuned.get(name, {}))) for name, stages in entries.stages.items())
    ]
    _refuse_other_settings(trainings)
    _keep(root, {**asked, "tuned": tuned})
    _measure_start(entries, base, root)
    for n, one in enumerate(trainings, start=1):
        if _is_finished(one.folder, one.runs):
            log.info("%d of %d: %s, seed %d is finished: %s", n, len(trainings), one.entry, one.seed, one.folder)
            continue
        log.info("%d of %d: %s, seed %d", n, len(trainings), one.entry, one.seed)
        if one.entry in untuned:
            _fail(one, untuned[one.entry])
            continue
        _train(one, base.get(), entries.checked)
    return _reported([root], root, judges)


def _ask(wanted: Wanted, entries: Entries) -> dict[str, Any]:
    """Return what the comparison's folder is for, as its file holds it."""
    return {
        "title": f"{', '.join(entries.stages)} on {Path(entries.checked.config.train).name}",
        "entries": {name: _described(stages) for name, stages in entries.stages.items()},
        "stages": {name: len(stages) for name, stages in entries.stages.items()},
        "seeds": list(range(wanted.seeds)),
        "frame": _frame(entries.first, entries.checked),
        "facts": _facts(wanted, entries),
        "warnings": entries.warnings,
        "tuned": {},
        "judge": None if wanted.judge is None else wanted.judge.model_dump(mode="json"),
    }


def _tune(
    wanted: Wanted, entries: Entries, base: "_Lazy", root: Path
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Return the settings that tuning chose for each entry, and why it chose none."""
    tuned: dict[str, Mapping[str, Any]] = {}
    untuned: dict[str, str] = {}
    if wanted.tune:
        from dpo.tune import tune

        for name, stages in entries.stages.items():
            try:
                tuned[name] = tune(name, stages, entries.checked, base.get, wanted.tune, root / "tuning" / name)
            except TrainingError as error:
                untuned[name] = redact_text(str(error))
    return tuned, untuned


def _measure_start(entries: Entries, base: "_Lazy", root: Path) -> None:
    if (root / START).is_dir():
        return
    unfinished = root / f"{START}.part"  # renamed once it is whole
    unfinished.mkdir(exist_ok=True)
    measure_start(entries.first, base.get(), entries.checked).write(unfinished)
    unfinished.rename(root / START)


def _keep(root: Path, asked: Mapping[str, Any]) -> None:
    atomic_write_text(root / ASKED_FILE, json.dumps(redact(asked), indent=2, ensure_ascii=False) + "\n")


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
            judge = read_judge(read_asked(folders[0]).get("judge"))  # the one that was asked before
        return _reported(folders, output, _judges(judge, output))


def _reported(folders: Sequence[Path], output: Path, judges: Sequence[Judge]) -> Comparison:
    alone = [folder for folder in folders if (folder / ASKED_FILE).exists()]
    if alone and len(folders) > 1:
        raise ConfigError(f"{alone[0]}: a comparison stands alone, got {len(folders)} folders. Name it alone.")
    asked, runs = of_comparison(folders[0]) if alone else of_runs(folders)
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


def _refuse_another_frame(root: Path, frame: Mapping[str, str]) -> None:
    """Refuse to go on with other data, another base or another evaluation than the folder was begun with.

    Raises:
        ConfigError: names what differs.
    """
    if not (root / ASKED_FILE).exists():
        return
    there = read_asked(root)["frame"]
    for part in frame:
        if frame[part] != there.get(part):
            raise ConfigError(f"{root}: was begun with other {part}. Put it back as it was, or give another --output.")


def _frame(run: Run, checked: Checked) -> dict[str, str]:
    """Return hashes of what everything in a comparison's folder was measured with, by what it is."""
    asked = run.evaluation
    named = (asked.prompts, asked.choices, asked.sycophancy, asked.text, *asked.harness)
    contents = [file.read_bytes().hex() for one in named if one is not None and (file := Path(one)).is_file()]
    contents += [] if asked.reward_model is None else [fingerprint(Path(asked.reward_model))]
    rows = hashlib.sha256()
    for record in chain(checked.train, checked.eval):
        rows.update(repr((record.prompt, record.completions, record.scores, record.agreement)).encode())
    shared = {key: value for key, value in framing(run).items() if key not in _resolved_later(run)}
    groups = {
        "data": [len(checked.train), rows.hexdigest(), {k: v for k, v in shared.items() if k.startswith("data.")}],
        "evaluation prompts or settings": [contents, {k: v for k, v in shared.items() if k.startswith("evaluation.")}],
        "base model": [run.model.adapter, {k: v for k, v in shared.items() if k.startswith("model.")}],
    }
    return {name: hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest() for name, one in groups.items()}


def _digest(entries: Entries, wanted: Wanted) -> str:
    parts = [name + run.digest() for name, stages in entries.stages.items() for run in stages]
    return hashlib.sha256("".join([*parts, f"{wanted.seeds} {wanted.tune}"]).encode()).hexdigest()[:8]


def _resolved_later(run: Run) -> set[str]:
    """Return the keys that a finished run holds otherwise: places of earlier stages' adapters, and of data, which is
    compared by its content; and how often it is saved.
    """
    settings = flat(run.model_dump(mode="json"))
    waiting = {key for key, value in settings.items() if value == PREVIOUS or STAGE in str(value)}
    by_content = {"data.train", "data.eval", "evaluation.prompts", "evaluation.reward_model"}
    return waiting | by_content | {*SAVING}


def _described(stages: Sequence[Run]) -> str:
    return ", then ".join(
        f"{run.objective.name} ({', '.join(f'{k}={v}' for k, v in (run.objective.model_extra or {}).items())})"
        for run in stages
    )


def _facts(wanted: Wanted, entries: Entries) -> dict[str, str]:
    first, checked = entries.first, entries.checked
    data = checked.config
    held = f"{data.eval}" if data.eval else f"{data.eval_share:.0%} of the prompts, split with seed {data.seed}"
    lora, said = first.model.lora, first.evaluation
    return {
        "model": first.model.name,
        "trained weights": "all" if lora is None else f"LoRA, rank {lora.r}",
        "data": f"{Path(data.train).name}: {len(checked.train)} training rows, {len(checked.eval)} held out ({held})",
        "budget": f"{entries.completions} completions a stage, each time one is learned from"
        if wanted.seconds is None
        else f"{wanted.seconds:g} seconds of training a stage",
        "seeds": ", ".join(map(str, range(wanted.seeds))),
        "evaluation": f"{said.samples_per_prompt} answers to each of at most {said.max_prompts} prompts at temperature "
        f"1, at most {said.max_new_tokens} tokens",
        "gold reward": said.gold or "none",
        **({"of one entry alone": own} if (own := _own(wanted, entries)) else {}),
        "tuning": f"{wanted.tune} settings an entry" if wanted.tune else "none",
        "versions": versions(),
        "machine": f"{platform.system()}, {platform.machine()}",
    }


def _own(wanted: Wanted, entries: Entries) -> str:
    """Return the settings that were given to one entry alone: the reader judges whether that is fair."""
    given = {name: flat(wanted.overrides[name]) for name in entries.stages if name in wanted.overrides}
    return "; ".join(f"{name}: {', '.join(f'{k}={v}' for k, v in own.items())}" for name, own in given.items())
