"""Records that may be more than memory holds: few of them lie in memory, many in a memory-mapped Arrow file.

Whatever reads them sees a sequence. An entry of the cache is a folder under `cache_folder()`/data, named by a hash of
all that it depends on; it is written aside and renamed, so it is whole or absent, and may be deleted at any time.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, final, overload

from dpo.cache import cache_folder, hash_file
from dpo.data.records import Message
from dpo.errors import DataError

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger("dpo")

IN_MEMORY = 5_000
"""Most records of a part that are held in memory; beyond, all parts of the entry go to disk."""

FORMAT = 1
"""Version of the entries' layout; a reader makes any other anew."""

ENTRY_FILE = "entry.json"
_BATCH = 1_000  # records that are written, and read while iterating, at a time

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Kind(Generic[T]):
    """How a record becomes a row of a table and a record again."""

    schema: Callable[[], "pyarrow.Schema"]
    """A function, so that pyarrow is imported only where a file is read or written."""
    to_row: Callable[[T], dict[str, Any]]
    from_row: Callable[[Mapping[str, Any]], T]


@final
class OnDisk(Sequence[T]):
    """Records of a memory-mapped file, or some of them.

    Iterating reads the file in batches; one record by its index takes some 50 microseconds, from the mapped file.
    """

    def __init__(self, file: Path, kind: Kind[T], digest: str, places: Sequence[int] | None = None) -> None:
        """Open a whole file.

        Args:
            file: written by `Shelf`.
            kind: of its records.
            digest: names the content of the file.
            places: which records of the file, in ascending order; all where None.
        """
        import pyarrow

        self._file, self._kind, self._digest = file, kind, digest
        self._batches = pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all().to_batches()
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + batch.num_rows)
        self._places: Sequence[int] = range(self._starts[-1]) if places is None else places

    @property
    def digest(self) -> str:
        """Names the records and their order: equal ones are the same records."""
        if isinstance(self._places, range):
            return f"{self._digest}{self._places}"
        return self._digest + hashlib.sha256(json.dumps(list(self._places)).encode()).hexdigest()

    def take(self, indices: Iterable[int]) -> "OnDisk[T]":
        """Return the records at `indices`, which ascend, without reading them."""
        return OnDisk(self._file, self._kind, self._digest, [self._places[i] for i in indices])

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[T]:
        import pyarrow

        # Read, not mapped: pages of a mapped file that were looked at once would count as this process's memory.
        with pyarrow.OSFile(str(self._file)) as stream:
            yield from self._read(pyarrow.ipc.open_file(stream).get_batch)

    def _read(self, batch: "Callable[[int], pyarrow.RecordBatch]") -> Iterator[T]:
        for number, places in groupby(self._places, key=lambda place: bisect_right(self._starts, place) - 1):
            rows = batch(number).take([place - self._starts[number] for place in places])
            yield from map(self._kind.from_row, rows.to_pylist())

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "OnDisk[T]": ...
    def __getitem__(self, index: int | slice) -> "T | OnDisk[T]":
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        place = self._places[index]
        number = bisect_right(self._starts, place) - 1
        return self._kind.from_row(self._batches[number].slice(place - self._starts[number], 1).to_pylist()[0])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(own == theirs for own, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __repr__(self) -> str:
        return f"OnDisk({len(self)} records of {self._file})"


def turn_row(turn: Message) -> dict[str, str]:
    """Return a turn as it stands in a row."""
    return {"role": turn.role, "content": turn.content, **({"extra": turn.extra} if turn.extra else {})}


def turn_of(row: Mapping[str, Any]) -> Message:
    """Return the turn that `turn_row` wrote."""
    return Message(row["role"], row["content"], row.get("extra") or "")


def pick(records: Sequence[T], indices: Iterable[int]) -> Sequence[T]:
    """Return the records at `indices`, which ascend: a part of the file for those on disk, else a tuple."""
    return records.take(indices) if isinstance(records, OnDisk) else tuple(records[i] for i in indices)


def digest(records: Sequence[Any]) -> str:
    """Return a name of the records and their order, for records in memory by their content."""
    if isinstance(records, OnDisk):
        return records.digest
    found = hashlib.sha256()
    for record in records:
        found.update(repr(record).encode())
    return found.hexdigest()


@final
class Shelf(Generic[T]):
    """Takes the records of one part of an entry, one after the other."""

    def __init__(self, file: Path, kind: Kind[T]) -> None:
        """Collect what goes to `file` once it is too much for memory."""
        self._file, self._kind = file, kind
        self._held: list[T] = []
        self._writer: pyarrow.ipc.RecordBatchFileWriter | None = None

    def add(self, record: T) -> None:
        """Take a record."""
        self._held.append(record)
        if len(self._held) >= _BATCH and (self._writer is not None or len(self._held) > IN_MEMORY):
            self.spill()

    def spill(self) -> None:
        """Write what is held in memory to the file."""
        import pyarrow

        if self._writer is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pyarrow.ipc.new_file(str(self._file), self._kind.schema())
        for start in range(0, len(self._held), _BATCH):
            rows = [self._kind.to_row(record) for record in self._held[start : start + _BATCH]]
            self._writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=self._kind.schema()))
        self._held = []

    @property
    def spilled(self) -> bool:
        """Whether there is a file."""
        return self._writer is not None

    def close(self) -> tuple[T, ...]:
        """Finish the file, if there is one, and return what is in memory."""
        if self._writer is not None:
            self.spill()
            self._writer.close()
        return tuple(self._held)


def cached(
    depends_on: Sequence[object],
    kinds: Mapping[str, Kind[Any]],
    build: Callable[[Mapping[str, Shelf[Any]]], dict[str, Any]],
) -> tuple[dict[str, Sequence[Any]], dict[str, Any]]:
    """Return what `build` makes, from the cache where it was made before from the same.

    Args:
        depends_on: everything that the result follows from, beside the code that makes it; it must have a `repr` that
            tells it.
        kinds: the parts of the entry.
        build: puts records on the shelves, and returns what else there is to keep, as plain JSON.

    Returns:
        The parts, and the plain JSON.

    Raises:
        DataError: the records are more than memory is to hold, and the cache cannot be written.
    """
    key = hashlib.sha256(repr((FORMAT, _code(), *depends_on)).encode()).hexdigest()
    folder = cache_folder() / "data" / key[:32]
    if (found := _open(folder, kinds, key)) is not None:
        return found
    scratch = folder.with_name(f".{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    shelves = {name: Shelf(scratch / f"{name}.arrow", kind) for name, kind in kinds.items()}
    try:
        plain = build(shelves)
        if not any(shelf.spilled for shelf in shelves.values()):
            return {name: shelf.close() for name, shelf in shelves.items()}, plain
        for shelf in shelves.values():
            shelf.spill()
            shelf.close()
        _seal(scratch, key, kinds, plain)
        if (made := _settle(scratch, folder, kinds, key)) is not None:
            return made
        raise DataError(f"{folder}: what was written there cannot be read back. Check the disk, or set DPO_LAB_CACHE.")
    except OSError as error:
        raise DataError(
            f"{folder}: the tokenised data cannot be kept there ({error.strerror}), expected a folder with room. Set"
            " DPO_LAB_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _seal(scratch: Path, key: str, kinds: Mapping[str, Kind[Any]], plain: Mapping[str, Any]) -> None:
    """Write the entry's own file, which names the others by their content, and force all to disk."""
    hashes = {name: hash_file(scratch / f"{name}.arrow") for name in kinds}
    (scratch / ENTRY_FILE).write_text(json.dumps({"key": key, "sha256": hashes, "plain": plain}), encoding="utf-8")
    for file in scratch.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _settle(
    scratch: Path, folder: Path, kinds: Mapping[str, Kind[Any]], key: str
) -> tuple[dict[str, Sequence[Any]], dict[str, Any]] | None:
    """Put the finished entry into its place, unless another process was quicker, and open it."""
    try:
        scratch.rename(folder)
    except OSError:
        if (theirs := _open(folder, kinds, key)) is not None:
            return theirs
        shutil.rmtree(folder)
        scratch.rename(folder)
    return _open(folder, kinds, key)


def _open(
    folder: Path, kinds: Mapping[str, Kind[Any]], key: str
) -> tuple[dict[str, Sequence[Any]], dict[str, Any]] | None:
    """Return a whole entry, or None where there is none; of a damaged one it warns."""
    if not folder.is_dir():
        return None
    try:
        entry = json.loads((folder / ENTRY_FILE).read_text(encoding="utf-8"))
        for name in kinds:
            if hash_file(folder / f"{name}.arrow") != entry["sha256"][name]:
                raise ValueError(f"{name}.arrow has changed")
        if entry["key"] != key:
            raise ValueError("it is named for other data")
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: this part of the cache is damaged (%s) and made anew", folder, error)
        return None
    parts = {name: OnDisk(folder / f"{name}.arrow", kind, entry["sha256"][name]) for name, kind in kinds.items()}
    return cast("dict[str, Sequence[Any]]", parts), entry["plain"]


def _code() -> str:
    """Return a hash of this package's own files: other code may read the same file otherwise."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()
