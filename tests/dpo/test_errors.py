"""Errors: one family, exit codes, and hints."""

import pytest

from dpo.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DPOError,
    ModelError,
    RewardError,
    TrainingError,
    nearest,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (DataError, 1),
        (ModelError, 1),
        (RewardError, 1),
        (ConfigError, 2),
        (CheckpointError, 3),
        (TrainingError, 4),
    ],
)
def test_every_error_is_the_user_s_to_mend_and_has_an_exit_code(kind: type[DPOError], code: int) -> None:
    assert issubclass(kind, DPOError)
    assert kind("x").exit_code == code
    assert str(kind("file:3: got x")) == "file:3: got x"


def test_a_hint_names_a_close_word_or_nothing() -> None:
    assert nearest("ippo", ["dpo", "ipo", "kto"]) == " Did you mean 'ipo'?"
    assert nearest("max_step", iter(["seed", "max_steps"])) == " Did you mean 'max_steps'?"
    assert nearest("zebra", ["dpo", "ipo"]) == ""
    assert nearest("x", []) == ""
