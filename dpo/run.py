"""One run: immutable, validated before anything is loaded, written out resolved, and carried out.

A recipe is a tuple of runs (its stages) that share one base and one dataset; `execute` carries them out in order.
"""

import hashlib
import json
import logging
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from dpo import checkpoint
from dpo.data import Checked, DataConfig, Prepared, Renderer, check, prepare
from dpo.errors import ConfigError, DPOError, nearest
from dpo.evaluation.measures import Estimate, pair_accuracy
from dpo.evaluation.samples import Spoken, find_reward, speak
from dpo.losses import Objective, find
from dpo.metrics import redact, redact_text, sinks
from dpo.model.base import Base, LanguageModel, ModelConfig, check_adapter, load_base, load_tokenizer
from dpo.model.reference import ReferenceLogps
from dpo.train import Loop, Optimiser, Outcome, only_process, peak_memory, score, train
from dpo.types import JudgementLogps, LossInput, LossOutput, PairLogps

log = logging.getLogger("dpo")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RUN_FILE, SUMMARY_FILE, ADAPTER = "run.yaml", "summary.json", "adapter"


class ObjectiveConfig(BaseModel):
    """The objective's name, and its hyper-parameters beside it; both are checked against the class at once."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "dpo"
    """A name that `dpo.losses.find` knows ("dpo", "ipo", ...), or package.module:Class of your own."""

    @model_validator(mode="before")
    @classmethod
    def _resolved(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given, Mapping):
            return given
        built = build_objective(str(given.get("name", "dpo")), {k: v for k, v in given.items() if k != "name"})
        return {"name": given.get("name", "dpo"), **asdict(built)}  # pyright: ignore[reportArgumentType]

    def build(self) -> Objective:
        """Return the objective."""
        return build_objective(self.name, self.model_extra or {})


def build_objective(name: str, parameters: Mapping[str, Any]) -> Objective:
    """Return an objective with the given hyper-parameters.

    Raises:
        ConfigError: an unknown objective or hyper-parameter, or a value outside its range.
    """
    kind = find(name)
    known = [f.name for f in fields(kind)]  # pyright: ignore[reportArgumentType]
    for key in parameters:
        if key not in known:
            raise ConfigError(
                f"objective.{key}: {kind.__name__} has no such hyper-parameter, it has {', '.join(known) or 'none'}."
                f"{nearest(key, known)}"
            )
    try:
        hints = typing.get_type_hints(kind)
        values = {key: TypeAdapter(hints[key]).validate_python(value) for key, value in parameters.items()}
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"objective {name!r}: {first['msg']}, got {first['input']!r}") from error
    except ValueError as error:
        raise ConfigError(f"objective {name!r}: {error}") from error


class Evaluation(BaseModel):
    """What is measured on the policy's own samples after training; held-out examples are always scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gold: str | None = None
    """A known true reward, package.module:function over (prompt, completion); null for none."""
    prompts: str | None = None
    """A file of prompts to sample for (null: those of the held-out examples)."""
    max_prompts: Annotated[int, Field(ge=0)] = 32
    """Sample for so many prompts at most; 0 measures nothing on samples."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Completions sampled for each prompt."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest sample, in tokens."""
    seed: int = 0
    """Of the sampling."""

    @field_validator("gold")
    @classmethod
    def _found(cls, name: str | None) -> str | None:
        if name is not None:
            find_reward(name)
        return name


class Output(BaseModel):
    """Where results go and where they are shown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dir: str | None = None
    """Folder of the run (null: runs/NAME-HASH, where the hash is of the settings: equal settings, equal folder)."""
    report_to: tuple[Literal["wandb", "none"], ...] = ()
    """Sinks beside metrics.jsonl. wandb works offline where there is no key."""
    project: str = "dpo-lab"
    """wandb project."""
    group: str | None = None
    """wandb group: the comparison this run belongs to (null: the name of the data)."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        if isinstance(given, str):
            return tuple(part.strip() for part in given.split(",") if part.strip())
        return given


class Run(BaseModel):
    """One training run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "run"
    """Letters, digits, dot, dash and underscore; the stage's name where a recipe has several."""
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    model: ModelConfig = ModelConfig()
    optimiser: Optimiser = Optimiser()
    loop: Loop = Loop()
    evaluation: Evaluation = Evaluation()
    output: Output = Output()

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"name must match {NAME.pattern}, got {name!r}")
        return name

    @classmethod
    def of(cls, settings: Mapping[str, Any], place: str) -> Self:
        """Build a run from plain settings.

        Raises:
            ConfigError: names the place, the key, what was got and what is valid.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise ConfigError(f"{place}: {explained(error)}") from error

    def override(self, changes: Mapping[str, Any], place: str = "command line") -> Self:
        """Return this run with nested changes applied; a new objective starts from its own defaults.

        Raises:
            ConfigError: as `of`.
        """
        settings = self.model_dump(mode="json")
        objective = changes.get("objective")
        if isinstance(objective, str) or (isinstance(objective, Mapping) and "name" in objective):
            settings["objective"] = {}
        if isinstance(objective, str):
            changes = {**changes, "objective": {"name": objective}}
        return self.of(_merged(settings, changes), place)

    def digest(self) -> str:
        """Return a hash of everything that can change the result; where results go is no part of it."""
        settings = self.model_dump(mode="json", exclude={"output", "evaluation"})
        settings["loop"].pop("save_steps")
        settings["loop"].pop("save_total_limit")
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved settings; `dpo train` takes them as they are."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


Recipe = Callable[[DataConfig], tuple[Run, ...]]
"""A recipe chooses; it computes nothing. It maps the dataset to the runs to carry out, in order."""


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` and `--key=value` (the form a wandb sweep passes) into nested settings; values are YAML.

    Raises:
        ConfigError: an argument of another form.
    """
    found: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals or not key or not all(key.split(".")):
            raise ConfigError(
                f"{argument!r}: expected key=value or --key=value, with dots between levels, for instance "
                "optimiser.learning_rate=1e-4."
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{argument!r}: the value is not YAML ({error}). Put quotes around it.") from error
        found = _merged(found, _nested(key.split("."), value))
    return found


def plan(recipe: Recipe, overrides: Mapping[str, Any], place: str = "command line") -> tuple[Run, ...]:
    """Return a recipe's runs with overrides applied: to every stage, or under a stage's name to that one.

    Raises:
        ConfigError: as `Run.of`, and where data.train is missing.
    """
    given = dict(overrides)
    data = given.pop("data", {})
    if not isinstance(data, Mapping) or "train" not in data:
        raise ConfigError(f"{place}: data.train is missing. Name the preferences to train on: data.train=FILE.")
    try:
        runs = recipe(DataConfig.model_validate(data))
    except ValidationError as error:
        raise ConfigError(f"{place}: {explained(error, prefix='data')}") from error
    stages = {run.name: given.pop(run.name, {}) for run in runs} if len(runs) > 1 else {}
    return tuple(run.override(_merged(given, stages.get(run.name, {})), place) for run in runs)


def read_run(path: Path, overrides: Mapping[str, Any]) -> tuple[Run, ...]:
    """Read a run from a YAML file, such as the run.yaml that every run writes.

    Raises:
        ConfigError: the file is absent, is not YAML, or holds no valid run.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path}: got {type(settings).__name__}, expected a mapping with data, objective, ...")
    run = Run.of(settings, str(path))
    return (run.override(overrides) if overrides else run,)


@dataclass(frozen=True)
class Result:
    """What one finished run achieved."""

    run: Run
    folder: Path
    summary: Mapping[str, Any]
    """The content of summary.json."""
    spoken: Spoken | None
    """The policy's own samples."""


def execute(runs: Sequence[Run], name: str, base: Base | None = None, checked: Checked | None = None) -> list[Result]:
    """Carry out a recipe's runs in order, on one base; each goes on where an interrupted one stopped.

    Everything that can be wrong with settings and data is found before a model is loaded.

    Args:
        runs: the stages.
        name: of the recipe, for the folder.
        base: an already loaded base to use and give back as it was.
        checked: the already checked data of all stages.

    Raises:
        DPOError: whatever is wrong, with place and fix.
    """
    folders = _folders(runs, name)
    for run in runs:
        run.objective.build()
    checked = checked or check(runs[0].data)
    for line in checked.report.lines():
        log.info("%s", line)
    tokenizer = base.tokenizer if base is not None else load_tokenizer(runs[0].model)
    results: list[Result] = []
    for run, folder in zip(runs, folders, strict=True):
        if run.model.adapter is not None and run.model.adapter == PREVIOUS:
            run = run.override({"model": {"adapter": str(folders[len(results) - 1] / ADAPTER)}})
        objective = run.objective.build()
        prepared = prepare(checked, tokenizer, objective.view, mismatched=objective.needs_mismatched)
        with only_process(folder):
            _claim(run, folder, prepared)
            base = base or load_base(run.model)
            results.append(_carry_out(run, folder, objective, prepared, base))
    return results


PREVIOUS = "previous"
"""As model.adapter: the adapter of the stage before."""


def _carry_out(run: Run, folder: Path, objective: Objective, prepared: Prepared, base: Base) -> Result:
    model = LanguageModel.start(base, run.model, run.loop.seed)
    log.info("%s: %d examples, reference is %s", run.name, len(prepared.train), model.reference_is)
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
        objective=objective,
        train_examples=prepared.train,
        eval_examples=prepared.eval,
        optimiser=run.optimiser,
        loop=run.loop,
        folder=folder,
        identity=_identity(run, prepared),
        sinks=shown,
    )
    (folder / ADAPTER).mkdir(exist_ok=True)
    model.save(folder / ADAPTER)
    spoken = _speak(run, model, prepared)
    summary = _summarise(run, model, objective, prepared, outcome, spoken)
    checkpoint.atomic_write_text(folder / SUMMARY_FILE, json.dumps(redact(summary), indent=2) + "\n")
    for sink in shown:
        sink.finish({key: one["value"] for key, one in summary["measures"].items()})
    if run.model.lora is not None:
        model.release()
    return Result(run, folder, summary, spoken)


def _identity(run: Run, prepared: Prepared) -> dict[str, str]:
    return {"settings": run.digest(), "data": prepared.fingerprint}


def _claim(run: Run, folder: Path, prepared: Prepared) -> None:
    """Write the resolved run into its folder, or refuse a folder that holds another one.

    Raises:
        ConfigError: names the settings that differ.
    """
    file = folder / RUN_FILE
    if file.exists():
        (there,) = read_run(file, {})
        if there.digest() != run.digest():
            ours, theirs = _flat(run.model_dump(mode="json")), _flat(there.model_dump(mode="json"))
            different = [
                f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} here)"
                for key in sorted({*ours, *theirs})
                if ours.get(key) != theirs.get(key) and not key.startswith(("output.", "evaluation."))
            ]
            raise ConfigError(
                f"{folder}: holds a run with other settings: {'; '.join(different)}. Give another folder with "
                "output.dir=, or these settings."
            )
    checkpoint.atomic_write_text(file, run.to_yaml())
    report = {"train": prepared.report.to_dict(), "fingerprint": prepared.fingerprint}
    if prepared.eval_report is not None:
        report["eval"] = prepared.eval_report.to_dict()
    checkpoint.atomic_write_text(folder / "data.json", json.dumps(report, indent=2) + "\n")


def _folders(runs: Sequence[Run], name: str) -> list[Path]:
    """Return the stages' folders. A recipe that is finished there is trained again in a fresh folder beside it."""
    digest = hashlib.sha256("".join(run.digest() for run in runs).encode()).hexdigest()[:8]
    root = Path(runs[0].output.dir or Path("runs") / f"{name}-{digest}")
    if root.exists() and not root.is_dir():
        raise ConfigError(f"output.dir={str(root)!r}: is a file, expected a folder. Give another output.dir.")
    tried, attempt = root, 1
    while all((tried / stage / SUMMARY_FILE).exists() for stage in _stage_names(runs)):
        attempt += 1
        tried = root.with_name(f"{root.name}-{attempt}")
    if attempt > 1:
        log.info("%s is finished; training again in %s", root, tried)
    return [tried / stage for stage in _stage_names(runs)]


def _stage_names(runs: Sequence[Run]) -> list[str]:
    return [""] if len(runs) == 1 else [f"{i}-{run.name}" for i, run in enumerate(runs, start=1)]


def _speak(run: Run, model: LanguageModel, prepared: Prepared) -> Spoken | None:
    prompts = evaluation_prompts(run, model, prepared)
    if not prompts:
        return None
    return speak(
        model,
        prompts,
        role="policy",
        gold=None if run.evaluation.gold is None else find_reward(run.evaluation.gold),
        per_prompt=run.evaluation.samples_per_prompt,
        max_new_tokens=run.evaluation.max_new_tokens,
        seed=run.evaluation.seed,
    )


def evaluation_prompts(run: Run, model: LanguageModel, prepared: Prepared) -> list[tuple[str, tuple[int, ...]]]:
    """Return the prompts to sample for, as the text of the last turn and token ids."""
    renderer = Renderer(model.tokenizer, run.data.max_length, run.data.overlong)
    if run.evaluation.prompts is not None:
        source = DataConfig.model_validate({"train": run.evaluation.prompts, "eval_share": 0})
        found = {record.prompt: renderer.prompt(record.prompt) for record in check(source).train}
    else:
        found = {example.prompt_messages: example.prompt for example in prepared.eval}
    return [(messages[-1].content, ids) for messages, ids in list(found.items())[: run.evaluation.max_prompts]]


def _summarise(
    run: Run,
    model: LanguageModel,
    objective: Objective,
    prepared: Prepared,
    outcome: Outcome,
    spoken: Spoken | None,
) -> dict[str, Any]:
    return {
        "objective": run.objective.model_dump(mode="json"),
        "reference": model.reference_is if objective.needs_reference else "none",
        "model": run.model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "steps": outcome.progress.step,
        "skipped_steps": outcome.progress.skipped,
        "examples_seen": outcome.progress.examples_seen,
        "tokens_seen": outcome.progress.tokens_seen,
        "seconds": round(outcome.progress.seconds, 2),
        "memory_peak_bytes": peak_memory(model.device),
        "data_fingerprint": prepared.fingerprint,
        "measures": _measures(objective, outcome.evaluated, spoken),
    }


def held_out(record: LossInput | None, out: LossOutput | None) -> dict[str, Estimate]:
    """Return the measures on held-out examples that have an interval: pair accuracy by the objective's own reward."""
    if out is None:
        return {}
    if isinstance(record, PairLogps):
        chosen, rejected = out.rewards.double().unbind(1)
        return {"eval/reward/accuracy": pair_accuracy(chosen.tolist(), rejected.tolist())}
    if isinstance(record, JudgementLogps) and "reward/accuracy" in out.metrics:
        value = out.metrics["reward/accuracy"].item()
        return {"eval/reward/accuracy": _auc(value, int(record.desirable.sum()), int((~record.desirable).sum()))}
    return {}


def _auc(value: float, desirable: int, undesirable: int) -> Estimate:
    """Return the AUC with the interval of Hanley and McNeil (1982)."""
    first, second = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (desirable - 1) * (first - value**2) + (undesirable - 1) * (second - value**2)
    half = 1.96 * (max(variance, 0.0) / (desirable * undesirable)) ** 0.5
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), desirable + undesirable)


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    return {path[0]: _nested(path[1:], value) if len(path) > 1 else value}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key of a settings class."""
    found: list[str] = []
    for name, info in model.model_fields.items():
        found.append(f"{prefix}{name}")
        kinds = typing.get_args(info.annotation) if isinstance(info.annotation, types.UnionType) else (info.annotation,)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += _keys(kind, f"{prefix}{name}.")
    return found


def explained(error: ValidationError, settings: type[BaseModel] = Run, prefix: str = "") -> str:
    """Say for each fault which key it is, what was got and what is valid."""
    known = _keys(settings)
    lines = []
    for fault in error.errors():
        key = ".".join(([prefix] if prefix else []) + [str(part) for part in fault["loc"]])
        if fault["type"] == "extra_forbidden":
            last = key.rpartition(".")[2]
            same = [one for one in known if one.rpartition(".")[2] == last]
            hint = f" Did you mean {same[0]!r}?" if same else nearest(key, known) or nearest(last, known)
            lines.append(f"unknown key {key!r}.{hint}")
        elif fault["type"] == "missing":
            lines.append(f"{key} is missing")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}" + ("" if "got" in message else f", got {fault['input']!r}"))
    return "; ".join(lines)


def evaluate_run(folder: Path, overrides: Mapping[str, Any]) -> Result:
    """Load the adapter of a finished run and measure it again; writes evaluation.json beside it.

    Raises:
        ConfigError: the folder holds no finished run, or an override changes more than evaluation and model.
    """
    if not (folder / SUMMARY_FILE).is_file():
        raise ConfigError(f"{folder}: holds no finished run ({RUN_FILE}, {SUMMARY_FILE}). Name the folder of one.")
    if other := sorted(set(overrides) - {"evaluation", "model", "loop"}):
        raise ConfigError(f"{other[0]}: evaluating cannot change it; evaluation.* and model.* can be given.")
    (run,) = read_run(folder / RUN_FILE, overrides)
    if run.model.lora is None:
        raise ConfigError(f"{folder}: full weights; evaluating a run needs model.lora.")
    objective = run.objective.build()
    checked = check(run.data)
    base = load_base(run.model)
    prepared = prepare(checked, base.tokenizer, objective.view, mismatched=objective.needs_mismatched)
    model = LanguageModel.start(base, run.model, run.loop.seed)
    model.restore(check_adapter(str(folder / ADAPTER)))
    reference, batch = ReferenceLogps(model), run.loop.per_device_eval_batch_size
    record = score(model, reference, objective, prepared.eval, batch) if prepared.eval else None
    spoken = _speak(run, model, prepared)
    trained = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    measured = _measures(objective, record, spoken)
    summary = {**trained, "data_fingerprint": prepared.fingerprint, "measures": measured}
    checkpoint.atomic_write_text(folder / "evaluation.json", json.dumps(redact(summary), indent=2) + "\n")
    return Result(run, folder, summary, spoken)


def _measures(objective: Objective, record: LossInput | None, spoken: Spoken | None) -> dict[str, dict[str, float]]:
    estimates = held_out(record, None if record is None else objective(record))
    estimates |= {} if spoken is None else spoken.estimates()
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> None:
    """Carry out a recipe with the overrides of the command line: what a recipe file does when run as a script."""
    name = recipe.__name__
    with speaking():
        runs = plan(recipe, read_overrides(sys.argv[1:] if arguments is None else arguments))
        for result in execute(runs, name):
            show(result)


@contextmanager
def speaking(debug: bool = False) -> Iterator[None]:
    """Let the log speak plainly, and end a failure with one message and its exit code instead of a traceback.

    Raises:
        SystemExit: with the error's exit code, or 130 when interrupted.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    quiet_libraries()
    try:
        yield
    except DPOError as error:
        if debug:
            raise
        print(f"error: {redact_text(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt as error:
        print("stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from error


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

    table = Table("measure", "value", "95 % interval", "n", title=f"{result.run.name} ({result.run.objective.name})")
    for name, one in result.summary["measures"].items():
        table.add_row(name, f"{one['value']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}", str(one["n"]))
    console = Console()
    console.print(table)
    print(
        f"{result.summary['steps']} steps, {result.summary['seconds']:.0f} s, peak memory "
        f"{result.summary['memory_peak_bytes'] / 2**30:.2f} GiB. Adapter, settings and metrics: {result.folder}"
    )
