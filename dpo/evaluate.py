"""Models measured without training them: a finished run again, or any adapter or model from elsewhere."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo import checkpoint
from dpo.data import check, held_out_pairs
from dpo.errors import ConfigError
from dpo.evaluation.achieved import Achieved
from dpo.measure import (
    REWARD,
    achieved_by,
    all_measures,
    check_reward_model,
    frozen,
    group_report,
    proxy_of,
    proxy_roles,
    reward_report,
)
from dpo.model.base import LanguageModel, Role, ScalarRole, check_adapter, load_base
from dpo.model.reference import ReferenceLogps
from dpo.redact import redact
from dpo.run import ADAPTER, RUN_FILE, SUMMARY_FILE, Result, only_process, prepared_for, read_result
from dpo.settings import Run, merged, read_run
from dpo.train import division, peak_memory, score

log = logging.getLogger("dpo")

EVALUATION = "evaluation"
"""Folder of what was measured, within that of the run."""


def evaluate(what: str, overrides: Mapping[str, Any]) -> Result:
    """Measure a finished run's folder, a LoRA adapter's folder, or a model (a folder or a hub id).

    Raises:
        DPOError: it is none of these, settings are wrong, or the data has nothing to measure on.
    """
    folder = Path(what)
    if (folder / SUMMARY_FILE).is_file():
        return evaluate_run(folder, overrides)
    if (folder / RUN_FILE).is_file():
        raise ConfigError(f"{what}: this run is not finished. Let it end first: dpo train {folder / RUN_FILE}.")
    if folder.is_dir() and not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise ConfigError(
            f"{what}: holds no finished run ({RUN_FILE}, {SUMMARY_FILE}), no adapter (adapter_config.json) and no "
            "model (config.json). Name the folder of one."
        )
    return evaluate_model(what, overrides)


def evaluate_run(folder: Path, overrides: Mapping[str, Any]) -> Result:
    """Load the adapter of a finished run and measure it again; writes the folder evaluation/ beside it.

    Raises:
        ConfigError: the folder holds no finished run, or an override changes more than evaluation and model.
    """
    trained = dict(read_result(folder).summary)
    if other := sorted(set(overrides) - {"evaluation", "model", "loop"}):
        raise ConfigError(f"{other[0]}: evaluating cannot change it; evaluation.*, model.* and loop.* can be given.")
    (run,) = read_run(folder / RUN_FILE, overrides)
    check_reward_model(run)
    roles = _still_there(run)
    objective = run.objective.build()
    checked = check(run.data)
    base = load_base(run.model)
    prepared = prepared_for(run, objective, checked, base.tokenizer)
    scalars = [ScalarRole(REWARD, None, True)] if run.trains_reward else frozen(roles)
    model = LanguageModel.start(base, run.model, run.loop.seed, scalars=scalars, policy=not run.trains_reward)
    model.restore(folder / ADAPTER, model.trained[0])
    limits = division(run.loop, run.loop.per_device_eval_batch_size, base, objective)
    mean, record = trained["mean_log_ratio"] if objective.needs_mean_log_ratio else 0.0, None
    if prepared.eval and run.rollout is None:
        record, _ = score(model, ReferenceLogps(model), objective, prepared.eval, limits, mean)
    achieved = Achieved()
    if not run.trains_reward:
        proxy = proxy_of(run, model) if roles else None
        achieved = achieved_by(run, model, checked, held_out_pairs(checked, base.tokenizer), proxy=proxy)
    if trained["data_fingerprint"] != prepared.fingerprint:
        log.warning("%s has changed since the run was trained: its numbers are on other examples", run.data.train)
    measured = all_measures(objective, record, achieved)
    trained |= reward_report(record) | group_report(achieved)
    summary = {**trained, "data_fingerprint": prepared.fingerprint, "measures": measured}
    _write(folder / EVALUATION, summary, achieved)
    return Result(run, folder, summary, achieved)


def _still_there(run: Run) -> dict[Role, str]:
    """Return the reward models that score the answers; none, and a warning, where the run's own are gone."""
    roles = proxy_roles(run)
    gone = [folder for folder in roles.values() if not Path(folder).is_dir()]
    if gone:
        log.warning("%s: the reward model that the run was trained on is gone, and does not score its answers", gone[0])
    return {} if gone else roles


def evaluate_model(what: str, overrides: Mapping[str, Any]) -> Result:
    """Measure an adapter or a model that was trained elsewhere, on all rows of data.train, and its own samples.

    An adapter is compared with its base. A whole model has nothing to be compared with: its own answers and the probes
    are measured, its KL is 0, and pairs say nothing.

    Raises:
        ConfigError: data.train is missing, or an override is unknown.
        ModelError: the adapter or the model cannot be loaded.
    """
    if "train" not in overrides.get("data", {}):
        raise ConfigError(f"{what}: data.train is missing. Name the preferences to measure on: data.train=FILE.")
    adapter = check_adapter(what) if (Path(what) / "adapter_config.json").is_file() else None
    name = what
    if adapter is not None:
        name = str(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    model_settings = {"name": name} if adapter is None else {"name": name, "adapter": what, "reference": "base"}
    given = merged({"name": "evaluation", "model": model_settings, "data": {"eval_share": 0}}, overrides)
    run = Run.of(given, place="command line")
    check_reward_model(run)
    folder = Path(run.output.dir or Path("runs") / f"evaluation-{run.digest()[:8]}")
    checked = check(run.data)
    checked = replace(checked, eval=checked.eval or checked.train)  # nothing of it was trained on here
    base = load_base(run.model)
    pairs = held_out_pairs(checked, base.tokenizer) if adapter else ()
    model = LanguageModel.start(base, run.model, run.loop.seed, scalars=frozen(proxy_roles(run)))
    role: Role = "policy" if adapter else "reference"
    achieved = achieved_by(run, model, checked, pairs, role, proxy_of(run, model))
    summary = {
        "model": name,
        "adapter": None if adapter is None else what,
        "reference": model.reference_is,
        "device": model.device.type,
        "steps": 0,
        "seconds": 0.0,
        "memory_peak_bytes": peak_memory(model.device),
        "measures": {key: vars(one) for key, one in achieved.estimates().items()},
        **group_report(achieved),
    }
    with only_process(folder):
        _write(folder, summary, achieved)
    return Result(run, folder, summary, achieved)


def _write(folder: Path, summary: Mapping[str, Any], achieved: Achieved) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    achieved.write(folder)
    checkpoint.atomic_write_text(folder / "evaluation.json", json.dumps(redact(summary), indent=2) + "\n")
