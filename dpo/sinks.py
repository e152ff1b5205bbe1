"""Where the ledger's rows are shown beside it: Weights & Biases, or nowhere.

Sinks are copies of the ledger of `dpo.metrics`, which is the truth: one that fails costs the run nothing. What leaves
the run through them is redacted first.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, final
from urllib.parse import urlsplit

from dpo.errors import ConfigError, nearest
from dpo.metrics import AXES, METRICS, METRICS_FILE, Row
from dpo.redact import redact, redact_text

Mode: TypeAlias = Literal["online", "offline", "disabled"]

_WANDB_SERVERS = {"api.wandb.ai", "api.forge.coreweave.com"}  # wandb's own, before and since version 0.31
_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Somewhere to show the rows. It may raise: `SafeSink` keeps that away from the run."""

    def log(self, row: Row) -> None:
        """Show one event, the return value of `Ledger.append`."""
        ...

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Add the run's final numbers and close."""
        ...


@final
class SafeSink:
    """A sink that cannot fail: the first exception is reported once, and the sink is closed and left alone."""

    def __init__(self, name: str, build: Callable[[], Sink]) -> None:
        """Build the sink; also a failing `build` is only reported."""
        self._name = name
        self._sink: Sink | None = None
        try:
            self._sink = build()
        except Exception as error:
            self._report(error)

    def log(self, row: Row) -> None:
        """Show one event, or do nothing once the sink has failed."""
        self._attempt(lambda sink: sink.log(row))

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Close the sink, or do nothing once it has failed."""
        self._attempt(lambda sink: sink.finish(summary))

    def _attempt(self, action: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            action(self._sink)
        except Exception as error:
            broken, self._sink = self._sink, None
            self._report(error)
            try:
                broken.finish({})
            except Exception as again:
                _log.debug("%s could not be closed either: %r", self._name, again)

    def _report(self, error: Exception) -> None:
        _log.warning(
            "%s failed and is off for the rest of the run; the run goes on and %s is complete: %s: %s",
            self._name,
            METRICS_FILE,
            type(error).__name__,
            redact_text(str(error)),
        )


@final
class WandbSink:
    """Weights & Biases: one log call per event, never its own step, offline where there is no key.

    `train/global_step` is in every row and is the x-axis, so that the parts of a resumed run join. Of the evaluation
    metrics that have a better direction the summary holds the last value and the best one.
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
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            dir=folder.resolve(),  # its service process may stand in another folder
            project=redact_text(project),
            name=redact_text(name),
            group=redact_text(group),
            tags=[redact_text(tag) for tag in tags],
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
        for axis in AXES:
            self._run.define_metric(axis)
        for metric in METRICS.values():
            if metric.better is not None and metric.name.startswith("eval/"):
                best = "max" if metric.better == "higher" else "min"
                self._run.define_metric(metric.name, step_metric="train/global_step", summary=f"last,{best}")

    def log(self, row: Row) -> None:
        """Send one event in one call."""
        values = {name: value for name, value in row.items() if name not in ("step", "kind")}
        self._run.log({**values, "train/global_step": row["step"]})

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        """Add the final numbers to the summary and close the run; blocks until wandb has written them."""
        self._run.summary.update(redact(summary))
        self._run.finish()


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
    """Build the sinks that `report_to` names ("wandb"; "none" is no sink), each wrapped so that it cannot stop a run.

    Raises:
        ConfigError: an unknown name; the message holds the nearest one that exists.
    """
    builders: dict[str, Callable[[], Sink] | None] = {
        "wandb": lambda: WandbSink(folder, project, name, group, tags, config, mode),
        "none": None,
    }
    for wanted in report_to:
        if wanted not in builders:
            raise ConfigError(
                f"report_to: got {wanted!r}, expected some of {', '.join(builders)}.{nearest(wanted, builders)}"
            )
    return tuple(SafeSink(wanted, build) for wanted in report_to if (build := builders[wanted]) is not None)


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
