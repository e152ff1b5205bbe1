"""`dpo data`: what it prints, what it writes, and one message with exit code 1 for what cannot be."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dpo import data_cli
from dpo.cli import app
from dpo.data import DataConfig, check

ROWS = [
    {
        "prompt": f"What of number {n}?",
        "chosen": f"It is {n}.",
        "rejected": "No idea at all.",
        "group": "g",
        "weight": 2.5,
    }
    for n in range(30)
]
ROWS[4] |= {"chosen": "", "prompt": "broken"}
ROWS[5] |= {"prompt": "\x1b[31mred", "agreement": 0.75, "feedback": "too short"}
ROWS[6] |= {"score_chosen": 7, "score_rejected": 2}


def dpo(*arguments: str, keys: str | None = None) -> Result:
    return CliRunner().invoke(app, ["data", *arguments], input=keys)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody sits at a terminal."""
    monkeypatch.setattr(data_cli, "_by_hand", lambda: True)


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


@pytest.mark.parametrize("command", ["check", "show", "convert"])
def test_help_has_an_example(command: str) -> None:
    done = dpo(command, "--help")
    assert done.exit_code == 0
    assert f"Example: dpo data {command}" in done.stdout


class TestCheck:
    def test_it_says_what_to_look_at_first_then_the_facts(self, folder: Path) -> None:
        done = dpo("check", "p.jsonl", "eval_share=0.3")
        assert done.exit_code == 0
        shown = " ".join(done.stdout.split())
        assert shown.index("Look at this first") < shown.index("dropped: empty completion 1")
        assert "Choosing the shorter completion without reading gets 100% of the pairs right" in shown
        assert "chosen is preferred to rejected" in shown
        assert "p.jsonl:5" in shown
        assert "One record as tokens" not in shown
        assert "█" in shown
        assert names(folder) == ["p.jsonl"]

    def test_a_tokenizer_alone_adds_the_tokens(
        self, folder: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import AutoModelForCausalLM

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
        done = dpo("check", "p.jsonl", "max_length=24", "--tokenizer", str(tiny_model_folder))
        assert done.exit_code == 0, done.output
        shown = " ".join(done.stdout.split())
        assert "more than max_length=24 tokens" in shown
        prompt, _, completion = shown.partition("prompt, not scored: ")[2].partition("completion, scored: ")
        assert prompt.startswith("<|im_start|>|")
        assert completion.rstrip().endswith("<|im_end|>|")

    def test_the_page_is_written(self, folder: Path) -> None:
        done = dpo("check", "p.jsonl", "--html", "page.html")
        assert done.exit_code == 0
        assert "The page: page.html" in done.stdout
        assert names(folder) == ["p.jsonl", "page.html"]
        assert "Look at this first" in Path("page.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["absent.jsonl"], "no such file"),
            (["p.jsonl", "--html", "page.pdf"], "expected '.html'"),
            (["p.jsonl", "--html", "absent/page.html"], "does not exist"),
            (["p.jsonl", "--tokenizer", "absent/model"], "absent/model"),
        ],
    )
    def test_what_cannot_be_is_one_message(self, folder: Path, arguments: list[str], words: str) -> None:
        done = dpo("check", *arguments)
        assert done.exit_code == 1
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert names(folder) == ["p.jsonl"]

    def test_an_unknown_setting_is_named(self, folder: Path) -> None:
        done = dpo("check", "p.jsonl", "max_lenght=3")
        assert done.exit_code == 2
        assert "Did you mean 'max_length'?" in done.stderr


class TestShow:
    def test_a_pipe_gets_so_many_records_in_the_order_of_the_file(self, folder: Path) -> None:
        shown = dpo("show", "p.jsonl").stdout
        assert [line.split(": ")[1].split()[0] for line in shown.splitlines() if " of 29: " in line] == [
            f"p.jsonl:{n}" for n in (1, 2, 3, 4, 6, 7, 8, 9, 10, 11)
        ]

    def test_a_record_is_shown_whole_best_first(self, folder: Path) -> None:
        shown = dpo("show", "p.jsonl", "--from", "5", "--count", "2").stdout.splitlines()
        assert [line.rstrip("─ ") for line in shown] == [
            "5 of 29: p.jsonl:6",
            "user: \N{REPLACEMENT CHARACTER}[31mred",
            "completion 1 (score 1): It is 5.",
            "completion 2 (score 0): No idea at all.",
            "agreement: 0.75",
            "weight: 2.5",
            "group: g",
            "feedback: too short",
            "6 of 29: p.jsonl:7",
            "user: What of number 6?",
            "completion 1 (score 7): It is 6.",
            "completion 2 (score 2): No idea at all.",
            "weight: 2.5",
            "group: g",
        ]

    def test_long_texts_are_not_cut_into_lines(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "20")
        assert "completion 2 (score 0): No idea at all.\n" in dpo("show", "p.jsonl", "--count", "1").stdout

    def test_a_seed_draws_the_order(self, folder: Path) -> None:
        first = dpo("show", "p.jsonl", "--random", "3", "--count", "29").stdout
        assert first == dpo("show", "p.jsonl", "--random", "3", "--count", "29").stdout
        assert first != dpo("show", "p.jsonl", "--random", "4", "--count", "29").stdout
        assert sorted(first.splitlines()) == sorted(dpo("show", "p.jsonl", "--count", "29").stdout.splitlines())

    @pytest.mark.parametrize(
        ("keys", "records"), [("\n\nq\n", 3), ("q\n", 1), ("", 1), ("\n" * 40, 29)], ids=["q", "at once", "end", "all"]
    )
    def test_at_a_terminal_a_key_asks_for_the_next(self, folder: Path, by_hand: None, keys: str, records: int) -> None:
        shown = dpo("show", "p.jsonl", keys=keys)
        assert shown.exit_code == 0
        assert shown.stdout.count(" of 29: ") == records

    def test_no_more_records_than_there_are(self, folder: Path) -> None:
        done = dpo("show", "p.jsonl", "--from", "30")
        assert done.exit_code == 1
        assert "--from: got 30, expected at most 29" in done.stderr


class TestConvert:
    @pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
    def test_the_converted_file_holds_the_same_records(self, folder: Path, out: str) -> None:
        done = dpo("convert", "p.jsonl", out)
        assert done.exit_code == 0, done.output
        assert f"29 records: {out}" in done.stdout
        assert "empty completion" in done.stdout
        before, after = (check(DataConfig(train=name, eval_share=0)).train for name in ("p.jsonl", out))
        for one, other in zip(before, after, strict=True):
            assert [getattr(one, name) for name in one.__slots__[:-1]] == [
                getattr(other, name) for name in one.__slots__[:-1]
            ]

    def test_a_file_is_replaced_only_where_asked_for(self, folder: Path) -> None:
        Path("out.jsonl").write_text("old")
        done = dpo("convert", "p.jsonl", "out.jsonl")
        assert (done.exit_code, Path("out.jsonl").read_text()) == (1, "old")
        assert "--force" in done.stderr
        assert dpo("convert", "p.jsonl", "out.jsonl", "--force").exit_code == 0
        assert len(Path("out.jsonl").read_text().splitlines()) == 29

    @pytest.mark.parametrize(
        ("arguments", "words", "code"),
        [
            (["absent.jsonl", "out.csv"], "expected .jsonl or .parquet", 1),  # said before the file is looked for
            (["p.jsonl", "absent/out.jsonl"], "does not exist", 1),
            (["absent.jsonl", "out.jsonl"], "no such file", 1),
            (["p.jsonl", "p.jsonl", "--force"], "is the file that is read", 1),
            (["p.jsonl", "out.jsonl", "eval_share=0.1"], "reads one set as a whole", 2),
            (["p.jsonl", "out.jsonl", "on_bad_row=error"], "p.jsonl:5", 1),
        ],
    )
    def test_what_cannot_be_leaves_nothing(self, folder: Path, arguments: list[str], words: str, code: int) -> None:
        before = Path("p.jsonl").read_bytes()
        done = dpo("convert", *arguments)
        assert done.exit_code == code
        assert words in done.stderr
        assert names(folder) == ["p.jsonl"]
        assert Path("p.jsonl").read_bytes() == before
