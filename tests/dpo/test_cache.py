"""Where the cache is."""

from pathlib import Path

from dpo.cache import cache_folder


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("DPO_LAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dpo-lab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "dpo-lab"
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
