"""The commands as functions, for a notebook or a script: a few lines do what the command line does.

They lie here and not in `dpo` itself, where train, compare and evaluate are names of modules.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias, final

from dpo import recipes
from dpo.card import write_card
from dpo.chat import Conversation, Manner, talk_to
from dpo.checkpoint import atomic_write_text
from dpo.compare import Wanted, read_judge, run_comparison
from dpo.data import Preference
from dpo.data.load import RECORDS
from dpo.errors import ConfigError, DataError
from dpo.evaluate import evaluate as evaluate_place
from dpo.evaluation.records import Comparison
from dpo.export import export
from dpo.progress import in_notebook
from dpo.run import Result, execute, quiet_libraries, read_last_stage
from dpo.settings import merged, plan

__all__ = ["Compared", "Data", "Manner", "card", "chat", "compare", "evaluate", "export", "train"]

log = logging.getLogger("dpo")

RUNS = "runs"
"""Where runs go, and rows that are given as Python values."""

Data: TypeAlias = str | Path | Mapping[str, Any] | Sequence[Preference | Mapping[str, Any]]
"""A file or a hub data set; its settings, train among them; or rows: records, or mappings of any known format."""


@final
@dataclass(frozen=True)
class Compared:
    """A comparison and its folder."""

    comparison: Comparison
    folder: Path

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the whole page."""
        from dpo.evaluation.report.notebook import comparison_view

        return comparison_view(self.comparison, self.folder)


def train(recipe: str, data: Data, **overrides: Any) -> Result:
    """Train a recipe, and return what its last stage achieved; earlier stages lie beside it.

    Args:
        recipe: its name.
        data: what to train on. Rows are written into runs/, under a name by their content, so that the run can be
            trained again from its run.yaml.
        overrides: settings, nested or with dotted keys: loop={"max_steps": 10}, **{"model.lora.r": 8}; a stage's own
            under its name.

    Raises:
        DPOError: whatever is wrong, with place and fix.
    """
    _speak()
    return execute(plan(recipes.find(recipe), _settings(data, overrides), "train()"), recipe)[-1]


def compare(
    objectives: Sequence[str],
    data: Data | None = None,
    *,
    seeds: int = 1,
    completions: int | None = None,
    seconds: float | None = None,
    tune: int = 0,
    judge: Mapping[str, Any] | None = None,
    output: Path | str | None = None,
    **overrides: Any,
) -> Compared:
    """Train several objectives from one start under one budget, and return the comparison with its page.

    Args:
        objectives: recipes, objectives, or YAML files of a run.
        data: as of `train`; the embedded task where None.
        seeds: trainings of each.
        completions: budget of completions that each stage learns from.
        seconds: budget of seconds instead.
        tune: settings of learning rate and strength to try for each first.
        judge: settings of a language model that compares the answers.
        output: folder; runs/compare-HASH where None.
        overrides: settings of all runs, as of `train`.

    Raises:
        DPOError: settings or data are wrong, or the disk refuses.
    """
    _speak()
    if isinstance(objectives, str):
        raise ConfigError(f"compare(): got {objectives!r}, expected a list of names such as ['dpo', 'ipo'].")
    given = _nested(overrides) if data is None else _settings(data, overrides)
    wanted = Wanted(tuple(objectives), seeds, completions, seconds, tune, read_judge(judge), given)
    return Compared(*run_comparison(wanted, None if output is None else Path(output)))


def evaluate(what: Path | str, **overrides: Any) -> Result:
    """Measure a finished run again, or an adapter or a model from elsewhere.

    Raises:
        DPOError: it is none of these, or settings are wrong.
    """
    _speak()
    return evaluate_place(str(what), _nested(overrides))


def chat(run: Path | str | Result, *, system: str | None = None, **manner: Any) -> Conversation:
    """Load a run's model beside its start; `say` of what is returned asks both.

    Args:
        run: a result, or the folder of a finished run.
        system: a system message.
        manner: temperature, max_new_tokens, seed.

    Raises:
        DPOError: there is no finished run of a policy, or its model cannot be loaded.
    """
    _speak()
    return talk_to(run.folder if isinstance(run, Result) else run, manner=Manner(**manner), system=system)


def card(run: Path | str | Result, force: bool = False) -> Path:
    """Write the model card of a finished run again, and return its place.

    Raises:
        DPOError: there is no finished run, or a card that was edited.
    """
    return write_card(run.folder if isinstance(run, Result) else read_last_stage(Path(run)).folder, force)


def _speak() -> None:
    """Keep the libraries below quiet, and in a notebook let the log speak: it shows nothing there by itself."""
    quiet_libraries()
    if in_notebook() and not log.handlers:
        shown = logging.StreamHandler(sys.stdout)
        shown.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(shown)
        log.setLevel(logging.INFO)
        log.propagate = False  # Colab's own handler would say it twice


def _settings(data: Data, overrides: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(data, Mapping):
        return merged({"data": data}, _nested(overrides))
    place = str(data) if isinstance(data, str | Path) else _written(data)
    return merged({"data": {"train": place}}, _nested(overrides))


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they are nested; dotted keys are taken apart."""
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        *outer, last = key.split(".")
        found = merged(found, reduce(lambda inner, name: {name: inner}, reversed(outer), {last: value}))
    return found


def _written(rows: Sequence[Preference | Mapping[str, Any]]) -> str:
    """Write rows as JSON Lines under a name by their content, and return the place.

    Raises:
        DataError: there is none, or one cannot be written as JSON.
    """
    if not rows:
        raise DataError("data: got no rows, expected at least one. Give records, mappings, or the name of a file.")
    lines = []
    for number, row in enumerate(rows, start=1):
        plain = RECORDS.to_row(row) if isinstance(row, Preference) else row
        try:
            lines.append(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError(
                f"data, row {number}: {error}, expected text, finite numbers and lists of these."
            ) from error
    text = "".join(lines)
    file = Path(RUNS) / f"data-{sha256(text.encode()).hexdigest()[:8]}.jsonl"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{file.parent}: cannot be made ({error.strerror}). Work in a folder of yours."
            ) from error
        atomic_write_text(file, text)
    return str(file)
