"""From a notebook: a few lines train, compare, measure and show what came out."""

import html
import inspect
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dpo
from dpo import ConfigError, DataError, Message, Preference, Wanted, api
from dpo.api import Compared, card, chat, compare, evaluate, export, train
from dpo.data import check
from dpo.run import Result

Settings = dict[str, Any]


@pytest.fixture
def small(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a run of a second on the tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32", "device": "cpu", "layout": "padded"},
        "loop": {"max_steps": 1},
        "evaluation": {"max_prompts": 1, "max_new_tokens": 2},
        "data.eval_share": 0.25,
    }


def records(count: int = 16) -> list[Preference]:
    return [
        Preference(
            prompt=(Message("user", f"What of number {i}?"),),
            completions=(f"It is good, {i} times.", f"A bad answer {i}."),
            scores=(1.0, 0.0),
            agreement=0.75,
            group="<script>us</script>",
            source=f"notebook:{i}",
        )
        for i in range(count)
    ]


def test_records_are_trained_on_and_the_run_can_be_trained_again_from_its_file(small: Settings) -> None:
    result = train("dpo", data=records(), **small)
    assert isinstance(result, Result)
    assert result.summary["steps"] == 1
    kept = Path(result.run.data.train)
    assert re.fullmatch(r"runs/data-[0-9a-f]{8}\.jsonl", str(kept))
    checked = check(result.run.data)
    trained_on = [*checked.train, *checked.eval]
    assert {(one.prompt, one.completions, one.scores, one.agreement, one.group) for one in trained_on} == {
        (one.prompt, one.completions, one.scores, one.agreement, one.group) for one in records()
    }
    stamp = kept.stat().st_mtime_ns
    again = train("dpo", data=records(), **small)
    assert kept.stat().st_mtime_ns == stamp  # the same rows are the same file
    assert again.folder.name == f"{result.folder.name}-2"


def test_files_rows_and_settings_are_data_as_well(small: Settings, pairs_file: Callable[..., Path]) -> None:
    file = pairs_file(Path("pairs.jsonl"), prompts=12)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    hashes = {
        train("dpo", data=data, **small, **{"output.dir": f"run{n}"}).summary["measures"]["eval/pair/margin"]["value"]
        for n, data in enumerate((file, rows, {"train": "pairs.jsonl"}))
    }
    assert len(hashes) == 1


def test_the_last_stage_is_returned_and_overrides_are_nested_or_dotted(small: Settings) -> None:
    result = train("sft_dpo", data=records(), **small, **{"dpo.objective.beta": 0.3, "model.lora.r": 4})
    assert (result.run.name, result.run.objective.build().beta) == ("dpo", 0.3)  # pyright: ignore[reportAttributeAccessIssue]
    assert result.run.model.lora is not None
    assert (result.run.model.lora.r, result.run.model.dtype) == (4, "float32")
    assert (result.folder.parent / "1-sft" / "summary.json").is_file()


def test_faults_are_the_same_clear_errors(small: Settings) -> None:
    with pytest.raises(DataError, match="data: got no rows"):
        train("dpo", data=[])
    with pytest.raises(DataError, match=r"data, row 2: .*expected text"):
        train("dpo", data=[{"prompt": "a"}, {"prompt": object()}])
    with pytest.raises(ConfigError, match="Did you mean 'ipo'"):
        train("ipoo", data="pairs.jsonl")
    with pytest.raises(ConfigError, match=r"'loop\.max_steps'"):
        train("dpo", data=records(), **{"loop.max_step": 1})
    with pytest.raises(ConfigError, match=r"expected a list of names such as \['dpo', 'ipo'\]"):
        compare("dpo")
    assert not list(Path().glob("runs/dpo*"))


def test_a_result_shows_its_measures_with_intervals_and_escapes(small: Settings) -> None:
    result = train("dpo", data=records(), **small, name="x")
    shown = result._repr_html_()
    for name, one in result.summary["measures"].items():
        cells = f"<td>{one['value']:.3f}</td><td>{one['low']:.3f} to {one['high']:.3f}</td><td>{one['n']}</td>"
        assert f"<td>{name}</td>{cells}" in shown
    assert "<script" not in shown
    assert "Group &lt;script&gt;us&lt;/script&gt;" in shown
    assert str(result.folder) in shown


@pytest.mark.slow
def test_a_comparison_shows_its_page_in_a_frame_of_its_own(small: Settings) -> None:
    compared = compare(["dpo"], data=records(), completions=2, output="out", **small | {"loop": {}})
    assert isinstance(compared, Compared)
    assert [one.name for one in compared.comparison.entries] == ["dpo"]
    assert compared.folder == Path("out")
    shown = compared._repr_html_()
    (inside,) = re.findall(r'<iframe[^>]* sandbox srcdoc="([^"]*)"', shown)
    assert html.unescape(inside) == (compared.folder / "report.html").read_text(encoding="utf-8")


def test_a_comparison_is_asked_for_as_on_the_command_line(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Wanted, Path | None]] = []
    monkeypatch.setattr("dpo.api.run_comparison", lambda *given: (asked.append(given), Path("x")))
    judge = {"base_url": "http://localhost:1/v1", "model": "m"}
    compare(["dpo", "ipo"], seeds=2, seconds=5, tune=3, judge=judge, **{"objective.beta": 0.3})
    ((wanted, place),) = asked
    assert (wanted.objectives, wanted.seeds, wanted.completions, wanted.seconds) == (("dpo", "ipo"), 2, None, 5)
    assert (wanted.tune, wanted.judge and wanted.judge.model, place) == (3, "m", None)
    assert wanted.overrides == {"objective": {"beta": 0.3}}  # no data: the embedded task


def test_one_result_is_measured_talked_to_exported_and_described(small: Settings) -> None:
    result = train("dpo", data=records(), **small)
    assert evaluate(result.folder).summary["measures"] == result.summary["measures"]
    assert [one.side for one in chat(result, max_new_tokens=2).say("hi")] == ["start", "trained"]
    assert export(result.folder, "out").folder == Path("out")
    assert card(result, force=True) == result.folder / "README.md"


def test_every_public_name_is_there_and_imported_on_first_use() -> None:
    for name in dpo.__all__:
        assert getattr(dpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dpo.nothing  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_the_lines_of_the_readme_call_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```py\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    called: list[str] = []

    def bound(name: str) -> Callable[..., Any]:
        signature = inspect.signature(getattr(api, name))

        def call(*given: Any, **named: Any) -> Any:
            signature.bind(*given, **named)
            called.append(name)
            return SimpleNamespace(folder=Path("run"), say=lambda text: text)

        return call

    for name, call in {name: bound(name) for name in ("train", "chat", "export", "compare")}.items():
        monkeypatch.setattr(api, name, call)
    exec(lines, {})
    assert called == ["train", "chat", "export", "compare"]


@pytest.mark.parametrize("notebook", [False, True])
def test_in_a_notebook_the_log_speaks_and_the_libraries_never(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], notebook: bool
) -> None:
    log = logging.Logger("dpo", logging.WARNING)
    monkeypatch.setattr(api, "log", log)
    monkeypatch.setattr(api, "in_notebook", lambda: notebook)
    quiet: list[bool] = []
    monkeypatch.setattr(api, "quiet_libraries", lambda: quiet.append(True))
    for _ in range(2):  # said once, however often it is called
        with pytest.raises(ConfigError):
            compare("dpo")
        log.info("step 1 of 2")
    assert capsys.readouterr().out == ("step 1 of 2\n" * 2 if notebook else "")
    assert quiet == [True, True]
