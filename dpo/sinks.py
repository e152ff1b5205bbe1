"""Where the ledger's rows are shown beside it: Weights & Biases, TensorBoard, Trackio, or nowhere.

Sinks are copies of the ledger of `dpo.metrics`, which is the truth: one that fails costs the run nothing. All of them
show the same names. What leaves the run through them is redacted first.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, final, get_args
from urllib.parse import urlsplit

from dpo.errors import ConfigError, nearest
from dpo.metrics import AXES, METRICS_FILE, PERFORMANCE_FILE, Row, read
from dpo.redact import redact, redact_text

Tracker: TypeAlias = Literal["wandb", "tensorboard", "trackio", "none"]
"""What output.report_to may name; but for "none" each is also the name of the package it needs."""

TRACKERS: tuple[Tracker, ...] = get_args(Tracker)

Mode: TypeAlias = Literal["online", "offline", "disabled"]
Cell: TypeAlias = int | float | str | None

SAMPLES = "samples"
"""Name of the table of a run's own answers: the same prompts for every run of a comparison."""

SAMPLE_COLUMNS = ("prompt", "answer", "gold", "tokens", "kl")
"""Its columns: text, text, the task's own unit, tokens, and log policy - log reference summed over them, in nats."""

_EXTRAS = {"wandb": "dpo-lab", "tensorboard": "dpo-lab[tensorboard]", "trackio": "dpo-lab[trackio]"}
_TAG_LIMIT = 64  # characters; wandb refuses the whole run for one that is longer
# What Markdown or HTML would read as markup, as character references.
_PLAIN = str.maketrans({mark: f"&#{ord(mark)};" for mark in "&<>|*_~`[]#\\"} | {"\n": "<br>", "\r": ""})

_WANDB_SERVERS = {"api.wandb.ai", "api.forge.coreweave.com"}  # wandb's own, before and since version 0.31
_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Somewhere to show the rows. It may raise: `SafeSink` keeps that away from the run."""

    def log(self, row: Row) -> None:
        """Show one event, the return value of `Ledger.append`."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Show a table, after the last event; every row has one cell for each column."""
        ...

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Add the run's final numbers and close."""
        ...


@final
class SafeSink:
    """A sink that cannot fail: the first exception is reported, and the sink is closed and left alone until the end.

    Then it is built once more and shown what it missed, read from the ledger. A tracker that is gone for good has cost
    the run two lines of its log and no step in between.
    """

    def __init__(self, name: str, build: Callable[[], Sink], folder: Path) -> None:
        """Build the sink; also a failing `build` is only reported. `folder` is the run's, with its ledger."""
        self._name, self._build, self._folder = name, build, folder
        self._sink: Sink | None = None
        self._missed: tuple[Any, Any] | None = None
        """Step and kind of the first row that was not shown."""
        self._tables: list[tuple[str, Sequence[str], Sequence[Sequence[Cell]]]] = []
        """Those that were not."""
        self._patience = "until the run ends"
        try:
            self._sink = build()
        except Exception as error:
            self._report(error)

    def log(self, row: Row) -> None:
        """Show one event, or remember that it was not shown."""
        if not self._attempt(lambda sink: sink.log(row)) and self._missed is None:
            self._missed = row["step"], row["kind"]

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Show a table, or keep it."""
        if not self._attempt(lambda sink: sink.table(name, columns, rows)):
            self._tables.append((name, columns, rows))

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Show what was missed, and close the sink."""
        self._patience = "for good"
        if self._missed is not None or self._tables:
            self._catch_up()
        self._attempt(lambda sink: sink.finish(summary))

    def _catch_up(self) -> None:
        """Build the sink again and show it what it missed."""
        try:
            self._sink = self._build()
            for row in [] if self._missed is None else _rows_from(self._folder, *self._missed):
                self._sink.log(row)
            for name, columns, cells in self._tables:
                self._sink.table(name, columns, cells)
            _log.info("%s is there again and has been shown what it missed", self._name)
        except Exception as error:
            self._give_up(error)

    def _attempt(self, action: Callable[[Sink], None]) -> bool:
        """Tell whether the sink did it."""
        if self._sink is None:
            return False
        try:
            action(self._sink)
        except Exception as error:
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: Exception) -> None:
        broken, self._sink = self._sink, None
        self._report(error)
        try:
            if broken is not None:
                broken.finish({})
        except Exception as again:
            _log.debug("%s could not be closed either: %r", self._name, again)

    def _report(self, error: Exception) -> None:
        _log.warning(
            "%s failed and is left alone %s; the run is not affected and %s is complete: %s: %s",
            self._name,
            self._patience,
            METRICS_FILE,
            type(error).__name__,
            redact_text(str(error)),
        )


def _rows_from(folder: Path, step: Any, kind: Any) -> list[Row]:
    """Return the ledger's rows from this one on, as `Ledger.append` returned them: the parts of both files together."""
    timed = {(row["step"], row["kind"]): row for row in read(folder / PERFORMANCE_FILE)}
    rows = [{**row, **timed.get((row["step"], row["kind"]), {})} for row in read(folder / METRICS_FILE)]
    first = next((n for n, row in enumerate(rows) if (row["step"], row["kind"]) == (step, kind)), len(rows))
    return rows[first:]


@final
class WandbSink:
    """Weights & Biases: one log call per event, never its own step, offline where there is no key.

    `train/global_step` is the x-axis that charts begin with, so that the parts of a resumed run join. A panel may have
    any number that was logged with its metric as x-axis: every row holds all of `dpo.metrics.AXES`. The summary holds
    each metric's last value, and no best one: that would be a choice made on the evaluation set.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        name: str,
        group: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
        mode: Mode | None = None,
    ) -> None:
        """Start a wandb run.

        Args:
            folder: where wandb puts its own `wandb` folder.
            project: the project, shared by everything that is to be compared.
            name: this run's name.
            group: the comparison it belongs to.
            tags: objective, model and seed.
            config: the resolved run; redacted before wandb sees it.
            mode: None takes WANDB_MODE, else online where there is a key (environment or netrc), else offline.
        """
        check_available(["wandb"])
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            dir=folder.resolve(),  # its service process may stand in another folder
            project=redact_text(project),
            name=redact_text(name),
            group=redact_text(group),
            tags=[redact_text(tag)[-_TAG_LIMIT:] for tag in tags],
            config=redact(config),
            job_type="train",
            reinit="create_new",  # a run the user has open in the same process is not ours to end
            mode=mode or _wandb_mode(),
            # Without these wandb stores the console, the code, the command line and the host.
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, save_code=False, x_disable_machine_info=True
            ),
        )
        self._run.define_metric("*", step_metric="train/global_step")
        for axis in AXES:  # defined by themselves they are not drawn over the step; hidden ones might not be offered
            self._run.define_metric(axis)

    def log(self, row: Row) -> None:
        """Send one event in one call."""
        self._run.log(_values(row))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Send a wandb Table; offline it lies in the run's folder until `wandb sync`."""
        import wandb

        self._run.log({name: wandb.Table(columns=list(columns), data=_redacted(rows))})

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Add the final numbers to the summary and close the run; blocks until wandb has written them."""
        self._run.summary.update(redact(summary))
        self._run.finish()


@final
class TensorboardSink:
    """TensorBoard: event files in the run's folder, to be read with `tensorboard --logdir runs`.

    Its x-axis is the optimiser step, or wall-clock time; the other axes are curves of their own. Settings and final
    numbers form the run's line in the tab HPARAMS. A resumed run adds a file: what followed the checkpoint is there
    twice.
    """

    def __init__(self, folder: Path, name: str, group: str, tags: Sequence[str], config: Mapping[str, Any]) -> None:
        """Open an event file.

        Args:
            folder: the run's; the file goes into its folder `tensorboard`.
            name: this run's name.
            group: the comparison it belongs to.
            tags: objective, model and seed.
            config: the resolved run; redacted before it is written.

        Raises:
            ConfigError: the package is not installed.
        """
        check_available(["tensorboard"])
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(folder / "tensorboard"))
        self._settings = redact({"name": name, "group": group, "tags": ", ".join(tags), **_dotted(config)})
        self._step = 0
        self._writer.add_text("settings", f"```json\n{json.dumps(redact(config), indent=2)}\n```")

    def log(self, row: Row) -> None:
        """Write one event, each number a scalar at the row's optimiser step."""
        values = _values(row)
        self._step = int(row["step"])
        for name, value in values.items():
            self._writer.add_scalar(name, value, self._step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Write a Markdown table for the tab TEXT."""
        lines = [columns, ["---"] * len(columns), *([_cell(one) for one in row] for row in _redacted(rows))]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), self._step)

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Write the line of HPARAMS, the final numbers as its metrics, and close the file."""
        numbers = {name: value for name, value in redact(summary).items() if isinstance(value, int | float)}
        self._writer.add_hparams(self._settings, numbers, run_name=".", global_step=self._step)
        self._writer.close()


@final
class TrackioSink:
    """Trackio: a local SQLite file for each project, to be looked at with `trackio show`.

    The file is trackio's own (TRACKIO_DIR, else the folder `trackio` in the hub's cache). Nothing is sent, unless the
    user's TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says so; but where a hub token is known, trackio asks the hub for its
    user's name.
    """

    def __init__(self, project: str, name: str, group: str, tags: Sequence[str], config: Mapping[str, Any]) -> None:
        """Start a trackio run; it ends one that is open in this process, of which trackio has one only.

        Args:
            project: the project, shared by everything that is to be compared.
            name: this run's name.
            group: the comparison it belongs to.
            tags: objective, model and seed; trackio keeps them with the settings.
            config: the resolved run; redacted before trackio sees it.

        Raises:
            ConfigError: the package is not installed.
        """
        check_available(["trackio"])
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(
            project=redact_text(project),
            name=redact_text(name),
            group=redact_text(group),
            config=redact({**config, "tags": tags}),
            embed=False,
            auto_log_gpu=False,  # what a machine does besides is no result of the run
            auto_log_cpu=False,
        )
        self._step = 0

    def log(self, row: Row) -> None:
        """Keep one event at the row's optimiser step; a key "step" would be renamed, and none is given."""
        self._step = int(row["step"])
        self._run.log(_values(row), step=self._step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Keep a trackio Table."""
        import trackio  # pyright: ignore[reportMissingImports]

        self._run.log({name: trackio.Table(columns=list(columns), data=_redacted(rows))}, step=self._step)

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Keep the final numbers as one more row at the last step, for trackio has no summary, and close the run."""
        import trackio  # pyright: ignore[reportMissingImports]

        if summary:
            self._run.log(redact(summary), step=self._step)
        trackio.finish()


def sinks(
    report_to: Sequence[str],
    *,
    folder: Path,
    project: str,
    name: str,
    group: str,
    tags: Sequence[str],
    config: Mapping[str, Any],
    mode: Mode | None = None,
) -> tuple[Sink, ...]:
    """Build the sinks that `report_to` names ("none" is no sink), each wrapped so that it cannot stop a run.

    Raises:
        ConfigError: an unknown name; the message holds the nearest one that exists.
    """
    _check_known(report_to)
    builders: dict[str, Callable[[], Sink]] = {
        "wandb": lambda: WandbSink(folder, project, name, group, tags, config, mode),
        "tensorboard": lambda: TensorboardSink(folder, name, group, tags, config),
        "trackio": lambda: TrackioSink(project, name, group, tags, config),
    }
    return tuple(SafeSink(wanted, builders[wanted], folder) for wanted in report_to if wanted != "none")


def check_available(report_to: Iterable[str]) -> None:
    """Refuse a tracker that cannot be used here; to be called before a run begins. Nothing is imported.

    Raises:
        ConfigError: an unknown name, with the nearest one that exists; or a package that is not installed, with the
            command that installs it.
    """
    wanted = list(report_to)
    _check_known(wanted)
    for name in wanted:
        if name == "none":
            continue
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # without an origin it is a mere folder of that name
            raise ConfigError(
                f"report_to: got {name!r}, which is not installed, expected a tracker that is. Install it with: "
                f"pip install '{_EXTRAS[name]}', or leave it out."
            )


def figures(measures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return measures with their 95 % intervals as flat numbers for `finish`, which trackers can sort and search by.

    Args:
        measures: by name, each with `value`, `low` and `high`, as in summary.json.

    Returns:
        NAME, NAME/low and NAME/high for each.
    """
    found: dict[str, float] = {}
    for name, one in measures.items():
        found |= {name: one["value"], f"{name}/low": one["low"], f"{name}/high": one["high"]}
    return found


def _check_known(report_to: Iterable[str]) -> None:
    for name in report_to:
        if name not in TRACKERS:
            raise ConfigError(
                f"report_to: got {name!r}, expected some of {', '.join(TRACKERS)}.{nearest(name, TRACKERS)}"
            )


def _values(row: Row) -> dict[str, int | float | str]:
    """Return a row's metrics; the optimiser step is one of them, as train/global_step."""
    return {name: value for name, value in row.items() if name not in ("step", "kind")}


def _redacted(rows: Sequence[Sequence[Cell]]) -> list[Any]:
    return [[redact_text(one) if isinstance(one, str) else one for one in row] for row in rows]


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested settings by dotted key, each as a value that HPARAMS takes."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _dotted(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float) else str(value)
    return found


def _cell(value: Cell) -> str:
    """Return a cell that Markdown shows as it is, in one line of source."""
    return "" if value is None else str(value).translate(_PLAIN)


def _wandb_mode() -> Mode:
    """WANDB_MODE, else online where there is a key in the environment or in netrc, else offline.

    wandb is not asked: its login answers only after writing the user's settings file and calling its server.
    """
    given = os.environ.get("WANDB_MODE")
    if given in ("online", "offline", "disabled"):
        return given
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname
    try:
        known = netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts
    except (OSError, NetrcParseError) as error:
        _log.debug("no wandb key in netrc: %s", error)
        return "offline"
    return "online" if known.keys() & ({server} if server else _WANDB_SERVERS) else "offline"
