"""Whatever a file holds, reading it ends in rows, in records or in the documented error: in no other, and in time.

200 inputs each by default, 10,000 (of whole files of rows 2,000) with `pytest -m "faults and slow"`.
"""

import gzip
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo.data import DataConfig, check
from dpo.data.check import BadRow, inspect
from dpo.data.formats import FORMATS
from dpo.data.limits import bounded
from dpo.data.read import Row, read
from dpo.data.recognise import recognise
from dpo.errors import DataError, DPOError

pytestmark = pytest.mark.faults

EXAMPLES = [200, pytest.param(10_000, marks=pytest.mark.slow)]
FEWER = [50, pytest.param(2_000, marks=pytest.mark.slow)]  # of what takes longer, and whose parts are tried above
SECONDS, MEMORY = 5.0, 2**31  # of one input; each is a few hundred bytes
COLUMNS = sorted({name for one in FORMATS for names in (*one.columns, one.optional) for name in names})

Attempt = Callable[[Any], None]


def fuzz(examples: int, inputs: st.SearchStrategy[Any], attempt: Attempt) -> None:
    """Try so many inputs, each within bounds; the same ones every time."""

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(inputs)
    def hold(given: Any) -> None:
        with bounded(SECONDS, MEMORY):
            attempt(given)

    hold()


def refused(call: Callable[[], object], kind: type[DPOError]) -> str:
    """Return the message of the one kind of error that the call may end in, "" where it ends well."""
    try:
        call()
    except kind as error:
        return str(error) or "an error without a word"
    return ""


# --- what is tried --------------------------------------------------------------------------------------------------

text = st.text(max_size=8) | st.sampled_from(
    ["", " ", "a", "\n\nHuman: a\n\nAssistant: b", "[]", "{}", "1", "null", "\\"]
)
number = st.integers(-3, 3) | st.floats() | st.just(10**400)
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "narrator", None, 1])
turn = st.fixed_dictionaries({"role": roles, "content": text | st.none() | st.lists(st.just({"type": "text"}))})
values = st.recursive(
    st.none() | st.booleans() | number | text | turn | st.lists(turn, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text | st.sampled_from(COLUMNS), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A row with all the columns of a format, its values of any kind, and perhaps columns of others."""
    shape = draw(st.sampled_from(FORMATS))
    names = [draw(st.sampled_from(one)) for one in shape.columns]
    return draw(st.fixed_dictionaries(dict.fromkeys(names, values))) | draw(
        st.dictionaries(st.sampled_from(COLUMNS) | text, values, max_size=2)
    )


lines = st.one_of(
    st.binary(max_size=40),
    text.map(str.encode),
    values.map(lambda value: json.dumps(value).encode()),
    rows().map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [b'{"a": 1, "a": 2}', b"[" * 5_000, b'{"a": NaN}', b'{"a": 1e999}', b"9" * 5_000, b"\xef\xbb\xbf{}"]
    ),
)
files = st.lists(lines, max_size=6).map(b"\n".join)
endings = st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".csv.gz"])


def read_all(path: Path) -> None:
    def consume() -> None:
        for row in read(str(path)):
            assert row.source.startswith(f"{path}:")

    message = refused(consume, DataError)
    assert not message or message.startswith(f"{path}:")


@pytest.mark.parametrize("examples", EXAMPLES)
class TestRow17Readers:
    def test_json_lines_give_rows_or_the_place_of_the_fault(self, tmp_path, examples):
        path = tmp_path / "rows.jsonl"

        def attempt(content: bytes) -> None:
            path.write_bytes(content)
            read_all(path)

        fuzz(examples, files, attempt)

    def test_so_does_every_other_kind_of_file(self, tmp_path, examples):
        def attempt(given: tuple[str, bytes, bool]) -> None:
            ending, content, packed = given
            path = tmp_path / f"rows{ending}"
            path.write_bytes(gzip.compress(content) if packed else content)
            read_all(path)

        fuzz(examples, st.tuples(endings, files, st.booleans()), attempt)

    def test_a_real_file_with_bytes_exchanged_lost_and_repeated(self, tmp_path, examples):
        good = [{"prompt": f"prompt {n}", "chosen": "ein schöner Tag", "rejected": "\U0001f600"} for n in range(8)]
        whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in good).encode()
        draw = random.Random(17)
        folder = tmp_path / "files"
        folder.mkdir()
        for kind, content in (("jsonl", whole), ("jsonl.gz", gzip.compress(whole, mtime=0))):
            path = folder / f"rows.{kind}"
            for _ in range(examples // 2):
                path.write_bytes(mutated(content, draw))
                with bounded(SECONDS, MEMORY):
                    survey(DataConfig(train=str(path), max_dropped_share=1))
        assert {file.name for file in folder.iterdir()} == {"rows.jsonl", "rows.jsonl.gz"}


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return the content with a few places changed."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(found) or 1)
        match draw.randrange(4):
            case 0:
                found[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del found[place : place + draw.randint(1, 30)]
            case 2:
                found[place:place] = found[place : place + draw.randint(1, 30)]
            case _:
                found[place:place] = draw.choice([b'"', b"{", b"}", b"\\u", b"\\ud800", b",", b"\n", b"\x00", b"\xff"])
    return bytes(found)


def survey(config: DataConfig) -> None:
    """Read, recognise and check; what is refused is refused with the file's name."""

    def account() -> None:
        report = check(config).report
        assert report.read == report.kept + report.total_dropped

    message = refused(account, DataError)
    assert not message or message.startswith(config.train)


class TestRow23Recogniser:
    @pytest.mark.parametrize("examples", EXAMPLES)
    def test_rows_of_any_values_are_recognised_or_refused_and_converted_or_dropped(self, examples):
        def attempt(given: list[dict[str, Any]]) -> None:
            found = [Row(values, f"file:{n}") for n, values in enumerate(given, start=1)]

            def convert() -> None:
                shape = recognise(found)
                for row in shape.gather(found):
                    with suppress(BadRow):  # dropped and counted
                        inspect(shape.convert(row))

            message = refused(convert, DataError)
            assert not message or message.startswith("file:1: ")

        fuzz(examples, st.lists(rows(), min_size=1, max_size=4), attempt)

    @pytest.mark.parametrize("examples", FEWER)
    def test_and_so_is_a_file_of_them_with_every_row_accounted_for(self, tmp_path, examples):
        path = tmp_path / "rows.jsonl"

        def attempt(given: list[dict[str, Any]]) -> None:
            path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
            survey(DataConfig(train=str(path), max_dropped_share=1))

        fuzz(examples, st.lists(rows(), min_size=1, max_size=4), attempt)
