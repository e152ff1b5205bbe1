"""Bounds of time and memory around what others wrote and this process runs: a chat template is a program."""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

_PAGES = "/proc/self/statm"  # begins with the size of the address space, in pages
_COUNTED = Path(_PAGES).exists()
_PAGE = resource.getpagesize()
_AGAIN = 1.0  # seconds; the first alarm is lost where a finaliser of Python swallows it


@final
class LimitError(Exception):
    """A bound was passed; the message says which."""


@final
class _Alarm(BaseException):
    """Passes every `except Exception` on its way out."""


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Stop Python code that computes for too long or takes too much memory. It costs some 20 microseconds.

    Processor time is counted, not the clock's: a busy machine stops nothing. Time is bounded in the main thread alone,
    which all commands render in (signals reach no other), memory on Linux alone.

    Args:
        seconds: of the process's own computing.
        memory: bytes by which the address space may grow.

    Raises:
        LimitError: one of them was passed.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, _ring) if in_main else None
    try:
        if _COUNTED:
            _limit_memory(memory, before)
        if in_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN)
        yield
    except _Alarm as error:
        raise LimitError(f"more than {seconds:g} s of computing") from error
    except MemoryError as error:
        raise LimitError(f"more than {memory >> 20} MiB of memory") from error
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL if handler is None else handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _limit_memory(more: int, before: tuple[int, int]) -> None:
    soft, hard = before
    file = os.open(_PAGES, os.O_RDONLY)  # half the time of a buffered file
    try:
        wanted = int(os.read(file, 64).split(maxsplit=1)[0]) * _PAGE + more
    finally:
        os.close(file)
    known = [wanted, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))


def _ring(*_: object) -> None:
    raise _Alarm
