"""Errors for the user. Each message names the place, what was got, what was expected and the fix."""

from collections.abc import Iterable
from difflib import get_close_matches


class DPOError(Exception):
    """Anything the user can mend. The command line prints its message alone and exits with `exit_code`."""

    exit_code: int = 1


class DataError(DPOError):
    """A dataset that cannot be read, recognised or trained on; the message names `file:line`."""


class ConfigError(DPOError):
    """A run that cannot be built: an unknown key or objective, or a value outside its range."""

    exit_code = 2


class ModelError(DPOError):
    """A model, adapter or tokenizer that cannot be loaded, or that cannot do what the run asks of it."""


class RewardError(DPOError):
    """A reward that fails, or that does not return one finite number for each answer; the message names the row."""


class CheckpointError(DPOError):
    """A checkpoint that is damaged, or that belongs to another run."""

    exit_code = 3


class TrainingError(DPOError):
    """A run that had to stop: its numbers are no longer finite, or its reference is not its start."""

    exit_code = 4


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known word closest to `word`, or "" where none is close."""
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
