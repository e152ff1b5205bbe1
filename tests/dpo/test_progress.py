"""Bars are drawn where somebody looks, and nowhere else."""

import io
import sys
from types import SimpleNamespace

import pytest

from dpo import progress
from dpo.progress import bar, in_notebook


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "notebook", "seen"),
    [(io.StringIO, False, False), (Terminal, False, True), (io.StringIO, True, True), (Terminal, True, True)],
)
def test_a_bar_is_seen_in_a_terminal_and_in_a_notebook(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], notebook: bool, seen: bool
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress, "in_notebook", lambda: notebook)
    monkeypatch.setattr(progress, "find_spec", lambda _: None)  # without widgets a bar is text there
    with bar(total=4, done=1, name="answers", unit="answer") as drawn:
        drawn.update(2)
        assert drawn.disable is not seen
    assert ("answers" in shown.getvalue()) is seen
    assert ("3/4" in shown.getvalue()) is seen
    assert bar(total=4, name="answers", unit="answer", shown=False).disable


@pytest.mark.parametrize(
    ("shell", "expected"), [(None, False), ("TerminalInteractiveShell", False), ("ZMQInteractiveShell", True)]
)
def test_a_notebook_is_told_from_a_shell(monkeypatch: pytest.MonkeyPatch, shell: str | None, expected: bool) -> None:
    found = None if shell is None else type(shell, (), {})()
    monkeypatch.setitem(sys.modules, "IPython.core.getipython", SimpleNamespace(get_ipython=lambda: found))
    assert in_notebook() is expected


def test_without_ipython_there_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython.core.getipython", None)
    assert not in_notebook()
