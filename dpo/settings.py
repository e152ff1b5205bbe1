"""A run's settings: immutable, validated before anything is loaded, read from and written to YAML.

YAML is read by the rules of version 1.2: `1e-5` is a number, `no` and `2024-01-01` are text.
"""

import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field as DataclassField
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self, final

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from dpo import losses
from dpo.data import DataConfig
from dpo.errors import ConfigError, nearest
from dpo.evaluation.probes import Probes
from dpo.losses import Objective, Part, RankingObjective, RolloutObjective
from dpo.losses.objective import Number
from dpo.model.base import ModelConfig
from dpo.redact import holds_secret
from dpo.rewards import ModelTerm, find_reward
from dpo.sinks import Tracker
from dpo.sources import ON_POLICY, RolloutConfig
from dpo.train import Loop, Optimiser

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

PREVIOUS = "previous"
"""As model.adapter, or among the folders of rollout: the adapter of the stage before. (A folder of that name is
./previous.)"""

STAGE = "stage:"
"""Likewise, before a stage's name: the adapter of that earlier stage."""

LONGEST = 2**20
"""Most characters of a run file: written by hand or by a run, none comes near."""

SAVING = ("loop.save_steps", "loop.save_minutes", "loop.save_total_limit")
"""How often a run is saved: no bit of its results depends on it."""

BASE_SETTINGS = ("name", "revision", "dtype", "quantization", "attn_implementation", "layout", "device")
"""What the one base of all stages is loaded by."""


@final
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
        name = given.get("name", "dpo")
        return {"name": name, **_written(build_objective(str(name), {k: v for k, v in given.items() if k != "name"}))}

    def build(self) -> Objective:
        """Return the objective."""
        return build_objective(self.name, self.model_extra or {})


def build_objective(name: str, parameters: Mapping[str, Any], place: str = "objective") -> Objective:
    """Return an objective with the given hyper-parameters; `place` is the key under which they are written.

    Raises:
        ConfigError: an unknown objective or hyper-parameter, or a value outside its range.
    """
    kind = losses.find(name)
    known = [f.name for f in _hyper_parameters(kind)]
    for key in parameters:
        if key not in known:
            raise ConfigError(
                f"{place}.{key}: {kind.__name__} has no such hyper-parameter, it has {', '.join(known) or 'none'}."
                f"{nearest(str(key), known)}"
            )
    try:
        hints = typing.get_type_hints(kind)
        return kind(**{key: _value(hints[key], value, f"{place}.{key}") for key, value in parameters.items()})
    except (ValueError, TypeError) as error:  # TypeError: one that is required is missing
        raise ConfigError(f"{place} {name!r}: {error}") from error


def _hyper_parameters(kind: type[Objective]) -> tuple[DataclassField[Any], ...]:
    return tuple(f for f in fields(kind) if f.init)  # pyright: ignore[reportArgumentType]  (each is a dataclass)


def _value(hint: Any, given: Any, place: str) -> Any:
    """Return a hyper-parameter of the annotated type; a weighted part is written as an objective with a weight.

    Raises:
        ConfigError: the value is of another type, or a part is no objective with a weight.
    """
    if hint == tuple[Part, ...]:
        if not isinstance(given, list | tuple) or not given or not all(_is_part(one) for one in given):
            raise ConfigError(
                f"{place}: got {given!r}, expected a list of objectives with weights, such as "
                "[{weight: 0.8, name: dpo, beta: 0.1}, {weight: 0.2, name: sft}]."
            )
        return tuple(_part(one, f"{place}[{n}]") for n, one in enumerate(given))
    try:
        # Strict for what is one value: true is no number, and no text is.
        value = TypeAdapter(hint).validate_python(given, strict=isinstance(given, bool | int | float | str))
        return float(value) if hint == Number else value  # 1 and 1.0 are one setting, with one hash
    except ValidationError as error:
        first = error.errors()[-1]
        raise ConfigError(f"{place}: {first['msg']}, got {given!r:.200}") from error
    except OverflowError as error:
        raise ConfigError(
            f"{place}: got a number of {len(str(given))} digits, expected one that float64 holds"
        ) from error


def _is_part(given: Any) -> bool:
    return isinstance(given, Mapping) and {"name", "weight"} <= {*given}


def _part(given: Mapping[str, Any], place: str) -> Part:
    own = {key: value for key, value in given.items() if key not in ("name", "weight")}
    return Part(_value(Number, given["weight"], f"{place}.weight"), build_objective(str(given["name"]), own, place))


def _written(objective: Objective) -> dict[str, Any]:
    """Return the hyper-parameters as they are written in a run file: what `build_objective` takes."""
    return {f.name: _plain(getattr(objective, f.name)) for f in _hyper_parameters(type(objective))}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Part):
        return {"weight": value.weight, "name": losses.name_of(value.objective), **_written(value.objective)}
    return value


def written(value: Any) -> str:
    """Return a hyper-parameter as the command line takes it, on one line."""
    plain = _plain(value)
    return (
        yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=math.inf)
        .removesuffix("\n...\n")
        .strip()
    )


def several(given: Any) -> Any:
    """Return "a,b" as ("a", "b"), and anything else as it is."""
    if isinstance(given, str):
        return tuple(part.strip() for part in given.split(",") if part.strip())
    return given


@final
class Evaluation(BaseModel):
    """What is measured on the policy's own samples after training; held-out examples are always scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gold: str | None = None
    """A known true reward, package.module:function over (prompt, completion); null for none."""
    reward_model: str | None = None
    """A reward model that scores the answers beside the gold reward: its adapter/ folder, of the same base. Null: a run
    that learns from reward models is scored by these, any other by none."""
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
    sample_steps: Annotated[int, Field(ge=1)] | None = None
    """Sample every so many optimiser steps as well, for the path that the policy took (null: only after the last)."""

    choices: str | None = None
    """A multiple-choice file, such as BIG-bench's HHH: is the right answer the most probable one?"""
    sycophancy: str | None = None
    """A file of questions, or built-in: does the answer turn to what the user says they believe?"""
    text: str | None = None
    """A file of plain text that is trained on nowhere: how well is it still predicted (the alignment tax)?"""
    harness: tuple[str, ...] = ()
    """Tasks of lm-eval, by name or YAML file, such as arc_easy: what is left of what the model could do before?"""
    harness_limit: Annotated[int, Field(ge=1)] | None = None
    """The first so many items of each of those tasks (null: all)."""

    @property
    def probes(self) -> Probes:
        """What is to be probed."""
        return Probes(self.choices, self.sycophancy, self.text, self.harness, self.harness_limit)

    @field_validator("harness", mode="before")
    @classmethod
    def _tasks(cls, given: Any) -> Any:
        return several(given)

    @field_validator("gold")
    @classmethod
    def _found(cls, name: str | None) -> str | None:
        if name is not None:
            find_reward(name, "evaluation.gold")
        return name


@final
class Output(BaseModel):
    """Where results go and where they are shown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dir: str | None = None
    """Folder of the run (null: runs/NAME-HASH, where the hash is of the settings: equal settings, equal folder)."""
    mirror: str | None = None
    """A folder that is there, on another disk: checkpoints, adapter and results are copied below it after every save.
    Where the run's own folder is empty or gone, the same command goes on from there (null: no second copy)."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers beside metrics.jsonl: wandb, tensorboard, trackio. wandb works offline where there is no key."""
    project: str = "dpo-lab"
    """wandb project."""
    group: str | None = None
    """wandb group: the comparison this run belongs to (null: the name of the data)."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, given: Any) -> Any:
        return several(given)


@final
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
    rollout: RolloutConfig | None = None
    """Learn from the policy's own completions, judged by rewards (null: from the examples themselves)."""
    evaluation: Evaluation = Evaluation()
    output: Output = Output()

    @model_validator(mode="before")
    @classmethod
    def _sayable(cls, given: Any) -> Any:
        """Refuse what must not stand in a run file: everything here is written down, and shown by trackers."""
        for key, value in flat(given).items() if isinstance(given, Mapping) else ():
            if holds_secret(str(value)):
                raise ValueError(
                    f"{key}: got what looks like an access key, which every output file would show. Put it into an "
                    "environment variable, such as HF_TOKEN"
                )
            if "\x00" in str(value):
                raise ValueError(f"{key}: got a text with a NUL character, expected none")
        return given

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"name must match {NAME.pattern}, got {name!r}")
        return name

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        """Refuse an objective and a source of examples that do not go together."""
        objective, name = self.objective.build(), self.objective.name
        if self.rollout is None:
            if isinstance(objective, RolloutObjective):
                raise ValueError(
                    f"rollout is missing: {name} learns from sampled completions. Say who judges them, for instance "
                    "rollout.rewards=[package.module:function], or use a recipe such as reward_ppo"
                )
            return self
        if objective.view not in ON_POLICY:
            raise ValueError(
                f"rollout: {name} reads {objective.view}, which are not sampled, expected an objective that reads "
                f"{', '.join(ON_POLICY)}. Leave rollout out"
            )
        compares = objective.view == "pairs" or name in ("rloo", "grpo")
        if compares and self.rollout.completions_per_prompt < 2:
            raise ValueError(
                f"rollout.completions_per_prompt: {name} compares completions of one prompt and needs at least 2, got "
                f"{self.rollout.completions_per_prompt}"
            )
        if self.rollout.value is not None and not objective.needs_values:
            raise ValueError(f"rollout.value: {name} has no value role, got {self.rollout.value!r}. Leave it out")
        if self.model.lora is None and objective.needs_values:
            raise ValueError(f"model.lora: {name} trains a value role beside the policy, both adapters. Leave it out")
        if self.model.lora is not None and self.model.lora.dropout and objective.view == "rollouts":
            raise ValueError(
                f"model.lora.dropout: {name} compares the policy with itself as it sampled, which dropout would make "
                f"another model, expected 0, got {self.model.lora.dropout:g}"
            )
        return self

    @model_validator(mode="after")
    def _scored(self) -> Self:
        """Refuse a reward model beside full weights: it stands on the base, which they change."""
        if self.evaluation.reward_model is not None and self.model.lora is None:
            raise ValueError(
                f"evaluation.reward_model: got {self.evaluation.reward_model!r} with model.lora=null, expected an "
                "adapter: a reward model stands on the base, which training the full weights changes. Leave one of "
                "the two out"
            )
        return self

    @property
    def trains_reward(self) -> bool:
        """Whether the run trains a reward model in place of a policy."""
        return isinstance(self.objective.build(), RankingObjective)

    def earlier(self) -> dict[str, str]:
        """Return the adapters the run starts from or is judged by, by dotted key: folders or names of stages."""
        found = {} if self.model.adapter is None else {"model.adapter": self.model.adapter}
        if self.rollout is not None:
            if self.rollout.value is not None:
                found["rollout.value"] = self.rollout.value
            for key, terms in (("rewards", self.rollout.rewards), ("watch", self.rollout.watch)):
                for n, term in enumerate(terms):
                    if isinstance(term, ModelTerm):
                        found |= {f"rollout.{key}[{n}].folders[{k}]": one for k, one in enumerate(term.folders)}
        return found

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
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error

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
        return self.of(merged(settings, changes), place)

    def decisive(self) -> dict[str, Any]:
        """Return the settings that can change the trained weights, by dotted key: not where and how results go."""
        found = flat(self.model_dump(mode="json", exclude={"output", "evaluation"}))
        return {key: value for key, value in found.items() if key not in SAVING}

    def digest(self) -> str:
        """Return a hash of the decisive settings."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved settings; `dpo train` takes them as they are."""
        settings = self.model_dump(mode="json")
        return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


Recipe = Callable[[DataConfig], tuple[Run, ...]]
"""A recipe chooses; it computes nothing. It maps the dataset to the runs to carry out, in order."""


def one_stage(
    name: str, data: DataConfig, *, learning_rate: float, loop: Loop | None = None, **hyper_parameters: Any
) -> tuple[Run, ...]:
    """Return the one run of a recipe that trains the objective of its own name from the base model."""
    return (
        Run(
            name=name,
            data=data,
            objective=ObjectiveConfig.model_validate({"name": name, **hyper_parameters}),
            optimiser=Optimiser(learning_rate=learning_rate),
            loop=loop or Loop(),
        ),
    )


def reward_stage(data: DataConfig, adapter: str | None = None) -> Run:
    """Return the stage "reward": a Bradley-Terry model of the data's comparisons, from the base or an adapter."""
    return Run(
        name="reward",
        data=data,
        objective=ObjectiveConfig.model_validate("bradleyterry"),
        model=ModelConfig(adapter=adapter),
        optimiser=Optimiser(learning_rate=2e-4),
    )


def learned_reward() -> ModelTerm:
    """Return the reward that the stage "reward" trains."""
    return ModelTerm(kind="model", folders=(f"{STAGE}reward",))


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
            value = _read_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{argument!r}: the value is not YAML ({' '.join(str(error).split())}). Put quotes around it."
            ) from error
        found = merged(found, _nested(key.split("."), value))
    return found


def plan(recipe: Recipe, overrides: Mapping[str, Any], place: str = "command line") -> tuple[Run, ...]:
    """Return a recipe's runs with overrides applied: to every stage, or under a stage's name to that one.

    Raises:
        ConfigError: as `Run.of`, where data.train is missing, and where stages that share a base ask for two.
    """
    given = dict(overrides)
    data = given.pop("data", {})
    if not isinstance(data, Mapping) or "train" not in data:
        raise ConfigError(f"{place}: data.train is missing. Name the preferences to train on: data.train=FILE.")
    try:
        runs = recipe(DataConfig.model_validate(data))
    except ValidationError as error:
        raise ConfigError(f"{place}: {explained(error, prefix='data')}") from error
    own = {run.name: given.pop(run.name, {}) for run in runs} if len(runs) > 1 else {}
    sampling = {"rollout": given.pop("rollout")} if "rollout" in given and any(run.rollout for run in runs) else {}
    for stage, settings in own.items():
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f"{place}: {stage}={settings!r}: {stage} is a stage of this recipe, expected {stage}.key=value, for "
                f"instance {stage}.optimiser.learning_rate=1e-4."
            )
    planned = tuple(
        run.override(merged(given | (sampling if run.rollout else {}), own.get(run.name, {})), place) for run in runs
    )
    for before, after in zip(runs, planned, strict=True):
        stage = before.model.adapter is not None and (before.model.adapter + STAGE).startswith((PREVIOUS, STAGE))
        if stage and before.model.adapter != after.model.adapter:
            raise ConfigError(
                f"{place}: model.adapter={after.model.adapter!r}: stage {before.name!r} starts from an earlier "
                "stage. Give it to the first stage alone, as STAGE.model.adapter=FOLDER."
            )
    kept = _used(runs, planned)
    check_stages(kept, place)
    return kept


def _used(recipe: Sequence[Run], planned: Sequence[Run]) -> tuple[Run, ...]:
    """Leave out reward models that the recipe trains for a later stage and that the overrides put out of use."""

    def wanted(runs: Sequence[Run]) -> set[str]:
        named = {value.removeprefix(STAGE) for run in runs for value in run.earlier().values()}
        return named | {before.name for before, run in pairwise(runs) if PREVIOUS in run.earlier().values()}

    unused = wanted(recipe) - wanted(planned)
    return tuple(run for run in planned if not (run.trains_reward and run.name in unused))


def check_stages(runs: Sequence[Run], place: str) -> None:
    """Refuse stages that cannot share one base and one dataset.

    Raises:
        ConfigError: names the setting in which they differ, or a stage that starts from one that is not before it.
    """
    first = runs[0]
    for n, run in enumerate(runs):
        before = [one.name for one in runs[:n]]
        for key, value in run.earlier().items():
            if value == PREVIOUS and not before:
                raise ConfigError(
                    f"{place}: {key}={PREVIOUS!r} in the first stage: there is none before it. Name a folder."
                )
            if value.startswith(STAGE) and value.removeprefix(STAGE) not in before:
                raise ConfigError(
                    f"{place}: {key}={value!r}: no stage of that name comes before {run.name!r}, expected one of "
                    f"{', '.join(before) or 'none'}. Name it, or a folder."
                )
    for run in runs[1:]:
        ours, theirs = first.decisive(), run.decisive()
        shared = [key for key in {**ours, **theirs} if key.startswith("data.")]
        for key in (*shared, *(f"model.{name}" for name in BASE_SETTINGS)):
            if ours.get(key) != theirs.get(key):
                raise ConfigError(
                    f"{place}: {key} is {ours.get(key)!r} in stage {first.name!r} and {theirs.get(key)!r} in stage "
                    f"{run.name!r}, expected one base and one dataset for all. Give {key}= without a stage's name."
                )


def read_run(path: Path, overrides: Mapping[str, Any]) -> tuple[Run, ...]:
    """Read a run from a YAML file, such as the run.yaml that every run writes.

    Raises:
        ConfigError: the file is absent, is not YAML, or holds no valid run.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            settings = _read_yaml(stream.read(LONGEST + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path}: got {type(settings).__name__}, expected a mapping with data, objective, ...")
    run = Run.of(settings, str(path))
    run = run.override(overrides) if overrides else run
    check_stages((run,), str(path))
    return (run,)


class _Loader(yaml.SafeLoader):
    """YAML's version 1.2 core: the plain words of 1.1 (no, on, 1:30, 2024-01-01, 0x10) are text, 1e-5 is a number.

    Neither aliases, with which a few lines can stand for gigabytes, nor the same key twice, nor tags: a setting is what
    is written at its place.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 (none of the inherited ones)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused(f"got the alias *{event.anchor}, expected the value written out", event)
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise _refused(f"got the tag {tag}, expected a plain value", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [key for key, _ in node.value]
            same = [key.value for key in keys]
            twice = next((key for n, key in enumerate(keys) if key.value in same[:n]), keys[-1])  # the last: 1 and 1.0
            raise _refused(f"got the key {twice.value} twice, expected it once", twice)
        return found


def _refused(message: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=place.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something else than text."""


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan"
for _tag, _shape, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_shape})$"), _first)


def _read_yaml(text: str) -> Any:
    """Return what the text says.

    Raises:
        yaml.YAMLError: it is none, or longer or deeper than settings are.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"more than {LONGEST:,} characters, expected settings")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except RecursionError as error:
        raise yaml.YAMLError("brackets are nested too deeply to read") from error
    except ValueError as error:  # a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    return {path[0]: _nested(path[1:], value) if len(path) > 1 else value}


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings, where both have a value the second's."""
    result = dict(first)
    for key, value in second.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key, each with `prefix` before it."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
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
    lines = []
    for fault in error.errors():
        key = ".".join(([prefix] if prefix else []) + [str(part) for part in fault["loc"]])
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}.{_meant(key, _known(settings))}")
        elif fault["type"] == "missing":
            lines.append(f"{key} is missing")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            quote = " (quotes make it text)" if fault["type"] == "string_type" else ""
            got = "" if "got" in message else f", got {fault['input']!r:.200}"
            lines.append((f"{key}: " if key else "") + f"{message}{quote}{got}")
    return "; ".join(lines)


@cache
def _known(settings: type[BaseModel]) -> tuple[str, ...]:
    """Return every dotted key that can be given, those of all objectives among them."""
    found = _keys(settings)
    if settings is Run:
        found += [f"objective.{f.name}" for name in losses.names() for f in _hyper_parameters(losses.find(name))]
    return tuple(found)


def _meant(key: str, known: Iterable[str]) -> str:
    """Return a hint: the valid key with the same last part, else the nearest key, else the nearest last part."""
    last = key.rpartition(".")[2]
    lasts = {one.rpartition(".")[2]: one for one in reversed(list(known))}
    if last in lasts:
        return f" Did you mean {lasts[last]!r}?"
    if hint := nearest(key, known):
        return hint
    close = get_close_matches(last, lasts, n=1)
    return f" Did you mean {lasts[close[0]]!r}?" if close else ""
