"""Secrets go, whatever holds them; everything else stays."""

from pathlib import Path

import pytest

from dpo.redact import holds_secret, redact, redact_text

HF_SECRET = "hf_PlantedAbCdEfGhIjKlMnOpQrStUvWxYz12"
SK_SECRET = "sk-planted-0123456789abcdef"
HEX_SECRET = "0123456789abcdef0123456789abcdef01234567"


def test_redact_hides_by_key_and_by_value_at_every_depth_and_keeps_the_rest() -> None:
    config = {
        "model": {"name": "a/b", "hf_token": "anything", "revision": "main", "tokenizer": "a/b", "max_tokens": 512},
        "notes": f"see https://user:{HF_SECRET}@host and {SK_SECRET}",
        "list": [HEX_SECRET, {"API-Key": 12345, "Password": "x", "client_secret": ("y",)}],
        "add_special_tokens": True,
        "eos_token": None,
        "digest": HEX_SECRET + "89abcdef" * 3,  # 64 digits, a sha256: no key
        "task-list": "disk-cached rows",
        "path": Path("runs") / SK_SECRET,
        "rate": 1e-6,
    }
    assert redact(config) == {
        "model": {"name": "a/b", "hf_token": "[redacted]", "revision": "main", "tokenizer": "a/b", "max_tokens": 512},
        "notes": "see https://user:[redacted]@host and [redacted]",
        "list": ["[redacted]", {"API-Key": "[redacted]", "Password": "[redacted]", "client_secret": "[redacted]"}],
        "add_special_tokens": True,
        "eos_token": None,
        "digest": HEX_SECRET + "89abcdef" * 3,
        "task-list": "disk-cached rows",
        "path": "runs/[redacted]",
        "rate": 1e-6,
    }
    assert redact({"tokens": "abc", "token": 1}) == {"tokens": "[redacted]", "token": "[redacted]"}
    assert redact_text(f"x {HEX_SECRET.upper()} y") == "x [redacted] y"


def test_what_the_environment_holds_as_a_secret_is_one_whatever_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain words, long enough")
    monkeypatch.setenv("OTHER_API_KEY", "plain words, long enough and more")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "not a secret at all")
    said = "true: plain words, long enough and more, plain words, long enough. not a secret at all"
    assert redact_text(said) == "true: [redacted], [redacted]. not a secret at all"
    assert holds_secret("a/plain words, long enough/b")
    assert not holds_secret(f"true, not a secret at all, sk-learn, hf_words, {HEX_SECRET}")
    assert holds_secret(f"x{SK_SECRET}") is False  # within a word
    assert holds_secret(f"x/{HF_SECRET}")


def test_a_password_in_an_address_goes() -> None:
    assert redact_text("https://me:pass@host/a and ftp://me:p@x") == (
        "https://me:[redacted]@host/a and ftp://me:[redacted]@x"
    )
    assert redact_text("https:/me:pass@host") == "https:/me:[redacted]@host"
    assert redact_text("https://host:80/a@b and a:b@c") == "https://host:80/a@b and a:b@c"
