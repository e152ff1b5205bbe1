"""What the tests of README and of docs/ share: the blocks of a document, and what each of them must be."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import dpo.losses
from dpo.cli import app
from dpo.compare import Wanted
from dpo.data import check
from dpo.entries import planned
from dpo.errors import DPOError
from dpo.recipes import find as find_recipe
from dpo.recipes import names as recipe_names
from dpo.run import Result as Finished
from dpo.settings import Run, merged, plan, read_overrides, read_run

ROOT = Path(__file__).parents[1]
ROWS = re.compile(r"`(\w+\.jsonl)`(?:(?!\n\n|\.jsonl`).)*?\n\n```json\n(.*?)^```", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"`((?:[a-z_]+\.)+[a-z_]+=[^\s`]*)`")
COMMAND = re.compile(r"`(dpo [a-z][^`]*)`")
UNFINISHED = re.compile(r"\b(FILE|RUN|RECIPE|NAME|FOLDER|ENTRY|A|B)\b|\.\.\.")
"""What a command holds that stands for something."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def lines(text: str) -> list[str]:
    """Every command line of the sh blocks; `a && b` is two."""
    whole = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [part.partition("   #")[0].strip() for line in whole for part in line.split("&&") if part.strip()]


def commands(text: str) -> list[str]:
    """The `dpo` commands of the sh blocks, the environment before them left out."""
    found = (re.sub(r"^(?:[A-Z_]+=\S* )+", "", line) for line in lines(text))
    return [line for line in found if line.startswith("dpo ")]


def inline_commands(text: str) -> list[str]:
    """The whole `dpo` commands within sentences and tables; shorter ones only name a command."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [one for one in COMMAND.findall(outside) if len(one.split()) > 3 and not UNFINISHED.search(one)]


def shown_files(*texts: str) -> dict[str, str]:
    """The rows that documents show for a named file, twice with another prompt: one side trains, one evaluates."""
    found = {name: rows for text in texts for name, rows in ROWS.findall(text)}
    return {name: rows + rows.replace("fruit", "colour") for name, rows in found.items()}


def settings(text: str) -> set[str]:
    """The settings in sentences and tables."""
    return set(SETTING.findall(text))


def refused(setting: str) -> str | None:
    """Why no run takes the setting, or None where one does."""
    given = read_overrides([setting if setting.partition("=")[2] else f"{setting}x"])
    entry = setting.partition(".")[0]
    if entry in recipe_names():  # one entry's own, of a comparison
        plan(find_recipe(entry), {"data": {"train": "prefs.jsonl"}, **given[entry]})
        return None
    named = [name for name in dpo.losses.names() if entry == "objective"] or ["dpo", "sft"]
    reasons = []
    for objective in (*named, "ppo", "rloo"):
        sampled = dpo.losses.find(objective).view == "rollouts"
        rollout = {"rewards": ["dpo.data.gold:sentiment"], "completions_per_prompt": 2}
        start = {"data": {"train": "prefs.jsonl"}, "objective": objective} | ({"rollout": rollout} if sampled else {})
        try:
            Run.of(start, "here").override(given)
        except DPOError as error:
            reasons.append(str(error))
        else:
            return None
    return reasons[0]


def anchors(text: str) -> set[str]:
    """The fragments under which headings are found, in the repository and in the site alike."""
    bare = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = (re.sub(r"[`*]", "", one).strip() for one in re.findall(r"^#+ (.*)$", bare, flags=re.MULTILINE))
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", one.lower())) for one in headings}


def links(text: str) -> Iterator[tuple[str, str]]:
    """Every link that stays in the repository: the file, "" for the same one, and the fragment."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "http://localhost")):
            file, _, fragment = target.partition("#")
            yield file, fragment


@dataclass
class StandIn:
    """Takes the place of training, measuring and exporting: commands are read, checked and planned only."""

    runs: list[Run] = field(default_factory=list)
    """What would have been carried out."""
    called: list[str] = field(default_factory=list)
    """Other rooms that a command reached."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr("dpo.run.execute", self._execute)
        patch.setattr("dpo.run.show", lambda result: None)
        patch.setattr("dpo.evaluate.evaluate", self._evaluate)
        patch.setattr("dpo.compare.run_comparison", self._compare)
        patch.setattr("dpo.compare.show_comparison", lambda *_: None)
        for room in ("quickstart.quickstart", "compare.rebuild", "robustness.erode", "export.export", "chat.talk_to"):
            patch.setattr(f"dpo.{room}", self._room(room))
        for shown in ("robustness.show_erosion", "chat.chat"):
            patch.setattr(f"dpo.{shown}", lambda *_: None)
        patch.setattr("dpo.run.read_last_stage", lambda folder: Finished(self._read(folder), folder, {}, None))  # pyright: ignore[reportArgumentType]
        patch.setattr("dpo.card.write_card", self._room("card.write_card"))

    def _execute(self, runs: Sequence[Run], name: str) -> list[Any]:
        self.runs.extend(runs)
        return []

    def _evaluate(self, what: str, overrides: Mapping[str, Any]) -> None:
        if set(overrides) <= {"evaluation", "model", "loop"}:  # a run of one's own
            self.runs.extend(read_run(Path(what) / "run.yaml", overrides))
        else:
            self.runs.append(Run.of(merged({"model": {"adapter": what}}, overrides), "here"))

    def _compare(self, wanted: Wanted, output: Path | None) -> tuple[None, Path | None]:
        with planned(wanted) as entries:
            self.runs.extend(run for stages in entries.stages.values() for run in stages)
        return None, output

    def _read(self, folder: Path) -> Run:
        (run,) = read_run(Path(folder) / "run.yaml", {})
        return run

    def _room(self, name: str) -> Any:
        class Made:
            format = folder = pushed = None

        def reached(*_: object, **__: object) -> Made:
            self.called.append(name)
            return Made()

        return reached


def invoke(command: str, done: StandIn) -> Result:
    """Give a command to the command line; what it plans must find its examples in the rows that documents show."""
    result = CliRunner().invoke(app, shlex.split(command)[1:], prog_name="dpo", catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if "--plan" in command:
        assert "Memory plan" in result.output
    elif command.startswith("dpo train"):
        assert done.runs
        checked = check(done.runs[0].data)
        for run in done.runs:
            view = "prompts" if run.rollout else run.objective.build().view
            held = {"comparisons": "pairs", "rankings": "ranking"}.get(view, view)
            assert any(getattr(record, held)() for record in checked.train), f"no {view} in {run.data.train}"
    elif command.split()[1] in ("compare", "evaluate", "export", "chat", "card", "quickstart"):
        assert done.runs or done.called
    return result


def working_folder(folder: Path, *texts: str) -> None:
    """Fill a folder with what the commands of documents name."""
    for name, rows in shown_files(*texts).items():
        (folder / name).write_text(rows, encoding="utf-8")
    for run_folder in ("dpo-1a2b3c4d", "ipo-5e6f7a8b"):
        (folder / "runs" / run_folder).mkdir(parents=True)
        (run,) = plan(find_recipe(run_folder[:3]), {"data": {"train": "prefs.jsonl"}})
        (folder / "runs" / run_folder / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
