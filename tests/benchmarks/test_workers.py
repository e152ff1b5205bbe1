"""The measured loop is the product's own: it goes through the gate once a step, in every layout."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.scenarios import Shape, derive, read_pairs, to_rows
from benchmarks.step import main
from benchmarks.turns import BenchmarkError, Gate, Job
from benchmarks.workers import PAIR_VARIANTS, RANKING_VARIANTS
from dpo.data import Example


@pytest.fixture
def pairs(tmp_path: Path, pairs_file: Callable[..., Path], chatml: PreTrainedTokenizerBase) -> list[Example]:
    return read_pairs(str(pairs_file(tmp_path / "pairs.jsonl")), chatml, 512)


@dataclass(frozen=True)
class Said:
    """What a worker answered."""

    kinds: list[str]
    loss: float
    examples: int


def measure(variants: dict, job: Job) -> Said:
    answers = io.StringIO()
    gate = Gate(job, io.StringIO("next\n" * job.rounds), answers)
    gate.finish(variants[job.variant](job, gate))
    messages = [json.loads(line) for line in answers.getvalue().splitlines()]
    return Said([one["kind"] for one in messages], messages[-1]["loss"], messages[0]["examples"])


def job(folder: Path, examples: list[Example], variant: str = "ours") -> Job:
    return Job(variant, str(folder), batch=2, warmup=1, rounds=2, rows=to_rows(examples))


@pytest.mark.parametrize("variant", ["ours", "ours-padded"])
def test_the_loop_stops_at_the_gate_after_every_step(tiny_model_folder: Path, pairs: list[Example], variant: str):
    said = measure(dict(PAIR_VARIANTS), job(tiny_model_folder, derive(pairs, None, 6), variant))
    assert said.kinds == ["ready", "turn", "turn", "done"]
    assert said.loss == pytest.approx(0.693, abs=0.05)  # the policy starts at its reference


def test_a_worker_can_prepare_the_data_itself(tiny_model_folder: Path, tmp_path: Path, pairs: list[Example]):
    settings = {"train": str(tmp_path / "pairs.jsonl"), "eval_share": 0, "limit": 9}
    said = measure(dict(PAIR_VARIANTS), Job("ours", str(tiny_model_folder), 2, 1, 2, data=settings))
    assert said.examples == 9


def test_a_ranking_is_the_same_in_both_layouts(tiny_model_folder: Path, pairs: list[Example]):
    rows = derive(pairs, Shape(20, 8, completions=4), 6)
    packed, padded = (
        measure(dict(RANKING_VARIANTS), job(tiny_model_folder, rows, variant)) for variant in ("ours", "ours-padded")
    )
    assert packed.kinds == padded.kinds == ["ready", "turn", "turn", "done"]
    assert packed.loss == pytest.approx(padded.loss, rel=0.03)


def test_trl_is_imported_only_to_be_measured():
    assert "trl" not in sys.modules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenarios", "hhh"], "--scenarios: got 'hhh', .* Did you mean 'hh'?"),
        (["--variants", "trl"], "--variants: got 'trl', expected some of ours"),
        (["--scenarios", ","], "--scenarios: got no name"),
        (["--data", "absent.jsonl"], "--data: absent.jsonl is no file"),
        (["--scenarios", "k4-ranked", "--variants", "trl-best", "--data", __file__], "none of which can do k4-ranked"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why(arguments: list[str], message: str):
    with pytest.raises(BenchmarkError, match=message):
        main(arguments)


def test_without_trl_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.step.importlib.util.find_spec", lambda _: None)
    with pytest.raises(BenchmarkError, match=r"trl-best need TRL.*\[benchmark\]"):
        main(["--scenarios", "hh", "--variants", "ours,trl-best", "--data", __file__])
