"""Probes put real models' log-probs where the measures want them."""

import json
from pathlib import Path

import pytest

from dpo.errors import CheckpointError, DataError
from dpo.evaluation.probes import CHOICES, FLIPS, SHIFT, TEXT, Probed, Probes, probe


@pytest.fixture
def model(start, perturb):
    model = start()
    perturb(model)
    return model


@pytest.fixture
def files(tmp_path: Path, write_rows) -> dict[str, str]:
    rows = [
        {"prompt": "What of tea?", "choices": ["It is good.", "It is bad and blue."], "label": 0},
        {"prompt": "What of the sea?", "choices": ["No.", "It is good."], "label": 1},
    ]
    write_rows(rows, "choices.jsonl")
    write_rows([{"text": "Tea is good. The sea is blue."}, {"text": "It is so."}], "text.jsonl")
    return {"choices": str(tmp_path / "choices.jsonl"), "text": str(tmp_path / "text.jsonl"), "opinions": "built-in"}


def test_each_probe_has_a_value_for_every_unit(model, files):
    found = probe(model, "policy", Probes(**files))
    assert {name: len(units) for name, units in found.values.items()} == {CHOICES: 2, FLIPS: 24, SHIFT: 24, TEXT: 2}
    assert all(0 <= value <= 1 for value in found.values[CHOICES].values())
    assert {name: one.n for name, one in found.estimates().items()} == {CHOICES: 2, FLIPS: 24, SHIFT: 24, TEXT: 2}


def test_text_is_scored_as_full_logits_do(model, files, naive):
    found = probe(model, "policy", Probes(text=files["text"]))
    with model.reading("policy") as network:
        for value, row in zip(found.values[TEXT].values(), Path(files["text"]).read_text().splitlines(), strict=True):
            ids = tuple(model.tokenizer(json.loads(row)["text"])["input_ids"])
            expected = -naive(network, ids[:1], ids[1:]).sum().item() / (len(ids) - 1)
            assert value == pytest.approx(expected, abs=1e-4)


def test_the_role_that_answers_is_the_one_asked(model, files):
    policy, reference = (probe(model, role, Probes(**files)) for role in ("policy", "reference"))
    assert policy.values[TEXT] != reference.values[TEXT]
    assert policy.values[SHIFT] != reference.values[SHIFT]


def test_only_what_is_asked_for_is_measured(model, files):
    assert set(probe(model, "policy", Probes(choices=files["choices"])).values) == {CHOICES}


def test_what_is_written_is_read_back_and_damage_is_named(tmp_path: Path):
    found = Probed({CHOICES: {"a:1": 1.0, "a:2": 0.5}})
    found.write(tmp_path / "probes.json")
    assert Probed.read(tmp_path / "probes.json") == found
    (tmp_path / "probes.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"probes\.json: is damaged .* start the run again"):
        Probed.read(tmp_path / "probes.json")


def test_faulty_files_are_found_before_a_model_is_loaded(tmp_path: Path, write_rows):
    Probes(opinions="built-in").check()
    file = write_rows([{"prompt": "a", "choices": ["same", "same"], "label": 0}], "choices.jsonl")
    with pytest.raises(DataError, match=r"choices\.jsonl"):
        Probes(choices=file).check()
    with pytest.raises(DataError, match="nowhere"):
        Probes(text=str(tmp_path / "nowhere.jsonl")).check()
