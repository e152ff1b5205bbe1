"""The account of real human preferences agrees with a count by plain string operations.

The file holds pairs of HH-RLHF as people left them: transcripts of "\\n\\nHuman:" and "\\n\\nAssistant:" turns. It lies
beside the checkout, and these tests are skipped without it.
"""

import gzip
import json
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from dpo.data import Checked, DataConfig, Drop, check

FILE = Path(__file__).parents[2] / ".." / "shared" / "data" / "hh_harmless_dev.jsonl.gz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs the HH-RLHF file beside the checkout")

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
Row = tuple[str, str, str, str]
"""Prompt and answer of the chosen transcript, and of the rejected one."""


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Every transcript, cut at its last "\\n\\nAssistant:"."""
    found = []
    for line in gzip.decompress(FILE.read_bytes()).decode().splitlines():
        row = json.loads(line)
        halves = []
        for name in ("chosen", "rejected"):
            at = row[name].rindex(ASSISTANT)
            halves += [row[name][:at], row[name][at + len(ASSISTANT) :].strip()]
        found.append(tuple(halves))
    return found


@pytest.fixture(scope="module")
def kept(rows: list[Row]) -> list[Row]:
    """Rows of one prompt and two answers that differ, each once."""
    good = [row for row in rows if row[0] == row[2] and row[1] and row[3] and row[1] != row[3]]
    return list(dict.fromkeys(good))


@pytest.fixture(scope="module")
def checked() -> Checked:
    return check(DataConfig(train=str(FILE), eval_share=0.1))


def records(checked: Checked) -> list:
    return [*checked.train, *checked.eval]


def speakers(transcript: str) -> str:
    """Return H and A in the order of the turns."""
    marked = transcript.replace(HUMAN, "\0H").replace(ASSISTANT, "\0A")
    return "".join(part[0] for part in marked.split("\0")[1:])


def alternates(order: str) -> bool:
    return order == ("HA" * len(order))[: len(order)]


def test_pairs_whose_prompts_differ_and_those_with_an_empty_answer_are_dropped(rows, kept, checked):
    differ = sum(row[0] != row[2] for row in rows)
    empty = sum(row[0] == row[2] and not (row[1] and row[3]) for row in rows)
    assert differ > 0  # the file holds the quirks this test is for
    assert empty > 0
    report = checked.report
    assert report.read == len(rows)
    assert report.dropped[Drop.PROMPTS_DIFFER] == differ
    assert report.dropped[Drop.EMPTY_COMPLETION] == empty
    assert report.kept == len(kept) == len(records(checked))
    assert report.total_dropped == len(rows) - len(kept)


def test_every_answer_is_kept_to_the_letter_on_the_side_that_people_chose(kept, checked):
    assert Counter(record.completions for record in records(checked)) == Counter((row[1], row[3]) for row in kept)
    assert all(record.scores == (1.0, 0.0) for record in records(checked))


def test_turns_that_do_not_alternate_are_kept_as_they_are(kept, checked):
    expected = Counter(speakers(row[0]) for row in kept)
    found = Counter(
        "".join({"user": "H", "assistant": "A"}[turn.role] for turn in record.prompt) for record in records(checked)
    )
    assert found == expected
    assert any(not alternates(order) for order in expected)
    assert all(order.endswith("H") for order in expected)  # no other turn can be answered


def test_prompts_lose_their_marks_and_nothing_else(kept, checked):
    expected = Counter(" ".join(row[0].replace(HUMAN, " ").replace(ASSISTANT, " ").split()) for row in kept)
    found = Counter(" ".join(" ".join(turn.content for turn in one.prompt).split()) for one in records(checked))
    assert found == expected
    assert any("Human:" in text for text in expected)  # people wrote the mark into their turns as well


def test_prompts_that_stand_in_several_rows_are_on_one_side(kept, checked):
    """Counted: rows whose prompt an earlier row has as well, case and white space aside."""
    repeated = len(kept) - len({" ".join(row[0].lower().split()) for row in kept})
    sides = [
        {" ".join(f"{turn.role} {turn.content}".lower() for turn in record.prompt) for record in side}
        for side in (checked.train, checked.eval)
    ]
    sides = [{" ".join(prompt.split()) for prompt in side} for side in sides]
    assert repeated > 0
    assert not sides[0] & sides[1]
    assert len(kept) - len(sides[0] | sides[1]) == repeated


def test_how_often_the_longer_answer_wins_in_words(kept, checked):
    lengths = [(len(row[1].split()), len(row[3].split())) for row in kept]
    longer = sum(chosen > rejected for chosen, rejected in lengths)
    shorter = sum(chosen < rejected for chosen, rejected in lengths)
    assert shorter > longer  # people called the shorter answer the less harmful one
    summary = checked.report.summary
    assert summary.longer_wins == longer / len(kept)
    assert summary.completion_words.median == median(words for pair in lengths for words in pair)
