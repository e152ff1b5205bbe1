"""Vectors on disk, found by 32-byte addresses: append-only shards, verified, memory-mapped, shared by processes.

A shard is a safetensors file named by the sha256 of its own bytes, so that any change to it, header included, is seen:

    addresses  (entries, 32) uint8, in ascending order
    offsets    (entries + 1,) int64: entry i is values[offsets[i]:offsets[i + 1]]
    values     (all values,) float32

Shards are written under another name, forced to disk and renamed: they are whole or absent. The file system must be
POSIX.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import save

FORMAT = 1
"""Version of the shards' layout; a reader sets any other aside."""

LOCK_SECONDS = 60.0
"""How long to wait for another writer; one needs well below a second."""

Values: TypeAlias = NDArray[np.float32]

_WIDTH = 32  # bytes of an address; numpy's S32 compares them all, zeros at the end included
_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class _Shard:
    """Entries in ascending order of their addresses."""

    addresses: NDArray[Any]
    """(entries,), numpy's S32."""
    offsets: NDArray[np.int64]
    values: Values
    """A memory map of the file; a plain array only where the disk refused."""

    def rows(self, wanted: NDArray[Any]) -> NDArray[np.int64]:
        """Return each wanted address's row, -1 where it is absent."""
        at = np.searchsorted(self.addresses, wanted)
        at[at == len(self.addresses)] = 0  # past the end: any row does, the next line sees that it is another
        return np.where(self.addresses[at] == wanted, at, -1)

    def entry(self, row: int) -> Values:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


@final
class Store:
    """One folder of shards that all hold values of one `identity`.

    It opens whatever state the folder is in: absent, damaged, read-only. What cannot be written is kept in memory,
    after a warning. An entry that is there is never replaced, so everyone who reads it gets the same bits. The folder
    or any shard may be deleted at any time; what is open stays readable until the process ends.

    Addresses and offsets (40 bytes an entry) are held in memory, values are mapped.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Open `folder`; shards that are damaged or of another identity are set aside, each with a warning."""
        self._folder, self._identity = folder, identity
        self._shards: list[_Shard] = []
        self._seen: set[str] = set()  # names of files that are open or were refused
        self._refused = False  # the disk, at least once
        self._refresh()

    def known(self, addresses: Sequence[bytes]) -> NDArray[np.bool_]:
        """Say of each address whether it has an entry; looks on disk again where some have none."""
        found = self._locate(addresses)[0] >= 0
        if not found.all():
            self._refresh()
            found = self._locate(addresses)[0] >= 0
        return found

    def read(self, addresses: Sequence[bytes]) -> list[Values]:
        """Return the entries, float32 and read-only.

        Raises:
            KeyError: an address has no entry.
        """
        shards, rows = self._locate(addresses)
        if (shards < 0).any():
            absent = addresses[int((shards < 0).argmax())]
            raise KeyError(f"{self._folder}: no entry at {absent.hex()}. Add it first.")
        return [self._shards[shard].entry(row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]

    def add(self, entries: Mapping[bytes, Values]) -> None:
        """Write the entries that have none yet as one shard; where another process was quicker, its values stay."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Under the lock "not there yet" stays true until the rename, and whatever is half written is abandoned.
            with FileLock(self._folder / ".lock", timeout=LOCK_SECONDS):
                for abandoned in self._folder.glob(".*.tmp"):
                    abandoned.unlink()
                if new := self._without_known(entries):
                    content = self._encode(new)
                    name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
                    _write(self._folder / name, content)
                    self._seen.discard(name)
                    self._refresh()
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            if not self._refused:
                _log.warning(
                    "%s: cannot be written (%s). Reference log-probs are kept in memory, and computed again in the "
                    "next process. Free some space, or set DPO_LAB_CACHE to a folder of yours.",
                    self._folder,
                    error,
                )
            self._refused = True
        if rest := self._without_known(entries):
            addresses, offsets, values = _columns(rest)
            self._shards.append(_Shard(addresses.reshape(-1).view(f"S{_WIDTH}"), offsets, values))

    def _without_known(self, entries: Mapping[bytes, Values]) -> dict[bytes, Values]:
        known = self.known(list(entries))
        return {address: one for (address, one), there in zip(entries.items(), known, strict=True) if not there}

    def _encode(self, entries: Mapping[bytes, Values]) -> bytes:
        addresses, offsets, values = _columns(entries)
        return save(
            {"addresses": addresses, "offsets": offsets, "values": values},
            metadata=_about(self._identity),
        )

    def _locate(self, addresses: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each address's shard (-1 where there is none) and row; the shard opened first wins."""
        wanted = np.array(addresses, dtype=f"S{_WIDTH}")
        shards, rows = np.full(len(wanted), -1), np.full(len(wanted), -1)
        for number, shard in enumerate(self._shards):
            here = shard.rows(wanted)
            new = (here >= 0) & (shards < 0)
            shards[new], rows[new] = number, here[new]
        return shards, rows

    def _refresh(self) -> None:
        """Open the shards that were written since the last look."""
        for path in sorted(self._folder.glob("*.safetensors")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                self._shards.append(_open(path, self._identity))
            except FileNotFoundError:  # deleted since it was listed
                continue
            except OSError as error:
                _log.warning("%s: cannot be read (%s). What it holds is computed again.", path, error)
            except ValueError as error:
                _log.warning("%s: %s. It is set aside, and what it held is computed again.", path, error)
                self._set_aside(path)

    def _set_aside(self, path: Path) -> None:
        try:
            path.rename(path.with_suffix(".damaged"))
        except FileNotFoundError:  # another process was quicker
            self._seen.discard(path.name)
        except OSError as error:
            _log.warning("%s: cannot be set aside (%s). It is passed over. Delete it.", path, error)
        else:
            self._seen.discard(path.name)  # the same values, written again, bear the same name


def _about(identity: str) -> dict[str, str]:
    """Return a shard's metadata: one entry, because safetensors writes several in an order that changes."""
    return {"dpo-lab": f"format {FORMAT} of {identity}"}


def _columns(entries: Mapping[bytes, Values]) -> tuple[NDArray[np.uint8], NDArray[np.int64], Values]:
    """Return addresses (entries, 32), offsets (entries + 1,) and values of the entries, addresses ascending."""
    ordered = sorted(entries)
    addresses = np.frombuffer(b"".join(ordered), dtype=np.uint8).reshape(-1, _WIDTH)
    offsets = np.cumsum([0, *(len(entries[address]) for address in ordered)], dtype=np.int64)
    return addresses, offsets, np.concatenate([entries[address] for address in ordered])


def _write(path: Path, content: bytes) -> None:
    """Write a file that is afterwards, whatever happens, whole or absent."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name as well
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _open(path: Path, identity: str) -> _Shard:
    """Verify a shard and map it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or was written in another format or for another identity; says which.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != path.stem:
            raise ValueError(f"is damaged: got sha256 {digest[:12]}, expected that of its name, {path.stem[:12]}")
        file.seek(0)
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        about, expected = header.get("__metadata__"), _about(identity)
        if about != expected:
            raise ValueError(f"is of another kind: got {about}, expected {expected}")
        begins = {name: start + header[name]["data_offsets"][0] for name in ("addresses", "offsets", "values")}
        entries, values = header["addresses"]["shape"][0], header["values"]["shape"]
        file.seek(begins["addresses"])
        addresses = np.frombuffer(file.read(entries * _WIDTH), dtype=f"S{_WIDTH}")
        file.seek(begins["offsets"])
        offsets = np.frombuffer(file.read((entries + 1) * 8), dtype=np.int64)
        mapped = np.memmap(file, dtype=np.float32, mode="r", offset=begins["values"], shape=tuple(values))
        return _Shard(addresses, offsets, mapped)
