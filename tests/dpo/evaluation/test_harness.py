"""Tasks of lm-eval see the role that is asked, with its adapters, and give each item a number."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo.errors import ConfigError, DataError
from dpo.evaluation import harness
from dpo.evaluation.harness import check_tasks, score_items

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "Is tea good?", "choices": ["yes", "it is bad and blue"], "answer": 0},
    {"question": "Is the sea red?", "choices": ["yes", "no, it is blue"], "answer": 1},
    {"question": "Is it so?", "choices": ["so", "bad"], "answer": 0},
]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a task of multiple-choice questions, in YAML; its data goes to a cache of the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def made(file: str = str(data), metric: str = "acc") -> str:
        place = tmp_path / "own.yaml"
        written: dict[str, Any] = {
            "task": "own_questions",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": file}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "doc_to_choice": "{{choices}}",
            "metric_list": [
                {"metric": metric, "aggregation": "f1" if metric == "f1" else "mean", "higher_is_better": True}
            ],
        }
        place.write_text(json.dumps(written))  # which is YAML as well
        return str(place)

    return made


def likeliest(model: Any, role: str, naive: Any, question: dict[str, Any]) -> int:
    """Return the choice with the highest log-prob, from full logits."""
    prompt = tuple(model.tokenizer(question["question"])["input_ids"])
    with model.reading(role) as network:
        sums = []
        for choice in question["choices"]:
            whole = tuple(model.tokenizer(f"{question['question']} {choice}")["input_ids"])
            assert whole[: len(prompt)] == prompt
            sums.append(naive(network, prompt, whole[len(prompt) :]).sum().item())
    return max(range(len(sums)), key=sums.__getitem__)


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_every_item_earns_what_full_logits_say(start, perturb, task, naive, role: str) -> None:
    model = start()
    perturb(model)
    found = score_items(model, role, [task()], None)
    expected = [float(likeliest(model, role, naive, one) == one["answer"]) for one in QUESTIONS]
    assert found == {f"own_questions/{n}": value for n, value in enumerate(expected)}


def test_so_many_items_as_are_asked_for(start, task) -> None:
    assert list(score_items(start(), "policy", [task()], 2)) == ["own_questions/0", "own_questions/1"]


def test_data_that_is_absent_is_named(start, task, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation\.harness=.*own\.yaml: cannot be carried out .*nowhere\.jsonl"):
        score_items(start(), "policy", [task(str(tmp_path / "nowhere.jsonl"))], None)


def test_a_metric_without_a_number_for_each_item_is_refused(start, task) -> None:
    with pytest.raises(DataError, match=r"own_questions gives its item 0 the .*, expected a number"):
        score_items(start(), "policy", [task(metric="f1")], None)


def test_tasks_are_looked_up_before_anything_is_trained(task, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tasks([task(), "arc_easy"])
    with pytest.raises(ConfigError, match=r"got 'arc_esay', expected a task of lm-eval .* Did you mean 'arc_easy'"):
        check_tasks(["arc_esay"])
    with pytest.raises(ConfigError, match=r"there is no file nowhere\.yaml"):
        check_tasks(["nowhere.yaml"])
    harness._read_index.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"needs the package lm-eval: pip install 'dpo-lab\[harness\]'"):
        check_tasks(["arc_easy"])


def test_an_item_that_is_read_in_several_ways_counts_by_the_first(start, task, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gsm8k's strict and flexible answers."""
    read = [("strict", 0, 0.0), ("strict", 1, 1.0), ("flexible", 0, 1.0), ("flexible", 1, 1.0)]
    samples = [{"doc_id": n, "filter": way, "metrics": ["acc"], "acc": value} for way, n, value in read]
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *_, **__: {"samples": {"sums": samples}})
    assert score_items(start(), "policy", [task()], None) == {"sums/0": 0.0, "sums/1": 1.0}
