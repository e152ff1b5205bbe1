"""What is compared: names and settings made into the stages of every entry, under one budget and in one frame."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from dpo import embedded, losses, recipes
from dpo.data import Checked, check
from dpo.errors import ConfigError, DataError, nearest
from dpo.evaluation.judges import JudgeConfig
from dpo.evaluation.records import START
from dpo.measure import check_reward_model
from dpo.settings import BASE_SETTINGS, NAME, Run, flat, merged, plan, read_run
from dpo.sinks import check_available

ENDLESS = 10**6
"""Epochs, where a budget of completions is the limit."""

MANY_STEPS = 50_000
"""Optimiser steps, where a budget of seconds is the limit."""

RESERVED = frozenset({START, *Run.model_fields})
"""Names that no entry can have: the start's, and the rooms of settings."""

POINTS = 3
"""Places along a run, its end included, at which it is sampled for the reward-KL frontier."""


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
    """Nested settings for all runs, and under an entry's name for that one alone."""


@final
@dataclass(frozen=True)
class Entries:
    """What is to be trained, before seeds and tuning."""

    stages: Mapping[str, tuple[Run, ...]]
    """[entry], with seed 0."""
    checked: Checked
    """The data of all."""
    completions: int
    """That every stage learns from, unless the budget is one of seconds."""
    warnings: tuple[str, ...]
    """What is known before anything is trained."""

    @property
    def first(self) -> Run:
        """The run whose data, base and evaluation are those of all."""
        return next(iter(self.stages.values()))[0]


@contextmanager
def planned(wanted: Wanted) -> Iterator[Entries]:
    """Yield the entries; where no data is named, on the embedded task, whose files hold while the context does.

    Raises:
        DPOError: names, settings or data are wrong, or the entries cannot be set beside one another.
    """
    names = _names(wanted.objectives)
    if wanted.seconds is not None and wanted.completions is not None:
        raise ConfigError("--completions and --seconds: got two budgets, expected one. Leave one out.")
    common, own = _apart(wanted.overrides, names)
    a_file = any(Path(one).suffix in (".yaml", ".yml") for one in wanted.objectives)
    if a_file or "train" in common.get("data", {}):
        yield _entries(wanted, names, {name: merged(common, own[name]) for name in names}, on_task=False)
        return
    with embedded.embedded() as task:
        common = merged(merged(task, {"loop": {"gradient_accumulation_steps": 2}}), common)
        yield _entries(wanted, names, {name: merged(common, own[name]) for name in names}, on_task=True)


def _apart(
    overrides: Mapping[str, Any], names: Sequence[str]
) -> tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]]:
    """Return the settings of all entries, and those given under the name of one."""
    own = {name: overrides.get(name, {}) for name in names}
    for name, settings in own.items():
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f"command line: {name}={settings!r}: {name} is an entry of this comparison, expected {name}.key=value, "
                f"for instance {name}.optimiser.learning_rate=1e-4."
            )
    return {key: value for key, value in overrides.items() if key not in own}, own


def _entries(
    wanted: Wanted, names: Sequence[str], overrides: Mapping[str, Mapping[str, Any]], on_task: bool
) -> Entries:
    unlimited = {
        name: _stages(what, overrides[name], on_task) for name, what in zip(names, wanted.objectives, strict=True)
    }
    checked = check(unlimited[names[0]][0].data)
    if not checked.eval and "prompts" not in overrides[names[0]].get("evaluation", {}):
        raise DataError(
            f"{checked.config.train}: got no held-out examples and no evaluation prompts, expected something to "
            "compare on. Give data.eval_share above 0, data.eval=FILE or evaluation.prompts=FILE."
        )
    completions = wanted.completions or (embedded.COMPLETIONS if on_task else _one_pass(checked))
    stages = {
        name: tuple(_budgeted(run, completions, wanted.seconds, overrides[name]) for run in runs)
        for name, runs in unlimited.items()
    }
    for name, runs in stages.items():
        _refuse_entry(name, runs, stages[names[0]][0])
    return Entries(stages, checked, completions, tuple(_beforehand(wanted, stages, completions, overrides)))


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
        if not NAME.fullmatch(name) or name in RESERVED:
            raise ConfigError(
                f"--objectives: got {name!r}, expected a name that matches {NAME.pattern} and is none of "
                f"{', '.join(sorted(RESERVED))}."
            )
        found.append(name)
    if not found:
        raise ConfigError("--objectives: got none, expected some, for instance --objectives dpo,ipo,kto.")
    return tuple(found)


def _stages(what: str, overrides: Mapping[str, Any], on_task: bool) -> tuple[Run, ...]:
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
    if not on_task:
        return stages
    return tuple(
        one
        if "learning_rate" in _given("optimiser", one, overrides)
        else one.override({"optimiser": {"learning_rate": _task_rate(one)}})
        for one in stages
    )


def _task_rate(run: Run) -> float:
    """Return the learning rate of a run on the embedded task."""
    return embedded.RATES.get(run.objective.name, embedded.RATE_FACTOR * run.optimiser.learning_rate)


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
        check_reward_model(run)
        run.evaluation.probes.check()
        if run.model.lora is None:
            raise ConfigError(f"{name}: model.lora=null trains the base, which all entries share. Use model.lora.")
        ours, theirs = framing(first), framing(run)
        for key in ours:
            if ours[key] != theirs.get(key):
                raise ConfigError(
                    f"{name}: {key} is {theirs.get(key)!r}, and {ours[key]!r} in {first.name}, expected one dataset, "
                    f"base and evaluation for all. Give {key}= for all of them."
                )


def framing(run: Run) -> dict[str, Any]:
    """Return the settings that all entries of a comparison share, by dotted key."""
    settings = flat(run.model_dump(mode="json", include={"data", "model", "evaluation"}))
    base = {f"model.{name}" for name in BASE_SETTINGS}
    return {
        key: value
        for key, value in settings.items()
        if (key.startswith(("data.", "evaluation.")) or key in base) and key != "evaluation.sample_steps"
    }


def _given(room: str, run: Run, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the overrides say of a room of settings, for all runs or under the stage's own name."""
    return {**overrides.get(room, {}), **overrides.get(run.name, {}).get(room, {})}


def _one_pass(checked: Checked) -> int:
    """Return the completions of one pass over the training pairs, or over the judgements where there are no pairs."""
    pairs = sum(len(record.pairs()) for record in checked.train)
    return 2 * pairs or sum(len(record.judgements()) for record in checked.train) or len(checked.train)


def completions_of(run: Run) -> int:
    """Return the completions of one example that a run learns from."""
    return {"pairs": 2, "comparisons": 2, "rankings": 2}.get(run.objective.build().view, 1)


def _budgeted(run: Run, completions: int, seconds: float | None, overrides: Mapping[str, Any]) -> Run:
    """Return the run with as many optimiser steps as the budget pays for, and samples on the way, unless overridden."""
    own = _given("loop", run, overrides)
    if seconds is not None:
        steps = own.get("max_steps", MANY_STEPS)
        return run.override({"loop": {"max_steps": steps, "num_train_epochs": ENDLESS, "max_seconds": seconds}})
    if "max_steps" not in own and "num_train_epochs" not in own:
        steps = max(1, round(completions / (completions_of(run) * run.loop.batch)))
        run = run.override({"loop": {"max_steps": steps, "num_train_epochs": ENDLESS}})
    if run.evaluation.gold is not None and "sample_steps" not in overrides.get("evaluation", {}) and run.loop.max_steps:
        run = run.override({"evaluation": {"sample_steps": -(-run.loop.max_steps // POINTS)}})
    return run


def _beforehand(
    wanted: Wanted, entries: Mapping[str, Sequence[Run]], completions: int, overrides: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return what is known before anything is trained."""
    found = []
    if not wanted.tune:
        found.append(
            "Untuned: every entry used its recipe's settings. An objective that does worse here may only need another "
            "learning rate or beta; --tune N tries N settings of each under an equal budget."
        )
    batches = {name: stages[-1].loop.batch * completions_of(stages[-1]) for name, stages in entries.items()}
    if len(set(batches.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in batches.items())
        found.append(f"Completions of one optimiser step differ: {told}. The budget counts completions, not steps.")
    if wanted.seconds is None:
        for name, stages in entries.items():
            for run in stages:
                learned = (run.loop.max_steps or 0) * run.loop.batch * completions_of(run)
                if run.loop.max_steps is not None and abs(learned - completions) > 0.05 * completions:
                    found.append(
                        f"{name}: stage {run.name} learns from {learned} completions, not {completions}, as its steps "
                        f"are whole and take {run.loop.batch * completions_of(run)} each."
                    )
    for name, stages in entries.items():
        if len(stages) > 1:
            found.append(f"{name} has {len(stages)} stages, each with the whole budget. The cost counts them all.")
        if stages[-1].model.adapter is not None and stages[-1].model.reference == "start":
            found.append(f"{name} ends with a stage whose KL and margins are measured from the adapter it starts from.")
    loops = [_given("loop", run, overrides[name]) for name, stages in entries.items() for run in stages]
    if any("max_steps" in loop or "num_train_epochs" in loop for loop in loops):
        found.append("The length of the training was given in steps or epochs: completions may differ. See the cost.")
    return found
