"""Stopping in order: a signal is obeyed at the end of an optimiser step, a second one at once.

`Stop` is for the time of the training, `terminable` for what a command does before and after it. Signals reach a
process's main thread alone: in any other thread neither does anything, and whoever owns the process decides.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self, final

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What stops a run: a scheduler's or a container's request, and Ctrl-C or a notebook's stop button."""


@final
class Stopped(KeyboardInterrupt):
    """Somebody asked the run to stop, and it did.

    It is no `Exception`: where one failed run must not keep others from finishing, a stop is not taken for a failure.
    """

    def __init__(self, number: signal.Signals, message: str) -> None:
        """Say what was received and how far the run is."""
        super().__init__(message)
        self.exit_code = 128 + number
        """As a shell reports a process that the signal ended: 143 for SIGTERM, 130 for SIGINT."""


@final
class Stop:
    """Listens, as a context, for a request to stop: the first is kept in `asked`, the second raises `Stopped`.

    A signal that the process ignores, as under nohup, stays ignored. On the way out the handlers are those from before.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        """The signal that was received, or None."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._before = _install(SIGNALS, self._receive)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Give the handlers back."""
        _give_back(self._before)

    def _receive(self, number: int, _: FrameType | None) -> None:
        received = signal.Signals(number)
        if self.asked is not None:
            raise Stopped(received, "stopped at once. The same command goes on from the last checkpoint.")
        self.asked = received
        _say(f"\n{received.name}: this optimiser step is finished and saved, then the run stops; again: at once\n")


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the block by an exception, as Ctrl-C does, so that what it holds is put down in order.

    Raises:
        Stopped: SIGTERM was received.
    """

    def receive(number: int, _: FrameType | None) -> None:
        raise Stopped(signal.Signals(number), "stopped. The same command goes on from the last checkpoint.")

    before = _install((signal.SIGTERM,), receive)
    try:
        yield
    finally:
        _give_back(before)


def _install(
    numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]
) -> dict[signal.Signals, Any]:
    """Install the handler and return those before it; none where they could not be put back, or in another thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    known = {number: signal.getsignal(number) for number in numbers}
    before = {number: one for number, one in known.items() if one not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    return before


def _give_back(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _say(text: str) -> None:
    """Write past the buffers of sys.stderr, in the middle of whose work a signal may arrive."""
    try:
        os.write(2, text.encode())
    except OSError:  # the terminal is gone, which is a common reason for the signal
        return
