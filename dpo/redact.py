"""Secrets out of what a run writes or sends: its settings, its summary, its error messages.

A secret is known by the key it stands under, by its look, or because an environment variable such as HF_TOKEN holds it,
wherever in a nested setting or within a text it is.
"""

import os
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
# A key of a vendor in full: what is shorter may be a word, such as sk-learn.
_VENDOR_KEY = re.compile(r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})")
# One slash as well: a path of the file system joins two of them.
_PASSWORD_IN_URL = re.compile(r"(?<=:/)(/?[^/\s:@]*:)[^/\s@]+(?=@)")
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|SECRET|API_?KEY|ACCESS_KEY|PASSWORD)$", re.IGNORECASE)
_SHORTEST = 12  # characters; less is a word or a switch rather than a key


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy as plain data (dicts, lists, numbers, text) in which every secret reads "[redacted]".

    A value is a secret when its key says so (token, secret, api key, password) unless it is None or a truth value, and
    text is one where it looks like a key. Rather a harmless value too many than a secret too few: a 40-digit commit
    hash goes as well.
    """
    return {str(key): _HIDDEN if _is_secret(str(key), value) else _redacted(value) for key, value in mapping.items()}


def redact_text(text: str) -> str:
    """Return the text with every key, and every password in a URL, replaced by "[redacted]"."""
    for secret in _known():
        text = text.replace(secret, _HIDDEN)
    return _PASSWORD_IN_URL.sub(rf"\1{_HIDDEN}", _SECRET_VALUE.sub(_HIDDEN, text))


def holds_secret(text: str) -> bool:
    """Tell whether a key stands in the text beyond doubt: one that the environment holds, or a vendor's in full."""
    return any(secret in text for secret in _known()) or _VENDOR_KEY.search(text) is not None


def _known() -> list[str]:
    """Return the secrets that environment variables hold, the longest first: one may be part of another."""
    found = {value.strip() for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)


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
