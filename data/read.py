"""Rows out of a file, each with the place it came from.

JSON and JSON Lines are read here rather than by a library, so that every fault has a file, a line and a column, and
so that it shows before training starts.
"""

import csv
import gzip
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, final

from dpo.cache import hash_file
from dpo.errors import DataError, nearest

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>\w+))?")
_BLANK = re.compile(r"[ \t\r\n]*")


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One row as the file holds it."""

    values: Mapping[str, Any]
    source: str
    """`file:line`, or `file:row` where the file has no lines (Parquet, hub); both count from 1."""
    rows: int = 1
    """Rows of the file that were put together into this one: a format can spread one prompt over several."""


def read(path_or_name: str, limit: int | None = None) -> Iterator[Row]:
    """Yield the rows of a file (.jsonl, .json, .csv, .txt, also with .gz; .parquet) or of a hub data set.

    A text file holds one prompt a line.

    Args:
        path_or_name: a file, or `owner/name` or `owner/name:split` for a hub data set (split "train" by default) where
            no such file exists.
        limit: read no more than this many rows.

    Raises:
        DataError: the file is absent, empty or malformed, or the hub cannot be reached. The message names
            `file:line:column` where the file has lines.
    """
    rows = islice(_open(path_or_name), limit)
    first = next(rows, None)
    if first is None:
        raise DataError(
            f"{path_or_name}: got an empty file, expected at least one row. Write the rows, or name another."
        )
    yield first
    yield from rows


def content(path_or_name: str) -> str:
    """Return a hash of all rows that `read` would yield: of a file's bytes, or what the hub's library knows them by.

    Raises:
        DataError: as `read`, of a file that is absent and of a hub that cannot be reached.
    """
    path = Path(path_or_name)
    if path.is_file():
        return hash_file(path)
    if (hub := _hub_name(path_or_name)) is not None:
        return str(_load_hub(*hub)._fingerprint)
    raise DataError(_absent(path))


def _open(path_or_name: str) -> Iterator[Row]:
    path = Path(path_or_name)
    reader = _READERS.get(_suffix(path))
    if path.is_file():
        if reader is None:
            raise DataError(
                f"{path}: got the ending {path.suffix!r}, expected one of {', '.join(_READERS)} (.gz may follow the"
                " first five). Convert the file to JSON Lines."
            )
        return reader(path)
    if (hub := _hub_name(path_or_name)) is not None:
        return _hub(*hub)
    raise DataError(_absent(path))


def _hub_name(path_or_name: str) -> tuple[str, str] | None:
    """Return name and split of a hub data set, None for what looks like a file."""
    path = Path(path_or_name)
    found = _HUB_NAME.fullmatch(path_or_name)
    if found is None or _suffix(path) in _READERS or path.parent.is_dir():
        return None
    return found["name"], found["split"] or "train"


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _absent(path: Path) -> str:
    if path.is_dir():
        files = sorted(child.name for child in path.iterdir() if _suffix(child) in _READERS)
        return f"{path}: got a folder, expected a file. It holds {', '.join(files) or 'no data file'}."
    known = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    return (
        f"{path}: no such file.{nearest(path.name, known)} Give the path of a local file, or owner/name of a hub set."
    )


# --- text -----------------------------------------------------------------------------------------------------------


def _stream(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with _stream(path) as stream:
            yield from stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}). Copy or download it again.") from error


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines with their ends, decoded strictly; a byte order mark is taken off the first."""
    for number, raw in enumerate(_raw_lines(path), start=1):
        if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path}:1:1: got UTF-16, expected UTF-8. Save the file as UTF-8.")
        try:
            yield raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode()
        except UnicodeDecodeError as error:
            column = len(raw[: error.start].decode()) + 1
            raise DataError(
                f"{path}:{number}:{column}: got the byte 0x{raw[error.start]:02x}, expected UTF-8 text."
                " Save the file as UTF-8."
            ) from error


def _prompts(path: Path) -> Iterator[Row]:
    """Yield one prompt a line."""
    for number, line in enumerate(_lines(path), start=1):
        if text := line.strip():
            yield Row({"prompt": text}, f"{path}:{number}")


# --- JSON -----------------------------------------------------------------------------------------------------------


@final
class _RefusedError(ValueError):
    """JSON that Python would take and this reader does not; match number `nth` of `where` is the culprit."""

    def __init__(self, message: str, where: str, nth: int = 0) -> None:
        super().__init__(message)
        self.where = where
        self.nth = nth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        second = re.escape(json.dumps(twice, ensure_ascii=False)) + r"\s*:"
        raise _RefusedError(f"got the key {twice!r} twice, expected unique keys", second, nth=1)
    return values


def _no_constant(name: str) -> NoReturn:
    raise _RefusedError(f"got {name}, expected a finite number or null", re.escape(name) + r"(?=\s*[,\]}])")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _RefusedError(f"got {digits}, expected a number within the range of float64", re.escape(digits))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def _decode(text: str, start: int, path: Path, line: int) -> tuple[dict[str, Any], int]:
    """Return the JSON object at `start` and the index behind it; `line` is the number of the text's first line."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        if not isinstance(value, dict):
            raise _RefusedError(f"got a {type(value).__name__}, expected an object", "")
        if "\\u" in text[start:end]:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        _fail(text, error.pos, path, line, error.msg)
    except _RefusedError as error:
        found = next(islice(re.compile(error.where).finditer(text, start), error.nth, None), None)
        _fail(text, found.start() if found else start, path, line, str(error))
    except UnicodeEncodeError:
        _fail(text, start, path, line, "got half of a surrogate pair (\\ud800 to \\udfff), expected whole characters")
    except RecursionError:
        _fail(text, start, path, line, "got brackets nested too deeply to read")
    except ValueError as error:  # an integer of thousands of digits
        _fail(text, start, path, line, str(error))
    return value, end


def _fail(text: str, at: int, path: Path, line: int, message: str) -> NoReturn:
    row = line + text.count("\n", 0, at)
    column = at - text.rfind("\n", 0, at)
    raise DataError(f"{path}:{row}:{column}: {message}. Mend this place in the file.")


def _json_lines(path: Path) -> Iterator[Row]:
    for number, ended in enumerate(_lines(path), start=1):
        line = ended.rstrip("\r\n")
        start = _skip(line, 0)
        if start == len(line):
            continue
        values, end = _decode(line, start, path, number)
        if (rest := _skip(line, end)) < len(line):
            _fail(line, rest, path, number, "got more text behind the object, expected one JSON object per line")
        yield Row(values, f"{path}:{number}")


def _json(path: Path) -> Iterator[Row]:
    text = "".join(_lines(path))
    at = _skip(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        yield from _json_lines(path)  # many .json files of the hub hold one object per line
        return
    at, line, counted = _skip(text, at + 1), 1, 0
    if text[at : at + 1] != "]":
        while True:
            line, counted = line + text.count("\n", counted, at), at
            values, end = _decode(text, at, path, 1)
            yield Row(values, f"{path}:{line}")
            at = _skip(text, end)
            if text[at : at + 1] != ",":
                break
            at = _skip(text, at + 1)
    if text[at : at + 1] != "]":
        _fail(text, at, path, 1, "got something else behind a row of the array, expected ',' or ']'")
    if (rest := _skip(text, at + 1)) < len(text):
        _fail(text, rest, path, 1, "got more text behind the array, expected one array of objects")


def _skip(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return found.end() if found else at


# --- tables ---------------------------------------------------------------------------------------------------------


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the module's 128 KiB are less than a long conversation
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = next(reader, [])
        if repeated := {name for name in header if header.count(name) > 1}:
            raise DataError(f"{path}:1:1: got the column {min(repeated)!r} twice, expected unique names. Rename one.")
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}:{start}:1: got {len(cells)} cells, expected {len(header)} as in the header."
                    " Quote cells that hold commas or line ends."
                )
            if cells:
                yield Row(dict(zip(header, cells, strict=True)), f"{path}:{start}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}:1: {error}. Quote cells that hold quotes or line ends.") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        row = 0
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                row += 1
                yield Row(values, f"{path}:{row}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: the Parquet file cannot be read ({error}). Write or download it again.") from error


def _hub(name: str, split: str) -> Iterator[Row]:
    for number, values in enumerate(_load_hub(name, split), start=1):
        yield Row(dict(values), f"{name}:{split}:{number}")


def _load_hub(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # network, hub and loader errors share no base class
        raise DataError(
            f"{name}:{split}: the hub data set cannot be loaded ({type(error).__name__}: {error})."
            " Give the path of a local file instead, or name another split as owner/name:split."
        ) from error


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".txt": _prompts,
    ".parquet": _parquet,
}
