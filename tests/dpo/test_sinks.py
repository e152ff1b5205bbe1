"""Sinks may fail without the run noticing, and are told no secret."""

import json
import logging
import math
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dpo.errors import ConfigError
from dpo.metrics import AXES, Ledger, Row, read
from dpo.sinks import SafeSink, Sink, _wandb_mode, sinks

HF_SECRET = "hf_PlantedAbCdEfGhIjKlMnOpQrStUvWxYz12"
SK_SECRET = "sk-planted-0123456789abcdef"
HEX_SECRET = "0123456789abcdef0123456789abcdef01234567"


class Flaky:
    """Fails from its nth row on; closing it may fail as well."""

    def __init__(self, fail_at: int = 10**9, fail_on_close: bool = False) -> None:
        self.fail_at, self.fail_on_close = fail_at, fail_on_close
        self.rows: list[Row] = []
        self.closed = 0

    def log(self, row: Row) -> None:
        if len(self.rows) + 1 >= self.fail_at:
            raise ConnectionError(f"no route to host, key {HF_SECRET}")
        self.rows.append(row)

    def finish(self, summary: Mapping[str, int | float | str]) -> None:
        self.closed += 1
        if self.fail_on_close:
            raise ConnectionError("still no route")


@pytest.mark.parametrize("fail_on_close", [False, True])
def test_a_sink_that_raises_is_reported_once_and_closed_and_the_ledger_is_complete(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fail_on_close: bool
) -> None:
    flaky = Flaky(fail_at=3, fail_on_close=fail_on_close)
    sink, ledger = SafeSink("flaky", lambda: flaky), Ledger(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            sink.log(ledger.append(step, "train", {"train/loss": 1.0}))
        sink.finish({})
    assert len(read(tmp_path / "metrics.jsonl")) == 5
    assert (len(flaky.rows), flaky.closed) == (2, 1)
    (record,) = caplog.records
    assert "flaky failed" in record.getMessage()
    assert "no route to host, key [redacted]" in record.getMessage()


def test_a_sink_that_cannot_be_built_is_reported_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    def build() -> Flaky:
        raise RuntimeError("no key")

    sink = SafeSink("flaky", build)
    sink.log({"step": 1, "kind": "train"})
    sink.finish({})
    assert len(caplog.records) == 1


def test_an_interrupt_passes_through_a_sink() -> None:
    class Interrupted(Flaky):
        def log(self, row: Row) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SafeSink("interrupted", Interrupted).log({"step": 1, "kind": "train"})


def test_a_working_sink_gets_every_row_and_the_summary() -> None:
    inner = Flaky()
    sink = SafeSink("inner", lambda: inner)
    sink.log({"step": 1, "kind": "train"})
    sink.finish({"eval/win_rate": 0.5})
    assert (inner.rows, inner.closed) == ([{"step": 1, "kind": "train"}], 1)


def build(report_to: list[str], folder: Path, **changes: object) -> tuple[Sink, ...]:
    arguments = {"folder": folder, "project": "p", "name": "n", "group": "g", "tags": ["dpo", "seed0"], "config": {}}
    return sinks(report_to, **(arguments | changes))  # pyright: ignore[reportArgumentType]


def test_sinks_are_chosen_by_closed_names(tmp_path: Path) -> None:
    assert build(["none"], tmp_path) == build([], tmp_path) == ()
    with pytest.raises(ConfigError, match=r"report_to: got 'wandbb', expected some of wandb, none\. Did you mean 'wan"):
        build(["none", "wandbb"], tmp_path)


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


@pytest.mark.network  # wandb's own service process listens on a socket of this machine
@pytest.mark.enable_socket
def test_an_offline_wandb_run_holds_rows_axes_and_config_but_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HF_TOKEN", HF_SECRET)
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--token={SK_SECRET}"])
    config = {
        "objective": {"kind": "dpo", "beta": 0.1},
        "hf_token": "plain-planted",
        "notes": f"{HF_SECRET} {HEX_SECRET}",
    }
    dice = random.getstate()
    (sink,) = build(["wandb"], tmp_path / "out", config=config, tags=["dpo", f"key {SK_SECRET}"])
    ledger = Ledger(tmp_path / "out")
    for step, win_rate in ((10, 0.25), (20, 0.75), (20, 0.5)):
        sink.log(ledger.append(step, "train", {"train/loss": 1 / step, "train/examples_seen": 8 * step}))
        sink.log(ledger.append(step, "eval", {"eval/win_rate": win_rate, "eval/loss": math.nan}))
    sink.finish({"train/tokens_seen": 4096, "api_key": "plain-planted"})
    ledger.close()
    assert random.getstate() == dice  # a sink draws nothing from the run's random numbers
    assert not [record for record in caplog.records if record.name == "dpo.sinks"], caplog.text

    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    command = ["wandb", "leet", "inspect", "--json", str(run)]
    program = [sys.executable, "-m", *command]
    shown = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    of_kind = {kind: [one[kind] for one in records if one["type"] == kind] for kind in ("run", "history", "metric")}

    rows = [{key: value for key, value in one["item"].items() if key[0] != "_"} for one in of_kind["history"]]
    assert len(rows) == 6
    assert rows[0] == {"train/loss": 0.1, "train/examples_seen": 80, "train/global_step": 10}
    assert rows[3] == {"eval/win_rate": 0.75, "eval/loss": "NaN", "train/global_step": 20}

    defined = {one.get("name") or one["glob_name"]: one for one in of_kind["metric"]}
    assert defined["*"]["step_metric"] == "train/global_step"
    assert all("step_metric" not in defined[axis] for axis in AXES)
    assert defined["eval/win_rate"]["summary"] == {"last": True, "max": True}
    assert defined["eval/loss"]["summary"] == {"last": True, "min": True}

    (header,) = (one for one in of_kind["run"] if "project" in one)
    assert (header["project"], header["run_group"], header["display_name"]) == ("p", "g", "n")
    assert header["tags"] == ["dpo", "key [redacted]"]
    kept = {key: value for key, value in header["config"]["update"].items() if key != "_wandb"}
    assert kept == {
        "objective": {"kind": "dpo", "beta": 0.1},
        "hf_token": "[redacted]",
        "notes": "[redacted] [redacted]",
    }

    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(written) >= 4
    for file in written:
        data = file.read_bytes()
        for secret in (HF_SECRET, SK_SECRET, HEX_SECRET, "plain-planted"):
            assert secret.encode() not in data, f"{secret} is in {file.relative_to(tmp_path)}"
