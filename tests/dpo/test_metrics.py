"""The schema's laws and the ledger's bytes."""

import json
import math
import os
from pathlib import Path

import pytest

from dpo import metrics
from dpo.errors import DataError, DPOError
from dpo.metrics import METRICS, Ledger, Metric, describe, read

PROMISED = {
    *(f"train/{name}" for name in ("loss", "learning_rate", "epoch", "global_step", "examples_seen", "tokens_seen")),
    *(
        f"{prefix}{name}"
        for prefix in ("", "eval/")
        for name in (
            *("reward/chosen", "reward/rejected", "reward/margin", "reward/accuracy"),
            *("logp/chosen", "logp/rejected", "length/chosen", "length/rejected", "kl/reference_point"),
        )
    ),
    *(f"policy/{name}" for name in ("loss", "approx_kl", "clip_fraction")),
    *(f"value/{name}" for name in ("loss", "clip_fraction", "explained_variance")),
    *(f"rollout/{name}" for name in ("score", "score_std", "gold_reward", "disagreement", "kl_coefficient", "updates")),
    *(f"rollout/{name}" for name in ("length", "entropy", "finished", "repetition")),
    *(
        f"eval/{name}"
        for name in ("pair/accuracy", "pair/margin", "distinct_2", "self_bleu", "choices", "text_nats", "harness")
    ),
    *("eval/sycophancy/flips", "eval/sycophancy/shift"),
    *("ptx/loss", "grad_norm", "kl/policy_reference", "eval/loss", "eval/length", "eval/win_rate"),
    *("eval/gold_reward", "eval/proxy_reward"),
}
NOT_REPEATABLE = {"time/seconds", "time/step_seconds", "tokens_per_second", "memory/peak"}


def fill(ledger: Ledger, steps: range, seconds: float = 0.0) -> None:
    for step in steps:
        ledger.append(step, "train", {"train/loss": 1 / (step + 3), "time/seconds": seconds + step, "grad_norm": 0.1})
        if step % 2 == 0:
            ledger.append(step, "eval", {"eval/loss": math.nan if step == 4 else 0.5})


# --- the schema ---


def test_every_promised_name_is_defined_and_no_other() -> None:
    assert set(METRICS) == PROMISED | NOT_REPEATABLE


def test_every_metric_has_a_unit_and_an_estimator_of_its_own() -> None:
    assert all(name == metric.name for name, metric in METRICS.items())
    assert all(metric.unit and metric.estimator.endswith(".") for metric in METRICS.values())
    estimators = [metric.estimator for metric in METRICS.values()]
    assert len(set(estimators)) == len(estimators)


def test_a_name_defined_twice_is_refused() -> None:
    loss = Metric("train/loss", "nats", "Mean.")
    with pytest.raises(AssertionError, match="train/loss"):
        metrics._index((loss, loss))


def test_only_clocks_and_memory_are_not_deterministic() -> None:
    assert {name for name, metric in METRICS.items() if not metric.deterministic} == NOT_REPEATABLE


def test_describe_names_unit_estimator_and_direction() -> None:
    text = describe("reward/accuracy")
    assert text.startswith("reward/accuracy [share, 0 to 1]: ")
    assert "tie counting 1/2" in text
    assert text.endswith("Higher is better.")
    assert "better" not in describe("logp/chosen")
    with pytest.raises(ValueError, match=r"Did you mean 'reward/margin'\?"):
        describe("reward/margins")


# --- the ledger ---


def test_a_repeated_run_writes_the_same_bytes_though_its_clock_differs(tmp_path: Path) -> None:
    for name, seconds in (("one", 0.0), ("two", 7.0)):
        ledger = Ledger(tmp_path / name)
        fill(ledger, range(6), seconds)
        ledger.close()
    one, two = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    assert b"seconds" not in one
    clock = read(tmp_path / "two" / "performance.jsonl")
    assert clock[3] == {"step": 3, "kind": "train", "time/seconds": 10.0}


def test_the_order_in_which_values_are_given_does_not_reach_the_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        given = {"train/loss": 1.0, "grad_norm": 2.0, "reward/margin": 3.0}
        Ledger(tmp_path / name).append(1, "train", given if name == "one" else dict(reversed(given.items())))
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()


def test_a_row_is_on_disk_as_soon_as_it_is_appended_and_is_returned_whole(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    row = ledger.append(1, "train", {"train/loss": 0.25, "time/seconds": 3.5, "train/examples_seen": 8})
    expected = {"step": 1, "kind": "train", "train/loss": 0.25, "time/seconds": 3.5, "train/examples_seen": 8}
    assert row == expected
    kept = read(tmp_path / "metrics.jsonl")  # the ledger is still open
    assert kept == [{"step": 1, "kind": "train", "train/examples_seen": 8, "train/loss": 0.25}]
    assert isinstance(kept[0]["train/examples_seen"], int)


@pytest.mark.parametrize("step", [-1, 0, 3, 4, 5, 9])
def test_rewound_and_run_again_the_ledger_is_that_of_an_unbroken_run(tmp_path: Path, step: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ledger = Ledger(whole)
    fill(ledger, range(8))
    ledger.close()
    fill(Ledger(broken), range(6))
    for file in ("metrics.jsonl", "performance.jsonl"):
        with (broken / file).open("ab") as torn:
            torn.write(b'{"step": 6, "kind": "tra')
    ledger = Ledger(broken)
    ledger.rewind(step)
    assert all(row["step"] <= step for row in read(broken / "metrics.jsonl"))
    fill(ledger, range(min(step, 5) + 1, 8))
    ledger.close()
    for file in ("metrics.jsonl", "performance.jsonl"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()


def test_a_half_written_last_line_is_not_read_and_not_glued_to_the_next_row(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), range(2))
    with (tmp_path / "metrics.jsonl").open("ab") as torn:
        torn.write(b'{"step": 2, "kind"')
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [0, 0, 1]
    Ledger(tmp_path).append(2, "train", {"train/loss": 1.0})
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [0, 0, 1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    fill(Ledger(tmp_path), range(3))
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for bad in (b'{"step": 0, \n', b'{"kind": "train"}\n', b"[1]\n", b'{"step":0,"kind":"train","grad_norm":"x"}\n'):
        file.write_bytes(lines[0] + bad + lines[2])
        for action in (read, lambda path: Ledger(path.parent)):
            with pytest.raises(DataError, match=r"metrics\.jsonl:2: got .*expected one JSON row"):
                action(file)


def test_numbers_that_are_not_finite_are_strict_json_and_read_back_as_numbers(tmp_path: Path) -> None:
    Ledger(tmp_path).append(0, "train", {"train/loss": math.nan, "grad_norm": math.inf, "logp/chosen": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=refuse)
    assert (row["train/loss"], row["grad_norm"], row["logp/chosen"]) == ("nan", "inf", "-inf")
    (row,) = read(tmp_path / "metrics.jsonl")
    assert math.isnan(float(row["train/loss"]))
    assert (row["grad_norm"], row["logp/chosen"]) == (math.inf, -math.inf)


def test_an_unknown_name_is_refused_with_the_nearest_and_nothing_is_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(ValueError, match=r"'rewards/margin' is not defined.*Did you mean 'reward/margin'\?"):
        ledger.append(0, "train", {"train/loss": 1.0, "rewards/margin": 1.0})
    assert read(tmp_path / "metrics.jsonl") == []
    ledger.append(0, "train", {"custom/entropy": 1.0})
    assert read(tmp_path / "metrics.jsonl")[0]["custom/entropy"] == 1.0
    with pytest.raises(ValueError, match="custom/"):
        ledger.append(0, "train", {"custom/": 1.0})


def test_steps_never_go_back_also_after_the_ledger_is_opened_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    fill(ledger, range(4))
    for reopened in (ledger, Ledger(tmp_path)):
        with pytest.raises(ValueError, match=r"step 2.*expected .* at step 3 or later.*Rewind"):
            reopened.append(2, "train", {"train/loss": 1.0})
    with pytest.raises(ValueError, match="kind 'test'"):
        ledger.append(5, "test", {"train/loss": 1.0})  # pyright: ignore[reportArgumentType]


def test_sync_forces_both_files_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    ledger.sync()
    assert sorted(synced) == sorted((tmp_path / name).stat().st_ino for name in ("metrics.jsonl", "performance.jsonl"))


def test_a_full_disk_is_an_error_with_place_and_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    ledger = Ledger(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DPOError, match=r"cannot write the ledger: .*No space left.* MiB are free.*Free some space"):
        ledger.sync()
    (tmp_path / "file").touch()
    with pytest.raises(DPOError, match="cannot write the ledger"):
        Ledger(tmp_path / "file" / "run")
