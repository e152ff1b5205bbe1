"""Every promise in docs/reliability.md names tests that exist and that `pytest -m faults` runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMISES = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PROMISES)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_promise_has_its_test(file: str, name: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    above = re.search(rf"((?:^@.*\n(?:^[ )\]].*\n)*)*)^(?:def|class) {name}\b", text, flags=re.MULTILINE)
    assert above is not None, f"{file} has no {name}"
    assert "pytest.mark.faults" in above[1] or re.search(r"^pytestmark = .*faults", text, flags=re.MULTILINE)


def test_there_are_promises() -> None:
    assert len(NAMED) > 30
