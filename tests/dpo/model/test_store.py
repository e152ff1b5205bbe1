"""The store gives back the bits it was given, to every process, and outlives damage, full disks and company."""

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dpo.model import store as module
from dpo.model.store import Store

ADDRESSES = [bytes([0, 255, n, n ^ 128, *[n] * 26, 0, 0]) for n in (3, 0, 200, 1, 31)]  # zeros at the end count


def values(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(length, dtype=np.float32) for length in lengths]


VALUES = values(3, 1, 7, 2, 5)
ENTRIES = dict(zip(ADDRESSES, VALUES, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "references" / "one"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def same(got: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return [one.tobytes() for one in got] == [one.tobytes() for one in expected]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_what_is_added_is_found_again_bit_for_bit(folder):
    first = Store(folder, "one")
    assert not first.known(ADDRESSES).any()
    first.add(dict(list(ENTRIES.items())[:2]))
    first.add(dict(list(ENTRIES.items())[2:]))
    assert len(shards(folder)) == 2
    for store in (first, Store(folder, "one")):
        assert store.known(ADDRESSES).all()
        assert same(store.read(ADDRESSES), VALUES)
        assert same(store.read([*ADDRESSES[::-1], ADDRESSES[0]]), [*VALUES[::-1], VALUES[0]])


def test_an_address_counts_to_its_last_byte(folder):
    store = Store(folder, "one")
    store.add(ENTRIES)
    for address in ADDRESSES:
        for other in (address[:-1] + b"\1", b"\1" + address[1:], bytes(32), b"\xff" * 32):
            assert not store.known([other])[0]
    with pytest.raises(KeyError, match=f"no entry at {'ff' * 32}"):
        store.read([ADDRESSES[0], b"\xff" * 32])


def test_values_are_mapped_not_read(folder):
    """16 MiB of values cost what 5 entries cost."""
    long = dict(zip(ADDRESSES, values(*[2**20 - 1] * 4, 5), strict=True))
    Store(folder, "one").add(long)
    tracemalloc.start()
    try:
        store = Store(folder, "one")
        read = store.read(ADDRESSES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert all(isinstance(one, np.memmap) and not one.flags.writeable for one in read)
    assert same(read, list(long.values()))


def test_an_entry_is_never_replaced(folder):
    """Two processes scored the same completion; batches of other shapes round otherwise."""
    first, second = Store(folder, "one"), Store(folder, "one")
    first.add(dict(zip(ADDRESSES[:3], VALUES[:3], strict=True)))
    second.add(dict(zip(ADDRESSES, values(3, 1, 7, 2, 5, seed=1), strict=True)))
    for store in (first, second, Store(folder, "one")):
        assert store.known(ADDRESSES).all()
        assert same(store.read(ADDRESSES[:3]), VALUES[:3])
    assert same(first.read(ADDRESSES[3:]), values(3, 1, 7, 2, 5, seed=1)[3:])


def test_nothing_new_writes_nothing(folder):
    store = Store(folder, "one")
    store.add(ENTRIES)
    store.add(ENTRIES)
    assert len(shards(folder)) == 1


def flip(position: int):
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another_safetensors(path: Path) -> None:
    path.write_bytes(module.save({"weight": np.zeros(3, np.float32)}))


@pytest.mark.parametrize(
    "damage",
    [flip(-1), flip(0), flip(30), truncate, empty, another_safetensors],
    ids=["address", "header size", "header", "truncated", "empty", "another"],
)
def test_a_damaged_shard_is_set_aside_once_and_written_again(folder, caplog, damage):
    store = Store(folder, "one")
    store.add(dict(zip(ADDRESSES[:2], VALUES[:2], strict=True)))
    (first,) = shards(folder)
    store.add(dict(zip(ADDRESSES[2:], VALUES[2:], strict=True)))
    damage(first)
    again = Store(folder, "one")
    (message,) = warned(caplog)
    assert str(first) in message
    assert "damaged" in message
    assert again.known(ADDRESSES).tolist() == [False, False, True, True, True]
    Store(folder, "one").add(ENTRIES)
    assert again.known(ADDRESSES).all()  # the file bears the old name
    assert same(again.read(ADDRESSES), VALUES)
    assert warned(caplog) == [message]
    assert first in shards(folder)
    assert len(list(folder.glob("*.damaged"))) == 1


def test_damage_that_cannot_be_moved_is_written_over(folder, caplog, monkeypatch):
    def refuses(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    Store(folder, "one").add(ENTRIES)
    (shard,) = shards(folder)
    truncate(shard)
    monkeypatch.setattr(Path, "rename", refuses)
    store = Store(folder, "one")
    assert not store.known(ADDRESSES).any()
    assert ["cannot be set aside" in message for message in warned(caplog)] == [False, True]
    store.add(ENTRIES)
    assert shards(folder) == [shard]
    for one in (store, Store(folder, "one")):
        assert same(one.read(ADDRESSES), VALUES)
        assert isinstance(one.read(ADDRESSES)[0], np.memmap)  # from disk again, not kept in memory
    assert len(warned(caplog)) == 2


def test_any_flipped_byte_is_noticed(folder, caplog):
    Store(folder, "one").add(ENTRIES)
    (shard,) = shards(folder)
    content = shard.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        shard.write_bytes(flipped)
        assert not Store(folder, "one").known(ADDRESSES).any()


def test_another_format_or_identity_is_set_aside(folder, tmp_path, caplog, monkeypatch):
    Store(tmp_path / "two", "two").add(ENTRIES)
    with monkeypatch.context() as future:
        future.setattr(module, "FORMAT", 2)
        Store(tmp_path / "future", "one").add(dict(zip(ADDRESSES, values(1, 2, 3, 4, 5), strict=True)))
    folder.mkdir(parents=True)
    foreign = {name: shutil.copy2(shards(tmp_path / name)[0], folder) for name in ("two", "future")}
    assert not Store(folder, "one").known(ADDRESSES).any()
    messages = " ".join(warned(caplog))
    for expected in (*map(str, foreign.values()), "format 1 of two", "format 2 of one", "format 1 of one"):
        assert expected in messages
    assert not shards(folder)


def test_what_only_looks_like_a_shard_is_passed_over(folder, caplog):
    (folder / "folder.safetensors").mkdir(parents=True)
    store = Store(folder, "one")
    store.add(ENTRIES)
    assert same(store.read(ADDRESSES), VALUES)
    (message,) = warned(caplog)
    assert str(folder / "folder.safetensors") in message


def test_a_write_that_breaks_off_leaves_nothing(folder, monkeypatch):
    def breaks(_: int) -> None:
        (temporary,) = folder.glob(".*.tmp")
        assert temporary.stat().st_size > 0  # it is the middle
        raise KeyboardInterrupt

    store = Store(folder, "one")
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", breaks)
        with pytest.raises(KeyboardInterrupt):
            store.add(ENTRIES)
    assert {path.name for path in folder.iterdir()} <= {".lock"}
    assert not store.known(ADDRESSES).any()
    store.add(ENTRIES)
    assert same(Store(folder, "one").read(ADDRESSES), VALUES)


def test_what_a_killed_writer_left_is_removed(folder):
    folder.mkdir(parents=True)
    (folder / ".0123.tmp").write_bytes(b"half")
    store = Store(folder, "one")
    assert not store.known(ADDRESSES).any()
    store.add(ENTRIES)
    assert {path.name for path in folder.iterdir()} - {".lock"} == {shards(folder)[0].name}


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_said_once_and_memory_serves(folder, caplog, monkeypatch, fault):
    Store(folder, "one").add(dict(zip(ADDRESSES[:2], VALUES[:2], strict=True)))

    def refuses(path: Path, content: bytes) -> None:
        raise OSError(fault, os.strerror(fault))

    store = Store(folder, "one")
    with monkeypatch.context() as refused:
        refused.setattr(module, "_write", refuses)
        store.add({ADDRESSES[2]: VALUES[2]})
        store.add(ENTRIES)
    (message,) = warned(caplog)
    for part in (str(folder), os.strerror(fault), "kept in memory", "DPO_LAB_CACHE"):
        assert part in message
    assert store.known(ADDRESSES).all()
    assert same(store.read(ADDRESSES), VALUES)
    assert Store(folder, "one").known(ADDRESSES).tolist() == [True, True, False, False, False]


def test_a_folder_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "references", "one")
    store.add(ENTRIES)
    assert same(store.read(ADDRESSES), VALUES)
    assert len(warned(caplog)) == 1


def test_the_folder_may_go_at_any_time(folder, caplog):
    store = Store(folder, "one")
    store.add(dict(zip(ADDRESSES[:2], VALUES[:2], strict=True)))
    shutil.rmtree(folder)
    assert same(store.read(ADDRESSES[:2]), VALUES[:2])
    store.add(dict(zip(ADDRESSES[2:], VALUES[2:], strict=True)))
    assert same(store.read(ADDRESSES), VALUES)
    assert Store(folder, "one").known(ADDRESSES).tolist() == [False, False, True, True, True]
    assert not warned(caplog)


def test_a_writer_waits_for_the_other(folder, monkeypatch):
    """Both scored everything; the slower one finds the values of the quicker one and takes them."""
    write, both = module._write, threading.Barrier(2, timeout=10)
    monkeypatch.setattr(module, "_write", lambda *args: threading.Event().wait(0.2) or write(*args))
    stores = [Store(folder, "one") for _ in range(2)]

    def add(seed: int) -> None:
        both.wait()
        stores[seed].add(dict(zip(ADDRESSES, values(3, 1, 7, 2, 5, seed=seed), strict=True)))

    threads = [threading.Thread(target=add, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shards(folder)) == 1
    assert same(stores[0].read(ADDRESSES), stores[1].read(ADDRESSES))


WRITER = """
import hashlib, sys, pathlib, numpy as np
from dpo.model.store import Store
folder, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
store = Store(folder, "one")
for n in range(20):
    made = {hashlib.sha256(bytes([n, i])).digest(): np.full(i + 1, 100 * seed + n, np.float32) for i in range(5)}
    store.add(made)
    assert store.known(list(made)).all()
"""


def test_two_processes_at_once(folder, caplog):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(seed)]) for seed in (1, 2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    store = Store(folder, "one")
    assert len(shards(folder)) == 20
    for n in range(20):
        read = store.read([hashlib.sha256(bytes([n, i])).digest() for i in range(5)])
        assert [len(one) for one in read] == [1, 2, 3, 4, 5]
        assert {float(x) for one in read for x in one} in ({100.0 + n}, {200.0 + n})  # one writer's, whole
    assert not warned(caplog)
