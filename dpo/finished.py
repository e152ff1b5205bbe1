"""Finished runs as a comparison reads them: from its own folder, or from folders that `dpo train` left one by one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.entries import completions_of, framing
from dpo.errors import CheckpointError, ConfigError, DPOError
from dpo.evaluation.achieved import Achieved
from dpo.evaluation.comparison import Asked
from dpo.evaluation.records import START, Cost, Trained
from dpo.metrics import METRICS_FILE, read
from dpo.redact import redact_text
from dpo.run import SUMMARY_FILE, read_result, stage_folders
from dpo.settings import flat

ASKED_FILE, RUNS, FAILED_FILE = "comparison.json", "runs", "failed.txt"


def read_asked(root: Path) -> dict[str, Any]:
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


def of_comparison(root: Path) -> tuple[Asked, list[Trained]]:
    """Return what a comparison's folder was begun for, and those of its runs that are finished.

    Raises:
        CheckpointError: its file, or what was measured at the start, is damaged. A damaged run counts as failed.
    """
    settings = read_asked(root)
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


def of_runs(folders: Sequence[Path]) -> tuple[Asked, list[Trained]]:
    """Make a comparison of runs that were trained one by one.

    Raises:
        ConfigError: a folder holds no finished run of a policy, or base and evaluation differ.
    """
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
        frames.append(framing(last))
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
            completions=sum(one.summary["examples_seen"] * completions_of(one.run) for one in results),
            tokens=sum(one.summary["tokens_seen"] for one in results),
            gpu_hours=seconds / 3600 if last.summary["device"] == "cuda" else None,
        ),
        rows=read(stages[-1] / METRICS_FILE),
        settings={key: value for one in settings for key, value in one.items()},
    )
