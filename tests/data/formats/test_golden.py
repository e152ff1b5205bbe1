"""Every published data set, as a few made rows in its exact shape: the records they become and the rows that drop.

A file in `golden/` names a data set and its format. Its rows count from 0; a record or a drop names the first row it is
made of, and `rows` how many where there are several.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo.data.check import BadRow, Drop, inspect
from dpo.data.format import Format
from dpo.data.formats import FORMATS, PUBLISHED
from dpo.data.read import Row
from dpo.data.recognise import recognise
from dpo.data.records import Message, Preference

FILES = sorted((Path(__file__).parent / "golden").iterdir())
GOLDEN = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
KNOWN = {
    "Anthropic/hh-rlhf": {"pair of transcripts"},
    "trl-lib/hh-rlhf-helpful-base": {"pair"},
    "trl-internal-testing/hh-rlhf-trl-style": {"pair"},
    "HuggingFaceH4/ultrafeedback_binarized": {"pair"},
    "trl-lib/ultrafeedback_binarized": {"pair of conversations"},
    "argilla/ultrafeedback-binarized-preferences": {"pair"},
    "argilla/ultrafeedback-binarized-preferences-cleaned": {"pair"},
    "argilla/dpo-mix-7k": {"pair of conversations"},
    "argilla/distilabel-intel-orca-dpo-pairs": {"distilabel Orca pairs"},
    "argilla/kto-mix-15k": {"thumbs"},
    "openbmb/UltraFeedback": {"UltraFeedback"},
    "stanfordnlp/SHP": {"SHP"},
    "openai/summarize_from_feedback": {"summarize_from_feedback"},
    "trl-lib/tldr-preference": {"pair"},
    "nvidia/HelpSteer2": {"HelpSteer2"},
    "nvidia/HelpSteer2 (preference)": {"HelpSteer2 preference"},
    "nvidia/HelpSteer3 (preference)": {"HelpSteer3"},
    "Intel/orca_dpo_pairs": {"pair"},
    "berkeley-nest/Nectar": {"Nectar"},
    "PKU-Alignment/PKU-SafeRLHF": {"PKU-SafeRLHF (helpfulness)", "PKU-SafeRLHF (harmlessness)"},
    "lmsys/chatbot_arena_conversations": {"arena"},
    "lmarena-ai/arena-human-preference-55k": {"arena in columns"},
    "lmarena-ai/arena-human-preference-100k": {"arena"},
    "lmarena-ai/arena-human-preference-140k": {"arena"},
    "lmsys/mt_bench_human_judgments": {"arena"},
    "allenai/reward-bench": {"RewardBench"},
    "allenai/reward-bench-2": {"RewardBench 2"},
    "trl-lib/kto-mix-14k": {"thumbs"},
    "OpenAssistant/oasst1": {"OpenAssistant"},
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": {"pair"},
    "llamafactory/DPO-En-Zh-20k": {"ShareGPT pair"},
}


def rows_of(case: dict[str, Any]) -> list[Row]:
    return [Row(values, f"f:{number}") for number, values in enumerate(case["rows"])]


def expected(case: dict[str, Any]) -> list[tuple[Preference, int]]:
    return [
        (
            Preference(
                prompt=tuple(Message(role, text) for role, text in one["prompt"]),
                completions=tuple(one["completions"]),
                scores=None if one["scores"] is None else tuple(one["scores"]),
                agreement=one.get("agreement"),
                group=one.get("group"),
                feedback=tuple(one.get("feedback", ())),
                source=f"f:{one['row']}",
            ),
            one.get("rows", 1),
        )
        for one in case["records"]
    ]


def convert(shape: Format, rows: list[Row]) -> tuple[list[tuple[Preference, int]], list[tuple[str, int, BadRow]]]:
    """Return each record with its number of rows, and each drop with its source and number of rows."""
    records, drops = [], []
    for row in shape.gather(rows):
        try:
            record = shape.convert(row)
            inspect(record)
        except BadRow as bad:
            drops.append((row.source, row.rows, bad))
        else:
            records.append((record, row.rows))
    return records, drops


def test_every_data_set_of_the_list_has_a_fixture_of_its_format_and_every_format_a_data_set():
    found: dict[str, set[str]] = {}
    for case in GOLDEN.values():
        found.setdefault(case["dataset"], set()).add(case["format"])
    assert found == KNOWN
    assert {shape.name for shape in PUBLISHED} <= set().union(*found.values())


@pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN)
class TestGolden:
    def test_it_is_recognised_whatever_formats_stand_behind_its_own(self, case):
        values: dict[str, Any] = {}
        for row in reversed(case["rows"]):
            values.update({name: value for name, value in row.items() if value is not None})
        place = next(n for n, shape in enumerate(FORMATS) if shape.name == case["format"])
        earlier = [shape.name for shape in FORMATS[:place] if shape.holds(values)]
        assert FORMATS[place].holds(values)
        assert all(FORMATS[place].label and name.startswith("PKU") for name in earlier)
        assert recognise(rows_of(case), case.get("label")).name == case["format"]
        first = rows_of(case)[:1]
        assert recognise(first, case.get("label")).name == case["format"], "told by its first row alone"

    def test_the_rows_become_the_records(self, case):
        shape = recognise(rows_of(case), case.get("label"))
        assert convert(shape, rows_of(case))[0] == expected(case)

    def test_the_other_rows_drop_for_their_reason(self, case):
        shape = recognise(rows_of(case), case.get("label"))
        drops = convert(shape, rows_of(case))[1]
        got = [(source, rows, bad.reason) for source, rows, bad in drops]
        assert got == [(f"f:{one['row']}", one.get("rows", 1), Drop[one["reason"]]) for one in case["drops"]]
        for one, (_, _, bad) in zip(case["drops"], drops, strict=True):
            assert one.get("detail", "") in bad.detail

    def test_no_row_is_lost_or_counted_twice(self, case):
        rows = rows_of(case)
        gathered = list(recognise(rows, case.get("label")).gather(iter(rows)))
        assert sum(row.rows for row in gathered) == len(rows)
