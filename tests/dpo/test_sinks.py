"""Sinks may fail without the run noticing, are told no secret, and all show the same names.

What they wrote is read back from their own files.
"""

import html
import json
import logging
import math
import random
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dpo.errors import ConfigError
from dpo.estimates import Estimate
from dpo.metrics import AXES, METRICS, Ledger, Row, read
from dpo.sinks import (
    SAMPLE_COLUMNS,
    SAMPLES,
    Cell,
    SafeSink,
    Sink,
    _wandb_mode,
    check_available,
    figures,
    sinks,
)

HF_SECRET = "hf_PlantedAbCdEfGhIjKlMnOpQrStUvWxYz12"
SK_SECRET = "sk-planted-0123456789abcdef"
HEX_SECRET = "0123456789abcdef0123456789abcdef01234567"


class Flaky:
    """Fails from its nth row on; closing it may fail as well."""

    def __init__(self, fail_at: int = 10**9, fail_on_close: bool = False) -> None:
        self.fail_at, self.fail_on_close = fail_at, fail_on_close
        self.rows: list[Row] = []
        self.tables: list[tuple[object, ...]] = []
        self.closed = 0

    def log(self, row: Row) -> None:
        if len(self.rows) + 1 >= self.fail_at:
            raise ConnectionError(f"no route to host, key {HF_SECRET}")
        self.rows.append(row)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        if self.fail_on_close:
            raise ConnectionError("no route for tables either")
        self.tables.append((name, columns, rows))

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        self.closed += 1
        if self.fail_on_close:
            raise ConnectionError("still no route")


@pytest.mark.faults
@pytest.mark.parametrize("fail_on_close", [False, True])
def test_a_sink_that_raises_is_reported_and_closed_and_the_ledger_is_complete(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fail_on_close: bool
) -> None:
    flaky = Flaky(fail_at=3, fail_on_close=fail_on_close)
    sink, ledger = SafeSink("flaky", lambda: flaky, tmp_path), Ledger(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            sink.log(ledger.append(step, "train", {"train/loss": 1.0}))
        assert (len(flaky.rows), flaky.closed) == (2, 1)
        sink.finish({})  # once more, in vain
    assert len(read(tmp_path / "metrics.jsonl")) == 5
    assert (len(flaky.rows), flaky.closed) == (2, 2)
    first, last = (record.getMessage() for record in caplog.records)
    assert "flaky failed and is left alone until the run ends" in first
    assert "flaky failed and is left alone for good" in last
    assert all("no route to host, key [redacted]" in one for one in (first, last))


@pytest.mark.faults
@pytest.mark.parametrize("broken", ["from the start", "on the way", "at a table"])
def test_what_a_sink_missed_is_shown_at_the_end_from_the_ledger(tmp_path: Path, broken: str) -> None:
    """Whatever fails, it is back at the end: between the two, or three, of them every row is there once."""
    made: list[Flaky] = []

    def build() -> Flaky:
        if broken == "from the start" and not made:
            made.append(Flaky())
            raise ConnectionError("no route")
        at_a_table = broken == "at a table" and not made
        made.append(Flaky(fail_at=3 if broken == "on the way" and not made else 10**9, fail_on_close=at_a_table))
        return made[-1]

    sink, ledger, kept = SafeSink("flaky", build, tmp_path), Ledger(tmp_path), []
    for step in range(5):
        for kind in ("train", "eval"):
            kept.append(ledger.append(step, kind, {"train/loss": float(step), "time/seconds": 2.0 * step}))
            sink.log(kept[-1])
    sink.table("samples", ["prompt"], [["a"]])
    sink.finish({"eval/win_rate": 0.5})
    first, second = made
    assert first.rows + second.rows == kept
    assert len(first.rows) == {"from the start": 0, "on the way": 2, "at a table": 10}[broken]
    assert (first.tables, second.tables) == ([], [("samples", ["prompt"], [["a"]])])
    assert second.closed == 1


def test_a_sink_that_cannot_be_built_is_reported_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    def build() -> Flaky:
        raise RuntimeError("no key")

    sink = SafeSink("flaky", build, Path())
    sink.log({"step": 1, "kind": "train"})
    sink.finish({})
    assert len(caplog.records) == 2  # at the start and once more at the end


def test_an_interrupt_passes_through_a_sink() -> None:
    class Interrupted(Flaky):
        def log(self, row: Row) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SafeSink("interrupted", Interrupted, Path()).log({"step": 1, "kind": "train"})


def test_a_working_sink_gets_every_row_and_the_summary(tmp_path: Path) -> None:
    inner = Flaky()
    sink = SafeSink("inner", lambda: inner, tmp_path)
    sink.log({"step": 1, "kind": "train"})
    sink.table("samples", ["prompt"], [["a"]])
    sink.finish({"eval/win_rate": 0.5})
    assert (inner.rows, inner.closed) == ([{"step": 1, "kind": "train"}], 1)
    assert inner.tables == [("samples", ["prompt"], [["a"]])]


def test_a_table_that_fails_is_reported_and_costs_the_run_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Flaky(fail_on_close=True)
    sink = SafeSink("inner", lambda: inner, tmp_path)
    sink.table("samples", ["prompt"], [["a"]])
    sink.finish({})
    assert (inner.closed, len(caplog.records)) == (2, 2)
    assert caplog.text.count("no route for tables either") == 2


def build(report_to: list[str], folder: Path, **changes: object) -> tuple[Sink, ...]:
    arguments = {"folder": folder, "project": "p", "name": "n", "group": "g", "tags": ["dpo", "seed0"], "config": {}}
    return sinks(report_to, **(arguments | changes))  # pyright: ignore[reportArgumentType]


def test_sinks_are_chosen_by_closed_names(tmp_path: Path) -> None:
    assert build(["none"], tmp_path) == build([], tmp_path) == ()
    known = r"report_to: got 'wandbb', expected some of wandb, tensorboard, trackio, none\. Did you mean 'wandb'\?"
    with pytest.raises(ConfigError, match=known):
        build(["none", "wandbb"], tmp_path)
    with pytest.raises(ConfigError, match=known):
        check_available(["none", "wandbb"])


def test_an_interval_becomes_three_numbers_of_a_summary() -> None:
    assert figures({"eval/gold_reward": asdict(Estimate(0.5, 0.25, 0.75, 32))}) == {
        "eval/gold_reward": 0.5,
        "eval/gold_reward/low": 0.25,
        "eval/gold_reward/high": 0.75,
    }


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_absent_is_refused_before_a_run_and_costs_a_running_one_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    extra = {"wandb": "dpo-lab", "tensorboard": r"dpo-lab\[tensorboard\]", "trackio": r"dpo-lab\[trackio\]"}[name]
    with pytest.raises(ConfigError, match=rf"report_to: got '{name}', which is not .* pip install '{extra}'"):
        check_available(["none", name])
    (sink,) = build([name], tmp_path)
    sink.log({"step": 1, "kind": "train"})
    sink.table("samples", ["prompt"], [["a"]])
    sink.finish({})
    for record in caplog.records:
        assert f"{name} failed and is left alone" in record.getMessage()
        assert "pip install" in record.getMessage()
    assert len(caplog.records) == 2


def test_a_folder_of_a_trackers_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="'trackio', which is not installed"):
        check_available(["trackio"])


def test_trackers_that_are_there_pass() -> None:
    check_available(["none", "wandb"])


def test_wandb_is_offline_without_a_key_and_online_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert _wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("not a netrc file")
    assert _wandb_mode() == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {HEX_SECRET}\n")
    assert _wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert _wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", HEX_SECRET)
    assert _wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert _wandb_mode() == "disabled"


CONFIG = {
    "objective": {"kind": "dpo", "beta": 0.1},
    "model": {"adapter": None},
    "hf_token": "plain-planted",
    "notes": f"{HF_SECRET} {HEX_SECRET}",
}
KEPT = {
    "objective": {"kind": "dpo", "beta": 0.1},
    "model": {"adapter": None},
    "hf_token": "[redacted]",
    "notes": "[redacted] [redacted]",
}
TAGS = ["dpo", f"key {SK_SECRET}", "/models/" + "a" * 60]
ANSWERS: list[list[Cell]] = [
    ["Say <b>hi</b> | *now*", f"hi\n{HF_SECRET}", 0.5, 3, -1.25],
    ["Say no", "", None, 0, 0.0],
]
SHOWN = [["Say <b>hi</b> | *now*", "hi\n[redacted]", 0.5, 3, -1.25], ["Say no", "", None, 0, 0.0]]
SUMMARY = {**figures({"eval/gold_reward": {"value": 0.5, "low": 0.25, "high": 0.75}}), "train/tokens_seen": 4096}


def axes(step: int) -> dict[str, float]:
    """What the loop puts into every row."""
    seen = {"train/examples_seen": 8 * step, "train/tokens_seen": 100 * step, "time/seconds": step / 2}
    return {"train/global_step": step, **seen}


def track(name: str, folder: Path, caplog: pytest.LogCaptureFixture, **changes: object) -> list[dict[str, Any]]:
    """Send a run through a sink; return what each row of its history must hold."""
    dice = random.getstate()
    (sink,) = build([name], folder, **({"config": CONFIG, "tags": TAGS} | changes))
    ledger, sent = Ledger(folder), []
    for step, win_rate in ((10, 0.25), (20, 0.75), (20, 0.5)):
        for kind, values in (
            ("train", {"train/loss": 1 / step, **axes(step)}),
            ("eval", {"eval/win_rate": win_rate, "eval/loss": math.nan, **axes(step)}),
        ):
            sink.log(ledger.append(step, kind, values))  # pyright: ignore[reportArgumentType]
            sent.append(values)
    sink.table(SAMPLES, SAMPLE_COLUMNS, ANSWERS)
    sink.finish({**SUMMARY, "api_key": "plain-planted"})
    ledger.close()
    assert random.getstate() == dice  # a sink draws nothing from the run's random numbers
    assert not [record for record in caplog.records if record.name == "dpo.sinks"], caplog.text
    return sent


def refuse_secrets(folder: Path, least: int) -> None:
    written = [file for file in folder.rglob("*") if file.is_file()]
    assert len(written) >= least
    for file in written:
        data = file.read_bytes()
        for secret in (HF_SECRET, SK_SECRET, HEX_SECRET, "plain-planted"):
            assert secret.encode() not in data, f"{secret} is in {file.relative_to(folder)}"


def inspect(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the one offline wandb run in `folder` back, by kind of record."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = ["wandb", "leet", "inspect", "--json", str(run)]
    program = [sys.executable, "-m", *command]
    shown = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120)
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    found: dict[str, list[dict[str, Any]]] = {}
    for one in records:
        found.setdefault(one["type"], []).append(one.get(one["type"], {}))
    return found


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):  # tables wait there for `wandb sync`
        monkeypatch.setenv(name, str(tmp_path / "out" / name))
    monkeypatch.setenv("HF_TOKEN", HF_SECRET)
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--token={SK_SECRET}"])


@pytest.mark.network  # wandb's own service process listens on a socket of this machine
@pytest.mark.enable_socket
@pytest.mark.usefixtures("offline")
def test_an_offline_wandb_run_holds_rows_axes_table_summary_and_config_but_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent = track("wandb", tmp_path / "out", caplog)
    records = inspect(tmp_path / "out")

    rows = [{key: value for key, value in one["item"].items() if key[0] != "_"} for one in records["history"]]
    *events, table = rows
    shown = [{key: "NaN" if value != value else value for key, value in row.items()} for row in sent]
    assert events == shown
    assert all(isinstance(row[axis], int | float) for row in events for axis in AXES)  # each can be chosen as x-axis
    assert table["samples._type"] == "table-file"
    assert not [name for name in table if name in METRICS and name != "train/global_step"]
    (stored,) = (tmp_path / "out" / "wandb").rglob("media/table/samples*.table.json")
    assert json.loads(stored.read_text()) == {"columns": list(SAMPLE_COLUMNS), "data": SHOWN}

    defined = {one.get("name") or one["glob_name"]: one for one in records["metric"]}
    assert defined.keys() == {"*", *AXES}
    assert defined["*"]["step_metric"] == "train/global_step"
    assert all("step_metric" not in defined[axis] and "hidden" not in defined[axis]["options"] for axis in AXES)

    summary: dict[str, Any] = {}
    for one in records["summary"]:
        summary |= one["update"]
    assert {name: summary[name] for name in SUMMARY} == SUMMARY
    assert summary["eval/win_rate"] == 0.5  # a number, the last one, as a sweep wants it

    (header,) = (one for one in records["run"] if "project" in one)
    assert (header["project"], header["run_group"], header["display_name"]) == ("p", "g", "n")
    assert header["tags"] == ["dpo", "key [redacted]", "/models/"[-4:] + "a" * 60]  # wandb's limit is 64 characters
    assert {key: value for key, value in header["config"]["update"].items() if key != "_wandb"} == KEPT
    refuse_secrets(tmp_path / "out", least=5)


def test_tensorboard_files_hold_the_same_names_and_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html
    from tensorboard.plugins.hparams import metadata

    sent = track("tensorboard", tmp_path, caplog)
    stored = EventAccumulator(str(tmp_path / "tensorboard"))
    stored.Reload()

    names = {name for row in sent for name in row}
    assert {*stored.Tags()["scalars"]} == names | SUMMARY.keys()
    for name in names - SUMMARY.keys():
        expected = [(int(row["train/global_step"]), row[name]) for row in sent if name in row]
        found = [(one.step, one.value) for one in stored.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], nan_ok=True)
    for name, value in SUMMARY.items():
        assert (stored.Scalars(name)[-1].step, stored.Scalars(name)[-1].value) == (20, value)

    texts = {
        name: stored.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0] for name in (SAMPLES, "settings")
    }
    assert json.loads(texts["settings"].decode().strip("`json\n")) == KEPT
    page = markdown_to_safe_html(texts[SAMPLES].decode())  # as its tab TEXT does
    assert page.count("<tr>") == 3
    assert "<b>" not in page
    assert "<td>Say <b>hi</b> | *now*</td>" in html.unescape(page)
    assert "<td>hi<br>[redacted]</td>" in html.unescape(page)

    starts = metadata.parse_session_start_info_plugin_data(
        stored.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    assert {name: one.string_value or one.number_value for name, one in starts.hparams.items()} == {
        "name": "n",
        "group": "g",
        "tags": ", ".join(["dpo", "key [redacted]", TAGS[2]]),
        "objective.kind": "dpo",
        "objective.beta": 0.1,
        "model.adapter": "None",
        "hf_token": "[redacted]",
        "notes": "[redacted] [redacted]",
    }
    refuse_secrets(tmp_path, least=3)


def test_trackios_database_holds_the_same_names_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # counts where this is its first import
    monkeypatch.setenv("HF_TOKEN", HF_SECRET)
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_STORAGE_MODE"):
        monkeypatch.delenv(name, raising=False)
    pytest.importorskip("trackio", reason="needs the extra trackio")
    from trackio.utils import TRACKIO_DIR

    watched: list[object] = []  # monitors that were started
    for monitor in ("CpuMonitor", "GpuMonitor"):
        monkeypatch.setattr(f"trackio.run.{monitor}.start", lambda self: watched.append(self))
    for place in ("trackio", "trackio.run"):
        monkeypatch.setattr(f"{place}.gpu_available", lambda: True)
    project = tmp_path.name  # another one each time: the folder may be shared
    sent = track("trackio", tmp_path / "out", caplog, project=project)
    with closing(sqlite3.connect(TRACKIO_DIR / f"{project}.db")) as database:
        stored = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    assert {run for run, _, _ in stored} == {"n"}
    assert not watched

    *events, table, summary = [(step, json.loads(row)) for _, step, row in stored]
    shown = [{key: "NaN" if value != value else value for key, value in row.items()} for row in sent]
    assert events == [(row["train/global_step"], row) for row in shown]
    rows = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in SHOWN]
    assert table == (20, {SAMPLES: {"_type": "trackio.table", "_value": rows}})
    assert summary == (20, {**SUMMARY, "api_key": "[redacted]"})

    kept = {key: value for key, value in json.loads(config).items() if key[0] != "_"}
    assert kept == {**KEPT, "tags": ["dpo", "key [redacted]", TAGS[2]]}
    assert json.loads(config)["_Group"] == "g"
    refuse_secrets(TRACKIO_DIR, least=1)
