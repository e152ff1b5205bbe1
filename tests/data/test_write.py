"""What is written is read again as it was, whole or not at all."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from dpo.data import BadRow, Message, Preference, read, recognise
from dpo.data import write as write_module
from dpo.data.check import inspect
from dpo.data.write import replacing, write
from dpo.errors import DataError

TEXTS = st.text(max_size=12) | st.sampled_from(
    ["\u2028", "\r\n", "\x00", "a\x85b", '"\\', "\N{GRINNING FACE}", "null", "1"]
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
MESSAGES = st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), TEXTS)


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    """Any record that training can use."""
    completions = tuple(draw(st.lists(TEXTS, max_size=4)))
    exact = st.lists(NUMBERS, min_size=len(completions), max_size=len(completions)).map(tuple)
    record = Preference(
        prompt=(*draw(st.lists(MESSAGES, max_size=3)), Message(draw(st.sampled_from(["user", "tool"])), draw(TEXTS))),
        completions=completions,
        scores=draw(st.none() | exact),
        agreement=draw(st.none() | st.floats(0.5, 1)),
        weight=draw(st.floats(0, 1e300)),
        group=draw(st.none() | TEXTS),
        feedback=tuple(draw(st.lists(TEXTS, max_size=2))),
        source="somewhere:1",
    )
    try:
        inspect(record)
    except BadRow:
        reject()
    return record


def read_again(path: Path) -> list[Preference]:
    rows = list(read(str(path)))
    convert = recognise(rows).convert
    return [convert(row) for row in rows]


def content(record: Preference) -> tuple[object, ...]:
    """All of a record but where it comes from."""
    return tuple(getattr(record, name) for name in Preference.__slots__ if name != "source")


def made(count: int, **more: object) -> Iterator[Preference]:
    for n in range(count):
        yield Preference(
            prompt=(Message("user", f"p{n}"),), completions=("a", "b"), scores=(1, 0), source=f"x:{n}", **more
        )


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@settings(max_examples=60, deadline=None)
@given(records=st.lists(preferences(), min_size=1, max_size=4))
def test_any_record_comes_back_as_it_was(ending, records):
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"out{ending}"
        assert write(records, path) == len(records)
        assert [content(one) for one in read_again(path)] == [content(one) for one in records]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_the_place_each_record_came_from_is_kept(tmp_path, ending):
    path = tmp_path / f"out{ending}"
    write(made(3), path)
    assert [row.values["source"] for row in read(str(path))] == ["x:0", "x:1", "x:2"]


def test_records_are_written_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "_BATCH", 2)
    write(made(5), tmp_path / "out.parquet")
    groups = pyarrow.parquet.ParquetFile(tmp_path / "out.parquet").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [2, 2, 1]


def test_texts_stand_in_the_file_as_people_write_them(tmp_path):
    write(made(1, group="Zo\u00eb"), tmp_path / "out.jsonl")
    assert "Zo\u00eb" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert list(json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))) == [
        *("prompt", "completions", "scores", "agreement", "weight", "group", "feedback", "source")
    ]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_half_way_leaves_all_as_it_was(tmp_path, ending, there, monkeypatch):
    monkeypatch.setattr(write_module, "_BATCH", 2)
    path = tmp_path / f"out{ending}"
    if there:
        path.write_bytes(b"old")

    def failing() -> Iterator[Preference]:
        yield from made(5)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write(failing(), path, force=True)
    assert [one.name for one in tmp_path.iterdir()] == ([path.name] if there else [])
    assert not there or path.read_bytes() == b"old"


def test_a_full_disk_is_said_with_the_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with (
        pytest.raises(DataError, match=r"out\.jsonl: cannot be written \(No space left on device\)\. Make room"),
        replacing(path),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.csv", r"got the ending '\.csv', expected \.jsonl or \.parquet"),
        ("out", "got the ending ''"),
        ("there.jsonl", r"is there already.*--force"),
        ("folder.jsonl", "is a folder"),
        ("absent/out.jsonl", "does not exist"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_anything_is_read(tmp_path, name, words):
    (tmp_path / "there.jsonl").write_text("old")
    (tmp_path / "folder.jsonl").mkdir()

    def unread() -> Iterator[Preference]:
        raise AssertionError("a record was asked for")
        yield

    with pytest.raises(DataError, match=words):
        write(unread(), tmp_path / name)
    assert (tmp_path / "there.jsonl").read_text() == "old"


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(write_module.os, "access", lambda *_: False)
    with pytest.raises(DataError, match="cannot be written to"):
        write(made(1), tmp_path / "out.jsonl")


def test_a_file_is_replaced_where_asked_for(tmp_path):
    (tmp_path / "out.jsonl").write_text("old")
    assert write(made(2), tmp_path / "out.jsonl", force=True) == 2
    assert len(read_again(tmp_path / "out.jsonl")) == 2


def test_no_number_is_written_that_json_lacks(tmp_path):
    record = next(made(1))
    object.__setattr__(record, "weight", math.inf)
    with pytest.raises(ValueError, match="JSON"):
        write([record], tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []
