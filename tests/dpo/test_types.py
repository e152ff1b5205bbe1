"""The records: frozen, shaped, and light; the package's public names."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

import dpo
from dpo.types import JudgementLogps, LossOutput, PairLogps


def pair(**changes: object) -> PairLogps:
    one, length = torch.zeros(3), torch.ones(3, dtype=torch.int64)
    given = {
        "policy_chosen": one, "policy_rejected": one, "reference_chosen": one, "reference_rejected": one,
        "chosen_length": length, "rejected_length": length,
    }  # fmt: skip
    return PairLogps(**{**given, **changes})  # pyright: ignore[reportArgumentType]


def test_a_pair_is_certain_and_weighs_one_unless_said_otherwise() -> None:
    assert pair().preference is None
    assert pair().weight is None


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        pair().weight = torch.ones(3)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy_rejected": torch.zeros(2)},  # another batch
        {"policy_chosen": torch.zeros(3, 1)},  # another rank
        {"policy_chosen": torch.zeros(3, dtype=torch.int64)},  # no log-probs
        {"policy_chosen": None},
        {"weight": torch.zeros(4)},
    ],
)
def test_shapes_and_dtypes_are_checked_where_the_tests_run(wrong: dict[str, object]) -> None:
    with pytest.raises(Exception, match=r"[Tt]ype-check|violates type hint"):
        pair(**wrong)


def test_judgements_and_outputs_have_the_promised_fields() -> None:
    assert [f.name for f in fields(JudgementLogps)] == [
        "policy", "reference", "desirable", "length", "policy_mismatched", "reference_mismatched", "weight",
        "mean_log_ratio",
    ]  # fmt: skip
    output = LossOutput(loss=torch.tensor(0.5), losses=torch.zeros(2), rewards=torch.zeros(2, 2))
    assert output.metrics == {}


def test_every_public_name_can_be_had_and_is_the_room_s_own() -> None:
    assert dpo.__all__ == sorted(dpo.__all__)
    for name in dpo.__all__:
        assert getattr(dpo, name).__module__.startswith("dpo."), name
    assert dpo.PairLogps is PairLogps
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        dpo.Nothing  # noqa: B018


def test_importing_the_package_or_its_command_line_is_light() -> None:
    program = (
        "import sys, dpo, dpo.cli; print(sorted({'torch', 'transformers', 'peft', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
