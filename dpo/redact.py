"""Secrets out of what a run writes or sends: its settings, its summary, its error messages.

A secret is known by the key it stands under or by its look, wherever in a nested setting or within a text it is.
"""

import re
from collections.abc import Mapping
from typing import Any

_HIDDEN = "[redacted]"
# A key that names a secret. A tokenizer is none, nor is a number under a plural such as max_tokens.
_SECRET_KEY = re.compile(r"tokens?(?!i[sz])|secret|api[_-]?key|password", re.IGNORECASE)
# Hugging Face tokens; the sk-... keys of model vendors; 40 hex digits, as wandb's keys are.
_SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{4,}|sk-[A-Za-z0-9_-]{4,}|[0-9a-f]{40}(?![A-Za-z0-9]))", re.IGNORECASE
)


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy as plain data (dicts, lists, numbers, text) in which every secret reads "[redacted]".

    A value is a secret when its key says so (token, secret, api key, password) unless it is None or a truth value, and
    text is one where it looks like a key. Rather a harmless value too many than a secret too few: a 40-digit commit
    hash goes as well.
    """
    return {str(key): _HIDDEN if _is_secret(str(key), value) else _redacted(value) for key, value in mapping.items()}


def redact_text(text: str) -> str:
    """Return the text with every part that looks like a key replaced by "[redacted]"."""
    return _SECRET_VALUE.sub(_HIDDEN, text)


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(one) for one in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact_text(str(value))


def _is_secret(key: str, value: Any) -> bool:
    named = _SECRET_KEY.search(key)
    if named is None or value is None or isinstance(value, bool):
        return False
    return not (named[0].lower() == "tokens" and isinstance(value, int | float))
