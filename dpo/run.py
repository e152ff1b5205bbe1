"""A recipe carried out: its runs (stages) in order, on one base and one dataset, each in a folder of its own.

A run's folder holds run.yaml (the resolved settings), data.json (what became of the rows), metrics.jsonl and
performance.jsonl, checkpoints/, adapter/ and, once it is finished, samples.jsonl (its own answers), pairs.jsonl (how
far it moved on each held-out pair), probes.json (where probes were asked for), README.md (the card) and summary.json.
"""

import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, final

from filelock import FileLock, Timeout

from dpo import checkpoint
from dpo.card import CARD_FILE, card, versions
from dpo.cautions import cautions
from dpo.data import Checked, Example, Prepared, check, held_out_pairs, prepare
from dpo.errors import CheckpointError, ConfigError, DataError, DPOError, ModelError, TrainingError
from dpo.evaluation.achieved import Achieved
from dpo.losses import MovesReference, Objective
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
    reward_roles,
    rows_of,
    speak_for,
)
from dpo.metrics import CUSTOM
from dpo.mirror import ADAPTER, Mirror
from dpo.model.base import (
    Base,
    LanguageModel,
    ModelConfig,
    ScalarRole,
    check_adapter,
    check_scalar,
    choose_device,
    load_base,
    load_tokenizer,
)
from dpo.model.halving import Halving
from dpo.model.memory import Roles, must_checkpoint
from dpo.model.reference import ReferenceLogps
from dpo.model.rollout import sample
from dpo.model.scalar import LearnedReward, normalise
from dpo.redact import redact, redact_text
from dpo.rewards import Function, ModelTerm, Reward, build
from dpo.settings import PREVIOUS, STAGE, Recipe, Run, check_stages, plan, read_overrides, read_run
from dpo.sinks import SAMPLE_COLUMNS, SAMPLES, check_available, figures, sinks
from dpo.sources import Judges
from dpo.stop import Stopped, terminable
from dpo.train import OnPolicy, Outcome, division, peak_memory, reset_peak_memory, train

log = logging.getLogger("dpo")

RUN_FILE, DATA_FILE, SUMMARY_FILE = "run.yaml", "data.json", "summary.json"

REFERENCE_SAMPLES = 64
"""Completions of the reference that a reward model's scores are normalised on."""


@final
@dataclass(frozen=True)
class Result:
    """What one finished run achieved."""

    run: Run
    folder: Path
    summary: Mapping[str, Any]
    """The content of summary.json."""
    achieved: Achieved
    """What was measured on the policy; nothing on a reward model."""

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        from dpo.evaluation.report.notebook import result_view

        return result_view(f"{self.run.name} ({self.run.objective.name})", self.summary, self.folder)


@final
@dataclass(frozen=True)
class _Stage:
    """One run that is ready to be carried out."""

    run: Run
    folder: Path
    objective: Objective
    checked: Checked
    prepared: Prepared
    demonstrations: Sequence[Example] = ()
    """For an objective that learns from them beside sampled completions."""
    pairs: Sequence[Example] = ()
    """Held-out pairs, whatever the objective's own view."""
    mirror: Mirror | None = None
    """Keeps the second copy."""

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must agree in to be gone on from."""
        return {"settings": self.run.digest(), "data": self.prepared.fingerprint}


def execute(
    runs: Sequence[Run],
    name: str,
    base: Base | None = None,
    checked: Checked | None = None,
) -> list[Result]:
    """Carry out a recipe's runs in order, on one base; each goes on where an interrupted one stopped.

    Whatever can be wrong with settings and data is found before anything is written and before a model is loaded. A
    stage that is finished is not trained again; a recipe that is finished is, in a fresh folder beside the first.

    Args:
        runs: the stages.
        name: of the recipe, for the folder.
        base: an already loaded base to use and give back as it was.
        checked: the already checked data of all stages.

    Raises:
        DPOError: whatever is wrong, with place and fix.
    """
    check_stages(runs, name)
    if base is not None and any(run.model.lora is None for run in runs):
        raise ConfigError(f"{name}: model.lora=null trains the base itself, which is shared here. Use model.lora.")
    choose_device(runs[0].model.device)
    root, folders = _folders(runs, name)
    if checked is None:
        checked = check(runs[0].data)
        for report in (*checked.sources, checked.report) if len(checked.sources) > 1 else (checked.report,):
            for line in report.lines():
                log.info("%s", line)
    _refuse_evaluation_sets(checked)
    for run in runs:
        check_available(run.output.report_to)
        run.evaluation.probes.check()
    tokenizer = base.tokenizer if base is not None else load_tokenizer(runs[0].model)
    stages: list[_Stage] = []
    for run, folder in zip(runs, folders, strict=True):
        resolved = _resolve(run, folder, stages)
        objective = run.objective.build()
        prepared = prepared_for(run, objective, checked, tokenizer)
        _refuse_soft_labels(objective, prepared)
        shown = prepare(checked, tokenizer, "demonstrations").train if objective.needs_demonstrations else ()
        pairs = held_out_pairs(checked, tokenizer)
        stages.append(_Stage(resolved, folder, objective, checked, prepared, shown, pairs, _mirror(run, folder)))
    with only_process(root):
        for stage in stages:
            _refuse_another_run(stage, stage.folder)
            if stage.mirror is not None:
                _refuse_another_run(stage, stage.mirror.place)
        results: list[Result] = []
        for stage in stages:
            if stage.mirror is not None and not (stage.folder / RUN_FILE).exists():
                stage.mirror.restore()
            if (stage.folder / SUMMARY_FILE).exists():
                log.info("%s is finished: %s", stage.run.name, stage.folder)
                results.append(read_result(stage.folder))
                continue
            base = base or load_base(stage.run.model)  # may fail, so before anything is written
            _refuse_damaged(base)
            _claim(stage)
            results.append(_carry_out(stage, base))
    return results


def _resolve(run: Run, folder: Path, earlier: Sequence[_Stage]) -> Run:
    """Return the run with folders in the place of the stages that it starts from or is judged by.

    Raises:
        ModelError: a folder that is named holds nothing to start from, or a reward model of another base.
    """
    by_name = {stage.run.name: str(stage.folder / ADAPTER) for stage in earlier}

    def place(name: str | None, scalar: bool) -> str | None:
        if name == PREVIOUS:
            return str(earlier[-1].folder / ADAPTER)
        if name is None or name.startswith(STAGE):
            return None if name is None else by_name[name.removeprefix(STAGE)]
        check_scalar(name, run.model.name) if scalar else check_adapter(name)
        return name

    check_reward_model(run)
    changes: dict[str, Any] = {
        "model": {"adapter": place(run.model.adapter, scalar=False)},
        "output": {"dir": str(folder)},
    }
    if run.rollout is not None:
        sampling: dict[str, Any] = {"value": place(run.rollout.value, scalar=True)}
        for key, terms in (("rewards", run.rollout.rewards), ("watch", run.rollout.watch)):
            sampling[key] = [
                one.model_copy(update={"folders": tuple(place(name, scalar=True) for name in one.folders)}).model_dump(
                    mode="json"
                )
                if isinstance(one, ModelTerm)
                else one.model_dump(mode="json")
                for one in terms
            ]
        changes["rollout"] = sampling
    return run.override(changes)


def prepared_for(run: Run, objective: Objective, checked: Checked, tokenizer: Any) -> Prepared:
    """Return the examples in the objective's view, or the prompts that are sampled for."""
    if run.rollout is None:
        assert objective.view != "rollouts", "Run refuses it without a rollout"
        return prepare(checked, tokenizer, objective.view, mismatched=objective.needs_mismatched)
    if run.rollout.prompts is not None:
        source = {"train": run.rollout.prompts, "eval_share": 0}
        checked = check(checked.config.model_copy(update={**source, "eval": None}))
    return prepare(checked, tokenizer, "prompts")


def _refuse_evaluation_sets(checked: Checked) -> None:
    """Refuse to train on what models are measured by.

    Raises:
        DataError: names the set.
    """
    for report in checked.sources:
        if report.evaluation_only:
            raise DataError(
                f"{report.source}: got {report.format!r} rows to train on, expected another set: "
                f"{report.evaluation_only}. Give it as data.eval, and train on other data."
            )


def _refuse_soft_labels(objective: Objective, prepared: Prepared) -> None:
    """Refuse labels that the objective could not honour.

    Raises:
        DataError: names the first row with such a label.
    """
    if not objective.needs_certain_labels:
        return
    for example in chain(prepared.train, prepared.eval):
        if example.preference != 1:
            raise DataError(
                f"{example.source}: agreement {example.preference:g}, expected 1: {type(objective).__name__} takes "
                "certain labels alone. Leave the column out, or choose an objective that honours it, such as dpo."
            )


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold `folder`, made where it is absent, for this process.

    Raises:
        ConfigError: it cannot be made or written, or a link in it leads out of it.
        TrainingError: another process trains there. A killed one holds nothing.
    """
    lock = FileLock(folder / ".lock", blocking=False)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_links_out(folder)
        lock.acquire()
        Path(lock.lock_file).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    except Timeout as error:
        holder = Path(lock.lock_file).read_text(encoding="utf-8", errors="replace") or "another process"
        raise TrainingError(
            f"{folder}: {holder} is training there. Wait for it, or give another folder with output.dir=."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"output.dir: {folder} cannot be written ({error.strerror}), expected a folder of yours. Give another "
            "output.dir."
        ) from error
    try:
        yield
    finally:
        lock.release()
        if [file.name for file in folder.iterdir()] == [".lock"]:  # the run failed before it wrote anything
            (folder / ".lock").unlink()
            with suppress(OSError):  # another process has begun to write there
                for one in made:
                    one.rmdir()


def _refuse_links_out(folder: Path) -> None:
    root = folder.resolve()
    for entry in folder.rglob("*"):
        if entry.is_symlink() and not entry.resolve().is_relative_to(root):
            raise ConfigError(
                f"{entry}: is a link to {entry.resolve()}, expected everything within {folder}: what a run writes "
                "stays in its own folder. Remove the link, or give another output.dir=."
            )


def _carry_out(stage: _Stage, base: Base) -> Result:
    run, folder, prepared = stage.run, stage.folder, stage.prepared
    reset_peak_memory(base.device)
    model = _start(stage, base)
    if run.rollout is None:
        for caution in cautions(stage.objective, prepared.train, run.loop.batch):
            log.warning("%s", caution)
    held = f"reference is {model.reference_is}" if "policy" in model.trained else "a reward model"
    proxy = None if run.trains_reward else proxy_of(run, model)

    def listen() -> dict[str, float]:
        spoken = speak_for(run, model, stage.checked, proxy=proxy)
        return {} if spoken is None else {name: one.value for name, one in spoken.estimates().items()}

    log.info("%s: %d examples, %s", run.name, len(prepared.train), held)
    try:
        shown = sinks(
            run.output.report_to,
            folder=folder,
            project=run.output.project,
            name=f"{run.name}-seed{run.loop.seed}",
            group=run.output.group or f"{Path(run.data.train).name}-{prepared.fingerprint[:8]}",
            tags=[run.objective.name, run.model.name, f"seed{run.loop.seed}"],
            config={**run.model_dump(mode="json"), "data_fingerprint": prepared.fingerprint},
        )
        outcome = train(
            model=model,
            reference=ReferenceLogps(model),
            objective=stage.objective,
            train_examples=prepared.train,
            eval_examples=prepared.eval if run.rollout is None else [],
            optimiser=run.optimiser,
            loop=run.loop,
            folder=folder,
            identity=stage.identity,
            sinks=shown,
            on_policy=_on_policy(stage, model),
            listen=None if run.evaluation.sample_steps is None or run.trains_reward else listen,
            listen_steps=run.evaluation.sample_steps,
            mirror=stage.mirror,
        )
        scale = _normalised(stage, model) if run.trains_reward else None
        (folder / ADAPTER).mkdir(exist_ok=True)
        model.save(folder / ADAPTER, model.trained[0])
        achieved = Achieved() if run.trains_reward else achieved_by(run, model, stage.checked, stage.pairs, proxy=proxy)
        summary = {**_summarise(stage, model, outcome, achieved), **({} if scale is None else scale)}
    finally:
        if run.model.lora is not None:
            model.release()
    achieved.write(folder)
    checkpoint.atomic_write_text(folder / CARD_FILE, card(run, folder, redact(summary)))
    checkpoint.atomic_write_text(folder / SUMMARY_FILE, json.dumps(redact(summary), indent=2) + "\n")
    for sink in shown:
        if achieved.spoken is not None:
            sink.table(SAMPLES, SAMPLE_COLUMNS, rows_of(achieved.spoken))
        sink.finish(figures(summary["measures"]))
    if stage.mirror is not None:
        stage.mirror.update()
    if outcome.unsaved is not None:
        raise CheckpointError(
            f"{folder}: the training is finished and its adapter and results are written, but not one checkpoint could "
            f"be on the way: {outcome.unsaved}"
        )
    return Result(run, folder, summary, achieved)


def stage_folders(folder: Path) -> list[Path]:
    """Return the folders of a recipe's stages that were begun, in order: the folder itself where there is one stage."""
    if (folder / RUN_FILE).exists():
        return [folder]
    stages = [one for one in folder.glob("*-*") if (one / RUN_FILE).exists() and one.name.split("-")[0].isdigit()]
    return sorted(stages, key=lambda one: int(one.name.split("-")[0]))


def read_result(folder: Path) -> Result:
    """Return what a finished run left in its folder.

    Raises:
        ConfigError: the folder holds no finished run.
        CheckpointError: a file in it is damaged.
    """
    if not (folder / SUMMARY_FILE).is_file():
        raise ConfigError(f"{folder}: holds no finished run ({RUN_FILE}, {SUMMARY_FILE}). Name the folder of one.")
    (run,) = read_run(folder / RUN_FILE, {})
    return Result(run, folder, _read_json(folder / SUMMARY_FILE), Achieved.read(folder))


def read_last_stage(folder: Path) -> Result:
    """Return what the last stage of a finished recipe left: the run itself where there is one stage.

    Raises:
        ConfigError: there is no run, or its last stage is not finished.
        CheckpointError: a file in it is damaged.
    """
    stages = stage_folders(folder)
    if stages and not (stages[-1] / SUMMARY_FILE).is_file():
        unfinished = stages[-1] / RUN_FILE
        raise ConfigError(f"{stages[-1]}: this run is not finished. Let it end first: dpo train {unfinished}.")
    return read_result(stages[-1] if stages else folder)


def _start(stage: _Stage, base: Base) -> LanguageModel:
    """Put the roles that the stage needs on the base."""
    run, config = stage.run, _within_memory(stage, base)
    moving = isinstance(stage.objective, MovesReference)
    if run.trains_reward:
        return LanguageModel.start(base, config, run.loop.seed, scalars=[ScalarRole(REWARD, None, True)], policy=False)
    scalars = frozen(reward_roles(run))
    if stage.objective.needs_values and run.rollout is not None:
        scalars.append(ScalarRole("value", run.rollout.value, True))
    return LanguageModel.start(base, config, run.loop.seed, moving, scalars)


def _on_policy(stage: _Stage, model: LanguageModel) -> OnPolicy | None:
    """Return how the stage's completions are sampled and judged."""
    config = stage.run.rollout
    if config is None:
        return None
    names = iter(reward_roles(stage.run))
    learned: list[LearnedReward] = []

    def role_of(term: ModelTerm) -> Reward:
        roles = [next(names) for _ in term.folders]
        learned.append(LearnedReward(model, roles, term.combine, term.variance_weight))
        return learned[-1]

    reward = build(config.rewards, role_of)
    watched = {f"{CUSTOM}reward_{one.kind}": build((one,), role_of) for one in config.watch}
    ensembles = [one for one in learned if one.members > 1]
    gold = None if stage.run.evaluation.gold is None else Function(name=stage.run.evaluation.gold)
    judges = Judges(reward, gold, watched, lambda: [spread for one in ensembles for spread in one.disagreement])
    return OnPolicy(config, judges, stage.demonstrations)


def _normalised(stage: _Stage, model: LanguageModel) -> dict[str, Any]:
    """Give the reward model's scores mean 0 and deviation 1 on samples of the reference; return what they were."""
    prompts: dict[tuple[int, ...], None] = {}
    for example in stage.prepared.train:
        prompts[example.prompt] = None
        if len(prompts) == REFERENCE_SAMPLES:
            break
    evaluation = stage.run.evaluation
    samples = sample(
        model,
        list(prompts),
        role="reference",
        max_new_tokens=evaluation.max_new_tokens,
        seed=evaluation.seed,
        progress="reference samples",
        backend=Halving(),
    )
    before, deviation = normalise(model, model.trained[0], [(one.prompt, one.completion) for one in samples])
    return {"normalised_on_reference": {"samples": len(samples), "mean": before, "deviation": deviation}}


def _within_memory(stage: _Stage, base: Base) -> ModelConfig:
    """Return the model's settings with checkpointing decided: on where the largest micro-batch needs it."""
    run, config = stage.run, stage.run.model
    if config.gradient_checkpointing != "auto":
        return config
    limits = division(run.loop, run.loop.per_device_train_batch_size, base, stage.objective)
    if run.rollout is None:
        tokens = limits.largest(stage.prepared.train)
    else:  # not sampled yet: the longest there can be
        completions = tuple((0,) * run.rollout.max_new_tokens for _ in range(limits.scored or 1))
        longest = [replace(one, completions=completions) for one in stage.prepared.train]
        tokens = limits.largest(longest)
    if stage.demonstrations:  # one is scored beside each completion
        tokens += limits.largest(stage.demonstrations)
    roles = Roles(
        moving=isinstance(stage.objective, MovesReference),
        rewards=len(reward_roles(run)),
        value=stage.objective.needs_values,
        reward=run.trains_reward,
    )
    on = not config.activation_offload and must_checkpoint(base, config, run.optimiser.name, tokens, roles)
    if on:
        log.info("gradient checkpointing is on: %d tokens at once would not fit in memory without it", tokens)
    return config.model_copy(update={"gradient_checkpointing": on})


def _mirror(run: Run, folder: Path) -> Mirror | None:
    """Return what keeps the second copy of a run, or None where none is asked for.

    Raises:
        ConfigError: as `Mirror`.
    """
    if run.output.mirror is None:
        return None
    return Mirror(folder, Path(run.output.mirror), run.loop.save_total_limit, last=(RUN_FILE, SUMMARY_FILE))


def _refuse_damaged(base: Base) -> None:
    """Refuse a base whose weights are no numbers: nothing that is trained on it could be one.

    Raises:
        ModelError: names the first such tensor.
    """
    for name, tensor in base.network.named_parameters():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(
                f"model.name={base.name!r}: its weight {name} holds values that are not finite. Copy the model again, "
                "or give a wider model.dtype."
            )


def _refuse_another_run(stage: _Stage, folder: Path) -> None:
    """Refuse a folder that holds a run with other settings or other data; nothing is written.

    Raises:
        ConfigError: lists the settings that differ, with both values.
        CheckpointError: the content of the data differs.
    """
    if not (folder / RUN_FILE).exists():
        return
    (there,) = read_run(folder / RUN_FILE, {})
    ours, theirs = stage.run.decisive(), there.decisive()
    if different := [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} here)"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]:
        raise ConfigError(
            f"{folder}: holds a run with other settings: {'; '.join(different)}. Give another folder with "
            "output.dir=, or these settings."
        )
    file = folder / DATA_FILE
    if file.exists() and _read_json(file)["fingerprint"] != stage.prepared.fingerprint:
        raise CheckpointError(
            f"{folder}: holds a run on other data: {stage.run.data.train} has changed since it was started. Put "
            "the data back as it was, or give another folder with output.dir=."
        )


def _claim(stage: _Stage) -> None:
    """Write settings and the account of the data into the stage's folder."""
    stage.folder.mkdir(exist_ok=True)
    report = {"train": stage.prepared.report.to_dict(), "fingerprint": stage.prepared.fingerprint}
    if stage.prepared.eval_report is not None:
        report["eval"] = stage.prepared.eval_report.to_dict()
    checkpoint.atomic_write_text(stage.folder / DATA_FILE, json.dumps(report, indent=2) + "\n")
    checkpoint.atomic_write_text(stage.folder / RUN_FILE, stage.run.to_yaml())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: is damaged ({error}). Put back a copy, or move its folder away.") from error


def _folders(runs: Sequence[Run], name: str) -> tuple[Path, list[Path]]:
    """Return the recipe's folder and its stages'; where the recipe is finished there, a fresh folder beside it."""
    digest = hashlib.sha256("".join(run.digest() for run in runs).encode()).hexdigest()[:8]
    root = Path(runs[0].output.dir or Path("runs") / f"{name}-{digest}")
    if root.exists() and not root.is_dir():
        raise ConfigError(f"output.dir: {root} is a file, expected a folder. Give another output.dir.")
    tried, attempt = root, 1
    while all((tried / stage / SUMMARY_FILE).exists() for stage in _stage_names(runs)):
        attempt += 1
        tried = root.with_name(f"{root.name}-{attempt}")
    if attempt > 1:
        log.info("%s is finished; training again in %s", root, tried)
    return tried, [tried / stage for stage in _stage_names(runs)]


def _stage_names(runs: Sequence[Run]) -> list[str]:
    return [""] if len(runs) == 1 else [f"{i}-{run.name}" for i, run in enumerate(runs, start=1)]


def measure_start(run: Run, base: Base, checked: Checked) -> Achieved:
    """Measure the reference as the run's policy will be measured after its training; it has not moved on any pair."""
    given = run.evaluation.reward_model is not None
    scalars = frozen(proxy_roles(run)) if given else []  # a run's own reward model may not be trained yet
    model = LanguageModel.start(base, run.model, run.loop.seed, scalars=scalars)
    try:
        proxy = proxy_of(run, model) if given else None
        return achieved_by(run, model, checked, pairs=(), role="reference", proxy=proxy)
    finally:
        model.release()


def _summarise(stage: _Stage, model: LanguageModel, outcome: Outcome, achieved: Achieved) -> dict[str, Any]:
    run, objective = stage.run, stage.objective
    return {
        "objective": run.objective.model_dump(mode="json"),
        "reference": model.reference_is if objective.needs_reference else "none",
        "model": run.model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "steps": outcome.progress.step,
        **({"stopped_early": "rollout.kl_budget"} if outcome.stopped_early else {}),
        "skipped_steps": outcome.progress.skipped,
        "examples_seen": outcome.progress.examples_seen,
        "tokens_seen": outcome.progress.tokens_seen,
        **({"mean_log_ratio": outcome.progress.mean_log_ratio} if objective.needs_mean_log_ratio else {}),
        "seconds": round(outcome.progress.seconds, 2),
        "memory_peak_bytes": peak_memory(model.device),
        "data_fingerprint": stage.prepared.fingerprint,
        "versions": versions(),
        "measures": all_measures(objective, outcome.evaluated, achieved),
        **reward_report(outcome.evaluated),
        **group_report(achieved),
    }


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> None:
    """Carry out a recipe with the overrides of the command line: what a recipe file does when run as a script."""
    name, given = recipe.__name__, sys.argv[1:] if arguments is None else arguments
    if "--help" in given:
        print(f"{recipe.__doc__}\n\nExample: python recipes/{name}.py data.train=prefs.jsonl loop.max_steps=100")
        return
    with speaking():
        runs = plan(recipe, read_overrides(given))
        for result in execute(runs, name):
            show(result)


@contextmanager
def speaking(debug: bool = False) -> Iterator[None]:
    """Let the log speak plainly, and end a failure with one message and its exit code instead of a traceback.

    Modules of the current folder can be named from here on (objective=my_module:Class); installed ones come first.

    Raises:
        SystemExit: with the error's exit code; with 130 when interrupted, 143 when terminated.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    quiet_libraries()
    before = list(sys.path)
    try:
        sys.path.append(str(Path.cwd()))
        with terminable():
            yield
    except (DPOError, OSError) as error:
        if debug:
            raise
        print(f"error: {redact_text(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code if isinstance(error, DPOError) else 1) from error
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(stopped.exit_code) from stopped
    except KeyboardInterrupt as error:
        print("stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from error
    finally:
        sys.path[:] = before


def quiet_libraries() -> None:
    """Turn off the progress bars and hints of the libraries below: this program says what it does itself."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch).*")


def show(result: Result) -> None:
    """Print what a run achieved and where it lies."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    title = f"{result.run.name} ({result.run.objective.name})"
    apart = {f"{title}, group {name}": own for name, own in result.summary.get("groups", {}).items()}
    for heading, measures in {title: result.summary["measures"], **apart}.items():
        table = Table("measure", "value", "95 % interval", "n", title=Text(heading))
        for name, one in measures.items():
            table.add_row(name, f"{one['value']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}", str(one["n"]))
        console.print(table)
    print(
        f"{result.summary['steps']} steps, {result.summary['seconds']:.0f} s, peak memory "
        f"{result.summary['memory_peak_bytes'] / 2**30:.2f} GiB. Adapter, settings and metrics: {result.folder}"
    )
