"""Measurements that a run left in its folder, read strictly: damage is named and reaches no number."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from dpo.errors import CheckpointError
from dpo.evaluation.measures import REMEDY

T = TypeVar("T")


def read_rows(file: Path, kind: type[T], expected: str) -> list[T]:
    """Return the records of a file with one JSON row a line.

    Raises:
        CheckpointError: a row is no JSON of that kind, or has other fields than the first; names `file:line`.
    """
    adapter, found, fields = TypeAdapter(kind), list[T](), set[str]()
    for number, line in enumerate(_bytes(file).removesuffix(b"\n").split(b"\n"), start=1):
        try:
            found.append(adapter.validate_json(line, strict=True))
            own = set(_ROW.validate_json(line))
        except ValidationError as error:
            raise _damaged(f"{file}:{number}", _first(error), expected) from error
        if number > 1 and own != fields:
            raise _damaged(f"{file}:{number}", f"fields {sorted(own)} after {sorted(fields)}", expected)
        fields = own
    return found


def read_whole(file: Path, kind: type[T], expected: str) -> T:
    """Return what a JSON file holds.

    Raises:
        CheckpointError: it is no JSON of that kind.
    """
    try:
        return TypeAdapter(kind).validate_json(_bytes(file), strict=True)
    except ValidationError as error:
        raise _damaged(str(file), _first(error), expected) from error


_ROW = TypeAdapter(dict[str, object])


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _damaged(str(file), str(error.strerror), "a file that can be read") from error


def _first(error: ValidationError) -> str:
    fault = error.errors()[0]
    return ": ".join((*map(str, fault["loc"]), fault["msg"]))


def _damaged(place: str, what: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{place}: is damaged ({what}), expected {expected}. {REMEDY}")
