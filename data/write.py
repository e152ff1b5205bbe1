"""Records written as a file of our own format: "rated", which holds every record without loss."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from dpo.data.load import RECORDS
from dpo.data.records import Preference
from dpo.errors import DataError

_BATCH = 1_000  # records of a Parquet row group: they are in memory at once


def check_target(path: Path, force: bool = False) -> None:
    """See that records can be written to a file, before the work that makes them.

    Args:
        path: .jsonl or .parquet.
        force: a file that is there may be replaced.

    Raises:
        DataError: another ending, a file that is there, or a folder that cannot be written to.
    """
    if path.suffix not in _WRITERS:
        raise DataError(f"{path}: got the ending {path.suffix!r}, expected {' or '.join(_WRITERS)}. Name the file so.")
    check_place(path)
    if path.exists() and not force:
        raise DataError(f"{path}: is there already, expected a new name. Choose another, or replace it with --force.")


def check_place(path: Path) -> None:
    """See that a file can be made, or replaced, at this place.

    Raises:
        DataError: it cannot.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder, expected the name of a file. Name a file in it.")
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist. Make it, or name a file elsewhere.")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path}: the folder {path.parent} cannot be written to. Name a file elsewhere.")


def write(records: Iterable[Preference], path: Path, force: bool = False) -> int:
    """Write records, a batch at a time, and return how many. The file is afterwards whole, or as before.

    Args:
        records: read once.
        path: .jsonl or .parquet.
        force: replace a file that is there.

    Raises:
        DataError: as `check_target`, and where the disk refuses.
    """
    check_target(path, force)
    with replacing(path) as scratch:
        return _WRITERS[path.suffix](records, scratch)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write to, which takes its place when all went well and goes otherwise.

    Raises:
        DataError: the disk refuses.
    """
    scratch = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}). Make room on the disk, or name a file elsewhere."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def _json_lines(records: Iterable[Preference], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(RECORDS.to_row(record), ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def _parquet(records: Iterable[Preference], path: Path) -> int:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema, count = RECORDS.schema(), 0
    with ParquetWriter(path, schema) as writer:
        rest = iter(records)
        while batch := list(islice(rest, _BATCH)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist([RECORDS.to_row(record) for record in batch], schema))
            count += len(batch)
    return count


_WRITERS: Mapping[str, Callable[[Iterable[Preference], Path], int]] = {".jsonl": _json_lines, ".parquet": _parquet}
"""How each ending is written."""
