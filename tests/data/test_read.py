"""Files of every kind, and the exact place of every fault."""

import gzip
import json
from pathlib import Path

import pytest

from dpo.data import read
from dpo.errors import DataError

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b ü", "n": 2}]


def values(path: Path | str) -> list[dict]:
    return [dict(row.values) for row in read(str(path))]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class TestKinds:
    def test_json_lines_plain_packed_and_with_a_byte_order_mark(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(lines(ROWS), encoding="utf-8")
        (tmp_path / "b.jsonl").write_text(lines(ROWS), encoding="utf-8-sig")
        (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
        assert values(tmp_path / "a.jsonl") == values(tmp_path / "b.jsonl") == values(tmp_path / "c.jsonl.gz") == ROWS

    def test_sources_count_lines_from_one_and_blank_lines_too(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"n": 1}\r\n\r\n{"n": 2}', encoding="utf-8")
        assert [row.source for row in read(str(path))] == [f"{path}:1", f"{path}:3"]

    def test_a_line_separator_inside_a_text_is_no_line_end(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"n": "x\u2028y\x85z"}\n', encoding="utf-8")
        assert values(path) == [{"n": "x\u2028y\x85z"}]

    def test_json_arrays_know_their_lines(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
        assert values(path) == ROWS
        assert [row.source for row in read(str(path))] == [f"{path}:2", f"{path}:6"]

    def test_a_json_file_may_hold_json_lines(self, tmp_path):
        (tmp_path / "a.json").write_text(lines(ROWS), encoding="utf-8")
        assert values(tmp_path / "a.json") == ROWS

    def test_csv_with_quoted_line_ends(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text('prompt,n\n"a\nb",1\n"c, d",2\n', encoding="utf-8")
        assert [(dict(r.values), r.source) for r in read(str(path))] == [
            ({"prompt": "a\nb", "n": "1"}, f"{path}:2"),
            ({"prompt": "c, d", "n": "2"}, f"{path}:4"),
        ]

    def test_parquet(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        assert values(path) == ROWS
        assert [row.source for row in read(str(path))] == [f"{path}:1", f"{path}:2"]

    def test_a_text_file_holds_one_prompt_a_line(self, tmp_path):
        path = tmp_path / "prompts.txt"
        path.write_text("Say hello.\n\n  What is a sea? \n", encoding="utf-8")
        assert [(row.values, row.source) for row in read(str(path))] == [
            ({"prompt": "Say hello."}, f"{path}:1"),
            ({"prompt": "What is a sea?"}, f"{path}:3"),
        ]

    def test_limit(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(lines(ROWS), encoding="utf-8")
        assert [row.values["n"] for row in read(str(tmp_path / "a.jsonl"), limit=1)] == [1]


class TestFaults:
    @pytest.mark.parametrize(
        ("name", "content", "place", "what"),
        [
            ("a.jsonl", b'{"n": 1}\n{"n": 2\n', "2:8", "delimiter"),
            ("a.jsonl", b'{"n": 1}\n{"n": 1, "m": 2,  "n": 3}\n', "2:19", "key 'n' twice"),
            ("a.jsonl", b'{"n": "NaN", "m": NaN}\n', "1:19", "got NaN"),
            ("a.jsonl", b'{"n": 1e999}\n', "1:7", "got 1e999"),
            ("a.jsonl", b'{"n": 1}\n  [1]\n', "2:3", "got a list, expected an object"),
            ("a.jsonl", b'{"n": 1} {"n": 2}\n', "1:10", "more text"),
            ("a.jsonl", b'{"n": "\xc3\xbc\xe4"}\n', "1:9", "byte 0xe4"),
            ("a.jsonl", '{"n": 1}\n'.encode("utf-16"), "1:1", "UTF-16"),
            ("a.jsonl", b'{"n": "\\ud800"}\n', "1:1", "surrogate"),
            ("a.jsonl", b'{"n": ' + b"[" * 200_000 + b"\n", "1:1", "nested too deeply"),
            ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}\n", "1:1", "digits"),
            ("a.json", b'[\n {"n": 1},\n {"n" 2}\n]', "3:7", "delimiter"),
            ("a.json", b'[\n {"n": 1}\n {"n": 2}\n]', "3:2", "expected"),
            ("a.json", b'[\n {"n": 1}\n', "3:1", "expected"),
            ("a.json", b'[{"n": 1}]\n[]', "2:1", "more text"),
            ("a.csv", b'a,b\n1,2\n"x\ny",1,2\n', "3:1", "got 3 cells, expected 2"),
            ("a.csv", b"a,a\n1,2\n", "1:1", "column 'a' twice"),
            ("a.csv", b'a,b\n1,"2\n', "2:1", "end of data"),
        ],
    )
    def test_the_place_and_the_fault_are_named(self, tmp_path, name, content, place, what):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError) as raised:
            list(read(str(path)))
        message = str(raised.value)
        assert message.startswith(f"{path}:{place}: ")
        assert what in message

    @pytest.mark.parametrize(
        ("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.json", b"[]"), ("a.csv", b"a,b\n")]
    )
    def test_an_empty_file_is_an_error(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"got an empty file"):
            list(read(str(tmp_path / name)))

    def test_a_damaged_archive_is_named(self, tmp_path):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(lines(ROWS).encode())[:-12])
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: the gzip file is damaged"):
            list(read(str(path)))

    def test_a_damaged_parquet_file_is_named(self, tmp_path):
        pytest.importorskip("pyarrow")
        (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
        with pytest.raises(DataError, match=r"a\.parquet: the Parquet file cannot be read"):
            list(read(str(tmp_path / "a.parquet")))

    def test_an_absent_file_suggests_its_neighbour(self, tmp_path):
        (tmp_path / "train.jsonl").write_text("{}", encoding="utf-8")
        with pytest.raises(DataError, match=r"trian\.jsonl: no such file\. Did you mean 'train\.jsonl'\?"):
            list(read(str(tmp_path / "trian.jsonl")))

    def test_a_folder_and_an_unknown_ending_are_refused(self, tmp_path):
        (tmp_path / "train.jsonl").write_text("{}", encoding="utf-8")
        with pytest.raises(DataError, match=r"got a folder, expected a file. It holds train\.jsonl"):
            list(read(str(tmp_path)))
        (tmp_path / "a.xlsx").write_bytes(b"")
        with pytest.raises(DataError, match=r"got the ending '\.xlsx', expected one of \.jsonl"):
            list(read(str(tmp_path / "a.xlsx")))


class TestHub:
    def test_name_and_split_reach_the_library(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        asked = []

        def load(name: str, split: str) -> list[dict]:
            asked.append((name, split))
            return ROWS

        monkeypatch.setattr(datasets, "load_dataset", load)
        assert [row.source for row in read("owner/set:test_prefs", limit=1)] == ["owner/set:test_prefs:1"]
        assert values("owner/set") == ROWS
        assert asked == [("owner/set", "test_prefs"), ("owner/set", "train")]

    def test_a_network_failure_says_how_to_go_on_without_one(self, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def load(*_: object, **__: object) -> None:
            raise ConnectionError("no route")

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(DataError, match=r"owner/set:train: .*ConnectionError: no route.* local file"):
            list(read("owner/set"))
