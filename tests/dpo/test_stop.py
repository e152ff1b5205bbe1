"""Signals are taken for the time of a context, given back after it, and left alone where they are not ours."""

import os
import signal
import threading

import pytest

from dpo.stop import SIGNALS, Stop, Stopped, terminable


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.faults
@pytest.mark.parametrize(("first", "second", "code"), [(*SIGNALS, 130), (*reversed(SIGNALS), 143)])
def test_the_first_signal_is_kept_and_the_second_raises(
    first: signal.Signals, second: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with Stop() as stop:
        assert stop.asked is None
        send(first)
        assert stop.asked is first
        with pytest.raises(Stopped, match="goes on from the last checkpoint") as caught:
            send(second)
    assert caught.value.exit_code == code
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert capfd.readouterr().err.count(first.name) == 1


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            send(signal.SIGINT)
        assert stop.asked is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_installed() -> None:
    before, seen = [signal.getsignal(one) for one in SIGNALS], []

    def work() -> None:
        with terminable(), Stop():
            seen.extend(signal.getsignal(one) for one in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


@pytest.mark.faults
def test_around_the_training_sigterm_ends_by_an_exception_and_ctrl_c_stays_python_s_own() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with terminable():
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(Stopped) as caught:
            send(signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
