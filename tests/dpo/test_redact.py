"""Secrets go, whatever holds them; everything else stays."""

from pathlib import Path

from dpo.redact import redact, redact_text

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
